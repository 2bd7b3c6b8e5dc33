//! Waiting on conditions: the only way tests let time pass.
//!
//! A condition is looked at every 25 ms until it holds or the deadline passes; then the test fails
//! with what was awaited. The logs of agents and servers follow from their `Drop`, because a failed
//! wait is a panic.

use std::future::Future;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(25);

/// Long enough for anything that works, also on two busy cores.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds; panics with `what` when it does not within `deadline`.
pub async fn wait_until<F>(what: &str, deadline: Duration, mut condition: impl FnMut() -> F)
where
    F: Future<Output = bool>,
{
    wait_for(what, deadline, || {
        let holds = condition();
        async move {
            if holds.await {
                Ok(())
            } else {
                Err(String::new())
            }
        }
    })
    .await;
}

/// Waits until `attempt` gives a value and returns it; panics with `what` and the last reason
/// when it does not within `deadline`.
pub async fn wait_for<T, F>(what: &str, deadline: Duration, mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let started = Instant::now();
    loop {
        let reason = match attempt().await {
            Ok(value) => return value,
            Err(reason) => reason,
        };
        if started.elapsed() >= deadline {
            let separator = if reason.is_empty() {
                ""
            } else {
                "; last seen: "
            };
            panic!("waited {deadline:?} for: {what}{separator}{reason}");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::AssertUnwindSafe;

    #[test]
    fn a_wait_that_fails_says_what_it_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let wait = wait_for("the moon", Duration::from_millis(30), || async {
            Err::<(), _>("a cloud".to_owned())
        });
        let failure = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(wait)));
        let message = *failure.unwrap_err().downcast::<String>().unwrap();
        assert!(
            message.contains("the moon") && message.contains("a cloud"),
            "{message}"
        );
    }

    #[tokio::test]
    async fn a_wait_returns_what_it_found() {
        let mut looks = 0;
        let found = wait_for("three looks", PATIENCE, || {
            looks += 1;
            let looks = looks;
            async move {
                if looks == 3 {
                    Ok(looks)
                } else {
                    Err(String::new())
                }
            }
        })
        .await;
        assert_eq!(found, 3);
    }
}
