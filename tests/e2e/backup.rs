//! Goal: a base backup is the source as of its LSN, whatever went on meanwhile; only what is whole is listed and loaded;
//! and it needs nothing of ours to be read.
//! Method: takes bases on real servers and loads them into empty databases; the source as of an LSN comes from PostgreSQL's own
//! recovery; objects are damaged by hand; a second process takes the backup that is killed.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dr_agent::archive::base::retention::RetentionSegment;
use dr_agent::archive::base::{self, BackupError, LoadJob, Manifest, Ownership, Patience, TakeJob};
use dr_agent::catalog;
use dr_agent::cloud::store::{Encryption, Store, StoreUrl};
use dr_agent::config::CopySettings;
use dr_agent::error::{Class, Classify as _, chain};
use dr_agent::names::TableName;
use dr_agent::names::history::History;
use dr_agent::names::stream::StreamName;
use dr_agent::observe::metrics::ArchiveMetrics;
use dr_agent::pg::ConnInfo;
use dr_agent::schema::listing::Listed;
use dr_agent_tests::backup::Backup;
use dr_agent_tests::binaries::Binaries;
use dr_agent_tests::client::Client;
use dr_agent_tests::compare::expect_same_content;
use dr_agent_tests::rundir::{directory_for, signal};
use dr_agent_tests::server::ServerOptions;
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use dr_agent_tests::workload::{BALANCED, Workload, seed};
use tokio_util::sync::CancellationToken;

use crate::by_hand::load;
use crate::types::tables_of_every_type;

/// An archive in a directory.
struct Archive {
    directory: PathBuf,
    store: Store,
}

const BASES: &str = "dr_app/7312/base/";

/// What the source's LSNs are of, in a test without an agent.
async fn history(client: &Client) -> History {
    let identifier = client
        .value("SELECT system_identifier FROM pg_control_system()")
        .await;
    History {
        system_identifier: identifier.unwrap().parse().unwrap(),
        began: 0,
    }
}

impl Archive {
    async fn new() -> Self {
        Self::at(directory_for("archive")).await
    }

    async fn at(directory: PathBuf) -> Self {
        let url = StoreUrl::Directory(directory.clone());
        let store = Store::open(&url, &Encryption::default()).await.unwrap();
        Self { directory, store }
    }

    async fn take(&self, url: &str) -> Result<Manifest, BackupError> {
        let client = Client::connect(url).await;
        let tables = catalog::tables(client.driver()).await.unwrap();
        let job = TakeJob {
            source: &conninfo(url),
            stream: &stream(),
            history: history(&client).await,
            listed: &Listed::new(),
            tables: &tables,
            store: &self.store,
            bases: BASES,
            settings: &settings(),
            patience: &patience(),
        };
        base::take(job, &(), &CancellationToken::new()).await
    }

    async fn load(
        &self,
        base: &str,
        url: &str,
        only: Option<&[TableName]>,
    ) -> Result<Manifest, BackupError> {
        let manifest = base::manifest(&self.store, base).await?;
        let job = LoadJob {
            store: &self.store,
            base,
            manifest: &manifest,
            target: &conninfo(url),
            stream: &stream(),
            settings: &settings(),
            only,
            ownership: Ownership::IfPossible,
            views: true,
        };
        let client = Client::connect(url).await;
        let examined = base::examine(&job, client.driver()).await?;
        base::load(job, examined, &(), &CancellationToken::new()).await?;
        Ok(manifest)
    }

    /// Prefixes of the bases that are listed.
    async fn list(&self) -> Vec<String> {
        let found = base::find(&self.store, BASES).await.unwrap();
        assert!(found.unusable.is_empty());
        found.bases.into_iter().map(|base| base.base).collect()
    }

    async fn only_base(&self) -> String {
        let mut bases = self.list().await;
        assert_eq!(bases.len(), 1, "{bases:?}");
        bases.remove(0)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

fn conninfo(url: &str) -> ConnInfo {
    ConnInfo::parse(url, None).unwrap()
}

fn stream() -> StreamName {
    StreamName::new("dr", "app")
}

fn settings() -> CopySettings {
    CopySettings {
        jobs: 3,
        pg_bin: Some(Binaries::newest_of_both().directory),
        split_bytes: 1 << 20,
    }
}

fn patience() -> Patience {
    let second = Duration::from_secs(1);
    Patience::new(second, 10 * second, &ArchiveMetrics::new("app"))
}

fn table(name: &str) -> TableName {
    TableName {
        schema: "public".to_owned(),
        name: name.to_owned(),
    }
}

/// A new database of the replica, and a session in it.
async fn new_database(site: &Site, name: &str) -> (String, Client) {
    site.replica.create_database(name).await;
    (site.replica.url(name), site.replica.client(name).await)
}

fn expect(result: Result<Manifest, BackupError>) -> Manifest {
    result.unwrap_or_else(|error| panic!("{}", chain(&error)))
}

/// The definite error must name all of this, and say what to do.
fn expect_error(result: Result<Manifest, BackupError>, words: &[&str]) {
    let error = result
        .err()
        .unwrap_or_else(|| panic!("no error of {words:?}"));
    let text = chain(&error);
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert_eq!(error.class(), Class::Definite, "{text}");
    assert!(error.hint().is_some(), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_taken_under_load_is_the_source_as_of_its_lsn() {
    let options = ServerOptions::source().set("wal_keep_size", "1GB");
    let site = Site::with(options, ServerOptions::replica()).await;
    let client = site.source.client("postgres").await;
    Workload::create_tables(&client).await;
    client
        .run(
            "CREATE TABLE big (id int PRIMARY KEY, n int, v text);
             INSERT INTO big SELECT g, 0, md5(g::text) FROM generate_series(1, 60000) AS g",
        )
        .await;
    let physical = Backup::take(&site.source).await;
    let workload = Workload::start(&site.source.url("postgres"), seed(), 3);
    let archive = Archive::new().await;
    wait_until("the workload to begin", PATIENCE, || async {
        workload.committed() >= 50
    })
    .await;
    let before = workload.committed();
    let manifest = take_again(&archive, &site.source.url("postgres")).await;
    assert!(workload.committed() > before, "nothing went on meanwhile");
    workload.stop().await;
    let parts = manifest.data().filter(|(_, data)| data.table.name == "big");
    assert!(parts.count() > 2, "the large table was not split");
    assert_eq!(manifest.dr_agent, dr_agent::VERSION);
    let slots = "SELECT count(*) FROM pg_replication_slots";
    assert_eq!(client.number(slots).await, 0);

    let base = archive.only_base().await;
    expect(base::verify(&archive.store, &base).await);
    let (url, loaded) = new_database(&site, "loaded").await;
    expect(archive.load(&base, &url, None).await);
    assert!(loaded.holds(BALANCED).await);
    let then = physical.restore_to(&manifest.lsn.to_string()).await;
    expect_same_content(&then.client("postgres").await, &loaded).await;
    // Recovery itself leaves sequences up to 32 further on, so the rows are what they are compared with.
    for (sequence, table, id) in [
        ("child_id_seq", "child", "id"),
        ("parent_id_seq", "parent", "id"),
        ("ledger_seq_seq", "ledger", "seq"),
    ] {
        let ahead = format!(
            "SELECT last_value >= coalesce((SELECT max({id}) FROM {table}), 0) FROM {sequence}"
        );
        assert!(loaded.holds(&ahead).await, "{sequence}");
    }
}

#[tokio::test]
async fn a_base_with_rows_that_a_constraint_refuses_is_loaded() {
    let site = Site::shared().await;
    let database = site.database("refused_base").await;
    let source = database.source().await;
    for statement in crate::refused::SOURCE {
        source.run(statement).await;
    }
    let archive = Archive::new().await;
    expect(archive.take(&site.source.url(&database.name)).await);
    let base = archive.only_base().await;
    let (url, loaded) = new_database(&site, "refused_loaded").await;
    expect(archive.load(&base, &url, None).await);
    expect_same_content(&source, &loaded).await;
    let constraints = "SELECT count(*) FROM pg_constraint
                        WHERE contype IN ('c', 'f') AND coninhcount = 0 AND conparentid = 0
                          AND connamespace = 'public'::regnamespace AND NOT convalidated AND conname <> 'kids_parent'";
    assert_eq!(loaded.number(constraints).await, 8);
    assert!(
        loaded
            .holds("SELECT convalidated FROM pg_constraint WHERE conname = 'good_parent'")
            .await
    );
}

/// A TRUNCATE between the snapshot and the locks is a transient error, after which the agent takes another; and the
/// workload truncates all the time.
async fn take_again(archive: &Archive, url: &str) -> Manifest {
    for _ in 0..20 {
        match archive.take(url).await {
            Err(error) if error.class() == Class::Transient => eprintln!("{}", chain(&error)),
            done => return expect(done),
        }
    }
    panic!("twenty backups in a row were disturbed");
}

const ODD: &str = "
    CREATE SCHEMA \"S p\";
    CREATE TYPE mood AS ENUM ('so', 'it''s'); CREATE TYPE pair AS (a int, \"B\" text);
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TABLE \"S p\".\"T \"\"1\"\"\" (\"Id\" int PRIMARY KEY, \"select\" text, \"tab\tname\" text);
    INSERT INTO \"S p\".\"T \"\"1\"\"\" SELECT g, E'a\\tb\\nc\\\\.' || g, CASE g % 3 WHEN 0 THEN E'\\\\.' WHEN 1 THEN '\\N' END
        FROM generate_series(1, 50) AS g;
    CREATE TABLE made (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a int, twice int GENERATED ALWAYS AS (a * 2) STORED,
        given int GENERATED BY DEFAULT AS IDENTITY (INCREMENT BY -3));
    INSERT INTO made (a) SELECT g FROM generate_series(1, 30) AS g;
    CREATE TABLE travels (id serial PRIMARY KEY, n numeric, d date, t timestamptz, i interval, b bytea, a text[][], p pair, m mood,
        c money, x xml, f float8, r int4range, j jsonb, g regclass, k positive);
    INSERT INTO travels (n, d, t, i, b, a, p, m, c, x, f, r, j, g, k) VALUES
        ('NaN', 'infinity', '-infinity', '-1 day +02:03:04.5', '\\x00ff5c2e0a', '{{a,NULL},{\"\",\"NULL\"}}', '(1,\"x,y\")', 'it''s',
         '-1234.56', '<a>&amp;</a><b/>', '-0', '[1,)', '{\"a\": [1, null]}', '\"S p\".\"T \"\"1\"\"\"', 7),
        ('-Infinity', '4713-01-01 BC', '2024-02-29 23:59:59.999999+00', 'P1Y2M', '', '{}', NULL, 'so', '0.01', 'text', '1e-307', 'empty',
         'null', 'pg_class', 1);
    CREATE TABLE parted (id int, region text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
    CREATE TABLE parted_eu PARTITION OF parted FOR VALUES IN ('de', 'fr') PARTITION BY RANGE (id);
    CREATE TABLE parted_eu_1 PARTITION OF parted_eu FOR VALUES FROM (0) TO (100);
    CREATE TABLE parted_rest PARTITION OF parted DEFAULT;
    INSERT INTO parted SELECT g, CASE g % 2 WHEN 0 THEN 'de' ELSE 'us' END FROM generate_series(1, 90) AS g;
    CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
    CREATE TABLE empty (id int PRIMARY KEY);
    CREATE TABLE kin (id int PRIMARY KEY, v text); CREATE TABLE kid (more int) INHERITS (kin);
    INSERT INTO kin VALUES (1, 'kin'); INSERT INTO kid VALUES (2, 'kid', 3);
    CREATE TABLE child (id int PRIMARY KEY, travels int REFERENCES travels, self int REFERENCES child);
    INSERT INTO child VALUES (2, 1, 1), (1, 2, NULL);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''fired''; END';
    CREATE TRIGGER always BEFORE INSERT ON child FOR EACH ROW EXECUTE FUNCTION refuse(); ALTER TABLE child ENABLE ALWAYS TRIGGER always;
    CREATE VIEW seen AS SELECT * FROM travels; CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM seen;
    CREATE TABLE dropped (a int, gone text, b int); INSERT INTO dropped VALUES (1, 'x', 2); ALTER TABLE dropped DROP gone;
    CREATE TABLE secured (id int PRIMARY KEY); INSERT INTO secured VALUES (1);
    ALTER TABLE secured ENABLE ROW LEVEL SECURITY; ALTER TABLE secured FORCE ROW LEVEL SECURITY;
    CREATE SEQUENCE \"S p\".\"it's\" START 5 MAXVALUE 9 CYCLE; SELECT nextval('\"S p\".\"it''s\"'); CREATE SEQUENCE untouched START 42";

/// What a schema consists of, in a form that does not depend on object identifiers.
const SCHEMA: &str = "
    SELECT 'i', indexdef FROM pg_indexes WHERE schemaname IN ('public', 'S p')
    UNION ALL SELECT 'c', conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid <> 0
          AND connamespace IN ('public'::regnamespace, '\"S p\"'::regnamespace)
    UNION ALL SELECT 't', tgrelid::regclass || ' ' || tgname FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'v', viewname || definition FROM pg_views WHERE schemaname = 'public'
    UNION ALL SELECT 's', schemaname || sequencename || ' ' || coalesce(last_value::text, 'untouched') FROM pg_sequences ORDER BY 1, 2";

#[tokio::test]
async fn what_travels_badly_arrives_with_psql_and_zstd_alone_too() {
    let site = Site::shared().await;
    let database = site.database("odd base").await;
    let source = database.source().await;
    source.run(ODD).await;
    let archive = Archive::new().await;
    let manifest = expect(archive.take(&database.source_url()).await);
    assert_eq!(manifest.warnings, Vec::<String>::new());
    let base = archive.only_base().await;

    let (url, loaded) = new_database(&site, "odd loaded").await;
    expect(archive.load(&base, &url, None).await);
    expect_same_content(&source, &loaded).await;
    assert_eq!(source.rows(SCHEMA).await, loaded.rows(SCHEMA).await);
    assert_eq!(loaded.number("SELECT * FROM counted").await, 2);
    // The replay that comes now is not disturbed.
    loaded
        .run("SET session_replication_role = replica; INSERT INTO child VALUES (9, 99, 99)")
        .await;

    let (_, by_hand) = new_database(&site, "odd by hand").await;
    load(&site.replica, "odd by hand", &archive.path(&base)).await;
    expect_same_content(&source, &by_hand).await;
    assert_eq!(source.rows(SCHEMA).await, by_hand.rows(SCHEMA).await);
}

#[tokio::test]
async fn a_value_of_any_type_is_the_same_after_a_load() {
    let (site, database, _) = tables_of_every_type().await;
    let archive = Archive::new().await;
    expect(archive.take(&database.source_url()).await);
    let base = archive.only_base().await;
    let (url, loaded) = new_database(&site, "types_loaded").await;
    expect(archive.load(&base, &url, None).await);
    expect_same_content(&database.source().await, &loaded).await;
    new_database(&site, "types_by_hand").await;
    load(&site.replica, "types_by_hand", &archive.path(&base)).await;
    let by_hand = site.replica.client("types_by_hand").await;
    expect_same_content(&database.source().await, &by_hand).await;
}

#[tokio::test]
async fn a_damaged_missing_or_surplus_object_is_named() {
    let site = Site::shared().await;
    let database = site.database("damage").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE t (id int PRIMARY KEY, v text);
             INSERT INTO t SELECT g, md5(g::text) FROM generate_series(1, 5000) AS g;
             CREATE TABLE u (id serial PRIMARY KEY); INSERT INTO u DEFAULT VALUES",
        )
        .await;
    let archive = Archive::new().await;
    let manifest = expect(archive.take(&database.source_url()).await);
    let base = archive.only_base().await;
    let (rows, _) = manifest
        .data()
        .find(|(_, data)| data.table.name == "t")
        .unwrap();
    let objects = [
        &rows.name,
        "schema.dump",
        "sequences.sql.zst",
        "post-data.sql.zst",
    ];
    let mut number = 0;
    for object in objects {
        let path = archive.path(&format!("{base}{object}"));
        let kept = fs::read(&path).unwrap();
        let mut flipped = kept.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 4;
        let shorter = kept[..kept.len() - 1].to_vec();
        for damage in [Some(flipped), Some(shorter), None] {
            match &damage {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            expect_error(base::verify(&archive.store, &base).await, &[object]);
            // Only people need this one.
            if object != "post-data.sql.zst" {
                number += 1;
                let (url, loaded) = new_database(&site, &format!("damaged_{number}")).await;
                expect_error(archive.load(&base, &url, None).await, &[object]);
                let written = loaded
                    .holds("SELECT EXISTS (SELECT 1 FROM pg_class WHERE relname = 't')")
                    .await;
                // What the listing tells, and the schema itself, is known before anything is written.
                let is_of_its_length = damage.is_some_and(|bytes| bytes.len() == kept.len());
                assert_eq!(written, is_of_its_length && object != "schema.dump");
                if written {
                    if *object == rows.name {
                        assert_eq!(loaded.number("SELECT count(*) FROM t").await, 0);
                    }
                    let again = archive.load(&base, &url, None).await;
                    expect_error(again, &["not empty", "table public.t"]);
                }
            }
        }
        fs::write(&path, &kept).unwrap();
    }
    expect(base::verify(&archive.store, &base).await);

    let surplus = archive.path(&format!("{base}data/99999.copy.zst"));
    fs::write(&surplus, "x").unwrap();
    let verified = base::verify(&archive.store, &base).await;
    expect_error(verified, &["data/99999.copy.zst", "not in the manifest"]);
    fs::remove_file(&surplus).unwrap();

    let path = archive.path(&format!("{base}manifest.json"));
    let kept = fs::read_to_string(&path).unwrap();
    fs::write(&path, kept.replace("\"rows\": 5000", "\"rows\": 5001")).unwrap();
    let verified = base::verify(&archive.store, &base).await;
    expect_error(verified, &["manifest.json", "damaged"]);
    // It is named beside the others, and not hidden.
    let found = base::find(&archive.store, BASES).await.unwrap();
    assert_eq!((found.bases.len(), found.unusable.len()), (0, 1));
    assert!(found.unusable[0].reason.contains("damaged"));
    fs::remove_file(&path).unwrap();
    assert!(archive.list().await.is_empty());
    let verified = base::verify(&archive.store, &base).await;
    expect_error(verified, &["no base backup", &base]);
}

#[tokio::test]
async fn one_table_is_loaded_without_the_others_rows() {
    let site = Site::shared().await;
    let database = site.database("one").await;
    let source = database.source().await;
    source
        .run(
            "CREATE TABLE a (id int PRIMARY KEY); INSERT INTO a VALUES (1), (2);
             CREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a); INSERT INTO b VALUES (1, 1), (2, 2)",
        )
        .await;
    let archive = Archive::new().await;
    expect(archive.take(&database.source_url()).await);
    let base = archive.only_base().await;
    let (url, loaded) = new_database(&site, "one_loaded").await;
    let unknown = archive.load(&base, &url, Some(&[table("nobody")])).await;
    expect_error(unknown, &["public.nobody"]);
    expect(archive.load(&base, &url, Some(&[table("b")])).await);
    assert_eq!(loaded.number("SELECT count(*) FROM a").await, 0);
    assert_eq!(
        loaded.column("SELECT a FROM b ORDER BY 1").await,
        ["1", "2"]
    );
}

/// A backup in a process of its own, which can be killed: this test binary runs this test alone.
const CHILD: &str = "DR_AGENT_TEST_BACKUP";

#[tokio::test]
async fn a_backup_for_the_tests_that_kill_it() {
    let Ok(job) = std::env::var(CHILD) else {
        return;
    };
    let (url, directory) = job.split_once('\n').unwrap();
    expect(Archive::at(directory.into()).await.take(url).await);
}

fn start_backup(url: &str, archive: &Archive, failpoint: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["backup::a_backup_for_the_tests_that_kill_it", "--exact"])
        .env(CHILD, format!("{url}\n{}", archive.directory.display()))
        .env("DR_AGENT_FAILPOINT", failpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_stopped(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('T'))
}

#[tokio::test]
async fn a_killed_backup_is_not_listed_and_is_tidied_up_a_day_later() {
    let site = Site::shared().await;
    let database = site.database("killed").await;
    let source = database.source().await;
    for n in 0..5 {
        source
            .run(&format!(
                "CREATE TABLE t{n} (id int PRIMARY KEY); INSERT INTO t{n} SELECT generate_series(1, 1000)"
            ))
            .await;
    }
    let archive = Archive::new().await;
    for failpoint in ["backup:data-written@2=stop", "backup:before-manifest=stop"] {
        let mut child = start_backup(&database.source_url(), &archive, failpoint);
        wait_until("the backup to stand still", PATIENCE, || {
            let stopped = is_stopped(&child);
            async move { stopped }
        })
        .await;
        // While it reads rows it holds no WAL back.
        let slots = format!(
            "SELECT count(*) FROM pg_replication_slots WHERE database = '{}'",
            database.name
        );
        wait_until("the slot to be gone", PATIENCE, || async {
            source.number(&slots).await == 0
        })
        .await;
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(archive.list().await.is_empty());
    }
    let left = archive.store.list(BASES, None).await.unwrap();
    assert!(!left.is_empty());

    // Another attempt does not mind them.
    let first = expect(archive.take(&database.source_url()).await);
    let second = expect(archive.take(&database.source_url()).await);
    assert!(first.lsn < second.lsn);
    let listed = archive.list().await;
    assert_eq!(listed.len(), 2);
    let segment = |name: &str, start: u64, end: u64| RetentionSegment {
        name: name.to_owned(),
        start: start.into(),
        end: end.into(),
        bytes: 1,
    };
    let (one, two) = (u64::from(first.lsn), u64::from(second.lsn));
    let log = [
        segment("log/1", 1, one),
        segment("log/2", one, two),
        segment("log/3", two, two + 9),
    ];
    for segment in &log {
        let put = archive.store.put_new(&segment.name, "x".into()).await;
        let _ = put.unwrap();
    }
    let prune = |hours: u32, dry_run: bool| {
        let now = second.as_of + Duration::from_secs(u64::from(hours) * 3600);
        let retention = Duration::from_secs(48 * 3600);
        base::prune(&archive.store, BASES, &log, now, retention, dry_run)
    };
    let young = prune(23, false).await.unwrap();
    assert_eq!((young.objects, young.log.len()), (0, 0), "{young:?}");
    let would = prune(49, true).await.unwrap();
    assert_eq!(would.bases, listed[..1]);
    assert_eq!(would.leftovers.len(), 2);
    assert_eq!(archive.list().await, listed);
    assert_eq!(prune(49, false).await.unwrap(), would);
    assert_eq!(archive.list().await, listed[1..]);
    let rest = archive.store.list("", None).await.unwrap();
    let stays = |name: &str| name.starts_with(&listed[1]) || name == "log/3";
    assert!(rest.iter().all(|object| stays(&object.name)), "{rest:?}");
    expect(base::verify(&archive.store, &listed[1]).await);
    let last = prune(24 * 365, false).await.unwrap();
    assert_eq!((last.bases.len(), last.log.len()), (0, 2), "{last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_that_waits_for_a_backup_does_not_stop_the_application() {
    let site = Site::shared().await;
    let database = site.database("queue").await;
    let source = database.source().await;
    const TABLES: usize = 8;
    for n in 0..TABLES {
        source
            .run(&format!(
                "CREATE TABLE t{n} (id int PRIMARY KEY); INSERT INTO t{n} SELECT generate_series(1, 1000)"
            ))
            .await;
    }
    let archive = Archive::new().await;
    let mut child = start_backup(&database.source_url(), &archive, "backup:data-written=stop");
    wait_until("the backup to stand still", PATIENCE, || {
        let stopped = is_stopped(&child);
        async move { stopped }
    })
    .await;
    // Each waits for a lock that the backup holds, and whoever wants the table after that waits, too: the backup's own
    // sessions and the application.
    let mut truncating = tokio::task::JoinSet::new();
    for n in 0..TABLES {
        let client = database.source().await;
        truncating.spawn(async move { client.run(&format!("TRUNCATE t{n}")).await });
    }
    let waiting = format!(
        "SELECT count(*) = {TABLES} FROM pg_stat_activity
          WHERE datname = '{}' AND wait_event_type = 'Lock' AND query LIKE 'TRUNCATE%'",
        database.name
    );
    wait_until("every TRUNCATE to wait", PATIENCE, || {
        source.holds(&waiting)
    })
    .await;
    signal("CONT", &[child.id()]);
    source.run("SET statement_timeout = '20s'").await;
    for n in 0..TABLES {
        assert_eq!(
            source.number(&format!("SELECT count(*) FROM t{n}")).await,
            0
        );
    }
    truncating.join_all().await;
    child.wait().unwrap();
    assert!(archive.list().await.is_empty());
}
