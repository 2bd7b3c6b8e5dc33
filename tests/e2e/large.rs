//! Goal: the memory stays bounded: a transaction of two million rows passes with the agent below 256 MiB resident, and a large
//! value is in memory once, and given back.
//! Method: one INSERT of that size; values of every type and way; the kernel tells the agent's peak.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dr_agent_tests::compare::{expect_same_content, wait_caught_up_within};
use dr_agent_tests::site::Site;

const ROWS: u32 = 2_000_000;
const RESIDENT_BYTES_MAX: u64 = 256 * 1024 * 1024;

#[tokio::test]
async fn a_transaction_of_two_million_rows_needs_less_than_256_mib() {
    let site = Site::own().await;
    let database = site.database("large").await;
    let source = database.source().await;
    source
        .run("CREATE TABLE narrow (id int PRIMARY KEY, n int)")
        .await;
    let (agent, running) = database.replicate().await;
    let replica = database.replica().await;
    source
        .run(&format!(
            "INSERT INTO narrow SELECT g, g FROM generate_series(1, {ROWS}) AS g"
        ))
        .await;
    let started = Instant::now();
    wait_caught_up_within(
        Duration::from_secs(240),
        &source,
        &replica,
        &database.stream(),
    )
    .await;
    let peak = running.peak_resident_bytes();
    eprintln!(
        "{ROWS} rows in one transaction: {:.1} s after its commit, peak {} MiB",
        started.elapsed().as_secs_f64(),
        peak / 1024 / 1024
    );
    assert_eq!(
        replica.number("SELECT count(*) FROM narrow").await,
        i64::from(ROWS)
    );
    expect_same_content(&source, &replica).await;
    assert!(peak < RESIDENT_BYTES_MAX, "peak {} MiB", peak / 1024 / 1024);
    // Its spill file is gone.
    let spilled = files_below(&agent.directory().join("spill"));
    assert!(spilled.is_empty(), "spill files remain: {spilled:?}");
    running.expect_quiet_log();
    running.stop().await;
}

const MIB: u64 = 1 << 20;

/// What the agent needs beside the value.
const BESIDE: u64 = 64 * MIB;

/// `DR_AGENT_TEST_VALUE_MIB=560` for a larger one.
fn value_bytes() -> u64 {
    let mib = std::env::var("DR_AGENT_TEST_VALUE_MIB");
    mib.map_or(40, |mib| mib.parse::<u64>().unwrap()) * MIB
}

#[tokio::test]
async fn a_large_value_is_in_memory_once_and_given_back() {
    let size = value_bytes();
    let site = Site::own().await;
    let database = site.database("values").await;
    let source = database.source().await;
    // An array in another table must not make the bytes travel as text, which is twice as long.
    source
        .run(
            "CREATE TABLE doc (id int PRIMARY KEY, n int, body bytea, note text, tree jsonb);
             ALTER TABLE doc ALTER body SET STORAGE EXTERNAL, ALTER note SET STORAGE EXTERNAL;
             CREATE TABLE log (n int, body bytea);
             CREATE TABLE tags (id int PRIMARY KEY, tags text[], at timestamptz[], m numeric[][]);",
        )
        .await;
    source
        .run(&format!(
            "INSERT INTO doc (id, n, body) VALUES (0, 0, convert_to(repeat('copied', {size} / 6), 'UTF8'))"
        ))
        .await;
    let mut agent = database.agent();
    agent.configure("source.keyless", "\"full\"");
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    let mut told = vec![(
        "copy",
        running.peak_resident_bytes(),
        running.resident_bytes(),
    )];
    let steps = [
        ("insert bytea", "INSERT INTO doc (id, n, body) VALUES (1, 1, convert_to(repeat('inside', SIZE / 6), 'UTF8'))"),
        ("insert text", "INSERT INTO doc (id, n, note) VALUES (2, 1, repeat('täxt ', SIZE / 6))"),
        ("insert jsonb", "INSERT INTO doc (id, n, tree) VALUES (3, 1, jsonb_build_object('k', repeat('json ', least(SIZE, 200000000) / 5)))"),
        ("update", "UPDATE doc SET body = convert_to(repeat('update', SIZE / 6), 'UTF8') WHERE id = 1"),
        ("leave", "UPDATE doc SET n = n + 1"),
        ("two rows", "INSERT INTO doc (id, body) SELECT g, convert_to(repeat('abcdef', SIZE / 6), 'UTF8') FROM generate_series(4, 5) AS g"),
        ("key", "UPDATE doc SET id = 10 WHERE id = 1"),
        ("keyless", "INSERT INTO log VALUES (1, convert_to(repeat('keyless', SIZE / 7), 'UTF8'))"),
        ("arrays", "INSERT INTO tags VALUES (1, ARRAY['a', NULL, 'NULL', '{}', 'x\"y'], '{2026-01-01 00:00+00,infinity}', '[0:1][2:3]={{1.10,NaN},{3,NULL}}'), (2, '{}', NULL, NULL);
                    UPDATE tags SET tags = tags || 'more'::text; DELETE FROM tags WHERE id = 2"),
        ("delete", "DELETE FROM doc WHERE id = 4"),
    ];
    for (what, sql) in steps {
        running.forget_peak();
        source.run(&sql.replace("SIZE", &size.to_string())).await;
        database.wait_caught_up().await;
        told.push((
            what,
            running.peak_resident_bytes(),
            running.resident_bytes(),
        ));
    }
    for (what, peak, left) in &told {
        eprintln!("{what}: peak {} MiB, then {} MiB", peak / MIB, left / MIB);
    }
    let replica = database.replica().await;
    if size < 256 * MIB {
        database.expect_equal().await;
    } else {
        // As text, which the comparison of databases reads, a row would be longer than a server can hold.
        const ROWS: &str = "
            SELECT string_agg(concat_ws(' ', id, n, md5(body), md5(note), md5(tree::text)), ',' ORDER BY id)
                   || (SELECT string_agg(concat_ws(' ', n, md5(body)), ',') FROM log) FROM doc";
        assert_eq!(replica.value(ROWS).await, source.value(ROWS).await);
    }
    assert_eq!(
        replica
            .number("SELECT count(*) FROM dr_agent.large_value")
            .await,
        0
    );
    for (what, peak, left) in told {
        // What is received next may begin to come while the one before is sent.
        let values = if what == "two rows" { 2 } else { 1 };
        assert!(
            peak < values * size + BESIDE,
            "{what}: peak {} MiB",
            peak / MIB
        );
        assert!(left < BESIDE, "{what}: {} MiB stay", left / MIB);
    }
    running.expect_quiet_log();
    running.stop().await;
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| {
            if path.is_dir() {
                files_below(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
