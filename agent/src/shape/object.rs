//! Reads the shape of one object.

use serde_json::Value;
use tokio_postgres::Client;

use crate::names::object::ObjectAddress;
use crate::pg::PgError;

/// The shape of an object; none where it is not there.
///
/// # Errors
/// When the server refuses.
pub async fn read(client: &Client, address: &ObjectAddress) -> Result<Option<Value>, PgError> {
    const SQL: &str = "SELECT dr_agent.shape($1::text, $2::text[], $3::text[])::text";
    let row = client
        .query_one(SQL, &[&address.kind, &address.names, &address.args])
        .await?;
    let text: Option<&str> = row.get(0);
    text.map(serde_json::from_str)
        .transpose()
        .map_err(|error| PgError::Protocol(format!("a shape that is no JSON: {error}")))
}
