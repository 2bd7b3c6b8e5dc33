//! Prepared transactions that an older agent left behind, seen from a promotion.
//!
//! Names and verdict are [`crate::schema::prepared`]'s. What is special here is the moment before the term is
//! raised, when an undecided batch may hold the progress row that the promotion has to lock.
//!
//! # Invariants
//! - Before the term is raised only lane 0 of an undecided batch may be rolled back: that decides
//!   against the batch as a whole. Rolling back any other lane first could tear it.

use tokio_postgres::Client;

use super::{Doing, PromoteError};
use crate::names::stream::StreamName;
use crate::schema::prepared::{self, Verdict};
use crate::schema::progress;

/// Before the term is raised: decides against the batch whose prepared lane 0 keeps the progress row
/// locked. Returns whether there was one.
pub(super) async fn refuse_undecided(
    client: &Client,
    stream: &StreamName,
) -> Result<bool, PromoteError> {
    let applied = progress::read(client, stream)
        .await
        .doing("read how far the replica is")?;
    let left = prepared::left_behind(client, stream)
        .await
        .doing("list prepared transactions")?;
    let mut any = false;
    for prepared in left {
        let undecided = applied.is_some_and(|row| prepared.verdict(row.batch) == Verdict::RollBack);
        if prepared.lane == 0 && undecided {
            any |= prepared::finish(client, &prepared, Verdict::RollBack)
                .await
                .doing("settle a prepared transaction")?;
        }
    }
    Ok(any)
}
