//! A bandwidth limit: what all sessions of one URL may send together, as a token bucket.
//!
//! Replication shares the link between the sites with the business. The limit is on what we send to the
//! replica: apply sessions and initial copy through the same bucket. What the replica answers is small.
//!
//! The bucket is one moment: when the link will have carried everything that was asked for. A session that asks
//! moves it on by what its bytes take, and sleeps until its own turn; there is no queue, and nobody to wake another.
//!
//! # Invariants
//! - No session sends a byte before its turn; turns come in the order in which they were asked for.
//! - Over any time longer than [`BURST`] the mean is at most the rate.
//! - A session that ends while it waits takes nothing with it but its turn, which is [`CHUNK_BYTES`] at most.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// This much of the rate gathers while nothing is sent.
const BURST: Duration = Duration::from_millis(50);

/// One write takes at most this much, so that sessions alternate.
const CHUNK_BYTES: usize = 16 * 1024;

/// The bucket.
#[derive(Clone)]
pub(super) struct Bandwidth {
    bytes_per_second: u64,
    schedule: Arc<Mutex<Schedule>>,
}

/// The same limit, whoever shares it.
impl PartialEq for Bandwidth {
    fn eq(&self, other: &Self) -> bool {
        self.bytes_per_second == other.bytes_per_second
    }
}

impl Eq for Bandwidth {}

impl Bandwidth {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        let bytes_per_second = bytes_per_second.max(1);
        Self {
            bytes_per_second,
            schedule: Arc::new(Mutex::new(Schedule {
                free_at: Instant::now(),
            })),
        }
    }

    pub(super) fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// How much of a write may go out at once: never more than may gather.
    fn chunk(&self) -> usize {
        let burst = u128::from(self.bytes_per_second) * BURST.as_nanos() / 1_000_000_000;
        CHUNK_BYTES.min(usize::try_from(burst).unwrap_or(usize::MAX).max(1))
    }

    /// When so many bytes may go out; they count as sent.
    fn turn(&self, bytes: usize, now: Instant) -> Instant {
        let nanos = (bytes as u128 * 1_000_000_000).div_ceil(u128::from(self.bytes_per_second));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        schedule.turn(takes, now)
    }
}

impl fmt::Debug for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes/s", self.bytes_per_second)
    }
}

/// What has been promised of the link.
struct Schedule {
    /// When the link will have carried all that was asked for. In the past, it is what has gathered since.
    free_at: Instant,
}

impl Schedule {
    /// The moment at which something may begin that takes so long to send.
    fn turn(&mut self, takes: Duration, now: Instant) -> Instant {
        let gathered_since = now.checked_sub(BURST).unwrap_or(now);
        self.free_at = self.free_at.max(gathered_since) + takes;
        // What has gathered is there already: what it pays for need not wait.
        self.free_at.max(now)
    }
}

/// One session's place at the bucket.
pub(super) struct Throttle {
    bandwidth: Bandwidth,
    /// Its turn, and for how many bytes.
    waiting: Option<(usize, Pin<Box<Sleep>>)>,
    /// Bytes that may be sent.
    granted: usize,
}

impl Throttle {
    pub(super) fn new(bandwidth: Bandwidth) -> Self {
        Self {
            bandwidth,
            waiting: None,
            granted: 0,
        }
    }

    /// How many of `wanted` bytes may be sent now; at least one.
    pub(super) fn poll_grant(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<usize> {
        if wanted == 0 {
            return Poll::Ready(0);
        }
        if self.granted == 0 {
            let bandwidth = &self.bandwidth;
            let (bytes, turn) = self.waiting.get_or_insert_with(|| {
                let bytes = wanted.min(bandwidth.chunk());
                let turn = bandwidth.turn(bytes, Instant::now());
                (bytes, Box::pin(tokio::time::sleep_until(turn)))
            });
            ready!(turn.as_mut().poll(cx));
            self.granted = *bytes;
            self.waiting = None;
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
    use proptest::prelude::*;
    use std::future::poll_fn;

    /// Sends so much, and says when it was done.
    async fn send(bandwidth: Bandwidth, bytes: usize) -> Instant {
        let mut throttle = Throttle::new(bandwidth);
        let mut left = bytes;
        while left > 0 {
            let granted = poll_fn(|cx| throttle.poll_grant(cx, left)).await;
            // As a socket does that takes a part.
            let sent = granted.div_ceil(2);
            throttle.sent(sent);
            left -= sent;
        }
        Instant::now()
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_share_one_rate() {
        let started = Instant::now();
        let bandwidth = Bandwidth::new(1_000_000);
        let one = send(bandwidth.clone(), 300_000).await - started;
        assert!((0.299..0.31).contains(&one.as_secs_f64()), "{one:?}");
        let sends = (0..8).map(|_| tokio::spawn(send(bandwidth.clone(), 100_000)));
        let sends: Vec<_> = sends.collect();
        let mut last = started;
        for task in sends {
            last = last.max(task.await.unwrap());
        }
        let all = last - started;
        assert!((1.09..1.12).contains(&all.as_secs_f64()), "{all:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn every_session_has_its_turn() {
        let started = Instant::now();
        let bandwidth = Bandwidth::new(1_000_000);
        let large = tokio::spawn(send(bandwidth.clone(), 100_000_000));
        tokio::task::yield_now().await;
        let small = send(bandwidth, 1_000).await - started;
        assert!(small < Duration::from_millis(50), "{small:?}");
        assert!(!large.is_finished());
        large.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_that_end_while_they_wait_hold_nobody_up() {
        let bandwidth = Bandwidth::new(1_000_000);
        let given_up = (0..100).map(|_| tokio::spawn(send(bandwidth.clone(), 1_000_000)));
        let given_up: Vec<_> = given_up.collect();
        tokio::task::yield_now().await;
        for task in &given_up {
            task.abort();
        }
        let started = Instant::now();
        let took = send(bandwidth, 100_000).await - started;
        // Each took one turn with it.
        assert!(took < Duration::from_millis(1_800), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_below_a_chunk_still_lets_bytes_through() {
        for (rate, bytes, expected) in [(2_000, 600, 0.3), (1, 3, 3.0), (0, 3, 3.0)] {
            let started = Instant::now();
            let took = send(Bandwidth::new(rate), bytes).await - started;
            assert!((took.as_secs_f64() - expected).abs() < 0.02, "{took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_gathers_is_limited() {
        let bandwidth = Bandwidth::new(1_000_000);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let started = Instant::now();
        assert_eq!(send(bandwidth.clone(), 50_000).await, started);
        let took = send(bandwidth, 50_000).await - started;
        assert!((0.049..0.06).contains(&took.as_secs_f64()), "{took:?}");
    }

    proptest! {
        /// Whenever sessions ask, and for whatever: in no stretch of time more than the rate and what may gather.
        #[test]
        fn no_stretch_of_time_has_more_than_the_rate(
            asked in proptest::collection::vec((0_u64..200_000, 1_usize..16_384), 1..60),
            rate in 1_000_u64..10_000_000,
        ) {
            let bandwidth = Bandwidth::new(rate);
            let mut now = Instant::now();
            let mut turns = Vec::new();
            for (later, bytes) in asked {
                now += Duration::from_micros(later);
                turns.push((bandwidth.turn(bytes, now), bytes as u64));
            }
            prop_assert!(turns.is_sorted_by_key(|(turn, _)| *turn));
            for (first, (begin, _)) in turns.iter().enumerate() {
                let mut sent = 0;
                for (end, bytes) in &turns[first..] {
                    sent += bytes;
                    // The first of them was earned before the stretch began.
                    let earned = (*end - *begin + BURST).as_secs_f64() * rate as f64;
                    let first = turns[first].1 as f64;
                    prop_assert!(sent as f64 <= earned + first + 1.0);
                }
            }
        }
    }
}
