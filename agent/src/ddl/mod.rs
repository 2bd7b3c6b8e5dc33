//! DDL in commit order: from a row of `dr_agent.ddl` to the same shape on the replica.
//!
//! ```text
//! source   command ▶ event trigger (agent/sql/capture.sql) ▶ dr_agent.ddl ─ published, a barrier at its place in the stream
//! replica  DdlEvent ▶ statement ● exact? ▶ replay ▶ compare shapes ▶ equal
//!                            └ no, or not equal ▶ shape ● statements that bring the object to the recorded shape ▶ compare
//!                                                        └ not possible ▶ the object waits, with the reason; the rest goes on
//! ```
//! The statement helps, the result decides. What no command told of is found by comparing what both sides are ([`drift`]), and waits
//! like any other object.

mod again;
mod apply;
mod build;
pub mod drift;
mod outcome;
mod overtaken;
mod remove;
mod rename;
mod rewrite;
pub mod statement;

pub use again::{Tried, try_waiting};
pub use apply::{Replay, is_across, table_of};
pub use build::{ROLE as INDEX_ROLE, session as index_session, yield_indexes};
pub use outcome::{CommandCounts, Done, Outcome};
pub use overtaken::Newer;

use tokio_postgres::Client;

use crate::pg::PgError;
use crate::schema::fingerprint;
use crate::shape::Roles;

/// The replica's roles, and which of them the source has.
async fn roles(client: &Client) -> Result<Roles, PgError> {
    let roles = Roles::read(client).await?;
    Ok(roles.with_known(fingerprint::known_roles(client).await?))
}
