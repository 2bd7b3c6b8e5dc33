//! What Kinesis and the SDK say, as errors of this module. The codes are sorted in [`crate::cloud::aws`].
//!
//! # What it does not do
//! It does not retry, and it says nothing to a log.

use aws_sdk_kinesis::error::{ProvideErrorMetadata, SdkError};

use super::{Kinesis, KinesisError, KinesisOperation, Refusal};
use crate::cloud::aws::{one_line, refusal, said};

impl Kinesis {
    /// The error of a request.
    pub(super) fn refused<E>(
        &self,
        operation: KinesisOperation,
        error: &SdkError<E>,
    ) -> KinesisError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        self.error(operation, refusal(error), said(error))
    }

    /// The error of one record in a call that succeeded.
    pub(super) fn refused_record(&self, code: &str, message: &str) -> KinesisError {
        let said = one_line(&format!("{code}: {message}"));
        self.error(
            KinesisOperation::PutRecords,
            Refusal::of(code, message, 0),
            said,
        )
    }

    /// An answer lacks what it must have: whoever gave it is not well.
    pub(super) fn incomplete(&self, operation: KinesisOperation) -> KinesisError {
        let said = "the answer is incomplete".to_owned();
        self.error(operation, Refusal::Unavailable, said)
    }

    fn error(&self, operation: KinesisOperation, refusal: Refusal, said: String) -> KinesisError {
        KinesisError::Refused {
            operation,
            stream: self.stream().to_owned(),
            refusal,
            said,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Classify as _;

    #[test]
    fn a_refusal_says_what_to_do() {
        for (code, message, status, hint) in [
            ("AccessDeniedException", "", 400, "kinesis:PutRecords"),
            (
                "AccessDeniedException",
                "not authorized to perform: kms:GenerateDataKey",
                400,
                "kms:GenerateDataKey",
            ),
            ("", "", 403, "kinesis:PutRecords"),
            ("KMSDisabledException", "", 400, "enabled"),
            ("KMSThrottlingException", "", 400, "tried again"),
            ("ResourceNotFoundException", "", 400, "create the stream"),
            ("UnrecognizedClientException", "", 400, "AWS_ACCESS_KEY_ID"),
            (
                "InvalidSignatureException",
                "Signature expired: x",
                400,
                "NTP",
            ),
            ("ExpiredTokenException", "", 400, "expired"),
            (
                "ProvisionedThroughputExceededException",
                "",
                400,
                "more shards",
            ),
            ("InternalFailure", "", 0, "firewall"),
            ("ResourceInUseException", "", 400, "ACTIVE"),
            ("ExpiredIteratorException", "", 400, "last record"),
            ("ValidationException", "", 400, "words of AWS"),
        ] {
            let error = KinesisError::Refused {
                operation: KinesisOperation::PutRecords,
                stream: "changes".to_owned(),
                refusal: Refusal::of(code, message, status),
                said: code.to_owned(),
            };
            let given = error.hint().unwrap();
            assert!(given.contains(hint), "{code} {status}: {given}");
            assert!(error.to_string().contains("stream changes"), "{error}");
        }
    }
}
