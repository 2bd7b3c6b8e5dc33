//! Goal: a `check` that is green means that `run` works, with no right more than the manual names: as on a service whose role is
//! no superuser.
//! Method: one role with exactly those rights. Each is taken away and given back: `check` is red and names it; then a pooler that
//! drops what a session asks for stands in between. With everything there `check` is green, and `run` works.

use dr_agent_tests::agent::Agent;
use dr_agent_tests::pooler::Pooler;
use dr_agent_tests::site::Site;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_rights_that_the_manual_names_and_no_other_check_is_green_and_run_works() {
    let site = Site::own().await;
    // 14 has no right to set session_replication_role.
    if site.replica.major() < 15 {
        return;
    }
    let database = site.database("rights").await;
    let name = &database.name;
    let source = site.source.client(name).await;
    let replica = site.replica.client("postgres").await;
    source
        .run(&format!(
            "CREATE ROLE app; CREATE ROLE dr LOGIN REPLICATION; GRANT pg_read_all_data, pg_monitor, app TO dr;
             GRANT CREATE ON DATABASE \"{name}\" TO dr;
             CREATE TABLE t (id serial PRIMARY KEY, v text); ALTER TABLE t OWNER TO app; INSERT INTO t (v) VALUES ('a')"
        ))
        .await;
    replica
        .run(
            "CREATE ROLE app; CREATE ROLE dr LOGIN CREATEDB; GRANT app TO dr;
             GRANT SET ON PARAMETER session_replication_role TO dr",
        )
        .await;
    let as_dr = |url: String| url.replace("postgres@", "dr@");
    let (of_source, of_replica) = (
        as_dr(site.source.url("postgres")),
        as_dr(site.replica.url("postgres")),
    );
    let config = database
        .config()
        .set_text("source.url", &of_source)
        .set_text("replica.url", &of_replica);
    let agent = Agent::new(config.clone());

    let on_database = |verb: &str| format!("{verb} CREATE ON DATABASE \"{name}\"");
    let (grant, revoke) = (on_database("GRANT"), on_database("REVOKE"));
    let on_source = [
        (
            "ALTER ROLE dr NOREPLICATION".to_owned(),
            "ALTER ROLE dr REPLICATION".to_owned(),
            "REPLICATION",
        ),
        (
            format!("{revoke} FROM dr"),
            format!("{grant} TO dr"),
            "CREATE",
        ),
        (
            "REVOKE app FROM dr".to_owned(),
            "GRANT app TO dr".to_owned(),
            "own",
        ),
    ];
    let on_replica = [
        (
            "ALTER ROLE dr NOCREATEDB".to_owned(),
            "ALTER ROLE dr CREATEDB".to_owned(),
            "CREATEDB",
        ),
        (
            "REVOKE SET ON PARAMETER session_replication_role FROM dr".to_owned(),
            "GRANT SET ON PARAMETER session_replication_role TO dr".to_owned(),
            "session_replication_role",
        ),
    ];
    for (admin, cases) in [(&source, &on_source[..]), (&replica, &on_replica[..])] {
        for (take, give, words) in cases {
            admin.run(take).await;
            let checked = agent.command(&["check"]).await;
            checked.expect_code(1).expect_words(&[words]);
            admin.run(give).await;
        }
    }

    for (key, server, url) in [
        ("source.url", &site.source, &of_source),
        ("replica.url", &site.replica, &of_replica),
    ] {
        let pooler = Pooler::start(server.port()).await;
        let through = url.replace(
            &format!(":{}/", server.port()),
            &format!(":{}/", pooler.port()),
        );
        let pooled = Agent::new(config.clone().set_text(key, &through));
        let checked = pooled.command(&["check"]).await;
        checked.expect_code(1).expect_words(&["pooler"]);
        let running = pooled.start();
        running.wait_for_state(name, "stopped").await;
        running.stop().await;
    }

    agent.command(&["check"]).await.expect_code(0);
    let running = agent.start();
    running.wait_for_streaming(name).await;
    source.run("INSERT INTO t (v) VALUES ('b')").await;
    database.expect_equal().await;
    agent.command(&["check"]).await.expect_code(0);
    running.stop().await;
}
