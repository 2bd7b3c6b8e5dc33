//! The sessions of a copy or a base backup, on both servers, and getting rid of those an earlier one
//! left behind where it wrote.
//!
//! # Invariants
//! - Before anything is written, the replica's sessions of an earlier copy of this stream are gone:
//!   a `pg_restore` outlives an agent that was killed.
//! - Sessions on the source are never ended: the one that exported the snapshot may be among them.

use tokio_postgres::Client;

use super::error::CopyError;
use super::tools::ToolEnvironment;
use crate::catalog::server_version;
use crate::pg::quote::quote_literal;
use crate::pg::{ConnInfo, Session, connect, leftover};

/// How long we wait for a table of the source. Whoever wants it exclusively may be waiting for a lock that another of our
/// sessions holds, and nobody sees that deadlock: the application queues up behind both until we give in. The next
/// attempt comes with a new snapshot.
pub(super) const SOURCE_LOCK_TIMEOUT: &str = "5s";

/// Opens sessions on the source that see one exported snapshot.
pub(crate) struct CopySource<'a> {
    conninfo: &'a ConnInfo,
    application_name: String,
    snapshot: &'a str,
    version_num: i32,
}

impl<'a> CopySource<'a> {
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
    pub(crate) fn environment(&self) -> ToolEnvironment {
        let session = Session::new(&self.application_name);
        ToolEnvironment::new(self.conninfo, &session, self.version_num)
    }

    /// A session in a read-only transaction that sees the exported snapshot.
    pub(crate) async fn at_snapshot(&self) -> Result<Client, CopyError> {
        let session = Session::new(&self.application_name).set("lock_timeout", SOURCE_LOCK_TIMEOUT);
        let opened = connect(self.conninfo, &session).await;
        let client = opened.map_err(|source| CopyError::Source {
            doing: "open a session".to_owned(),
            source,
        })?;
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
        Ok((side, client))
    }

    /// `server_version_num`.
    pub(crate) fn version_num(&self) -> i32 {
        self.version_num
    }

    /// What `pg_restore` needs to write.
    pub(crate) fn environment(&self) -> ToolEnvironment {
        ToolEnvironment::new(self.conninfo, &self.session(), self.version_num)
    }

    /// A session that may write.
    pub(crate) async fn open(&self) -> Result<Client, CopyError> {
        let opened = connect(self.conninfo, &self.session()).await;
        opened.map_err(|source| CopyError::Replica {
            doing: "open a session".to_owned(),
            source,
        })
    }

    /// Functions may be restored before what their bodies name.
    fn session(&self) -> Session {
        Session::new(&self.application_name)
            .silent()
            .set("check_function_bodies", "off")
    }
}
