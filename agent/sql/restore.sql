-- What a restore keeps in the database that it builds, beside what a replica has. Created in the transaction that found the
-- database empty: so everything else in it came after.
CREATE TABLE dr_agent.restore (
    stream   text PRIMARY KEY,
    history  text NOT NULL,                      -- what the LSNs are of
    base_lsn pg_lsn NOT NULL,
    began_at timestamptz NOT NULL DEFAULT now(),
    detail   jsonb NOT NULL DEFAULT '{}'         -- what is told at the end
);
