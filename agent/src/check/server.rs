//! What a server says of itself: version, role, settings, slots, databases. Reads only.
//!
//! The same for both sides; `source` and `replica` judge it. Columns that only newer servers have are
//! read through `to_jsonb(row)`, so one statement serves every version.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use tokio_postgres::Client;

use crate::pg::{PgError, PgLsn};
use crate::time::wall_clock;

/// A server, and the role we connected as.
#[derive(Clone, Debug, Default)]
pub(super) struct ServerFacts {
    /// `server_version_num`.
    pub(super) version_num: i32,
    /// As the server writes it: "15.8 (Debian 15.8-0+deb12u1)".
    pub(super) version: String,
    /// A physical standby.
    pub(super) in_recovery: bool,
    /// When it was started, seconds since 1970; tells two copies of one cluster apart.
    pub(super) started_at: f64,
    /// Written by `initdb`; `None` where the role may not read it.
    pub(super) system_identifier: Option<String>,
    /// Raised by every physical promotion; `None` on a standby.
    pub(super) timeline: Option<i32>,
    /// Our role.
    pub(super) role: RoleFacts,
    /// The settings of [`SETTINGS`] that this version has, in the setting's own unit.
    pub(super) settings: BTreeMap<String, String>,
}

impl ServerFacts {
    /// 15 for 15.8.
    pub(super) fn major(&self) -> i32 {
        self.version_num / 10_000
    }

    /// A setting; empty where this version has none of that name.
    pub(super) fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// A setting as a number; `None` where this version has none of that name.
    pub(super) fn number(&self, name: &str) -> Option<i64> {
        self.settings.get(name)?.parse().ok()
    }
}

/// The role of this session.
#[derive(Clone, Debug, Default)]
pub(super) struct RoleFacts {
    /// Its name.
    pub(super) name: String,
    /// SUPERUSER.
    pub(super) superuser: bool,
    /// REPLICATION, or a managed service's substitute (`rds_replication`).
    pub(super) replication: bool,
    /// CREATEDB.
    pub(super) createdb: bool,
    /// CONNECTION LIMIT; below zero there is none.
    pub(super) connection_limit: i32,
}

/// The settings that are judged.
const SETTINGS: [&str; 17] = [
    "wal_level",
    "max_replication_slots",
    "max_wal_senders",
    "max_slot_wal_keep_size",
    "idle_replication_slot_timeout",
    "wal_sender_timeout",
    "synchronous_standby_names",
    "max_prepared_transactions",
    "shared_preload_libraries",
    "output_plugin_libraries",
    "max_connections",
    "superuser_reserved_connections",
    "reserved_connections",
    "max_locks_per_transaction",
    "autovacuum_max_workers",
    "max_worker_processes",
    "cron.database_name",
];

/// Where the server's WAL ends; `None` on a standby.
pub(super) async fn wal_end(client: &Client) -> Result<Option<PgLsn>, PgError> {
    const SQL: &str =
        "SELECT CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_flush_lsn() END";
    Ok(client.query_one(SQL, &[]).await?.get(0))
}

/// Reads the server.
pub(super) async fn server(client: &Client) -> Result<ServerFacts, PgError> {
    const SQL: &str = "
        SELECT current_setting('server_version_num')::int, current_setting('server_version'),
               pg_is_in_recovery(),
               extract(epoch FROM pg_postmaster_start_time())::float8,
               r.rolname::text, r.rolsuper,
               r.rolreplication OR EXISTS (
                   SELECT 1 FROM pg_roles m WHERE m.rolname = 'rds_replication'
                      AND pg_has_role(r.oid, m.oid, 'MEMBER')),
               r.rolcreatedb,
               CASE WHEN NOT pg_is_in_recovery() THEN
                    ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int END,
               r.rolconnlimit
          FROM pg_roles r WHERE r.rolname = current_user";
    let row = client.query_one(SQL, &[]).await?;
    let settings = client
        .query(
            "SELECT name, setting FROM pg_settings WHERE name = ANY($1)",
            &[&SETTINGS.as_slice()],
        )
        .await?;
    // Managed services take this function away; then the comparison is left to the start of `run`.
    let system_identifier = client
        .query_one(
            "SELECT system_identifier::text FROM pg_control_system()",
            &[],
        )
        .await
        .ok()
        .map(|row| row.get(0));
    Ok(ServerFacts {
        version_num: row.get(0),
        version: row.get(1),
        in_recovery: row.get(2),
        started_at: row.get(3),
        system_identifier,
        timeline: row.get(8),
        role: RoleFacts {
            name: row.get(4),
            superuser: row.get(5),
            replication: row.get(6),
            createdb: row.get(7),
            connection_limit: row.get(9),
        },
        settings: settings
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect(),
    })
}

/// A replication slot.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SlotFacts {
    /// Its name.
    pub(super) name: String,
    /// "pgoutput"; empty for physical slots.
    pub(super) plugin: String,
    /// Empty for physical slots.
    pub(super) database: String,
    /// A walsender holds it.
    pub(super) active: bool,
    /// "reserved", "extended", "unreserved" or "lost".
    pub(super) wal_status: String,
    /// Why the server gave it up, on versions that tell.
    pub(super) invalidation: Option<String>,
    /// It came along when its server, a standby, was promoted: `failover` and `synced` (17 and later), and not temporary.
    pub(super) synced: bool,
    /// Decodes two-phase transactions at PREPARE.
    pub(super) two_phase: bool,
    /// What has been acknowledged.
    pub(super) confirmed_flush: Option<PgLsn>,
    /// WAL kept for it, in bytes.
    pub(super) retained_bytes: Option<i64>,
    /// WAL that may still be written before it is lost, in bytes; `None` is unlimited.
    pub(super) safe_bytes: Option<i64>,
}

/// Every slot of the server, ours and others'.
pub(super) async fn slots(client: &Client) -> Result<Vec<SlotFacts>, PgError> {
    const SQL: &str = "
        SELECT slot_name::text, coalesce(plugin::text, ''), coalesce(database::text, ''), active,
               coalesce(wal_status, ''), to_jsonb(s)->>'invalidation_reason', two_phase,
               confirmed_flush_lsn,
               CASE WHEN NOT pg_is_in_recovery() THEN
                    pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint END,
               safe_wal_size,
               coalesce((to_jsonb(s) ->> 'synced')::boolean AND (to_jsonb(s) ->> 'failover')::boolean, false)
               AND NOT temporary
          FROM pg_replication_slots s ORDER BY 1";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| SlotFacts {
            name: row.get(0),
            plugin: row.get(1),
            database: row.get(2),
            active: row.get(3),
            wal_status: row.get(4),
            invalidation: row.get(5),
            synced: row.get(10),
            two_phase: row.get(6),
            confirmed_flush: row.get(7),
            retained_bytes: row.get(8),
            safe_bytes: row.get(9),
        })
        .collect())
}

/// How many walsenders are running, everybody's.
pub(super) async fn walsenders(client: &Client) -> Result<i64, PgError> {
    let row = client
        .query_one("SELECT count(*) FROM pg_stat_replication", &[])
        .await?;
    Ok(row.get(0))
}

/// A database of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DatabaseFacts {
    /// Its name.
    pub(super) name: String,
    /// `datallowconn`.
    pub(super) allows_connections: bool,
    /// `datistemplate`.
    pub(super) template: bool,
    /// Our role has CONNECT.
    pub(super) may_connect: bool,
    /// Our role has CREATE.
    pub(super) may_create: bool,
    /// Our role may act as its owner, which `ALTER DATABASE … SET` asks for.
    pub(super) owned: bool,
    /// Encoding, LC_COLLATE, LC_CTYPE, locale provider, provider's locale.
    pub(super) locale: LocaleFacts,
    /// `default_transaction_read_only` as set by `ALTER DATABASE … SET`.
    pub(super) read_only: Option<String>,
}

/// How a database orders and stores text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct LocaleFacts {
    /// "UTF8".
    pub(super) encoding: String,
    /// LC_COLLATE.
    pub(super) collate: String,
    /// LC_CTYPE.
    pub(super) ctype: String,
    /// "c" (libc), "i" (ICU), "b" (builtin).
    pub(super) provider: String,
    /// The provider's own locale name; empty for libc.
    pub(super) provider_locale: String,
    /// The version the indexes were built with.
    pub(super) version: String,
}

/// Every database of the server.
pub(super) async fn databases(client: &Client) -> Result<Vec<DatabaseFacts>, PgError> {
    const SQL: &str = "
        SELECT datname::text, datallowconn, has_database_privilege(d.oid, 'CONNECT'),
               has_database_privilege(d.oid, 'CREATE'), pg_has_role(datdba, 'USAGE'),
               pg_encoding_to_char(encoding)::text, datcollate::text, datctype::text,
               coalesce(to_jsonb(d)->>'datlocprovider', 'c'),
               coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale', ''),
               coalesce(to_jsonb(d)->>'datcollversion', ''),
               (SELECT substr(item, length('default_transaction_read_only=') + 1)
                  FROM pg_db_role_setting s, unnest(s.setconfig) item
                 WHERE s.setdatabase = d.oid AND s.setrole = 0
                   AND item LIKE 'default\\_transaction\\_read\\_only=%'),
               datistemplate
          FROM pg_database d ORDER BY 1";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| DatabaseFacts {
            name: row.get(0),
            allows_connections: row.get(1),
            may_connect: row.get(2),
            may_create: row.get(3),
            owned: row.get(4),
            locale: LocaleFacts {
                encoding: row.get(5),
                collate: row.get(6),
                ctype: row.get(7),
                provider: row.get(8),
                provider_locale: row.get(9),
                version: row.get(10),
            },
            read_only: row.get(11),
            template: row.get(12),
        })
        .collect())
}

/// Roles that applications use: those that log in, own something or were granted something.
pub(super) async fn roles(client: &Client) -> Result<Vec<String>, PgError> {
    const SQL: &str = "
        SELECT r.rolname::text FROM pg_roles r
         WHERE r.rolname !~ '^(pg|rds)_' AND r.rolname NOT IN ('rdsadmin')
           AND (r.rolcanlogin OR EXISTS (
                SELECT 1 FROM pg_shdepend d
                 WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = r.oid))
         ORDER BY 1";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// By how much a server's clock is ahead of ours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Skew {
    /// Seconds; negative when it is behind.
    pub(super) seconds: f64,
    /// Half of the round trip: the true value lies within this distance.
    pub(super) uncertainty: f64,
}

impl Skew {
    /// From the server's clock (seconds since 1970) read between two readings of ours.
    pub(super) fn between(before: Duration, server: f64, after: Duration) -> Self {
        let (before, after) = (before.as_secs_f64(), after.as_secs_f64());
        Self {
            seconds: server - f64::midpoint(before, after),
            uncertainty: (after - before).abs() / 2.0,
        }
    }

    /// Whether the clocks are certainly further apart than `limit` seconds.
    pub(super) fn exceeds(&self, limit: f64) -> bool {
        self.seconds.abs() - self.uncertainty > limit
    }
}

/// Measures the skew three times and keeps the measurement with the shortest round trip.
pub(super) async fn skew(client: &Client) -> Result<Skew, PgError> {
    let statement = client
        .prepare("SELECT extract(epoch FROM clock_timestamp())::float8")
        .await?;
    let mut best: Option<Skew> = None;
    for _ in 0..3 {
        let before = since_1970();
        let row = client.query_one(&statement, &[]).await?;
        let skew = Skew::between(before, row.get(0), since_1970());
        if best.is_none_or(|best| skew.uncertainty < best.uncertainty) {
            best = Some(skew);
        }
    }
    Ok(best.expect("three measurements were made"))
}

fn since_1970() -> Duration {
    wall_clock()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_network_is_not_taken_for_a_wrong_clock() {
        let at = Duration::from_secs;
        let slow = Skew::between(at(100), 104.0, at(104));
        assert_eq!(slow.seconds, 2.0);
        assert!(!slow.exceeds(1.0), "the round trip explains it");
        let ahead = Skew::between(at(100), 103.0, at(100));
        assert!(ahead.exceeds(1.0));
        let behind = Skew::between(at(100), 97.0, at(100));
        assert!(behind.exceeds(1.0));
    }
}
