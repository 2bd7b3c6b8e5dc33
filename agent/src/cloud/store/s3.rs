//! Objects as keys of an S3 bucket, through the AWS SDK.
//!
//! Every write carries `If-None-Match: *`, so S3 itself decides who comes first; what replaces a damaged object carries
//! `If-Match` with the ETag that was read. It also carries a number
//! of its own in the object's metadata ([`WRITER`]): a request whose answer was lost is sent again by the
//! SDK and finds the object in its way, and only the number tells our own object from another's.
//!
//! # Invariants
//! - Every upload carries the CRC-32C of its bytes; S3 refuses others. What is read is compared with the one
//!   S3 keeps.
//! - A status of 200 alone says nothing: what is written, read, listed and deleted has to look like S3's.
//! - Every request has a deadline that grows with what it sends, and at most [`ATTEMPTS`] attempts. One that
//!   stands still is given up.
//!
//! - What a dropped writer began is brought to its end in the background: an upload is aborted, a request that was sent is
//!   waited for.
//!
//! # What it does not do
//! It creates no bucket and changes none. It does not look for the bucket's region. How a client finds its settings
//! is in [`crate::cloud::aws`].

mod attempts;
mod lifecycle;
mod read;
mod refused;
mod write;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::config;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use metrics::Counter;
use tokio_util::task::TaskTracker;

use self::attempts::{Clock, Conflicts, OnlyS3, Throttled};
pub(super) use self::read::S3Reader;
pub(super) use self::write::S3Writer;
use super::{Encryption, Listed, Refusal, StoreError, StoreOperation, StoreUrl, name};
use crate::cloud::aws::{self, AwsSettings, time_to_send, within};

/// Metadata of an object: the number its writer drew.
const WRITER: &str = "dr-agent-writer";

/// Attempts at one request, with growing pauses between them; so many take up to half a minute.
const ATTEMPTS: u32 = 5;

/// S3 may take minutes to put the parts of an object together.
const COMPLETE_WITHIN: Duration = Duration::from_secs(600);

/// A bucket and a prefix in it.
#[derive(Clone)]
pub(super) struct S3 {
    client: Client,
    place: Arc<ObjectPlace>,
}

struct ObjectPlace {
    bucket: String,
    /// Empty, or ends with a slash.
    prefix: String,
    encryption: Encryption,
    throttled: Throttled,
    clock: Clock,
    background: TaskTracker,
}

/// The client's own representation is long, and holds what is none of a log's business.
impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3").field(&self.url("")).finish()
    }
}

impl S3 {
    pub(super) async fn open(
        bucket: &str,
        prefix: &str,
        encryption: &Encryption,
        settings: &AwsSettings,
    ) -> Result<Self, StoreError> {
        let attempts = settings.attempts.unwrap_or(ATTEMPTS);
        let environment = aws::environment(settings, "S3", attempts).await;
        let Some(region) = environment.region else {
            return Err(StoreError::S3 {
                doing: StoreOperation::Open,
                object: StoreUrl::S3 {
                    bucket: bucket.to_owned(),
                    prefix: prefix.to_owned(),
                }
                .to_string(),
                refusal: Refusal::Region,
                said: "the environment names no region".to_owned(),
            });
        };
        let (throttled, clock) = (Throttled::default(), Clock::default());
        let mut client = config::Builder::from(&environment.config)
            .region(region)
            .retry_classifier(Conflicts)
            .interceptor(throttled.clone())
            .interceptor(clock.clone());
        // Whoever serves S3 under a name of their own seldom has a name for every bucket too.
        client.set_force_path_style(environment.elsewhere.then_some(true));
        Ok(Self {
            client: Client::from_conf(client.build()),
            place: Arc::new(ObjectPlace {
                bucket: bucket.to_owned(),
                prefix: if prefix.is_empty() {
                    String::new()
                } else {
                    format!("{prefix}/")
                },
                encryption: encryption.clone(),
                throttled,
                clock,
                background: super::background(),
            }),
        })
    }

    /// Where answers are counted that ask for fewer requests.
    pub(super) fn count_throttled(&self, counter: Counter) {
        self.place.throttled.count_in(counter);
    }

    /// What the last answer leads to.
    pub(super) fn clock(&self) -> Option<SystemTime> {
        self.place.clock.now()
    }

    /// What goes on after those who wanted it are gone.
    pub(super) fn background(&self) -> &TaskTracker {
        &self.place.background
    }

    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> Result<Vec<Listed>, StoreError> {
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(self.bucket())
            .prefix(self.key(prefix))
            .set_start_after(after.map(|name| self.key(name)))
            .into_paginator()
            .send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.refused(StoreOperation::List, prefix, &error))?;
            self.must_be_a_list(prefix, &page)?;
            for object in page.contents() {
                let name = object
                    .key()
                    .and_then(|key| key.strip_prefix(&self.place.prefix));
                // What cannot be an object of ours is not: a console's marker of a "folder", for instance.
                let Some(name) = name.filter(|name| name::check(name).is_ok()) else {
                    continue;
                };
                found.push(Listed {
                    name: name.to_owned(),
                    bytes: length(object.size()),
                    written_at: object.last_modified().and_then(|at| (*at).try_into().ok()),
                });
            }
        }
        Ok(found)
    }

    pub(super) async fn folders(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut pages = self
            .client
            .list_objects_v2()
            .bucket(self.bucket())
            .prefix(self.key(prefix))
            .delimiter("/")
            .into_paginator()
            .send();
        let below = self.key(prefix);
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.refused(StoreOperation::List, prefix, &error))?;
            self.must_be_a_list(prefix, &page)?;
            found.extend(page.common_prefixes().iter().filter_map(|common| {
                let folder = common.prefix()?.strip_prefix(&below)?.strip_suffix('/')?;
                Some(folder.to_owned())
            }));
        }
        Ok(found)
    }

    /// An empty answer is no empty bucket, and a page that is not the last says where the next one begins.
    fn must_be_a_list(&self, prefix: &str, page: &ListObjectsV2Output) -> Result<(), StoreError> {
        let breaks_off =
            page.is_truncated() == Some(true) && page.next_continuation_token().is_none();
        if page.name().is_none() || breaks_off {
            return Err(self.foreign(
                StoreOperation::List,
                prefix,
                "an answer that is no whole list",
            ));
        }
        Ok(())
    }

    pub(super) async fn delete(&self, name: &str) -> Result<(), StoreError> {
        let request = self.client.delete_object().bucket(self.bucket());
        let request = request.key(self.key(name)).customize().interceptor(OnlyS3);
        match Box::pin(request.send()).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.refused(StoreOperation::Delete, name, &error)),
        }
    }

    fn bucket(&self) -> &str {
        &self.place.bucket
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.place.prefix)
    }

    fn url(&self, name: &str) -> String {
        format!("s3://{}/{}", self.bucket(), self.key(name))
    }
}

/// The deadline of each attempt at one request. With a deadline for all, a slow link could never send a large part.
fn patience(attempt: Duration) -> config::Builder {
    config::Builder::new().timeout_config(within(attempt))
}

/// A size as S3 says it.
fn length(said: Option<i64>) -> u64 {
    said.and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(0)
}

/// A CRC-32C as S3 writes it: base 64 of four bytes, the highest first.
fn written_crc(crc: u32) -> String {
    BASE64_STANDARD.encode(crc.to_be_bytes())
}

/// Reads what [`written_crc`] writes. `None` for a checksum of checksums, which ends with `-` and their number.
fn read_crc(text: &str) -> Option<u32> {
    let bytes = BASE64_STANDARD.decode(text).ok()?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_written_as_s3_writes_them() {
        // The check value of CRC-32C.
        let crc = crc32c::crc32c(b"123456789");
        assert_eq!(written_crc(crc), "4waSgw==");
        assert_eq!(read_crc("4waSgw=="), Some(0xe306_9283));
        for other in ["4waSgw==-3", "", "4waSgw", "4waSg4waSgw="] {
            assert_eq!(read_crc(other), None, "{other}");
        }
    }

    /// What the SDK logs is not in our hands; here it logs all that the program lets through.
    #[tokio::test]
    async fn no_secret_is_logged_at_any_level() {
        use std::sync::Mutex;

        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        use tracing_subscriber::filter::filter_fn;
        use tracing_subscriber::layer::SubscriberExt as _;

        let log = tempfile::NamedTempFile::new().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(Mutex::new(log.reopen().unwrap()))
            .finish()
            .with(filter_fn(aws::may_be_logged));
        let _guard = tracing::subscriber::set_default(subscriber);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let _ = client.read(&mut [0; 8192]).await;
            let answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n";
            client.write_all(answer).await.unwrap();
        });
        let settings = AwsSettings {
            endpoint: Some(format!("http://127.0.0.1:{port}")),
            region: Some("eu-central-1".to_owned()),
            credentials: Some(("an-access-key".to_owned(), "the-secret".to_owned())),
            session_token: Some("the-secret-token".to_owned()),
            attempts: None,
        };
        let store = S3::open("bucket", "", &Encryption::Default, &settings).await;
        let error = store.unwrap().delete("a").await.unwrap_err();
        assert!(error.to_string().contains("forbidden"), "{error}");
        let text = std::fs::read_to_string(log.path()).unwrap();
        assert!(text.contains("DEBUG"), "nothing was logged: {text}");
        assert!(!text.contains("the-secret"), "{text}");
    }
}
