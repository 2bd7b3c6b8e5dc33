//! How far the log is replayed: a bar where standard error is a terminal, log lines elsewhere.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::view;
use crate::pg::PgLsn;
use crate::replay::restore::{RestoreObserver, RestoreOptions, RestorePlan};
use crate::time::Micros;

/// How often a log line shows the progress where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Shows a restore to whoever waits for it.
pub(super) struct RestoreDisplay<'a> {
    options: &'a RestoreOptions,
    bar: Option<ProgressBar>,
    state: Mutex<ReplayState>,
}

#[derive(Clone, Copy, Default)]
struct ReplayState {
    from: Option<PgLsn>,
    logged: Option<Instant>,
}

impl<'a> RestoreDisplay<'a> {
    pub(super) fn new(options: &'a RestoreOptions) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {binary_bytes}/{binary_total_bytes} of WAL, {eta} left  {msg}",
            )
            .expect("the template is a constant and well-formed")
            .progress_chars("=> ");
            bar.set_style(style);
            bar.set_prefix(format!("{} log", options.database));
            bar
        });
        Self {
            options,
            bar,
            state: Mutex::default(),
        }
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn now() -> Instant {
    Instant::now()
}

impl RestoreObserver for RestoreDisplay<'_> {
    fn planned(&self, plan: &RestorePlan) {
        eprintln!("{}", view::plan_text(plan, self.options));
    }

    fn replayed(&self, end_lsn: PgLsn, log_end: PgLsn, commit_time: Option<Micros>) {
        let mut state = self.state.lock().expect("nobody panics with the lock held");
        let from = *state.from.get_or_insert(end_lsn);
        let far = |lsn: PgLsn| u64::from(lsn).saturating_sub(u64::from(from));
        let at = commit_time.map(view::time);
        if let Some(bar) = &self.bar {
            bar.set_length(far(log_end));
            bar.set_position(far(end_lsn));
            bar.set_message(at.unwrap_or_default());
            return;
        }
        let due = state
            .logged
            .is_none_or(|logged| logged.elapsed() >= LOG_EVERY);
        if due {
            state.logged = Some(now());
            tracing::info!(
                database = %self.options.database, position = %end_lsn, log_end = %log_end,
                source_time = at, "replaying the change log"
            );
        }
    }
}
