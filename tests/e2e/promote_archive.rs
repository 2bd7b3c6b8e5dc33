//! Goal: a promotion takes what the archive holds beyond the replica, and what waits in the spool where that is here.
//! Method: the replica is held up by a lock while the change log goes on into the archive, and then, while the archive is away,
//! into the spool; the source is killed, and what the promoted replica has is compared with what it had committed.

use dr_agent::archive::log::Spool;
use dr_agent_tests::archive::{bring_back, files_below, protected, take_away, wait_archived};
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_goes_on_with_what_the_archive_and_the_spool_hold() {
    let site = Site::own().await;
    let (database, archive, agent, mut running) = protected(&site, "beyond").await;
    database.wait_caught_up().await;
    let source = database.source().await;
    let holding = database.writable_replica().await;
    holding
        .run("BEGIN; LOCK TABLE entry IN ACCESS EXCLUSIVE MODE")
        .await;
    for n in 0..200 {
        source
            .run(&format!(
                "INSERT INTO entry (account, v) VALUES (1, 'archived {n}')"
            ))
            .await;
    }
    wait_archived(&database, &archive).await;
    take_away(&archive);
    // The last one is so large that the spool shows when it is there.
    let digests = |n: u32| if n == 49 { 12_000_u32 } else { 200 };
    for n in 0..50u32 {
        let digests = digests(n);
        source
            .run(&format!(
                "INSERT INTO entry (account, v) SELECT 2, '{n} ' || string_agg(md5(random()::text || g), '') FROM generate_series(1, {digests}) AS g"
            ))
            .await;
    }
    let bytes: u64 = (0..50u32).map(|n| u64::from(digests(n)) * 32).sum();
    let spool = archive.with_file_name("spool");
    wait_until("the spool to have it", PATIENCE, || async {
        Spool::waiting(&spool).unwrap_or(0) > bytes
    })
    .await;
    running.kill();
    let all = "SELECT md5(string_agg(e::text, ',' ORDER BY id)) FROM entry AS e";
    let committed = source.value(all).await;
    site.source.kill();
    holding.run("ROLLBACK").await;
    let replica = database.replica().await;
    assert_eq!(replica.number("SELECT count(*) FROM entry").await, 0);

    // It is asked before anybody is fenced.
    let refused = agent.command(&["promote", "--failover"]).await;
    refused
        .expect_code(4)
        .expect_words(&["archive", "--skip-drain"]);
    bring_back(&archive);
    let before = files_below(&archive.with_file_name("spool"));
    let planned = agent.command(&["promote", "--failover", "--plan"]).await;
    planned
        .expect_code(0)
        .expect_words(&["leads from", "segments"]);
    planned.expect_words(&["wait in the spool here"]);
    let armed = [("DR_AGENT_FAILPOINT", "drain:settled")];
    let killed = agent.command_with(&["promote", "--failover"], &armed).await;
    assert_eq!(killed.code, None, "{}", killed.text());

    let promoted = agent.command(&["promote", "--failover", "--json"]).await;
    promoted.expect_code(0);
    let steps = promoted.json()["databases"][0]["steps"].to_string();
    assert!(
        steps.contains("of the archive's change log were applied"),
        "{steps}"
    );
    assert_eq!(replica.value(all).await, committed);
    assert_eq!(
        files_below(&archive.with_file_name("spool")),
        before,
        "the spool is only read"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_archive_holds_behind_damage_is_named_and_does_not_keep_the_replica_closed() {
    let site = Site::shared().await;
    let (database, archive, agent, mut running) = protected(&site, "damaged").await;
    database.wait_caught_up().await;
    let source = database.source().await;
    let known = dr_agent_tests::archive::segments(&archive);
    let holding = database.writable_replica().await;
    holding
        .run("BEGIN; LOCK TABLE entry IN ACCESS EXCLUSIVE MODE")
        .await;
    source
        .run("INSERT INTO entry (account, v) VALUES (1, 'lost')")
        .await;
    wait_archived(&database, &archive).await;
    running.kill();
    std::fs::remove_dir_all(archive.with_file_name("spool")).unwrap();
    let mut new = dr_agent_tests::archive::segments(&archive);
    new.retain(|segment| !known.contains(segment));
    for segment in &new {
        std::fs::write(segment, b"spoilt").unwrap();
    }
    holding.run("ROLLBACK").await;
    let promoted = agent.command(&["promote", "--failover", "--json"]).await;
    promoted.expect_code(0);
    let warnings = promoted.json()["databases"][0]["warnings"].to_string();
    assert!(
        warnings.contains("what the archive holds from"),
        "{warnings}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_cannot_take_what_the_archive_holds_does_not_keep_the_others_from_it() {
    let site = Site::shared().await;
    let (database, archive, mut agent, mut running) = protected(&site, "one_table").await;
    database.wait_caught_up().await;
    let source = database.source().await;
    let holding = database.writable_replica().await;
    holding
        .run("BEGIN; LOCK TABLE entry IN ACCESS EXCLUSIVE MODE")
        .await;
    source
        .run(
            "INSERT INTO account VALUES (7001, 1, 'too long'); INSERT INTO entry (account, v) VALUES (7001, 'beyond');
             INSERT INTO account VALUES (7002, 1, 'x'); INSERT INTO entry (account, v) VALUES (7002, 'beyond')",
        )
        .await;
    wait_archived(&database, &archive).await;
    running.kill();
    holding
        .run("ROLLBACK; ALTER TABLE account ALTER note TYPE varchar(3) USING left(note, 3)")
        .await;
    let replica = database.replica().await;
    let beyond = "SELECT count(*) FROM entry WHERE v = 'beyond'";

    // Where one table is to cost everything it does, and the same command goes on.
    agent.configure("replica.set_aside", "\"never\"");
    let strict = agent.command(&["promote", "--failover"]).await;
    strict
        .expect_code(1)
        .expect_words(&["public.account", "character varying(3)"]);
    assert_eq!(replica.number(beyond).await, 0);

    agent.configure("replica.set_aside", "\"retry\"");
    let promoted = agent.command(&["promote", "--failover"]).await;
    let text = promoted.text();
    promoted.expect_code(0);
    for words in [
        "table public.account is not complete",
        "table set aside",
        "left out",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_eq!(replica.number(beyond).await, 2);
    assert_eq!(
        replica
            .number("SELECT count(*) FROM account WHERE id > 7000")
            .await,
        0
    );
}
