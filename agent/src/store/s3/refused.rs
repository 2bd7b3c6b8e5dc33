//! What S3 and the SDK say, sorted into [`Refusal`].
//!
//! Source: the list of error codes in the Amazon S3 API reference. The list of what goes away by itself is
//! narrow on purpose; what is not known needs a person.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::S3;
use super::attempts::Throttled;
pub(super) use crate::aws::said;
use crate::aws::{Failure, NoCredentials, failure, status};
use crate::store::{Doing, Refusal, StoreError};

impl S3 {
    /// The error of a request.
    pub(super) fn refused<E>(&self, doing: Doing, name: &str, error: &SdkError<E>) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        if doing == Doing::Read && is_missing(error) {
            return StoreError::NotFound {
                object: self.url(name),
            };
        }
        let refusal = sort(error);
        // One of KMS, for instance, which has a status of its own.
        if refusal == Refusal::Throttled && !status(error).is_some_and(Throttled::is_counted) {
            self.place.throttled.count();
        }
        StoreError::S3 {
            doing,
            object: self.url(name),
            refusal,
            said: said(error),
        }
    }

    /// The same for a transfer that was given up after its request had succeeded.
    pub(super) fn broken(&self, doing: Doing, name: &str, said: String) -> StoreError {
        StoreError::S3 {
            doing,
            object: self.url(name),
            refusal: Refusal::Unavailable,
            said,
        }
    }

    /// What was in the way of a write is not there when one looks.
    pub(super) fn gone(&self, name: &str) -> StoreError {
        StoreError::S3 {
            doing: Doing::Write,
            object: self.url(name),
            refusal: Refusal::Conflict,
            said: "it was deleted, or its upload aborted, while it was written".to_owned(),
        }
    }
}

/// `If-None-Match: *` did not hold: there is an object of this name.
pub(super) fn is_taken<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    error.code() == Some("PreconditionFailed") || status(error) == Some(412)
}

/// There is no such object. (That there is no such bucket is another matter; HEAD cannot tell, its answer
/// has no body.)
pub(super) fn is_missing<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    matches!(error.code(), Some("NoSuchKey" | "NotFound"))
}

/// There is no such upload: it has been completed or aborted.
pub(super) fn is_gone<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    error.code() == Some("NoSuchUpload")
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
        "AccessDenied" if message.contains("kms:") => Refusal::Kms,
        "AccessDenied" | "AllAccessDisabled" | "InvalidPayer" => Refusal::Denied,
        "NoSuchBucket" => Refusal::NoBucket,
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "NotSignedUp" => {
            Refusal::Credentials
        }
        "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" => {
            Refusal::StaleCredentials
        }
        "RequestTimeTooSkewed" => Refusal::Clock,
        "PermanentRedirect"
        | "TemporaryRedirect"
        | "AuthorizationHeaderMalformed"
        | "IllegalLocationConstraintException" => Refusal::Region,
        "SlowDown"
        | "Throttling"
        | "ThrottlingException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "KMS.ThrottlingException" => Refusal::Throttled,
        _ if code.starts_with("KMS.") => Refusal::Kms,
        // BadDigest and its like: the bytes were changed on their way.
        "InternalError"
        | "ServiceUnavailable"
        | "RequestTimeout"
        | "BadDigest"
        | "IncompleteBody"
        | "XAmzContentChecksumMismatch"
        | "XAmzContentSHA256Mismatch" => Refusal::Unavailable,
        "ConditionalRequestConflict" | "OperationAborted" => Refusal::Conflict,
        // An answer to HEAD has no body, and one from a proxy in between has no code.
        _ => match status {
            301 | 307 | 308 => Refusal::Region,
            403 => Refusal::Denied,
            409 => Refusal::Conflict,
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

    fn refused(code: &str, message: &str, status: u16) -> StoreError {
        StoreError::S3 {
            doing: Doing::Write,
            object: "s3://bucket/a".to_owned(),
            refusal: by_answer(code, message, status),
            said: code.to_owned(),
        }
    }

    #[test]
    fn a_refusal_says_what_to_do_and_whether_to_wait() {
        for (code, message, status, class, hint) in [
            ("AccessDenied", "", 403, Class::Definite, "s3:PutObject"),
            ("", "", 403, Class::Definite, "s3:PutObject"),
            (
                "AccessDenied",
                "not allowed: kms:GenerateDataKey",
                403,
                Class::Definite,
                "kms:Decrypt",
            ),
            ("KMS.DisabledException", "", 400, Class::Definite, "enabled"),
            (
                "NoSuchBucket",
                "",
                404,
                Class::Definite,
                "create the bucket",
            ),
            ("PermanentRedirect", "", 301, Class::Definite, "AWS_REGION"),
            (
                "InvalidAccessKeyId",
                "",
                403,
                Class::Definite,
                "AWS_ACCESS_KEY_ID",
            ),
            ("ExpiredToken", "", 400, Class::Transient, "expired"),
            ("RequestTimeTooSkewed", "", 403, Class::Definite, "NTP"),
            ("SlowDown", "", 503, Class::Transient, "tried again"),
            (
                "KMS.ThrottlingException",
                "",
                400,
                Class::Transient,
                "tried again",
            ),
            ("InternalError", "", 500, Class::Transient, "firewall"),
            ("", "", 502, Class::Transient, "firewall"),
            (
                "ConditionalRequestConflict",
                "",
                409,
                Class::Transient,
                "tried again",
            ),
            ("InvalidRequest", "", 400, Class::Definite, "words of S3"),
        ] {
            let error = refused(code, message, status);
            assert_eq!(error.class(), class, "{code} {status}");
            let given = error.hint().unwrap();
            assert!(given.contains(hint), "{code} {status}: {given}");
        }
    }
}
