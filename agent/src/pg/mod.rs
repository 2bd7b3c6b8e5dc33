//! What PostgreSQL says: connections, the replication protocol, pgoutput.
//!
//! Knows nothing of batches, sinks or promotions. Two kinds of connection: ordinary ones through
//! `tokio-postgres` ([`connect`]) and walsender ones, which that crate does not speak
//! ([`replication`]). Both share [`ConnInfo`], TLS and password rules.

mod connect;
mod conninfo;
mod error;
pub mod pgoutput;
pub mod relation;

pub use connect::{Session, connect};
pub use conninfo::{ConnInfo, ConnInfoError};
pub use error::{PgError, ServerError};
pub use tokio_postgres::types::PgLsn;
