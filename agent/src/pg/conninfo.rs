//! Placeholder; replaced by the connection work.
use std::path::PathBuf;

/// How to reach a server.
#[derive(Clone, Debug)]
pub struct ConnInfo {
    pub(super) config: tokio_postgres::Config,
}

/// Why a connection URL cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConnInfoError(pub String);

impl ConnInfo {
    /// Reads a libpq-style URL.
    pub fn parse(url: &str, _password_file: Option<PathBuf>) -> Result<Self, ConnInfoError> {
        let config = url
            .parse()
            .map_err(|e: tokio_postgres::Error| ConnInfoError(e.to_string()))?;
        Ok(Self { config })
    }

    /// The database named in the URL; the user's name where it names none.
    pub fn dbname(&self) -> &str {
        self.config.get_dbname().unwrap_or("postgres")
    }

    /// The same server, another database.
    #[must_use]
    pub fn with_dbname(&self, dbname: &str) -> Self {
        let mut config = self.config.clone();
        config.dbname(dbname);
        Self { config }
    }

    /// The role we connect as.
    pub fn user(&self) -> &str {
        self.config.get_user().unwrap_or("postgres")
    }

    /// Environment for libpq programs (`pg_dump`, `pg_restore`): PGHOST, PGPORT, PGUSER, PGDATABASE,
    /// PGPASSWORD, PGSSLMODE and so on, so that no secret shows in a process list.
    pub fn libpq_environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

impl std::fmt::Display for ConnInfo {
    /// `host:port/dbname`, never with a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.config.get_hosts())
    }
}
