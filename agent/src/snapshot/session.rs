//! The sessions of a copy or a base backup, on both servers, and getting rid of those an earlier one
//! left behind where it wrote.
//!
//! # Invariants
//! - Text means the same on both sides: dates, intervals, floats, money, time zone and encoding are
//!   set alike.
//! - Row security never hides a row: with it off, a policy that would apply is an error.
//! - Before anything is written, the replica's sessions of an earlier copy of this stream are gone:
//!   a `pg_restore` outlives an agent that was killed.
//! - Sessions on the source are never ended: the one that exported the snapshot may be among them.

use tokio_postgres::Client;

use super::error::CopyError;
use super::tools::Environment;
use crate::catalog::{quote_literal, server_version};
use crate::pg::{ConnInfo, Session, connect, leftover};

/// Settings that decide how values look as text.
pub(crate) const VALUES: [(&str, &str); 10] = [
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

/// How long we wait for a table of the source. Whoever wants it exclusively may be waiting for a lock that another of our
/// sessions holds, and nobody sees that deadlock: the application queues up behind both until we give in. The next
/// attempt comes with a new snapshot.
pub(super) const SOURCE_LOCK_TIMEOUT: &str = "5s";

/// Opens sessions on the source that see one exported snapshot.
pub(crate) struct SourceSide<'a> {
    conninfo: &'a ConnInfo,
    application_name: String,
    snapshot: &'a str,
    version_num: i32,
}

impl<'a> SourceSide<'a> {
    /// Opens the first session, at the snapshot.
    ///
    /// Nothing is done before it: until that session has locked the tables, the source may still truncate or
    /// rewrite one, and the snapshot is lost.
    pub(crate) async fn begin(
        conninfo: &'a ConnInfo,
        application_name: String,
        snapshot: &'a str,
    ) -> Result<(Self, Client), CopyError> {
        let mut side = Self {
            conninfo,
            application_name,
            snapshot,
            version_num: 0,
        };
        let client = side.at_snapshot().await?;
        side.version_num = server_version(&client)
            .await
            .map_err(|source| CopyError::Source {
                doing: "ask for the version".to_owned(),
                source,
            })?;
        side.lift_transaction_timeout(&client).await?;
        Ok((side, client))
    }

    /// `server_version_num`.
    pub(crate) fn version_num(&self) -> i32 {
        self.version_num
    }

    /// The exported snapshot's name.
    pub(crate) fn snapshot(&self) -> &str {
        self.snapshot
    }

    /// What `pg_dump` needs to reach the source.
    pub(crate) fn environment(&self) -> Environment {
        Environment::new(self.conninfo, &self.application_name, &[])
    }

    /// A session in a read-only transaction that sees the exported snapshot.
    pub(crate) async fn at_snapshot(&self) -> Result<Client, CopyError> {
        let mut session = Session::new(&self.application_name);
        for (name, value) in VALUES.into_iter().chain(NO_TIMEOUTS) {
            session = session.set(name, value);
        }
        let session = session.set("lock_timeout", SOURCE_LOCK_TIMEOUT);
        let opened = connect(self.conninfo, &session).await;
        let client = opened.map_err(|source| CopyError::Source {
            doing: "open a session".to_owned(),
            source,
        })?;
        self.lift_transaction_timeout(&client).await?;
        self.see_snapshot(&client).await?;
        Ok(client)
    }

    async fn lift_transaction_timeout(&self, client: &Client) -> Result<(), CopyError> {
        if self.version_num >= 170_000 {
            client
                .batch_execute("SET transaction_timeout = 0")
                .await
                .map_err(CopyError::source("set up a session"))?;
        }
        Ok(())
    }

    async fn see_snapshot(&self, client: &Client) -> Result<(), CopyError> {
        client
            .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            .await
            .map_err(CopyError::source("begin"))?;
        let import = format!(
            "SET TRANSACTION SNAPSHOT {}",
            quote_literal(self.snapshot).trim_start()
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
}

/// Opens sessions on the database that is written: the replica's, or an empty one that a base backup fills.
pub(crate) struct ReplicaSide<'a> {
    conninfo: &'a ConnInfo,
    application_name: String,
    version_num: i32,
}

impl<'a> ReplicaSide<'a> {
    /// Opens the first session and ends what an earlier copy left behind.
    pub(crate) async fn begin(
        conninfo: &'a ConnInfo,
        application_name: String,
    ) -> Result<(Self, Client), CopyError> {
        let mut side = Self {
            conninfo,
            application_name,
            version_num: 0,
        };
        let client = side.open().await?;
        let asking = |error| CopyError::Replica {
            doing: "ask for the version".to_owned(),
            source: error,
        };
        side.version_num = server_version(&client).await.map_err(asking)?;
        leftover::end_sessions(&client, &side.application_name)
            .await
            .map_err(|error| CopyError::Replica {
                doing: "end the sessions of an earlier copy".to_owned(),
                source: error,
            })?;
        side.lift_transaction_timeout(&client).await?;
        Ok((side, client))
    }

    /// `server_version_num`.
    pub(crate) fn version_num(&self) -> i32 {
        self.version_num
    }

    /// What `pg_restore` needs to write.
    pub(crate) fn environment(&self) -> Environment {
        Environment::new(self.conninfo, &self.application_name, &WRITING)
    }

    /// A session that may write.
    pub(crate) async fn open(&self) -> Result<Client, CopyError> {
        let mut session = Session::new(&self.application_name);
        for (name, value) in VALUES.into_iter().chain(NO_TIMEOUTS).chain(WRITING) {
            session = session.set(name, value);
        }
        let session = session.set("lock_timeout", "0");
        let opened = connect(self.conninfo, &session).await;
        let client = opened.map_err(|source| CopyError::Replica {
            doing: "open a session".to_owned(),
            source,
        })?;
        self.lift_transaction_timeout(&client).await?;
        Ok(client)
    }

    async fn lift_transaction_timeout(&self, client: &Client) -> Result<(), CopyError> {
        if self.version_num >= 170_000 {
            client
                .batch_execute("SET transaction_timeout = 0")
                .await
                .map_err(CopyError::replica("set up a session"))?;
        }
        Ok(())
    }
}
