//! What is in the spool of one database: the log that is written now, and what earlier histories have left.

use std::fs;
use std::path::PathBuf;

use tokio::task::JoinSet;

use super::keeping::Keeping;
use crate::archive::log::{Layout, Log, LogSettings, SpoolError, SpoolLimits, upload_leftover};
use crate::error::{Classify as _, chain};
use crate::flow::changelog::Author;
use crate::names::history::History;
use crate::pg::PgLsn;

impl Keeping {
    fn directory(&self) -> PathBuf {
        self.archive.spool_directory.join(self.stream.as_str())
    }

    pub(super) fn open(
        &self,
        history: History,
        term: i64,
        start: PgLsn,
    ) -> Result<Log, SpoolError> {
        let settings = self.settings(history, term);
        Log::start(settings, start, self.metrics.clone(), self.broken.clone())
    }

    fn settings(&self, history: History, term: i64) -> LogSettings {
        LogSettings {
            author: Author {
                stream: self.stream.to_string(),
                history,
                term,
                writer: rand::random(),
            },
            url: self.archive.url.clone(),
            encryption: self.archive.encryption.clone(),
            layout: Layout::new(&self.stream, history),
            directory: self.directory().join(history.to_string()),
            limits: SpoolLimits {
                bytes: self.archive.spool_bytes,
                segment_bytes: self.archive.segment_bytes,
            },
            // A quarter of the time is for noticing that nothing comes, another one for the upload.
            age_max: self.config.objectives.rpo / 2,
            required: self.archive.required,
            retry_max: self.config.limits.retry_max,
            lead: self.lead(),
        }
    }

    /// The histories that have something in the spool, in the order in which they began.
    pub(super) fn in_spool(&self) -> Vec<History> {
        let Ok(entries) = fs::read_dir(self.directory()) else {
            return Vec::new();
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut histories: Vec<History> = names.filter_map(|name| name.parse().ok()).collect();
        histories.sort_by_key(|history| history.began);
        histories
    }

    /// The log that was written last, if anything is left of it.
    pub(super) fn latest_in_spool(&self) -> Option<Log> {
        let history = self.in_spool().pop()?;
        // Its position is what is left in the spool. What is wrong with it is said when the source is there.
        let log = self.open(history, 0, PgLsn::from(0)).ok()?;
        (log.handle().reach().position > PgLsn::from(0)).then_some(log)
    }

    /// What an earlier history has left in the spool goes to the store, under its own name.
    pub(super) fn upload_leftover(&self, history: History, tasks: &mut JoinSet<()>) {
        let (settings, metrics) = (self.settings(history, 0), self.metrics.clone());
        let database = self.database.clone();
        tasks.spawn(async move {
            if let Err(error) = upload_leftover(settings, metrics).await {
                tracing::warn!(
                    database, %history, error = %chain(&error), hint = error.hint(),
                    "what an earlier slot's change log has left in the spool stays there"
                );
            }
        });
    }
}
