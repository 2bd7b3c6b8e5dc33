//! Goal: a value is never rounded or cut because a type of the users' own is made of something else on the replica, whatever way
//! it comes.
//! Method: a table of types, each made anew on the source alone with more room; a value that needs that room; straight to the
//! replica, through records to a replica that does not see the source, through the drain of a promotion, and out of an archive.

use dr_agent_tests::archive::{archive, first_base, position, restore_at, wait_archived_to};
use dr_agent_tests::client::Client;
use dr_agent_tests::kinesalite::Kinesalite;
use dr_agent_tests::route::{Route, STREAM};
use dr_agent_tests::site::Site;
use dr_agent_tests::streams;

/// What creates a type, the column's type, what makes it anew, the column's type from then on, a value of that, and what it is said
/// to be on the source and on the replica. `@` is the number of the case.
type Case = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    [&'static str; 2],
);

const CASES: &[Case] = &[
    (
        "CREATE DOMAIN d@ AS numeric(8,1)",
        "d@",
        "DROP DOMAIN d@; CREATE DOMAIN d@ AS numeric(8,3)",
        "d@",
        "1.234",
        ["public.d@ over numeric(8,3)", "public.d@ over numeric(8,1)"],
    ),
    (
        "CREATE DOMAIN d@ AS numeric(8,1)",
        "d@",
        "CREATE DOMAIN app.d@ AS numeric(8,3)",
        "app.d@",
        "1.234",
        ["app.d@ over numeric(8,3)", "public.d@ over numeric(8,1)"],
    ),
    (
        "CREATE DOMAIN d@ AS numeric(8,1)",
        "d@[]",
        "DROP DOMAIN d@; CREATE DOMAIN d@ AS numeric(8,3)",
        "d@[]",
        "'{1.234}'",
        [
            "public.d@[] over numeric(8,3)",
            "public.d@[] over numeric(8,1)",
        ],
    ),
    (
        "CREATE DOMAIN d@ AS varchar(4)[]",
        "d@",
        "DROP DOMAIN d@; CREATE DOMAIN d@ AS varchar(9)[]",
        "d@",
        "'{longer}'",
        ["character varying(9)[]", "character varying(4)[]"],
    ),
    (
        "CREATE DOMAIN i@ AS timestamp(0); CREATE DOMAIN d@ AS i@",
        "d@",
        "DROP DOMAIN d@; DROP DOMAIN i@; CREATE DOMAIN i@ AS timestamp(6); CREATE DOMAIN d@ AS i@",
        "d@",
        "'2026-03-01 12:34:56.789'",
        [
            "over public.i@ over timestamp(6) without time zone",
            "over public.i@ over timestamp(0) without time zone",
        ],
    ),
    (
        "CREATE TYPE d@ AS (id int, net numeric(8,1))",
        "d@",
        "DROP TYPE d@; CREATE TYPE d@ AS (id int, net numeric(8,3))",
        "d@",
        "'(1,1.234)'",
        ["attribute net numeric(8,3)", "attribute net numeric(8,1)"],
    ),
    (
        "CREATE DOMAIN i@ AS numeric(8,1); CREATE TYPE d@ AS (net i@)",
        "d@[]",
        "DROP TYPE d@; DROP DOMAIN i@; CREATE DOMAIN i@ AS numeric(8,3); CREATE TYPE d@ AS (net i@)",
        "d@[]",
        "array['(1.234)']::d@[]",
        [
            "attribute net public.i@ over numeric(8,3)",
            "attribute net public.i@ over numeric(8,1)",
        ],
    ),
    (
        "CREATE DOMAIN i@ AS numeric(8,1); CREATE TYPE d@ AS RANGE (subtype = i@)",
        "d@",
        "DROP TYPE d@; DROP DOMAIN i@; CREATE DOMAIN i@ AS numeric(8,3); CREATE TYPE d@ AS RANGE (subtype = i@)",
        "d@",
        "'[1.234,5]'",
        [
            "of public.i@ over numeric(8,3)",
            "of public.i@ over numeric(8,1)",
        ],
    ),
    (
        "CREATE TYPE d@ AS ENUM ('a')",
        "d@[]",
        "CREATE TYPE app.d@ AS ENUM ('a')",
        "app.d@[]",
        "'{a}'",
        ["app.d@[]", "public.d@[]"],
    ),
];

fn of(case: usize, sql: &str) -> String {
    sql.replace('@', &case.to_string())
}

/// What a case's table is said to have.
fn words(case: usize) -> [String; 3] {
    let [there, here] = CASES[case].5;
    [
        format!("column c of public.t{case} is "),
        format!("{} on the source", of(case, there)),
        format!("{} on the replica", of(case, here)),
    ]
}

async fn create(source: &Client) {
    source.run("CREATE SCHEMA app").await;
    for (case, (types, column, ..)) in CASES.iter().enumerate() {
        let table = "CREATE TABLE t@ (id int PRIMARY KEY, c ";
        source
            .run(&of(
                case,
                &format!("{types}; {table} {column}); INSERT INTO t@ VALUES (1)"),
            ))
            .await;
    }
}

/// Makes the type of a case anew on the source, and writes a value that needs it.
async fn alter(source: &Client, case: usize) {
    let (_, _, anew, column, value, _) = CASES[case];
    let sql = format!(
        "ALTER TABLE t@ ALTER c TYPE text; {anew}; ALTER TABLE t@ ALTER c TYPE {column} USING c::{column};
         INSERT INTO t@ VALUES (2, {value})"
    );
    source.run(&of(case, &sql)).await;
}

#[tokio::test]
async fn what_a_type_is_made_of_is_compared_straight_away() {
    let site = Site::shared().await;
    let database = site.database("made_of").await;
    let source = database.source().await;
    create(&source).await;
    source
        .run(
            "CREATE DOMAIN kept AS numeric(8,1); CREATE TABLE passing (id int PRIMARY KEY, c kept)",
        )
        .await;
    let (agent, running) = database.replicate().await;
    for case in 0..CASES.len() {
        alter(&source, case).await;
    }
    for case in 0..CASES.len() {
        let words = words(case);
        running
            .wait_for_log(&words.each_ref().map(String::as_str))
            .await;
    }
    // A domain that came and went while nobody looked.
    running.stop().await;
    source
        .run(
            "CREATE DOMAIN gone AS numeric(8,3); ALTER TABLE passing ALTER c TYPE gone; INSERT INTO passing VALUES (1, 1.234);
             ALTER TABLE passing ALTER c TYPE kept; DROP DOMAIN gone",
        )
        .await;
    let running = agent.start();
    let words = ["column c of public.passing is ", "dropped since"];
    running.wait_for_log(&words).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_type_is_made_of_goes_through_records_and_the_archive() {
    let site = Site::shared().await;
    let database = site.database("made_of_records").await;
    let source = database.source().await;
    create(&source).await;
    let kinesalite = Kinesalite::start().await;
    streams::create(kinesalite.port(), STREAM, 2).await;
    let archive = archive();
    let mut route = Route::new(database.clone(), kinesalite.port(), Some(archive.clone()));
    let (running, applying) = route.start().await;
    first_base(&running, &database).await;
    applying.stop().await;
    let nowhere = "\"postgres://nobody@127.0.0.1:1/postgres\"";
    route.applier.configure("source.url", nowhere);
    let applying = route.apply(&[]);
    applying.wait_for_streaming(&database.name).await;
    let half = CASES.len() / 2;
    for case in 0..half {
        alter(&source, case).await;
        let words = words(case);
        applying
            .wait_for_log(&words.each_ref().map(String::as_str))
            .await;
    }
    applying.stop().await;

    for case in half..CASES.len() {
        alter(&source, case).await;
    }
    route.wait_sent().await;
    let end = position(&source).await.parse().expect("it is an LSN");
    wait_archived_to(end, &archive).await;
    running.stop().await;
    let promote = ["promote", "--failover", "--json"];
    let outcome = route.applier.command_with(&promote, &route.with(&[])).await;
    for case in half..CASES.len() {
        let words = words(case);
        outcome.expect_words(&words.each_ref().map(String::as_str));
    }
    let replica = database.replica().await;
    for case in 0..CASES.len() {
        let rows = format!("SELECT count(*) FROM t{case}");
        assert_eq!(replica.number(&rows).await, 1, "{case}");
    }

    // One table at a time: a restore stops.
    let server = database.replica_server();
    for case in 0..CASES.len() {
        let target = format!("made_of_restored_{case}");
        server.create_database(&target).await;
        let table = format!("public.t{case}");
        let outcome = restore_at(&route.sender, &server.url(&target), &["--table", &table]).await;
        let words = words(case);
        outcome
            .expect_code(1)
            .expect_words(&words.each_ref().map(String::as_str));
    }
}
