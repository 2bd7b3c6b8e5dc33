//! A bandwidth limit: what all sessions of one URL may send together, as a token bucket.
//!
//! Replication shares the link between the sites with the business. The limit is on what we send to the
//! replica: apply sessions and initial copy through the same bucket. What the replica answers is small.
//!
//! # Invariants
//! - No session sends a byte without a token; all sessions draw from the same bucket, in turn.
//! - Over any time longer than [`BURST`] the mean is at most the rate.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use leaky_bucket::{AcquireOwned, RateLimiter};

/// Tokens come this often.
const INTERVAL: Duration = Duration::from_millis(10);

/// This much of the rate gathers while nothing is sent.
const BURST: Duration = Duration::from_millis(50);

/// One write takes at most this many tokens, so that sessions alternate.
const CHUNK_BYTES: usize = 16 * 1024;

/// The bucket.
#[derive(Clone)]
pub(super) struct Bandwidth {
    bytes_per_second: u64,
    bucket: Arc<RateLimiter>,
}

impl Bandwidth {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        let per = |time: Duration| {
            let bytes = u128::from(bytes_per_second) * time.as_micros() / 1_000_000;
            usize::try_from(bytes).unwrap_or(usize::MAX).max(1)
        };
        let burst = per(BURST).max(per(INTERVAL));
        let bucket = RateLimiter::builder()
            .initial(burst)
            .max(burst)
            .refill(per(INTERVAL))
            .interval(INTERVAL)
            .build();
        Self {
            bytes_per_second,
            bucket: Arc::new(bucket),
        }
    }

    /// How much of a write may go out at once.
    fn chunk(&self) -> usize {
        CHUNK_BYTES.min(self.bucket.max())
    }
}

impl fmt::Debug for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes/s", self.bytes_per_second)
    }
}

/// One session's place at the bucket.
pub(super) struct Throttle {
    bandwidth: Bandwidth,
    asking: Option<(usize, Pin<Box<AcquireOwned>>)>,
    /// Bytes that may be sent.
    granted: usize,
}

impl Throttle {
    pub(super) fn new(bandwidth: Bandwidth) -> Self {
        Self {
            bandwidth,
            asking: None,
            granted: 0,
        }
    }

    /// How many of `wanted` bytes may be sent now; at least one.
    pub(super) fn poll_grant(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<usize> {
        if wanted == 0 {
            return Poll::Ready(0);
        }
        if self.granted == 0 {
            let chunk = wanted.min(self.bandwidth.chunk());
            let bucket = &self.bandwidth.bucket;
            let (asked, asking) = self
                .asking
                .get_or_insert_with(|| (chunk, Box::pin(Arc::clone(bucket).acquire_owned(chunk))));
            ready!(asking.as_mut().poll(cx));
            self.granted = *asked;
            self.asking = None;
        }
        Poll::Ready(self.granted.min(wanted))
    }

    /// So many bytes were sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.granted -= bytes.min(self.granted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    /// Seconds it takes to send this much. Only lower bounds can be tested: a busy machine is slower.
    async fn seconds(bandwidth: &Bandwidth, bytes: usize) -> f64 {
        let mut throttle = Throttle::new(bandwidth.clone());
        let started = tokio::time::Instant::now();
        let mut left = bytes;
        while left > 0 {
            let granted = poll_fn(|cx| throttle.poll_grant(cx, left)).await;
            // As a socket does that takes a part.
            let sent = granted.div_ceil(2);
            throttle.sent(sent);
            left -= sent;
        }
        started.elapsed().as_secs_f64()
    }

    #[tokio::test]
    async fn sessions_share_one_rate() {
        let bandwidth = Bandwidth::new(1_000_000);
        let one = seconds(&bandwidth, 300_000).await;
        assert!(one > 0.2, "{one}");
        let (a, b) = tokio::join!(seconds(&bandwidth, 150_000), seconds(&bandwidth, 150_000));
        assert!(a.max(b) > 0.2, "{a} {b}");
    }

    #[tokio::test]
    async fn a_rate_below_a_chunk_still_lets_bytes_through() {
        let slow = seconds(&Bandwidth::new(2_000), 600).await;
        assert!(slow > 0.2, "{slow}");
    }
}
