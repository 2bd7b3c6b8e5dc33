//! Objects that wait are tried once more: what they lacked may have come, or a person has mended it.
//!
//! Each in a transaction of its own that holds the progress row, so that no batch comes in between, and nothing is done for an
//! agent that was superseded.

use tokio_postgres::Client;

use super::{apply, build, drift};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::schema::ddl_waiting::{self, WaitingObject};
use crate::schema::progress;

/// A lock that somebody holds is not waited for without an end: batches wait behind us.
const BOUNDED: &str = "SET LOCAL lock_timeout = '5s'";

/// What has become of an object.
#[derive(Clone, Debug)]
pub struct Tried {
    /// As a person reads it.
    pub identity: String,
    /// Why it still waits.
    pub waits: Option<String>,
    /// The table whose rows have to be copied again.
    pub copy_again: Option<TableName>,
}

/// Tries all that wait and that nobody has accepted as they are; with a term, only while the replica is at it.
///
/// # Errors
/// DR001 after a promotion, if a term is given; when the replica refuses.
pub async fn try_waiting(
    client: &mut Client,
    stream: &StreamName,
    term: Option<i64>,
) -> Result<Vec<Tried>, PgError> {
    let mut tried = Vec::new();
    for object in ddl_waiting::read(client, stream).await? {
        if object.accepted.is_none() {
            tried.push(try_one(client, stream, term, &object).await?);
        }
    }
    Ok(tried)
}

async fn try_one(
    client: &mut Client,
    stream: &StreamName,
    term: Option<i64>,
    object: &WaitingObject,
) -> Result<Tried, PgError> {
    let still = |reason: &str| WaitingObject {
        reason: reason.to_owned(),
        ..object.clone()
    };
    if build::is_waiting(object) {
        // Without the progress row: batches go on meanwhile.
        if let Err(reason) = build::build(client, object).await? {
            ddl_waiting::note(client, stream, &still(&reason)).await?;
            return Ok(Tried {
                identity: object.identity.clone(),
                waits: Some(reason),
                copy_again: None,
            });
        }
    }
    client.batch_execute(&format!("BEGIN; {BOUNDED}")).await?;
    let trying = async {
        match term {
            Some(term) => progress::hold(client, stream, term).await?,
            None => _ = progress::lock(client, stream).await?,
        }
        if object.drift && !drift::still_stands(client, object).await? {
            // Something newer is on its way: the next look says what is to be done.
            client.batch_execute("COMMIT").await?;
            return Ok(Err("the source has changed it since".to_owned()));
        }
        let outcome = apply::once_more(client, object).await?;
        match &outcome {
            Ok(_) => {
                ddl_waiting::settled(client, stream, std::slice::from_ref(&object.address)).await?;
            }
            Err(reason) => ddl_waiting::note(client, stream, &still(reason)).await?,
        }
        client.batch_execute("COMMIT").await?;
        Ok::<_, PgError>(outcome)
    };
    let outcome = match trying.await {
        Err(error) if error.sqlstate().is_some_and(|state| state != "DR001") => {
            client.batch_execute("ROLLBACK").await?;
            Err(error.to_string())
        }
        outcome => outcome?,
    };
    let table = apply::table_of_address(&object.address);
    Ok(Tried {
        identity: object.identity.clone(),
        copy_again: table.filter(|_| matches!(outcome, Ok(true))),
        waits: outcome.err(),
    })
}
