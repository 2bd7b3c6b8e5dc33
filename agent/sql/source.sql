-- In-band tables: what must travel in commit order besides user data. Published like any other
-- table, and writable by their owner only. Repeatable.
CREATE SCHEMA IF NOT EXISTS dr_agent;
COMMENT ON SCHEMA dr_agent IS 'dr-agent: in-band tables of the replication to the replica';

-- One row, updated every second by the agent: measures lag, moves the slot on a quiet database.
CREATE TABLE IF NOT EXISTS dr_agent.heartbeat (
    id         smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    beat       bigint NOT NULL,
    written_at timestamptz NOT NULL
);
INSERT INTO dr_agent.heartbeat (id, beat, written_at) VALUES (1, 0, now())
    ON CONFLICT (id) DO NOTHING;

-- Sequences whose position changed since the last look; logical decoding does not carry them.
CREATE TABLE IF NOT EXISTS dr_agent.sequence_state (
    schema_name   text NOT NULL,
    sequence_name text NOT NULL,
    last_value    bigint NOT NULL,
    is_called     boolean NOT NULL,
    PRIMARY KEY (schema_name, sequence_name)
);

-- What every published table is listed as. A change of a row stands in the stream where the changes would have stood that were
-- not published: of a table that took the place of another, or was not in the publication for a while.
CREATE TABLE IF NOT EXISTS dr_agent.listed (
    stream      text NOT NULL,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    listed_as   text NOT NULL,  -- its oid, and the rows of pg_publication_rel and pg_inherits by which it is published
    PRIMARY KEY (stream, schema_name, table_name)
);

-- What the source has, by kind and name (protected), and what of it is not protected. Told in-band, so that it is known where the
-- source is not there to be asked.
CREATE TABLE IF NOT EXISTS dr_agent.coverage (
    stream    text NOT NULL,
    kind      text NOT NULL,
    protected boolean NOT NULL,
    objects   bigint NOT NULL,
    names     text NOT NULL,    -- a JSON list; empty where there are too many
    PRIMARY KEY (stream, kind, protected)
);

-- By how many seconds the replica's clock is ahead of this server's, as an agent that reaches both has measured. A promotion
-- compares the two clocks when only one of them is left.
CREATE TABLE IF NOT EXISTS dr_agent.clock (
    stream        text PRIMARY KEY,
    replica_ahead double precision NOT NULL,
    measured_at   timestamptz NOT NULL
);

-- What the event triggers wrote down of each command (capture.sql). A row is a barrier at its place in the stream. Types whose binary
-- form is their text, but for numbers.
CREATE TABLE IF NOT EXISTS dr_agent.ddl (
    id           bigint PRIMARY KEY,
    at           timestamptz NOT NULL,
    kind         text NOT NULL,     -- command, drop, rewrite
    tag          text NOT NULL,     -- ALTER TABLE
    role_name    text NOT NULL,     -- current_user: what the command was allowed to
    session_role text NOT NULL,
    search_path  text NOT NULL,
    query        text,              -- what the client sent: perhaps several statements, a DO block, a call of a function
    context      text,              -- PG_CONTEXT: the innermost statement, where a function or a DO block runs it
    ordinal      integer,           -- which firing within the client's string, from 1 on
    objects      json NOT NULL,     -- what it concerned, with the shapes afterwards
    version      integer DEFAULT pg_catalog.current_setting('server_version_num')::integer
);

-- What every object is, as the source last looked (fingerprint.sql).
CREATE TABLE IF NOT EXISTS dr_agent.fingerprint (
    class    oid NOT NULL,          -- class and object: of its catalog row on the source
    object   oid NOT NULL,
    kind     text NOT NULL,         -- kind, names, args: what pg_get_object_address takes
    names    text[] NOT NULL,
    args     text[] NOT NULL,
    identity text NOT NULL,         -- the same for people
    hash     bigint NOT NULL,       -- of its shape
    parts    bigint NOT NULL,
    shape    json,
    PRIMARY KEY (class, object)
);
-- When that was: with the commands that had been written down by then. One row.
CREATE TABLE IF NOT EXISTS dr_agent.fingerprint_at (
    id        smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    horizon   text NOT NULL,        -- everything that was written before this transaction was seen
    ddl_count bigint,
    ddl_sum   text,
    ddl_last  bigint,
    version   integer,
    roles     text[],               -- those the source has: what others may do on the replica is the replica's own affair
    looked    timestamptz           -- to ten minutes
);

-- Which new tables an event trigger publishes, by stream: what the configuration says. Not published.
CREATE TABLE IF NOT EXISTS dr_agent.wanted (
    stream  text PRIMARY KEY,
    keyless text NOT NULL,      -- source.keyless
    exclude text[] NOT NULL     -- source.exclude, as LIKE has it
);

-- The slots that are read here, by stream. Not published: it says which history the source is in, and a source that was
-- restored says so by it.
CREATE TABLE IF NOT EXISTS dr_agent.sending (
    stream            text PRIMARY KEY,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    began             timestamptz NOT NULL,         -- when the slot was created
    since             pg_lsn,                       -- where it begins; NULL while it is being created
    listing           boolean NOT NULL DEFAULT false -- the publication was altered: does decoding go by it already?
);
-- The publication's row as it was when it was last looked at, and how often it was altered by somebody else: what it published
-- in between, nobody knows.
ALTER TABLE dr_agent.sending ADD COLUMN IF NOT EXISTS publication_xmin text;
ALTER TABLE dr_agent.sending ADD COLUMN IF NOT EXISTS altered integer NOT NULL DEFAULT 0;
