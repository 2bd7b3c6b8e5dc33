//! What every client of AWS has in common: where it looks for its settings, its TLS, its deadlines, and how the words
//! of a failed request are put on one line.
//!
//! Below `store/s3` and `kinesis`; knows neither. The error codes of both are sorted in one place, `refusal`.
//!
//! # Invariants
//! - No secret is in anything this module returns as text.
//! - Every request has a deadline that grows with what it sends. A body that stands still is given up.
//!
//! # What it does not do
//! It decides nothing about retries.

mod http;
mod refusal;

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_kinesis::config::StalledStreamProtectionConfig;
use aws_sdk_kinesis::config::retry::RetryConfig;
use aws_sdk_kinesis::config::timeout::TimeoutConfig;
use aws_sdk_kinesis::error::{ProvideErrorMetadata, SdkError};
use aws_types::request_id::RequestId as _;
use aws_types::service_config::ServiceConfigKey;

pub use self::refusal::Refusal;

const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// For one attempt at a request that sends or waits for little.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// A link slower than this is no way to AWS: half a megabit.
pub(crate) const SLOWEST_BYTES_PER_SECOND: u64 = 64 * 1024;

/// A stream that has not moved for so long is given up.
const STANDSTILL: Duration = Duration::from_secs(20);

/// An answer is a page of HTML at worst; so much of it is enough for a person.
const SAID_MAX: usize = 500;

/// What goes before the AWS environment, where it is set. For a service that is not the environment's, a
/// test's for instance. Holds secrets, so it has no representation for a log.
#[derive(Clone, Default)]
pub struct AwsSettings {
    /// `http://127.0.0.1:9000`
    pub endpoint: Option<String>,
    /// `eu-central-1`
    pub region: Option<String>,
    /// Access key and secret key.
    pub credentials: Option<(String, String)>,
    /// What makes temporary credentials valid.
    pub session_token: Option<String>,
    /// Attempts at a request, in place of what the service is given otherwise.
    pub attempts: Option<u32>,
}

/// What a client is made of.
pub(crate) struct AwsEnvironment {
    pub(crate) config: SdkConfig,
    /// `None` where nothing says one and none may be assumed.
    pub(crate) region: Option<Region>,
    /// The service is not AWS's own: an endpoint is given.
    pub(crate) elsewhere: bool,
}

/// The AWS environment with what `settings` say before it. `service` is the service's id in the SDK: it reads
/// `AWS_ENDPOINT_URL_<SERVICE>` by itself. At most `attempts` of a request are made by the SDK.
pub(crate) async fn environment(
    settings: &AwsSettings,
    service: &'static str,
    attempts: u32,
) -> AwsEnvironment {
    let mut environment = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .http_client(http::ProxySettings::of_environment().client())
        .retry_config(RetryConfig::standard().with_max_attempts(attempts))
        .timeout_config(within(ANSWER_WITHIN))
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled()
                .grace_period(STANDSTILL)
                .build(),
        );
    if let Some(endpoint) = &settings.endpoint {
        environment = environment.endpoint_url(endpoint);
    }
    if let Some(region) = &settings.region {
        environment = environment.region(Region::new(region.clone()));
    }
    if let Some((access, secret)) = &settings.credentials {
        let token = settings.session_token.clone();
        let credentials = Credentials::new(access, secret, token, None, "settings");
        environment = environment.credentials_provider(credentials);
    }
    let config = remembering(environment.load().await);
    let elsewhere = has_endpoint(&config, service);
    // It is part of the signature; most who are not AWS expect this one or do not look.
    let assumed = elsewhere.then(|| Region::from_static("us-east-1"));
    AwsEnvironment {
        region: config.region().cloned().or(assumed),
        config,
        elsewhere,
    }
}

/// Whether this process has had credentials.
static HAD: AtomicBool = AtomicBool::new(false);

/// The same, with credentials whose absence says whether there were any before.
fn remembering(config: SdkConfig) -> SdkConfig {
    match config.credentials_provider() {
        None => config,
        Some(provider) => config
            .into_builder()
            .credentials_provider(SharedCredentialsProvider::new(Remembering {
                provider,
                had: &HAD,
            }))
            .build(),
    }
}

/// Looks after credentials. A provider that finds none says the same where none were ever given and where whoever gives them
/// (instance metadata, a file that is being replaced) cannot be asked for a moment. Only the first needs a person.
///
/// It lives as long as a client does, and no longer: files are read once for each.
#[derive(Debug)]
struct Remembering {
    provider: SharedCredentialsProvider,
    had: &'static AtomicBool,
}

impl ProvideCredentials for Remembering {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async move {
            match self.provider.provide_credentials().await {
                Ok(credentials) => {
                    self.had.store(true, Ordering::Relaxed);
                    Ok(credentials)
                }
                Err(error) if self.had.load(Ordering::Relaxed) => {
                    Err(CredentialsError::provider_error(error))
                }
                Err(error) => Err(error),
            }
        })
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        self.provider.fallback_on_interrupt()
    }
}

/// Whether settings, `AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_<SERVICE>` or the profile send the service elsewhere.
fn has_endpoint(config: &SdkConfig, service: &'static str) -> bool {
    let of_service = ServiceConfigKey::builder()
        .service_id(service)
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build();
    config.endpoint_url().is_some()
        || of_service.is_ok_and(|key| {
            let services = config.service_config();
            services.is_some_and(|services| services.load_config(key).is_some())
        })
}

/// The deadline of one attempt.
pub(crate) fn within(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(CONNECT_WITHIN)
        .operation_attempt_timeout(attempt)
        .build()
}

/// How long one attempt to send so much may take.
pub(crate) fn time_to_send(bytes: usize) -> Duration {
    ANSWER_WITHIN + Duration::from_secs(bytes as u64 / SLOWEST_BYTES_PER_SECOND)
}

/// What is wrong with the credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoCredentials {
    /// Nobody has given any, or what says who does is wrong.
    Missing,
    /// Whoever gives them does not now, or gave old ones.
    Stale,
}

/// Why a request failed.
pub(crate) fn refusal<E>(error: &SdkError<E>) -> Refusal
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match (error, without_credentials(error)) {
        (SdkError::ServiceError(_), _) => Refusal::of(
            error.code().unwrap_or_default(),
            error.message().unwrap_or_default(),
            status(error).unwrap_or_default(),
        ),
        (_, Some(NoCredentials::Missing)) => Refusal::Credentials,
        (_, Some(NoCredentials::Stale)) => Refusal::StaleCredentials,
        // An endpoint that is no URL, for instance.
        (SdkError::ConstructionFailure(_), None) => Refusal::Invalid,
        // Somebody answered what cannot be read.
        (SdkError::ResponseError(_), None) => Refusal::Foreign,
        (_, None) if distrusts(error) => Refusal::Certificate,
        (_, None) => Refusal::Unavailable,
    }
}

/// Whether TLS ended because of the other side's certificate. What rustls says is all there is to go by.
fn distrusts(error: &(dyn Error + 'static)) -> bool {
    crate::error::chain(error).contains("invalid peer certificate")
}

/// Why there are no credentials, if that is the reason of an error.
fn without_credentials(error: &(dyn Error + 'static)) -> Option<NoCredentials> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<CredentialsError>() {
            // The outermost: what is inside is what it was found by.
            return Some(match error {
                CredentialsError::CredentialsNotLoaded(_)
                | CredentialsError::InvalidConfiguration(_) => NoCredentials::Missing,
                _ => NoCredentials::Stale,
            });
        }
        cause = error.source();
    }
    None
}

/// The status of an answer, where there is one.
pub(crate) fn status<E>(error: &SdkError<E>) -> Option<u16> {
    error.raw_response().map(|answer| answer.status().as_u16())
}

/// On one line. Code, message and request id are what AWS's own support asks for.
pub(crate) fn said<E>(error: &SdkError<E>) -> String
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let text = match (error, error.code()) {
        (SdkError::ServiceError(answer), Some(code)) => {
            let message = error.message().unwrap_or("no message");
            match answer.err().meta().request_id() {
                Some(id) => format!("{code}: {message} (request {id})"),
                None => format!("{code}: {message}"),
            }
        }
        (SdkError::ServiceError(answer), None) => {
            format!("status {}", answer.raw().status().as_u16())
        }
        _ => crate::error::chain(error),
    };
    one_line(&text)
}

/// Not too long, and without line breaks.
pub(crate) fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(SAID_MAX).collect()
}

/// Whether a line may be logged at all. At level trace the AWS SDK writes out its requests, with the session token
/// of temporary credentials; whatever `RUST_LOG` says, that is left out.
pub fn may_be_logged(line: &tracing::Metadata<'_>) -> bool {
    *line.level() < tracing::Level::TRACE || !line.target().starts_with("aws_")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives credentials, or has none.
    #[derive(Debug)]
    struct Now(AtomicBool);

    impl ProvideCredentials for &'static Now {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::ready(match self.0.load(Ordering::Relaxed) {
                true => Ok(Credentials::new("access", "secret", None, None, "test")),
                false => Err(CredentialsError::not_loaded("none")),
            })
        }
    }

    #[tokio::test]
    async fn credentials_that_were_there_once_come_again() {
        static NOW: Now = Now(AtomicBool::new(false));
        static HAD_BY_NOW: AtomicBool = AtomicBool::new(false);
        let credentials = Remembering {
            provider: SharedCredentialsProvider::new(&NOW),
            had: &HAD_BY_NOW,
        };
        let lacking = async || {
            let error = credentials.provide_credentials().await.unwrap_err();
            without_credentials(&error)
        };
        assert_eq!(lacking().await, Some(NoCredentials::Missing));
        NOW.0.store(true, Ordering::Relaxed);
        credentials.provide_credentials().await.unwrap();
        NOW.0.store(false, Ordering::Relaxed);
        assert_eq!(lacking().await, Some(NoCredentials::Stale));
    }

    #[test]
    fn a_large_part_has_time_on_a_slow_link() {
        assert_eq!(time_to_send(0), ANSWER_WITHIN);
        assert_eq!(time_to_send(8 << 20), Duration::from_secs(30 + 128));
    }

    #[test]
    fn an_answer_is_one_line_of_a_bounded_length() {
        assert_eq!(one_line("<html>\n  <p>\tno"), "<html> <p> no");
        assert_eq!(one_line(&"é".repeat(9999)).chars().count(), SAID_MAX);
    }
}
