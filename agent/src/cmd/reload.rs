//! The configuration file: read at the start of every command, and again when SIGHUP comes to one that stays.
//!
//! ```text
//! SIGHUP ─▶ read ─▶ config::reload ─▶ in use from now on ─▶ sessions that stream begin anew with it
//!             └ broken: said, and the one before stays        ─▶ what waits tries now
//! ```
//!
//! # Invariants
//! - No signal and no file ends the process.
//! - A session that streams is ended only where something was taken over; it goes on from its progress row within moments, as
//!   after any other error. A copy that runs is not disturbed.

use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::{Config, ConfigError, reload};
use crate::error::chain;
use crate::observe::metrics;
use crate::pipeline::Waker;

/// Reads the file and what the environment overrides.
///
/// # Errors
/// What is wrong with it, by file and key.
pub fn load(file: &Path) -> Result<Config, ConfigError> {
    let origin = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|error| ConfigError::Syntax {
        origin: origin.clone(),
        message: format!("cannot be read: {error}; name the file with --config or DR_AGENT_CONFIG"),
    })?;
    Config::parse(&origin, &text, std::env::vars())
}

/// Where a process that stays has its configuration from, and who goes by it.
pub(super) struct Reloading {
    pub(super) file: std::path::PathBuf,
    pub(super) in_use: watch::Sender<Arc<Config>>,
    pub(super) waker: Waker,
}

impl Reloading {
    /// SIGHUP: the file is read again, and what waits, stopped or between two attempts, tries now.
    pub(super) async fn on_signal(self) {
        let Ok(mut hangup) = signal(SignalKind::hangup()) else {
            return;
        };
        while hangup.recv().await.is_some() {
            tracing::info!(
                "SIGHUP: reading {} again, and trying every database again that does not stream; every session \
                 reads passwords and certificates again",
                self.file.display()
            );
            self.read_again();
            self.waker.now();
        }
    }

    fn read_again(&self) {
        let new = match load(&self.file) {
            Ok(new) => new,
            Err(error) => {
                tracing::error!(
                    error = %chain(&error),
                    "the configuration file cannot be used: nothing has changed; correct it and send SIGHUP again"
                );
                return;
            }
        };
        let old = Arc::clone(&self.in_use.borrow());
        let found = reload::reload(&old, &new);
        if !found.restart.is_empty() {
            tracing::warn!(
                "needs a restart: {}; until then the previous values are used",
                found.restart.join(", ")
            );
        }
        if found.taken.is_empty() {
            return;
        }
        tracing::info!("reloaded: {}", found.taken.join(", "));
        metrics::objectives(&found.config.objectives);
        self.in_use.send_replace(Arc::new(found.config));
    }
}
