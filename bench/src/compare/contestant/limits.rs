//! What no consumer of a slot can be faster than: reading it and doing nothing.
//!
//! `pg_recvlogical` shows how fast a walsender sends to an eager reader, one message at a time.
//! `pg_logical_slot_peek_binary_changes` shows how fast the source decodes when nothing is sent at all.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::{Ground, Outcome, Watch};
use crate::compare::arena::Arena;
use crate::compare::network::Way;
use crate::compare::workload::DATABASE;
use crate::load;
use crate::usage;

const SLOT: &str = "bare";

/// Creates the slot and keeps its position; it never gets a replica.
pub(super) async fn prepare(arena: &Arena) {
    create_slot(arena).await;
    arena.keep_slot(SLOT, SLOT).await;
}

/// Creates the bare slot.
pub(crate) async fn create_slot(arena: &Arena) {
    let client = arena.session().await;
    client
        .run(&format!(
            "SELECT pg_create_logical_replication_slot('{SLOT}', 'pgoutput')"
        ))
        .await;
}

/// Drops it as soon as nobody reads it.
pub(crate) async fn drop_slot(arena: &Arena) {
    arena.drop_slot(SLOT).await;
}

/// Starts `pg_recvlogical` on the bare slot; without an end it reads until it is killed.
pub(crate) fn reader(arena: &Arena, port: u16, end: Option<&str>) -> Result<Child> {
    let mut command = Command::new(load::program(&arena.source, "pg_recvlogical"));
    command
        .args(["-h", "127.0.0.1", "-p", &port.to_string()])
        .args(["-U", "postgres", "-d", DATABASE])
        .args(["-S", SLOT, "--start", "--no-loop", "-f", "/dev/null"])
        .args(["-o", "proto_version=1", "-o", "binary=true"])
        .args(["-o", &format!("publication_names={DATABASE}")]);
    if let Some(end) = end {
        command.args(["--endpos", end]);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start pg_recvlogical")
}

pub(super) async fn receive(ground: Ground<'_>) -> Result<Outcome> {
    let arena = ground.arena;
    arena.restore_slot(SLOT, SLOT).await;
    let way = Way::to(&arena.source, ground.network, ground.wan).await;
    let watch = Watch::begin(&arena.source, None)?;
    let programs = usage::of_ended_programs()?;
    let reader = reader(arena, way.port(), Some(&ground.backlog.end))?;
    let output = timeout(ground.patience, reader.wait_with_output()).await??;
    let seconds = watch.elapsed();
    ensure!(
        output.status.success(),
        "pg_recvlogical: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut round = watch.end_after(seconds)?;
    round.cpu_agent = Some(usage::of_ended_programs()? - programs);
    round.wire_bytes = way.bytes();
    Ok(Outcome::Measured(round))
}

pub(super) async fn peek(ground: Ground<'_>) -> Result<Outcome> {
    let arena = ground.arena;
    arena.restore_slot(SLOT, SLOT).await;
    let client = arena.session().await;
    let watch = Watch::begin(&arena.source, None)?;
    let count = client
        .number(&format!(
            "SELECT count(*) FROM pg_logical_slot_peek_binary_changes('{SLOT}', '{}', NULL,
                 'proto_version', '1', 'binary', 'true', 'publication_names', '{DATABASE}')",
            ground.backlog.end
        ))
        .await;
    let round = watch.end_after(watch.elapsed())?;
    let wanted = ground.backlog.size.changes;
    ensure!(
        u64::try_from(count)? >= wanted,
        "only {count} messages for {wanted} changes"
    );
    Ok(Outcome::Measured(round))
}
