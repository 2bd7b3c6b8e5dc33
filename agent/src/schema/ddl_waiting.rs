//! `dr_agent.ddl_waiting` on the replica: objects that are not as the source has them, and why.
//!
//! One row for each object: what the newest command about it has recorded counts. A promotion names them.

use std::collections::BTreeSet;

use tokio_postgres::GenericClient;

use crate::names::object::ObjectAddress;
use crate::names::stream::StreamName;
use crate::pg::PgError;

/// The table.
pub const TABLE: &str = "dr_agent.ddl_waiting";

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct WaitingObject {
    /// Which object.
    pub address: ObjectAddress,
    /// As a person reads it.
    pub identity: String,
    /// What it should be; none where it should be gone.
    pub shape: Option<serde_json::Value>,
    /// Why it is not.
    pub reason: String,
    /// The command, in `dr_agent.ddl`.
    pub ddl: i64,
    /// It was recorded by a server of another major version.
    pub across: bool,
    /// A person says that it is right as it is, and why.
    pub accepted: Option<String>,
    /// No command has told of it: it was found by comparing the two sides.
    pub drift: bool,
}

/// Notes an object.
///
/// # Errors
/// When the replica refuses.
pub async fn note(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    object: &WaitingObject,
) -> Result<(), PgError> {
    let sql = format!(
        "INSERT INTO {TABLE} AS w (stream, kind, names, args, identity, shape, reason, ddl, across, drift)
        VALUES ($1, $2, $3, $4, $5, $6::text::json, $7, $8, $9, $10)
            ON CONFLICT (stream, kind, names, args) DO UPDATE
               SET identity = excluded.identity, shape = excluded.shape, reason = excluded.reason, ddl = excluded.ddl,
                   across = excluded.across, drift = excluded.drift,
                   accepted = CASE WHEN w.ddl = excluded.ddl AND w.shape::text IS NOT DISTINCT FROM excluded.shape::text THEN w.accepted END"
    );
    let address = &object.address;
    let shape = object.shape.as_ref().map(ToString::to_string);
    client
        .execute(
            &sql,
            &[
                &stream.as_str(),
                &address.kind,
                &address.names,
                &address.args,
                &object.identity,
                &shape,
                &object.reason,
                &object.ddl,
                &object.across,
                &object.drift,
            ],
        )
        .await?;
    Ok(())
}

/// Forgets objects that are as they should be.
///
/// # Errors
/// When the replica refuses.
pub async fn settled(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    objects: &[ObjectAddress],
) -> Result<(), PgError> {
    let sql =
        format!("DELETE FROM {TABLE} WHERE stream = $1 AND kind = $2 AND names = $3 AND args = $4");
    for object in objects {
        client
            .execute(
                &sql,
                &[&stream.as_str(), &object.kind, &object.names, &object.args],
            )
            .await?;
    }
    Ok(())
}

/// Those of a stream, in the order of their commands; none on a replica of an earlier version.
///
/// # Errors
/// When the replica refuses.
pub async fn read(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
) -> Result<Vec<WaitingObject>, PgError> {
    if !super::has(client, &[TABLE]).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "SELECT kind, names, args, identity, shape::text, reason, ddl, across, accepted, drift FROM {TABLE} WHERE stream = $1 ORDER BY ddl, kind, names"
    );
    let rows = client.query(&sql, &[&stream.as_str()]).await?;
    let waiting = rows.iter().map(|row| WaitingObject {
        address: ObjectAddress {
            kind: row.get(0),
            names: row.get(1),
            args: row.get(2),
        },
        identity: row.get(3),
        shape: row
            .get::<_, Option<&str>>(4)
            .and_then(|text| serde_json::from_str(text).ok()),
        reason: row.get(5),
        ddl: row.get(6),
        across: row.get(7),
        accepted: row.get(8),
        drift: row.get(9),
    });
    Ok(waiting.collect())
}

/// Forgets what no command has told of, but for these: it is as it should be, or waits for a command now.
///
/// # Errors
/// When the replica refuses.
pub async fn forget_drift(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    still: &BTreeSet<ObjectAddress>,
) -> Result<(), PgError> {
    let gone: Vec<ObjectAddress> = read(client, stream)
        .await?
        .into_iter()
        .filter(|one| one.drift && !still.contains(&one.address))
        .map(|one| one.address)
        .collect();
    settled(client, stream, &gone).await
}

/// Notes that a person says of an object that it is right as it is; whether it was waiting.
///
/// # Errors
/// When the replica refuses.
pub async fn accept(
    client: &(impl GenericClient + Sync),
    stream: &StreamName,
    object: &ObjectAddress,
    reason: &str,
) -> Result<bool, PgError> {
    let sql = format!(
        "UPDATE {TABLE} SET accepted = $5 WHERE stream = $1 AND kind = $2 AND names = $3 AND args = $4"
    );
    let count = client
        .execute(
            &sql,
            &[
                &stream.as_str(),
                &object.kind,
                &object.names,
                &object.args,
                &reason,
            ],
        )
        .await?;
    Ok(count > 0)
}
