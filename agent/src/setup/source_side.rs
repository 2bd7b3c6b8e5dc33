//! The source's side of a set-up: its sessions, what was found there, and what is done there.
//!
//! Under route `direct` one agent sets both sides up ([`super::prepare`]); under route `kinesis` `run` has only this
//! one.
//!
//! # Invariants
//! - A table that cannot be published, because nobody has settled its key or this role does not own it, stays out and
//!   is reported; it does not stop the protection of all the others.

use std::collections::BTreeSet;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::capture;
use super::error::{SetupError, Side};
use super::identity::SeenSlot;
use super::publishing::Publishing;
use super::source;
use super::timeline::{self, Branch};
use super::undo::Undo;
use crate::catalog::Protection;
use crate::catalog::publication::Piece;
use crate::catalog::publication::Wanted;
use crate::config::{Config, Ddl, TablePattern};
use crate::copy::export;
use crate::copy::locale::{self, Locale};
use crate::names::TableName;
use crate::names::history::Cluster;
use crate::names::stream::StreamName;
use crate::pg::replication::ReplicationConnection;
use crate::pg::{ConnInfo, PgError, PgLsn, slot};
use crate::schema::sending::{self, Note};
use crate::schema::wanted;

/// One database of the source, while it is set up.
pub(super) struct SourceSide<'a> {
    pub(super) config: &'a Config,
    pub(super) stream: StreamName,
    pub(super) info: ConnInfo,
    pub(super) client: Client,
    pub(super) found: source::SourceFacts,
    pub(super) wanted: Wanted,
    /// Tables that are to be published and cannot be now.
    pub(super) left_out: u64,
    pub(super) warnings: Vec<String>,
    pub(super) cancel: &'a CancellationToken,
}

impl<'a> SourceSide<'a> {
    /// Looks at the database; refuses a server that cannot be tailed.
    pub(super) async fn open(
        config: &'a Config,
        database: &str,
        cancel: &'a CancellationToken,
    ) -> Result<Self, SetupError> {
        let stream = config.stream(database);
        let info = config.source.conninfo.with_dbname(database);
        let client = source::open(&info, &stream).await?;
        let found = source::observe(&client, &stream).await?;
        found.require()?;
        Ok(Self {
            wanted: found.wanted(config),
            config,
            stream,
            info,
            client,
            found,
            left_out: 0,
            warnings: Vec::new(),
            cancel,
        })
    }

    /// A session that can create slots and export snapshots.
    pub(super) async fn walsender(&self) -> Result<ReplicationConnection, SetupError> {
        export::session(&self.info, self.stream.application_name("setup"))
            .await
            .map_err(SetupError::sql(
                Side::Source,
                "open a replication connection",
            ))
    }

    /// The stream's slot, if it is there.
    pub(super) async fn slot(&self) -> Result<Option<SeenSlot>, SetupError> {
        observe_slot(&self.client, &self.stream).await
    }

    /// What the source remembers of the stream's slot.
    pub(super) async fn note(&self) -> Result<Option<Note>, SetupError> {
        note(&self.client, &self.stream).await
    }

    /// Refuses what a first start cannot do; nothing was written yet.
    pub(super) async fn judge(&self) -> Result<(), SetupError> {
        let refused = self.wanted.refused();
        if !refused.is_empty() {
            return Err(SetupError::Keyless(refused));
        }
        self.found.require_listing(&self.stream)?;
        let tables = self.wanted.published.len();
        self.found.require_room_to_copy(tables)?;
        self.found.pieces(&self.stream, &self.wanted)?;
        if !self.found.owns_publication {
            return Err(self.found.publication_is_not_ours(&self.stream));
        }
        source::refuse_replica(&self.client).await?;
        source::require_slots(&self.client, &self.stream).await
    }

    /// What a first start takes back when it fails; asked before it writes.
    pub(super) async fn undo(&self) -> Result<Undo, SetupError> {
        Undo::of_source(&self.client, &self.stream, &self.found, &self.wanted).await
    }

    /// How the database orders and classifies characters, and whose it is.
    pub(super) async fn locale(&self) -> Result<Locale, SetupError> {
        locale::locale(&self.client, self.found.version)
            .await
            .map_err(SetupError::sql(Side::Source, "read the locale"))
    }

    /// Brings the source's schema and publication to what is wanted. A table that is gone meanwhile is left out. So is, unless
    /// everything `must` be listed, one that cannot be listed now, because somebody has it locked or for any other reason: it is
    /// said, and tried again with the next look.
    pub(super) async fn publish(&mut self, must: bool) -> Result<(), SetupError> {
        self.rest_of_publishing(must).await?;
        self.capture().await
    }

    /// Has the source's commands written down, if this role may see to it.
    async fn capture(&mut self) -> Result<(), SetupError> {
        let doing = "look at the event triggers that write DDL down";
        let facts = capture::observe(&self.client).await;
        let facts = facts.map_err(SetupError::sql(Side::Source, doing))?;
        let ddl = self.config.source.ddl;
        self.warnings.extend(facts.warning(ddl));
        let source = &self.config.source;
        let exclude: Vec<String> = source.exclude.iter().map(TablePattern::like).collect();
        let keyless = source.keyless.as_str();
        let writing = match ddl {
            Ddl::Replicate => wanted::write(&self.client, &self.stream, keyless, &exclude).await,
            Ddl::Off => wanted::remove(&self.client, &self.stream).await,
        };
        if let Err(error) = writing {
            self.warnings.push(format!(
                "new tables are not published as they are created, and are copied a moment later: {error}"
            ));
        }
        let Some(statement) = facts.statement(ddl) else {
            return Ok(());
        };
        // The stream goes on without, and says so.
        if let Err(error) = self.client.batch_execute(&statement).await {
            let error = PgError::from(error);
            self.warnings.push(format!(
                "the event triggers that write DDL down cannot be installed: {error}; it is tried again"
            ));
            self.client
                .batch_execute("ROLLBACK")
                .await
                .map_err(|error| SetupError::sql(Side::Source, doing)(error.into()))?;
        }
        Ok(())
    }

    async fn rest_of_publishing(&mut self, must: bool) -> Result<(), SetupError> {
        let publishing = Publishing {
            client: &self.client,
            must,
        };
        let full = self.found.pieces(&self.stream, &self.wanted)?;
        let full = full
            .into_iter()
            .filter(|piece| matches!(piece, Piece::Full(_)));
        let said = self.found.said(&self.stream);
        let mut left_out = publishing.run(full.collect(), &said).await?;
        let failed: BTreeSet<TableName> = left_out.keys().cloned().collect();
        let (tables, roots) = (&self.found.tables, &self.found.keyed_roots);
        self.wanted.without_identity(&failed, tables, roots);
        let mut rest = self.found.pieces(&self.stream, &self.wanted)?;
        rest.retain(|piece| !matches!(piece, Piece::Full(_)));
        left_out.extend(publishing.run(rest, &said).await?);
        self.left_out += left_out.len() as u64;
        for (table, why) in left_out {
            self.warnings.push(format!(
                "{table} cannot be published now, it is tried again: {why}"
            ));
        }
        // The in-band tables may be new; they are copied like any other.
        self.look_again().await
    }

    /// Reads what is there anew, and goes by what is published, which is what comes in the stream. A position that is to be
    /// older than the list of tables is asked for before.
    pub(super) async fn look_again(&mut self) -> Result<(), SetupError> {
        self.found = source::observe(&self.client, &self.stream).await?;
        if let Some(publication) = &self.found.publication {
            self.wanted.published = self.found.tables.clone();
            self.wanted
                .published
                .retain(|table| publication.publishes(table) && !table.unlogged);
        }
        Ok(())
    }

    /// Refuses while changes of a table may not come although it is published: what is copied now could lack them.
    pub(super) async fn require_known_list(&self) -> Result<(), SetupError> {
        match is_listing(&self.client, &self.stream).await? {
            true => Err(SetupError::ListIsNew {
                publication: self.stream.to_string(),
            }),
            false => Ok(()),
        }
    }

    pub(super) fn leave_out_what_cannot_be_published(&mut self) {
        let refused: BTreeSet<TableName> = self.wanted.refused().into_iter().collect();
        if !refused.is_empty() {
            self.warnings.push(format!(
                "not protected, because they have no key and source.keyless is \"refuse\": {}",
                names(&refused)
            ));
        }
        let foreign = self.found.not_ours(&self.wanted);
        if foreign.is_empty() {
            return;
        }
        let left_out: BTreeSet<TableName> = self.wanted.leave_out(&foreign).into_iter().collect();
        self.left_out += left_out.len() as u64;
        self.warnings.push(format!(
            "not protected, because role \"{}\" does not own them and may not publish them; run \
             `dr-agent init --source-url URL` with a role that may: {}",
            self.found.role,
            names(&left_out)
        ));
        self.wanted.unpublished.extend(
            left_out
                .into_iter()
                .map(|name| (name, Protection::Excluded)),
        );
    }
}

/// A stream's slot, if it is there.
pub(super) async fn observe_slot(
    client: &Client,
    stream: &StreamName,
) -> Result<Option<SeenSlot>, SetupError> {
    let state = slot::slot_state(client, stream.as_str())
        .await
        .map_err(SetupError::sql(Side::Source, "look at the slot"))?;
    Ok(state.map(SeenSlot::from))
}

/// Who the source is, and where its WAL stands.
pub(super) async fn identify(
    walsender: &mut ReplicationConnection,
) -> Result<(Cluster, PgLsn), SetupError> {
    let identity = walsender
        .identify_system()
        .await
        .map_err(SetupError::sql(Side::Source, "identify the system"))?;
    let cluster = Cluster {
        system_identifier: identity.system_identifier,
        timeline: identity.timeline,
    };
    Ok((cluster, identity.xlogpos))
}

/// How a timeline of the source came about; unknown where its history file is gone.
pub(super) async fn branches(
    walsender: &mut ReplicationConnection,
    timeline: i32,
) -> Result<Vec<Branch>, SetupError> {
    match walsender.timeline_history(timeline).await {
        Ok(content) => Ok(timeline::parse(&content)),
        // undefined_file
        Err(error) if error.sqlstate() == Some("58P01") => Ok(Vec::new()),
        Err(error) => Err(SetupError::sql(Side::Source, "read the timeline's history")(error)),
    }
}

pub(super) fn names<'t>(tables: impl IntoIterator<Item = &'t TableName>) -> String {
    tables
        .into_iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// What the source remembers of the stream's slot.
pub(super) async fn note(client: &Client, stream: &StreamName) -> Result<Option<Note>, SetupError> {
    let note = sending::read(client, stream).await;
    note.map_err(SetupError::sql(
        Side::Source,
        "read what is noted of the slot",
    ))
}

/// Whether the publication was altered, and decoding may not go by it yet.
pub(super) async fn is_listing(client: &Client, stream: &StreamName) -> Result<bool, SetupError> {
    let noted = note(client, stream).await?;
    Ok(noted.is_some_and(|noted| noted.listing))
}
