//! Goal: a restore gives what the archive has, whatever the log went through, and says what it does not give.
//! Method: archives that agents wrote under disturbances; restores into empty databases, compared with what the source held.

use dr_agent::pg::PgLsn;
use dr_agent_tests::archive::{position, protected_with, restore_at, wait_archived_to};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare;
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;

/// Keys whose text and binary forms differ, keys for which they are the same, and values too large to be sent again.
const KEYS: &str = "
    CREATE TABLE by_uuid (id uuid PRIMARY KEY, n int, large text);
    CREATE TABLE by_int (id int PRIMARY KEY, n numeric, large text);
    CREATE TABLE by_text (id text PRIMARY KEY, at timestamptz, large text);
    CREATE TABLE bag (id uuid, v text); ALTER TABLE bag REPLICA IDENTITY FULL;
    ALTER TABLE by_uuid ALTER large SET STORAGE EXTERNAL; ALTER TABLE by_int ALTER large SET STORAGE EXTERNAL;
    ALTER TABLE by_text ALTER large SET STORAGE EXTERNAL";

/// Rows, some of which are changed, moved and deleted afterwards.
fn rows(from: u32) -> String {
    let to = from + 39;
    format!(
        "INSERT INTO by_uuid SELECT md5(g::text)::uuid, g, repeat(md5(g::text), 100) FROM generate_series({from}, {to}) AS g;
         INSERT INTO by_int SELECT g, g / 7.0, repeat(md5(g::text), 100) FROM generate_series({from}, {to}) AS g;
         INSERT INTO by_text SELECT 'k' || g, now(), repeat(md5(g::text), 100) FROM generate_series({from}, {to}) AS g;
         INSERT INTO bag SELECT md5((g % 5)::text)::uuid, 'v' || g % 3 FROM generate_series({from}, {to}) AS g"
    )
}

/// Changes rows that were written by then, and leaves the large values alone.
fn changes(n: u32) -> [String; 4] {
    [
        format!("UPDATE by_uuid SET n = -{n} WHERE n % 4 = 1; UPDATE by_int SET n = n + {n} WHERE id % 4 = 1"),
        format!("UPDATE by_text SET at = at + interval '{n} s' WHERE id LIKE '%1'; UPDATE bag SET v = 'c{n}' WHERE v = 'v1'"),
        format!("UPDATE by_uuid SET id = md5('moved{n}' || id)::uuid WHERE n % 4 = 2;
                 UPDATE by_text SET id = 'm{n}' || id WHERE id LIKE '%2'"),
        "DELETE FROM by_uuid WHERE n % 4 = 3; DELETE FROM by_int WHERE id % 4 = 3; DELETE FROM by_text WHERE id LIKE '%3';
         DELETE FROM bag WHERE ctid IN (SELECT ctid FROM bag LIMIT 3)".to_owned(),
    ]
}

async fn digests(client: &Client) -> std::collections::BTreeMap<String, String> {
    compare::begin(client).await;
    let found = compare::digests(client).await;
    client.run("COMMIT").await;
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_went_on_without_the_replica_is_restored_across_the_seam() {
    let site = Site::own().await;
    let (database, archive, mut agent, mut running) = protected_with(&site, "seam", KEYS).await;
    let source = database.source().await;
    source.run(&rows(0)).await;
    source.run(&rows(100)).await;
    for change in changes(1) {
        source.run(&change).await;
    }
    database.expect_equal().await;
    site.replica.stop_immediately().await;
    running.wait_for_log(&["the change log goes on"]).await;
    for change in changes(2) {
        source.run(&change).await;
    }
    source.run(&rows(200)).await;
    for change in changes(3) {
        source.run(&change).await;
    }
    let end = position(&source).await;
    let lsn: PgLsn = end.parse().unwrap();
    let then = digests(&source).await;
    wait_archived_to(lsn, &archive).await;
    // The site is lost, and the replica has not come back.
    running.kill();
    drop(source);
    site.source.kill();
    let elsewhere = ServerOptions::replica().start().await;
    for (name, spread) in [("seam_one_lane", "10000"), ("seam_lanes", "1")] {
        agent.configure("limits.spread_changes", spread);
        elsewhere.create_database(name).await;
        restore_at(
            &agent,
            &elsewhere.url(name),
            &["--to-lsn", &lsn.to_string()],
        )
        .await
        .expect_code(0);
        assert_eq!(digests(&elsewhere.client(name).await).await, then, "{name}");
    }
}
