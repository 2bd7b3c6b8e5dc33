//! The source as of an LSN, by physical means: a base backup and PostgreSQL's own recovery.
//!
//! An oracle that shares nothing with logical decoding: whatever the replica says it equals, the
//! source itself can be restored to that LSN and compared row by row.
//!
//! # Invariants
//! Recovery stops before the first WAL record that starts at or after the LSN, so a commit
//! record that ends there is the last one applied.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::rundir::directory_for;
use crate::server::{PgServer, ServerOptions, give_away, server_command};
use crate::wait::{PATIENCE, wait_until};

/// A base backup of a server that still has all WAL written since.
pub struct Backup {
    data: PathBuf,
    wal: PathBuf,
    options: ServerOptions,
}

impl Backup {
    /// Backs up a running server; it must keep its WAL (`wal_keep_size`).
    pub async fn take(server: &PgServer) -> Self {
        let directory = directory_for("backup");
        give_away(&directory);
        let data = directory.join("data");
        let mut command = server_command(&server.program("pg_basebackup"));
        command
            .args([
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "--no-sync",
                "-c",
                "fast",
            ])
            .args(["-p", &server.port().to_string(), "-D"])
            .arg(&data);
        let output = tokio::task::spawn_blocking(move || run(command)).await;
        output.expect("the thread does not panic");
        Self {
            data,
            wal: server.data_directory().join("pg_wal"),
            options: server.same_options(),
        }
    }

    /// Restores to `lsn` and opens the result.
    pub async fn restore_to(self, lsn: &str) -> PgServer {
        let fetch = format!("cp \"{}/%f\" \"%p\"", self.wal.display());
        let server = self
            .options
            .set("restore_command", &fetch)
            .set("recovery_target_lsn", lsn)
            .set("recovery_target_inclusive", "off")
            .set("recovery_target_action", "promote")
            .file("recovery.signal", "")
            .data_from(self.data)
            .start()
            .await;
        let client = server.client("postgres").await;
        wait_until("the restored server to be open", PATIENCE, || {
            client.holds("SELECT NOT pg_is_in_recovery()")
        })
        .await;
        server
    }
}

fn run(mut command: Command) {
    let output = command
        .stdin(Stdio::null())
        .output()
        .expect("pg_basebackup can be started");
    assert!(
        output.status.success(),
        "pg_basebackup failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
