//! Removes what a load left that was killed: every object of the users' in a database.
//!
//! Whoever calls it knows that the database held none before that load: a note of the load is in schema `dr_agent`, which
//! stays.
//!
//! # What it does not do
//! Large objects stay: no load brings any.

use tokio_postgres::Client;

use crate::pg::PgError;

/// Removes it; the source's event triggers do not see it.
///
/// # Errors
/// When the database refuses; called again, it goes on.
pub async fn wipe(client: &Client) -> Result<(), PgError> {
    // Event triggers first, because those that are ALWAYS would fire; what is no part of a schema by itself.
    const STATEMENTS: &str = "
        SELECT format('DROP EVENT TRIGGER IF EXISTS %I CASCADE', evtname) FROM pg_event_trigger
        UNION ALL
        SELECT format('DROP EXTENSION IF EXISTS %I CASCADE', extname)
          FROM pg_extension WHERE extname <> 'plpgsql'
        UNION ALL
        SELECT format('DROP FOREIGN DATA WRAPPER IF EXISTS %I CASCADE', fdwname) FROM pg_foreign_data_wrapper
        UNION ALL
        SELECT format('DROP SCHEMA IF EXISTS %I CASCADE', nspname)
          FROM pg_namespace
         WHERE nspname NOT LIKE 'pg\\_%' AND nspname NOT IN ('information_schema', 'dr_agent')
        UNION ALL
        SELECT format('DROP CAST IF EXISTS (%s AS %s) CASCADE', format_type(castsource, NULL), format_type(casttarget, NULL))
          FROM pg_cast WHERE oid >= 16384
        UNION ALL
        SELECT format('DROP LANGUAGE IF EXISTS %I CASCADE', lanname) FROM pg_language WHERE oid >= 16384
        UNION ALL
        SELECT format('DROP ACCESS METHOD IF EXISTS %I CASCADE', amname) FROM pg_am WHERE oid >= 16384
        UNION ALL
        SELECT 'CREATE SCHEMA public'
        UNION ALL
        SELECT CASE WHEN current_setting('server_version_num')::int >= 150000
                    THEN 'ALTER SCHEMA public OWNER TO pg_database_owner; GRANT USAGE ON SCHEMA public TO PUBLIC'
                    ELSE 'GRANT ALL ON SCHEMA public TO PUBLIC' END";
    for row in client.query(STATEMENTS, &[]).await? {
        client.batch_execute(row.get(0)).await?;
    }
    Ok(())
}
