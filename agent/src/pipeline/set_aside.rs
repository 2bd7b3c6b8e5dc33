//! Sets tables aside for a pipeline, and shows which are: on the replica, in the metrics, in the status.
//!
//! One for the life of the pipeline. What an earlier process has set aside it reads from the replica.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::error::SessionError;
use super::now_instant;
use super::trouble::{TableCost, Troubles};
use crate::config::Config;
use crate::error::{Class, chain};
use crate::names::stream::StreamName;
use crate::observe::metrics::DatabaseMetrics;
use crate::observe::status::StatusCell;
use crate::pg::ConnInfo;
use crate::setup::{self, SetupError};

/// What is done with tables that cannot be applied.
#[derive(Clone)]
pub(super) struct TablesAside {
    config: Arc<Config>,
    database: String,
    stream: StreamName,
    metrics: DatabaseMetrics,
    status: StatusCell,
    book: Arc<Mutex<Book>>,
    /// Tells who looks at what is protected.
    pub(super) changed: Arc<Notify>,
}

#[derive(Default)]
struct Book {
    troubles: Troubles,
    /// What an earlier process has noted was read.
    recalled: bool,
}

impl TablesAside {
    pub(super) fn new(
        config: &Arc<Config>,
        database: &str,
        metrics: &DatabaseMetrics,
        status: &StatusCell,
    ) -> Self {
        Self {
            config: Arc::clone(config),
            database: database.to_owned(),
            stream: config.stream(database),
            metrics: metrics.clone(),
            status: status.clone(),
            book: Arc::default(),
            changed: Arc::default(),
        }
    }

    fn replica(&self) -> ConnInfo {
        self.config.replica.conninfo.with_dbname(&self.database)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of each. Held for a moment only.
    pub(super) fn troubles(&self) -> impl std::ops::DerefMut<Target = Troubles> {
        TroublesGuard(self.book())
    }

    /// Sets aside what an error costs; whether that was all of it. Killed before or behind it, the next start goes on from there.
    pub(super) async fn tables_of(
        &self,
        cost: &TableCost,
        error: &SessionError,
    ) -> Result<bool, SetupError> {
        let reason = chain(error);
        let replica = self.replica();
        let noting = setup::set_aside(
            &replica,
            &self.stream,
            &cost.tables,
            &reason,
            cost.of_a_right,
        );
        let tables = Box::pin(noting).await?;
        for table in &tables {
            let now = now_instant();
            let pause = self
                .troubles()
                .refused(table, &reason, cost.of_definition, now);
            self.metrics.errors(Class::Definite).increment(1);
            tracing::error!(
                database = %self.database, %table, error = reason, hint = behind_it(error), again_in = ?pause,
                "set aside: it is not protected; the rest goes on, and it is copied again by itself"
            );
        }
        let mut set_aside = 0;
        self.status.update(|status| {
            let more = tables
                .iter()
                .map(|table| (table.to_string(), reason.clone()));
            status.set_aside.extend(more);
            set_aside = status.set_aside.len();
        });
        self.metrics.tables_set_aside(set_aside as u64);
        Ok(!tables.is_empty())
    }

    /// Reads once what an earlier process has set aside.
    pub(super) async fn recall(&self) -> Result<(), SetupError> {
        if self.book().recalled {
            return Ok(());
        }
        let noted = setup::noted_aside(&self.replica(), &self.stream).await?;
        let mut book = self.book();
        for one in &noted {
            book.troubles.noted(&one.table, &one.reason, now_instant());
        }
        book.recalled = true;
        drop(book);
        if !noted.is_empty() {
            let shown = noted.into_iter();
            self.show(
                shown
                    .map(|one| (one.table.to_string(), one.reason))
                    .collect(),
            );
        }
        Ok(())
    }

    /// Shows them, and no others.
    pub(super) fn show(&self, shown: BTreeMap<String, String>) {
        self.metrics.tables_set_aside(shown.len() as u64);
        self.status.update(|status| {
            if status.set_aside != shown {
                status.set_aside = shown;
                self.changed.notify_one();
            }
        });
    }
}

/// What may be behind it.
fn behind_it(error: &SessionError) -> &'static str {
    match error {
        SessionError::Sink(error) => error.behind_it(),
        _ => {
            "DDL ran on one side only, and the table is created anew; where views depend on the replica's table, make the same ALTER \
             TABLE there (SET default_transaction_read_only = off)"
        }
    }
}

struct TroublesGuard<'b>(MutexGuard<'b, Book>);

impl std::ops::Deref for TroublesGuard<'_> {
    type Target = Troubles;

    fn deref(&self) -> &Troubles {
        &self.0.troubles
    }
}

impl std::ops::DerefMut for TroublesGuard<'_> {
    fn deref_mut(&mut self) -> &mut Troubles {
        &mut self.0.troubles
    }
}
