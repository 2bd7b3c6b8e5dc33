//! Which tables are set aside: shown here, and noted on the replica, where a promotion reads it.
//!
//! # Invariants
//! - A table of which changes were left out is named, also where nobody can look whose it is.
//! - What is noted is taken back only by a look that saw what there is.

use std::collections::BTreeMap;

use super::Late;
use crate::catalog::Table;
use crate::names::TableName;
use crate::pipeline::Leg;
use crate::pipeline::error::SessionError;
use crate::schema::set_aside::{Aside, BEING_COPIED, Noted};
use crate::setup;
use crate::watch::coverage;

type Reasons = BTreeMap<TableName, String>;

impl Late {
    /// Shows what a look has found: `tables`, what is to be had `elsewhere` only, and with the reason `unseen`, if there is one,
    /// whatever else changes were left out of.
    pub(super) async fn tell(
        &self,
        tables: &[Table],
        elsewhere: &[Aside],
        unseen: Option<&str>,
    ) -> Result<(), SessionError> {
        let mut aside = unseen.map_or_else(Reasons::new, |reason| self.left_out(reason));
        let elsewhere = elsewhere.iter();
        aside.extend(elsewhere.map(|one| (one.table.clone(), one.reason.clone())));
        self.say(&aside);
        {
            let troubles = self.aside.troubles();
            if unseen.is_some() {
                let known = troubles.reasons();
                aside.extend(known.map(|(table, reason)| (table.clone(), reason.clone())));
            }
            for table in tables {
                let reason = troubles.reason(&table.name);
                let reason = reason.unwrap_or(BEING_COPIED).to_owned();
                aside.insert(table.name.clone(), reason);
            }
        }
        self.show(aside, Noted::Alone).await
    }

    /// The same where there was no look: what was shown before stays, and what changes are left out of all the same comes to it.
    pub(super) async fn tell_unseen(&self, reason: &str) -> Result<(), SessionError> {
        let shown = self.status.set_aside();
        let mut new = self.left_out(reason);
        new.retain(|table, _| !shown.contains_key(&table.to_string()));
        self.say(&new);
        self.show(new, Noted::Beside).await
    }

    fn left_out(&self, reason: &str) -> Reasons {
        let tables = self.beside.left_out().into_iter();
        tables.map(|table| (table, reason.to_owned())).collect()
    }

    /// Says what is new among them.
    fn say(&self, aside: &Reasons) {
        let shown = self.status.set_aside();
        for (table, reason) in aside {
            if !shown.contains_key(&table.to_string()) {
                tracing::warn!(
                    database = %self.database, %table, reason,
                    "set aside: it is not protected; the rest goes on"
                );
            }
        }
    }

    async fn show(&self, aside: Reasons, noted: Noted) -> Result<(), SessionError> {
        let mut shown = match noted {
            Noted::Alone => BTreeMap::new(),
            Noted::Beside => self.status.set_aside(),
        };
        let as_text = |(table, reason): (&TableName, &String)| (table.to_string(), reason.clone());
        shown.extend(aside.iter().map(as_text));
        let count = shown.len() as u64;
        if self.leg == Leg::Apply {
            self.metrics.unprotected(coverage::NOT_COPIED, count);
        }
        self.aside.show(shown);
        let aside: Vec<Aside> = aside
            .into_iter()
            .map(|(table, reason)| Aside { table, reason })
            .collect();
        setup::note_aside(&self.replica(), &self.stream, &aside, noted).await?;
        Ok(())
    }
}
