//! Goal: both object stores keep the contract of `dr_agent::cloud::store`, and S3 keeps it through whatever a network and a
//! busy service do to single requests.
//! Method: one function asks the same of a directory and of a bucket (of moto); a proxy in front of moto
//! refuses, cuts and damages chosen requests, and records all.

use std::process::Command;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dr_agent::cloud::store::{
    Encryption, ObjectSummary, Put, Refusal, Store, StoreError, StoreUrl,
};
use dr_agent::error::{Class, Classify as _, chain};
use dr_agent_tests::faults::{Fault, FaultyProxy};
use dr_agent_tests::moto::{self, Moto, PAGE, SECRET};
use dr_agent_tests::rundir::directory_for;
use dr_agent_tests::wait::{PATIENCE, wait_until};
use rand::{RngCore as _, SeedableRng as _};

const BUCKET: &str = "archive";

fn url(prefix: &str) -> StoreUrl {
    format!("s3://{BUCKET}/{prefix}").parse().unwrap()
}

/// A store of its own in the bucket, reached through `port`.
async fn on_s3(port: u16, prefix: &str) -> Store {
    let settings = moto::settings(port);
    Store::open_with(&url(prefix), &Encryption::Default, &settings)
        .await
        .unwrap()
}

async fn moto() -> Moto {
    let moto = Moto::start().await;
    moto.create_bucket(BUCKET).await;
    moto
}

/// A bucket, and what spoils requests on the way to it.
async fn spoilt() -> (Moto, FaultyProxy, Store) {
    let moto = moto().await;
    let proxy = FaultyProxy::start(moto.port()).await;
    let store = on_s3(proxy.port(), "app").await;
    (moto, proxy, store)
}

fn random(bytes: usize) -> Bytes {
    let mut body = BytesMut::zeroed(bytes);
    rand::rngs::SmallRng::seed_from_u64(bytes as u64).fill_bytes(&mut body);
    body.freeze()
}

async fn write(store: &Store, name: &str, body: &Bytes) -> (Put, ObjectSummary) {
    let mut object = store.create(name).await.unwrap();
    // Pieces that end nowhere near the end of a part.
    for piece in body.chunks(1_000_003) {
        object.write(body.slice_ref(piece)).await.unwrap();
    }
    object.finish().await.unwrap()
}

async fn names(store: &Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    let listed = store.list(prefix, after).await.unwrap();
    listed.into_iter().map(|listed| listed.name).collect()
}

async fn keeps_the_contract(store: &Store) {
    // Written once; what comes second changes nothing.
    let (first, second) = (Bytes::from_static(b"first"), Bytes::from_static(b"second"));
    let put = store.put_new("meta/a.json", first.clone()).await.unwrap();
    assert_eq!(put, Put::Created);
    let put = store.put_new("meta/a.json", second.clone()).await.unwrap();
    assert_eq!(put, Put::Exists);
    assert_eq!(write(store, "meta/a.json", &second).await.0, Put::Exists);
    assert_eq!(store.get("meta/a.json").await.unwrap(), first);
    let put = store.put_new("meta/empty", Bytes::new()).await.unwrap();
    assert_eq!(put, Put::Created);
    assert_eq!(store.get("meta/empty").await.unwrap(), Bytes::new());

    // What is not there.
    for name in ["meta/b", "meta", "meta/a.json/b"] {
        let error = store.get(name).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        store.delete(name).await.unwrap();
    }

    // Of unknown size: nothing, less than a part, exactly one, some and a bit.
    for bytes in [0, 5, 8 << 20, (20 << 20) + 1] {
        let name = format!("base/{bytes}");
        let body = random(bytes);
        let (put, summary) = write(store, &name, &body).await;
        assert_eq!(put, Put::Created);
        let expected = ObjectSummary {
            bytes: bytes as u64,
            crc32c: crc32c::crc32c(&body),
        };
        assert_eq!(summary, expected);
        assert!(store.get(&name).await.unwrap() == body, "{name} is another");
    }
    let large = format!("base/{}", (20 << 20) + 1);
    let (put, _) = write(store, &large, &random(9 << 20)).await;
    assert_eq!(put, Put::Exists);
    let mut reader = store.read(&large).await.unwrap();
    let mut read = 0;
    while let Some(piece) = reader.next().await.unwrap() {
        assert!(!piece.is_empty() && piece.len() <= 1 << 20);
        read += piece.len();
    }
    assert_eq!(read, (20 << 20) + 1);
    assert!(reader.next().await.unwrap().is_none());

    // Given up: nowhere.
    let mut given_up = store.create("base/given-up").await.unwrap();
    given_up.write(random(9 << 20)).await.unwrap();
    drop(given_up);
    assert!(
        !names(store, "", None)
            .await
            .contains(&"base/given-up".to_owned())
    );

    // Listed in order, over several pages.
    let mut log: Vec<String> = (0..3 * PAGE).map(|i| format!("log/{i:04}.seg")).collect();
    for name in log.iter().rev() {
        let put = store.put_new(name, Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(put, Put::Created);
    }
    for name in ["log", "log-1", "log0"] {
        let put = store
            .put_new(&format!("{name}.x"), Bytes::new())
            .await
            .unwrap();
        assert_eq!(put, Put::Created);
    }
    assert_eq!(names(store, "log/", None).await, log);
    assert_eq!(names(store, "log/", Some(&log[3])).await, log[4..]);
    assert_eq!(names(store, "log/", Some("log/0003")).await, log[3..]);
    assert_eq!(names(store, "log/001", None).await, log[10..20]);
    assert_eq!(names(store, "nothing", None).await, Vec::<String>::new());
    let everything = names(store, "", None).await;
    assert!(everything.is_sorted(), "{everything:?}");
    assert_eq!(
        names(store, "log", None).await[..3],
        ["log-1.x", "log.x", "log/0000.seg"]
    );
    assert_eq!(store.list("meta/a", None).await.unwrap()[0].bytes, 5);

    // Deleted, also twice; then the name is free.
    let gone = log.remove(7);
    store.delete(&gone).await.unwrap();
    store.delete(&gone).await.unwrap();
    assert_eq!(names(store, "log/", None).await, log);
    assert_eq!(store.put_new(&gone, second).await.unwrap(), Put::Created);

    // Replaced as it was read, in one piece or in parts, and by nobody who has read something else.
    let damaged = Bytes::from_static(b"damaged");
    let put = store.put_new("meta/damaged", damaged).await.unwrap();
    assert_eq!(put, Put::Created);
    let old = store.read("meta/damaged").await.unwrap().version();
    for bytes in [700, (8 << 20) + 7] {
        let read = store.read("meta/damaged").await.unwrap().version();
        let body = random(bytes);
        let replace = async |read, body: &Bytes| {
            let mut object = store.replace("meta/damaged", read).await.unwrap();
            object.write(body.clone()).await.unwrap();
            object.finish().await.unwrap().0
        };
        assert_eq!(replace(read.clone(), &body).await, Put::Created);
        assert!(store.get("meta/damaged").await.unwrap() == body);
        for read in [&old, &read] {
            assert_eq!(replace(read.clone(), &random(9)).await, Put::Exists);
        }
        assert!(store.get("meta/damaged").await.unwrap() == body);
    }
    let read = store.read("meta/damaged").await.unwrap().version();
    store.delete("meta/damaged").await.unwrap();
    let mut object = store.replace("meta/damaged", read).await.unwrap();
    object.write(Bytes::from_static(b"x")).await.unwrap();
    let error = object.finish().await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error}");

    // Of many writers exactly one creates.
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8_u8 {
        let store = store.clone();
        writers.spawn(async move {
            let body = Bytes::from(vec![writer; 100]);
            (writer, store.put_new("race", body).await.unwrap())
        });
    }
    let ends = writers.join_all().await;
    let created: Vec<_> = ends
        .iter()
        .filter(|(_, put)| *put == Put::Created)
        .collect();
    assert_eq!(created.len(), 1, "{ends:?}");
    assert_eq!(store.get("race").await.unwrap(), vec![created[0].0; 100]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_keeps_the_contract() {
    let url = StoreUrl::Directory(directory_for("store"));
    let store = Store::open(&url, &Encryption::Default).await.unwrap();
    keeps_the_contract(&store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_keeps_the_contract_and_prefixes_keep_stores_apart() {
    // Behind the proxy, which lets moto be as atomic as S3 is.
    let (moto, proxy, _) = spoilt().await;
    let store = on_s3(proxy.port(), "app/a").await;
    keeps_the_contract(&store).await;
    // Neither a longer prefix nor none shows up in the other's listing.
    let neighbour = on_s3(moto.port(), "app/ab").await;
    assert_eq!(names(&neighbour, "", None).await, Vec::<String>::new());
    let above = on_s3(moto.port(), "app").await;
    assert_eq!(above.get("a/meta/a.json").await.unwrap(), "first");
    wait_until("given up uploads to be aborted", PATIENCE, || async {
        moto.open_uploads(BUCKET).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_upload_is_conditional_and_carries_a_checksum() {
    let (moto, proxy, _) = spoilt().await;
    let encryption = Encryption::Kms {
        key: "alias/archive".to_owned(),
    };
    let settings = moto::settings(proxy.port());
    let store = Store::open_with(&url("app"), &encryption, &settings)
        .await
        .unwrap();
    let body = random((16 << 20) + 5);
    assert_eq!(
        store.put_new("small", body.slice(..9)).await.unwrap(),
        Put::Created
    );
    assert_eq!(write(&store, "large", &body).await.0, Put::Created);
    let heads = proxy.heads();
    let of = |line: &str| {
        let found: Vec<&String> = heads.iter().filter(|head| head.starts_with(line)).collect();
        assert!(!found.is_empty(), "no {line} in {heads:#?}");
        found
    };
    for head in of("put ") {
        assert!(head.contains("\r\nx-amz-checksum-crc32c: "), "{head}");
    }
    assert_eq!(of("put ").len(), 4);
    let whole = of("post /archive/app/large?uploadid=");
    let put = of("put /archive/app/small");
    for head in whole.iter().chain(&put) {
        assert!(head.contains("\r\nif-none-match: *\r\n"), "{head}");
    }
    assert!(
        whole[0].contains("\r\nx-amz-checksum-type: full_object\r\n"),
        "{whole:?}"
    );
    assert!(
        whole[0].contains("\r\nx-amz-checksum-crc32c: "),
        "{whole:?}"
    );
    assert!(whole[0].contains(&format!("\r\nx-amz-mp-object-size: {}\r\n", body.len())));
    let begun = of("post /archive/app/large?uploads");
    for head in begun.iter().chain(&put) {
        assert!(
            head.contains("\r\nx-amz-server-side-encryption: aws:kms\r\n"),
            "{head}"
        );
        let key = "\r\nx-amz-server-side-encryption-aws-kms-key-id: alias/archive\r\n";
        assert!(head.contains(key), "{head}");
    }
    for head in &heads {
        assert!(!head.contains(SECRET), "{head}");
    }
    assert_eq!(moto.open_uploads(BUCKET).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_survives_a_busy_service_and_a_broken_network() {
    let (_moto, proxy, store) = spoilt().await;
    proxy.spoil("PUT", Fault::Answer(503, "SlowDown"));
    proxy.spoil("PUT", Fault::Cut);
    proxy.spoil("PUT", Fault::Answer(500, "InternalError"));
    let body = random(100_000);
    assert_eq!(
        store.put_new("a", body.clone()).await.unwrap(),
        Put::Created
    );
    assert_eq!(proxy.unused(), 0);
    assert_eq!(names(&store, "", None).await, ["a"]);
    assert_eq!(store.get("a").await.unwrap(), body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_whose_answer_is_lost_is_not_taken_for_another_writers() {
    let (_moto, proxy, store) = spoilt().await;
    let body = random(1000);
    proxy.spoil("PUT /archive/app/a", Fault::LoseAnswer);
    assert_eq!(
        store.put_new("a", body.clone()).await.unwrap(),
        Put::Created
    );
    proxy.spoil("PUT /archive/app/a", Fault::LoseAnswer);
    assert_eq!(store.put_new("a", body).await.unwrap(), Put::Exists);
    assert_eq!(proxy.unused(), 0);
    let puts = proxy
        .heads()
        .iter()
        .filter(|head| head.starts_with("put"))
        .count();
    assert_eq!(puts, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_in_parts_survives_the_same() {
    let (moto, proxy, store) = spoilt().await;
    let body = random(30 << 20);
    proxy.spoil("partNumber=2", Fault::Cut);
    proxy.spoil("partNumber=3", Fault::LoseAnswer);
    proxy.spoil(
        "POST /archive/app/a?uploads",
        Fault::Answer(503, "SlowDown"),
    );
    proxy.spoil(
        "POST /archive/app/a?uploadId",
        Fault::Answer(500, "InternalError"),
    );
    proxy.spoil("POST /archive/app/a?uploadId", Fault::LoseAnswer);
    assert_eq!(write(&store, "a", &body).await.0, Put::Created);
    assert_eq!(proxy.unused(), 0);
    assert!(store.get("a").await.unwrap() == body);
    // moto takes the same completion twice; S3 may say that the name is taken, or the upload gone.
    for (name, status, code) in [("b", 412, "PreconditionFailed"), ("c", 404, "NoSuchUpload")] {
        proxy.spoil("?uploadId", Fault::LoseAnswer);
        proxy.spoil("?uploadId", Fault::Answer(status, code));
        assert_eq!(write(&store, name, &body).await.0, Put::Created, "{code}");
        assert_eq!(proxy.unused(), 0);
    }
    // Aborted by somebody else, and no object: it must be written again.
    proxy.spoil("?uploadId", Fault::Answer(404, "NoSuchUpload"));
    let mut object = store.create("d").await.unwrap();
    object.write(body.clone()).await.unwrap();
    let error = object.finish().await.unwrap_err();
    assert_eq!(error.class(), Class::Transient, "{error}");
    // Another upload of a name is not mistaken for the first, and leaves nothing.
    assert_eq!(write(&store, "a", &random(10 << 20)).await.0, Put::Exists);
    assert!(store.get("a").await.unwrap() == body);
    wait_until("the other upload to be aborted", PATIENCE, || async {
        moto.open_uploads(BUCKET).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_goes_on_where_it_broke_and_notices_damage() {
    let (_moto, proxy, store) = spoilt().await;
    let damaged = async |store: &Store| {
        // Without the megabytes of an object that comes after all.
        let error = store.get("a").await.map(drop).unwrap_err();
        let text = chain(&error);
        assert!(matches!(error, StoreError::Damaged { .. }), "{text}");
    };
    let body = random(3 << 20);
    assert_eq!(
        store.put_new("a", body.clone()).await.unwrap(),
        Put::Created
    );
    proxy.spoil("GET /archive/app/a", Fault::BreakAfter(1 << 20));
    proxy.spoil("GET /archive/app/a", Fault::BreakAfter(0));
    proxy.spoil("GET /archive/app/a", Fault::BreakAfter(1 << 20));
    assert!(store.get("a").await.unwrap() == body);
    assert_eq!(proxy.unused(), 0);
    proxy.spoil("GET /archive/app/a", Fault::Damage);
    damaged(&store).await;
    // The SDK looks at whole answers only.
    proxy.spoil("GET /archive/app/a", Fault::BreakAfter(1 << 20));
    proxy.spoil("GET /archive/app/a", Fault::Damage);
    damaged(&store).await;
}

/// A captive portal, a proxy's login page, a balancer that says 200 to everything: nothing of that is an object.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_s3_has_stored_read_and_listed_nothing() {
    let (_moto, proxy, store) = spoilt().await;
    let body = random(100_000);
    let foreign = |error: &StoreError, what: &str| {
        let is_foreign = matches!(
            error,
            StoreError::S3 {
                refusal: Refusal::Foreign,
                ..
            }
        );
        assert!(is_foreign, "{what}: {error}");
        assert_eq!(error.class(), Class::Transient, "{what}");
        assert!(error.hint().unwrap().contains("portal"), "{what}");
    };
    const ETAG: &str = "ETag: \"5f4dcc3b5aa765d61d8327deb882cf99\"\r\n";
    const SUM: &str = "ETag: \"5f4d\"\r\nx-amz-checksum-crc32c: AAAAAA==\r\n";
    for page in ["", ETAG, SUM] {
        proxy.spoil("PUT /archive/app/small", Fault::Page(page));
        let error = store.put_new("small", body.clone()).await.unwrap_err();
        foreign(&error, "put");
        // The question whether it is there may go astray as well.
        proxy.spoil("PUT /archive/app/small", Fault::Page(page));
        proxy.spoil("HEAD /archive/app/small", Fault::Page(page));
        let error = store.put_new("small", body.clone()).await.unwrap_err();
        foreign(&error, "put and head");
    }
    let large = random((8 << 20) + 1);
    for (line, page) in [
        ("large?uploads", ""),
        ("large?uploads", ETAG),
        ("partNumber=1&", ""),
        ("partNumber=1&", SUM),
        ("partNumber=2&", ""),
        ("large?uploadId", ""),
        ("large?uploadId", ETAG),
    ] {
        proxy.spoil(line, Fault::Page(page));
        let mut writer = store.create("large").await.unwrap();
        let written = match writer.write(large.clone()).await {
            Ok(()) => writer.finish().await.map(|_| ()),
            Err(error) => Err(error),
        };
        foreign(&written.unwrap_err(), line);
        store.settle().await;
    }
    assert_eq!(names(&store, "", None).await, Vec::<String>::new());
    // One that does not tell the checksum, or the ETag, has stored it all the same.
    for (n, header) in ["x-amz-checksum-crc32c", "etag"].into_iter().enumerate() {
        let name = format!("small{n}");
        proxy.spoil("PUT /archive/app/small", Fault::Strip(header));
        let put = store.put_new(&name, body.clone()).await.unwrap();
        assert_eq!(put, Put::Created, "{header}");
        // Read back, a page is no object and half an object is not all of it.
        for page in ["", ETAG, SUM] {
            proxy.spoil("GET /archive/app/small", Fault::Page(page));
            foreign(&store.get(&name).await.unwrap_err(), "get");
        }
        for header in ["etag", "content-length"] {
            proxy.spoil("GET /archive/app/small", Fault::Strip(header));
            foreign(&store.get(&name).await.unwrap_err(), header);
        }
        proxy.spoil("GET /archive/app/small", Fault::Shorten(500));
        let error = store.get(&name).await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        // What goes on from the beginning instead of where it broke.
        proxy.spoil("GET /archive/app/small", Fault::BreakAfter(500));
        proxy.spoil("GET /archive/app/small", Fault::Forget("range"));
        foreign(&store.get(&name).await.unwrap_err(), "range");
        assert_eq!(store.get(&name).await.unwrap(), body);
    }
    for fault in [
        Fault::Page(""),
        Fault::Page(ETAG),
        Fault::Shorten(0),
        Fault::Shorten(150),
    ] {
        proxy.spoil("GET /archive/?", fault);
        foreign(&store.list("", None).await.unwrap_err(), "list");
        proxy.spoil("GET /archive/?", fault);
        foreign(&store.folders("").await.unwrap_err(), "folders");
    }
    assert_eq!(names(&store, "", None).await, ["small0", "small1"]);
    // Nor has it deleted anything, or ended an upload.
    for page in ["", ETAG] {
        proxy.spoil("DELETE /archive/app/small0", Fault::Page(page));
        foreign(&store.delete("small0").await.unwrap_err(), "delete");
    }
    assert_eq!(names(&store, "", None).await, ["small0", "small1"]);
    proxy.spoil("DELETE /archive/app/small0", Fault::Page(""));
    let put = store.put_new_in_parts("small0", body.clone()).await;
    foreign(&put.unwrap_err(), "abort");
    store.delete("small0").await.unwrap();
    assert_eq!(names(&store, "", None).await, ["small1"]);
    assert_eq!(proxy.unused(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_names_the_object_and_the_permission() {
    let (_moto, proxy, store) = spoilt().await;
    for line in ["PUT", "DELETE", "GET /archive/?", "GET /archive/app/a"] {
        proxy.spoil(line, Fault::Answer(403, "AccessDenied"));
    }
    let denied = |error: &StoreError, permission: &str| {
        let text = error.to_string();
        assert!(text.contains("s3://archive/app/a"), "{text}");
        assert!(
            text.contains("access denied") && text.contains("as planned"),
            "{text}"
        );
        assert!(!text.contains(SECRET), "{text}");
        let hint = error.hint().unwrap();
        assert!(hint.contains(permission), "{hint}");
        assert_eq!(error.class(), Class::Transient);
    };
    let body = Bytes::from_static(b"x");
    denied(
        &store.put_new("a", body.clone()).await.unwrap_err(),
        "s3:PutObject",
    );
    denied(&store.get("a").await.unwrap_err(), "s3:GetObject");
    denied(&store.list("a", None).await.unwrap_err(), "s3:ListBucket");
    denied(&store.delete("a").await.unwrap_err(), "s3:DeleteObject");
    assert_eq!(store.put_new("a", body).await.unwrap(), Put::Created);
    let store = on_s3(proxy.port(), "").await;
    assert_eq!(names(&store, "", None).await, ["app/a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_reached_says_so_without_secrets() {
    let moto = Moto::start().await;
    let store = on_s3(moto.port(), "app").await;
    let error = store.get("a").await.unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::S3 {
                refusal: Refusal::NoBucket,
                ..
            }
        ),
        "{error}"
    );
    let port = moto.port();
    drop(moto);
    let error = store.put_new("a", Bytes::new()).await.unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::S3 {
                refusal: Refusal::Unavailable,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.class(), Class::Transient);
    let text = format!(
        "{error} {error:?} {store:?} {}",
        moto::settings(port).endpoint.unwrap()
    );
    assert!(!text.contains(SECRET), "{text}");
    assert!(error.to_string().contains("onnect"), "{error}");
}

/// The environment belongs to the process, so another one reads it: this test binary, told to run the
/// test below.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoint_region_and_credentials_come_from_the_environment() {
    let moto = moto().await;
    let proxy = FaultyProxy::start(moto.port()).await;
    // A name, not an address: with an address the SDK puts the bucket into the path by itself.
    let endpoint = format!("http://localhost:{}", proxy.port());
    let run = |variables: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "store::in_the_environment_of_another_test"])
            .args(["--ignored", "--nocapture"])
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_CONFIG_FILE", "/nonexistent")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
            .envs(variables.iter().copied());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let credentials = [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
    ];
    for endpoint_variable in ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"] {
        let mut variables = credentials.to_vec();
        variables.push((endpoint_variable, &endpoint));
        let (fine, text) = run(&variables);
        assert!(fine && text.contains("wrote the object"), "{text}");
        let line = format!("put /{BUCKET}/environment/a?");
        assert!(proxy.heads().iter().any(|head| head.starts_with(&line)));
        let store = on_s3(moto.port(), "environment").await;
        assert_eq!(names(&store, "", None).await, ["a"]);
        store.delete("a").await.unwrap();
    }
    let (_, text) = run(&[("AWS_ENDPOINT_URL", &endpoint)]);
    assert!(text.contains("no valid credentials"), "{text}");
    let (_, text) = run(&credentials);
    assert!(text.contains("AWS_REGION"), "{text}");
}

#[tokio::test]
#[ignore = "started by the test above, in an environment of its choice"]
async fn in_the_environment_of_another_test() {
    let work = async {
        let store = Store::open(&url("environment"), &Encryption::Default).await?;
        store.put_new("a", Bytes::from_static(b"x")).await
    };
    match tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .unwrap()
    {
        Ok(put) => {
            assert_eq!(put, Put::Created);
            eprintln!("wrote the object");
        }
        Err(error) => panic!("{}; {}", chain(&error), error.hint().unwrap_or_default()),
    }
}
