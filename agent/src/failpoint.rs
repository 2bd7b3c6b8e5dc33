//! Fail points: named places where a test can make the process die as if by `kill -9`, or stand still, or a task of it panic.
//!
//! `DR_AGENT_FAILPOINT=name` aborts the process when it first passes the place of that name;
//! `name@N` when it passes it for the Nth time; `name=stop` and `name@N=stop` stop it there as SIGSTOP does,
//! until SIGCONT; `name=panic` has the task panic that passes it. Without the variable a fail point costs one load.

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
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Abort,
    Stop,
    Panic,
}

/// Aborts or stops the process, or panics, if this place is the armed one.
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
        match armed.what {
            What::Panic => panic!("fail point {name}"),
            What::Stop if kill_process(getpid(), Signal::STOP).is_ok() => {}
            What::Stop | What::Abort => std::process::abort(),
        }
        // Any thread may be the one that takes the signal: this one must not run on before it has.
        std::thread::sleep(STOPPED_WITHIN);
    }
}

fn parse(text: &str) -> Armed {
    let (text, what) = match text.rsplit_once('=') {
        Some((text, "stop")) => (text, What::Stop),
        Some((text, "panic")) => (text, What::Panic),
        _ => (text, What::Abort),
    };
    let (place, left) = text
        .rsplit_once('@')
        .and_then(|(name, count)| Some((name, count.parse().ok().filter(|count| *count > 0)?)))
        .unwrap_or((text, 1));
    Armed {
        place: place.to_owned(),
        left: AtomicU64::new(left),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_carry_a_count_and_what_happens_there() {
        for (text, place, left, what) in [
            ("apply:after-commit", "apply:after-commit", 1, What::Abort),
            ("apply:after-commit@3", "apply:after-commit", 3, What::Abort),
            (
                "apply:all-prepared=stop",
                "apply:all-prepared",
                1,
                What::Stop,
            ),
            (
                "apply:lane-prepared@2=stop",
                "apply:lane-prepared",
                2,
                What::Stop,
            ),
            ("archive:spooled@2=panic", "archive:spooled", 2, What::Panic),
        ] {
            let armed = parse(text);
            assert_eq!((armed.place.as_str(), armed.what), (place, what));
            assert_eq!(armed.left.into_inner(), left);
        }
    }
}
