//! Fail points: named places where a test can make the process die as if by `kill -9`.
//!
//! `DR_AGENT_FAILPOINT=name` aborts the process when it first passes the place of that name;
//! `name@N` when it passes it for the Nth time. Without the variable a fail point costs one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static ARMED: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();

/// Aborts the process if this place is the armed one.
pub fn hit(name: &str) {
    let armed = ARMED.get_or_init(|| std::env::var("DR_AGENT_FAILPOINT").ok().map(parse));
    if let Some((place, left)) = armed
        && place == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        std::process::abort();
    }
}

fn parse(text: String) -> (String, AtomicU64) {
    match text.rsplit_once('@') {
        Some((name, count)) if count.parse::<u64>().is_ok_and(|count| count > 0) => (
            name.to_owned(),
            AtomicU64::new(count.parse().expect("the guard has parsed it")),
        ),
        _ => (text, AtomicU64::new(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_may_carry_a_count() {
        let (name, count) = parse("apply:after-commit@3".to_owned());
        assert_eq!(
            (name.as_str(), count.into_inner()),
            ("apply:after-commit", 3)
        );
        assert_eq!(
            parse("apply:after-commit".to_owned()).0,
            "apply:after-commit"
        );
    }
}
