//! Objects that a command of the source could not bring to what they are there are tried again, beside the stream.
//!
//! What they lacked may have come with a later command, or a person has mended it. Before that it is compared what both sides are:
//! what differs and nothing has told of joins them.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use super::Wake;
use super::error::SessionError;
use super::set_aside::TablesAside;
use crate::ddl;
use crate::error::{Class, Classify as _, chain};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, leftover};
use crate::schema::ddl_decided;
use crate::setup;
use crate::sink::replica;

/// How often it is tried without being told that something was mended.
const TRY_EVERY: Duration = Duration::from_secs(30);

/// How often every object is compared, and not those alone that were written since.
const WHOLLY_EVERY: Duration = Duration::from_secs(900);

/// The task of one session.
pub(super) struct Waiting {
    pub(super) replica: ConnInfo,
    pub(super) stream: StreamName,
    pub(super) term: i64,
    pub(super) aside: TablesAside,
    /// Told when a person has mended something.
    pub(super) wanted: Wake,
    /// When everything was compared, not only what has changed since.
    pub(super) wholly: Option<Instant>,
}

impl Waiting {
    /// Tries for as long as the session lasts.
    pub(super) async fn run(mut self) -> Option<SessionError> {
        if let Err(error) = self.end_earlier().await {
            tracing::debug!(stream = %self.stream, error = %chain(&error), "an earlier build may go on");
        }
        loop {
            let _ = timeout(TRY_EVERY, self.wanted.wanted()).await;
            match self.try_all().await {
                Ok(Some(table)) => return Some(SessionError::NotCopied { table }),
                Ok(None) => {}
                Err(error) if error.class() == Class::Fenced => return Some(error),
                Err(error) => {
                    tracing::debug!(stream = %self.stream, error = %chain(&error), "what waits was not tried");
                }
            }
        }
    }

    /// A build of an agent that was killed goes on until its server notices.
    async fn end_earlier(&self) -> Result<(), PgError> {
        let client = self.connect().await?;
        let name = self.stream.application_name(ddl::INDEX_ROLE);
        leftover::end_sessions(&client, &name).await.map(drop)
    }

    /// Returns a table whose rows have to be copied again.
    async fn try_all(&mut self) -> Result<Option<TableName>, SessionError> {
        let mut client = self.connect().await.map_err(replica::SinkError::from)?;
        self.compare(&mut client).await;
        let tried = ddl::try_waiting(&mut client, &self.stream, Some(self.term)).await;
        let tried = tried.map_err(replica::SinkError::from)?;
        let wanted = ddl_decided::take_wanted(&client, &self.stream).await;
        let mut again = wanted.map_err(replica::SinkError::from)?;
        for one in &tried {
            if one.waits.is_none() {
                tracing::info!(stream = %self.stream, object = one.identity, "is as on the source now");
                self.aside.changed.notify_one();
            }
        }
        if tried.iter().any(|one| one.waits.is_none()) {
            self.compare(&mut client).await;
        }
        let mended = tried.into_iter().filter_map(|one| one.copy_again);
        again.extend(mended.map(|table| (table, "its definition was mended".to_owned())));
        for (table, reason) in &again {
            let reason = format!("its rows are copied again: {reason}");
            let tables = std::slice::from_ref(table);
            setup::set_aside(&self.replica, &self.stream, tables, &reason, false).await?;
        }
        Ok(again.into_iter().next().map(|(table, _)| table))
    }

    /// What has drifted joins what waits. What cannot be said now is looked at with the next try.
    async fn compare(&mut self, client: &mut Client) {
        let wholly = self.wholly.is_none_or(|at| at.elapsed() >= WHOLLY_EVERY);
        match ddl::drift::look(client, &self.stream, wholly).await {
            Ok(drifted) => {
                if wholly {
                    self.wholly = Some(Instant::now());
                }
                if drifted.is_some_and(|objects| objects > 0) {
                    self.aside.changed.notify_one();
                }
            }
            Err(error) => {
                tracing::debug!(stream = %self.stream, error = %chain(&error), "the two sides were not compared");
            }
        }
    }

    async fn connect(&self) -> Result<Client, PgError> {
        pg::connect(&self.replica, &ddl::index_session(&self.stream)).await
    }
}
