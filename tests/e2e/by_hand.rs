//! Goal: a base backup needs nothing of ours: `psql` and `zstd` load it, and what is damaged is noticed and leaves nothing of
//! itself.
//! Method: the commands of the manual, run by a shell in the directory of a base that an agent took.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use dr_agent_tests::archive::{files_below, protected_with};
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::server::PgServer;
use dr_agent_tests::site::Site;

/// The page of the manual.
const COMMANDS: &str = r#"set -eu
    zstd -dcq roles.sql.zst | psql -d postgres >/dev/null 2>&1
    zstd -dcq pre-data.sql.zst | psql -v ON_ERROR_STOP=1
    psql -f load.sql
    zstd -dcq post-data.sql.zst | psql -v ON_ERROR_STOP=1
    zstd -dcq sequences.sql.zst | psql -v ON_ERROR_STOP=1"#;

/// The same page: whether everything is as it was written.
const CHECK: &str =
    r#"jq -r '.objects[] | .sha256 + "  " + .name' manifest.json | sha256sum --check --quiet"#;

/// Loads a base by hand.
pub(crate) async fn load(server: &PgServer, database: &str, base: &Path) {
    for commands in [CHECK, COMMANDS] {
        let output = shell(server, database, base, commands).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}

async fn shell(server: &PgServer, database: &str, base: &Path, commands: &'static str) -> Output {
    let psql = server.program("psql");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("sh");
    command
        .args(["-c", commands])
        .current_dir(base)
        .env(
            "PATH",
            format!("{}:{path}", psql.parent().unwrap().display()),
        )
        .env("PSQLRC", "/dev/null")
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", server.port().to_string())
        .env("PGUSER", "postgres")
        .env("PGDATABASE", database)
        // A terminal of another encoding than the script's.
        .env("PGCLIENTENCODING", "LATIN1")
        .stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output());
    output.await.unwrap().unwrap()
}

const TABLES: &str = "
    CREATE TABLE whole (id int PRIMARY KEY); INSERT INTO whole SELECT generate_series(1, 100);
    CREATE TABLE broken (id int PRIMARY KEY, v text); INSERT INTO broken SELECT g, md5(g::text) FROM generate_series(1, 9000) AS g;
    CREATE TABLE \"größe\" (\"Länge\" serial PRIMARY KEY); INSERT INTO \"größe\" DEFAULT VALUES";

/// The directory of the only base in an archive, and its biggest object.
fn base_of(archive: &Path) -> (PathBuf, PathBuf) {
    let files = files_below(archive);
    let manifest = files.iter().find(|path| path.ends_with("manifest.json"));
    let base = manifest.unwrap().parent().unwrap().to_owned();
    let rows = files
        .iter()
        .filter(|path| path.starts_with(base.join("data")));
    let largest = rows.max_by_key(|path| fs::metadata(path).unwrap().len());
    (base, largest.unwrap().clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_is_noticed_and_leaves_nothing_of_itself() {
    let site = Site::shared().await;
    let (database, archive, _, running) = protected_with(&site, "by_hand", TABLES).await;
    running.stop().await;
    let (base, victim) = base_of(&archive);
    let server = database.replica_server();
    server.create_database("by_hand_good").await;
    load(server, "by_hand_good", &base).await;
    let loaded = server.client("by_hand_good").await;
    expect_same_content(&database.source().await, &loaded).await;
    loaded.run("INSERT INTO \"größe\" DEFAULT VALUES").await;

    let good = fs::read(&victim).unwrap();
    let mut flipped = good.clone();
    // Behind the last block is its checksum: nothing else tells.
    let at = good.len() - 2;
    flipped[at] ^= 1;
    for (name, damage) in [
        ("by_hand_flipped", flipped),
        ("by_hand_cut", good[..good.len() / 2].to_vec()),
    ] {
        fs::write(&victim, damage).unwrap();
        let checked = shell(server, name, &base, CHECK).await;
        assert!(!checked.status.success());
        let said = String::from_utf8_lossy(&checked.stdout);
        assert!(
            said.contains(victim.file_name().unwrap().to_str().unwrap()),
            "{said}"
        );
        server.create_database(name).await;
        let loaded = shell(server, name, &base, COMMANDS).await;
        assert!(!loaded.status.success());
        let client = server.client(name).await;
        assert_eq!(
            client.number("SELECT count(*) FROM broken").await,
            0,
            "{name}"
        );
    }
    fs::write(&victim, &good).unwrap();
}
