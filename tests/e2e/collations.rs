//! Goal: databases whose text is ordered by ICU, by rules of their own, or by PostgreSQL itself, and columns where different text
//! is equal, arrive as such: first copy, changes and a promotion.
//! Method: one database for each provider that the servers of this run were built with, under one agent; keys that are equal and not
//! the same; a full comparison, the catalogs of both sides, and an order that only the provider explains.

use dr_agent_tests::agent::{Agent, AgentConfig};
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::{expect_equal_when_caught_up, expect_same_content};
use dr_agent_tests::site::Site;

/// A name, and what creates it.
const DATABASES: &[(&str, &str)] = &[
    ("of_libc", "LOCALE 'C.UTF-8'"),
    (
        "of_icu",
        "LOCALE_PROVIDER icu ICU_LOCALE 'und-u-kn' LOCALE 'C'",
    ),
    (
        "of_rules",
        "LOCALE_PROVIDER icu ICU_LOCALE 'und' ICU_RULES '&z < a' LOCALE 'C'",
    ),
    (
        "of_builtin",
        "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' LOCALE 'C'",
    ),
];

const TABLES: &str = "
    CREATE TABLE words (w text PRIMARY KEY, n int); CREATE INDEX ON words (w DESC, n);
    INSERT INTO words VALUES ('a', 1), ('b', 2), ('z', 3), ('a10', 4), ('a9', 5), ('Ä', 6), ('ä', 7)";

/// What only a server with ICU has.
const ICU: &str = "
    CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    CREATE TABLE folded (k text COLLATE nocase PRIMARY KEY, v text COLLATE nocase UNIQUE);
    CREATE TABLE bag (v text COLLATE nocase, n int);
    INSERT INTO folded VALUES ('One', 'x'), ('two', 'y'), ('Three', 'z');
    INSERT INTO bag VALUES ('A', 1), ('a', 1), ('A', 1), ('b', 2)";

const RULES: &str = "
    CREATE COLLATION ruled (provider = icu, locale = 'und', rules = '&z < a');
    CREATE TABLE by_rule (k text COLLATE ruled PRIMARY KEY); INSERT INTO by_rule VALUES ('a'), ('b'), ('z')";

async fn change(source: &Client, icu: bool) {
    source
        .run("INSERT INTO words VALUES ('ß', 8), ('ss', 9); UPDATE words SET w = 'A' WHERE w = 'a'; DELETE FROM words WHERE w = 'z'")
        .await;
    if icu {
        // Equal, and not the same: the key changes its case, and finds its row in another.
        for sql in [
            "UPDATE folded SET k = 'ONE' WHERE k = 'one'; UPDATE folded SET v = 'Y' WHERE k = 'TWO'",
            "DELETE FROM folded WHERE k = 'three'; INSERT INTO folded VALUES ('three', 'Z')",
            "BEGIN; UPDATE folded SET v = 'q' WHERE v = 'X'; UPDATE folded SET v = 'X' WHERE v = 'y'; COMMIT",
            "DELETE FROM bag WHERE ctid = (SELECT min(ctid) FROM bag WHERE v::text COLLATE \"C\" = 'a'); UPDATE bag SET v = 'B' WHERE n = 2",
        ] {
            source.run(sql).await;
        }
    }
}

/// How the database and its collations are to be found in the catalogs, in words of every version.
const CATALOG: &str = "
    SELECT concat_ws(' ', d.j ->> 'datlocprovider', coalesce(d.j ->> 'datlocale', d.j ->> 'daticulocale'), d.j ->> 'daticurules',
                     d.j ->> 'datcollate', d.j ->> 'datctype',
                     (SELECT string_agg(concat_ws(' ', collname, collprovider, collisdeterministic,
                             coalesce(to_jsonb(c) ->> 'colllocale', to_jsonb(c) ->> 'colliculocale'), to_jsonb(c) ->> 'collicurules'), ',' ORDER BY collname)
                        FROM pg_collation c WHERE collnamespace = 'public'::regnamespace),
                     (SELECT string_agg(w, ' ' ORDER BY w) FROM words))
      FROM (SELECT to_jsonb(d) FROM pg_database d WHERE datname = current_database()) AS d (j)";

#[tokio::test]
async fn text_is_ordered_and_equal_as_on_the_source() {
    let site = Site::own().await;
    let admin = site.source.client("postgres").await;
    let mut databases = Vec::new();
    for (name, locale) in DATABASES {
        let create = format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING UTF8 {locale}");
        // A version, or a build, may not know it; the replica's then has not to, either.
        let there = site.replica.client("postgres").await;
        let known = there.try_run(&create.replace(name, "probe")).await.is_ok();
        if known {
            there.run("DROP DATABASE probe").await;
        }
        if known && admin.try_run(&create).await.is_ok() {
            databases.push(*name);
        }
    }
    assert!(!databases.is_empty());
    eprintln!("{databases:?}");
    let mut with_icu = Vec::new();
    for name in &databases {
        let source = site.source.client(name).await;
        source.run(TABLES).await;
        let icu = source.try_run(ICU).await.is_ok();
        with_icu.push(icu);
        if icu {
            source.try_run(RULES).await.ok();
        }
    }
    let config = AgentConfig::new(&site.source.url("postgres"), &site.replica.url("postgres"))
        .databases(&databases)
        .set_text("source.keyless", "full");
    let agent = Agent::new(config.clone());
    let running = agent.start();
    for (name, icu) in databases.iter().zip(&with_icu) {
        running.wait_for_streaming(name).await;
        let source = site.source.client(name).await;
        let replica = site.replica.client(name).await;
        change(&source, *icu).await;
        expect_equal_when_caught_up(&source, &replica, &config.stream(name)).await;
    }
    running.expect_untroubled();
    running.stop().await;
    agent
        .command(&["promote", "--failover"])
        .await
        .expect_code(0);
    for name in &databases {
        let source = site.source.client(name).await;
        let replica = site.replica.client(name).await;
        expect_same_content(&source, &replica).await;
        assert_eq!(
            source.value(CATALOG).await,
            replica.value(CATALOG).await,
            "{name}"
        );
    }
}
