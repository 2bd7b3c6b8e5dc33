//! What Kinesis and the SDK say, sorted into [`Refusal`].
//!
//! Source: the errors of each operation and the common errors in the Amazon Kinesis Data Streams API reference. The
//! list of what goes away by itself is narrow on purpose; what is not known needs a person.
//!
//! # Invariants
//! - An error code of a whole call and that of a single record mean the same.
//!
//! # What it does not do
//! It does not retry, and it says nothing to a log.

use aws_sdk_kinesis::error::{ProvideErrorMetadata, SdkError};

use super::{Kinesis, KinesisError, Operation, Refusal};
use crate::aws::{Failure, NoCredentials, failure, one_line, said};

impl Kinesis {
    /// The error of a request.
    pub(super) fn refused<E>(&self, operation: Operation, error: &SdkError<E>) -> KinesisError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        self.error(operation, sort(error), said(error))
    }

    /// The error of one record in a call that succeeded.
    pub(super) fn refused_record(&self, code: &str, message: &str) -> KinesisError {
        let said = one_line(&format!("{code}: {message}"));
        self.error(Operation::PutRecords, by_answer(code, message, 0), said)
    }

    /// An answer lacks what it must have: whoever gave it is not well.
    pub(super) fn incomplete(&self, operation: Operation) -> KinesisError {
        let said = "the answer is incomplete".to_owned();
        self.error(operation, Refusal::Unavailable, said)
    }

    fn error(&self, operation: Operation, refusal: Refusal, said: String) -> KinesisError {
        KinesisError::Refused {
            operation,
            stream: self.stream().to_owned(),
            refusal,
            said,
        }
    }
}

fn sort<E>(error: &SdkError<E>) -> Refusal
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    match failure(error) {
        Failure::Answer {
            code,
            message,
            status,
        } => by_answer(code, message, status),
        Failure::Credentials(NoCredentials::Missing) => Refusal::Credentials,
        Failure::Credentials(NoCredentials::Stale) => Refusal::StaleCredentials,
        Failure::Request => Refusal::Unknown,
        Failure::Silence => Refusal::Unavailable,
    }
}

fn by_answer(code: &str, message: &str, status: u16) -> Refusal {
    match code {
        "AccessDeniedException" | "AccessDenied" if message.contains("kms:") => Refusal::Kms,
        "AccessDeniedException" | "AccessDenied" | "NotAuthorized" => Refusal::Denied,
        "ResourceNotFoundException" => Refusal::NoStream,
        // "Signature expired: 2026… is now earlier than 2026…"
        "InvalidSignatureException" if message.contains("expired") => Refusal::Clock,
        "InvalidSignatureException" if message.contains("not yet current") => Refusal::Clock,
        "RequestExpired" | "RequestTimeTooSkewed" => Refusal::Clock,
        // Signed for another region than the endpoint's.
        "InvalidSignatureException" if message.contains("scoped to a valid region") => {
            Refusal::Region
        }
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "OptInRequired"
        | "SubscriptionRequiredException" => Refusal::Credentials,
        "ExpiredToken" | "ExpiredTokenException" => Refusal::StaleCredentials,
        "ProvisionedThroughputExceededException"
        | "LimitExceededException"
        | "Throttling"
        | "ThrottlingException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "KMSThrottlingException" => Refusal::Throttled,
        _ if code.starts_with("KMS") => Refusal::Kms,
        "InternalFailure"
        | "InternalFailureException"
        | "InternalServerError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "RequestTimeout"
        | "RequestTimeoutException" => Refusal::Unavailable,
        "ResourceInUseException" => Refusal::Busy,
        "ExpiredIteratorException" | "ExpiredNextTokenException" => Refusal::Expired,
        // An answer from a proxy in between has no code.
        _ => match status {
            301 | 302 | 307 | 308 => Refusal::Region,
            403 => Refusal::Denied,
            429 => Refusal::Throttled,
            408 | 500..=599 => Refusal::Unavailable,
            _ => Refusal::Unknown,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Classify as _};

    #[test]
    fn a_refusal_says_what_to_do_and_whether_to_wait() {
        use Class::{Definite, Transient};
        for (code, message, status, class, hint) in [
            (
                "AccessDeniedException",
                "",
                400,
                Definite,
                "kinesis:PutRecords",
            ),
            (
                "AccessDeniedException",
                "not authorized to perform: kms:GenerateDataKey",
                400,
                Definite,
                "kms:GenerateDataKey",
            ),
            ("", "", 403, Definite, "kinesis:PutRecords"),
            ("KMSDisabledException", "", 400, Definite, "enabled"),
            ("KMSThrottlingException", "", 400, Transient, "tried again"),
            (
                "ResourceNotFoundException",
                "",
                400,
                Definite,
                "create the stream",
            ),
            (
                "UnrecognizedClientException",
                "",
                400,
                Definite,
                "AWS_ACCESS_KEY_ID",
            ),
            (
                "InvalidSignatureException",
                "Signature expired: x",
                400,
                Transient,
                "NTP",
            ),
            (
                "InvalidSignatureException",
                "it does not match",
                403,
                Definite,
                "AWS_SECRET_ACCESS_KEY",
            ),
            (
                "InvalidSignatureException",
                "Credential should be scoped to a valid region",
                400,
                Definite,
                "AWS_REGION",
            ),
            ("ExpiredTokenException", "", 400, Transient, "expired"),
            (
                "ProvisionedThroughputExceededException",
                "",
                400,
                Transient,
                "more shards",
            ),
            ("InternalFailure", "", 0, Transient, "firewall"),
            ("", "", 502, Transient, "firewall"),
            ("ResourceInUseException", "", 400, Transient, "ACTIVE"),
            (
                "ExpiredIteratorException",
                "",
                400,
                Transient,
                "last record",
            ),
            ("ValidationException", "", 400, Definite, "words of Kinesis"),
        ] {
            let error = KinesisError::Refused {
                operation: Operation::PutRecords,
                stream: "changes".to_owned(),
                refusal: by_answer(code, message, status),
                said: code.to_owned(),
            };
            assert_eq!(error.class(), class, "{code} {status}");
            let given = error.hint().unwrap();
            assert!(given.contains(hint), "{code} {status}: {given}");
            assert!(error.to_string().contains("stream changes"), "{error}");
        }
    }
}
