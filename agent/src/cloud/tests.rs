//! Every call of AWS that the agent makes, and every refusal that heals: none is definite, each is called by its name, and says
//! what to do.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::aws::{AwsSettings, Refusal};
use super::kinesis::{Kinesis, KinesisError, KinesisOperation, Record};
use super::store::{Encryption, Store, StoreError};
use crate::error::{Class, Classify};

/// An answer that is none of what was asked for.
#[derive(Clone, Copy, Debug)]
struct Answer {
    status: u16,
    code: &'static str,
    /// How it is sorted, and how where there is no body to say it, as with HEAD.
    refusal: Refusal,
    without_body: Refusal,
}

const fn says(status: u16, code: &'static str, refusal: Refusal, without_body: Refusal) -> Answer {
    Answer {
        status,
        code,
        refusal,
        without_body,
    }
}

const HTML: &str = "<html>";
const NOTHING: &str = "";

/// What any service of AWS, and what is on the way to it, may say for a while.
const ANSWERS: [Answer; 20] = {
    use Refusal::*;
    [
        says(403, "AccessDenied", Denied, Forbidden),
        says(400, "AccessDeniedException", Denied, Unknown),
        says(400, "KMSDisabledException", Kms, Unknown),
        says(400, "KMSAccessDeniedException", Kms, Unknown),
        says(400, "KMS.DisabledException", Kms, Unknown),
        says(400, "ResourceNotFoundException", NoStream, Unknown),
        says(400, "UnrecognizedClientException", Credentials, Unknown),
        says(403, "InvalidClientTokenId", Credentials, Forbidden),
        says(403, "InvalidAccessKeyId", Credentials, Forbidden),
        says(400, "ExpiredToken", StaleCredentials, Unknown),
        says(403, "RequestTimeTooSkewed", Clock, Forbidden),
        says(400, "ThrottlingException", Throttled, Unknown),
        says(503, "SlowDown", Throttled, Unavailable),
        says(500, "InternalError", Unavailable, Unavailable),
        says(503, "ServiceUnavailable", Unavailable, Unavailable),
        says(502, HTML, Unavailable, Unavailable),
        says(403, NOTHING, Forbidden, Forbidden),
        says(403, "OfNextYear", Unknown, Forbidden),
        says(407, HTML, Foreign, Foreign),
        // A portal that wants a login.
        says(200, HTML, Foreign, Foreign),
    ]
};

/// Where requests of this kind are refused, and all others are answered in a way that leads to them.
struct Endpoint {
    port: u16,
}

impl Endpoint {
    /// `refused` says of a request's method, target and `X-Amz-Target` whether it is one of that kind.
    async fn start(refused: fn(&str) -> bool, answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let _ = carry(client, refused, answer).await;
                });
            }
        });
        Self { port }
    }

    fn settings(&self) -> AwsSettings {
        AwsSettings {
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            region: Some("eu-central-1".to_owned()),
            credentials: Some(("access".to_owned(), "secret".to_owned())),
            session_token: None,
            attempts: Some(1),
        }
    }

    async fn store(&self) -> Store {
        let url = "s3://bucket/app".parse().unwrap();
        let store = Store::open_with(&url, &Encryption::Default, &self.settings()).await;
        store.unwrap()
    }

    async fn stream(&self) -> Kinesis {
        let stream = Kinesis::open_with("changes", &self.settings()).await;
        stream.unwrap()
    }
}

async fn carry(
    mut client: TcpStream,
    refused: fn(&str) -> bool,
    answer: Answer,
) -> std::io::Result<()> {
    let mut request = Vec::new();
    let (asked, body) = loop {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
        let end = request.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        if let Some(end) = end {
            break (
                String::from_utf8_lossy(&request[..end]).into_owned(),
                end + 4,
            );
        }
    };
    let length = asked.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.parse::<usize>().ok())?
    });
    while request.len() < body + length.unwrap_or(0) {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let target = asked
        .lines()
        .find(|line| line.to_lowercase().starts_with("x-amz-target"));
    let line = asked.lines().next().unwrap_or_default();
    let asked = format!("{line} {}", target.unwrap_or_default());
    let (status, kind, headers, body) = match refused(&asked) {
        true => refusal(answer, target.is_some()),
        false => success(&asked),
    };
    let length = body.len();
    let body = if line.starts_with("HEAD") { "" } else { &body };
    let reply = format!(
        "HTTP/1.1 {status} Planned\r\nContent-Type: {kind}\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    client.write_all(reply.as_bytes()).await?;
    client.shutdown().await
}

type Reply = (u16, &'static str, &'static str, String);

fn refusal(answer: Answer, is_kinesis: bool) -> Reply {
    let code = answer.code;
    let (kind, body) = match code {
        HTML => (
            "text/html",
            "<html><body>Please log in</body></html>".to_owned(),
        ),
        NOTHING => ("text/plain", String::new()),
        _ if is_kinesis => (
            "application/x-amz-json-1.1",
            format!("{{\"__type\":\"{code}\",\"message\":\"as planned\"}}"),
        ),
        _ => (
            "application/xml",
            format!("<Error><Code>{code}</Code><Message>as planned</Message></Error>"),
        ),
    };
    // A portal's page has an ETag like any page.
    (answer.status, kind, "ETag: \"5f4d\"\r\n", body)
}

/// What leads to the next call.
fn success(asked: &str) -> Reply {
    let (status, body) = if asked.contains("?uploads") {
        (
            200,
            "<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>",
        )
    } else if asked.contains("partNumber=") || asked.starts_with("HEAD") {
        (200, "")
    } else if asked.starts_with("PUT") || asked.starts_with("POST /bucket") {
        // Something has the name already: whose is it?
        (
            412,
            "<Error><Code>PreconditionFailed</Code><Message>.</Message></Error>",
        )
    } else if asked.contains("ListShards") {
        (
            200,
            r#"{"Shards":[{"ShardId":"shardId-000000000000","HashKeyRange":{"StartingHashKey":"0","EndingHashKey":"1"},"SequenceNumberRange":{"StartingSequenceNumber":"1"}}]}"#,
        )
    } else if asked.contains("GetShardIterator") {
        (200, r#"{"ShardIterator":"it"}"#)
    } else if asked.contains("GetRecords") {
        (200, r#"{"Records":[],"MillisBehindLatest":0}"#)
    } else {
        (204, "")
    };
    let kind = match asked.contains("X-Amz-Target") || asked.contains("x-amz-target") {
        true => "application/x-amz-json-1.1",
        false => "application/xml",
    };
    (
        status,
        kind,
        "ETag: \"abc\"\r\nx-amz-request-id: 7\r\n",
        body.to_owned(),
    )
}

/// What is held against the table: how it was sorted, its class and its hint.
type Sorted = (Option<Refusal>, Class, String);

fn sorted(error: &impl Classify, refusal: Option<Refusal>) -> Sorted {
    (refusal, error.class(), error.hint().unwrap_or_default())
}

fn of_store<T>(done: Result<T, StoreError>) -> Sorted {
    match done {
        Ok(_) => (None, Class::Definite, "it was believed".to_owned()),
        Err(error @ StoreError::S3 { refusal, .. }) => sorted(&error, Some(refusal)),
        Err(error) => sorted(&error, None),
    }
}

/// Of several errors that of one operation.
fn of_stream(operation: KinesisOperation, errors: Vec<KinesisError>) -> Option<Sorted> {
    let mut errors = errors.into_iter();
    let found = errors.find(
        |error| matches!(error, KinesisError::Refused { operation: of, .. } if *of == operation),
    );
    found.map(|error| sorted(&error, error.refusal()))
}

/// The calls of S3: which requests they are, whether the answer has a body, and what makes them.
async fn refused_by_s3(call: &str, answer: Answer) -> Sorted {
    let is_it: fn(&str) -> bool = match call {
        "PutObject" => |asked| asked.starts_with("PUT"),
        "GetObject" => |asked| asked.starts_with("GET /bucket/app/"),
        "HeadObject" => |asked| asked.starts_with("HEAD"),
        "ListObjectsV2" => |asked| asked.contains("list-type=2"),
        "DeleteObject" => |asked| asked.starts_with("DELETE"),
        "CreateMultipartUpload" => |asked| asked.contains("?uploads"),
        "UploadPart" => |asked| asked.contains("partNumber="),
        "CompleteMultipartUpload" => {
            |asked| asked.starts_with("POST") && asked.contains("uploadId=")
        }
        "AbortMultipartUpload" => {
            |asked| asked.starts_with("DELETE") && asked.contains("uploadId=")
        }
        other => panic!("{other}"),
    };
    let endpoint = Endpoint::start(is_it, answer).await;
    let store = endpoint.store().await;
    let body = Bytes::from_static(b"body");
    match call {
        "PutObject" | "HeadObject" => of_store(store.put_new("a", body).await),
        "GetObject" => of_store(store.get("a").await),
        "ListObjectsV2" => of_store(store.list("", None).await),
        "DeleteObject" => of_store(store.delete("a").await),
        _ => of_store(store.put_new_in_parts("a", body).await),
    }
}

const S3_CALLS: [&str; 9] = [
    "PutObject",
    "GetObject",
    "HeadObject",
    "ListObjectsV2",
    "DeleteObject",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_of_s3_heals_from_every_refusal() {
    for answer in ANSWERS {
        for call in S3_CALLS {
            let (refusal, class, hint) = refused_by_s3(call, answer).await;
            let expected = match call {
                "HeadObject" => answer.without_body,
                _ => answer.refusal,
            };
            assert_eq!(refusal, Some(expected), "{call} {answer:?}: {hint}");
            assert_eq!(class, Class::Transient, "{call} {answer:?}");
            assert!(!hint.is_empty(), "{call} {answer:?}");
        }
    }
}

async fn refused_by_kinesis(operation: KinesisOperation, answer: Answer) -> Option<Sorted> {
    let is_it: fn(&str) -> bool = match operation {
        KinesisOperation::DescribeStreamSummary => |asked| asked.ends_with("DescribeStreamSummary"),
        KinesisOperation::ListShards => |asked| asked.ends_with("ListShards"),
        KinesisOperation::GetShardIterator => |asked| asked.ends_with("GetShardIterator"),
        KinesisOperation::GetRecords => |asked| asked.ends_with("GetRecords"),
        KinesisOperation::PutRecords => |asked| asked.ends_with("PutRecords"),
        KinesisOperation::Open => panic!("it is no call"),
    };
    let endpoint = Endpoint::start(is_it, answer).await;
    let stream = endpoint.stream().await;
    let errors = match operation {
        KinesisOperation::DescribeStreamSummary => {
            stream.describe().await.err().into_iter().collect()
        }
        KinesisOperation::PutRecords if answer.refusal.passes() => {
            // It is tried again there and then, without end: nothing is lost, and nobody is told that it was put.
            let waited = Arc::new(stream);
            let record = Record {
                partition_key: "k".to_owned(),
                data: Bytes::from_static(b"x"),
            };
            let put = waited.put(vec![record], &|_| {});
            let ended = tokio::time::timeout(std::time::Duration::from_millis(50), put).await;
            assert!(ended.is_err(), "{answer:?}: {ended:?}");
            waited.try_putting().await.err().into_iter().collect()
        }
        KinesisOperation::PutRecords => stream.try_putting().await.err().into_iter().collect(),
        _ => stream.try_reading().await,
    };
    of_stream(operation, errors)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_of_kinesis_heals_from_every_refusal() {
    use KinesisOperation::*;
    for answer in ANSWERS {
        for operation in [
            DescribeStreamSummary,
            ListShards,
            GetShardIterator,
            GetRecords,
            PutRecords,
        ] {
            let found = refused_by_kinesis(operation, answer).await;
            // Who only looks takes "too many requests" for an invitation.
            let looked = operation != DescribeStreamSummary && operation != ListShards;
            if looked && answer.refusal == Refusal::Throttled {
                assert!(found.is_none(), "{operation} {answer:?}");
                continue;
            }
            let (refusal, class, hint) = found.unwrap_or_else(|| panic!("{operation} {answer:?}"));
            assert_eq!(refusal, Some(answer.refusal), "{operation} {answer:?}");
            assert_eq!(class, Class::Transient, "{operation} {answer:?}");
            assert!(!hint.is_empty(), "{operation} {answer:?}");
        }
    }
}
