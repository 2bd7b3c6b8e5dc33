//! PostgreSQL's own subscription, configured as fast as it goes: binary, streaming.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use dr_agent_tests::server::PgServer;
use dr_agent_tests::wait::wait_until;

use super::{CopyGround, Ground, Outcome, Watch, confirms, expect_equal, marker_arrives};
use crate::compare::arena::{Arena, Base, PREPARE_MAX, wal_end};
use crate::compare::network::Way;
use crate::compare::workload::DATABASE;
use crate::load;

/// Subscription and slot; the publication has the same name.
const NAME: &str = "bench";

const IN_SYNC: &str = "SELECT count(*) > 0 AND bool_and(srsubstate = 'r') FROM pg_subscription_rel";

/// Copies the schema, subscribes, and waits until nothing is left to do.
pub(crate) async fn attach(arena: &Arena, replica: &PgServer, port: u16) -> Result<()> {
    copy_schema(arena, replica).await?;
    let client = replica.client(DATABASE).await;
    client.run(&create(&arena.source, port)).await;
    wait_until("the subscription's copy", PREPARE_MAX, || {
        client.holds(IN_SYNC)
    })
    .await;
    let source = arena.session().await;
    let end = wal_end(&source).await?;
    let position = format!(
        "SELECT confirmed_flush_lsn >= '{end}' FROM pg_replication_slots WHERE slot_name = '{NAME}'"
    );
    wait_until("the subscription to catch up", PREPARE_MAX, || {
        source.holds(&position)
    })
    .await;
    Ok(())
}

/// Ends the subscription and drops its slot.
pub(crate) async fn detach(arena: &Arena, replica: &PgServer) {
    replica
        .run(DATABASE, &format!("ALTER SUBSCRIPTION {NAME} DISABLE"))
        .await;
    arena.drop_slot(NAME).await;
}

pub(super) async fn prepare(arena: &Arena, fsync: bool) -> Result<Base> {
    let replica = Base::new_replica(fsync).await;
    attach(arena, &replica, arena.source.port()).await?;
    replica
        .run(DATABASE, &format!("ALTER SUBSCRIPTION {NAME} DISABLE"))
        .await;
    arena.keep_slot(NAME, NAME).await;
    Base::keep(replica).await
}

pub(super) async fn drain(ground: Ground<'_>, base: &Base) -> Result<Outcome> {
    let arena = ground.arena;
    base.restore().await?;
    arena.restore_slot(NAME, NAME).await;
    let way = Way::to(&arena.source, ground.network, ground.wan).await;
    let (source, replica) = (arena.session().await, base.replica.client(DATABASE).await);
    replica
        .run(&format!(
            "ALTER SUBSCRIPTION {NAME} CONNECTION '{}'",
            conninfo(way.port())
        ))
        .await;

    let watch = Watch::begin(&arena.source, Some(&base.replica))?;
    replica
        .run(&format!("ALTER SUBSCRIPTION {NAME} ENABLE"))
        .await;
    let arrival = marker_arrives(&watch, &replica, ground.patience, || Ok(()))
        .await
        .with_context(|| base.replica.log_tail(5));
    let mut round = match arrival {
        Ok(arrival) => watch.end(&arrival)?,
        Err(error) => {
            base.retire().await;
            return Err(error);
        }
    };
    round.wire_bytes = way.bytes();
    let position = format!(
        "SELECT confirmed_flush_lsn > '{}' FROM pg_replication_slots WHERE slot_name = '{NAME}'",
        ground.backlog.before_marker
    );
    round.confirmed_seconds = confirms(&watch, &source, &position).await;
    if ground.compare {
        expect_equal(&source, &replica).await?;
    }
    base.retire().await;
    Ok(Outcome::Measured(round))
}

pub(super) async fn copy(ground: CopyGround<'_>) -> Result<Outcome> {
    let (arena, replica) = (ground.arena, ground.replica);
    let way = Way::to(&arena.source, ground.network, ground.wan).await;
    // What runs at the same time is a setting of the server; the launcher needs one worker more.
    replica.set(
        "max_sync_workers_per_subscription",
        &ground.jobs.to_string(),
    );
    replica.restart().await;
    let watch = Watch::begin(&arena.source, Some(replica))?;
    copy_schema(arena, replica).await?;
    let client = replica.client(DATABASE).await;
    client.run(&create(&arena.source, way.port())).await;
    wait_until("the subscription's copy", ground.patience, || {
        client.holds(IN_SYNC)
    })
    .await;
    let mut round = watch.end_after(watch.elapsed())?;
    round.wire_bytes = way.bytes();
    expect_equal(&arena.session().await, &client).await?;
    detach(arena, replica).await;
    Ok(Outcome::Measured(round))
}

fn create(source: &PgServer, port: u16) -> String {
    // Large transactions are applied while they come in by several workers, from 16 on.
    let streaming = if source.major() >= 16 {
        "parallel"
    } else {
        "on"
    };
    format!(
        "CREATE SUBSCRIPTION {NAME} CONNECTION '{}' PUBLICATION {NAME} WITH (binary = true, streaming = {streaming})",
        conninfo(port)
    )
}

fn conninfo(port: u16) -> String {
    format!("host=127.0.0.1 port={port} user=postgres dbname={DATABASE}")
}

/// Brings the tables with their indexes to the replica, as everybody has to who subscribes.
async fn copy_schema(arena: &Arena, replica: &PgServer) -> Result<()> {
    replica.create_database(DATABASE).await;
    let dump = load::program(replica, "pg_dump");
    let psql = load::program(replica, "psql");
    let (from, to) = (arena.source.url(DATABASE), replica.url(DATABASE));
    tokio::task::spawn_blocking(move || {
        let dumped = Command::new(dump)
            .args([
                "-s",
                "-N",
                "dr_agent",
                "-N",
                "pgcopydb",
                "--no-publications",
                "--no-subscriptions",
            ])
            .arg(from)
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(dumped.status.success(), "pg_dump: {}", dumped.status);
        let mut restore = Command::new(psql)
            .args(["-q", "-X", "-v", "ON_ERROR_STOP=1"])
            .arg(to)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        restore
            .stdin
            .take()
            .context("standard input is a pipe")?
            .write_all(&dumped.stdout)?;
        let status = restore.wait()?;
        ensure!(status.success(), "psql: {status}");
        Ok(())
    })
    .await?
}
