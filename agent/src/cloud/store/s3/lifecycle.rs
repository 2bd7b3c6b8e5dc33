//! Whether the bucket ends uploads by itself that nobody completes: a killed writer leaves parts that no listing of objects shows,
//! and they are paid for.
//!
//! # What it does not do
//! It changes no rule. Who may not ask for them learns nothing.

use aws_sdk_s3::error::ProvideErrorMetadata as _;
use aws_sdk_s3::types::{ExpirationStatus, LifecycleRule};

use super::S3;

impl S3 {
    /// None where nobody knows.
    pub(in crate::cloud::store) async fn ends_abandoned_uploads(&self) -> Option<bool> {
        let request = self
            .client
            .get_bucket_lifecycle_configuration()
            .bucket(self.bucket());
        match Box::pin(request.send()).await {
            Ok(found) => Some(found.rules().iter().any(|rule| self.is_ended_by(rule))),
            Err(error) if error.code() == Some("NoSuchLifecycleConfiguration") => Some(false),
            Err(_) => None,
        }
    }

    fn is_ended_by(&self, rule: &LifecycleRule) -> bool {
        let days = rule.abort_incomplete_multipart_upload();
        rule.status() == &ExpirationStatus::Enabled
            && days.is_some_and(|days| days.days_after_initiation().is_some())
            && self.place.prefix.starts_with(prefix_of(rule))
    }
}

/// What the keys begin with that a rule is for. S3 takes no tags and sizes together with uploads.
#[allow(deprecated, reason = "rules that were made before there were filters")]
fn prefix_of(rule: &LifecycleRule) -> &str {
    let of_filter = rule.filter().and_then(|filter| filter.prefix());
    of_filter.or(rule.prefix()).unwrap_or_default()
}
