//! Route `kinesis`, beside the replica: brings its database to where the stream can be applied.
//!
//! ```text
//! observe the replica ▶ promoted? ▶ lock
//!     no progress row    first copy: straight from the source where it can be reached, else the archive's newest base backup
//!     tables unfinished  left to whoever copies late tables beside the stream ([`look_receiving`]); with replica.set_aside =
//!                        "never" copied at a new snapshot of the source
//!     otherwise          settle what a killed agent left ▶ goes on; the source is not asked
//! ```
//!
//! # Invariants
//! - The source only has to be reachable while something is copied from it.
//! - A first copy begins behind the slot: what commits after it is in the stream.
//! - A first copy is judged before anything is written, and what was written before its first row is taken back when it fails.
//! - One agent at a time: an advisory lock is held for as long as what is returned.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::base::{self, Base, Watch};
use super::begin::First;
use super::error::{SetupError, Side};
use super::identity;
use super::replica::{self, Known, Server};
use super::set_back::{self, Missed};
use super::source_side::{self, SourceSide};
use super::target::HalfLoaded;
use super::{Found, Ready, Setup, late, lock, recover, resume, schema, sending, under_way};
use crate::config::{Config, SetAside};
use crate::copy::CopyObserver;
use crate::error::chain;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::{ConnInfo, PgError, PgLsn};
use crate::schema::listing::Listed;
use crate::schema::progress::Progress;
use crate::schema::set_aside::Aside;
use crate::schema::stream::Recorded;
use crate::schema::table_sync::TableSync;
use crate::sink::replica::Distance;

/// How long a source may take to answer that may be out of reach for good.
const SOURCE_WITHIN: Duration = Duration::from_secs(10);

/// How long a question to the replica may take while a promotion waits for it: a table of ours may be locked by somebody.
const DRAINING_WITHIN: &str = "10s";

/// Brings `database` to where the stream can be applied. Repeatable, whatever was killed before.
///
/// `uncopied` is a table that the stream has shown not to be on the replica, or to be another one.
///
/// # Errors
/// [`SetupError`]
pub async fn prepare_receiving(
    config: &Config,
    database: &str,
    uncopied: Option<&TableName>,
    observer: &dyn CopyObserver,
    cancel: &CancellationToken,
) -> Result<Ready, SetupError> {
    let receiving = ReceivingSetup {
        config,
        database,
        stream: config.stream(database),
        replica_info: config.replica.conninfo.with_dbname(database),
        observer,
        cancel,
    };
    Box::pin(receiving.prepare(uncopied)).await
}

/// Tables that the source publishes and the replica does not have.
#[derive(Debug)]
pub struct Uncopied {
    /// In name order.
    pub tables: Vec<TableName>,
    /// Whether they can be copied from here.
    pub source_in_reach: bool,
}

/// Looks for tables that a replica beside a Kinesis stream lacks: at the source, or where it is out of reach in the
/// newest base backup, which is read again when it is another one.
///
/// # Errors
/// [`SetupError`]
pub async fn uncopied(
    config: &Config,
    database: &str,
    archived: &mut Watch,
) -> Result<Uncopied, SetupError> {
    let stream = config.stream(database);
    let source = config.source.conninfo.with_dbname(database);
    let mut commands = None;
    let (published, source_in_reach): (BTreeSet<TableName>, bool) =
        match within_reach(super::published(&source, &stream)).await {
            Ok(published) => {
                commands = published.as_ref().map(|it| it.commands.clone());
                let tables = published.map(|published| published.tables);
                let names = tables.into_iter().flatten().map(|table| table.name);
                (names.collect(), true)
            }
            Err(error) if error.is_out_of_reach(Side::Source) => match &config.archive {
                None => return Err(error),
                Some(archive) => {
                    let tables = archived.tables(archive, &stream, database).await?;
                    (tables.into_iter().collect(), false)
                }
            },
            Err(error) => return Err(error),
        };
    let client = replica::open(&config.replica.conninfo.with_dbname(database), &stream).await?;
    let known = replica::synced_tables(&client, &stream).await?;
    let known: BTreeSet<TableName> = known.into_iter().map(|row| row.table).collect();
    // What commands on their way bring is not missing.
    if let Some(commands) = commands
        && !under_way::have_arrived(&commands, &client).await?
    {
        return Ok(Uncopied {
            tables: Vec::new(),
            source_in_reach,
        });
    }
    Ok(Uncopied {
        tables: published.difference(&known).cloned().collect(),
        source_in_reach,
    })
}

/// Looks for tables that are to be copied beside the stream; where the source of this history cannot be reached from here, says so
/// of each.
///
/// # Errors
/// [`SetupError`]
pub async fn look_receiving(
    config: &Config,
    database: &str,
    history: History,
    archived: &mut Watch,
) -> Result<Found, SetupError> {
    let stream = config.stream(database);
    let client = replica::open(&config.replica.conninfo.with_dbname(database), &stream).await?;
    let rows = replica::synced_tables(&client, &stream).await?;
    let is_ready = |name: &TableName| rows.iter().any(|row| row.ready && row.table == *name);
    let source = config.source.conninfo.with_dbname(database);
    let why = match within_reach(super::published(&source, &stream)).await {
        Ok(Some(published)) if published.history == history => {
            let under_way = !under_way::have_arrived(&published.commands, &client).await?;
            let anew = late::listed_anew(&published, &rows).next();
            if let Some(table) = anew.filter(|_| !under_way) {
                return Err(SetupError::ListedAnew(table.clone()));
            }
            let mut tables = late::missing(published.tables, &published.tops, is_ready)?;
            if under_way {
                tables.retain(|table| rows.iter().any(|row| row.table == table.name));
            }
            return Ok(Found {
                tables,
                under_way,
                elsewhere: Vec::new(),
                out_of_reach: None,
                listed: published.listed,
                warnings: Vec::new(),
            });
        }
        Ok(_) => "the server at source.url does not send this stream".to_owned(),
        Err(error) if error.is_out_of_reach(Side::Source) => {
            format!("the source cannot be reached from here ({})", chain(&error))
        }
        Err(error) => return Err(error),
    };
    let mut names: BTreeSet<TableName> = rows.iter().map(|row| row.table.clone()).collect();
    if let Some(archive) = &config.archive {
        names.extend(archived.tables(archive, &stream, database).await?);
    }
    names.retain(|name| !is_ready(name));
    let reason = format!("{why}; it is copied once source.url leads there");
    let aside = |table| Aside {
        table,
        reason: reason.clone(),
    };
    Ok(Found {
        tables: Vec::new(),
        under_way: false,
        elsewhere: names.into_iter().map(aside).collect(),
        out_of_reach: Some(reason.clone()),
        listed: Listed::new(),
        warnings: Vec::new(),
    })
}

/// A source that does not answer may be out of reach for good.
async fn within_reach<T>(
    asking: impl Future<Output = Result<T, SetupError>>,
) -> Result<T, SetupError> {
    tokio::time::timeout(SOURCE_WITHIN, asking)
        .await
        .unwrap_or_else(|_| {
            let silent = PgError::Timeout {
                doing: "reach the source",
                after: SOURCE_WITHIN,
            };
            Err(SetupError::sql(Side::Source, "look at it")(silent))
        })
}

/// What a promotion goes on from once it has raised the term and settled what was left prepared: nobody else applies, and
/// nothing is copied any more. Only reads.
///
/// # Errors
/// [`SetupError`]
pub async fn prepare_draining(config: &Config, database: &str) -> Result<Ready, SetupError> {
    let stream = config.stream(database);
    let client = replica::open(&config.replica.conninfo.with_dbname(database), &stream).await?;
    client
        .batch_execute(&format!("SET statement_timeout = '{DRAINING_WITHIN}'"))
        .await
        .map_err(|error| SetupError::sql(Side::Replica, "look at it")(error.into()))?;
    let known = replica::remembered(&client, &stream).await?;
    let (Some(recorded), Some(progress)) = (known.recorded, known.progress) else {
        return Err(SetupError::NotSent {
            stream: stream.to_string(),
        });
    };
    let as_of = known.list_as_of(progress);
    let receiving = ReceivingSetup {
        config,
        database,
        stream,
        replica_info: config.replica.conninfo.with_dbname(database),
        observer: &(),
        cancel: &CancellationToken::new(),
    };
    receiving.prepared(&client, recorded, progress, as_of).await
}

/// Keeps the right to the stream, and what has been seen of the replica.
async fn held(
    prepared: Ready,
    client: Client,
    (round_trip, prepared_max): (Duration, u16),
) -> Result<Ready, SetupError> {
    let asked = Instant::now();
    let mut prepared = prepared.holding(client, Side::Replica).await?;
    prepared.distance = Some(Distance {
        round_trip: round_trip.min(asked.elapsed()),
        prepared_max,
    });
    Ok(prepared)
}

/// The replica, looked at and not yet written to.
struct ReceivingSides {
    admin: Client,
    server: Server,
    /// Its database, locked.
    opened: Option<Client>,
    known: Known,
}

struct ReceivingSetup<'a> {
    config: &'a Config,
    database: &'a str,
    stream: StreamName,
    replica_info: ConnInfo,
    observer: &'a dyn CopyObserver,
    cancel: &'a CancellationToken,
}

impl<'a> ReceivingSetup<'a> {
    async fn prepare(self, uncopied: Option<&TableName>) -> Result<Ready, SetupError> {
        // Together, and so is what follows: the replica may be far away, and nothing is applied meanwhile.
        let (admin, opened) = future::join(
            replica::open(&self.config.replica.conninfo, &self.stream),
            replica::open(&self.replica_info, &self.stream),
        )
        .await;
        let admin = admin?;
        let opened = replica::if_it_exists(opened, (&admin, self.database)).await?;
        let (server, opened) =
            future::join(Server::observe(&admin, self.database), self.locked(opened)).await;
        let server = server?;
        server.require_fit()?;
        let opened = opened?;
        let mut replica = ReceivingSides {
            admin,
            server,
            opened: None,
            known: Known::default(),
        };
        let Some((mut client, known)) = opened else {
            return Box::pin(self.first(replica)).await;
        };
        if known.progress.is_none() {
            // Read before the lock was ours, if another agent had it.
            replica.known = replica::known(&client, &self.stream).await?;
        }
        if known.progress.is_none() && replica.known.progress.is_none() {
            replica.opened = Some(client);
            return Box::pin(self.first(replica)).await;
        }
        let (known, server) = match known.progress {
            None => (replica.known, replica.server),
            Some(_) => (known, replica.server),
        };
        let asked = Instant::now();
        let (ensured, settled, guarded, rows) = future::join4(
            schema::ensure(&client, &server.role),
            recover::settle(&client, &self.stream),
            replica::is_safely_guarded(&client),
            replica::synced_tables(&client, &self.stream),
        )
        .await;
        let round_trip = asked.elapsed();
        ensured?;
        let progress = settled?.expect("nobody else works on the stream, and it has progress");
        if !guarded? {
            replica::guard(&mut client, self.database).await?;
        }
        let rows = rows?;
        let as_of = known.list_as_of(progress);
        let recorded = known.recorded.ok_or_else(|| SetupError::NotSent {
            stream: self.stream.to_string(),
        })?;
        let is_begun = rows.iter().any(|row| row.ready);
        if is_begun && self.config.replica.set_aside == SetAside::Retry {
            self.leave_to_late(&mut client, &rows, uncopied).await?;
            let asked = Instant::now();
            let prepared = self.prepared(&client, recorded, progress, as_of).await?;
            let seen = (round_trip.min(asked.elapsed()), server.prepared_max);
            return held(prepared, client, seen).await;
        }
        let unfinished = rows.iter().find(|row| !row.ready).map(|row| &row.table);
        match uncopied.or(unfinished) {
            // Whatever is not on the list and changes from here on, or since the source was last looked at, is new.
            None => {
                let asked = Instant::now();
                let prepared = self.prepared(&client, recorded, progress, as_of).await?;
                let seen = (round_trip.min(asked.elapsed()), server.prepared_max);
                held(prepared, client, seen).await
            }
            Some(table) => match self.reach_source().await {
                Ok((source, note)) => {
                    let both = (&recorded, &note);
                    let another = uncopied.filter(|table| {
                        let mut ready = rows.iter().filter(|row| row.ready);
                        ready.any(|row| row.table == **table)
                    });
                    self.more(source, client, (both, another), progress).await
                }
                Err(error) => Err(SetupError::NewTableElsewhere {
                    table: table.clone(),
                    source: Box::new(error),
                }),
            },
        }
    }

    /// What is not copied, or is of another table, is copied beside the stream.
    async fn leave_to_late(
        &self,
        client: &mut Client,
        rows: &[TableSync],
        another: Option<&TableName>,
    ) -> Result<(), SetupError> {
        const REASON: &str =
            "it is another table than was copied, or was not published for a while";
        if resume::catches_up(client, &self.stream).await? {
            // It is half-way between two moments.
            let unfinished = rows.iter().filter(|row| !row.ready);
            let unfinished = unfinished.map(|row| (row.table.clone(), Missed::Changes));
            set_back::reset(client, &self.stream, &unfinished.collect()).await?;
        }
        let is_ready =
            |table: &&TableName| rows.iter().any(|row| row.ready && row.table == **table);
        let Some(table) = another.filter(is_ready) else {
            return Ok(());
        };
        let mut tables = BTreeSet::from([table.clone()]);
        tables.extend(self.listed_anew(rows).await?);
        for table in &tables {
            late::leave_out(client, &self.stream, table, REASON).await?;
        }
        Ok(())
    }

    /// The tables of which the source says, where it can be asked, that they are not those that were copied: they may have taken
    /// the names of one another.
    async fn listed_anew(&self, rows: &[TableSync]) -> Result<Vec<TableName>, SetupError> {
        let source = self.config.source.conninfo.with_dbname(self.database);
        let published = match within_reach(super::published(&source, &self.stream)).await {
            Ok(Some(published)) => published,
            Ok(None) => return Ok(Vec::new()),
            Err(error) if error.is_out_of_reach(Side::Source) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        Ok(late::listed_anew(&published, rows).cloned().collect())
    }

    /// The replica's database, locked, if it is there. What is known may be of the time before the lock.
    async fn locked(&self, opened: Option<Client>) -> Result<Option<(Client, Known)>, SetupError> {
        let Some(client) = opened else {
            return Ok(None);
        };
        let (locked, known) = future::join(
            lock::take(&client, Side::Replica, &self.stream),
            replica::known(&client, &self.stream),
        )
        .await;
        locked?;
        Ok(Some((client, known?)))
    }

    /// The source, if it can be reached from here and is sent from.
    async fn reach_source(&self) -> Result<(SourceSide<'a>, Recorded), SetupError> {
        let opening = SourceSide::open(self.config, self.database, self.cancel);
        let source = within_reach(Box::pin(opening)).await?;
        source.require_known_list().await?;
        match sending::sent(&source).await? {
            Some(history) => Ok((source, history)),
            None => Err(SetupError::NotSent {
                stream: self.stream.to_string(),
            }),
        }
    }

    /// The first copy.
    async fn first(self, replica: ReceivingSides) -> Result<Ready, SetupError> {
        let unreachable = match self.reach_source().await {
            Ok((source, history)) => {
                return self.first_from_source(source, history, replica).await;
            }
            Err(error) if error.is_out_of_reach(Side::Source) => error,
            Err(error) => return Err(error),
        };
        let why = chain(&unreachable);
        let Some(archive) = &self.config.archive else {
            return Err(SetupError::NothingToCopyFrom {
                database: self.database.to_owned(),
                why: format!("{why}; and no [archive] is configured"),
            });
        };
        match base::newest(archive, &self.stream, self.database).await? {
            Some(base) => {
                tracing::info!(database = self.database, base = %base.manifest.lsn, source = why, "the source cannot be reached from here: the first copy comes out of the archive");
                self.first_from_base(&base, replica).await
            }
            None => Err(SetupError::NothingToCopyFrom {
                database: self.database.to_owned(),
                why: format!("{why}; and the archive has no base backup yet"),
            }),
        }
    }

    async fn first_from_source(
        self,
        mut source: SourceSide<'a>,
        recorded: Recorded,
        replica: ReceivingSides,
    ) -> Result<Ready, SetupError> {
        let url = source.info.to_string();
        replica.server.require(&url, &source.found.started_at)?;
        let how = (source.locale().await?, HalfLoaded::Refused);
        let place = (self.database, &self.stream);
        let (known, both) = (replica.known, (replica.admin, replica.server));
        let mut first = First::judge(both, replica.opened, &known, place, how).await?;
        let mut walsender = source.walsender().await?;
        let (cluster, source_lsn) = source_side::identify(&mut walsender).await?;
        source.look_again().await?;
        let (client, warning) = first.database(&self.replica_info, place).await?;
        source.warnings.extend(warning);
        let history = recorded.history();
        let mut setup = self.setup(source, client);
        let recorded = Recorded {
            cluster,
            began: history.began,
        };
        let writing = setup.write_first_rows(&mut walsender, &recorded, &mut first);
        let (snapshot, progress) = match writing.await {
            Ok(written) => written,
            Err(error) => {
                first
                    .abandon(setup.replica, (setup.database, &setup.source.stream))
                    .await;
                return Err(error);
            }
        };
        drop(first);
        let published = setup.source.wanted.published.clone();
        setup.copy(published, &snapshot, true).await?;
        let from = (cluster, history);
        let (prepared, client) = setup.finish(from, progress, source_lsn).await?;
        prepared.holding(client, Side::Replica).await
    }

    async fn first_from_base(
        self,
        base: &Base,
        replica: ReceivingSides,
    ) -> Result<Ready, SetupError> {
        let place = (self.database, &self.stream);
        let (known, both) = (replica.known, (replica.admin, replica.server));
        let how = (base.manifest.locale.clone(), HalfLoaded::Removed);
        let mut first = First::judge(both, replica.opened, &known, place, how).await?;
        let (mut client, created) = first.database(&self.replica_info, place).await?;
        let begun = base.load(
            self.config,
            (&self.stream, &self.replica_info),
            &mut client,
            &mut first,
            (self.observer, self.cancel),
        );
        let progress = match begun.await {
            Ok(progress) => progress,
            Err(error) => {
                first.abandon(client, place).await;
                return Err(error);
            }
        };
        let mut prepared = self
            .prepared(&client, base.recorded(), progress, progress.end_lsn)
            .await?
            .holding(client, Side::Replica)
            .await?;
        prepared.warnings.extend(created);
        prepared.warnings.extend(base.manifest.warnings.clone());
        Ok(prepared)
    }

    /// Copies what the source publishes and the replica has not, or has of another table.
    async fn more(
        self,
        mut source: SourceSide<'a>,
        client: Client,
        ((recorded, noted), another): ((&Recorded, &Recorded), Option<&TableName>),
        progress: Progress,
    ) -> Result<Ready, SetupError> {
        let mut walsender = source.walsender().await?;
        let (cluster, source_lsn) = source_side::identify(&mut walsender).await?;
        identity::same_history(&self.stream, recorded, noted, &cluster).map_err(|source| {
            SetupError::Mismatch {
                database: self.database.to_owned(),
                source,
            }
        })?;
        source.look_again().await?;
        let rows = replica::synced_tables(&client, &self.stream).await?;
        let mut setup = self.setup(source, client);
        let mut missed = setup.source.found.missed(&setup.source.wanted, &rows);
        if let Some(another) = another {
            missed.entry(another.clone()).or_insert(Missed::Changes);
        }
        let ready = rows.iter().filter(|row| row.ready);
        let ready: BTreeSet<TableName> = ready.map(|row| row.table.clone()).collect();
        setup.miss_together(&ready, &mut missed).await?;
        set_back::reset(&mut setup.replica, &setup.source.stream, &missed).await?;
        setup.forget_unfinished().await?;
        let is_there = |table: &TableName| ready.contains(table) && !missed.contains_key(table);
        let mut rest = setup.source.wanted.published.clone();
        let nothing = !ready.iter().any(is_there);
        rest.retain(|table| !is_there(&table.name));
        if !rest.is_empty() {
            setup.copy_tables(&mut walsender, rest, nothing).await?;
        }
        let from = (cluster, recorded.history());
        let (prepared, client) = setup.finish(from, progress, source_lsn).await?;
        prepared.holding(client, Side::Replica).await
    }

    fn setup(&self, source: SourceSide<'a>, replica: Client) -> Setup<'a> {
        Setup {
            database: self.database,
            source,
            replica_info: self.replica_info.clone(),
            replica,
            observer: self.observer,
            distance: None,
        }
    }

    /// What can go on without the source.
    async fn prepared(
        self,
        client: &Client,
        recorded: Recorded,
        progress: Progress,
        as_of: PgLsn,
    ) -> Result<Ready, SetupError> {
        let (rows, deferred) = future::join(
            replica::synced_tables(client, &self.stream),
            replica::has_deferred(client, &self.stream),
        )
        .await;
        let (rows, deferred) = (rows?, deferred?);
        Ok(Ready {
            left_out: 0,
            term: progress.term,
            batch: progress.batch,
            end_lsn: progress.end_lsn,
            commit_time: progress.commit_time,
            applied_at: progress.applied_at,
            timeline: recorded.cluster.timeline,
            history: recorded.history(),
            server_version: 0,
            synced: replica::synced(rows),
            deferred,
            distance: None,
            as_of,
            computed: None,
            binary: false,
            unpublished: Vec::new(),
            warnings: Vec::new(),
            stream: self.stream,
            right: None,
        })
    }
}
