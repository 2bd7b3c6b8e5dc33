//! ● Why a service of AWS did not do what it was asked: the one table of error codes, for Kinesis and S3 alike. Pure.
//!
//! Source: the errors of each operation and the common errors in the API references of Amazon Kinesis Data Streams, Amazon S3
//! and AWS KMS.
//!
//! # Invariants
//! - What somebody else can change while this program runs is transient: rights, keys, credentials, streams, buckets and clocks
//!   are mended, and come into force minutes later, as often as networks are. Only a request that no service can ever do is
//!   definite.
//! - The same code means the same for every service, of a whole call and of one record in it.
//! - No advice is given that the answer does not support: who does not say why, is not said to have denied a right.
//!
//! # What it does not do
//! It decides about no pause. What only one service has to say (permissions, places) is in `kinesis/error` and `store/error`.

use std::fmt;

use crate::error::Class;

/// Why it was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The credentials are good and do not allow it.
    Denied,
    /// Status 403 without a word: a right, or something in between.
    Forbidden,
    /// There is no such stream, or no longer such a shard.
    NoStream,
    /// There is no such bucket.
    NoBucket,
    /// No region is known, or it is the wrong one.
    Region,
    /// There are no credentials, or AWS does not know them (yet).
    Credentials,
    /// The credentials could not be fetched, or are no longer valid.
    StaleCredentials,
    /// The key of server-side encryption cannot be used.
    Kms,
    /// This machine's clock was wrong when the request was signed.
    Clock,
    /// Too many requests, or more bytes than there is room for.
    Throttled,
    /// No answer, or one that blames the server.
    Unavailable,
    /// The certificate of whoever answers is not trusted here.
    Certificate,
    /// What answers is not the service: a portal, a proxy.
    Foreign,
    /// The stream is being created, changed or deleted.
    Busy,
    /// Somebody else writes or deletes the same object at this moment.
    Conflict,
    /// A shard iterator or the token of a listing is too old.
    Expired,
    /// The object is in a storage class that gives nothing before it is restored.
    Frozen,
    /// No service can do this.
    Invalid,
    /// Something this program does not know.
    Unknown,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Denied => "access denied",
            Self::Forbidden => "forbidden, without a reason",
            Self::NoStream => "no such stream",
            Self::NoBucket => "no such bucket",
            Self::Region => "wrong or unknown region",
            Self::Credentials => "no valid credentials",
            Self::StaleCredentials => "no current credentials",
            Self::Kms => "the KMS key cannot be used",
            Self::Clock => "the clock is wrong",
            Self::Throttled => "too many requests (throttled)",
            Self::Unavailable => "it cannot be reached or does not work",
            Self::Certificate => "its certificate is not trusted",
            Self::Foreign => "what answers is not AWS",
            Self::Busy => "the stream is not active",
            Self::Conflict => "another request for the same object is under way",
            Self::Expired => "the place in the stream is too old",
            Self::Frozen => "it is in an archiving storage class",
            Self::Invalid => "it is not accepted",
            Self::Unknown => "refused",
        })
    }
}

impl Refusal {
    /// Sorts an answer by its error code and message, and where it has no code that is known by its status.
    pub(crate) fn of(code: &str, message: &str, status: u16) -> Self {
        match code {
            // Both services say "denied" for a key that the caller may not use, and name the action.
            "AccessDeniedException" | "AccessDenied" if message.contains("kms:") => Self::Kms,
            "AccessDeniedException"
            | "AccessDenied"
            | "NotAuthorized"
            | "AllAccessDisabled"
            | "InvalidPayer" => Self::Denied,
            "ResourceNotFoundException" => Self::NoStream,
            "NoSuchBucket" => Self::NoBucket,
            "InvalidSignatureException" | "SignatureDoesNotMatch" => of_signature(message),
            "RequestExpired" | "RequestTimeTooSkewed" => Self::Clock,
            "PermanentRedirect"
            | "TemporaryRedirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException" => Self::Region,
            "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidAccessKeyId"
            | "InvalidToken"
            | "IncompleteSignature"
            | "IncompleteSignatureException"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "NotSignedUp"
            | "OptInRequired"
            | "SubscriptionRequiredException" => Self::Credentials,
            "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" => {
                Self::StaleCredentials
            }
            "ProvisionedThroughputExceededException"
            | "LimitExceededException"
            | "SlowDown"
            | "Throttling"
            | "ThrottlingException"
            | "RequestLimitExceeded"
            | "TooManyRequestsException"
            | "KMSThrottlingException"
            | "KMS.ThrottlingException" => Self::Throttled,
            _ if code.starts_with("KMS") => Self::Kms,
            // BadDigest and its like: the bytes were changed on their way.
            "InternalError"
            | "InternalFailure"
            | "InternalFailureException"
            | "InternalServerError"
            | "ServiceUnavailable"
            | "ServiceUnavailableException"
            | "RequestTimeout"
            | "RequestTimeoutException"
            | "BadDigest"
            | "IncompleteBody"
            | "XAmzContentChecksumMismatch"
            | "XAmzContentSHA256Mismatch" => Self::Unavailable,
            "ResourceInUseException" => Self::Busy,
            "ConditionalRequestConflict" | "OperationAborted" => Self::Conflict,
            "ExpiredIteratorException" | "ExpiredNextTokenException" => Self::Expired,
            "InvalidObjectState" => Self::Frozen,
            "ValidationException"
            | "ValidationError"
            | "InvalidArgumentException"
            | "InvalidArgument"
            | "InvalidRequest"
            | "InvalidBucketName"
            | "InvalidStorageClass"
            | "InvalidEncryptionAlgorithmError"
            | "EntityTooLarge"
            | "KeyTooLongError"
            | "MalformedXML"
            | "MethodNotAllowed"
            | "NotImplemented" => Self::Invalid,
            _ => of_status(code, status),
        }
    }

    /// Whether waiting or restarting is all that it takes. What is not this is mended by somebody, and heals all the same.
    pub(crate) fn passes(self) -> bool {
        match self {
            Self::StaleCredentials
            | Self::Clock
            | Self::Throttled
            | Self::Unavailable
            | Self::Foreign
            | Self::Busy
            | Self::Conflict
            | Self::Expired => true,
            Self::Denied
            | Self::Forbidden
            | Self::NoStream
            | Self::NoBucket
            | Self::Region
            | Self::Credentials
            | Self::Kms
            | Self::Certificate
            | Self::Frozen
            | Self::Invalid
            | Self::Unknown => false,
        }
    }

    /// Whether what was asked is refused to this role, while something else may be allowed.
    pub(crate) fn is_a_right(self) -> bool {
        matches!(self, Self::Denied | Self::Forbidden | Self::Kms)
    }

    /// Whether it says something about one object and nothing about the others: its key, its class, its own rights.
    pub(crate) fn is_of_one_object(self) -> bool {
        matches!(
            self,
            Self::Denied
                | Self::Forbidden
                | Self::Kms
                | Self::Frozen
                | Self::Invalid
                | Self::Unknown
        )
    }

    /// What is to be done about it.
    pub(crate) fn class(self) -> Class {
        match self {
            Self::Invalid => Class::Definite,
            _ => Class::Transient,
        }
    }

    /// What a person does about it, whichever service it is.
    pub(crate) fn hint(self) -> &'static str {
        match self {
            Self::Denied => "allow it to the agent's role; it is tried again",
            Self::Forbidden => {
                "a right that the agent's role lacks, or a proxy or firewall on the way to AWS; it is tried again"
            }
            Self::NoStream => {
                "create the stream, or mend its name; check AWS_REGION too: a stream belongs to one region; it is tried again"
            }
            Self::NoBucket => {
                "create the bucket, or mend the URL of the archive; it is tried again"
            }
            Self::Region => "set AWS_REGION to the region of the stream or bucket",
            Self::Credentials => {
                "give the agent credentials by the usual means: AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY, a profile (credential_process for IAM Roles Anywhere), web identity, \
                 or the role of the instance or container; SSO profiles are not supported. A key that was made a moment \
                 ago is known everywhere soon: it is tried again"
            }
            Self::StaleCredentials => {
                "check who issues the agent's credentials (instance metadata, STS, credential_process), or \
                 replace a session token that has expired"
            }
            Self::Kms => {
                "the key must be enabled, in the same region, and allow the agent's role kms:GenerateDataKey and kms:Decrypt; \
                 it is tried again"
            }
            Self::Clock => {
                "set the clock of this machine (NTP): AWS accepts a few minutes of difference; it is tried again"
            }
            Self::Throttled => {
                "it is tried again; if it lasts, another client uses up what there is"
            }
            Self::Unavailable => {
                "it is tried again; if it lasts, check DNS, firewall, proxy and AWS_ENDPOINT_URL"
            }
            Self::Certificate => {
                "set AWS_CA_BUNDLE to a file with the certificate (PEM) of the authority that has issued it, a proxy's that \
                 looks into TLS or a private endpoint's, or put that among this machine's own"
            }
            Self::Foreign => {
                "something between here and AWS answers in its place, a portal that wants a login or a proxy: check \
                 HTTPS_PROXY, DNS and AWS_ENDPOINT_URL; it is tried again"
            }
            Self::Busy => "it is tried again; wait until the stream is ACTIVE",
            Self::Conflict => "it is tried again",
            Self::Expired => "it is tried again from the last record that was read",
            Self::Frozen => {
                "restore the object first (aws s3api restore-object), and let no lifecycle rule move what archive.retention \
                 still keeps into a storage class such as Glacier"
            }
            Self::Invalid => "the words of AWS above say what it does not accept",
            Self::Unknown => "the words of AWS above say why; it is tried again",
        }
    }
}

/// A signature that does not fit: the clock, the region or the secret.
fn of_signature(message: &str) -> Refusal {
    // "Signature expired: 2026… is now earlier than 2026…"
    if message.contains("expired") || message.contains("not yet current") {
        Refusal::Clock
    } else if message.contains("scoped to a valid region") {
        Refusal::Region
    } else {
        Refusal::Credentials
    }
}

/// An answer to HEAD has no body, and one from a proxy in between has no code.
fn of_status(code: &str, status: u16) -> Refusal {
    match status {
        301 | 307 | 308 => Refusal::Region,
        403 if code.is_empty() => Refusal::Forbidden,
        // What a portal or a proxy wants before it lets anybody through.
        302 | 303 | 407 | 511 => Refusal::Foreign,
        // A success in words that no service uses.
        200..=299 => Refusal::Foreign,
        409 => Refusal::Conflict,
        429 => Refusal::Throttled,
        408 | 500..=599 => Refusal::Unavailable,
        _ => Refusal::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What heals by itself, at once or once somebody has mended it, never stops anything for good.
    #[test]
    fn every_refusal_that_can_heal_is_tried_again() {
        for (code, message, status, refusal) in [
            ("AccessDeniedException", "", 400, Refusal::Denied),
            ("AccessDenied", "", 403, Refusal::Denied),
            ("AccessDenied", "kms:Decrypt", 403, Refusal::Kms),
            (
                "AccessDeniedException",
                "not authorized to perform: kms:GenerateDataKey",
                400,
                Refusal::Kms,
            ),
            ("KMSDisabledException", "", 400, Refusal::Kms),
            ("KMSInvalidStateException", "", 400, Refusal::Kms),
            ("KMSAccessDeniedException", "", 400, Refusal::Kms),
            ("KMSNotFoundException", "", 400, Refusal::Kms),
            ("KMSOptInRequired", "", 400, Refusal::Kms),
            ("KMS.DisabledException", "", 400, Refusal::Kms),
            ("KMS.NotFoundException", "", 400, Refusal::Kms),
            ("KMSThrottlingException", "", 400, Refusal::Throttled),
            ("KMS.ThrottlingException", "", 400, Refusal::Throttled),
            ("ResourceNotFoundException", "", 400, Refusal::NoStream),
            ("ResourceInUseException", "", 400, Refusal::Busy),
            ("NoSuchBucket", "", 404, Refusal::NoBucket),
            ("UnrecognizedClientException", "", 400, Refusal::Credentials),
            ("InvalidClientTokenId", "", 403, Refusal::Credentials),
            ("InvalidAccessKeyId", "", 403, Refusal::Credentials),
            ("SignatureDoesNotMatch", "", 403, Refusal::Credentials),
            ("InvalidSignatureException", "x", 400, Refusal::Credentials),
            (
                "InvalidSignatureException",
                "Signature expired: x",
                400,
                Refusal::Clock,
            ),
            (
                "InvalidSignatureException",
                "Signature not yet current: x",
                400,
                Refusal::Clock,
            ),
            ("RequestTimeTooSkewed", "", 403, Refusal::Clock),
            (
                "InvalidSignatureException",
                "Credential should be scoped to a valid region",
                400,
                Refusal::Region,
            ),
            ("PermanentRedirect", "", 301, Refusal::Region),
            ("ExpiredToken", "", 400, Refusal::StaleCredentials),
            ("ExpiredTokenException", "", 400, Refusal::StaleCredentials),
            (
                "ProvisionedThroughputExceededException",
                "",
                400,
                Refusal::Throttled,
            ),
            ("SlowDown", "", 503, Refusal::Throttled),
            ("InternalFailure", "", 0, Refusal::Unavailable),
            ("InternalError", "", 500, Refusal::Unavailable),
            ("", "", 502, Refusal::Unavailable),
            ("ConditionalRequestConflict", "", 409, Refusal::Conflict),
            ("ExpiredIteratorException", "", 400, Refusal::Expired),
            ("InvalidObjectState", "", 403, Refusal::Frozen),
            ("", "", 403, Refusal::Forbidden),
            ("", "", 200, Refusal::Foreign),
            ("", "", 302, Refusal::Foreign),
            ("", "", 407, Refusal::Foreign),
            ("SomethingOfNextYear", "", 403, Refusal::Unknown),
            ("SomethingOfNextYear", "", 400, Refusal::Unknown),
        ] {
            let found = Refusal::of(code, message, status);
            assert_eq!(found, refusal, "{code} {message} {status}");
            assert_eq!(found.class(), Class::Transient, "{code} {status}");
        }
        for code in ["ValidationException", "InvalidArgument", "EntityTooLarge"] {
            let found = Refusal::of(code, "", 400);
            assert_eq!(found.class(), Class::Definite, "{code}");
            assert!(found.hint().contains("words of AWS"), "{code}");
        }
    }

    #[test]
    fn only_what_passes_by_itself_is_waited_for_within_a_call() {
        for code in ["AccessDenied", "KMSDisabledException", "NoSuchBucket", ""] {
            assert!(!Refusal::of(code, "", 403).passes(), "{code}");
        }
        for code in ["SlowDown", "ExpiredToken", "InternalError"] {
            assert!(Refusal::of(code, "", 400).passes(), "{code}");
        }
        // Nobody is told to allow what was not denied.
        for (code, status) in [("", 403), ("InvalidObjectState", 403), ("New", 403)] {
            let hint = Refusal::of(code, "", status).hint();
            assert!(!hint.contains("s3:"), "{hint}");
        }
    }
}
