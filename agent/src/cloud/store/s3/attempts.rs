//! What is looked at after each attempt of the SDK at a request, the ones that it repeats by itself included.
//!
//! # What it does not do
//! It decides nothing about pauses and numbers of attempts.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, FinalizerInterceptorContextRef, InterceptorContext,
};
use aws_sdk_s3::config::retry::{ClassifyRetry, RetryAction};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use metrics::Counter;

/// Another request for the same object is under way: most of the time our own, whose answer was lost. S3 asks for another
/// attempt then, and the SDK would make none.
#[derive(Debug)]
pub(super) struct Conflicts;

impl ClassifyRetry for Conflicts {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let status = context.response().map(|answer| answer.status().as_u16());
        match status {
            Some(409) => RetryAction::transient_error(),
            _ => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "conflicts"
    }
}

/// Counts answers by which S3 asks for fewer requests.
#[derive(Clone, Debug, Default)]
pub(super) struct Throttled(Arc<OnceLock<Counter>>);

impl Throttled {
    /// The first counter that is given stays.
    pub(super) fn count_in(&self, counter: Counter) {
        let _ = self.0.set(counter);
    }

    /// One more.
    pub(super) fn count(&self) {
        if let Some(counter) = self.0.get() {
            counter.increment(1);
        }
    }

    /// Whether an answer is counted here by its status. `SlowDown` has 503; so has "service unavailable", for which S3 wants the
    /// same to be done.
    pub(super) fn is_counted(status: u16) -> bool {
        matches!(status, 429 | 503)
    }
}

/// What S3's answers say that the time is.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock(Arc<Mutex<Option<(SystemTime, Instant)>>>);

impl Clock {
    /// None before the first answer.
    pub(super) fn now(&self) -> Option<SystemTime> {
        let said = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.and_then(|(time, at)| time.checked_add(at.elapsed()))
    }
}

impl Intercept for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context
            .response()
            .and_then(|answer| answer.headers().get("date"));
        let time = date.and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok());
        if let Some(time) = time.and_then(|time| SystemTime::try_from(time).ok()) {
            let said = Some((time, tokio::time::Instant::now().into_std()));
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = said;
        }
        Ok(())
    }
}

/// Takes a success for one only where S3 gave it, for what has no answer that says more: S3 says 204, and names the request.
#[derive(Debug)]
pub(super) struct OnlyS3;

impl Intercept for OnlyS3 {
    fn name(&self) -> &'static str {
        "only S3"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let answer = context.response();
        let names_it = answer.headers().get("x-amz-request-id").is_some();
        match answer.status().as_u16() {
            status @ 200..=299 if status != 204 && !names_it => {
                Err(format!("a success of status {status} that S3 does not give").into())
            }
            _ => Ok(()),
        }
    }
}

impl Intercept for Throttled {
    fn name(&self) -> &'static str {
        "throttled"
    }

    fn read_after_attempt(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let status = context.response().map(|answer| answer.status().as_u16());
        if status.is_some_and(Self::is_counted) {
            self.count();
        }
        Ok(())
    }
}
