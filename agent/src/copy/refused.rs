//! A constraint that refuses rows of the source is set aside, and they are copied ([`crate::schema::refused`]).

use tokio_postgres::Client;

use super::error::CopyError;
use super::ledger::CopyLedger;
use super::progress::CopyObserver;
use crate::names::TableName;
use crate::schema::deferred;
use crate::schema::refused::{self, Taken};

/// Sets aside what has refused rows of this table, and returns how many constraints that were. `None` if the error is not one
/// of a constraint; none may be left where another connection has set it aside meanwhile.
pub(super) async fn set_aside(
    replica: &mut Client,
    ledger: CopyLedger<'_>,
    table: &TableName,
    error: &CopyError,
    observer: &dyn CopyObserver,
) -> Result<Option<usize>, CopyError> {
    let CopyError::Replica { source, .. } = error else {
        return Ok(None);
    };
    let doing = || CopyError::replica(format!("set a constraint of table {table} aside"));
    replica.batch_execute("ROLLBACK").await.map_err(doing())?;
    let transaction = replica.transaction().await.map_err(doing())?;
    let taken = refused::take_away(&transaction, source, table).await;
    let Some(taken) = taken.map_err(doing())? else {
        return Ok(None);
    };
    let stream = ledger.0.stream;
    for Taken { what, add } in &taken {
        let opened = deferred::when_opened();
        deferred::keep(&transaction, stream, (what, add), opened)
            .await
            .map_err(CopyError::replica("keep a constraint for later"))?;
    }
    transaction.commit().await.map_err(doing())?;
    for taken in &taken {
        super::leave_out(observer, &taken.told());
    }
    Ok(Some(taken.len()))
}
