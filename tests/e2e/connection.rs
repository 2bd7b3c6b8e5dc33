//! Goal: both kinds of session get in by every way of authentication, and nobody else does.
//! Method: the agent's own `pg` against a server with one role per way of authentication.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dr_agent::error::{Class, Classify as _, chain};
use dr_agent::pg::replication::ReplicationConnection;
use dr_agent::pg::{ConnInfo, PgError, Session, connect};
use dr_agent_tests::server::{PgServer, ServerOptions, free_port};
use dr_agent_tests::wait::{PATIENCE, wait_until};

fn conninfo(url: &str) -> ConnInfo {
    ConnInfo::parse(url, None).unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Opens both kinds of session; they must agree.
async fn both(conninfo: &ConnInfo) -> Result<(), PgError> {
    let session = Session::new("dr_agent:check:test");
    let ordinary = connect(conninfo, &session).await;
    let walsender = ReplicationConnection::connect(conninfo, &session).await;
    match (ordinary, walsender) {
        (Ok(client), Ok(mut walsender)) => {
            let row = client.query_one("SELECT current_user::text", &[]).await?;
            assert_eq!(row.get::<_, String>(0), conninfo.user());
            let rows = walsender.simple_query("SELECT current_user").await?;
            assert_eq!(rows, [[Some(conninfo.user().to_owned())]]);
            walsender.close().await;
            Ok(())
        }
        (Err(one), Err(other)) => {
            assert_eq!(
                chain(&one),
                chain(&other),
                "the two kinds of session disagree"
            );
            Err(one)
        }
        (Ok(_), Err(error)) => panic!("only the walsender is refused: {}", chain(&error)),
        (Err(error), Ok(_)) => panic!("only the ordinary one is refused: {}", chain(&error)),
    }
}

async fn refusal(conninfo: &ConnInfo) -> PgError {
    both(conninfo)
        .await
        .expect_err("the server must refuse this")
}

/// One role per way of authentication, each with the password `s3cret: ä`.
async fn server_with_roles() -> PgServer {
    let server = ServerOptions::source()
        .hba("local all peerless scram-sha-256")
        .hba("host all scram 127.0.0.1/32 scram-sha-256")
        .hba("host all md5 127.0.0.1/32 md5")
        .hba("host all clear 127.0.0.1/32 password")
        .hba("host all nobody 127.0.0.1/32 reject")
        .start()
        .await;
    server
        .run(
            "postgres",
            "CREATE ROLE scram LOGIN REPLICATION PASSWORD 's3cret: ä';
             CREATE ROLE clear LOGIN REPLICATION PASSWORD 's3cret: ä';
             CREATE ROLE peerless LOGIN REPLICATION PASSWORD 's3cret: ä';
             CREATE ROLE trusted LOGIN REPLICATION;
             CREATE ROLE nobody LOGIN REPLICATION;
             CREATE ROLE readonly LOGIN REPLICATION;
             ALTER ROLE readonly SET default_transaction_read_only = on;
             SET password_encryption = 'md5';
             CREATE ROLE md5 LOGIN REPLICATION PASSWORD 's3cret: ä'",
        )
        .await;
    server
}

#[tokio::test]
async fn every_way_of_authentication_lets_in_who_knows_the_password() {
    let server = server_with_roles().await;
    let port = server.port();
    for user in ["scram", "md5", "clear"] {
        let url = |password: &str| {
            conninfo(&format!(
                "postgres://{user}{password}@127.0.0.1:{port}/postgres"
            ))
        };
        both(&url(":s3cret%3A%20%C3%A4")).await.unwrap();

        let wrong = refusal(&url(":wrong")).await;
        assert_eq!(wrong.sqlstate(), Some("28P01"), "{wrong}");
        // It may be being changed.
        assert_eq!(wrong.class(), Class::Transient);
        assert!(wrong.hint().unwrap().contains("password_file"));

        let none = refusal(&url("")).await;
        assert!(matches!(none, PgError::Password { .. }), "{none:?}");
        assert!(
            none.to_string()
                .contains(&format!("{user}@127.0.0.1:{port}")),
            "{none}"
        );
    }
    both(&conninfo(&format!(
        "postgres://trusted@127.0.0.1:{port}/postgres"
    )))
    .await
    .unwrap();
    let rejected = conninfo(&format!("postgres://nobody@127.0.0.1:{port}/postgres"));
    assert_eq!(refusal(&rejected).await.sqlstate(), Some("28000"));
    let nowhere = conninfo(&format!("postgres://trusted@127.0.0.1:{port}/nowhere"));
    assert_eq!(refusal(&nowhere).await.sqlstate(), Some("3D000"));
}

#[tokio::test]
async fn the_unix_socket_serves_as_well_and_needs_no_tls() {
    let server = server_with_roles().await;
    let url = server.socket_url("postgres");
    both(&conninfo(&url)).await.unwrap();
    both(&conninfo(&format!("{url}?sslmode=verify-full")))
        .await
        .unwrap();
    let scram = url.replace("postgres@", "peerless:s3cret%3A%20%C3%A4@");
    both(&conninfo(&scram)).await.unwrap();
    // Nothing can be bound to a socket, so this wish must not be ignored.
    let bound = refusal(&conninfo(&format!("{scram}?channel_binding=require"))).await;
    assert!(matches!(bound, PgError::Tls { .. }), "{bound:?}");
}

fn private_file(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[tokio::test]
async fn passwords_come_from_password_file_and_from_pgpass() {
    let server = server_with_roles().await;
    let directory = tempfile::tempdir().unwrap();
    let url = format!("postgres://scram@127.0.0.1:{}/postgres", server.port());

    let file = private_file(directory.path(), "password", "s3cret: ä\n");
    both(&ConnInfo::parse(&url, Some(file)).unwrap())
        .await
        .unwrap();
    let missing = ConnInfo::parse(&url, Some("/no/such/file".into())).unwrap();
    let error = refusal(&missing).await;
    assert!(error.to_string().contains("/no/such/file"), "{error}");

    let line = format!("127.0.0.1:{}:*:scram:s3cret\\: ä\n", server.port());
    let pgpass = private_file(directory.path(), "pgpass", &line);
    both(&conninfo(&format!("{url}?passfile={}", pgpass.display())))
        .await
        .unwrap();
}

#[tokio::test]
async fn hosts_are_tried_in_order_until_one_answers() {
    let server = server_with_roles().await;
    let (dead, live) = (free_port(), server.port());
    both(&conninfo(&format!(
        "postgres://trusted@127.0.0.1:{dead},127.0.0.1:{live}/postgres"
    )))
    .await
    .unwrap();

    let nobody = refusal(&conninfo(&format!(
        "postgres://trusted@127.0.0.1:{dead}/postgres"
    )))
    .await;
    assert!(matches!(nobody, PgError::Connect { .. }), "{nobody:?}");
    assert_eq!(nobody.class(), Class::Transient);
    assert!(
        nobody.to_string().contains(&format!("127.0.0.1:{dead}")),
        "{nobody}"
    );

    // A name that does not exist, as in a configuration with a typing error.
    let unknown = refusal(&conninfo(
        "postgres://trusted@no-such-host.invalid/postgres",
    ))
    .await;
    assert!(
        unknown.to_string().contains("no-such-host.invalid:5432"),
        "{unknown}"
    );
}

#[tokio::test]
async fn target_session_attrs_choose_among_servers() {
    let server = server_with_roles().await;
    let url = |user: &str, attrs: &str| {
        let port = server.port();
        conninfo(&format!(
            "postgres://{user}@127.0.0.1:{port}/postgres?target_session_attrs={attrs}"
        ))
    };
    for attrs in ["any", "read-write", "primary", "prefer-standby"] {
        both(&url("trusted", attrs)).await.unwrap();
    }
    for attrs in ["read-only", "standby"] {
        let error = refusal(&url("trusted", attrs)).await;
        assert!(
            chain(&error).contains("target_session_attrs"),
            "{}",
            chain(&error)
        );
    }
    // What the session itself asks for counts: so the agent writes to its read-only replica.
    both(&url("readonly", "read-write")).await.unwrap();
    refusal(&url("readonly", "read-only")).await;
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up_after_connect_timeout() {
    let server = server_with_roles().await;
    let url = format!("{}?connect_timeout=1", server.url("postgres"));
    server.pause();
    let started = Instant::now();
    let error = refusal(&conninfo(&url)).await;
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(
        chain(&error).contains("no answer within 1 s"),
        "{}",
        chain(&error)
    );
    assert_eq!(error.class(), Class::Transient);
    server.resume();
}

#[tokio::test]
async fn settings_hold_from_the_first_statement_and_a_dropped_session_ends() {
    let server = server_with_roles().await;
    let info = conninfo(&format!("{}?options=-c%20geqo=off", server.url("postgres")));
    let session = Session::new("dr_agent:apply:test")
        .set("search_path", r#""a b\c", public"#)
        .set("session_replication_role", "replica")
        .set("geqo_seed", "0.5");
    let expected = [
        ("search_path", r#""a b\c", public"#),
        ("session_replication_role", "replica"),
        ("geqo_seed", "0.5"),
        ("DateStyle", "ISO, YMD"),
        ("geqo", "off"),
        ("application_name", "dr_agent:apply:test"),
        ("client_encoding", "UTF8"),
    ];
    let client = connect(&info, &session).await.unwrap();
    let mut walsender = ReplicationConnection::connect(&info, &session)
        .await
        .unwrap();
    for (name, value) in expected {
        let sql = format!("SELECT current_setting('{name}')");
        assert_eq!(
            client
                .query_one(&sql, &[])
                .await
                .unwrap()
                .get::<_, String>(0),
            value
        );
        let rows = walsender.simple_query(&sql).await.unwrap();
        assert_eq!(rows, [[Some(value.to_owned())]]);
    }

    let observer = server.client("postgres").await;
    let sessions = "SELECT count(*) FROM pg_stat_activity
                    WHERE application_name = 'dr_agent:apply:test'";
    assert_eq!(observer.number(sessions).await, 2);
    drop((client, walsender));
    wait_until("both sessions end", PATIENCE, || async {
        observer.number(sessions).await == 0
    })
    .await;
}

#[tokio::test]
async fn a_session_ended_by_an_administrator_tells_why() {
    let server = server_with_roles().await;
    let info = conninfo(&server.url("postgres"));
    let session = Session::new("victim");
    let mut walsender = ReplicationConnection::connect(&info, &session)
        .await
        .unwrap();
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                     WHERE application_name = 'victim'";
    server.run("postgres", terminate).await;
    let error = walsender.identify_system().await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("57P01"), "{error:?}");
}

#[tokio::test]
async fn a_broken_session_says_so() {
    let server = server_with_roles().await;
    let info = conninfo(&server.url("postgres"));
    let client = connect(&info, &Session::new("x")).await.unwrap();
    let mut walsender = ReplicationConnection::connect(&info, &Session::new("x"))
        .await
        .unwrap();
    server.kill();
    let error = PgError::from(client.query("SELECT 1", &[]).await.unwrap_err());
    assert_eq!(error.class(), Class::Transient, "{error:?}");
    let error = walsender.identify_system().await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error:?}");
}
