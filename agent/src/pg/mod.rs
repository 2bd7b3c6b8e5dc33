//! What PostgreSQL says: connections, the replication protocol, pgoutput.
//!
//! Knows nothing of batches, sinks or promotions. Two kinds of connection: ordinary ones through
//! `tokio-postgres` ([`connect`]) and walsender ones, which that crate does not speak
//! ([`replication`]). Both share [`ConnInfo`], TLS and password rules.

mod again;
pub mod binary;
mod cause;
mod connect;
mod conninfo;
mod dial;
mod error;
pub mod leftover;
pub mod made_of;
mod password;
pub mod pgoutput;
pub mod quote;
mod redact;
pub mod replication;
pub mod settings;
mod silence;
pub mod slot;
mod socket;
mod stream;
mod throttle;
mod tls;

pub(crate) use again::{Again, tells_of_a_drop};
pub use connect::{Session, connect, connect_silently};
pub use conninfo::{ConnInfo, ConnInfoError, Host};
pub use error::{PgError, ServerError};
pub use tokio_postgres::types::PgLsn;
