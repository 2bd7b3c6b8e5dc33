//! A physical standby of a server, which keeps its logical slots in step (17 and later) and can take its place.

use std::process::Command;

use crate::rundir::directory_for;
use crate::server::{PgServer, give_away};

/// Copies a server's data while it is down, and starts the copy as its standby by a physical slot of this name.
pub async fn standby_of(server: &PgServer, slot: &str) -> PgServer {
    let create = format!("SELECT pg_create_physical_replication_slot('{slot}', true)");
    server.client("postgres").await.rows(&create).await;
    server.stop().await;
    let directory = directory_for("standby");
    give_away(&directory);
    let data = directory.join("data");
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(server.data_directory()).arg(&data);
    assert!(copy.status().expect("cp can be started").success());
    let _ = std::fs::remove_dir_all(data.join("pg_replslot").join(slot));
    server.start_again().await;
    let primary = format!(
        "host=127.0.0.1 port={} user=postgres dbname=postgres",
        server.port()
    );
    server
        .same_options()
        .set("primary_conninfo", &primary)
        .set("primary_slot_name", slot)
        .set("hot_standby_feedback", "on")
        .set("sync_replication_slots", "on")
        .set("synchronized_standby_slots", "")
        .set("wal_receiver_status_interval", "1")
        .file("standby.signal", "")
        .data_from(data)
        .start()
        .await
}
