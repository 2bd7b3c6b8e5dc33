//! The source: the server as a whole, then each of its databases.
//!
//! Asks, and hands what it learned to the judges (`settings`, `publication`, `slot`); keeps what the
//! comparison with the replica needs.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::finding::{Finding, FindingPlace, FindingSide, Severity, counted, some_of};
use super::publication::{self, PublicationFacts};
use super::server::{self, DatabaseFacts, ServerFacts, SlotFacts};
use super::settings;
use super::shape::{self, Shapes};
use super::slot::{self, NotedSlot};
use super::startable::{self, Feature};
use super::{note_failure, open, pair};
use crate::catalog::publication::{Wanted, in_band_tables};
use crate::catalog::{self, Protection, Table};
use crate::config::{Config, Databases, Ddl, Route};
use crate::error::{Classify as _, chain};
use crate::names::TableName;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::PgLsn;
use crate::pg::quote::quote_ident;
use crate::pg::replication::ReplicationConnection;
use crate::pg::{ConnInfo, PgError, Session};
use crate::schema::{heartbeat, sending};
use crate::setup;
use crate::watch::coverage;
use crate::watch::{self, waits};

/// What was learned of the source server.
#[derive(Debug)]
pub(super) struct SourceFacts {
    /// The server.
    pub(super) server: ServerFacts,
    /// Every slot on it.
    pub(super) slots: Vec<SlotFacts>,
    /// Every database of it.
    pub(super) databases: Vec<DatabaseFacts>,
    /// The databases the configuration selects, whether they are there or not.
    pub(super) selected: Vec<String>,
    /// Roles that applications use.
    pub(super) roles: Vec<String>,
}

/// What was learned of one database of the source.
#[derive(Debug, Default)]
pub(super) struct SourceDatabase {
    /// Tables as the catalog sorts them.
    pub(super) tables: Vec<Table>,
    /// What their rows look like.
    pub(super) shapes: Shapes,
    /// Installed extensions and their versions.
    pub(super) extensions: Vec<(String, String)>,
    /// What becomes of every table.
    pub(super) wanted: Wanted,
    /// Whether our publication is there.
    pub(super) has_publication: bool,
    /// Where the server's WAL ended when this was read.
    pub(super) wal_end: Option<PgLsn>,
    /// Under route `kinesis`: since when it has been sent.
    pub(super) noted: Option<NotedSlot>,
    /// What it has that came with a newer version than the oldest.
    pub(super) features: Vec<Feature>,
    /// Relations that `pg_dump` locks, and those that its schema creates.
    pub(super) relations: (i64, i64),
}

/// Looks at the server. `None` when it cannot be reached; the findings say why.
pub(super) async fn server(config: &Config, findings: &mut Vec<Finding>) -> Option<SourceFacts> {
    let at = FindingPlace::server(FindingSide::Source);
    let name = format!("{APPLICATION_PREFIX}check");
    let client = match open::session(&at, &config.source.conninfo, &name).await {
        Ok(client) => client,
        Err(finding) => {
            findings.push(finding);
            return None;
        }
    };
    findings.push(at.ok("connect", format!("{} answers", config.source.conninfo)));
    let server = note_failure(
        &at,
        "read the server's settings",
        findings,
        server::server(&client),
    )
    .await?;
    let slots = note_failure(&at, "read the slots", findings, server::slots(&client))
        .await
        .unwrap_or_default();
    let databases = note_failure(
        &at,
        "list the databases",
        findings,
        server::databases(&client),
    )
    .await
    .unwrap_or_default();
    let roles = note_failure(&at, "list the roles", findings, server::roles(&client))
        .await
        .unwrap_or_default();
    let selected = match &config.source.databases {
        Databases::List(names) => names.clone(),
        Databases::All => note_failure(
            &at,
            "select the databases",
            findings,
            catalog::databases(&client),
        )
        .await
        .unwrap_or_default(),
    };

    findings.extend(settings::version(&at, &server));
    findings.extend(startable::output_plugin(&at, &server));
    findings.push(settings::selected(&at, &selected));
    let walsenders = note_failure(
        &at,
        "count walsenders",
        findings,
        server::walsenders(&client),
    );
    if let Some(walsenders) = walsenders.await {
        let streams: Vec<String> = selected
            .iter()
            .map(|database| config.stream(database).to_string())
            .collect();
        findings.extend(settings::source_limits(
            &at,
            &server,
            &slots,
            walsenders,
            &streams,
            config.route != Route::Direct,
        ));
    }
    findings.extend(settings::source_risks(&at, &server));
    let waits = note_failure(
        &at,
        "look what dr-agent's sessions wait for",
        findings,
        waits::look(&client),
    );
    for found in waits.await.unwrap_or_default() {
        findings.push(at.warning("waiting", found.text(watch::WatchedSide::Source)));
    }
    findings.push(settings::replication_role(&at, &server));
    if config.source.ddl == Ddl::Off {
        findings.push(
            at.note(
                "ddl",
                "DDL is not replicated (source.ddl = \"off\"): what CREATE, ALTER and DROP change after the copy stays here",
            )
            .hint(match config.route {
                Route::Direct => {
                    "make each change on the replica first, then here; dr-agent run takes in new tables by itself, within half a minute"
                }
                Route::Kinesis { .. } => {
                    "make each change on the replica first, then here; dr-agent run publishes new tables by itself, within half a \
                     minute, and dr-agent apply copies them, for which it must reach the source"
                }
            }),
        );
    }
    if let Some(skew) = note_failure(&at, "read the clock", findings, server::skew(&client)).await {
        findings.push(settings::clock(&at, skew));
    }
    Some(SourceFacts {
        server,
        slots,
        databases,
        selected,
        roles,
    })
}

/// Looks at one database. `None` when it cannot be reached.
pub(super) async fn database(
    config: &Config,
    source: &SourceFacts,
    name: &str,
    findings: &mut Vec<Finding>,
) -> Option<SourceDatabase> {
    let at = FindingPlace::database(FindingSide::Source, name);
    let entry = source.databases.iter().find(|one| one.name == name);
    let Some(entry) = entry else {
        findings.push(
            at.error("database", "does not exist on the source")
                .hint("correct source.databases, or create the database"),
        );
        return None;
    };
    if !entry.may_connect || !entry.allows_connections {
        findings.push(connect_right(&at, source, entry));
        return None;
    }
    let conninfo = config.source.conninfo.with_dbname(name);
    let stream = config.stream(name);
    let client = match open::session(&at, &conninfo, &stream.application_name("check")).await {
        Ok(client) => client,
        Err(finding) => {
            findings.push(finding);
            return None;
        }
    };
    findings.push(replication_connection(&at, &conninfo, &stream, &source.slots).await);
    let mut found = read(&client, &at, config, findings).await?;
    let asking = super::server::wal_end(&client);
    found.wal_end = note_failure(&at, "read the end of the WAL", findings, asking)
        .await
        .flatten();
    let published = published_anywhere(&client);
    let published = note_failure(&at, "read the publications", findings, published)
        .await
        .unwrap_or_default();
    findings.extend(keyless(&at, &found, &published, config));
    let reading = publication::read(&client, stream.as_str());
    if let Some(publication) = note_failure(&at, "read the publication", findings, reading).await {
        found.has_publication = publication.is_some();
        findings.extend(publication.as_ref().map_or_else(Vec::new, |publication| {
            publication::judge(&at, stream.as_str(), publication, &found.wanted.units)
        }));
        findings.extend(rights(&at, source, entry, &found, publication.as_ref()));
        if config.route != Route::Direct {
            let asking = noted(&client, &stream);
            let noted = note_failure(&at, "read what is noted of the slot", findings, asking).await;
            found.noted = noted.flatten();
            findings.extend(sending(&at, source, name, &stream, &found));
        }
    }
    if !source.slots.iter().any(|slot| slot.name == stream.as_str()) {
        let oldest = oldest_transaction(&client);
        let oldest = note_failure(&at, "look for old transactions", findings, oldest).await;
        findings.extend(oldest.and_then(|seconds| old_transaction(&at, seconds)));
    }
    findings.extend(unprotected(&at, &client, config).await);
    let looking = setup::observe_capture(&client);
    let capture = note_failure(&at, "look at the event triggers", findings, looking).await;
    findings.extend(capture.map(|facts| {
        let facts = (facts.defect(), facts.looks());
        capture_of_ddl(&at, config, facts, &found)
    }));
    findings.extend(startable::locks(&at, &source.server, found.relations.0));
    findings.extend(startable::encoding(&at, &entry.locale.encoding));
    Some(found)
}

async fn read(
    client: &Client,
    at: &FindingPlace,
    config: &Config,
    findings: &mut Vec<Finding>,
) -> Option<SourceDatabase> {
    let tables = catalog::tables(client);
    let tables = note_failure(at, "list the tables", findings, tables).await?;
    let keyed_roots = catalog::keyed_roots(client);
    let keyed_roots = note_failure(at, "list partitioned tables", findings, keyed_roots).await?;
    let shapes = note_failure(at, "read the columns", findings, shape::shapes(client)).await?;
    let extensions = super::replica::installed(client);
    let extensions = note_failure(at, "list the extensions", findings, extensions)
        .await
        .unwrap_or_default();
    Some(SourceDatabase {
        wanted: Wanted::of(&tables, &keyed_roots, config),
        tables,
        shapes,
        extensions,
        has_publication: false,
        wal_end: None,
        noted: None,
        features: note_failure(
            at,
            "look for newer features",
            findings,
            shape::features(client),
        )
        .await
        .unwrap_or_default(),
        relations: note_failure(
            at,
            "count the relations",
            findings,
            shape::locked_relations(client),
        )
        .await
        .unwrap_or_default(),
    })
}

/// Under route `kinesis` the source alone says whether sending can go on.
fn sending(
    at: &FindingPlace,
    source: &SourceFacts,
    name: &str,
    stream: &StreamName,
    found: &SourceDatabase,
) -> Vec<Finding> {
    let stream = stream.as_str();
    let slot = source.slots.iter().find(|slot| slot.name == stream);
    let noted = found.noted.as_ref();
    let mut findings = slot::sending(at, stream, name, slot, noted, &source.server);
    let begun = slot.is_some() || noted.is_some();
    findings.extend(pair::publication(at, stream, found, begun));
    findings
}

/// What this source has noted about a stream that is sent from it.
async fn noted(client: &Client, stream: &StreamName) -> Result<Option<NotedSlot>, PgError> {
    // Without since, the slot was not created to the end and nothing was sent.
    let note = sending::read(client, stream).await?;
    let begun = note.and_then(|note| Some((note, note.since?)));
    Ok(begun.map(|(note, since)| NotedSlot {
        origin: (
            note.cluster.system_identifier.to_string(),
            note.cluster.timeline,
        ),
        since,
    }))
}

fn connect_right(at: &FindingPlace, source: &SourceFacts, entry: &DatabaseFacts) -> Finding {
    if !entry.allows_connections {
        return at
            .error("database", "does not allow connections (datallowconn)")
            .hint("ALTER DATABASE … ALLOW_CONNECTIONS true, or leave it out of source.databases");
    }
    at.error(
        "connect_right",
        format!("role {} lacks CONNECT", source.server.role.name),
    )
    .hint(format!(
        "GRANT CONNECT ON DATABASE {} TO {}",
        quote_ident(&entry.name),
        quote_ident(&source.server.role.name)
    ))
}

/// Tables in any publication, ours or not, that sends updates or deletes.
async fn published_anywhere(client: &Client) -> Result<BTreeSet<TableName>, PgError> {
    const SQL: &str = "
        SELECT DISTINCT t.schemaname::text, t.tablename::text
          FROM pg_publication_tables t
          JOIN pg_publication p ON p.pubname = t.pubname AND (p.pubupdate OR p.pubdelete)";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows.iter().map(TableName::of).collect())
}

/// Tables without a key, each on a line of its own: somebody has to decide about each.
fn keyless(
    at: &FindingPlace,
    found: &SourceDatabase,
    published: &BTreeSet<TableName>,
    config: &Config,
) -> Vec<Finding> {
    const OPTIONS: &str = "either ALTER TABLE … ADD PRIMARY KEY (…); or source.keyless = \"full\" \
         (REPLICA IDENTITY FULL: updates and deletes find their row by all columns, which is slow on \
         large tables); or source.keyless = \"exclude\" or source.exclude = [\"schema.table\"] (not \
         protected)";
    let mut findings = Vec::new();
    for table in &found.tables {
        let protection = table.protection(config);
        let (severity, what) = match protection {
            Protection::KeylessRefused => (
                Severity::Error,
                "has no key: it is not protected, and the first copy waits until that is decided",
            ),
            Protection::KeylessFull => (
                Severity::Warning,
                "has no key; dr-agent run gives it REPLICA IDENTITY FULL",
            ),
            Protection::KeylessExcluded => (
                Severity::Warning,
                "has no key and is left out: it is not protected",
            ),
            _ => continue,
        };
        let what = match table.generated_key {
            // Before 18.
            true => what.replace(
                "has no key",
                "has no key that travels (a generated column is part of it)",
            ),
            false => what.to_owned(),
        };
        findings.push(
            at.finding(severity, "keyless_table", what)
                .on(&table.name)
                .hint(OPTIONS),
        );
        let is_published = published.contains(&table.name) || published.contains(&table.root);
        if is_published && !table.generated_key {
            findings.push(
                at.error(
                    "keyless_published",
                    "is published without a key: UPDATE and DELETE on it fail on the source now",
                )
                .on(&table.name)
                .hint("ALTER TABLE … REPLICA IDENTITY FULL at once, or take it out of the publication"),
            );
        }
    }
    if findings.is_empty() && !found.tables.is_empty() {
        let text = format!("none among {}", counted(found.tables.len(), "table"));
        findings.push(at.ok("keyless_table", text));
    }
    findings
}

/// Rights that the set-up, the copy and the stream need.
fn rights(
    at: &FindingPlace,
    source: &SourceFacts,
    entry: &DatabaseFacts,
    found: &SourceDatabase,
    publication: Option<&PublicationFacts>,
) -> Vec<Finding> {
    let role = quote_ident(&source.server.role.name);
    let mut findings = Vec::new();
    let in_band: Vec<_> = found
        .shapes
        .iter()
        .filter(|(name, _)| name.schema == "dr_agent")
        .collect();
    if in_band.is_empty() && !entry.may_create {
        findings.push(
            at.error(
                "create_right",
                "schema dr_agent is not there, and the role may not create it",
            )
            .hint(format!(
                "GRANT CREATE ON DATABASE {} TO {role}; or run `dr-agent init` once as a superuser",
                quote_ident(&entry.name)
            )),
        );
    }
    if in_band.iter().any(|(name, shape)| {
        in_band_tables().contains(name) && !(shape.may_read && shape.may_write)
    }) {
        findings.push(
            at.error("heartbeat_right", "the role may not write the tables of schema dr_agent")
                .hint(format!("run `dr-agent init --source-url` as a superuser; or ALTER TABLE {} OWNER TO {role}, and so on for each", heartbeat::TABLE)),
        );
    }
    let of_tables = |pick: fn(&shape::TableShape) -> bool| -> Vec<&TableName> {
        found
            .wanted
            .published
            .iter()
            .filter(|table| found.shapes.get(&table.name).is_some_and(pick))
            .map(|table| &table.name)
            .collect()
    };
    let unreadable = of_tables(|shape| !shape.may_read);
    if !unreadable.is_empty() {
        findings.push(
            at.error(
                "select_right",
                format!(
                    "the role may not read {}: {}",
                    counted(unreadable.len(), "table"),
                    some_of(&unreadable)
                ),
            )
            .hint(format!(
                "GRANT pg_read_all_data TO {role}; (or GRANT USAGE ON SCHEMA … and SELECT ON …)"
            )),
        );
    }
    let secured = of_tables(|shape| shape.row_security);
    if !secured.is_empty() {
        findings.push(
            at.error(
                "row_security",
                format!(
                    "row-level security hides rows of {} from the copy: {}",
                    counted(secured.len(), "table"),
                    some_of(&secured)
                ),
            )
            .hint(format!("ALTER ROLE {role} BYPASSRLS")),
        );
    }
    findings.extend(ownership(at, &role, found, publication));
    if findings.is_empty() {
        findings.push(at.ok("rights", "the role has what set-up, copy and stream need"));
    }
    findings
}

/// Only its owner may publish a table or change its replica identity. The first start refuses without
/// that; later starts leave such tables out and go on.
fn ownership(
    at: &FindingPlace,
    role: &str,
    found: &SourceDatabase,
    publication: Option<&PublicationFacts>,
) -> Option<Finding> {
    let listed = publication.map(|publication| &publication.tables);
    let foreign: Vec<&TableName> = found
        .wanted
        .units
        .iter()
        .filter(|unit| !listed.is_some_and(|listed| listed.contains(*unit)))
        .chain(&found.wanted.identity_full)
        .filter(|unit| found.shapes.get(*unit).is_some_and(|shape| !shape.owned))
        .collect();
    if foreign.is_empty() {
        return later_tables(at, role, found);
    }
    let text = format!(
        "the role does not own {}: {}",
        counted(foreign.len(), "table"),
        some_of(&foreign)
    );
    let finding = if publication.is_none() {
        at.error(
            "owner_right",
            format!("{text}; only an owner may publish a table"),
        )
    } else {
        at.warning("owner_right", format!("{text}; they are not protected"))
    };
    Some(finding.hint(format!(
        "GRANT the owning role TO {role}; or run `dr-agent init --source-url` once as a superuser"
    )))
}

/// Everything is published, by `init`; what the same owners create later will not be.
fn later_tables(at: &FindingPlace, role: &str, found: &SourceDatabase) -> Option<Finding> {
    let foreign: Vec<&TableName> = found
        .wanted
        .published
        .iter()
        .map(|table| &table.name)
        .filter(|name| found.shapes.get(*name).is_some_and(|shape| !shape.owned))
        .collect();
    if foreign.is_empty() {
        return None;
    }
    Some(
        at.warning(
            "owner_right",
            format!(
                "the role does not act for the owners of {}: {}; tables that they create later will not be published, nor \
                 protected",
                counted(foreign.len(), "table"),
                some_of(&foreign)
            ),
        )
        .hint(format!(
            "GRANT the owning role TO {role} (`dr-agent init --source-url` does it for owners that are no superuser); or let an \
             owner that is no superuser own the tables; or run `dr-agent init` again after new tables"
        )),
    )
}

/// Age of the oldest transaction that may hold an id, in seconds. Other roles' sessions show only to
/// pg_monitor; prepared transactions show to everybody.
async fn oldest_transaction(client: &Client) -> Result<f64, PgError> {
    const SQL: &str = "
        SELECT coalesce(max(seconds), 0)::float8 FROM (
            SELECT extract(epoch FROM clock_timestamp() - xact_start) FROM pg_stat_activity
             WHERE backend_xid IS NOT NULL
            UNION ALL
            SELECT extract(epoch FROM clock_timestamp() - prepared) FROM pg_prepared_xacts
        ) AS t(seconds)";
    Ok(client.query_one(SQL, &[]).await?.get(0))
}

/// Creating a slot waits for every transaction that was running before.
fn old_transaction(at: &FindingPlace, seconds: f64) -> Option<Finding> {
    (seconds > 300.0).then(|| {
        at.warning(
            "old_transaction",
            format!(
                "a transaction has been open for {:.0} min: creating the slot waits until it ends",
                seconds / 60.0
            ),
        )
        .hint("look at pg_stat_activity (xact_start) and pg_prepared_xacts")
    })
}

/// Whether DDL is written down, and so replicated.
fn capture_of_ddl(
    at: &FindingPlace,
    config: &Config,
    (defect, looks): (Option<&str>, bool),
    found: &SourceDatabase,
) -> Finding {
    const CODE: &str = "ddl_capture";
    match (config.source.ddl, defect) {
        (Ddl::Off, _) => at
            .note(CODE, "source.ddl is \"off\": DDL is not replicated")
            .hint("run the same statements on the replica, or let dr-agent do so"),
        (Ddl::Replicate, None) if !looks => at
            .warning(
                CODE,
                "DDL is written down by event triggers, and what they do not tell of is not looked for: the functions of schema dr_agent \
                 are not there, or of another version",
            )
            .hint(setup::CAPTURE_REMEDY),
        (Ddl::Replicate, None) => at.ok(CODE, "DDL is written down by event triggers"),
        // Nothing is set up yet.
        (Ddl::Replicate, Some(defect)) if !found.has_publication => {
            at.note(CODE, defect).hint("`dr-agent init` installs them")
        }
        (Ddl::Replicate, Some(defect)) if looks => at.warning(CODE, defect).hint(format!(
            "{}. Until then what has changed is found by looking every few seconds, or at once by `SELECT dr_agent.ddl_now()` at the end \
             of a migration",
            setup::CAPTURE_REMEDY
        )),
        (Ddl::Replicate, Some(defect)) => at.warning(CODE, defect).hint(setup::CAPTURE_REMEDY),
    }
}

/// What a failover would lose although replication runs.
async fn unprotected(at: &FindingPlace, client: &Client, config: &Config) -> Vec<Finding> {
    let found = match coverage::unprotected(client, config).await {
        Ok(found) => found,
        Err(error) => return vec![settings::failed(at, "count unprotected objects", &error)],
    };
    let mut findings = Vec::new();
    for one in found.iter().filter(|one| one.count > 0) {
        let (noun, what, hint) = match one.kind {
            "excluded_table" => ("table", "left out by source.exclude", "it is not protected"),
            "unlogged_table" => (
                "table",
                "UNLOGGED, so the rows are not in the WAL",
                "ALTER TABLE … SET LOGGED protects them",
            ),
            "extension_table" => (
                "extension's configuration table",
                "not replicated",
                "repeat on the replica what you changed in them",
            ),
            coverage::RELISTED_TABLE => (
                "table",
                "published in part, or not at all, for a while: what changed then is missing on the replica",
                "dr-agent run notices it within seconds and copies them again; start it if it does not run",
            ),
            "foreign_table" => (
                "foreign table",
                "the rows live elsewhere",
                "after a promotion the foreign server must be reachable from the replica",
            ),
            "materialized_view" => (
                "materialized view",
                "not refreshed on the replica after the copy",
                "a promotion hook can run REFRESH MATERIALIZED VIEW",
            ),
            "large_object" => (
                "large object",
                "logical decoding does not carry them",
                "move them into a bytea column, or copy them by other means",
            ),
            "subscription" => (
                "subscription",
                "stays with the source",
                "create it again after a promotion, if it is still wanted",
            ),
            "database_setting" => (
                "setting",
                "made by ALTER DATABASE or ALTER ROLE … IN DATABASE, not replicated",
                "make the same setting on the replica",
            ),
            // Keyless and unpublished tables are reported with what can be done about them.
            _ => continue,
        };
        let number = usize::try_from(one.count).unwrap_or(usize::MAX);
        let more = if one.count >= coverage::LARGE_OBJECTS_MAX {
            " or more"
        } else {
            ""
        };
        let text = format!(
            "{}{more}: {what} ({})",
            counted(number, noun),
            some_of(&one.examples)
        );
        findings.push(at.warning(one.kind, text).hint(hint));
    }
    findings
}

/// Whether pg_hba.conf, the role and the walsender limit let us stream: tried, since pg_hba.conf may
/// treat replication differently from an ordinary session.
async fn replication_connection(
    at: &FindingPlace,
    conninfo: &ConnInfo,
    stream: &StreamName,
    slots: &[SlotFacts],
) -> Finding {
    let held = |slot: &SlotFacts| slot.active && slot.name == stream.as_str();
    if slots.iter().any(held) {
        return at.ok("replication_connection", "an agent is streaming");
    }
    let session = Session::new(stream.application_name("check"));
    let attempt = async {
        let mut connection = ReplicationConnection::connect(conninfo, &session).await?;
        let identity = connection.identify_system().await;
        connection.close().await;
        identity
    };
    match open::within(attempt).await {
        Ok(identity) => at.ok(
            "replication_connection",
            format!("is accepted; WAL ends at {}", identity.xlogpos),
        ),
        Err(error) => {
            let reason = chain(&error);
            let finding = at.error("replication_connection", format!("is refused: {reason}"));
            // For a missing right the general hint is "run check", which is where we are.
            finding.hint(match error.hint() {
                Some(hint) if error.sqlstate() != Some("42501") => hint,
                _ => {
                    "an ordinary session is accepted, this one is not: look at pg_hba.conf, at the \
                     role's REPLICATION attribute and at max_wal_senders"
                        .to_owned()
                }
            })
        }
    }
}
