//! The replica: the server as a whole, then each of its databases.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::finding::{Finding, FindingPlace, FindingSide, counted, some_of};
use super::server::{self, DatabaseFacts, ServerFacts};
use super::settings;
use super::shape::{self, Shapes};
use super::slot::Kept;
use super::{note_failure, open};
use crate::config::Config;
use crate::names::TableName;
use crate::names::stream::{APPLICATION_PREFIX, StreamName};
use crate::pg::PgError;
use crate::pg::quote::quote_ident;
use crate::schema::{progress, promotion, stream, table_sync};
use crate::time;

/// What was learned of the replica server.
#[derive(Debug)]
pub(super) struct ReplicaFacts {
    /// The server.
    pub(super) server: ServerFacts,
    /// Every database of it.
    pub(super) databases: Vec<DatabaseFacts>,
    /// Every role of it.
    pub(super) roles: Vec<String>,
    /// Extensions that can be installed there, with their default version.
    pub(super) available: BTreeMap<String, String>,
}

/// What was learned of one database of the replica.
#[derive(Debug, Default)]
pub(super) struct ReplicaDatabase {
    /// What the rows of its tables look like.
    pub(super) shapes: Shapes,
    /// Installed extensions and their versions.
    pub(super) extensions: Vec<(String, String)>,
    /// Our own book-keeping.
    pub(super) kept: Kept,
}

/// Looks at the server. `None` when it cannot be reached; the findings say why.
pub(super) async fn server(config: &Config, findings: &mut Vec<Finding>) -> Option<ReplicaFacts> {
    let at = FindingPlace::server(FindingSide::Replica);
    let name = format!("{APPLICATION_PREFIX}check");
    let client = match open::session(&at, &config.replica.conninfo, &name).await {
        Ok(client) => client,
        Err(finding) => {
            findings.push(finding);
            return None;
        }
    };
    findings.push(at.ok("connect", format!("{} answers", config.replica.conninfo)));
    let server = note_failure(
        &at,
        "read the server's settings",
        findings,
        server::server(&client),
    )
    .await?;
    let databases = note_failure(
        &at,
        "list the databases",
        findings,
        server::databases(&client),
    )
    .await
    .unwrap_or_default();
    let roles = note_failure(&at, "list the roles", findings, all_roles(&client))
        .await
        .unwrap_or_default();
    let available = note_failure(&at, "list the extensions", findings, available(&client))
        .await
        .unwrap_or_default();
    findings.extend(settings::version(&at, &server));
    findings.push(replication_role_setting(&at, &client, &server).await);
    if let Some(skew) = note_failure(&at, "read the clock", findings, server::skew(&client)).await {
        findings.push(settings::clock(&at, skew));
    }
    Some(ReplicaFacts {
        server,
        databases,
        roles,
        available,
    })
}

/// Whether apply sessions may silence triggers and foreign keys: tried, because what a managed
/// service allows cannot be read from a catalog.
async fn replication_role_setting(
    at: &FindingPlace,
    client: &Client,
    server: &ServerFacts,
) -> Finding {
    let tried = client
        .batch_execute("BEGIN; SET LOCAL session_replication_role = replica; ROLLBACK")
        .await;
    let Err(error) = tried else {
        return at.ok("session_replication_role", "can be set by the role");
    };
    // A failure leaves the transaction open; a connection that broke shows at the next question.
    let _ = client.batch_execute("ROLLBACK").await;
    let role = quote_ident(&server.role.name);
    let hint = if server.major() >= 15 {
        format!(
            "GRANT SET ON PARAMETER session_replication_role TO {role}; (on RDS: GRANT rds_replication TO {role})"
        )
    } else {
        format!(
            "ALTER ROLE {role} SUPERUSER; (on RDS: GRANT rds_superuser TO {role}); from 15 on a GRANT SET is enough"
        )
    };
    at.error(
        "session_replication_role",
        format!(
            "cannot be set by role {}: {}",
            server.role.name,
            crate::error::chain(&PgError::from(error))
        ),
    )
    .hint(hint)
}

async fn all_roles(client: &Client) -> Result<Vec<String>, PgError> {
    let rows = client
        .query("SELECT rolname::text FROM pg_roles", &[])
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn available(client: &Client) -> Result<BTreeMap<String, String>, PgError> {
    let sql = "SELECT name::text, coalesce(default_version, '') FROM pg_available_extensions";
    let rows = client.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Extensions installed in the database this client is connected to, without those every database has.
pub(super) async fn installed(client: &Client) -> Result<Vec<(String, String)>, PgError> {
    let sql = "SELECT extname::text, extversion FROM pg_extension
                WHERE extname <> 'plpgsql' ORDER BY 1";
    let rows = client.query(sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Looks at one database. `None` when it is not there yet or cannot be reached.
pub(super) async fn database(
    config: &Config,
    replica: &ReplicaFacts,
    name: &str,
    findings: &mut Vec<Finding>,
) -> Option<ReplicaDatabase> {
    let at = FindingPlace::database(FindingSide::Replica, name);
    let role = &replica.server.role;
    let Some(entry) = replica.databases.iter().find(|one| one.name == name) else {
        findings.push(if role.superuser || role.createdb {
            let text = format!("is not there yet; {} creates it", config.route.applier());
            at.ok("database", text)
        } else {
            at.error(
                "database",
                format!("is not there, and role {} may not create it", role.name),
            )
            .hint(format!(
                "ALTER ROLE {user} CREATEDB; or CREATE DATABASE {} OWNER {user}",
                quote_ident(name),
                user = quote_ident(&role.name),
            ))
        });
        return None;
    };
    let conninfo = config.replica.conninfo.with_dbname(name);
    let stream = config.stream(name);
    let client = match open::session(&at, &conninfo, &stream.application_name("check")).await {
        Ok(client) => client,
        Err(finding) => {
            findings.push(finding);
            return None;
        }
    };
    let shapes = note_failure(&at, "read the columns", findings, shape::shapes(&client)).await?;
    let kept = kept(&client, &shapes, &stream);
    let kept = note_failure(&at, "read schema dr_agent", findings, kept)
        .await
        .unwrap_or_default();
    let extensions = note_failure(&at, "list the extensions", findings, installed(&client))
        .await
        .unwrap_or_default();
    let applier = config.route.applier();
    findings.extend(super::slot::promotion(&at, &kept, applier));
    findings.extend(guard(&at, entry, &kept, &role.name, applier));
    findings.extend(rights(&at, &shapes, &role.name));
    findings.extend(firing(&at, &shapes));
    Some(ReplicaDatabase {
        shapes,
        extensions,
        kept,
    })
}

/// Whether other sessions are kept from writing, and whether we may see to that.
fn guard(
    at: &FindingPlace,
    entry: &DatabaseFacts,
    kept: &Kept,
    role: &str,
    applier: &str,
) -> Option<Finding> {
    let guarded = matches!(
        entry.read_only.as_deref(),
        Some("on" | "true" | "yes" | "1")
    );
    if kept.promotion.is_some() {
        return None;
    }
    if !entry.owned {
        let finding = at.error(
            "guard_right",
            format!("role {role} does not own the database and cannot set its read-only guard"),
        );
        return Some(finding.hint(format!(
            "ALTER DATABASE {} OWNER TO {}",
            quote_ident(&entry.name),
            quote_ident(role)
        )));
    }
    if guarded {
        return Some(at.ok("guard", "default_transaction_read_only = on"));
    }
    // The maintenance database has none while it is empty (`setup::replica::guard()`).
    let expected = kept.progress.as_ref().filter(|_| entry.name != "postgres");
    expected.map(|_| {
        at.warning(
            "guard",
            "default_transaction_read_only is not on: other sessions may write here by mistake",
        )
        .hint(format!("restart {applier}; it sets the guard"))
    })
}

fn rights(at: &FindingPlace, shapes: &Shapes, role: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let of_tables = |pick: fn(&shape::TableShape) -> bool| -> Vec<&TableName> {
        shapes
            .iter()
            .filter(|(_, shape)| matches!(shape.kind.as_str(), "r" | "p") && !shape.of_extension)
            .filter(|(_, shape)| pick(shape))
            .map(|(name, _)| name)
            .collect()
    };
    let read_only = of_tables(|shape| !(shape.may_read && shape.may_write && shape.may_truncate));
    if !read_only.is_empty() {
        findings.push(
            at.error(
                "write_right",
                format!(
                    "role {role} may not write {}: {}",
                    counted(read_only.len(), "table"),
                    some_of(&read_only)
                ),
            )
            .hint(format!(
                "GRANT the owning role TO {}, or GRANT INSERT, UPDATE, DELETE, TRUNCATE ON …",
                quote_ident(role)
            )),
        );
    }
    let secured = of_tables(|shape| shape.row_security);
    if !secured.is_empty() {
        findings.push(
            at.error(
                "row_security",
                format!(
                    "row-level security applies to role {role} on {}: {}",
                    counted(secured.len(), "table"),
                    some_of(&secured)
                ),
            )
            .hint(format!("ALTER ROLE {} BYPASSRLS", quote_ident(role))),
        );
    }
    findings
}

/// Triggers and rules that would run a second time what the source has done already.
fn firing(at: &FindingPlace, shapes: &Shapes) -> Vec<Finding> {
    shapes
        .iter()
        .filter(|(name, shape)| name.schema != "dr_agent" && !shape.firing.is_empty())
        .map(|(name, shape)| {
            at.warning(
                "trigger_fires",
                format!(
                    "{} fires during apply (ENABLE ALWAYS or REPLICA)",
                    some_of(&shape.firing)
                ),
            )
            .on(name)
            .hint("ALTER TABLE … ENABLE TRIGGER … on the replica, unless it is meant to act there as well")
        })
        .collect()
}

/// Reads what the agent keeps about one stream; tables that are not there yet count as empty.
async fn kept(client: &Client, shapes: &Shapes, stream: &StreamName) -> Result<Kept, PgError> {
    let there = |table: &str| {
        let (schema, name) = table.split_once('.').unwrap_or_default();
        shapes.contains_key(&TableName {
            schema: schema.to_owned(),
            name: name.to_owned(),
        })
    };
    let mut kept = Kept::default();
    if there(progress::TABLE) {
        kept.progress = progress::read(client, stream).await?;
    }
    if there(stream::TABLE) {
        let row = stream::read(client, stream).await?;
        kept.origin = row.map(|row| {
            let of = row.recorded.cluster;
            (of.system_identifier.to_string(), of.timeline)
        });
    }
    if there(table_sync::TABLE) {
        for row in table_sync::read(client, stream).await? {
            match row.ready {
                true => kept.copied.insert(row.table),
                false => kept.copying.insert(row.table),
            };
        }
    }
    if there(promotion::TABLE) {
        // Any promotion of this database counts, under whichever stream: it takes writes of its own.
        let row = promotion::last(client).await?;
        kept.promotion = row.map(|row| {
            let at = time::format(row.started_at, "%Y-%m-%d %H:%M:%S UTC");
            (row.mode, row.state, at)
        });
    }
    Ok(kept)
}
