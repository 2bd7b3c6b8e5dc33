//! What the numbers were measured on.

use std::fs;

use dr_agent_tests::binaries::Binaries;
use serde_json::{Value, json};

/// Processor, memory, kernel, PostgreSQL, build.
pub(crate) fn facts(fsync: bool) -> Value {
    json!({
        "processor": field("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()).ok(),
        "postgresql_source": Binaries::of_source().major,
        "postgresql_replica": Binaries::of_replica().major,
        "servers_fsync": fsync,
        "agent_version": env!("CARGO_PKG_VERSION"),
        "optimised": !cfg!(debug_assertions),
    })
}

/// The first value of a `name: value` line.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}
