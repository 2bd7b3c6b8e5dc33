//! Named places where a test can make the program die, as a power cut would.
//!
//! `DR_AGENT_FAILPOINT=promote:settled dr-agent promote …` ends the process by `abort` right after
//! that state is stored: no destructor runs, nothing is flushed. Several names are separated by
//! commas. Compiled into every build, so that what is tested is what is shipped; without the
//! variable a failpoint costs one comparison with an empty list.
//!
//! # What it does not do
//! It never returns an error and never delays: a failpoint is death or nothing.

use std::sync::OnceLock;

/// The environment variable that names the places.
pub const VARIABLE: &str = "DR_AGENT_FAILPOINT";

/// Dies here if [`VARIABLE`] lists `name`. The variable is read once per process.
pub fn hit(name: &str) {
    static ARMED: OnceLock<Vec<String>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| names(&std::env::var(VARIABLE).unwrap_or_default()));
    if armed.iter().any(|place| place == name) {
        tracing::warn!(failpoint = name, "dying at a failpoint");
        std::process::abort();
    }
}

fn names(list: &str) -> Vec<String> {
    list.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_separated_by_commas_and_an_empty_variable_arms_nothing() {
        assert_eq!(
            names("promote:fenced, promote:done"),
            ["promote:fenced", "promote:done"]
        );
        assert!(names("").is_empty());
        assert!(names(" , ").is_empty());
    }
}
