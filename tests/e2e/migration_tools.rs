//! Goal: a migration tool of the real world finds nothing to complain about: what it does on the source is on the replica, and after a
//! promotion the tool and the application go on there as if nothing had happened.
//! Method: a Django project of twenty migrations (RunPython, RunSQL of several statements, an index built concurrently, renamed models,
//! fields and tables, `tests/tools/django`), upgraded under an agent that is killed in the middle; afterwards both sides are
//! compared in every respect.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use dr_agent_tests::agent::Agent;
use dr_agent_tests::site::Site;

use crate::ddl::{dumped, expect_same_shapes, replicating, wait_for_all_tables};

/// Where `ops/test` has put the tools.
fn python() -> PathBuf {
    let tools = match env::var_os("DR_AGENT_MIGRATION_TOOLS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/migration-tools"),
    };
    tools.join("bin/python")
}

/// Runs `manage.py` on the database of a URL (`postgres://user@host:port/name`).
async fn manage(url: &str, arguments: &'static [&'static str]) -> String {
    let rest = url.split_once("://").expect("a URL").1;
    let (user, rest) = rest.split_once('@').expect("a user");
    let (place, name) = rest.split_once('/').expect("a database");
    let (host, port) = place.split_once(':').expect("a port");
    let name = name.split('?').next().unwrap_or_default();
    let mut command = Command::new(python());
    command
        .arg("manage.py")
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/django"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs([
            ("PGUSER", user),
            ("PGHOST", host),
            ("PGPORT", port),
            ("PGDATABASE", name),
        ]);
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("it ends")
        .expect("the tools are there: ops/test puts them into target/migration-tools");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "manage.py {arguments:?}: {said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn django_upgrades_a_database_that_is_replicated_and_goes_on_after_a_promotion() {
    let site = Site::shared().await;
    let database = site.database("django").await;
    let (source, replica) = (database.source_url(), database.replica_url());
    manage(&source, &["migrate", "auth"]).await;
    manage(&source, &["migrate", "shop", "0003"]).await;
    let agent = Agent::new(replicating(database.config()));
    let mut armed = agent.start_with(&[("DR_AGENT_FAILPOINT", "barrier:applied@12")]);
    armed.wait_for_streaming(&database.name).await;
    manage(&source, &["migrate", "shop", "0014"]).await;
    armed.expect_death_by_signal().await;
    let running = agent.start();
    manage(&source, &["migrate"]).await;
    manage(&source, &["session", "20"]).await;
    running.wait_for_streaming(&database.name).await;
    database.wait_caught_up().await;
    expect_same_shapes(&database).await;
    wait_for_all_tables(&database).await;
    database.expect_equal().await;
    assert_eq!(dumped(&source), dumped(&replica));
    let here = database.replica().await;
    // Nearly all of it is carried out as Django wrote it.
    let run = "SELECT count(*) FROM dr_agent.ddl_applied WHERE outcome = 'statement'";
    let run = here.number(run).await;
    assert!(run >= 50, "{run} commands were run as they were");
    let waited =
        "SELECT id || ': ' || detail FROM dr_agent.ddl_applied WHERE outcome IN ('waits', 'copy')";
    assert_eq!(here.column(waited).await, Vec::<String>::new());
    agent.command(&["ddl"]).await.expect_code(0);
    running.stop().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    let said = manage(&replica, &["migrate"]).await;
    assert!(said.contains("No migrations to apply"), "{said}");
    manage(&replica, &["session", "5"]).await;
}
