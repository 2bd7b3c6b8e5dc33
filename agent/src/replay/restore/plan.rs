//! What a restore will do: which base backup, how much of the log, and what becomes of the target.
//!
//! # Invariants
//! - Nothing is written, neither in the archive nor in the target.
//! - What a plan refuses, the restore would have refused, too; and what can be refused beforehand, both do.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio_postgres::Client;

use super::pick_base::{self, Base};
use super::target::{self, Found, Owner, Position, Tables};
use super::{Options, RestoreError, encoding, history, own_stream};
use crate::archive::base::{self, Examined, LoadJob, Manifest, Ownership};
use crate::archive::log::{Chain, Layout, Span};
use crate::cloud::store::Store;
use crate::config::Config;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::time::{Micros, pg_micros};

/// What becomes of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It is empty.
    Empty,
    /// What a restore left that was interrupted within the base backup is removed first.
    Anew,
    /// A restore that was interrupted goes on from this position.
    Resumed(PgLsn),
}

/// What a restore will do.
#[derive(Debug)]
pub struct Plan {
    /// The base backup.
    pub base: base::Summary,
    /// What becomes of the target.
    pub start: Start,
    /// Bytes of the base backup that are read.
    pub base_bytes: u64,
    /// The tables whose rows are wanted; none: all.
    pub tables: Option<Vec<TableName>>,
    /// Segments of the change log that are read, at most.
    pub log_segments: usize,
    /// Their bytes in the store.
    pub log_bytes: u64,
    /// Where they lead.
    pub log_end: PgLsn,
    /// What the target will be without, as far as that is known beforehand.
    pub warnings: Vec<String>,
    pub(super) manifest: Manifest,
    /// The segments from the base backup, or from where the target stands.
    chain: Chain,
    /// Every base backup of the history.
    summaries: Vec<base::Summary>,
    /// Every segment there is, and its size.
    pub(super) segments: BTreeMap<Span, u64>,
    pub(super) layout: Layout,
}

/// Finds out what a restore would do, and whether anything is in its way that can be known beforehand. Writes nothing.
///
/// # Errors
/// [`RestoreError`]
pub async fn plan(config: &Config, store: &Store, options: &Options) -> Result<Plan, RestoreError> {
    let mut plan = read(config, store, options).await?;
    let stream = own_stream(config, options);
    let client = target::open(&options.target, &stream).await?;
    let found = target::look(&client, plan.owner(&stream)).await?;
    plan.start(&found, options)?;
    if !matches!(found, Found::Interrupted(_)) {
        let job = plan.job(config, store, options, &stream);
        let (examined, mut without) = examine(&job, &client).await?;
        without.extend_from_slice(examined.without());
        plan.warnings = without;
    }
    Ok(plan)
}

/// Looks what the archive has.
async fn read(config: &Config, store: &Store, options: &Options) -> Result<Plan, RestoreError> {
    let stream = config.stream(&options.database);
    let (database, moment) = (&options.database, options.moment);
    let (layout, summaries) =
        history::find(store, &stream, database, moment, options.history).await?;
    let bases: Vec<Base> = summaries.iter().map(base_of).collect();
    let chosen = pick_base::choose(&bases, options.moment)?;
    let base = summaries
        .iter()
        .find(|base| base_of(base) == chosen)
        .cloned()
        .ok_or_else(|| RestoreError::NothingOf(options.database.clone()))?;
    let manifest = base::manifest(store, &base.base).await?;
    let tables = match options.tables.as_slice() {
        [] => None,
        names => Some(
            manifest
                .meant(names)
                .map_err(|name| RestoreError::NoTable(name.to_string()))?,
        ),
    };
    let is_read = |object: &&base::Object| match (&object.data, &tables) {
        (Some(data), Some(tables)) => tables.contains(&data.table),
        _ => true,
    };
    let read = manifest.objects.iter().filter(is_read);
    let segments = segments(store, &layout).await?;
    Ok(Plan {
        start: Start::Empty,
        base_bytes: read.map(|object| object.sum.bytes).sum(),
        chain: Chain::from(chosen.lsn, &[]),
        log_segments: 0,
        log_bytes: 0,
        log_end: chosen.lsn,
        warnings: Vec::new(),
        base,
        tables,
        manifest,
        summaries,
        segments,
        layout,
    })
}

impl Plan {
    pub(super) fn owner<'s>(&self, stream: &'s StreamName) -> Owner<'s> {
        Owner {
            stream,
            history: self.layout.history(),
        }
    }

    /// What a load of the base backup is.
    pub(super) fn job<'a>(
        &'a self,
        config: &'a Config,
        store: &'a Store,
        options: &'a Options,
        stream: &'a StreamName,
    ) -> LoadJob<'a> {
        LoadJob {
            store,
            base: &self.base.base,
            manifest: &self.manifest,
            target: &options.target,
            stream,
            settings: &config.copy,
            only: self.tables.as_deref(),
            ownership: Ownership::Without {
                owners: options.no_owner,
                privileges: options.no_privileges,
            },
            // As of the moment, at the end.
            views: false,
        }
    }

    /// Begins with what the target is.
    pub(super) fn start(&mut self, found: &Found, options: &Options) -> Result<(), RestoreError> {
        let (start, from) = match found {
            Found::Empty => (Start::Empty, self.base.lsn),
            Found::HalfLoaded => (Start::Anew, self.base.lsn),
            Found::Interrupted(position) => {
                self.expect_the_same(position, options)?;
                self.base_bytes = 0;
                let began_with = self.summaries.iter().find(|base| base.lsn == position.base);
                if let Some(base) = began_with {
                    self.base = base.clone();
                }
                (Start::Resumed(position.end_lsn), position.end_lsn)
            }
        };
        let spans: Vec<Span> = self.segments.keys().copied().collect();
        self.start = start;
        self.chain = pick_base::log(from, &spans, options.moment)?;
        let bases: Vec<Base> = self.summaries.iter().map(base_of).collect();
        let needed = pick_base::needed(&self.chain, &bases, options.moment);
        self.log_segments = needed.spans.len();
        self.log_bytes = needed.spans.iter().map(|span| self.segments[span]).sum();
        self.log_end = needed.end;
        Ok(())
    }

    /// A restore that was interrupted can only go on to where it was going, or further.
    fn expect_the_same(&self, position: &Position, options: &Options) -> Result<(), RestoreError> {
        let time = position.commit_time.unwrap_or(Micros::MIN);
        // The plan has the newest base backup that leads to the moment.
        let too_far =
            position.base > self.base.lsn || !options.moment.is_at_or_after(position.end_lsn, time);
        if too_far {
            return Err(RestoreError::TooFar {
                at: position.end_lsn,
                moment: options.moment,
            });
        }
        match position.kept.asked == options.asked() {
            true => Ok(()),
            false => Err(RestoreError::OtherTables),
        }
    }

    /// The tables that are wanted, by every name the log may call them.
    pub(super) fn names(&self) -> Tables {
        let is_wanted = |table: &TableName| {
            self.tables
                .as_ref()
                .is_none_or(|tables| tables.contains(table))
        };
        let data = self.manifest.data().map(|(_, data)| data);
        let listed = self.manifest.listed();
        let names = data
            .filter(|data| is_wanted(&data.table))
            .flat_map(|data| [&data.table, &data.root]);
        names
            .map(|table| (table.clone(), listed.get(table).cloned()))
            .collect()
    }
}

/// What can be known of a load before it writes; and what is to be said of it.
pub(super) async fn examine(
    job: &LoadJob<'_>,
    client: &Client,
) -> Result<(Examined, Vec<String>), RestoreError> {
    let locale = encoding::check(client, &job.manifest.locale).await?;
    let examined = base::examine(job, client).await?;
    let said = job.manifest.warnings.iter().cloned().chain(locale);
    Ok((examined, said.collect()))
}

fn base_of(summary: &base::Summary) -> Base {
    Base {
        lsn: summary.lsn,
        time: micros(summary.as_of),
    }
}

/// As PostgreSQL counts.
fn micros(at: Timestamp) -> Micros {
    pg_micros(at.into())
}

/// The segments in the store, and their sizes.
async fn segments(store: &Store, layout: &Layout) -> Result<BTreeMap<Span, u64>, RestoreError> {
    let objects = store.list(&layout.log(), None).await?;
    let segments = objects
        .iter()
        .filter_map(|object| Some((layout.parse_segment(&object.name)?, object.bytes)));
    Ok(segments.collect())
}
