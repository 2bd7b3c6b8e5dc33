//! Goal: "sound" means restorable to every moment that is promised, and what is wrong with one object costs that object.
//! Method: copies of one archive, each damaged in its own way, and the verdict on each; a bucket that keeps single objects back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use dr_agent::cloud::store::{Encryption, Put, Store};
use dr_agent_tests::archive::{
    TABLES, agent_at, archive, bases, expect_state, files_below, first_base, protected, restore,
    segments, span, wait_archived, work,
};
use dr_agent_tests::faults::{Fault, FaultyProxy};
use dr_agent_tests::moto::{self, Moto};
use dr_agent_tests::site::Site;
use dr_agent_tests::wait::{PATIENCE, wait_until};

/// The file whose name ends so, the first of them.
fn file(archive: &Path, end: &str) -> PathBuf {
    let mut found = files_below(archive).into_iter();
    let found = found.find(|path| path.display().to_string().ends_with(end));
    found.unwrap_or_else(|| panic!("there is no {end}"))
}

/// A segment that others lead to and on from.
fn middle(archive: &Path) -> PathBuf {
    let all = segments(archive);
    all[all.len() / 2].clone()
}

fn cut(path: &Path, bytes: u64) {
    let length = fs::metadata(path).unwrap().len();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(length - bytes).unwrap();
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn remove_all(archive: &Path, name: &str) {
    for path in files_below(archive) {
        if path.ends_with(name) {
            fs::remove_file(path).unwrap();
        }
    }
}

/// What is done to an archive, and what the verdict says.
type Damage = (&'static str, fn(&Path), &'static str);

const DAMAGES: &[Damage] = &[
    ("checksum", |a| cut(&middle(a), 4), "does not end where"),
    ("byte", |a| cut(&middle(a), 1), "does not end where"),
    (
        "half",
        |a| cut(&middle(a), fs::metadata(middle(a)).unwrap().len() / 2),
        "is missing",
    ),
    ("empty", |a| fs::write(middle(a), "").unwrap(), "is missing"),
    ("bit", |a| flip(&middle(a)), "is missing"),
    (
        "page",
        |a| fs::write(middle(a), "<html>").unwrap(),
        "is missing",
    ),
    (
        "rest",
        |a| {
            let bytes = [fs::read(middle(a)).unwrap(), b"\n".to_vec()].concat();
            fs::write(middle(a), bytes).unwrap();
        },
        "is missing",
    ),
    (
        "gone",
        |a| fs::remove_file(middle(a)).unwrap(),
        "is missing",
    ),
    (
        "other",
        |a| {
            fs::copy(&segments(a)[0], middle(a)).unwrap();
        },
        "is missing",
    ),
    (
        "wide",
        |a| {
            let name = "0000000000000001-FFFFFFFFFFFFFFFF.zst";
            fs::write(segments(a)[0].with_file_name(name), "").unwrap();
        },
        "FFFFFFFFFFFFFFFF.zst",
    ),
    (
        "base",
        |a| remove_all(a, "manifest.json"),
        "nothing can be restored",
    ),
    (
        "bases",
        |a| {
            let base = file(a, "manifest.json");
            fs::remove_dir_all(base.parent().unwrap().parent().unwrap()).unwrap();
        },
        "nothing can be restored",
    ),
    (
        "all",
        |a| {
            fs::remove_dir_all(a).unwrap();
            fs::create_dir(a).unwrap();
        },
        "NOTHING CAN BE RESTORED",
    ),
    (
        "manifest",
        |a| cut(&file(a, "manifest.json"), 9),
        "cannot be used",
    ),
    (
        "object",
        |a| fs::remove_file(file(a, "00001.copy.zst")).unwrap(),
        "is missing",
    ),
    ("rows", |a| flip(&file(a, "00001.copy.zst")), "SHA-256"),
    (
        "end",
        |a| cut(&file(a, "00001.copy.zst"), 4),
        "bytes instead of",
    ),
    ("schema", |a| flip(&file(a, "schema.dump")), "SHA-256"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sound_means_restorable_to_every_moment() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "damage").await;
    let source = database.source().await;
    work(&source, 12, 0).await;
    agent.command(&["backup"]).await.expect_code(0);
    let moment = work(&source, 6, 12).await.pop().unwrap();
    source.run("INSERT INTO bag VALUES ('later')").await;
    wait_archived(&database, &archive).await;
    running.stop().await;
    let sound = agent.command(&["backup", "--verify"]).await;
    sound
        .expect_code(0)
        .expect_words(&["2 base backups", "sound"]);
    for (name, damage, words) in DAMAGES {
        let copy = archive.with_file_name(name);
        let copied = Command::new("cp")
            .arg("-a")
            .args([&archive, &copy])
            .status();
        assert!(copied.unwrap().success());
        damage(&copy);
        agent.configure("archive.url", &format!("\"file://{}\"", copy.display()));
        let verified = agent.command(&["backup", "--verify"]).await;
        verified.expect_code(1).expect_words(&[words]);
        assert!(
            !verified.text().contains("sound"),
            "{name}: {}",
            verified.text()
        );
    } // Names that promise more than there is cost nobody what others hold.
    let first = segments(&archive)[0].clone();
    let real: Vec<PathBuf> = segments(&archive);
    let start = span(&real[0]).start;
    let (inner, end) = (span(&real[1]).start, span(&real[real.len() - 1]).end);
    for (name, bytes) in [
        (format!("{:016X}-FFFFFFFFFFFFFFFF.zst", 1), Vec::new()),
        (
            format!("{:016X}-FFFFFFFFFFFFFFFE.zst", u64::from(start)),
            fs::read(&first).unwrap(),
        ),
        (
            format!("{:016X}-{:016X}.zst", u64::from(inner), u64::from(end)),
            b"<html>".to_vec(),
        ),
    ] {
        fs::write(first.with_file_name(name), bytes).unwrap();
    }
    let url = format!("\"file://{}\"", archive.display());
    agent.configure("archive.url", &url);
    for arguments in [
        &["--to-lsn", moment.lsn.as_str()],
        &["--to-time", moment.time.as_str()],
    ] {
        let target = format!("around{}", arguments[0].replace('-', "_"));
        let restored = restore(&database, &agent, &target, arguments).await;
        restored.expect_code(0).expect_words(&["others hold"]);
        expect_state(&database, &target, &moment).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_place_is_taken_and_a_lost_one_is_not() {
    let site = Site::shared().await;
    let (database, archive, mut agent, running) = protected(&site, "moved").await;
    let source = database.source().await;
    work(&source, 3, 0).await;
    wait_archived(&database, &archive).await;
    running.stop().await;
    // Nobody has said that it is another one.
    let away = archive.with_file_name("mounted");
    fs::rename(&archive, &away).unwrap();
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    work(&source, 3, 3).await;
    running
        .wait_for_log(&["which the archive had taken, is not there"])
        .await;
    running.stop().await;
    assert!(segments(&archive).is_empty());
    fs::remove_dir_all(&archive).unwrap();
    fs::rename(&away, &archive).unwrap();
    // The configuration says so.
    let new = archive.with_file_name("new");
    agent.configure("archive.url", &format!("\"file://{}\"", new.display()));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    running.wait_for_log(&["archive.url has changed"]).await;
    running.wait_for_log(&["base backup taken"]).await;
    let moment = work(&source, 6, 6).await.pop().unwrap();
    source.run("INSERT INTO bag VALUES ('later')").await;
    wait_archived(&database, &new).await;
    running.stop().await;
    agent.command(&["backup", "--verify"]).await.expect_code(0);
    restore(&database, &agent, "moved_there", &["--to-lsn", &moment.lsn])
        .await
        .expect_code(0);
    expect_state(&database, "moved_there", &moment).await;
}

/// Complete segments that wait in a spool.
fn waiting(spool: &Path) -> Vec<PathBuf> {
    let mut found = files_below(spool);
    found.retain(|path| path.extension().is_some_and(|it| it == "log"));
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_a_segments_place_holds_up_nobody_behind_it() {
    let site = Site::shared().await;
    let database = site.database("inplace").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let proxy = FaultyProxy::start(moto.port()).await;
    let spool = archive().with_file_name("spool");
    let mut agent = agent_at(&database, "s3://archive/prod", &spool);
    agent.configure("limits.retry_max", "\"500ms\"");
    agent.surround(&moto::environment(&format!(
        "http://127.0.0.1:{}",
        proxy.port()
    )));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    let url = "s3://archive/prod".parse().unwrap();
    let store = Store::open_with(&url, &Encryption::Default, &moto.settings())
        .await
        .unwrap();
    proxy.spoil_every(
        "PUT /archive/prod/",
        Some(Fault::Answer(400, "ExpiredToken")),
    );
    work(&source, 3, 0).await;
    wait_until("segments to wait", PATIENCE, || async {
        waiting(&spool).len() > 2
    })
    .await;
    // The first may be on its way already.
    let (victim, later) = (waiting(&spool)[1].clone(), waiting(&spool)[2].clone());
    let history = victim
        .parent()
        .unwrap()
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    let log = format!("{}/{history}/log/", database.stream());
    let name = |path: &Path| format!("{log}{}.zst", span(path).name());
    let put = store
        .put_new(&name(&victim), "<html>".into())
        .await
        .unwrap();
    assert_eq!(put, Put::Created);
    let frozen = format!("GET /archive/prod/{}", name(&victim));
    proxy.spoil_every(&frozen, Some(Fault::Answer(403, "InvalidObjectState")));
    proxy.spoil_every("PUT /archive/prod/", None);
    running
        .wait_for_log(&["waits in the spool", "restore-object"])
        .await;
    let names = async || {
        let listed = store.list("", None).await.unwrap();
        listed
            .into_iter()
            .map(|object| object.name)
            .collect::<Vec<_>>()
    };
    wait_until("the next one", PATIENCE, || async {
        names().await.contains(&name(&later))
    })
    .await;
    proxy.spoil_every(&frozen, None);
    wait_until("it to be put aside", PATIENCE, || async {
        names().await.iter().any(|name| name.contains("/aside/")) && !victim.exists()
    })
    .await;
    let moment = work(&source, 3, 3).await.pop().unwrap();
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    agent
        .command(&["backup", "--verify"])
        .await
        .expect_code(0)
        .expect_words(&["sound"]);
    restore(
        &database,
        &agent,
        "inplace_there",
        &["--to-lsn", &moment.lsn],
    )
    .await
    .expect_code(0);
    expect_state(&database, "inplace_there", &moment).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_the_store_keeps_back_costs_that_object() {
    let site = Site::shared().await;
    let database = site.database("frozen").await;
    let source = database.source().await;
    source.run(TABLES).await;
    let moto = Moto::start().await;
    moto.create_bucket("archive").await;
    let proxy = FaultyProxy::start(moto.port()).await;
    let spool = archive().with_file_name("spool");
    let mut agent = agent_at(&database, "s3://archive/prod", &spool);
    agent.surround(&moto::environment(&format!(
        "http://127.0.0.1:{}",
        proxy.port()
    )));
    let running = agent.start();
    running.wait_for_streaming(&database.name).await;
    first_base(&running, &database).await;
    work(&source, 6, 0).await;
    agent.command(&["backup"]).await.expect_code(0);
    let moment = work(&source, 6, 6).await.pop().unwrap();
    source.run("INSERT INTO bag VALUES ('later')").await;
    database.expect_equal().await;
    running.stop().await;
    let oldest = bases(&agent).await[0];
    let manifest = format!("/base/{:016X}/manifest.json", u64::from(oldest));
    for (n, (fault, words)) in [
        (Fault::Answer(403, "InvalidObjectState"), "restore-object"),
        (Fault::Answer(400, "KMS.DisabledException"), "KMS key"),
        (Fault::Answer(403, "AccessDenied"), "s3:GetObject"),
        (Fault::Answer(403, "OfNextYear"), "words of AWS"),
        (Fault::Shorten(200), "cannot be read"),
        (Fault::Damage, "cannot be read"),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.spoil_every(&manifest, Some(fault));
        // An archive with such a base is looked at by a person.
        let listed = agent.command(&["backup", "--list"]).await;
        listed
            .expect_code(1)
            .expect_words(&["cannot be used", words]);
        listed.expect_words(&["restorable up to"]);
        let verified = agent.command(&["backup", "--verify"]).await;
        verified
            .expect_code(1)
            .expect_words(&["cannot be used", words]);
        agent.command(&["backup", "--prune"]).await.expect_code(0);
        if n % 3 == 0 {
            agent.command(&["backup"]).await.expect_code(0);
            let target = format!("{}_back_{n}", database.name);
            restore(&database, &agent, &target, &["--to-lsn", &moment.lsn])
                .await
                .expect_code(0);
            expect_state(&database, &target, &moment).await;
        }
    }
    proxy.spoil_every(&manifest, None);
    agent.command(&["backup", "--list"]).await.expect_code(0);
    // A clock that contradicts the store's deletes nothing.
    proxy.spoil_every(
        "GET /archive/?",
        Some(Fault::Dated("Fri, 01 Jan 2100 00:00:00 GMT")),
    );
    let refused = agent.command(&["backup", "--prune", "--dry-run"]).await;
    refused
        .expect_code(1)
        .expect_words(&["nothing is deleted"])
        .expect_words(&["NTP"]);
    proxy.spoil_every("GET /archive/?", None);
    agent.command(&["backup", "--prune"]).await.expect_code(0);
}
