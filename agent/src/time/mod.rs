//! The agent's own time: what ages are counted by, whatever becomes of the wall clock meanwhile.
//!
//! It begins as the wall clock and goes on by the monotonic one. A wall clock that is set back does not move it; one that is
//! set forward does, because that may be a machine that slept, and an age that is said too large is mended by the next
//! heartbeat while one that is said too small hides a dead link.
//!
//! # Invariants
//! - It never goes back.
//!
//! # What it does not do
//! It says nothing about the clocks of the servers: see [`crate::time::clock`].

pub mod clock;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Microseconds since 2000-01-01 UTC.
pub type Micros = i64;

const UNIX_TO_PG_EPOCH_SECONDS: i64 = 946_684_800;

/// Turns a wall-clock time into PostgreSQL's epoch.
pub fn pg_micros(now: std::time::SystemTime) -> Micros {
    let since_unix = now
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_unix.as_micros()).unwrap_or(i64::MAX) - UNIX_TO_PG_EPOCH_SECONDS * 1_000_000
}

/// Turns PostgreSQL's epoch into the wall clock.
pub fn system_time(at: Micros) -> std::time::SystemTime {
    let since_unix = at.saturating_add(UNIX_TO_PG_EPOCH_SECONDS * 1_000_000);
    std::time::UNIX_EPOCH + Duration::from_micros(u64::try_from(since_unix).unwrap_or(0))
}

/// A wall-clock time as people read it, to the microsecond: `2026-11-29T03:00:00.000000Z`.
pub fn rfc3339(at: SystemTime) -> String {
    format(at, "%Y-%m-%dT%H:%M:%S.%6fZ")
}

/// The same, to the second.
pub fn rfc3339_seconds(at: SystemTime) -> String {
    format(at, "%Y-%m-%dT%H:%M:%SZ")
}

/// UTC; a time that no calendar has is said to be none.
pub fn format(at: SystemTime, how: &str) -> String {
    match jiff::Timestamp::try_from(at) {
        Ok(at) => at.strftime(how).to_string(),
        Err(_) => "no time".to_owned(),
    }
}

/// A wall clock this far ahead was set, or the machine slept; less is what two clocks drift apart.
const STEP: Micros = 1_000_000;

struct AgentTime {
    began: Instant,
    /// What the time was then, and by what it was moved since.
    base: AtomicI64,
}

/// Now, in microseconds since 2000-01-01 UTC.
pub fn now() -> Micros {
    static TIME: OnceLock<AgentTime> = OnceLock::new();
    let wall = wall();
    let time = TIME.get_or_init(|| AgentTime {
        began: Instant::now(),
        base: AtomicI64::new(wall),
    });
    let elapsed = i64::try_from(time.began.elapsed().as_micros()).unwrap_or(i64::MAX);
    let base = time.base.load(Ordering::Relaxed);
    let step = step(base.saturating_add(elapsed), wall);
    if step > 0 {
        time.base
            .fetch_max(base.saturating_add(step), Ordering::Relaxed);
    }
    base.saturating_add(elapsed).saturating_add(step)
}

/// The wall clock, which may go both ways: for what people and other programs are told, never for an age.
#[expect(clippy::disallowed_methods, reason = "this is where it is read")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The same, as people write it.
#[expect(clippy::disallowed_methods, reason = "this is where it is read")]
pub fn timestamp() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// The same, in PostgreSQL's epoch.
pub fn wall() -> Micros {
    pg_micros(wall_clock())
}

/// By what the time has to be moved on.
fn step(time: Micros, wall: Micros) -> Micros {
    match wall.saturating_sub(time) {
        ahead if ahead > STEP => ahead,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_moves_nothing_and_one_set_forward_moves_on() {
        const HOUR: Micros = 3_600_000_000;
        assert_eq!(step(HOUR, 0), 0);
        assert_eq!(step(HOUR, HOUR + STEP), 0);
        assert_eq!(step(HOUR, 2 * HOUR), HOUR);
        let before = now();
        assert!(now() >= before);
    }
}
