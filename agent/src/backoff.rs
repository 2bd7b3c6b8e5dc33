//! ● The one retry decision: a class of error and the attempts so far become "retry after" or "stop".
//!
//! Pure: randomness is an argument. Leaves never sleep and retry; they return their error and the
//! pipeline asks here.

use std::time::Duration;

use crate::error::Class;

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Try again after this pause.
    Retry(Duration),
    /// A person is needed, or this agent was superseded.
    Stop,
}

const FIRST: Duration = Duration::from_millis(200);

/// Decides about failure number `attempt` (from 1) in a row.
///
/// Transient errors are retried for ever, since a site's link may be down for a weekend: the
/// metrics show it, the slot holds the WAL, and giving up would only add a restart. The pause
/// doubles up to `retry_max`; `jitter` in 0..1 takes up to half of it away, so that the pipelines of
/// one server do not come back in step.
pub fn decide(class: Class, attempt: u32, retry_max: Duration, jitter: f64) -> Decision {
    match class {
        Class::Definite | Class::Fenced => Decision::Stop,
        Class::Transient => {
            let doubled = FIRST.saturating_mul(1 << attempt.saturating_sub(1).min(20));
            let pause = doubled.min(retry_max);
            Decision::Retry(pause.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 2.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(30);

    #[test]
    fn pauses_double_up_to_the_limit() {
        let pause = |attempt| decide(Class::Transient, attempt, MAX, 0.0);
        assert_eq!(pause(1), Decision::Retry(Duration::from_millis(200)));
        assert_eq!(pause(3), Decision::Retry(Duration::from_millis(800)));
        assert_eq!(pause(60), Decision::Retry(MAX));
        assert_eq!(
            decide(Class::Transient, 60, MAX, 1.0),
            Decision::Retry(MAX / 2)
        );
    }

    #[test]
    fn only_transient_errors_are_retried() {
        assert_eq!(decide(Class::Definite, 1, MAX, 0.0), Decision::Stop);
        assert_eq!(decide(Class::Fenced, 1, MAX, 0.0), Decision::Stop);
    }
}
