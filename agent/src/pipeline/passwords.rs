//! Password verifiers, from server to server: they are in no stream, no record and no archive.
//!
//! Under route `direct` alone, where this process reaches both servers, and where its role may read `pg_authid` on the source: that is a
//! superuser's right. Otherwise passwords stay as `init` has copied them.
//!
//! # Invariants
//! - Nothing is written for an agent that was superseded.
//! - No verifier is in a statement's text, in a log of ours or in an error; where the role may, the server is told to log nothing.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::error::SessionError;
use crate::error::chain;
use crate::names::stream::StreamName;
use crate::pg::{self, ConnInfo, PgError, Session};
use crate::schema::progress;

/// How often it is compared.
const EVERY: Duration = Duration::from_secs(30);

/// How often it is asked whether the right was given.
const WITHOUT_THE_RIGHT: Duration = Duration::from_secs(600);

/// By role; none has a role without a password.
type Verifiers = HashMap<String, Option<String>>;

/// The task of one session.
pub(super) struct Passwords {
    pub(super) source: ConnInfo,
    pub(super) replica: ConnInfo,
    pub(super) stream: StreamName,
    pub(super) term: i64,
}

impl Passwords {
    /// Carries them over for as long as the session lasts.
    pub(super) async fn run(self) -> Option<SessionError> {
        // Where the replica does not let itself be read: what was written.
        let mut written = Verifiers::new();
        loop {
            let pause = match self.carry(&mut written).await {
                Ok(true) => EVERY,
                Ok(false) => WITHOUT_THE_RIGHT,
                Err(error) => {
                    tracing::debug!(stream = %self.stream, error = %chain(&error), "passwords were not compared");
                    EVERY
                }
            };
            sleep(pause).await;
        }
    }

    /// Whether this side may read them.
    async fn carry(&self, written: &mut Verifiers) -> Result<bool, PgError> {
        const WANTED: &str = "
            SELECT a.rolname::text, a.rolpassword FROM pg_catalog.pg_authid a JOIN dr_agent.roles_of_database() AS r ON r.role = a.oid";
        const FOUND: &str = "SELECT rolname::text, rolpassword FROM pg_catalog.pg_authid";
        let session = Session::new(self.stream.application_name("passwords"));
        let source = pg::connect(&self.source, &session).await?;
        if !may_read(&source).await? {
            return Ok(false);
        }
        let wanted = verifiers(&source, WANTED).await?;
        let mut replica = pg::connect(&self.replica, &session).await?;
        let is_read = may_read(&replica).await?;
        if is_read {
            *written = verifiers(&replica, FOUND).await?;
        }
        let present = present(&replica).await?;
        for (role, verifier) in wanted {
            let is_same = written.get(&role) == Some(&verifier);
            if is_same || !present.contains(&role) {
                continue;
            }
            match self.write(&mut replica, &role, verifier.as_deref()).await {
                Ok(()) => {
                    tracing::info!(stream = %self.stream, role, "the role has the source's password now");
                    written.insert(role, verifier);
                }
                Err(error) if error.sqlstate() == Some("42501") => {
                    tracing::warn!(
                        stream = %self.stream, role,
                        "the role's password is another one on the replica, where ours may not set it: set it there"
                    );
                    written.insert(role, verifier);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    async fn write(
        &self,
        replica: &mut Client,
        role: &str,
        verifier: Option<&str>,
    ) -> Result<(), PgError> {
        const SECRET: &str = "
            SELECT pg_catalog.set_config('dr_agent.role', $1, true), pg_catalog.set_config('dr_agent.verifier', $2, true)";
        const SET: &str = "
            DO $$ BEGIN
                EXECUTE pg_catalog.format('ALTER ROLE %I PASSWORD %s', pg_catalog.current_setting('dr_agent.role'),
                    coalesce(pg_catalog.quote_literal(nullif(pg_catalog.current_setting('dr_agent.verifier'), '')), 'NULL'));
            EXCEPTION WHEN OTHERS THEN
                -- The server would log the statement as the error's context.
                RAISE EXCEPTION USING ERRCODE = SQLSTATE, MESSAGE = 'the password was not set';
            END $$";
        let transaction = replica.transaction().await?;
        progress::hold(&transaction, &self.stream, self.term).await?;
        for (name, value) in [
            ("log_statement", "none"),
            ("log_min_duration_statement", "-1"),
            ("log_min_duration_sample", "-1"),
            ("log_min_error_statement", "panic"),
        ] {
            let quiet = format!(
                "SELECT pg_catalog.set_config('{name}', '{value}', true)
                  WHERE (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)"
            );
            transaction.query_typed(&quiet, &[]).await?;
        }
        let verifier = verifier.unwrap_or_default();
        transaction
            .query_typed(SECRET, &[(&role, Type::TEXT), (&verifier, Type::TEXT)])
            .await?;
        transaction.batch_execute(SET).await?;
        transaction.commit().await?;
        Ok(())
    }
}

async fn may_read(client: &Client) -> Result<bool, PgError> {
    const SQL: &str = "SELECT pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'SELECT')";
    Ok(client.query_typed_one(SQL, &[]).await?.get(0))
}

async fn verifiers(client: &Client, sql: &str) -> Result<Verifiers, PgError> {
    let rows = client.query_typed(sql, &[]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn present(client: &Client) -> Result<Vec<String>, PgError> {
    const SQL: &str = "SELECT rolname::text FROM pg_catalog.pg_roles";
    let rows = client.query_typed(SQL, &[]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
