//! Failures in a row of one thing that is tried again: how long to wait, and what to say of it.
//!
//! Below `put`, `list` and `shard`. The decision is [`crate::backoff`]'s; this counts, logs and sleeps.
//!
//! # Invariants
//! - A streak is logged at its beginning, then at every tenth failure: not once per attempt. Throttling is the daily
//!   bread of a stream near its limits, and is logged only when it lasts.
//!
//! # What it does not do
//! It ends no streak by itself: transient errors are tried again for ever.

use std::time::Duration;

use super::{KinesisError, Operation, RETRY_MAX, Refusal};
use crate::backoff::{self, Decision};
use crate::error::{Classify as _, chain};

/// Throughput is given by the second: a longer pause would waste it.
const THROTTLED_MAX: Duration = Duration::from_secs(2);

/// Between two lines of a log about the same streak.
const LOG_EVERY: u32 = 10;

/// Failures since the last success.
#[derive(Debug, Default)]
pub(super) struct Streak(u32);

impl Streak {
    /// One more: waits before the next attempt, or returns what needs a person. `shard` is for the log.
    pub(super) async fn failed(
        &mut self,
        error: KinesisError,
        shard: Option<&str>,
    ) -> Result<(), KinesisError> {
        self.0 = self.0.saturating_add(1);
        let pause = match decide(&error, self.0, rand::random()) {
            Decision::Retry(pause) => pause,
            Decision::Stop => return Err(error),
        };
        let (attempt, hint, text) = (self.0, error.hint(), chain(&error));
        if is_worth_a_warning(&error, attempt) {
            tracing::warn!(shard, attempt, ?pause, error = text, hint, "will retry");
        } else {
            tracing::debug!(shard, attempt, ?pause, error = text, "will retry");
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// It worked.
    pub(super) fn end(&mut self) {
        self.0 = 0;
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
                + if *operation == Operation::GetRecords {
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

    fn refused(operation: Operation, refusal: Refusal) -> KinesisError {
        KinesisError::Refused {
            operation,
            stream: "changes".to_owned(),
            refusal,
            said: String::new(),
        }
    }

    #[test]
    fn throttling_waits_about_a_second_and_never_long() {
        let read = refused(Operation::GetRecords, Refusal::Throttled);
        let put = refused(Operation::PutRecords, Refusal::Throttled);
        let away = refused(Operation::PutRecords, Refusal::Unavailable);
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
            let error = refused(Operation::PutRecords, refusal);
            (1..=21)
                .filter(|attempt| is_worth_a_warning(&error, *attempt))
                .collect::<Vec<u32>>()
        };
        assert_eq!(logged(Refusal::Unavailable), [1, 10, 20]);
        assert_eq!(logged(Refusal::Throttled), [10, 20]);
    }

    #[tokio::test]
    async fn what_needs_a_person_is_returned_at_once() {
        let denied = refused(Operation::PutRecords, Refusal::Denied);
        let error = Streak::default().failed(denied, None).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::Denied));
    }
}
