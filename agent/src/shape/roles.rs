//! The roles of the replica, as far as shapes name them: one that is not there can own nothing and be granted nothing.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::pg::PgError;

/// By name: whether the agent may act as it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, bool>);

impl Roles {
    /// Reads them.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn read(client: &Client) -> Result<Self, PgError> {
        const SQL: &str =
            "SELECT rolname::text, pg_catalog.pg_has_role(oid, 'MEMBER') FROM pg_catalog.pg_roles";
        let rows = client.query_typed(SQL, &[]).await?;
        Ok(Self(
            rows.iter().map(|row| (row.get(0), row.get(1))).collect(),
        ))
    }

    /// Whether there is such a role.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether the agent may give something to it.
    pub fn acts_as(&self, name: &str) -> bool {
        self.0.get(name).copied().unwrap_or(false)
    }

    #[cfg(test)]
    pub(super) fn of(names: &[(&str, bool)]) -> Self {
        Self(
            names
                .iter()
                .map(|(name, acts)| ((*name).to_owned(), *acts))
                .collect(),
        )
    }
}
