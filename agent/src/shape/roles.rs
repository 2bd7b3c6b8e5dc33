//! The roles of the replica, as far as shapes name them: one that is not there can own nothing and be granted nothing.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use crate::pg::PgError;

/// By name, and of each whether the agent may act as it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    names: BTreeMap<String, bool>,
    /// The one that asks.
    ours: String,
    /// It is a superuser.
    superuser: bool,
    /// Those that the source has, where it has told: what the others may do here is the standby's own affair.
    known: Option<BTreeSet<String>>,
}

impl Roles {
    /// Reads them.
    ///
    /// # Errors
    /// When the server refuses.
    pub async fn read(client: &Client) -> Result<Self, PgError> {
        const SQL: &str = "SELECT rolname::text, pg_catalog.pg_has_role(oid, 'MEMBER'), rolname = current_user, rolsuper FROM pg_catalog.pg_roles";
        let rows = client.query_typed(SQL, &[]).await?;
        let ours = rows.iter().find(|row| row.get(2));
        Ok(Self {
            superuser: ours.is_some_and(|row| row.get(3)),
            known: None,
            names: rows.iter().map(|row| (row.get(0), row.get(1))).collect(),
            ours: ours.map(|row| row.get(0)).unwrap_or_default(),
        })
    }

    /// Whether there is such a role.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Whether the agent may give something to it.
    pub fn acts_as(&self, name: &str) -> bool {
        self.names.get(name).copied().unwrap_or(false)
    }

    /// With the roles that the source has, if it has told.
    #[must_use]
    pub fn with_known(self, known: Option<BTreeSet<String>>) -> Self {
        Self { known, ..self }
    }

    /// Whether the source has such a role, as far as that is known.
    pub fn is_known(&self, name: &str) -> bool {
        // Every server has its own of these.
        name.starts_with("pg_") || self.known.as_ref().is_none_or(|known| known.contains(name))
    }

    /// Whether it is the agent's own.
    pub fn is_ours(&self, name: &str) -> bool {
        self.ours == name
    }

    /// Whether the agent may do everything.
    pub fn superuser(&self) -> bool {
        self.superuser
    }

    #[cfg(test)]
    pub(super) fn of(names: &[(&str, bool)]) -> Self {
        let names = names.iter().map(|(name, acts)| ((*name).to_owned(), *acts));
        Self {
            names: names.collect(),
            ours: String::new(),
            superuser: false,
            known: None,
        }
    }
}
