//! A person who has mended something does not want to wait for the next look: SIGHUP wakes every pipeline that waits.
//!
//! # Invariants
//! - Who does not wait when it comes is not woken later by it.

use tokio::sync::watch;

/// Wakes.
#[derive(Debug, Default)]
pub struct Waker(watch::Sender<()>);

/// Is woken.
#[derive(Clone, Debug)]
pub struct Wake(watch::Receiver<()>);

impl Waker {
    /// What waits for this.
    pub fn wake(&self) -> Wake {
        Wake(self.0.subscribe())
    }

    /// Wakes everybody who waits now.
    pub fn now(&self) {
        self.0.send_replace(());
    }
}

impl Wake {
    /// Ends when somebody wakes us from now on.
    pub(super) async fn wanted(&mut self) {
        self.0.mark_unchanged();
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn only_who_waits_is_woken() {
        let waker = Waker::default();
        let mut wake = waker.wake();
        waker.now();
        let early = tokio::time::timeout(Duration::from_millis(20), wake.wanted());
        assert!(early.await.is_err());
        let (woken, ()) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(20), wake.wanted()),
            async {
                tokio::task::yield_now().await;
                waker.now();
            }
        );
        assert!(woken.is_ok());
        drop(waker);
        let never = tokio::time::timeout(Duration::from_millis(20), wake.wanted());
        assert!(never.await.is_err());
    }
}
