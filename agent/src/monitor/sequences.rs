//! Positions of sequences, written into the in-band table `dr_agent.sequence_state`: logical decoding does not carry them.
//!
//! # Invariants
//! - What other sessions do to sequences fails nothing here: one that was dropped meanwhile, or is locked, is passed over until
//!   the next look.
//!
//! # What it does not do
//! A sequence that was never called has no position; one whose position this role may not read has none either.

use tokio_postgres::Client;

use crate::pg::PgError;

/// All in one statement. Reading a position opens the sequence, which waits for whoever has it locked.
const AT_ONCE: &str = "
    SET LOCAL lock_timeout = '500ms';
    INSERT INTO dr_agent.sequence_state AS s (schema_name, sequence_name, last_value, is_called)
    SELECT schemaname, sequencename, last_value, true FROM pg_catalog.pg_sequences
     WHERE last_value IS NOT NULL AND schemaname <> 'dr_agent'
    EXCEPT
    SELECT schema_name, sequence_name, last_value, is_called FROM dr_agent.sequence_state
    ON CONFLICT (schema_name, sequence_name)
    DO UPDATE SET last_value = excluded.last_value, is_called = excluded.is_called";

/// One by one, each in a block of its own. After twenty that are locked, those behind them have to wait for the next look.
const ONE_BY_ONE: &str = "
    DO $one$
    DECLARE
        s record;
        at bigint;
        locked int := 0;
    BEGIN
        PERFORM pg_catalog.set_config('lock_timeout', '20ms', true);
        FOR s IN
            SELECT c.oid, n.nspname::text AS schema, c.relname::text AS name
              FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'dr_agent'
        LOOP
            BEGIN
                at := pg_catalog.pg_sequence_last_value(s.oid);
            EXCEPTION
                WHEN lock_not_available THEN
                    at := NULL;
                    locked := locked + 1;
                WHEN OTHERS THEN
                    at := NULL;
            END;
            EXIT WHEN locked > 20;
            IF at IS NOT NULL AND NOT EXISTS (
                SELECT FROM dr_agent.sequence_state k
                 WHERE (k.schema_name, k.sequence_name, k.last_value, k.is_called) = (s.schema, s.name, at, true))
            THEN
                INSERT INTO dr_agent.sequence_state (schema_name, sequence_name, last_value, is_called)
                VALUES (s.schema, s.name, at, true)
                    ON CONFLICT (schema_name, sequence_name)
                    DO UPDATE SET last_value = excluded.last_value, is_called = excluded.is_called;
            END IF;
        END LOOP;
    END
    $one$";

/// Writes the positions that differ from those written last.
pub(super) async fn write(client: &Client) -> Result<(), PgError> {
    let Err(error) = client.batch_execute(AT_ONCE).await else {
        return Ok(());
    };
    let error = PgError::from(error);
    // lock_not_available
    if !error.is_of_something_dropped() && error.sqlstate() != Some("55P03") {
        return Err(error);
    }
    Ok(client.batch_execute(ONE_BY_ONE).await?)
}
