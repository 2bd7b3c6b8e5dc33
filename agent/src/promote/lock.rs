//! One promotion of the same databases of a replica at a time: those of others go on beside it.
//!
//! Beside it every database has a lock of its own while it is worked on (`execute`), which also keeps a promotion away that knows
//! the replica by another URL.
//!
//! # Invariants
//! - Held from before the first look until the report is stored: a second promotion finds what the first one did.
//! - That of a killed promotion goes with its session.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::{Doing, PromoteError, observe};
use crate::config::{Config, Databases};
use crate::names::stream::APPLICATION_PREFIX;
use crate::pg::Session;
use crate::schema::promotion;

/// How long another promotion's lock is waited for: that of a killed one goes away by itself.
pub(super) const LOCK_WITHIN: Duration = Duration::from_secs(10);

/// Held until it is dropped.
pub(super) struct PromotionLock {
    client: Client,
}

impl PromotionLock {
    /// Waits for it.
    pub(super) async fn take(config: &Config) -> Result<Self, PromoteError> {
        let slot = &config.source.slot;
        let session = Session::new(format!("{APPLICATION_PREFIX}promote:{slot}"))
            .set("statement_timeout", "10s");
        let client = observe::anywhere(config, &session).await?;
        let sql = format!(
            "SELECT pg_try_advisory_lock(hashtext('{}'), hashtext($1))",
            promotion::TABLE
        );
        take(&client, &sql, &name(config)).await?;
        Ok(Self { client })
    }

    /// Whether nobody else can have taken it meanwhile.
    pub(super) async fn check(&self) -> Result<(), PromoteError> {
        let alive = self.client.check_connection().await;
        alive.map_err(|_| PromoteError::LockLost)
    }
}

/// What is promoted, as the configuration says it: two promotions at once are the same command twice.
fn name(config: &Config) -> String {
    let databases = match &config.source.databases {
        Databases::All => "*".to_owned(),
        Databases::List(names) => names.join(","),
    };
    format!("{}: {databases}", config.source.slot)
}

/// Tries `sql` with `name` until it says yes.
pub(super) async fn take(client: &Client, sql: &str, name: &str) -> Result<(), PromoteError> {
    let deadline = Instant::now() + LOCK_WITHIN;
    let mut is_said = false;
    loop {
        let row = client.query_one(sql, &[&name]).await;
        if row.doing("take the promotion's lock")?.get(0) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(PromoteError::Busy {
                stream: name.to_owned(),
            });
        }
        if !is_said {
            tracing::warn!(
                "another promotion of {name} is running; waiting up to {LOCK_WITHIN:?} for it"
            );
            is_said = true;
        }
        sleep(Duration::from_millis(100)).await;
    }
}
