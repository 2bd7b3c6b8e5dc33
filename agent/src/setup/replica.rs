//! The replica's part of the set-up: database, read-only guard, what is known.
//!
//! # Invariants
//! - A promoted replica is not touched: [`known`] is read before anything is written, and the guard
//!   is set under a lock that a promotion has to wait for.
//! - A database that holds anything of unknown origin is never written to ([`super::target`]).
//!
//! # What it does not do
//! User tables are created and filled by [`crate::copy`]; roles are in [`super::role`].

use std::collections::BTreeSet;

use futures_util::future;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::{SetupError, Side};
use super::source::MAJOR_VERSIONS;
use crate::catalog;
use crate::copy::locale::Locale;
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::quote::quote_ident;
use crate::pg::{ConnInfo, PgError, PgLsn, Session, connect_silently};
use crate::schema::listing::Copied;
use crate::schema::progress::Progress;
use crate::schema::stream::Recorded;
use crate::schema::table_sync::TableSync;
use crate::schema::{self, deferred, progress, promotion, stream, table_sync};
use crate::time::rfc3339_seconds;

/// Opens a set-up session on the replica, past its read-only guard.
pub(super) async fn open(conninfo: &ConnInfo, stream: &StreamName) -> Result<Client, SetupError> {
    let session =
        Session::new(stream.application_name("setup")).set("client_min_messages", "warning");
    connect_silently(conninfo, session)
        .await
        .map_err(SetupError::sql(Side::Replica, "connect"))
}

/// A session on the stream's database; none where that is not there yet.
pub(super) async fn if_it_exists(
    opened: Result<Client, SetupError>,
    (admin, database): (&Client, &str),
) -> Result<Option<Client>, SetupError> {
    let state = match &opened {
        Err(SetupError::Sql { source, .. }) => source.sqlstate(),
        _ => None,
    };
    match state {
        // invalid_catalog_name
        Some("3D000") => Ok(None),
        Some("55000") if is_half_dropped(admin, database).await? => Ok(None),
        _ => opened.map(Some),
    }
}

/// Whether there is only what an interrupted DROP DATABASE has left of it: nobody can enter it any more.
async fn is_half_dropped(admin: &Client, database: &str) -> Result<bool, SetupError> {
    const SQL: &str =
        "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1 AND datconnlimit = -2)";
    let asked = admin.query_typed_one(SQL, &[(&database, Type::TEXT)]).await;
    asked
        .map(|row| row.get(0))
        .map_err(|error| SetupError::sql(Side::Replica, "look for the database")(error.into()))
}

/// Whether constraints of the copy wait for the stream.
pub(super) async fn has_deferred(client: &Client, stream: &StreamName) -> Result<bool, SetupError> {
    let doing = "look which constraints wait for the stream";
    deferred::any_waits(client, stream)
        .await
        .map_err(SetupError::sql(Side::Replica, doing))
}

/// The tables of the stream.
pub(super) async fn synced_tables(
    client: &Client,
    stream: &StreamName,
) -> Result<Vec<TableSync>, SetupError> {
    let rows = table_sync::read(client, stream).await;
    rows.map_err(SetupError::sql(
        Side::Replica,
        "read which tables are copied",
    ))
}

/// The tables whose changes are applied, and what is there of them already.
pub(super) fn synced(rows: Vec<TableSync>) -> Vec<(TableName, Copied)> {
    rows.into_iter()
        .filter(|row| row.ready)
        .map(|row| (row.table, row.copied))
        .collect()
}

/// What the replica's server says about itself.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) version: i32,
    pub(super) role: String,
    pub(super) superuser: bool,
    /// It is there, and not half dropped.
    pub(super) has_database: bool,
    /// `max_prepared_transactions`
    pub(super) prepared_max: u16,
    pub(super) may_create_database: bool,
    in_recovery: bool,
    started_at: String,
}

impl Server {
    /// Reads it, on any database.
    pub(super) async fn observe(client: &Client, database: &str) -> Result<Self, SetupError> {
        const SQL: &str = "
            SELECT current_setting('server_version_num')::int, current_user::text,
                   r.rolsuper, r.rolsuper OR r.rolcreatedb, pg_is_in_recovery(),
                   extract(epoch FROM pg_postmaster_start_time())::text,
                   EXISTS (SELECT 1 FROM pg_database WHERE datname = $1 AND datconnlimit <> -2),
                   current_setting('max_prepared_transactions')::int
              FROM pg_roles r WHERE r.rolname = current_user";
        let row = client
            .query_typed_one(SQL, &[(&database, Type::TEXT)])
            .await
            .map_err(|error| SetupError::sql(Side::Replica, "look at the server")(error.into()))?;
        Ok(Self {
            version: row.get(0),
            role: row.get(1),
            superuser: row.get(2),
            may_create_database: row.get(3),
            in_recovery: row.get(4),
            started_at: row.get(5),
            has_database: row.get(6),
            prepared_max: u16::try_from(row.get::<_, i32>(7)).unwrap_or(u16::MAX),
        })
    }

    /// Refuses a server that cannot be a replica of a source started at `source_started_at`.
    pub(super) fn require(&self, source: &str, source_started_at: &str) -> Result<(), SetupError> {
        self.require_fit()?;
        // Microseconds of a start-up: the same on both sides means one server under two URLs.
        if self.started_at == source_started_at {
            return unfit(
                format!("it is the same server as the source ({source})"),
                "source.url and replica.url must lead to two servers",
            );
        }
        Ok(())
    }

    /// Refuses a server that cannot be a replica of any source.
    pub(super) fn require_fit(&self) -> Result<(), SetupError> {
        let major = self.version / 10_000;
        if !MAJOR_VERSIONS.contains(&major) {
            return unfit(
                format!("PostgreSQL {major} is not supported"),
                "this version of dr-agent knows PostgreSQL 14 to 18",
            );
        }
        if self.in_recovery {
            let side = Side::Replica;
            return Err(SetupError::InRecovery { side });
        }
        Ok(())
    }
}

fn unfit(what: String, hint: &str) -> Result<(), SetupError> {
    Err(SetupError::Unfit {
        side: Side::Replica,
        what,
        hint: hint.to_owned(),
    })
}

/// What became of a database that was not there.
#[derive(Debug, Default)]
pub(super) struct Created {
    /// This start has created it, and not another one meanwhile.
    pub(super) by_us: bool,
    /// The source's locale is not to be had there.
    pub(super) warning: Option<String>,
}

/// Creates the database, in place of what an interrupted DROP DATABASE may have left of one.
pub(super) async fn create_database(
    admin: &Client,
    server: &Server,
    database: &str,
    locale: &Locale,
) -> Result<Created, SetupError> {
    let doing = format!("create database \"{database}\"");
    if is_half_dropped(admin, database).await? {
        tracing::info!(
            database,
            "dropping the database was interrupted: it is brought to its end"
        );
        drop_database(admin, database).await;
    }
    let candidates = locale.create_database(database, server.version);
    let mut refused = PgError::Protocol("no locale left to try".to_owned());
    for (position, statement) in candidates.iter().enumerate() {
        let error = match admin.batch_execute(statement).await {
            Ok(()) => {
                let is_exact = position == 0 && locale.is_known(server.version);
                let warning = (!is_exact).then(|| {
                    format!(
                        "the replica's server does not have the source's locale {}; database \
                         \"{database}\" was created by {statement}. Text without a COLLATE of its \
                         own sorts differently there",
                        locale.name()
                    )
                });
                return Ok(Created {
                    by_us: true,
                    warning,
                });
            }
            Err(error) => PgError::from(error),
        };
        match error.sqlstate() {
            // duplicate_database, and where two are at it at the same time unique_violation: another start, or the session
            // of one that was killed, has created it meanwhile.
            Some("42P04" | "23505") => return Ok(Created::default()),
            // wrong_object_type and invalid_parameter_value: "invalid locale name".
            Some("42809" | "22023") => refused = error,
            _ => return Err(SetupError::sql(Side::Replica, &doing)(error)),
        }
    }
    Err(SetupError::sql(Side::Replica, &doing)(refused))
}

/// Drops a database that this start has created and not begun to fill.
pub(super) async fn drop_database(admin: &Client, database: &str) {
    let sql = format!("DROP DATABASE IF EXISTS {}", quote_ident(database));
    if let Err(error) = admin.batch_execute(&sql).await {
        let error = PgError::from(error);
        tracing::warn!(database, %error, "the database that a failed start has created stays");
    }
}

/// Gives a database to a role.
pub(super) fn owner_statement(database: &str, owner: &str) -> String {
    format!(
        "ALTER DATABASE {} OWNER TO {}",
        quote_ident(database),
        quote_ident(owner)
    )
}

/// Gives the database to its owner on the source, which a superuser may without losing a right.
pub(super) async fn own_database(
    admin: &Client,
    server: &Server,
    database: &str,
    owner: &str,
) -> Result<(), SetupError> {
    if !server.superuser || owner == server.role {
        return Ok(());
    }
    match admin
        .batch_execute(&owner_statement(database, owner))
        .await
        .map_err(PgError::from)
    {
        // undefined_object: the role could not be created, which has been said already.
        Err(error) if error.sqlstate() != Some("42704") => Err(SetupError::sql(
            Side::Replica,
            "set the database's owner",
        )(error)),
        _ => Ok(()),
    }
}

/// Reading what follows.
const READ: &str = "read schema dr_agent";

/// What a replica's database remembers of a stream.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) recorded: Option<Recorded>,
    /// Where the source stood when its tables were last looked at.
    pub(super) tables_as_of: Option<PgLsn>,
    pub(super) progress: Option<Progress>,
}

impl Known {
    /// Where the list of tables holds for: what is not on it and changes later is new.
    pub(super) fn list_as_of(&self, progress: Progress) -> PgLsn {
        progress
            .end_lsn
            .max(self.tables_as_of.unwrap_or(progress.end_lsn))
    }
}

/// Reads what the replica remembers; refuses a promoted one.
pub(super) async fn known(client: &Client, stream: &StreamName) -> Result<Known, SetupError> {
    const TABLES: [&str; 4] = [
        progress::TABLE,
        stream::TABLE,
        table_sync::TABLE,
        promotion::TABLE,
    ];
    // Together: the replica may be far away. Where the schema is not there, the others have failed.
    let (has_schema, promoted, remembered) = future::join3(
        schema::has(client, &TABLES),
        refuse_promoted(client),
        remembered(client, stream),
    )
    .await;
    if !has_schema.map_err(SetupError::sql(Side::Replica, READ))? {
        return Ok(Known::default());
    }
    promoted?;
    remembered
}

/// Reads what a replica with schema `dr_agent` remembers, promoted or not.
pub(super) async fn remembered(client: &Client, stream: &StreamName) -> Result<Known, SetupError> {
    let (row, progress) =
        future::join(stream::read(client, stream), progress::read(client, stream)).await;
    let row = row.map_err(SetupError::sql(Side::Replica, READ))?;
    Ok(Known {
        recorded: row.map(|row| row.recorded),
        tables_as_of: row.and_then(|row| row.tables_as_of),
        progress: progress.map_err(SetupError::sql(Side::Replica, READ))?,
    })
}

/// Any promotion of this database counts, under whichever stream: it takes writes of its own.
async fn refuse_promoted(
    client: &(impl tokio_postgres::GenericClient + Sync),
) -> Result<(), SetupError> {
    let last = promotion::last(client)
        .await
        .map_err(SetupError::sql(Side::Replica, "read promotions"))?;
    match last {
        None => Ok(()),
        Some(last) => Err(SetupError::Promoted {
            at: rfc3339_seconds(last.started_at),
            term: last.term,
            mode: last.mode,
        }),
    }
}

/// The statement of the read-only guard.
pub(super) fn guard_statement(database: &str) -> String {
    format!(
        "ALTER DATABASE {} SET default_transaction_read_only = on",
        quote_ident(database)
    )
}

/// Whether the read-only guard is set.
pub(super) async fn is_guarded(
    client: &(impl tokio_postgres::GenericClient + Sync),
) -> Result<bool, SetupError> {
    const SQL: &str = "
        SELECT EXISTS (
            SELECT 1 FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase
             WHERE d.datname = current_database() AND s.setrole = 0
               AND 'default_transaction_read_only=on' = ANY (s.setconfig))";
    let row = client.query_typed_one(SQL, &[]).await;
    row.map(|row| row.get(0)).map_err(|error| {
        SetupError::sql(Side::Replica, "look at the read-only guard")(error.into())
    })
}

/// The database from which others are dropped and created, by the manual and by most tools.
pub(super) const MAINTENANCE: &str = "postgres";

/// Whether the read-only guard is set on a replica that was not promoted: then nothing need be written, and nobody kept away.
pub(super) async fn is_safely_guarded(client: &Client) -> Result<bool, SetupError> {
    let (promoted, guarded) = future::join(refuse_promoted(client), is_guarded(client)).await;
    promoted?;
    guarded
}

/// Makes every session but ours find a read-only database, unless it was promoted. The maintenance database is left open for
/// as long as it holds no table: there is nothing to guard, and no other could be dropped from it.
pub(super) async fn guard(client: &mut Client, database: &str) -> Result<(), SetupError> {
    let doing = "set the read-only guard";
    let sql = |error: tokio_postgres::Error| SetupError::sql(Side::Replica, doing)(error.into());
    let transaction = client.transaction().await.map_err(sql)?;
    // A promotion writes its row before it lifts the guard: it either waits here and lifts
    // afterwards, or its row is seen below.
    promotion::hold_off(&transaction)
        .await
        .map_err(SetupError::sql(Side::Replica, doing))?;
    refuse_promoted(&transaction).await?;
    let wanted = database != MAINTENANCE || has_tables(&transaction).await?;
    let statement = match (wanted, is_guarded(&transaction).await?) {
        (true, false) => guard_statement(database),
        (false, true) => format!(
            "ALTER DATABASE {} RESET default_transaction_read_only",
            quote_ident(database)
        ),
        _ => String::new(),
    };
    if !statement.is_empty() {
        transaction.batch_execute(&statement).await.map_err(sql)?;
    }
    transaction.commit().await.map_err(sql)
}

/// Whether there is a table of the users'.
async fn has_tables(
    client: &(impl tokio_postgres::GenericClient + Sync),
) -> Result<bool, SetupError> {
    const SQL: &str = "
        SELECT EXISTS (
            SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p', 'f')
               AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname NOT IN ('information_schema', 'dr_agent')
               AND NOT EXISTS (SELECT 1 FROM pg_depend d
                                WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                  AND d.deptype = 'e'))";
    let row = client.query_typed_one(SQL, &[]).await;
    row.map(|row| row.get(0))
        .map_err(|error| SetupError::sql(Side::Replica, "look for tables")(error.into()))
}

/// The tables of the replica's database.
pub(super) async fn tables(client: &Client) -> Result<BTreeSet<TableName>, SetupError> {
    let tables = catalog::tables(client)
        .await
        .map_err(SetupError::sql(Side::Replica, "list tables"))?;
    Ok(tables.into_iter().map(|table| table.name).collect())
}

#[cfg(test)]
impl Server {
    /// One that has the database, and a role without attributes.
    pub(super) fn testing(version: i32, role: &str) -> Self {
        Self {
            version,
            role: role.to_owned(),
            superuser: false,
            has_database: true,
            prepared_max: 0,
            may_create_database: false,
            in_recovery: false,
            started_at: "1.5".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_under_two_urls_is_refused() {
        let server = Server::testing(150_000, "dr");
        assert!(server.require("localhost", "1.5").is_err());
        assert!(server.require("localhost", "1.6").is_ok());
    }
}
