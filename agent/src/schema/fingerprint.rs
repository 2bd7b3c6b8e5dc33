//! `dr_agent.fingerprint`: what every object of the source is, with its shape, as the source last looked; and on the replica
//! `dr_agent.own_fingerprint`, the same of its own objects.
//!
//! `agent/sql/fingerprint.sql` and `look.sql` bring them up to date. The first is published: the replica can compare when the source
//! is gone. It may compare when the commands that the source had written down by then are those that have arrived.

use std::collections::BTreeSet;

use serde_json::Value;
use tokio_postgres::{GenericClient, Row};

use super::{ddl, ddl_waiting};
use crate::names::object::ObjectAddress;
use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.fingerprint";

/// When it was taken.
pub const AT: &str = "dr_agent.fingerprint_at";

const OWN: &str = "dr_agent.own_fingerprint";
const OWN_AT: &str = "dr_agent.own_fingerprint_at";

/// How many are compared in one go: where there are as many, there may be more.
pub const UNLIKE_MAX: usize = 2_000;

/// An object that is not, byte for byte, what the source has.
#[derive(Clone, Debug, PartialEq)]
pub struct Unlike {
    /// Which.
    pub address: ObjectAddress,
    /// As a person reads it.
    pub identity: String,
    /// What it is on the source.
    pub shape: Value,
    /// The two hashes; none where it is not here.
    hashes: Option<String>,
}

/// Looks what has changed on the source, and tells it; how many objects have changed that no event trigger told of. None where
/// somebody else is looking.
///
/// # Errors
/// When the source refuses.
pub async fn look(
    source: &(impl GenericClient + Sync),
    wholly: bool,
) -> Result<Option<i32>, PgError> {
    let row = source
        .query_one("SELECT dr_agent.look($1)", &[&wholly])
        .await?;
    Ok(row.get(0))
}

/// The same where it has been looked before, and nothing otherwise: the first look takes long. It waits for nobody.
///
/// # Errors
/// When the source refuses.
pub async fn look_once_more(source: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    if !super::has(source, &[AT]).await? {
        return Ok(());
    }
    let sql = format!("SELECT dr_agent.look(false) FROM {AT}");
    source.query(&sql, &[]).await?;
    Ok(())
}

/// Forgets what was told: what the source is, is told no longer.
///
/// # Errors
/// When the source refuses.
pub async fn clear(source: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    for table in [TABLE, AT] {
        source.execute(&format!("DELETE FROM {table}"), &[]).await?;
    }
    Ok(())
}

/// Whether the source has told anything, and nothing that changes shapes is on its way: then, in a snapshot, what was told and what
/// is here are of one moment. If so, whether the source is of another major version.
///
/// # Errors
/// When the replica refuses.
pub async fn comparable(replica: &(impl GenericClient + Sync)) -> Result<Option<bool>, PgError> {
    let sql = format!(
        "SELECT a.version / 10000 <> pg_catalog.current_setting('server_version_num')::integer / 10000
           FROM {AT} a, (SELECT count(*), coalesce(sum(id), 0)::text FROM {}) AS d (count, sum)
          WHERE (a.ddl_count, a.ddl_sum) = (d.count, d.sum)",
        ddl::TABLE
    );
    let row = replica.query_typed_opt(&sql, &[]).await?;
    Ok(row.and_then(|row| row.get(0)))
}

/// Brings the replica's own up to date; false where somebody else is at it. What was judged counts no more where other roles are
/// there.
///
/// # Errors
/// When the replica refuses.
pub async fn refresh(replica: &(impl GenericClient + Sync), wholly: bool) -> Result<bool, PgError> {
    let taken = replica
        .query_one(
            "SELECT dr_agent.take_fingerprint('own_fingerprint', false, $1) IS NOT NULL",
            &[&wholly],
        )
        .await?;
    if !taken.get::<_, bool>(0) {
        return Ok(false);
    }
    let roles = format!(
        "WITH roles (names) AS (SELECT pg_catalog.string_agg(rolname::text || pg_catalog.pg_has_role(oid, 'MEMBER'), ',' ORDER BY oid)
                                  FROM pg_catalog.pg_roles)
         UPDATE {OWN_AT} a SET roles = r.names FROM roles r WHERE a.roles IS DISTINCT FROM r.names"
    );
    if replica.execute(&roles, &[]).await? > 0 {
        let forget = format!("UPDATE {OWN} SET same_as = NULL WHERE same_as IS NOT NULL");
        replica.execute(&forget, &[]).await?;
    }
    Ok(true)
}

/// The objects that are not, byte for byte, what the source has, and have not been found to be the same. Not those that wait for a
/// command.
///
/// # Errors
/// When the replica refuses.
pub async fn unlike(
    replica: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<Unlike>, PgError> {
    let sql = format!(
        "SELECT f.kind, f.names, f.args, f.identity, f.shape::text, f.hash || ' ' || o.hash
           FROM {TABLE} f LEFT JOIN {OWN} o ON (o.kind, o.names, o.args) = (f.kind, f.names, f.args)
          WHERE o.hash IS DISTINCT FROM f.hash AND (o.same_as IS NULL OR o.same_as <> f.hash || ' ' || o.hash)
            AND NOT EXISTS (SELECT FROM {} w WHERE w.stream = $1 AND NOT w.drift AND (w.kind, w.names, w.args) = (f.kind, f.names, f.args))
          ORDER BY f.class, f.object LIMIT {UNLIKE_MAX}",
        ddl_waiting::TABLE
    );
    let rows = replica.query(&sql, &[&stream.as_str()]).await?;
    rows.iter().map(unlike_of).collect()
}

fn unlike_of(row: &Row) -> Result<Unlike, PgError> {
    let shape: Option<&str> = row.get(4);
    let shape = serde_json::from_str(shape.unwrap_or("null"));
    Ok(Unlike {
        address: ObjectAddress {
            kind: row.get(0),
            names: row.get(1),
            args: row.get(2),
        },
        identity: row.get(3),
        shape: shape
            .map_err(|error| PgError::Protocol(format!("a shape that is no JSON: {error}")))?,
        hashes: row.get(5),
    })
}

/// Notes that an object here is what the source has, in other words.
///
/// # Errors
/// When the replica refuses.
pub async fn note_the_same(
    replica: &(impl GenericClient + Sync),
    object: &Unlike,
) -> Result<(), PgError> {
    let sql = format!("UPDATE {OWN} SET same_as = $4 WHERE (kind, names, args) = ($1, $2, $3)");
    let ObjectAddress { kind, names, args } = &object.address;
    replica
        .execute(&sql, &[kind, names, args, &object.hashes])
        .await?;
    Ok(())
}

/// The roles that the source has, if it has told.
///
/// # Errors
/// When the replica refuses.
pub async fn known_roles(
    replica: &(impl GenericClient + Sync),
) -> Result<Option<BTreeSet<String>>, PgError> {
    if !super::has(replica, &[AT]).await? {
        return Ok(None);
    }
    let sql = format!("SELECT roles FROM {AT}");
    let row = replica.query_typed_opt(&sql, &[]).await?;
    let roles: Option<Vec<String>> = row.and_then(|row| row.get(0));
    Ok(roles.map(|roles| roles.into_iter().collect()))
}

/// Whether the source's object is still of this shape, as far as it was told.
///
/// # Errors
/// When the replica refuses.
pub async fn is_still(
    replica: &(impl GenericClient + Sync),
    address: &ObjectAddress,
    shape: Option<&Value>,
) -> Result<bool, PgError> {
    let sql = format!("SELECT shape::text FROM {TABLE} WHERE (kind, names, args) = ($1, $2, $3)");
    let ObjectAddress { kind, names, args } = address;
    let row = replica.query_opt(&sql, &[kind, names, args]).await?;
    let told: Option<Value> = row
        .and_then(|row| row.get::<_, Option<String>>(0))
        .and_then(|text| serde_json::from_str(&text).ok());
    Ok(told.as_ref() == shape)
}

/// Notes that everything was compared.
///
/// # Errors
/// When the replica refuses.
pub async fn note_compared(replica: &(impl GenericClient + Sync)) -> Result<(), PgError> {
    let sql = format!("UPDATE {OWN_AT} SET compared = pg_catalog.clock_timestamp()");
    replica.execute(&sql, &[]).await?;
    Ok(())
}

/// How old the comparison of both sides is, in seconds: by when it was compared, and by when the source has looked, whichever is
/// older. None before the first time, and nothing at all where the source tells nothing.
///
/// # Errors
/// When the replica refuses.
pub async fn compared(
    replica: &(impl GenericClient + Sync),
) -> Result<Option<Option<u64>>, PgError> {
    if !super::has(replica, &[AT, OWN_AT]).await? {
        return Ok(None);
    }
    let sql = format!(
        "SELECT extract(epoch FROM pg_catalog.clock_timestamp() - CASE WHEN o.compared IS NOT NULL THEN least(a.looked, o.compared) END)::bigint FROM {AT} a LEFT JOIN {OWN_AT} o ON o.compared IS NOT NULL"
    );
    let row = replica.query_typed_opt(&sql, &[]).await?;
    Ok(row.map(|row| {
        row.get::<_, Option<i64>>(0)
            .map(|ago| u64::try_from(ago).unwrap_or(0))
    }))
}
