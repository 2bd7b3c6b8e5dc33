//! The sessions of a copy, on both servers, and getting rid of those an earlier copy left behind on
//! the replica.
//!
//! # Invariants
//! - Text means the same on both sides: dates, intervals, floats, money, time zone and encoding are
//!   set alike.
//! - Row security never hides a row: with it off, a policy that would apply is an error.
//! - Before anything is written, the replica's sessions of an earlier copy of this stream are gone:
//!   a `pg_restore` outlives an agent that was killed.
//! - Sessions on the source are never ended: the one that exported the snapshot may be among them.

use tokio_postgres::Client;

use super::CopyJob;
use super::error::CopyError;
use super::tools::Environment;
use crate::catalog::{quote_literal, server_version};
use crate::pg::{Session, connect, leftover};

/// Settings that decide how values look as text.
const VALUES: [(&str, &str); 10] = [
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("xmloption", "content"),
    // Names in regclass and its kin come out with their schema, types of columns too.
    ("search_path", "pg_catalog"),
    ("row_security", "off"),
    ("standard_conforming_strings", "on"),
];

const NO_TIMEOUTS: [(&str, &str); 2] = [
    ("statement_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
];

/// What lets us write to the replica before its promotion, without its triggers and foreign keys.
const WRITING: [(&str, &str); 3] = [
    ("default_transaction_read_only", "off"),
    ("session_replication_role", "replica"),
    ("check_function_bodies", "off"),
];

/// How long we wait for a table of the source that somebody holds exclusively. Waiting longer in
/// silence helps nobody; the next attempt comes with a new snapshot.
const SOURCE_LOCK_TIMEOUT: &str = "60s";

/// Opens the sessions of one copy.
pub(super) struct Sessions<'a> {
    job: &'a CopyJob<'a>,
    application_name: String,
    source_version_num: i32,
    replica_version_num: i32,
}

impl<'a> Sessions<'a> {
    /// Opens the first session on the source, at the snapshot.
    ///
    /// Nothing is done before it: until that session has locked the tables, the source may still truncate or
    /// rewrite one, and the snapshot is lost.
    pub(super) async fn begin(job: &'a CopyJob<'a>) -> Result<(Self, Client), CopyError> {
        let mut sessions = Self {
            job,
            application_name: job.stream.application_name("copy"),
            source_version_num: 0,
            replica_version_num: 0,
        };
        let source = sessions.source().await?;
        sessions.see_snapshot(&source).await?;
        let asking = |error| CopyError::Source {
            doing: "ask for the version".to_owned(),
            source: error,
        };
        sessions.source_version_num = server_version(&source).await.map_err(asking)?;
        sessions.lift_transaction_timeout(&source).await?;
        Ok((sessions, source))
    }

    /// Opens the first session on the replica and ends what an earlier copy left behind there.
    pub(super) async fn begin_replica(&mut self) -> Result<Client, CopyError> {
        let replica = self.replica().await?;
        let asking = |error| CopyError::Replica {
            doing: "ask for the version".to_owned(),
            source: error,
        };
        self.replica_version_num = server_version(&replica).await.map_err(asking)?;
        leftover::end_sessions(&replica, &self.application_name)
            .await
            .map_err(|error| CopyError::Replica {
                doing: "end the sessions of an earlier copy".to_owned(),
                source: error,
            })?;
        if self.replica_version_num >= 170_000 {
            replica
                .batch_execute("SET transaction_timeout = 0")
                .await
                .map_err(CopyError::replica("set up a session"))?;
        }
        Ok(replica)
    }

    /// `server_version_num` of the source.
    pub(super) fn source_version_num(&self) -> i32 {
        self.source_version_num
    }

    /// `server_version_num` of the replica.
    pub(super) fn replica_version_num(&self) -> i32 {
        self.replica_version_num
    }

    /// Connection pairs, and jobs of `pg_restore`.
    pub(super) fn jobs(&self) -> u16 {
        self.job.settings.jobs.max(1)
    }

    /// Tables larger than this are split.
    pub(super) fn split_bytes(&self) -> u64 {
        self.job.settings.split_bytes
    }

    /// A session on the source, outside any transaction.
    pub(super) async fn source(&self) -> Result<Client, CopyError> {
        let mut session = Session::new(&self.application_name);
        for (name, value) in VALUES.into_iter().chain(NO_TIMEOUTS) {
            session = session.set(name, value);
        }
        let session = session.set("lock_timeout", SOURCE_LOCK_TIMEOUT);
        let opened = connect(self.job.source, &session).await;
        let client = opened.map_err(|source| CopyError::Source {
            doing: "open a session".to_owned(),
            source,
        })?;
        self.lift_transaction_timeout(&client).await?;
        Ok(client)
    }

    async fn lift_transaction_timeout(&self, source: &Client) -> Result<(), CopyError> {
        if self.source_version_num >= 170_000 {
            source
                .batch_execute("SET transaction_timeout = 0")
                .await
                .map_err(CopyError::source("set up a session"))?;
        }
        Ok(())
    }

    /// A session on the source, in a read-only transaction that sees the exported snapshot.
    pub(super) async fn source_at_snapshot(&self) -> Result<Client, CopyError> {
        let client = self.source().await?;
        self.see_snapshot(&client).await?;
        Ok(client)
    }

    async fn see_snapshot(&self, client: &Client) -> Result<(), CopyError> {
        client
            .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            .await
            .map_err(CopyError::source("begin"))?;
        let import = format!(
            "SET TRANSACTION SNAPSHOT {}",
            quote_literal(self.job.snapshot).trim_start()
        );
        client.batch_execute(&import).await.map_err(|error| {
            // invalid_parameter_value, object_not_in_prerequisite_state, undefined_object (17+).
            let gone = error
                .code()
                .is_some_and(|code| matches!(code.code(), "22023" | "55000" | "42704"));
            if gone {
                CopyError::SnapshotLost
            } else {
                CopyError::source("import the snapshot")(error)
            }
        })?;
        Ok(())
    }

    /// A session on the replica that may write.
    pub(super) async fn replica(&self) -> Result<Client, CopyError> {
        let mut session = Session::new(&self.application_name);
        for (name, value) in VALUES.into_iter().chain(NO_TIMEOUTS).chain(WRITING) {
            session = session.set(name, value);
        }
        let session = session.set("lock_timeout", "0");
        let opened = connect(self.job.replica, &session).await;
        let client = opened.map_err(|source| CopyError::Replica {
            doing: "open a session".to_owned(),
            source,
        })?;
        if self.replica_version_num >= 170_000 {
            client
                .batch_execute("SET transaction_timeout = 0")
                .await
                .map_err(CopyError::replica("set up a session"))?;
        }
        Ok(client)
    }

    /// What `pg_dump` needs to reach the source.
    pub(super) fn source_environment(&self) -> Environment {
        Environment::new(self.job.source, &self.application_name, &[])
    }

    /// What `pg_restore` needs to write to the replica.
    pub(super) fn replica_environment(&self) -> Environment {
        Environment::new(self.job.replica, &self.application_name, &WRITING)
    }
}
