//! What a server is started with: parameters, `pg_hba.conf` lines, files, and where its data comes from.

use std::path::{Path, PathBuf};

use super::PgServer;
use crate::binaries::Binaries;

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    pub(super) name: &'static str,
    pub(super) binaries: Binaries,
    pub(super) settings: Vec<(String, String)>,
    pub(super) hba: Vec<String>,
    pub(super) files: Vec<(String, Vec<u8>)>,
    pub(super) data_below: Option<PathBuf>,
    pub(super) data_from: Option<PathBuf>,
    pub(super) template: &'static str,
}

impl ServerOptions {
    /// A source: logical decoding is possible.
    pub fn source() -> Self {
        Self::new("source", Binaries::of_source())
            .set("wal_level", "logical")
            .set("max_prepared_transactions", "20")
    }

    /// A replica.
    pub fn replica() -> Self {
        Self::new("replica", Binaries::of_replica())
            .set("wal_level", "replica")
            .set("max_prepared_transactions", "64")
    }

    pub(super) fn new(name: &'static str, binaries: Binaries) -> Self {
        let options = Self {
            name,
            binaries,
            settings: Vec::new(),
            hba: Vec::new(),
            files: Vec::new(),
            data_below: None,
            data_from: None,
            template: name,
        };
        // Durability against a power cut is PostgreSQL's business, not what is tested here.
        options
            .set("fsync", "off")
            .set("full_page_writes", "off")
            .set("max_connections", "300")
            // Tests that share a server leave their slots behind: there must be as many as there are tests.
            .set("max_wal_senders", "100")
            .set("max_replication_slots", "400")
            .set("shared_buffers", "64MB")
            .set("max_wal_size", "2GB")
            .set("jit", "off")
            .set("log_line_prefix", "%m [%p] %a %d ")
    }

    /// Sets a parameter of the server; the last value of a name wins.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(present, _)| present != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Puts a line before those of `pg_hba.conf` (which trusts everybody).
    #[must_use]
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// Puts a file of the server's own (a certificate) into the data directory, mode 0600.
    #[must_use]
    pub fn file(mut self, name: &str, contents: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), contents.into()));
        self
    }

    /// Keeps the data directory below this directory, for instance a small file system.
    #[must_use]
    pub fn data_below(mut self, directory: &Path) -> Self {
        self.data_below = Some(directory.to_path_buf());
        self
    }

    /// Initialised apart from all other sources, so that its system identifier is another.
    #[must_use]
    pub fn of_another_cluster(mut self) -> Self {
        self.template = "another";
        self
    }

    /// Takes over this data directory instead of a new one.
    #[must_use]
    pub(crate) fn data_from(mut self, data: PathBuf) -> Self {
        self.data_from = Some(data);
        self
    }

    /// Starts the server and waits until it accepts connections.
    pub async fn start(self) -> PgServer {
        PgServer::start(self).await
    }
}
