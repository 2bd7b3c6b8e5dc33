//! One source with one backlog, and for each family of contestants a replica that was caught up before it.
//!
//! ```text
//! source:  tables, slots "base_*" from before the backlog ──▶ backlog ──▶ marker
//! family:  replica's data directory, kept from the same moment
//! ```
//!
//! The backlog is made once. Before every round the family's replica is put back to the kept data
//! directory and its slot is copied anew from the `base_*` slot, so that every round drains the very same WAL
//! into the very same replica.
//!
//! # What it does not do
//! The source is not put back: rounds leave nothing on it but a few heartbeats of the agent behind
//! the marker, and warm caches, which is why rounds alternate.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dr_agent_tests::client::Client;
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::wait::{PATIENCE, wait_for};

use super::workload::{DATABASE, Size, Workload};
use crate::servers;

/// The source of one workload.
pub(crate) struct Arena {
    /// The server.
    pub(crate) source: PgServer,
    /// Scripts and the like.
    pub(crate) directory: PathBuf,
    scale: f64,
    workload: Workload,
}

/// The end of the backlog.
#[derive(Clone, Debug)]
pub(crate) struct Backlog {
    /// How much it is.
    pub(crate) size: Size,
    /// The WAL's end before the marker was written: who is beyond it has the marker.
    pub(crate) before_marker: String,
    /// The WAL's end after it.
    pub(crate) end: String,
    /// Bytes of WAL.
    pub(crate) wal_bytes: i64,
}

impl Arena {
    /// Starts the source and creates the workload's tables.
    pub(crate) async fn open(workload: Workload, scale: f64, fsync: bool) -> Result<Self> {
        let source = options(ServerOptions::source(), fsync).start().await;
        workload.set_up(&source, scale).await?;
        Ok(Self {
            source,
            directory: directory_for("arena"),
            scale,
            workload,
        })
    }

    /// A session on the source.
    pub(crate) async fn session(&self) -> Client {
        self.source.client(DATABASE).await
    }

    /// Makes the backlog; every family has its base by now.
    pub(crate) async fn run_workload(&self) -> Result<Backlog> {
        let client = self.session().await;
        let begin = wal_end(&client).await?;
        client.run(&mark(1)).await;
        let size = self
            .workload
            .run(&self.source, self.scale, &self.directory)
            .await?;
        // What was committed asynchronously is on disk after this, and no checkpoint is due for a while.
        client.run("CHECKPOINT").await;
        let before_marker = wal_end(&client).await?;
        client.run(&mark(2)).await;
        let end = wal_end(&client).await?;
        let wal_bytes = client
            .number(&format!("SELECT ('{end}'::pg_lsn - '{begin}')::bigint"))
            .await;
        Ok(Backlog {
            size,
            before_marker,
            end,
            wal_bytes,
        })
    }

    /// Keeps a slot's present position as `base_<name>`; nobody may be using it.
    pub(crate) async fn keep_slot(&self, slot: &str, base: &str) {
        self.copy_slot(slot, &format!("base_{base}")).await;
    }

    /// Puts a slot back to what was kept as `base_<name>`.
    pub(crate) async fn restore_slot(&self, slot: &str, base: &str) {
        self.drop_slot(slot).await;
        self.copy_slot(&format!("base_{base}"), slot).await;
    }

    /// Drops a slot as soon as nobody uses it.
    pub(crate) async fn drop_slot(&self, slot: &str) {
        let sql = format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'"
        );
        self.once_free(slot, &sql).await;
    }

    async fn copy_slot(&self, from: &str, to: &str) {
        let sql = format!("SELECT pg_copy_logical_replication_slot('{from}', '{to}')");
        self.once_free(from, &sql).await;
    }

    /// The walsender of a reader that has just ended may need a moment to notice.
    async fn once_free(&self, slot: &str, sql: &str) {
        let client = self.session().await;
        wait_for(&format!("slot {slot} to be free"), PATIENCE, || {
            client.try_rows(sql)
        })
        .await;
    }
}

/// A replica that was caught up before the backlog, and can be put back to that.
pub(crate) struct Base {
    /// The server; running between [`Base::restore`] and [`Base::retire`].
    pub(crate) replica: PgServer,
    kept: PathBuf,
}

impl Base {
    /// An empty replica.
    pub(crate) async fn new_replica(fsync: bool) -> PgServer {
        options(ServerOptions::replica(), fsync).start().await
    }

    /// Stops the replica and keeps its data directory.
    pub(crate) async fn keep(replica: PgServer) -> Result<Self> {
        let client = replica.client(DATABASE).await;
        client.run("SET default_transaction_read_only = off").await;
        client.run("VACUUM ANALYZE").await;
        drop(client);
        replica.stop().await;
        let kept = directory_for("base").join("data");
        copy(replica.data_directory(), &kept)?;
        Ok(Self { replica, kept })
    }

    /// Puts the data directory back and starts the server.
    pub(crate) async fn restore(&self) -> Result<()> {
        self.retire().await;
        let data = self.replica.data_directory();
        fs::remove_dir_all(data).context("remove the replica of the last round")?;
        copy(&self.kept, data)?;
        self.replica.start_again().await;
        Ok(())
    }

    /// Stops the server; its data is not needed any more.
    pub(crate) async fn retire(&self) {
        if self.replica.is_running() {
            self.replica.stop_immediately().await;
        }
    }
}

/// The settings of every server of the comparison.
///
/// What runs by the clock and not by the work is kept out of the rounds: checkpoints and autovacuum.
fn options(options: ServerOptions, fsync: bool) -> ServerOptions {
    servers::tuned(options, fsync)
        .set("checkpoint_timeout", "1h")
        .set("max_wal_size", "16GB")
        .set("autovacuum", "off")
        .set("max_prepared_transactions", "20")
        .set("max_worker_processes", "16")
}

/// Marks the source's history before (1) and behind (2) the backlog.
fn mark(id: u32) -> String {
    format!("INSERT INTO bench_marker VALUES ({id}, clock_timestamp())")
}

/// The end of the WAL written so far.
pub(crate) async fn wal_end(client: &Client) -> Result<String> {
    let end = client.value("SELECT pg_current_wal_insert_lsn()").await;
    end.context("a server has a WAL position")
}

/// Copies a directory and waits until it is on disk, so that writing it back disturbs no measurement.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .args([from, to])
        .status()?;
    ensure!(copied.success(), "cannot copy {}", from.display());
    let synced = Command::new("sync").arg("-f").arg(to).status()?;
    ensure!(synced.success(), "cannot sync {}", to.display());
    Ok(())
}

/// How long anything of a contestant's preparation may take.
pub(crate) const PREPARE_MAX: Duration = servers::CATCH_UP_MAX;
