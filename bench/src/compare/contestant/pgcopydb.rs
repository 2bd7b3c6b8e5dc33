//! pgcopydb: `clone` for the initial copy, `follow` for a backlog.
//!
//! Its position is spread over a slot, a table on the source (`pgcopydb.sentinel`), a replication origin on
//! the replica and a directory; all four are put back before a round. It decodes with wal2json, and
//! replays statement by statement, so a distance costs it a round trip for each: it follows
//! locally only, once, and one workload.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use dr_agent_tests::rundir::{directory_for, signal, tail};
use dr_agent_tests::server::PgServer;
use tokio::time::{Instant, sleep};

use super::{CopyGround, Ground, LOOK_EVERY, Outcome, Watch, expect_equal, marker_arrives};
use crate::compare::arena::{Arena, Base, PREPARE_MAX};
use crate::compare::network::Way;
use crate::compare::workload::DATABASE;
use crate::usage;

/// Workloads whose backlog it drains.
pub(super) const FOLLOWS: &[&str] = &["tpcb"];

/// Slot and origin.
const NAME: &str = "pgcopydb";

/// How long it may take to end when asked to.
const TERM_MAX: Duration = Duration::from_secs(5);

/// What it says when one of its processes failed. Version 0.10 does on a backlog of concurrent transactions ("BUG: logical
/// message xid is …, which is different from the current transaction xid").
const FAILED: &str = "exited with code";

/// Its own table on the source, which is nobody's data.
pub(crate) const SENTINEL: &str = "pgcopydb.sentinel";

pub(super) async fn prepare(arena: &Arena, fsync: bool) -> Result<Base> {
    let replica = Base::new_replica(fsync).await;
    replica.create_database(DATABASE).await;
    let (from, to) = (arena.source.url(DATABASE), replica.url(DATABASE));
    run(Run::start(&["clone"], &from, &to)?).await?;
    run(Run::start(
        &["stream", "setup", "--not-consistent"],
        &from,
        &to,
    )?)
    .await?;
    arena.keep_slot(NAME, NAME).await;
    Base::keep(replica).await
}

pub(super) async fn drain(ground: Ground<'_>, base: &Base) -> Result<Outcome> {
    let arena = ground.arena;
    base.restore().await?;
    arena.restore_slot(NAME, NAME).await;
    let (source, replica) = (arena.session().await, base.replica.client(DATABASE).await);
    source
        .run(&format!(
            "UPDATE {SENTINEL} SET apply = true, endpos = '0/0', write_lsn = '0/0', flush_lsn = '0/0', replay_lsn = '0/0',
                 startpos = (SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = '{NAME}')"
        ))
        .await;
    let way = Way::to(&base.replica, ground.network, ground.wan).await;
    let to = base.replica.url_through(way.port(), DATABASE);
    let follow = [
        "follow",
        "--resume",
        "--not-consistent",
        "--endpos",
        &ground.backlog.end,
    ];

    let watch = Watch::begin(&arena.source, Some(&base.replica))?;
    let programs = usage::of_ended_programs()?;
    let mut follow = Run::start(&follow, &arena.source.url(DATABASE), &to)?;
    let arrival = marker_arrives(&watch, &replica, ground.patience, || {
        match follow.ended()? {
            Some(status) if !status.success() => bail!("pgcopydb {status}: {}", follow.log()),
            // Its other processes wait for ever for one of them that has failed.
            _ if follow.log().contains(FAILED) => bail!("pgcopydb stands still: {}", follow.log()),
            _ => Ok(()),
        }
    })
    .await;
    let arrival = match arrival {
        Ok(arrival) => arrival,
        Err(error) => {
            base.retire().await;
            return Err(error);
        }
    };
    run(follow).await?;
    let mut round = watch.end(&arrival)?;
    round.cpu_agent = Some(usage::of_ended_programs()? - programs);
    round.wire_bytes = way.bytes();
    if ground.compare {
        expect_equal(&source, &replica).await?;
    }
    base.retire().await;
    Ok(Outcome::Measured(round))
}

pub(super) async fn copy(ground: CopyGround<'_>) -> Result<Outcome> {
    let (arena, replica) = (ground.arena, ground.replica);
    replica.create_database(DATABASE).await;
    let way = Way::to(replica, ground.network, ground.wan).await;
    let jobs = ground.jobs.to_string();
    let clone = ["clone", "--table-jobs", &jobs, "--index-jobs", &jobs];
    let to = replica.url_through(way.port(), DATABASE);
    let watch = Watch::begin(&arena.source, Some(replica))?;
    let programs = usage::of_ended_programs()?;
    run(Run::start(&clone, &arena.source.url(DATABASE), &to)?).await?;
    let mut round = watch.end_after(watch.elapsed())?;
    round.cpu_agent = Some(usage::of_ended_programs()? - programs);
    round.wire_bytes = way.bytes();
    expect_equal(&arena.session().await, &replica.client(DATABASE).await).await?;
    Ok(Outcome::Measured(round))
}

/// A pgcopydb with a work directory of its own.
struct Run {
    child: Child,
    log: PathBuf,
}

impl Run {
    fn start(arguments: &[&str], from: &str, to: &str) -> Result<Self> {
        let directory = directory_for("pgcopydb");
        let log = directory.join("log");
        let file = std::fs::File::create(&log)?;
        let child = Command::new("pgcopydb")
            .args(arguments)
            .args(["--source", from, "--target", to, "--dir"])
            .arg(directory.join("work"))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .context("start pgcopydb")?;
        Ok(Self { child, log })
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    fn log(&self) -> String {
        tail(Path::new(&self.log), 12)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It takes its own children along, if it still listens; they are one process group.
        signal("TERM", &[self.child.id()]);
        let deadline = std::time::Instant::now() + TERM_MAX;
        while std::time::Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let group = format!("kill -KILL -- -{}", self.child.id());
        let _ = Command::new("sh").args(["-c", &group]).status();
        let _ = self.child.wait();
    }
}

/// Waits for the end, which must be a good one.
async fn run(mut run: Run) -> Result<()> {
    let begun = Instant::now();
    loop {
        if let Some(status) = run.ended()? {
            ensure!(status.success(), "pgcopydb {status}: {}", run.log());
            return Ok(());
        }
        ensure!(
            begun.elapsed() < PREPARE_MAX,
            "pgcopydb does not end: {}",
            run.log()
        );
        sleep(LOOK_EVERY).await;
    }
}

/// Whether the programs and plugins are here; the reason when they are not.
pub(crate) fn missing(server: &PgServer, follow: bool) -> Option<String> {
    let version = Command::new("pgcopydb").arg("--version").output().ok();
    let Some(version) = version.filter(|output| output.status.success()) else {
        return Some("pgcopydb is not installed".to_owned());
    };
    let text = String::from_utf8_lossy(&version.stdout).into_owned()
        + &String::from_utf8_lossy(&version.stderr);
    let compatible = text
        .lines()
        .find_map(|line| line.split_once("compatible with Postgres"));
    let major = server.major().to_string();
    let knows = compatible.is_none_or(|(_, versions)| {
        versions
            .split(|c: char| !c.is_ascii_digit())
            .any(|version| version == major)
    });
    if !knows {
        return Some(format!("this pgcopydb does not know PostgreSQL {major}"));
    }
    if follow && !has_wal2json(server) {
        return Some("the source has no wal2json, which pgcopydb follow needs".to_owned());
    }
    None
}

fn has_wal2json(server: &PgServer) -> bool {
    let output = Command::new(server.program("pg_config"))
        .arg("--pkglibdir")
        .output();
    output.is_ok_and(|output| {
        let directory = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Path::new(&directory).join("wal2json.so").exists()
    })
}
