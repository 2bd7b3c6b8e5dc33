//! Goal: slots, exported snapshots and the replication stream work as documented, errors included.
//! Method: the agent's own walsender client on a source; what it gets is compared with what the
//! server shows through ordinary sessions.

use std::time::Duration;

use bytes::Bytes;
use dr_agent::error::{Class, Classify as _};
use dr_agent::pg::replication::{
    ReplicationConnection, ReplicationMessage, ReplicationReader, SlotOptions,
};
use dr_agent::pg::slot::{retained_bytes, slot_state};
use dr_agent::pg::{ConnInfo, PgError, PgLsn, Session, connect};
use dr_agent_tests::proxy::Proxy;
use dr_agent_tests::server::{PgServer, ServerOptions};
use dr_agent_tests::wait::{PATIENCE, wait_until};

const EXPORT: SlotOptions = SlotOptions {
    temporary: false,
    failover: true,
    export_snapshot: true,
};

const PGOUTPUT: [(&str, &str); 2] = [
    ("proto_version", "1"),
    ("publication_names", "\"Veröffentlichung\""),
];

async fn source() -> PgServer {
    let server = ServerOptions::source().start().await;
    server
        .run(
            "postgres",
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             CREATE PUBLICATION \"Veröffentlichung\" FOR TABLE t;
             INSERT INTO t VALUES (1, 'before')",
        )
        .await;
    server
}

fn conninfo(server: &PgServer) -> ConnInfo {
    ConnInfo::parse(&server.url("postgres"), None).unwrap()
}

async fn walsender(server: &PgServer) -> ReplicationConnection {
    let session = Session::new("dr_agent:stream:test");
    ReplicationConnection::connect(&conninfo(server), &session)
        .await
        .unwrap()
}

/// The next message of the output plugin whose first byte is `tag`; keepalives are passed over.
async fn plugin_message(reader: &mut ReplicationReader, tag: u8) -> Bytes {
    let wanted = async {
        loop {
            let message = reader.next().await.unwrap().expect("the stream goes on");
            if let ReplicationMessage::WalData { data, wal_end, .. } = message
                && data.first() == Some(&tag)
            {
                assert!(wal_end > PgLsn::from(0));
                return data;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wanted)
        .await
        .expect("the message comes in time")
}

/// `end_lsn` of a Commit message: tag, flags, commit_lsn, end_lsn.
fn end_lsn(commit: &Bytes) -> PgLsn {
    PgLsn::from(u64::from_be_bytes(commit[10..18].try_into().unwrap()))
}

/// A server process notices the end of its session in its own time.
async fn slot_is_free(observer: &tokio_postgres::Client) {
    wait_until("the slot is free", PATIENCE, || async {
        !slot_state(observer, "s")
            .await
            .unwrap()
            .expect("it exists")
            .active
    })
    .await;
}

#[tokio::test]
async fn the_server_says_who_it_is() {
    let server = source().await;
    let mut walsender = walsender(&server).await;
    let identity = walsender.identify_system().await.unwrap();
    let client = server.client("postgres").await;
    let identifier = client
        .value("SELECT system_identifier FROM pg_control_system()")
        .await;
    let found = identity.system_identifier.to_string();
    assert_eq!(Some(found), identifier);
    assert_eq!(identity.timeline, 1);
    assert!(identity.xlogpos > PgLsn::from(0));
    let version = client.number("SHOW server_version_num").await;
    assert_eq!(i64::from(walsender.server_version()), version);
}

#[tokio::test]
async fn a_slots_snapshot_ends_where_its_stream_begins() {
    let server = source().await;
    let mut walsender = walsender(&server).await;
    let slot = walsender.create_slot("s", EXPORT).await.unwrap();
    let client = server.client("postgres").await;
    client.run("INSERT INTO t VALUES (2, 'after')").await;

    let copy = server.client("postgres").await;
    let snapshot = slot.snapshot_name.expect("one was asked for");
    copy.run("BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    copy.run(&format!("SET TRANSACTION SNAPSHOT '{snapshot}'"))
        .await;
    assert_eq!(copy.column("SELECT v FROM t").await, ["before"]);

    let (mut reader, mut status) = walsender
        .start_replication("s", slot.consistent_point, &PGOUTPUT)
        .await
        .unwrap();
    let insert = plugin_message(&mut reader, b'I').await;
    assert!(insert.ends_with(b"after"), "{insert:?}");
    let commit = plugin_message(&mut reader, b'C').await;
    assert!(end_lsn(&commit) > slot.consistent_point);

    // Only what is acknowledged as flushed moves the slot.
    let observer = connect(&conninfo(&server), &Session::new("x"))
        .await
        .unwrap();
    let state = slot_state(&observer, "s")
        .await
        .unwrap()
        .expect("it exists");
    assert!(state.active && state.active_pid.is_some());
    assert_eq!(state.plugin.as_deref(), Some("pgoutput"));
    assert_eq!(state.database.as_deref(), Some("postgres"));
    assert_eq!(state.wal_status.as_deref(), Some("reserved"));
    assert!(!state.is_lost());
    assert_eq!(state.confirmed_flush_lsn, Some(slot.consistent_point));
    let end = end_lsn(&commit);
    status.send(end, end, end, true).await.unwrap();
    wait_until(
        "the slot is confirmed up to the commit",
        PATIENCE,
        || async {
            let state = slot_state(&observer, "s")
                .await
                .unwrap()
                .expect("it exists");
            state.confirmed_flush_lsn == Some(end)
        },
    )
    .await;
    // The reply that was asked for.
    let keepalive = reader.next().await.unwrap();
    assert!(
        matches!(keepalive, Some(ReplicationMessage::Keepalive { .. })),
        "{keepalive:?}"
    );

    assert!(retained_bytes(&observer, "s").await.unwrap().is_some());
    status.finish().await;
    while reader.next().await.unwrap().is_some() {}
    drop(reader);
    slot_is_free(&observer).await;
    assert_eq!(slot_state(&observer, "none").await.unwrap(), None);
    assert_eq!(retained_bytes(&observer, "none").await.unwrap(), None);
}

#[tokio::test]
async fn large_values_and_many_small_ones_arrive_whole_and_in_order() {
    let server = source().await;
    let mut session = walsender(&server).await;
    let slot = session
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap();
    assert_eq!(slot.snapshot_name, None);
    let client = server.client("postgres").await;
    client
        .run("INSERT INTO t SELECT i, i::text FROM generate_series(1000, 20999) i")
        .await;
    client
        .run("INSERT INTO t VALUES (2, repeat('äx', 3000000))")
        .await;
    client.run("INSERT INTO t VALUES (3, 'end')").await;
    let (mut reader, _status) = session
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .unwrap();
    for i in 1000..21_000 {
        let insert = plugin_message(&mut reader, b'I').await;
        assert!(insert.ends_with(i.to_string().as_bytes()), "{i}");
    }
    let large = plugin_message(&mut reader, b'I').await;
    assert!(
        large.ends_with("äx".repeat(3_000_000).as_bytes()),
        "{}",
        large.len()
    );
    assert!(plugin_message(&mut reader, b'I').await.ends_with(b"end"));
}

#[tokio::test]
async fn what_is_buffered_is_handed_out_without_waiting() {
    let server = source().await;
    let mut session = walsender(&server).await;
    session
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap();
    let client = server.client("postgres").await;
    client
        .run("INSERT INTO t SELECT i, 'x' FROM generate_series(1000, 1999) i")
        .await;
    let (mut reader, _status) = session
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .unwrap();
    // All of it is on its way: whoever reads sooner takes one message after the other.
    let end = client
        .value("SELECT pg_current_wal_flush_lsn()::text")
        .await;
    let sent = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE sent_lsn >= '{}'",
        end.expect("a position")
    );
    wait_until("the walsender to have sent it", PATIENCE, || async {
        client.number(&sent).await == 1
    })
    .await;
    let (mut reads, mut buffered, mut inserts) = (0, 0, 0);
    while inserts < 1000 {
        reads += 1;
        let mut message = reader.next().await.unwrap();
        while let Some(present) = message {
            if let ReplicationMessage::WalData { data, .. } = present {
                inserts += usize::from(data.first() == Some(&b'I'));
            }
            message = reader.next_buffered().unwrap();
            buffered += usize::from(message.is_some());
        }
    }
    assert_eq!(inserts, 1000);
    assert!(buffered > 0, "{reads} reads");
}

#[tokio::test]
async fn the_servers_reasons_are_told_apart() {
    let server = source().await;
    let mut first = walsender(&server).await;
    let sqlstate = |error: PgError| error.sqlstate().unwrap_or("none").to_owned();

    let error = first.drop_slot("s").await.unwrap_err();
    assert_eq!(sqlstate(error), "42704");
    first
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap();
    let error = first
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap_err();
    assert_eq!(sqlstate(error), "42710");
    // The session is as good as before.
    first.identify_system().await.unwrap();

    let missing = walsender(&server)
        .await
        .start_replication("none", PgLsn::from(0), &PGOUTPUT);
    assert_eq!(
        sqlstate(missing.await.err().expect("no such slot")),
        "42704"
    );
    let unknown = [("proto_version", "1"), ("no_such_option", "1")];
    let refused = walsender(&server)
        .await
        .start_replication("s", PgLsn::from(0), &unknown);
    assert!(matches!(refused.await.err(), Some(PgError::Server(_))));
    // The session that was refused took the slot first, and its server process ends in its own time.
    let observer = connect(&conninfo(&server), &Session::new("x"))
        .await
        .unwrap();
    slot_is_free(&observer).await;

    let (mut reader, _status) = first
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .unwrap();
    let mut second = walsender(&server).await;
    let busy = second.drop_slot("s").await.unwrap_err();
    assert_eq!(busy.class(), Class::Transient);
    assert_eq!(sqlstate(busy), "55006");

    let client = server.client("postgres").await;
    client
        .run("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots")
        .await;
    let ended = loop {
        match reader.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a terminated walsender does not end in order"),
            Err(error) => break error,
        }
    };
    assert_eq!(ended.class(), Class::Transient);
    assert_eq!(sqlstate(ended), "57P01");
    wait_until("the slot can be dropped", PATIENCE, || async {
        let mut session = walsender(&server).await;
        session.drop_slot("s").await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_temporary_slot_ends_with_its_session() {
    let server = source().await;
    let mut session = walsender(&server).await;
    let temporary = SlotOptions {
        temporary: true,
        export_snapshot: true,
        ..SlotOptions::default()
    };
    session.create_slot("fleeting", temporary).await.unwrap();
    let observer = connect(&conninfo(&server), &Session::new("x"))
        .await
        .unwrap();
    assert!(slot_state(&observer, "fleeting").await.unwrap().is_some());
    session.close().await;
    wait_until("the slot is gone", PATIENCE, || async {
        slot_state(&observer, "fleeting").await.unwrap().is_none()
    })
    .await;
}

#[tokio::test]
async fn a_server_that_shuts_down_ends_the_stream_and_a_cut_network_breaks_it() {
    let server = source().await;
    let mut session = walsender(&server).await;
    session
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap();
    session.close().await;

    let proxy = Proxy::start(server.port()).await;
    let url = server.url_through(proxy.port(), "postgres");
    let through = ConnInfo::parse(&url, None).unwrap();
    let session = ReplicationConnection::connect(&through, &Session::new("x"))
        .await
        .unwrap();
    let (mut reader, _status) = session
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .unwrap();
    proxy.cut();
    let broken = loop {
        match reader.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a cut network is no orderly end"),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(broken, PgError::Io(_) | PgError::Closed),
        "{broken:?}"
    );
    assert_eq!(broken.class(), Class::Transient);

    let observer = connect(&conninfo(&server), &Session::new("x"))
        .await
        .unwrap();
    slot_is_free(&observer).await;
    let (mut reader, mut status) = walsender(&server)
        .await
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .unwrap();
    // A walsender waits with its shutdown until we have confirmed everything.
    let follow = tokio::spawn(async move {
        loop {
            match reader.next().await {
                Ok(Some(
                    ReplicationMessage::WalData { wal_end, .. }
                    | ReplicationMessage::Keepalive { wal_end, .. },
                )) => status.send(wal_end, wal_end, wal_end, false).await.unwrap(),
                other => return other,
            }
        }
    });
    server.stop().await;
    let end = tokio::time::timeout(Duration::from_secs(30), follow)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(end.unwrap(), None);
}

#[tokio::test]
async fn a_slot_that_fell_behind_is_seen_as_lost() {
    let server = ServerOptions::source()
        .set("max_slot_wal_keep_size", "1MB")
        .set("min_wal_size", "32MB")
        .set("max_wal_size", "32MB")
        .start()
        .await;
    let mut session = walsender(&server).await;
    session
        .create_slot("s", SlotOptions::default())
        .await
        .unwrap();
    session.close().await;
    let client = server.client("postgres").await;
    let observer = connect(&conninfo(&server), &Session::new("x"))
        .await
        .unwrap();
    wait_until("the slot is lost", PATIENCE, || async {
        client.run("SELECT pg_switch_wal()").await;
        client
            .run("CREATE TABLE IF NOT EXISTS filler (x int)")
            .await;
        client.run("CHECKPOINT").await;
        slot_state(&observer, "s")
            .await
            .unwrap()
            .expect("it exists")
            .is_lost()
    })
    .await;
    let error = walsender(&server)
        .await
        .start_replication("s", PgLsn::from(0), &PGOUTPUT)
        .await
        .err()
        .expect("a lost slot streams nothing");
    // 55000 is an error of a moment as well: it is the next start that looks at the slot, and knows.
    assert_eq!(error.sqlstate(), Some("55000"), "{error}");
}
