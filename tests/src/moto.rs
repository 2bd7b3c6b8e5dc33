//! A stand-in for S3 and Kinesis: `moto_server`, a Python program that keeps buckets and streams in memory.
//!
//! `ops/test` puts it into a virtual environment, `target/aws-stand-ins`; `DR_AGENT_AWS_STAND_INS` names
//! another. Each value of [`Moto`] is a server of its own on a free port of 127.0.0.1, without any bucket or stream.
//! Streams are made with [`crate::streams`].
//!
//! # Invariants
//! - `Drop` ends the server, also when a test panics; [`crate::rundir`] does it for a test process that dies.
//! - Where the program is missing the tests fail with instructions; they never pass silently.
//!
//! # What it does not do
//! moto checks no signature, no permission and no checksum, and its answers come at once. How a store takes
//! what the real S3 refuses is tested with [`crate::faults`].
//!
//! Its Kinesis never ends a shard: one that was split or merged gives an iterator for ever, and takes records still
//! (what was in it is also in its children). MillisBehindLatest is the time from the last record of the answer to the
//! last of the shard, not to now. It counts the shards of a stream as they were when it was made.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dr_agent::cloud::aws::AwsSettings;

use crate::http;
use crate::rundir::{directory_for, tail};
use crate::server::free_port;

/// Python takes a while to read all of moto, and longer when others are at it.
const START_MAX: Duration = Duration::from_secs(60);

/// The last argument is for [`crate::rundir`], which ends what names its directory.
///
/// moto answers several requests at the same time, and its Kinesis is not made for that: two calls of PutRecords may
/// give two records one number, and the first is lost. So it gets a lock.
const SCRIPT: &str = "
import functools, sys, threading
from moto.kinesis.models import KinesisBackend
from moto.server import main

lock = threading.RLock()

def alone(method):
    @functools.wraps(method)
    def locked(*args, **kwargs):
        with lock:
            return method(*args, **kwargs)
    return locked

for name in ['put_record', 'put_records', 'get_records', 'split_shard', 'merge_shards']:
    setattr(KinesisBackend, name, alone(getattr(KinesisBackend, name)))

main(['-H', '127.0.0.1', '-p', sys.argv[1]])
";

/// The keys of a listing that come on one page. S3 has 1000; fewer show as well that pages are followed.
pub const PAGE: usize = 7;

/// The secret that [`Moto::settings`] give; no error and no log may show it.
pub const SECRET: &str = "not-to-be-shown";

/// A running server.
pub struct Moto {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Moto {
    /// Starts a server and waits until it answers.
    pub async fn start() -> Self {
        let directory = directory_for("moto");
        // A free port may be taken by somebody else before the server binds it.
        for _ in 0..5 {
            let mut moto = Self::spawn(&directory, free_port());
            if moto.answers().await {
                return moto;
            }
        }
        panic!(
            "moto_server does not start; its log ends with:\n{}",
            tail(&directory.join("log"), 30)
        );
    }

    fn spawn(directory: &Path, port: u16) -> Self {
        let python = python();
        let log = directory.join("log");
        let output = File::create(&log).expect("the directory is ours");
        let errors = output.try_clone().expect("a file can be cloned");
        let process = Command::new(&python)
            .args(["-c", SCRIPT, &port.to_string()])
            .arg(directory)
            .env("MOTO_S3_DEFAULT_MAX_KEYS", PAGE.to_string())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "{} cannot be started: {error}; run ops/test e2e once, which provides it",
                    python.display()
                )
            });
        Self { process, port, log }
    }

    /// Waits for the first answer; `false` when the server has given up.
    async fn answers(&mut self) -> bool {
        let deadline = Instant::now() + START_MAX;
        while Instant::now() < deadline {
            if self.process.try_wait().expect("it is our child").is_some() {
                return false;
            }
            if http::get(self.port, "/moto-api/").await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What leads a store or a stream here.
    pub fn settings(&self) -> AwsSettings {
        settings(self.port)
    }

    /// Creates a bucket.
    pub async fn create_bucket(&self, name: &str) {
        let answer = http::ask(self.port, "PUT", &format!("/{name}")).await;
        let answer = answer.expect("moto answers");
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// Has the bucket keep every version of its objects; [`Moto::written_twice`] looks at them.
    pub async fn keep_versions(&self, bucket: &str) {
        let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        self.put(&format!("/{bucket}?versioning"), body).await;
    }

    /// Objects of which there is more than one version: somebody has written over them.
    pub async fn written_twice(&self, bucket: &str) -> Vec<String> {
        let path = format!("/{bucket}?versions&max-keys=1000000");
        let answer = http::get(self.port, &path).await.expect("moto answers");
        assert_eq!(answer.status, 200, "{answer:?}");
        let mut keys: Vec<&str> = answer
            .body
            .split("<Version>")
            .skip(1)
            .filter_map(|version| version.split_once("<Key>")?.1.split_once("</Key>"))
            .map(|(key, _)| key)
            .collect();
        assert!(!keys.is_empty(), "{answer:?}");
        keys.sort_unstable();
        let twice = keys.windows(2).filter(|pair| pair[0] == pair[1]);
        twice.map(|pair| pair[0].to_owned()).collect()
    }

    /// Gives the bucket these lifecycle rules, in the words of S3.
    pub async fn lifecycle(&self, bucket: &str, rules: &str) {
        let body = format!("<LifecycleConfiguration>{rules}</LifecycleConfiguration>");
        self.put(&format!("/{bucket}?lifecycle"), &body).await;
    }

    async fn put(&self, path: &str, body: &str) {
        let answer = http::send(self.port, "PUT", path, &[], body).await;
        let answer = answer.expect("moto answers");
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    /// How many uploads of several parts have begun and not ended.
    pub async fn open_uploads(&self, bucket: &str) -> usize {
        let answer = http::get(self.port, &format!("/{bucket}?uploads")).await;
        let answer = answer.expect("moto answers");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body.matches("<UploadId>").count()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("── moto ends with:\n{}", tail(&self.log, 30));
        }
    }
}

/// What leads a store or a stream to a port of this machine.
pub fn settings(port: u16) -> AwsSettings {
    AwsSettings {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: Some("eu-central-1".to_owned()),
        credentials: Some(("test".to_owned(), SECRET.to_owned())),
        session_token: None,
        attempts: None,
    }
}

/// The same as the environment of a program.
pub fn environment(endpoint: &str) -> [(&'static str, &str); 4] {
    [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_REGION", "eu-central-1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
    ]
}

/// Where the stand-ins for AWS are.
pub(crate) fn stand_ins() -> PathBuf {
    match env::var_os("DR_AGENT_AWS_STAND_INS") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/aws-stand-ins"),
    }
}

fn python() -> PathBuf {
    stand_ins().join("bin/python")
}
