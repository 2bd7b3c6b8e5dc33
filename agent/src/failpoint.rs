//! Fail points: named places where a test can make the process die as if by `kill -9`, or stand still.
//!
//! `DR_AGENT_FAILPOINT=name` aborts the process when it first passes the place of that name;
//! `name@N` when it passes it for the Nth time; `name=stop` and `name@N=stop` stop it there as SIGSTOP does,
//! until SIGCONT. Without the variable a fail point costs one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// Far longer than the kernel needs, even on a busy machine. Time spent standing still does not count.
const STOPPED_WITHIN: Duration = Duration::from_millis(500);

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

#[derive(Debug)]
struct Armed {
    place: String,
    left: AtomicU64,
    stops: bool,
}

/// Aborts or stops the process if this place is the armed one.
pub fn hit(name: &str) {
    let armed = ARMED.get_or_init(|| {
        std::env::var("DR_AGENT_FAILPOINT")
            .ok()
            .map(|text| parse(&text))
    });
    if let Some(armed) = armed
        && armed.place == name
        && armed.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        if !armed.stops || kill_process(getpid(), Signal::STOP).is_err() {
            std::process::abort();
        }
        // Any thread may be the one that takes the signal: this one must not run on before it has.
        std::thread::sleep(STOPPED_WITHIN);
    }
}

fn parse(text: &str) -> Armed {
    let (text, stops) = match text.strip_suffix("=stop") {
        Some(text) => (text, true),
        None => (text, false),
    };
    let (place, left) = text
        .rsplit_once('@')
        .and_then(|(name, count)| Some((name, count.parse().ok().filter(|count| *count > 0)?)))
        .unwrap_or((text, 1));
    Armed {
        place: place.to_owned(),
        left: AtomicU64::new(left),
        stops,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_carry_a_count_and_what_happens_there() {
        for (text, place, left, stops) in [
            ("apply:after-commit", "apply:after-commit", 1, false),
            ("apply:after-commit@3", "apply:after-commit", 3, false),
            ("apply:all-prepared=stop", "apply:all-prepared", 1, true),
            ("apply:lane-prepared@2=stop", "apply:lane-prepared", 2, true),
        ] {
            let armed = parse(text);
            assert_eq!((armed.place.as_str(), armed.stops), (place, stops));
            assert_eq!(armed.left.into_inner(), left);
        }
    }
}
