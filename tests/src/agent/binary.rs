//! Which binary is under test.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The binary under test: `DR_AGENT_BIN`, or the one next to this test's own directory.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("DR_AGENT_BIN") {
            return PathBuf::from(path);
        }
        // target/<profile>/deps/e2e-… → target/<profile>/dr-agent
        let own = std::env::current_exe().expect("Linux tells a process its program");
        let mut profile = own.parent().expect("a program is in a directory");
        // A program such as the measurements is one level higher than a test.
        if profile.ends_with("deps") {
            profile = profile.parent().expect("cargo puts tests two levels deep");
        }
        let path = profile.join("dr-agent");
        let built = modified(&path).unwrap_or_else(|| {
            panic!(
                "{} is missing: run `cargo build -p dr-agent` first, or set DR_AGENT_BIN",
                path.display()
            )
        });
        // Only what the binary is made of; its package's tests may change without it.
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent");
        let parts = ["src", "sql"].map(|part| agent.join(part));
        if let Some(newer) = parts.iter().find_map(|part| newest(part, built)) {
            panic!(
                "{} is older than {}: run `cargo build -p dr-agent` first, or set DR_AGENT_BIN",
                path.display(),
                newer.display()
            );
        }
        path
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).ok()?.modified().ok()
}

/// A source file below `directory` that changed after `built`.
fn newest(directory: &Path, built: SystemTime) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.filter_map(Result::ok);
    for path in entries.map(|entry| entry.path()) {
        if path.is_dir() {
            if let Some(found) = newest(&path, built) {
                return Some(found);
            }
            continue;
        }
        let extension = path.extension().map(OsString::from).unwrap_or_default();
        if (extension == "rs" || extension == "sql") && modified(&path) > Some(built) {
            return Some(path);
        }
    }
    None
}
