//! What a copy tells while it runs: the observer it calls, and the display for people.
//!
//! The copy calls; metrics, the progress bar and the log listen. [`ProgressDisplay`] can wrap
//! another observer, so that one copy feeds both.
//!
//! # Invariants
//! - Observers are called from the copy's own task and must not block.
//! - `copied` is called with increments; rows of a part that later fails are among them, because
//!   they did cross the line.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::names::TableName;

/// What the copy is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyPhase {
    /// Tables, types, functions: everything without which no row can be stored.
    PreData,
    /// Rows.
    Data,
    /// Indexes, constraints, triggers; sequences and statistics.
    PostData,
}

impl CopyPhase {
    /// What a person reads.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PreData => "schema",
            Self::Data => "rows",
            Self::PostData => "indexes and constraints",
        }
    }
}

/// Listens to a copy.
pub trait CopyObserver: Send + Sync {
    /// Tables of this copy, and how many of them hold all their rows. Called whenever it changes.
    fn tables(&self, total: usize, done: usize);
    /// Estimate of all bytes this copy will send. Called again as finished tables refine it.
    fn planned(&self, bytes: u64);
    /// More rows and bytes were sent to the replica since the last call.
    fn copied(&self, rows: u64, bytes: u64);
    /// All rows of a table are committed on the replica.
    fn table_ready(&self, table: &TableName, rows: u64);
    /// The copy entered a phase.
    fn phase(&self, phase: CopyPhase);
    /// Something of the source was left out; already logged. The replica is less than the source by it.
    fn left_out(&self, _what: &str) {}
}

/// Listens to nothing.
impl CopyObserver for () {
    fn tables(&self, _total: usize, _done: usize) {}
    fn planned(&self, _bytes: u64) {}
    fn copied(&self, _rows: u64, _bytes: u64) {}
    fn table_ready(&self, _table: &TableName, _rows: u64) {}
    fn phase(&self, _phase: CopyPhase) {}
}

/// How often a log line shows the progress where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Shows a copy's progress to people: a bar where standard error is a terminal, a log line every five
/// seconds elsewhere. Hands everything on to the observer it wraps.
pub struct ProgressDisplay<'a> {
    inner: &'a dyn CopyObserver,
    database: String,
    bar: Option<ProgressBar>,
    counts: Mutex<Counts>,
}

#[derive(Clone, Copy, Debug)]
struct Counts {
    started: Instant,
    logged: Instant,
    tables: usize,
    tables_done: usize,
    planned: u64,
    rows: u64,
    bytes: u64,
}

impl<'a> ProgressDisplay<'a> {
    /// A display for the copy of `database` that hands on to `inner`; wrap `&()` for none.
    pub fn new(database: &str, inner: &'a dyn CopyObserver) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{prefix} [{bar:30}] {binary_bytes}/{binary_total_bytes} \
                 {binary_bytes_per_sec} {eta} left  {msg}",
            )
            .expect("the template is a constant and well-formed")
            .progress_chars("=> ");
            bar.set_style(style);
            bar.set_prefix(database.to_owned());
            bar
        });
        let now = Instant::now();
        Self {
            inner,
            database: database.to_owned(),
            bar,
            counts: Mutex::new(Counts {
                started: now,
                logged: now,
                tables: 0,
                tables_done: 0,
                planned: 0,
                rows: 0,
                bytes: 0,
            }),
        }
    }

    /// Changes the counts and shows them.
    fn update(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.lock().expect("no holder of this lock panics");
        change(&mut counts);
        let Some(bar) = &self.bar else {
            let now = Instant::now();
            if now.duration_since(counts.logged) >= LOG_EVERY {
                counts.logged = now;
                log_line(&self.database, &counts, now);
            }
            return;
        };
        bar.set_length(counts.planned.max(counts.bytes));
        bar.set_position(counts.bytes);
        bar.set_message(format!(
            "{} rows, {}/{} tables",
            counts.rows, counts.tables_done, counts.tables
        ));
    }
}

fn log_line(database: &str, counts: &Counts, now: Instant) {
    let seconds = now.duration_since(counts.started).as_secs_f64().max(0.001);
    let per_second = counts.bytes as f64 / seconds;
    tracing::info!(
        database,
        rows = counts.rows,
        bytes = %ByteSize(counts.bytes),
        of_about = %ByteSize(counts.planned.max(counts.bytes)),
        per_second = %ByteSize(per_second as u64),
        left = %humantime::format_duration(time_left(counts, seconds)),
        tables = counts.tables,
        tables_done = counts.tables_done,
        "copying"
    );
}

/// The time the rest takes at the rate so far, in whole seconds.
fn time_left(counts: &Counts, seconds: f64) -> Duration {
    let rest = counts.planned.saturating_sub(counts.bytes) as f64;
    let per_second = (counts.bytes as f64 / seconds).max(1.0);
    Duration::from_secs((rest / per_second).min(1e9) as u64)
}

impl CopyObserver for ProgressDisplay<'_> {
    fn tables(&self, total: usize, done: usize) {
        self.inner.tables(total, done);
        self.update(|counts| (counts.tables, counts.tables_done) = (total, done));
    }

    fn planned(&self, bytes: u64) {
        self.inner.planned(bytes);
        self.update(|counts| counts.planned = bytes);
    }

    fn copied(&self, rows: u64, bytes: u64) {
        self.inner.copied(rows, bytes);
        self.update(|counts| {
            counts.rows += rows;
            counts.bytes += bytes;
        });
    }

    fn table_ready(&self, table: &TableName, rows: u64) {
        self.inner.table_ready(table, rows);
        tracing::debug!(database = self.database, %table, rows, "table copied");
    }

    fn phase(&self, phase: CopyPhase) {
        self.inner.phase(phase);
        if phase == CopyPhase::PostData
            && let Some(bar) = &self.bar
        {
            // The rows are there; what follows has no bytes to count.
            bar.finish();
        }
        let counts = *self.counts.lock().expect("no holder of this lock panics");
        tracing::info!(
            database = self.database,
            rows = counts.rows,
            bytes = %ByteSize(counts.bytes),
            "copy: {}",
            phase.as_str()
        );
    }

    fn left_out(&self, what: &str) {
        self.inner.left_out(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Sum(AtomicU64);

    impl CopyObserver for Sum {
        fn tables(&self, _total: usize, _done: usize) {}
        fn planned(&self, _bytes: u64) {}
        fn copied(&self, rows: u64, _bytes: u64) {
            self.0.fetch_add(rows, Ordering::Relaxed);
        }
        fn table_ready(&self, _table: &TableName, _rows: u64) {}
        fn phase(&self, _phase: CopyPhase) {}
    }

    #[test]
    fn the_display_hands_every_increment_on() {
        let sum = Sum::default();
        let display = ProgressDisplay::new("app", &sum);
        display.planned(100);
        display.copied(3, 30);
        display.copied(4, 40);
        assert_eq!(sum.0.load(Ordering::Relaxed), 7);
        assert_eq!(display.counts.lock().unwrap().bytes, 70);
    }

    #[test]
    fn time_left_follows_the_rate_so_far() {
        let now = Instant::now();
        let counts = Counts {
            started: now,
            logged: now,
            tables: 1,
            tables_done: 0,
            planned: 300,
            rows: 1,
            bytes: 100,
        };
        assert_eq!(time_left(&counts, 10.0), Duration::from_secs(20));
    }
}
