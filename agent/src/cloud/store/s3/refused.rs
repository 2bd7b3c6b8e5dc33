//! What S3 and the SDK say, as errors of the store. The codes are sorted in [`crate::cloud::aws`].

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::S3;
use super::attempts::Throttled;
pub(super) use crate::cloud::aws::said;
use crate::cloud::aws::{refusal, status};
use crate::cloud::store::{Refusal, StoreError, StoreOperation};

impl S3 {
    /// The error of a request.
    pub(super) fn refused<E>(
        &self,
        doing: StoreOperation,
        name: &str,
        error: &SdkError<E>,
    ) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        if doing == StoreOperation::Read && is_missing(error) {
            return StoreError::NotFound {
                object: self.url(name),
            };
        }
        let refusal = refusal(error);
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
    pub(super) fn broken(&self, doing: StoreOperation, name: &str, said: String) -> StoreError {
        StoreError::S3 {
            doing,
            object: self.url(name),
            refusal: Refusal::Unavailable,
            said,
        }
    }

    /// The answer is none that S3 gives: something on the way has answered in its place.
    pub(super) fn foreign(&self, doing: StoreOperation, name: &str, said: &str) -> StoreError {
        StoreError::S3 {
            doing,
            object: self.url(name),
            refusal: Refusal::Foreign,
            said: said.to_owned(),
        }
    }

    /// What was in the way of a write is not there when one looks.
    pub(super) fn gone(&self, name: &str) -> StoreError {
        StoreError::S3 {
            doing: StoreOperation::Write,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Classify as _;

    fn refused(doing: StoreOperation, code: &str, message: &str, status: u16) -> String {
        let error = StoreError::S3 {
            doing,
            object: "s3://bucket/a".to_owned(),
            refusal: Refusal::of(code, message, status),
            said: code.to_owned(),
        };
        error.hint().unwrap()
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        for (code, message, status, hint) in [
            ("AccessDenied", "", 403, "s3:PutObject"),
            ("", "", 403, "s3:PutObject"),
            (
                "AccessDenied",
                "not allowed: kms:GenerateDataKey",
                403,
                "kms:Decrypt",
            ),
            ("KMS.DisabledException", "", 400, "enabled"),
            ("NoSuchBucket", "", 404, "create the bucket"),
            ("PermanentRedirect", "", 301, "AWS_REGION"),
            ("InvalidAccessKeyId", "", 403, "AWS_ACCESS_KEY_ID"),
            ("ExpiredToken", "", 400, "expired"),
            ("RequestTimeTooSkewed", "", 403, "NTP"),
            ("SlowDown", "", 503, "tried again"),
            ("InternalError", "", 500, "firewall"),
            ("ConditionalRequestConflict", "", 409, "tried again"),
            ("InvalidRequest", "", 400, "words of AWS"),
        ] {
            let given = refused(StoreOperation::Write, code, message, status);
            assert!(given.contains(hint), "{code} {status}: {given}");
        }
    }

    #[test]
    fn what_was_not_denied_is_not_said_to_lack_a_right() {
        let frozen = refused(StoreOperation::Read, "InvalidObjectState", "", 403);
        assert!(frozen.contains("restore-object"), "{frozen}");
        let unknown = refused(StoreOperation::Read, "OfNextYear", "", 403);
        assert!(unknown.contains("words of AWS"), "{unknown}");
        let mute = refused(StoreOperation::Read, "", "", 403);
        assert!(mute.contains("proxy"), "{mute}");
        for hint in [frozen, unknown] {
            assert!(!hint.contains("s3:GetObject"), "{hint}");
        }
    }
}
