//! The first start of a stream, or one that repeats an interrupted first start: everything is copied.
//!
//! ```text
//! judge ▶ database ▶ publication ▶ schema dr_agent, guard, stream row ▶ slot ▶ roles, settings ▶ progress row ▶ copy
//!         └──────────────────── failed here: taken back ──────────────────────────────────────┘
//! ```
//!
//! # Invariants
//! - The replica's database holds nothing that is not ours, and that is judged before anything is written ([`super::target`]).
//! - The source's note that a history begins, then stream row, slot, progress row: see [`super`] for what each crash in
//!   between means.
//! - Publication before slot: every transaction that the slot decodes began after the publication
//!   was there.
//! - A start that was killed behind its slot is gone on with at that slot, and the tables are copied at the snapshot of a
//!   temporary one, as they are when a copy is gone on with.
//! - What fails before the progress row leaves both sides as they were ([`super::undo`]).

use std::time::SystemTime;

use tokio_postgres::Client;

use super::error::{SetupError, Side};
use super::replica::{self, Known, Server};
use super::target::{self, HalfLoaded, TargetDatabase};
use super::undo::Undo;
use super::{Setup, lock, role, schema, setting, slot};
use crate::copy::locale::Locale;
use crate::failpoint;
use crate::names::TableName;
use crate::names::history::Cluster;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::replication::{CreatedSlot, ReplicationConnection};
use crate::pg::{ConnInfo, PgError, PgLsn};
use crate::schema::progress::{self, Progress};
use crate::schema::stream::{self, Recorded};
use crate::schema::table_sync;

/// What a first start begins with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Beginning {
    /// No slot that it could go on with.
    Nothing {
        /// There is one to be dropped first.
        drop_slot: bool,
    },
    /// The slot of a start that was interrupted.
    SeenSlot {
        /// Where it begins.
        since: PgLsn,
    },
}

/// The replica's side of a first start: judged, and on its way to be written.
pub(super) struct First {
    admin: Client,
    server: Server,
    target: TargetDatabase,
    /// The replica's database, where it is there already; locked.
    opened: Option<Client>,
    locale: Locale,
    /// An earlier start has begun here.
    interrupted: bool,
    half_loaded: HalfLoaded,
    /// This start has created the database.
    created: bool,
    /// Rows may be there: nothing is taken back any more.
    begun: bool,
}

impl First {
    /// Refuses what is in the way; nothing was written yet.
    pub(super) async fn judge(
        (admin, server): (Client, Server),
        opened: Option<Client>,
        known: &Known,
        (database, stream): (&str, &StreamName),
        (locale, half_loaded): (Locale, HalfLoaded),
    ) -> Result<Self, SetupError> {
        let target = match &opened {
            Some(client) => target::observe(client, &server, stream).await?,
            None => target::of_a_new_database(&admin, &server).await?,
        };
        let first = Self {
            interrupted: known.recorded.is_some(),
            admin,
            server,
            target,
            opened,
            locale,
            half_loaded,
            created: false,
            begun: false,
        };
        let judged = (&first.target, half_loaded);
        target::judge(database, stream, &first.server, known, judged)?;
        Ok(first)
    }

    /// The replica's database, created where it is not there, and locked; and what the operator should know.
    pub(super) async fn database(
        &mut self,
        info: &ConnInfo,
        (database, stream): (&str, &StreamName),
    ) -> Result<(Client, Option<String>), SetupError> {
        if let Some(client) = self.opened.take() {
            return Ok((client, None));
        }
        let created =
            replica::create_database(&self.admin, &self.server, database, &self.locale).await?;
        self.created = created.by_us;
        match self.enter(info, (database, stream)).await {
            Ok(client) => Ok((client, created.warning)),
            Err(error) => {
                if self.created {
                    replica::drop_database(&self.admin, database).await;
                }
                Err(error)
            }
        }
    }

    async fn enter(
        &self,
        info: &ConnInfo,
        (database, stream): (&str, &StreamName),
    ) -> Result<Client, SetupError> {
        let client = replica::open(info, stream).await?;
        lock::take(&client, Side::Replica, stream).await?;
        // Somebody may have been quicker.
        let known = replica::known(&client, stream).await?;
        let target = target::observe(&client, &self.server, stream).await?;
        target::contents(database, stream, &known, (&target, self.half_loaded))?;
        Ok(client)
    }

    /// Leaves the replica as it was found; from the first row on, as it is.
    pub(super) async fn abandon(&self, replica: Client, (database, stream): (&str, &StreamName)) {
        if self.begun {
            return;
        }
        let undo = Undo::of_replica(database, stream, &self.target);
        undo.take_back(&replica, Side::Replica).await;
        drop(replica);
        if self.created {
            replica::drop_database(&self.admin, database).await;
        }
    }

    /// Makes the replica's database ours, read-only for others, and records whose replica it is.
    pub(super) async fn take(
        &self,
        replica: &mut Client,
        (database, stream): (&str, &StreamName),
        recorded: &Recorded,
    ) -> Result<(), SetupError> {
        schema::ensure(replica, &self.server.role).await?;
        replica::guard(replica, database).await?;
        let recorded = stream::record(replica, stream, recorded).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the stream"))
    }

    /// Whether what an interrupted start has left is to be removed.
    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupted
    }

    /// Rows come from here on.
    pub(super) fn begun(&mut self) {
        self.begun = true;
    }
}

impl Setup<'_> {
    pub(super) async fn begin(
        &mut self,
        walsender: &mut ReplicationConnection,
        (source, recorded, from): (&Cluster, Option<Recorded>, Beginning),
        first: &mut First,
    ) -> Result<(Progress, History), SetupError> {
        let of_source = self.source.undo().await?;
        let writing = match (from, recorded) {
            (Beginning::SeenSlot { since }, Some(recorded)) => {
                self.go_on_first(walsender, &recorded, since, first).await
            }
            (Beginning::SeenSlot { .. }, None) => {
                self.write_first(walsender, source, true, first).await
            }
            (Beginning::Nothing { drop_slot }, _) => {
                self.write_first(walsender, source, drop_slot, first).await
            }
        };
        let (snapshot, progress, history) = match writing {
            Ok(written) => written,
            Err(error) => {
                of_source.take_back(&self.source.client, Side::Source).await;
                return Err(error);
            }
        };
        first.begun();
        let published = self.source.wanted.published.clone();
        match snapshot {
            Some(snapshot) => self.copy(published, &snapshot, true).await?,
            None => self.copy_tables(walsender, published, true).await?,
        }
        Ok((progress, history))
    }

    /// Everything before the first row, and the snapshot that it is copied at.
    async fn write_first(
        &mut self,
        walsender: &mut ReplicationConnection,
        source: &Cluster,
        drop_slot: bool,
        first: &mut First,
    ) -> Result<(Option<CreatedSlot>, Progress, History), SetupError> {
        self.source.publish(true).await?;
        let history = slot::begin(&self.source, source).await?;
        let recorded = Recorded {
            cluster: *source,
            began: history.began,
        };
        let place = (self.database, &self.source.stream);
        first.take(&mut self.replica, place, &recorded).await?;
        let copied_at = self.source_time().await?;
        let snapshot = slot::create(&self.source, walsender, drop_slot).await?;
        failpoint::hit("setup:slot-created");
        let since = snapshot.consistent_point;
        let progress = self.first_row(first, since, copied_at).await?;
        Ok((Some(snapshot), progress, history))
    }

    /// What is left of that where an interrupted start has left its slot, which no snapshot belongs to any more.
    async fn go_on_first(
        &mut self,
        walsender: &mut ReplicationConnection,
        recorded: &Recorded,
        since: PgLsn,
        first: &mut First,
    ) -> Result<(Option<CreatedSlot>, Progress, History), SetupError> {
        self.source.publish(true).await?;
        let place = (self.database, &self.source.stream);
        first.take(&mut self.replica, place, recorded).await?;
        slot::make_the_list_known(&self.source, walsender).await?;
        let copied_at = self.source_time().await?;
        let progress = self.first_row(first, since, copied_at).await?;
        Ok((None, progress, recorded.history()))
    }

    /// The same where the slot is somebody else's, up to the progress row.
    pub(super) async fn write_first_rows(
        &mut self,
        walsender: &mut ReplicationConnection,
        recorded: &Recorded,
        first: &mut First,
    ) -> Result<(CreatedSlot, Progress), SetupError> {
        let place = (self.database, &self.source.stream);
        first.take(&mut self.replica, place, recorded).await?;
        let copied_at = self.source_time().await?;
        let snapshot = slot::snapshot(&self.source, walsender).await?;
        let since = snapshot.consistent_point;
        let progress = self.first_row(first, since, copied_at).await?;
        first.begun();
        Ok((snapshot, progress))
    }

    /// Roles and settings of the source, then the progress row: from there on rows are copied. Until the first batch, the loss
    /// at a promotion is counted from `copied_at`.
    async fn first_row(
        &mut self,
        first: &First,
        since: PgLsn,
        copied_at: SystemTime,
    ) -> Result<Progress, SetupError> {
        self.carry_over(first).await?;
        let recorded = self.record_progress(since, copied_at).await;
        recorded.map_err(SetupError::sql(Side::Replica, "record the progress"))
    }

    /// Takes over the source's roles, the database's owner and settings.
    async fn carry_over(&mut self, first: &First) -> Result<(), SetupError> {
        let roles = role::of_source(&self.source.client).await?;
        let refused = role::ensure(&first.admin, &roles).await?;
        self.source.warnings.extend(refused);
        let refused = role::join(&first.admin, &roles).await?;
        self.source.warnings.extend(refused);
        if first.created || first.interrupted {
            let owner = &first.locale.owner;
            replica::own_database(&first.admin, &first.server, self.database, owner).await?;
        }
        let (settings, left) = setting::of_source(&self.source.client, self.database).await?;
        let refused = setting::apply(&self.replica, &settings).await?;
        self.source.warnings.extend(left.into_iter().chain(refused));
        Ok(())
    }

    /// What the source's clock says. Everything committed by then is in the snapshot of a slot that is created afterwards.
    pub(super) async fn source_time(&self) -> Result<SystemTime, SetupError> {
        let asked = self
            .source
            .client
            .query_one("SELECT clock_timestamp()", &[])
            .await;
        asked
            .map(|row| row.get(0))
            .map_err(|error| SetupError::sql(Side::Source, "ask for the time")(error.into()))
    }

    async fn record_progress(
        &mut self,
        consistent_point: PgLsn,
        copied_at: SystemTime,
    ) -> Result<Progress, PgError> {
        let tables: Vec<TableName> = self
            .source
            .wanted
            .published
            .iter()
            .map(|table| table.name.clone())
            .collect();
        let transaction = self.replica.transaction().await?;
        let stream = &self.source.stream;
        let moment = (consistent_point, Some(copied_at));
        let progress = progress::begin(&transaction, stream, 1, moment).await?;
        table_sync::add(&transaction, stream, &tables).await?;
        transaction.commit().await?;
        Ok(progress)
    }
}
