//! A stand-in for Kinesis: `kinesalite`, a JavaScript program that keeps streams in memory. Independent of moto.
//!
//! `ops/test` puts it below `target/aws-stand-ins`; `DR_AGENT_AWS_STAND_INS` names another directory. Each value of
//! [`Kinesalite`] is a server of its own on a free port of 127.0.0.1, without any stream; streams are made with
//! [`crate::streams`].
//!
//! # Invariants
//! - `Drop` ends the server, also when a test panics; [`crate::rundir`] does it for a test process that dies.
//! - Where the program is missing the tests fail with instructions; they never pass silently.
//!
//! # What it does not do
//! It checks no signature and no permission, and throttles nobody. It ends a closed shard as Kinesis does, some pages
//! behind its last record. MillisBehindLatest is 0 whatever is left, also in a page of 10 000 records before others.
//! ListShards is one page. An iterator AT_TIMESTAMP behind the last record it would never answer; what
//! starts it here mends that.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dr_agent::cloud::aws::AwsSettings;

use crate::moto::{settings, stand_ins};
use crate::rundir::{directory_for, tail};
use crate::server::free_port;

const START_MAX: Duration = Duration::from_secs(60);

/// Arguments: where it is installed, the port, and a directory for [`crate::rundir`], which ends what names it.
const SCRIPT: &str = r"
const [installed, port] = process.argv.slice(1)
const need = require('module').createRequire(installed + '/')
const path = need.resolve('kinesalite/actions/getShardIterator')
const getShardIterator = need(path)
const db = need('kinesalite/db')

// The first record at or behind the time, and where there is none, the place behind the last.
require.cache[path].exports = function (store, data, cb) {
    if (data.ShardIteratorType != 'AT_TIMESTAMP') return getShardIterator(store, data, cb)
    const shard = parseInt(data.ShardId.split('-')[1])
    const range = { gt: db.shardIxToHex(shard), lt: db.shardIxToHex(shard + 1) }
    let last, found = false
    store.getStreamDb(data.StreamName).createReadStream(range)
        .on('data', item => {
            found = found || item.value.ApproximateArrivalTimestamp >= data.Timestamp
            last = item.key.split('/')[1]
        })
        .on('end', () => {
            if (found) return getShardIterator(store, data, cb)
            const { StreamName, ShardId } = data
            getShardIterator(store, last
                ? { StreamName, ShardId, ShardIteratorType: 'AFTER_SEQUENCE_NUMBER', StartingSequenceNumber: last }
                : { StreamName, ShardId, ShardIteratorType: 'TRIM_HORIZON' }, cb)
        })
}

need('kinesalite')({ createStreamMs: 0, deleteStreamMs: 0, updateStreamMs: 0, shardLimit: 100 })
    .listen(+port, '127.0.0.1', () => console.log('listening'))
";

/// A running server.
pub struct Kinesalite {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Kinesalite {
    /// Starts a server and waits until it listens.
    pub async fn start() -> Self {
        let directory = directory_for("kinesalite");
        // A free port may be taken by somebody else before the server binds it.
        for _ in 0..5 {
            let mut server = Self::spawn(&directory, free_port());
            if server.listens().await {
                return server;
            }
        }
        panic!(
            "kinesalite does not start (ops/test e2e provides it); its log ends with:\n{}",
            tail(&directory.join("log"), 30)
        );
    }

    fn spawn(directory: &Path, port: u16) -> Self {
        let log = directory.join("log");
        let output = File::create(&log).expect("the directory is ours");
        let errors = output.try_clone().expect("a file can be cloned");
        let process = Command::new("node")
            .args(["-e", SCRIPT, "--"])
            .arg(stand_ins().join("kinesalite"))
            .arg(port.to_string())
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("node cannot be started: {error}; run ops/test e2e once, which provides it")
            });
        Self { process, port, log }
    }

    /// Waits until it says so; `false` when the server has given up.
    async fn listens(&mut self) -> bool {
        let deadline = Instant::now() + START_MAX;
        while Instant::now() < deadline {
            if self.process.try_wait().expect("it is our child").is_some() {
                return false;
            }
            if tail(&self.log, 1) == "listening" {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        false
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What leads a stream here.
    pub fn settings(&self) -> AwsSettings {
        settings(self.port)
    }
}

impl Drop for Kinesalite {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("── kinesalite ends with:\n{}", tail(&self.log, 30));
        }
    }
}
