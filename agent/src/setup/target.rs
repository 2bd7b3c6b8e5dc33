//! Whether a first start may write to the replica's database: judged before anything is written, on either side.
//!
//! `replica.url` may lead to somebody else's production by mistake, or to the source itself (the two URLs swapped). So a first
//! start observes first, decides here, and only then executes.
//!
//! # Invariants
//! - [`judge`] is pure: what [`observe`] and [`super::replica::Server`] have read comes in, a refusal goes out.
//! - A database is begun in only where it holds nothing of the users', no stream of another name and no source's side of one,
//!   and where this role may do all that a first start does.
//!
//! # What it does not do
//! Whether slot, source and replica belong together is [`super::identity`]'s.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::error::{SetupError, Side};
use super::replica::{Known, Server};
use crate::archive::base;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::pg::quote::quote_ident;
use crate::schema::{sending, stream, table_sync};

/// The replica's database, as a first start finds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TargetDatabase {
    /// What it holds beside schema `dr_agent`, extensions and empty schemas.
    pub(super) objects: Vec<String>,
    /// The streams that `dr_agent.stream` names.
    pub(super) streams: Vec<String>,
    /// Tables were recorded for our stream, as they are together with its progress row.
    pub(super) has_tables: bool,
    /// The streams that are sent from here: `dr_agent.sending`.
    pub(super) sent: Vec<String>,
    /// Schema `dr_agent` is there, complete or not.
    pub(super) has_schema: bool,
    /// The role owns it.
    pub(super) owns_schema: bool,
    /// Whose the database is.
    pub(super) owner: String,
    /// Other sessions find it read-only.
    pub(super) guarded: bool,
    /// The role may set that: it owns the database.
    pub(super) owns_database: bool,
    /// The role may create schemas.
    pub(super) may_create: bool,
    /// The role may silence triggers and foreign keys.
    pub(super) sets_replication_role: bool,
}

/// Reads it.
///
/// # Errors
/// When the replica refuses.
pub(super) async fn observe(
    client: &Client,
    server: &Server,
    stream: &StreamName,
) -> Result<TargetDatabase, SetupError> {
    read(client, server, stream)
        .await
        .map_err(SetupError::sql(Side::Replica, "look at the database"))
}

async fn read(
    client: &Client,
    server: &Server,
    of: &StreamName,
) -> Result<TargetDatabase, PgError> {
    // Only a superuser may before 15, and the function is not there.
    let silences = match server.version >= 150_000 {
        true => "has_parameter_privilege('session_replication_role', 'SET')",
        false => "false",
    };
    let sql = format!(
        "SELECT n.oid IS NOT NULL, n.oid IS NULL OR pg_has_role(n.nspowner, 'USAGE'),
                EXISTS (SELECT FROM pg_db_role_setting s
                         WHERE s.setdatabase = d.oid AND s.setrole = 0
                           AND 'default_transaction_read_only=on' = ANY (s.setconfig)),
                pg_has_role(d.datdba, 'USAGE'), has_database_privilege(d.oid, 'CREATE'), r.rolsuper OR {silences},
                EXISTS (SELECT FROM pg_largeobject_metadata), pg_get_userbyid(d.datdba)::text,
                to_regclass($1) IS NOT NULL, to_regclass($2) IS NOT NULL, to_regclass($3) IS NOT NULL
           FROM pg_database d CROSS JOIN pg_roles r LEFT JOIN pg_namespace n ON n.nspname = 'dr_agent'
          WHERE d.datname = current_database() AND r.rolname = current_user"
    );
    let tables = [stream::TABLE, sending::TABLE, table_sync::TABLE];
    let tables = tables
        .each_ref()
        .map(|table| (table as &(dyn ToSql + Sync), Type::TEXT));
    let row = client.query_typed_one(&sql, &tables).await?;
    let streams = match row.get(8) {
        true => stream::names(client).await?,
        false => Vec::new(),
    };
    let sent = match row.get(9) {
        true => sending::names(client).await?,
        false => Vec::new(),
    };
    let has_tables = row.get(10) && table_sync::any(client, of).await?;
    let mut objects = base::found_in(client).await?;
    // A managed service has its own of these in every database, and schemas are made for extensions.
    let is_content = |what: &String| {
        let beside = ["schema ", "event trigger ", "foreign data wrapper "];
        !beside.iter().any(|kind| what.starts_with(kind))
    };
    objects.retain(is_content);
    if row.get(6) {
        objects.push("large objects".to_owned());
    }
    Ok(TargetDatabase {
        objects,
        streams,
        sent,
        has_tables,
        has_schema: row.get(0),
        owns_schema: row.get(1),
        owner: row.get(7),
        guarded: row.get(2),
        owns_database: row.get(3),
        may_create: row.get(4),
        sets_replication_role: row.get(5),
    })
}

/// Reads whether sessions of this server may silence triggers, where the database has yet to be created.
///
/// # Errors
/// When the replica refuses.
pub(super) async fn of_a_new_database(
    admin: &Client,
    server: &Server,
) -> Result<TargetDatabase, SetupError> {
    const MAY: &str = "SELECT has_parameter_privilege($1, 'SET')";
    let sets_replication_role = match server.version >= 150_000 {
        _ if server.superuser => true,
        false => false,
        true => admin
            .query_typed_one(MAY, &[(&"session_replication_role", Type::TEXT)])
            .await
            .map_err(|error| SetupError::sql(Side::Replica, "look at the server")(error.into()))?
            .get(0),
    };
    Ok(TargetDatabase {
        sets_replication_role,
        owns_schema: true,
        owns_database: true,
        may_create: true,
        ..TargetDatabase::default()
    })
}

/// What becomes of objects that a load from the archive has left which was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HalfLoaded {
    /// The next load removes them.
    Removed,
    /// A copy from the source wants an empty database.
    Refused,
}

/// Decides whether a first start of `stream` may write there.
///
/// # Errors
/// What is in the way, before anything was written.
pub(super) fn judge(
    database: &str,
    stream: &StreamName,
    server: &Server,
    known: &Known,
    (target, half_loaded): (&TargetDatabase, HalfLoaded),
) -> Result<(), SetupError> {
    contents(database, stream, known, (target, half_loaded))?;
    rights(database, server, target)
}

/// Whether what is in the database leaves room for a first copy.
pub(super) fn contents(
    database: &str,
    stream: &StreamName,
    known: &Known,
    (target, half_loaded): (&TargetDatabase, HalfLoaded),
) -> Result<(), SetupError> {
    if !target.sent.is_empty() {
        return Err(SetupError::ReplicaIsSource {
            database: database.to_owned(),
            streams: target.sent.clone(),
        });
    }
    let others: Vec<String> = target
        .streams
        .iter()
        .filter(|other| *other != stream.as_str())
        .cloned()
        .collect();
    if !others.is_empty() {
        return Err(SetupError::ReplicaOfAnother {
            database: database.to_owned(),
            stream: stream.to_string(),
            others,
        });
    }
    if target.objects.is_empty() {
        return Ok(());
    }
    match known.recorded {
        // Tables are recorded together with the progress row, or behind it.
        Some(_) if target.has_tables => {
            return Err(SetupError::ProgressGone {
                database: database.to_owned(),
                stream: stream.to_string(),
            });
        }
        Some(_) if half_loaded == HalfLoaded::Removed => return Ok(()),
        _ => {}
    }
    Err(SetupError::ReplicaNotEmpty {
        database: database.to_owned(),
        objects: target.objects.clone(),
    })
}

/// Whether this role may do everything that a first start does.
fn rights(database: &str, server: &Server, target: &TargetDatabase) -> Result<(), SetupError> {
    let lacks = |what: String, right: String| {
        Err(SetupError::RightMissing {
            side: Side::Replica,
            role: server.role.clone(),
            what,
            right,
        })
    };
    if !server.has_database && !server.may_create_database {
        return lacks(
            format!("create database \"{database}\""),
            format!(
                "the attribute CREATEDB (ALTER ROLE {} CREATEDB)",
                quote_ident(&server.role)
            ),
        );
    }
    if server.superuser {
        return Ok(());
    }
    if !target.owns_database {
        return lacks(
            "set the read-only guard".to_owned(),
            format!("ownership of database \"{database}\""),
        );
    }
    if !target.has_schema && !target.may_create {
        return lacks(
            "create schema dr_agent".to_owned(),
            format!("CREATE on database \"{database}\""),
        );
    }
    if !target.owns_schema {
        return lacks(
            "keep its progress in schema dr_agent".to_owned(),
            "ownership of schema dr_agent".to_owned(),
        );
    }
    if !target.sets_replication_role {
        let right = match server.version >= 150_000 {
            true => "SET on parameter session_replication_role",
            false => "the attribute SUPERUSER, which PostgreSQL 14 demands for it",
        };
        return lacks(
            "silence triggers while it applies".to_owned(),
            right.to_owned(),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::history::Cluster;
    use crate::schema::stream::Recorded;

    fn server() -> Server {
        Server::testing(150_000, "dr")
    }

    /// An empty database of a role that owns it.
    fn empty() -> TargetDatabase {
        TargetDatabase {
            owns_schema: true,
            owns_database: true,
            may_create: true,
            sets_replication_role: true,
            ..TargetDatabase::default()
        }
    }

    fn judged(
        change: impl FnOnce(&mut Server, &mut Known, &mut TargetDatabase),
    ) -> Result<(), SetupError> {
        let (mut server, mut known, mut target) = (server(), Known::default(), empty());
        change(&mut server, &mut known, &mut target);
        let stream = StreamName::new("dr_agent", "app");
        judge(
            "app",
            &stream,
            &server,
            &known,
            (&target, HalfLoaded::Refused),
        )
    }

    fn interrupted(known: &mut Known) {
        let cluster = Cluster {
            system_identifier: 7,
            timeline: 1,
        };
        known.recorded = Some(Recorded { cluster, began: 5 });
    }

    #[test]
    fn an_empty_database_is_begun_in_also_where_a_set_up_was_interrupted() {
        judged(|_, _, _| {}).unwrap();
        judged(|_, known, target| {
            interrupted(known);
            (target.has_schema, target.guarded) = (true, true);
            target.streams = vec!["dr_agent_app".to_owned()];
        })
        .unwrap();
    }

    #[test]
    fn what_is_somebody_elses_is_not_touched_and_called_by_its_name() {
        let objects = vec!["table public.account".to_owned()];
        let foreign = judged(|_, _, target| target.objects = objects.clone());
        assert!(matches!(foreign, Err(SetupError::ReplicaNotEmpty { .. })));
        let renamed = judged(|_, _, target| {
            target.objects = objects.clone();
            target.streams = vec!["dr_agent_old".to_owned()];
        });
        assert!(matches!(renamed, Err(SetupError::ReplicaOfAnother { .. })));
        let swapped = judged(|_, _, target| target.sent = vec!["dr_agent_app".to_owned()]);
        assert!(matches!(swapped, Err(SetupError::ReplicaIsSource { .. })));
        let deleted = judged(|_, known, target| {
            interrupted(known);
            target.objects = objects.clone();
            target.streams = vec!["dr_agent_app".to_owned()];
            target.has_tables = true;
        });
        assert!(matches!(deleted, Err(SetupError::ProgressGone { .. })));
    }

    #[test]
    fn a_right_that_is_missing_is_named_before_anything_is_written() {
        type Change = fn(&mut Server, &mut TargetDatabase);
        let cases: [(Change, &str); 6] = [
            (|server, _| server.has_database = false, "CREATEDB"),
            (
                |_, target| target.owns_database = false,
                "ownership of database",
            ),
            (|_, target| target.may_create = false, "CREATE on database"),
            (
                |_, target| (target.has_schema, target.owns_schema) = (true, false),
                "ownership of schema",
            ),
            (
                |_, target| target.sets_replication_role = false,
                "SET on parameter",
            ),
            (
                |server, target| {
                    server.version = 140_011;
                    target.sets_replication_role = false;
                },
                "SUPERUSER",
            ),
        ];
        for (change, words) in cases {
            let refused = judged(|server, _, target| change(server, target)).unwrap_err();
            assert!(refused.to_string().contains(words), "{refused}");
            let superuser = judged(|server, _, target| {
                change(server, target);
                (server.superuser, server.may_create_database) = (true, true);
            });
            assert!(superuser.is_ok());
        }
    }
}
