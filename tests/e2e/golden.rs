//! Goal: an archive that any earlier version wrote can be restored for ever, base backup and change log.
//! Method: archives that were kept (`golden/archive/<number>`), each with the moments that can be restored and what the source
//! held then. A change of the format adds one, by the ignored test below; none is ever written anew.

use std::fs;
use std::path::{Path, PathBuf};

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::archive::{Moment, TABLES, expect_state, restore, wait_archived_at, work};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;

/// The database in them, and what its slot was named after.
const DATABASE: &str = "golden";
const SLOT: &str = "dr_agent";

const MOMENTS: &str = "moments";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/archive")
}

fn config(config: AgentConfig, archive: &Path) -> Agent {
    let spool = directory_for("spool");
    let config = config
        .databases(&[DATABASE])
        .slot(SLOT)
        .set_text("archive.url", &format!("file://{}", archive.display()))
        .set_text("archive.spool_directory", &spool.display().to_string())
        .set_text("objectives.rpo", "1s");
    Agent::new(config)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_archive_of_an_earlier_version_is_restored() {
    let site = Site::shared().await;
    let database = site.database("of_gold").await;
    let mut kept: Vec<PathBuf> = fs::read_dir(golden())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    kept.sort();
    assert!(!kept.is_empty());
    for archive in kept {
        let number = archive.file_name().unwrap().to_str().unwrap();
        let agent = config(database.config(), &archive);
        agent
            .command(&["backup", "--verify"])
            .await
            .expect_code(0)
            .expect_words(&["sound"]);
        let moments = fs::read_to_string(archive.join(MOMENTS)).unwrap();
        assert!(moments.lines().count() > 3);
        for (i, moment) in moments.lines().enumerate() {
            let fields: Vec<&str> = moment.split(' ').collect();
            let [lsn, time, state] = <[&str; 3]>::try_from(fields).unwrap();
            let moment = Moment {
                lsn: lsn.to_owned(),
                time: time.to_owned(),
                state: state.to_owned(),
            };
            for (by, value) in [("lsn", lsn), ("time", time)] {
                let name = format!("golden_{number}_{i}_{by}");
                let option = format!("--to-{by}");
                restore(&database, &agent, &name, &[&option, value])
                    .await
                    .expect_code(0);
                expect_state(&database, &name, &moment).await;
            }
        }
    }
}

/// `DR_AGENT_GOLDEN=<number> cargo test -p dr-agent-tests --test e2e -- --ignored golden`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "writes an archive to be kept, where the format has changed"]
async fn an_archive_of_this_version_is_written() {
    let number = std::env::var("DR_AGENT_GOLDEN").expect("DR_AGENT_GOLDEN names the new one");
    let archive = golden().join(number);
    assert!(!archive.exists(), "what is kept is never written anew");
    let site = Site::with(ServerOptions::source(), ServerOptions::replica()).await;
    site.source.create_database(DATABASE).await;
    let source = site.source.client(DATABASE).await;
    source.run(TABLES).await;
    let urls = [&site.source, &site.replica].map(|server| server.url("postgres"));
    let agent = config(AgentConfig::new(&urls[0], &urls[1]), &archive);
    let running = agent.start();
    running.wait_for_streaming(DATABASE).await;
    let taken = "dr_agent_archive_last_base_timestamp_seconds";
    running
        .wait_for_metric(taken, &[("database", DATABASE)], |at| at > 0.0)
        .await;
    let mut moments = work(&source, 12, 0).await;
    wait_archived_at(&source, &archive).await;
    agent.command(&["backup"]).await.expect_code(0);
    moments.extend(work(&source, 6, 100).await);
    source.run("INSERT INTO bag VALUES ('behind')").await;
    wait_archived_at(&source, &archive).await;
    running.stop().await;
    let lines = moments.iter().step_by(4).map(|moment| {
        let Moment { lsn, time, state } = moment;
        format!("{lsn} {time} {state}\n")
    });
    fs::write(archive.join(MOMENTS), lines.collect::<String>()).unwrap();
}
