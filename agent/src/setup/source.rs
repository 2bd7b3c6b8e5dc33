//! The source's part of the set-up: what is there, what is missing, and the SQL that adds it.
//!
//! [`observe`] only reads. [`SourceFacts::require`] refuses a server that cannot be tailed;
//! [`SourceFacts::statements`] is what `init --plan` prints and what `init` and `run` execute.
//!
//! # Invariants
//! - Every statement waits for locks at most [`LOCK_TIMEOUT`]: a queue behind our ALTER TABLE
//!   would stop the source's own work.
//! - Keyless tables are settled before a table is published.
//!
//! # What it does not do
//! Slots belong to [`super::prepare`]; what is to be published is decided in
//! [`super::publication`].

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::{SetupError, Side};
use super::lock_table::LockTable;
use super::set_back::Missed;
use super::timeline::{self, Branch};
use crate::catalog::publication::{self, Piece, Publication, Wanted};
use crate::catalog::{self, Table};
use crate::config::Config;
use crate::names::TableName;
use crate::names::history::Cluster;
use crate::names::stream::StreamName;
use crate::pg::{Again, ConnInfo, PgError, PgLsn, Session, connect};
use crate::schema::listing::{self, Listed};
use crate::schema::stream::{self, Recorded};
use crate::schema::table_sync::TableSync;
use crate::schema::{
    clock, coverage, ddl, fingerprint, heartbeat, progress, sending, sequence_state, wanted,
};

/// Schema `dr_agent` with the in-band tables.
pub(super) const SCHEMA_SQL: &str = include_str!("../../sql/source.sql");

/// Those of them that are published: they reach the replica like any other.
const IN_BAND: [&str; 8] = [
    heartbeat::TABLE,
    sequence_state::TABLE,
    listing::TABLE,
    coverage::TABLE,
    clock::TABLE,
    ddl::TABLE,
    fingerprint::TABLE,
    fingerprint::AT,
];

/// Long enough to win against ordinary traffic, short enough that nobody notices who queued behind.
const LOCK_TIMEOUT: &str = "2s";

/// Versions whose logical decoding this program knows.
pub(super) const MAJOR_VERSIONS: std::ops::RangeInclusive<i32> = 14..=18;

/// What the source says about itself and about one of its databases.
#[derive(Debug)]
pub(super) struct SourceFacts {
    pub(super) database: String,
    pub(super) role: String,
    pub(super) version: i32,
    /// `pg_postmaster_start_time()` to recognize the same server under two URLs.
    pub(super) started_at: String,
    wal_level: String,
    in_recovery: bool,
    may_replicate: bool,
    may_create: bool,
    /// Schema `dr_agent` is there, complete or not.
    pub(super) has_namespace: bool,
    locks: LockTable,
    has_schema: bool,
    writes_in_band: bool,
    pub(super) tables: Vec<Table>,
    pub(super) keyed_roots: BTreeSet<TableName>,
    not_owned: BTreeSet<TableName>,
    pub(super) publication: Option<Publication>,
    /// What the published tables are listed as.
    pub(super) listed: Listed,
    /// What `dr_agent.listed` says of it.
    noted: Listed,
    pub(super) owns_publication: bool,
}

/// Opens a set-up session on one database of the source.
pub(super) async fn open(conninfo: &ConnInfo, stream: &StreamName) -> Result<Client, SetupError> {
    let session = Session::new(stream.application_name("setup")).set("lock_timeout", LOCK_TIMEOUT);
    connect(conninfo, &session)
        .await
        .map_err(SetupError::sql(Side::Source, "connect"))
}

/// Reads what there is.
pub(super) async fn observe(
    client: &Client,
    stream: &StreamName,
) -> Result<SourceFacts, SetupError> {
    let mut again = Again::default();
    loop {
        match read(client, stream).await {
            Err(error) if again.after(&error) => {}
            found => return found.map_err(SetupError::sql(Side::Source, "look at the database")),
        }
    }
}

async fn read(client: &Client, stream: &StreamName) -> Result<SourceFacts, PgError> {
    const FACTS: &str = "
        SELECT current_database()::text, current_user::text,
               current_setting('server_version_num')::int, extract(epoch FROM pg_postmaster_start_time())::text,
               current_setting('wal_level'), pg_is_in_recovery(),
               r.rolsuper OR r.rolreplication OR EXISTS (
                    SELECT 1 FROM pg_roles m
                     WHERE m.rolname = 'rds_replication' AND pg_has_role(m.oid, 'MEMBER')),
               has_database_privilege(current_database(), 'CREATE'),
               EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass($1::text) AND attname = 'altered')
               AND to_regclass($3::text) IS NOT NULL
               AND (SELECT bool_and(to_regclass(name) IS NOT NULL) FROM unnest($2::text[]) AS in_band (name)),
               current_setting('max_locks_per_transaction')::bigint, 1
               + current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint
               + coalesce(current_setting('autovacuum_worker_slots', true),
                          current_setting('autovacuum_max_workers'))::bigint
               + current_setting('max_worker_processes')::bigint + current_setting('max_wal_senders')::bigint,
               to_regnamespace('dr_agent') IS NOT NULL
          FROM pg_roles r WHERE r.rolname = current_user";
    const WRITES_IN_BAND: &str = "
        SELECT coalesce(bool_and(has_schema_privilege(n.oid, 'USAGE')
                   AND has_table_privilege(c.oid, 'INSERT')
                   AND has_table_privilege(c.oid, 'UPDATE')
                   AND has_table_privilege(c.oid, 'DELETE')), true)
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname || '.' || c.relname = ANY ($1::text[])";
    const NOT_OWNED: &str = "
        SELECT n.nspname, c.relname
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p') AND NOT pg_has_role(c.relowner, 'USAGE')
           AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'";
    let facts = client
        .query_one(
            FACTS,
            &[&sending::TABLE, &IN_BAND.as_slice(), &wanted::TABLE],
        )
        .await?;
    let version = facts.get(2);
    let number = |column| usize::try_from(facts.get::<_, i64>(column)).unwrap_or(1);
    let locks = LockTable {
        per_transaction: number(9),
        transactions: number(10),
    };
    let found = read_publication(client, stream, version).await?;
    let (publication, owns_publication) = found.unzip();
    Ok(SourceFacts {
        database: facts.get(0),
        role: facts.get(1),
        version,
        started_at: facts.get(3),
        wal_level: facts.get(4),
        in_recovery: facts.get(5),
        may_replicate: facts.get(6),
        may_create: facts.get(7),
        locks,
        has_schema: facts.get(8),
        has_namespace: facts.get(11),
        writes_in_band: client
            .query_one(WRITES_IN_BAND, &[&IN_BAND.as_slice()])
            .await?
            .get(0),
        // Without sizes: whoever has a table locked would be waited for.
        tables: catalog::tables(client).await?,
        keyed_roots: catalog::keyed_roots(client).await?,
        not_owned: names(client, NOT_OWNED).await?,
        publication,
        listed: listing::read(client, stream).await?,
        noted: listing::noted(client, stream).await?,
        owns_publication: owns_publication.unwrap_or(true),
    })
}

/// The publication, and whether this role owns it.
async fn read_publication(
    client: &Client,
    stream: &StreamName,
    version: i32,
) -> Result<Option<(Publication, bool)>, PgError> {
    const PUBLICATION: &str = "
        SELECT puballtables,
               pubinsert AND pubupdate AND pubdelete AND pubtruncate AND NOT pubviaroot,
               pg_has_role(pubowner, 'USAGE'), oid,
               coalesce(to_jsonb(p) ->> 'pubgencols' <> 's', false)
          FROM pg_publication p WHERE pubname = $1";
    let Some(row) = client.query_opt(PUBLICATION, &[&stream.as_str()]).await? else {
        return Ok(None);
    };
    let oid: u32 = row.get(3);
    let (filter, schemas) = if version >= 150_000 {
        (
            "r.prqual IS NOT NULL OR r.prattrs IS NOT NULL",
            "EXISTS (SELECT 1 FROM pg_publication_namespace WHERE pnpubid = $1)",
        )
    } else {
        ("false", "$1::oid IS NULL")
    };
    let listed = format!(
        "SELECT n.nspname, c.relname, {filter}
           FROM pg_publication_rel r
           JOIN pg_class c ON c.oid = r.prrelid
           JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE r.prpubid = $1"
    );
    let mut publication = Publication {
        all_tables: row.get(0),
        options_sound: row.get(1),
        hides_generated: row.get(4),
        schemas: client
            .query_one(&format!("SELECT {schemas}"), &[&oid])
            .await?
            .get(0),
        ..Publication::default()
    };
    for listed in client.query(&listed, &[&oid]).await? {
        let name = TableName {
            schema: listed.get(0),
            name: listed.get(1),
        };
        if listed.get(2) {
            publication.filtered.insert(name);
        } else {
            publication.units.insert(name);
        }
    }
    Ok(Some((publication, row.get(2))))
}

async fn names(client: &Client, sql: &str) -> Result<BTreeSet<TableName>, PgError> {
    let rows = client.query(sql, &[]).await?;
    Ok(rows.iter().map(TableName::of).collect())
}

impl SourceFacts {
    /// Refuses a server that cannot be tailed by this role.
    pub(super) fn require(&self) -> Result<(), SetupError> {
        let unfit = |what: String, hint: &str| {
            Err(SetupError::Unfit {
                side: Side::Source,
                what,
                hint: hint.to_owned(),
            })
        };
        let major = self.version / 10_000;
        if !MAJOR_VERSIONS.contains(&major) {
            return unfit(
                format!("PostgreSQL {major} is not supported"),
                "this version of dr-agent knows PostgreSQL 14 to 18",
            );
        }
        if self.in_recovery {
            let side = Side::Source;
            return Err(SetupError::InRecovery { side });
        }
        if self.wal_level != "logical" {
            return unfit(
                format!(
                    "wal_level is {}, logical decoding needs logical",
                    self.wal_level
                ),
                "run ALTER SYSTEM SET wal_level = 'logical' on the source and restart it",
            );
        }
        if !self.may_replicate {
            return Err(SetupError::RightMissing {
                side: Side::Source,
                role: self.role.clone(),
                what: "use a replication slot".to_owned(),
                right: format!(
                    "the attribute REPLICATION (ALTER ROLE {} REPLICATION)",
                    self.role
                ),
            });
        }
        Ok(())
    }

    /// Refuses a copy of that many tables for which the server's lock table has no room beside everybody else's locks.
    pub(super) fn require_room_to_copy(&self, tables: usize) -> Result<(), SetupError> {
        match self.locks.lacks(tables) {
            None => Ok(()),
            Some(wanted) => Err(SetupError::Unfit {
                side: Side::Source,
                what: format!(
                    "max_locks_per_transaction = {} gives its lock table no room for a copy of {tables} tables",
                    self.locks.per_transaction
                ),
                hint: format!(
                    "each is locked twice while the schema is read, and without room the application's own transactions would \
                     fail: ALTER SYSTEM SET max_locks_per_transaction = {wanted}, and restart the server"
                ),
            }),
        }
    }

    /// Refuses a publication of our name that can never list exactly what we choose.
    pub(super) fn require_listing(&self, stream: &StreamName) -> Result<(), SetupError> {
        match &self.publication {
            Some(publication) if publication.all_tables || publication.schemas => {
                let what = publication.defect().unwrap_or("it lists something else");
                Err(SetupError::Unfit {
                    side: Side::Source,
                    what: format!("publication \"{stream}\" is there already, and is not ours: {what}"),
                    hint: "give source.slot another name, or drop that publication if nobody subscribes to it".to_owned(),
                })
            }
            _ => Ok(()),
        }
    }

    /// Refuses a publication under which a running stream may have missed changes.
    pub(super) fn require_unaltered(&self, stream: &StreamName) -> Result<(), SetupError> {
        let defect = match &self.publication {
            None => Some("it is gone"),
            Some(publication) => publication.defect(),
        };
        match defect {
            None => Ok(()),
            Some(what) => Err(SetupError::PublicationAltered {
                publication: stream.to_string(),
                what: what.to_owned(),
            }),
        }
    }

    /// The tables that are to be published, were copied, and are not published, or are since they were
    /// not: somebody took them off the list, detached or re-created them, and their changes were missed.
    pub(super) fn missed(
        &self,
        wanted: &Wanted,
        rows: &[TableSync],
    ) -> BTreeMap<TableName, Missed> {
        let nothing = Publication::default();
        let publication = self.publication.as_ref().unwrap_or(&nothing);
        let of = |table: &Table| {
            let row = rows
                .iter()
                .find(|row| row.held && row.table == table.name)?;
            let now = self.listed.get(&table.name);
            if !row.copied.is_of(table.oid) || row.another {
                Some(Missed::All)
            } else if !publication.publishes(table) || !row.copied.is_listed_as(now) {
                Some(Missed::Changes)
            } else {
                None
            }
        };
        let published = wanted.published.iter();
        published
            .filter_map(|table| Some((table.name.clone(), of(table)?)))
            .collect()
    }

    /// What becomes of every table under `config`.
    pub(super) fn wanted(&self, config: &Config) -> Wanted {
        Wanted::of(&self.tables, &self.keyed_roots, config)
    }

    /// The units that would have to be altered or listed and are not this role's.
    pub(super) fn not_ours(&self, wanted: &Wanted) -> BTreeSet<TableName> {
        let nothing = Publication::default();
        self.publication
            .as_ref()
            .unwrap_or(&nothing)
            .missing(wanted)
            .chain(&wanted.identity_full)
            .filter(|unit| self.not_owned.contains(*unit))
            .cloned()
            .collect()
    }

    /// Everything that is missing, in order; or the right that is.
    pub(super) fn pieces(
        &self,
        stream: &StreamName,
        wanted: &Wanted,
    ) -> Result<Vec<Piece>, SetupError> {
        let lacks = |what: &str, right: String| {
            Err(SetupError::RightMissing {
                side: Side::Source,
                role: self.role.clone(),
                what: what.to_owned(),
                right,
            })
        };
        let create_right = || format!("CREATE on database {}", self.database);
        if !self.has_schema && !self.may_create {
            return lacks("create schema dr_agent", create_right());
        }
        if !self.writes_in_band {
            return lacks(
                "write the in-band tables",
                "INSERT, UPDATE and DELETE on the tables of schema dr_agent".to_owned(),
            );
        }
        let foreign = self.not_ours(wanted);
        if !foreign.is_empty() {
            return Err(SetupError::NotOwner {
                role: self.role.clone(),
                tables: foreign.into_iter().collect(),
            });
        }
        if self.publication.is_none() && !self.may_create {
            return lacks("create the publication", create_right());
        }
        let missing = publication::pieces(
            stream,
            self.publication.as_ref(),
            wanted,
            self.version,
            self.locks.at_once(),
        );
        let is_altered = missing.iter().any(|piece| !matches!(piece, Piece::Full(_)));
        if is_altered && !self.owns_publication {
            return Err(self.publication_is_not_ours(stream));
        }
        let mut pieces = Vec::new();
        if !self.has_schema {
            pieces.push(Piece::Statement(SCHEMA_SQL.to_owned()));
        }
        if !self.has_schema || !is_altered && self.listed != self.noted {
            // Of a publication that is there already: nothing was missed.
            pieces.push(Piece::Statement(listing::note(stream)));
        }
        pieces.extend(missing);
        Ok(pieces)
    }

    /// What is said in every transaction that alters the publication: what is not published in between must not look
    /// published.
    pub(super) fn said(&self, stream: &StreamName) -> Vec<String> {
        let mut said = vec![listing::note(stream)];
        if self.forgets_publication_changes() {
            said.push(sending::list_is_new(stream));
        }
        said
    }

    /// Only its owner may alter a publication.
    pub(super) fn publication_is_not_ours(&self, stream: &StreamName) -> SetupError {
        SetupError::RightMissing {
            side: Side::Source,
            role: self.role.clone(),
            what: "alter the publication".to_owned(),
            right: format!("ownership of publication {stream}"),
        }
    }

    /// Whether decoders of this version may go on with what they knew of a publication before it was
    /// altered.
    ///
    /// Until the minor releases of May 2025, a transaction that was open while a table was added
    /// makes the decoder remember that table as unpublished, for later transactions too
    /// (PostgreSQL 17.5 release notes, "Avoid data loss when DDL operations that don't take a strong
    /// lock affect tables that are being logically replicated").
    pub(super) fn forgets_publication_changes(&self) -> bool {
        match self.version / 10_000 {
            14 => self.version < 140_018,
            15 => self.version < 150_013,
            16 => self.version < 160_009,
            17 => self.version < 170_005,
            _ => false,
        }
    }
}

/// Refuses a source without room for the stream's slot and for the temporary one that exports a snapshot. Temporary slots of
/// others do not count: they go by themselves.
pub(super) async fn require_slots(client: &Client, stream: &StreamName) -> Result<(), SetupError> {
    const ROOM: &str = "
        SELECT current_setting('max_replication_slots')::int,
               (SELECT count(*) FROM pg_replication_slots WHERE NOT temporary AND slot_name <> $1)::int";
    let row = client
        .query_typed_one(ROOM, &[(&stream.as_str(), Type::TEXT)])
        .await
        .map_err(|error| SetupError::sql(Side::Source, "count the slots")(error.into()))?;
    let (all, taken): (i32, i32) = (row.get(0), row.get(1));
    if all - taken >= 2 {
        return Ok(());
    }
    Err(SetupError::Unfit {
        side: Side::Source,
        what: format!("{taken} of {all} replication slots are taken, and two more are needed"),
        hint: format!(
            "raise max_replication_slots on the source to at least {} and restart it, or drop slots that nobody uses",
            taken + 2
        ),
    })
}

/// Refuses a source that is itself a replica, and was not promoted: its agent writes there, and nobody else may.
pub(super) async fn refuse_replica(client: &Client) -> Result<(), SetupError> {
    let streams = progress::replicated(client).await;
    let streams = streams.map_err(SetupError::sql(Side::Source, "look for schema dr_agent"))?;
    match streams.is_empty() {
        true => Ok(()),
        false => Err(SetupError::SourceIsReplica { streams }),
    }
}

/// Who the source is, and where its WAL stands: what IDENTIFY_SYSTEM says, for a role that need not replicate.
pub(super) async fn identify(client: &Client) -> Result<(Cluster, PgLsn), SetupError> {
    const WHO: &str = "
        SELECT (SELECT system_identifier::text FROM pg_control_system()),
               ('x' || left(pg_walfile_name(pg_current_wal_flush_lsn()), 8))::bit(32)::int,
               pg_current_wal_flush_lsn()";
    let asking = SetupError::sql(Side::Source, "identify the system");
    let row = match client.query_one(WHO, &[]).await {
        Ok(row) => row,
        Err(error) => return Err(asking(error.into())),
    };
    let cluster = stream::cluster(&row).map_err(asking)?;
    Ok((cluster, row.get(2)))
}

/// How the source's timeline came about, where it is later than what was recorded; unknown to a role that may not read the file.
pub(super) async fn branches(
    client: &Client,
    now: &Cluster,
    recorded: Option<&Recorded>,
) -> Result<Vec<Branch>, SetupError> {
    const HISTORY: &str = "
        SELECT pg_read_file('pg_wal/' || lpad(upper(to_hex($1::int)), 8, '0') || '.history', 0, 1000000, true)";
    if !recorded.is_some_and(|recorded| recorded.cluster.is_promoted(now)) {
        return Ok(Vec::new());
    }
    let read = client.query_one(HISTORY, &[&now.timeline]).await;
    let content: Option<String> = read.ok().and_then(|row| row.get(0));
    Ok(content
        .map(|content| timeline::parse(&content))
        .unwrap_or_default())
}

/// Who owns what the agent has to be able to alter.
#[derive(Debug, Default)]
pub(super) struct Owners {
    pub(super) schema: Option<String>,
    pub(super) publication: Option<String>,
}

/// Reads the owners of schema `dr_agent` and of the publication.
pub(super) async fn owners(client: &Client, stream: &StreamName) -> Result<Owners, PgError> {
    const SQL: &str = "
        SELECT (SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace
                 WHERE nspname = 'dr_agent'),
               (SELECT pg_get_userbyid(pubowner)::text FROM pg_publication WHERE pubname = $1)";
    let row = client.query_one(SQL, &[&stream.as_str()]).await?;
    Ok(Owners {
        schema: row.get(0),
        publication: row.get(1),
    })
}

/// Runs statements in order, each by itself.
pub(super) async fn execute(
    client: &Client,
    side: Side,
    statements: &[String],
) -> Result<(), SetupError> {
    for statement in statements {
        client
            .batch_execute(statement)
            .await
            .map_err(|error| SetupError::sql(side, &title(statement))(error.into()))?;
    }
    Ok(())
}

/// The first line of a statement that is none of its comments, shortened.
pub(super) fn title(statement: &str) -> String {
    let line = statement
        .lines()
        .find(|line| !line.is_empty() && !line.starts_with("--") && *line != "BEGIN;")
        .unwrap_or_default();
    match line.char_indices().nth(100) {
        Some((at, _)) => format!("{} …", &line[..at]),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::listing::{Copied, ListedAs};

    fn observed() -> SourceFacts {
        SourceFacts {
            database: "app".to_owned(),
            role: "dr".to_owned(),
            version: 170_006,
            started_at: String::new(),
            wal_level: "logical".to_owned(),
            in_recovery: false,
            may_replicate: true,
            may_create: true,
            locks: LockTable {
                per_transaction: 64,
                transactions: 122,
            },
            has_namespace: true,
            has_schema: true,
            writes_in_band: true,
            tables: Vec::new(),
            keyed_roots: BTreeSet::new(),
            not_owned: BTreeSet::new(),
            publication: None,
            listed: Listed::new(),
            noted: Listed::new(),
            owns_publication: true,
        }
    }

    #[test]
    fn a_source_that_cannot_be_tailed_is_refused_with_the_remedy() {
        assert!(observed().require().is_ok());
        let mut low = observed();
        low.wal_level = "replica".to_owned();
        let hint = crate::error::Classify::hint(&low.require().unwrap_err()).unwrap();
        assert!(hint.contains("ALTER SYSTEM SET wal_level = 'logical'"));
        for version in [130_020, 190_000] {
            let mut old = observed();
            old.version = version;
            assert!(old.require().is_err());
        }
        let mut standby = observed();
        standby.in_recovery = true;
        assert!(standby.require().is_err());
        let mut role = observed();
        role.may_replicate = false;
        let text = role.require().unwrap_err().to_string();
        assert!(text.contains("ALTER ROLE dr REPLICATION"), "{text}");
    }

    #[test]
    fn a_missing_right_is_named_before_anything_is_changed() {
        let stream = StreamName::new("dr_agent", "app");
        let mut wanted = Wanted::default();
        wanted.units.insert(TableName {
            schema: "public".to_owned(),
            name: "t".to_owned(),
        });
        let mut seen = observed();
        seen.may_create = false;
        let error = seen.pieces(&stream, &wanted).unwrap_err();
        assert!(error.to_string().contains("CREATE on database app"));
        let mut seen = observed();
        seen.not_owned = wanted.units.clone();
        let error = seen.pieces(&stream, &wanted).unwrap_err();
        assert!(matches!(error, SetupError::NotOwner { .. }));
        // Listed already: nothing to own.
        seen.publication = Some(Publication {
            options_sound: true,
            units: wanted.units.clone(),
            ..Publication::default()
        });
        assert_eq!(seen.pieces(&stream, &wanted).unwrap(), []);
    }

    #[test]
    fn what_a_table_is_listed_as_is_noted_together_with_its_listing_and_whenever_it_changed() {
        let stream = StreamName::new("dr_agent", "app");
        let table = TableName {
            schema: "public".to_owned(),
            name: "t".to_owned(),
        };
        let mut wanted = Wanted::default();
        wanted.units.insert(table.clone());
        let mut seen = observed();
        let note = Piece::Statement(listing::note(&stream));
        let pieces = seen.pieces(&stream, &wanted).unwrap();
        let said = seen.said(&stream);
        assert_eq!(said, [listing::note(&stream)]);
        for (piece, begins) in pieces
            .iter()
            .zip(["BEGIN;\nCREATE PUBLICATION", "BEGIN;\nALTER PUBLICATION"])
        {
            let sql = piece.sql(&said);
            assert!(sql.starts_with(begins), "{sql}");
            assert!(sql.ends_with(&format!(";\n{};\nCOMMIT", said[0])), "{sql}");
        }
        seen.publication = Some(Publication {
            options_sound: true,
            units: wanted.units.clone(),
            ..Publication::default()
        });
        let listed_as = ListedAs::new("7:70".to_owned());
        seen.listed.insert(table, listed_as);
        let pieces = seen.pieces(&stream, &wanted).unwrap();
        assert_eq!(pieces, std::slice::from_ref(&note));
        seen.noted = seen.listed.clone();
        assert!(seen.pieces(&stream, &wanted).unwrap().is_empty());
        // What an earlier version has published was not missed.
        seen.has_schema = false;
        let pieces = seen.pieces(&stream, &wanted).unwrap();
        assert_eq!(pieces, [Piece::Statement(SCHEMA_SQL.to_owned()), note]);
    }

    #[test]
    fn what_was_copied_is_missed_when_it_is_not_listed_any_more_or_as_something_else() {
        let name = |name: &str| TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        };
        let row = |table: &str, held, listed_as: Option<&str>| TableSync {
            table: name(table),
            ready: held,
            held,
            another: table == "dropped_here",
            noted: true,
            copied: Copied {
                snapshot_lsn: None,
                listed_as: listed_as.map(|text| ListedAs::new(text.to_owned())),
            },
        };
        let tables = [
            "same",
            "unlisted",
            "relisted",
            "another",
            "unrecorded",
            "pending",
            "dropped_here",
        ];
        let mut seen = observed();
        let mut publication = Publication::default();
        for table in tables {
            let listed_as = ListedAs::new("7:70".to_owned());
            seen.listed.insert(name(table), listed_as);
            publication.units.insert(name(table));
        }
        publication.units.remove(&name("unlisted"));
        seen.publication = Some(publication);
        let wanted = Wanted {
            published: tables.map(|table| testing_table(name(table))).to_vec(),
            ..Wanted::default()
        };
        let rows = [
            row("same", true, Some("7:70")),
            row("unlisted", true, Some("7:70")),
            row("relisted", true, Some("7:69")),
            row("another", true, Some("8:70")),
            row("unrecorded", true, None),
            row("dropped_here", true, Some("7:70")),
            row("pending", false, Some("7:69")),
        ];
        let missed = seen.missed(&wanted, &rows);
        let expected = [
            (name("another"), Missed::All),
            (name("dropped_here"), Missed::All),
            (name("relisted"), Missed::Changes),
            (name("unlisted"), Missed::Changes),
        ];
        assert_eq!(missed, BTreeMap::from(expected));
    }

    fn testing_table(name: TableName) -> Table {
        Table {
            virtual_generated: false,
            generated_key: false,
            oid: 7,
            root: name.clone(),
            name,
            identity: catalog::Identity::Key,
            unlogged: false,
            of_extension: false,
        }
    }

    #[test]
    fn titles_of_statements_skip_comments() {
        assert_eq!(title("BEGIN;\nALTER x;\nCOMMIT"), "ALTER x;");
        assert_eq!(title("-- why\nCREATE SCHEMA x;\nmore"), "CREATE SCHEMA x;");
    }
}
