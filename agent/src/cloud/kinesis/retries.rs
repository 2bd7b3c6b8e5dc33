//! Failures in a row of one thing that is tried again: how long to wait, and what to say of it.
//!
//! Below `put`, `list` and `shard`. The decision is [`crate::backoff`]'s; this counts, logs and sleeps.
//!
//! # Invariants
//! - A streak is logged at its beginning, then at every tenth failure: not once per attempt. Throttling is the daily
//!   bread of a stream near its limits, and is logged only when it lasts.
//!
//! - What somebody has to mend (a right, a key, a stream) ends what is tried here at once, and not the agent: the pipeline shows
//!   it and begins anew. So do, after a while, a clock that stays wrong, and credentials that stay old: the next client reads the
//!   files anew that they may come from.
//!
//! # What it does not do
//! It ends no other streak by itself: what passes is tried again for ever.

use std::time::Duration;

use tokio::time::Instant;

use super::{KinesisError, KinesisOperation, RETRY_MAX, Refusal};
use crate::backoff::{self, Decision};
use crate::error::{Classify as _, chain};

/// Throughput is given by the second: a longer pause would waste it.
const THROTTLED_MAX: Duration = Duration::from_secs(2);

/// Between two lines of a log about the same streak.
const LOG_EVERY: u32 = 10;

/// A machine that has slept has its clock set within so long.
const CLOCK_SET_WITHIN: Duration = Duration::from_secs(300);

/// So long a client is given to get credentials by itself.
const CREDENTIALS_WITHIN: Duration = Duration::from_secs(60);

/// Failures since the last success.
#[derive(Debug, Default)]
pub(super) struct Retries {
    failures: u32,
    /// Which refusal lasts, and since when.
    lasts: Option<(Option<Refusal>, Instant)>,
}

impl Retries {
    /// One more: waits before the next attempt, or returns what does not pass. `shard` is for the log.
    pub(super) async fn failed(
        &mut self,
        error: KinesisError,
        shard: Option<&str>,
    ) -> Result<(), KinesisError> {
        self.failures = self.failures.saturating_add(1);
        if !error.passes() || self.is_too_long(error.refusal(), Instant::now()) {
            return Err(error);
        }
        let attempt = self.failures;
        let pause = match decide(&error, attempt, rand::random()) {
            Decision::Retry(pause) => pause,
            Decision::Stop => return Err(error),
        };
        let (hint, text) = (error.hint(), chain(&error));
        if is_worth_a_warning(&error, attempt) {
            tracing::warn!(shard, attempt, ?pause, error = text, hint, "will retry");
        } else {
            tracing::debug!(shard, attempt, ?pause, error = text, "will retry");
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Whether such a refusal has lasted longer than what heals by itself.
    fn is_too_long(&mut self, refusal: Option<Refusal>, now: Instant) -> bool {
        let since = match self.lasts {
            Some((lasting, since)) if lasting == refusal => since,
            _ => now,
        };
        self.lasts = Some((refusal, since));
        let within = match refusal {
            Some(Refusal::Clock) => CLOCK_SET_WITHIN,
            Some(Refusal::StaleCredentials) => CREDENTIALS_WITHIN,
            _ => return false,
        };
        now.duration_since(since) >= within
    }

    /// It worked.
    pub(super) fn end(&mut self) {
        *self = Self::default();
    }
}

fn is_worth_a_warning(error: &KinesisError, attempt: u32) -> bool {
    let throttled = error.refusal() == Some(Refusal::Throttled);
    attempt.is_multiple_of(LOG_EVERY) || (attempt == 1 && !throttled)
}

fn decide(error: &KinesisError, attempt: u32, jitter: f64) -> Decision {
    match error {
        KinesisError::Refused {
            refusal: Refusal::Throttled,
            operation,
            ..
        } => {
            // What a reader may read it is given a second later.
            let attempt = attempt
                + if *operation == KinesisOperation::GetRecords {
                    2
                } else {
                    0
                };
            backoff::decide(error.class(), attempt, THROTTLED_MAX, jitter)
        }
        _ => backoff::decide(error.class(), attempt, RETRY_MAX, jitter),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Class;

    fn refused(operation: KinesisOperation, refusal: Refusal) -> KinesisError {
        KinesisError::Refused {
            operation,
            stream: "changes".to_owned(),
            refusal,
            said: String::new(),
        }
    }

    #[test]
    fn throttling_waits_about_a_second_and_never_long() {
        let read = refused(KinesisOperation::GetRecords, Refusal::Throttled);
        let put = refused(KinesisOperation::PutRecords, Refusal::Throttled);
        let away = refused(KinesisOperation::PutRecords, Refusal::Unavailable);
        let ms = |error, attempt| match decide(error, attempt, 0.0) {
            Decision::Retry(pause) => pause.as_millis(),
            Decision::Stop => 0,
        };
        assert_eq!([ms(&read, 1), ms(&read, 9)], [800, 2000]);
        assert_eq!([ms(&put, 1), ms(&put, 9)], [200, 2000]);
        assert_eq!([ms(&away, 1), ms(&away, 9)], [200, 10_000]);
    }

    #[test]
    fn a_streak_is_not_logged_at_every_attempt() {
        let logged = |refusal| {
            let error = refused(KinesisOperation::PutRecords, refusal);
            (1..=21)
                .filter(|attempt| is_worth_a_warning(&error, *attempt))
                .collect::<Vec<u32>>()
        };
        assert_eq!(logged(Refusal::Unavailable), [1, 10, 20]);
        assert_eq!(logged(Refusal::Throttled), [10, 20]);
    }

    #[test]
    fn a_clock_that_stays_wrong_and_old_credentials_need_another_client() {
        let start = Instant::now();
        let lasts = |streak: &mut Retries, refusal, seconds| {
            streak.is_too_long(Some(refusal), start + Duration::from_secs(seconds))
        };
        for (refusal, within) in [
            (Refusal::Clock, CLOCK_SET_WITHIN.as_secs()),
            (Refusal::StaleCredentials, CREDENTIALS_WITHIN.as_secs()),
        ] {
            let mut streak = Retries::default();
            assert!(!lasts(&mut streak, refusal, 0));
            assert!(!lasts(&mut streak, refusal, within - 1));
            assert!(lasts(&mut streak, refusal, within));
            // Another refusal in between is another streak, and so is what comes after a success.
            assert!(!lasts(&mut streak, Refusal::Unavailable, within + 1));
            assert!(!lasts(&mut streak, refusal, within + 2));
            streak.end();
            assert!(!lasts(&mut streak, refusal, 3 * within));
        }
        let mut streak = Retries::default();
        assert!((0..9000).all(|second| !lasts(&mut streak, Refusal::Unavailable, second)));
    }

    #[tokio::test]
    async fn what_somebody_has_to_mend_is_returned_at_once() {
        for refusal in [Refusal::Denied, Refusal::Kms, Refusal::NoStream] {
            let error = refused(KinesisOperation::PutRecords, refusal);
            let error = Retries::default().failed(error, None).await.unwrap_err();
            assert_eq!(error.refusal(), Some(refusal));
            assert_eq!(error.class(), Class::Transient);
        }
    }
}
