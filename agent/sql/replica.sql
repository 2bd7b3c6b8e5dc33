-- What dr-agent keeps on the replica, in every replicated database. Repeatable.
CREATE SCHEMA IF NOT EXISTS dr_agent;

-- How far the replica is: one row per stream, written in the same transaction as the data.
CREATE TABLE IF NOT EXISTS dr_agent.progress (
    stream      text PRIMARY KEY,
    term        bigint NOT NULL,        -- fencing token; raised by every promotion
    batch       bigint NOT NULL,        -- number of the last applied batch
    end_lsn     pg_lsn NOT NULL,        -- first byte after the last applied transaction
    commit_time timestamptz,            -- its commit time on the source's clock; before the first, the copy's
    applied_at  timestamptz NOT NULL
);

-- Which source the stream comes from; a different one behind the same URL must be noticed.
CREATE TABLE IF NOT EXISTS dr_agent.stream (
    stream            text PRIMARY KEY,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    began             timestamptz NOT NULL,  -- when the slot was created: LSNs of another one mean something else
    -- Where the source stood when its tables were last looked at. A table that changed before and is not in table_sync was
    -- dropped, or is not wanted; under route kinesis the source may be out of reach when its changes come.
    tables_as_of      pg_lsn,
    created_at        timestamptz NOT NULL DEFAULT now()
);

-- The initial copy: 'copied' tables hold their rows, 'ready' ones their indexes and constraints as
-- well. A table's changes committed before its snapshot_lsn are already in its data.
CREATE TABLE IF NOT EXISTS dr_agent.table_sync (
    stream       text NOT NULL,
    table_schema text NOT NULL,
    table_name   text NOT NULL,
    state        text NOT NULL CHECK (state IN ('pending', 'copying', 'copied', 'ready')),
    snapshot_lsn pg_lsn,
    listed_as    text,                  -- what was copied: as what the source had listed it then
    rows         bigint NOT NULL DEFAULT 0,
    bytes        bigint NOT NULL DEFAULT 0,
    updated_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (stream, table_schema, table_name)
);

-- Which table of the replica holds the rows: another one under the same name is not the one that was copied.
ALTER TABLE dr_agent.table_sync ADD COLUMN IF NOT EXISTS replica_oid oid;

-- The schema of the source was restored for this stream, in the transaction that wrote this row.
CREATE TABLE IF NOT EXISTS dr_agent.schema_sync (
    stream      text PRIMARY KEY,
    restored_at timestamptz NOT NULL DEFAULT now()
);

-- Tables of the source that are not protected for now, because they cannot be created, copied or applied, or because that is
-- being done: their changes are kept out. A promotion goes on without them and names them.
CREATE TABLE IF NOT EXISTS dr_agent.set_aside (
    stream       text NOT NULL,
    table_schema text NOT NULL,
    table_name   text NOT NULL,
    reason       text NOT NULL,
    since        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (stream, table_schema, table_name)
);

-- Foreign keys and partitions whose rows were copied at different snapshots: the statement succeeds
-- once the stream has passed after_lsn and brought the rows that are missing.
CREATE TABLE IF NOT EXISTS dr_agent.deferred (
    place     bigint GENERATED ALWAYS AS IDENTITY,   -- they run in this order
    stream    text NOT NULL,
    what      text NOT NULL,
    statement text NOT NULL,
    after_lsn pg_lsn NOT NULL,
    PRIMARY KEY (stream, what)
);

-- Why the replica refuses it, since its moment has come: it is missing, and is tried again.
ALTER TABLE dr_agent.deferred ADD COLUMN IF NOT EXISTS problem text;

-- The state of a promotion, stored before the next step is tried, and its report.
CREATE TABLE IF NOT EXISTS dr_agent.promotion (
    stream     text PRIMARY KEY,
    term       bigint NOT NULL,
    mode       text NOT NULL,
    state      text NOT NULL,
    started_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    detail     jsonb NOT NULL DEFAULT '{}'
);

-- Large values on their way into a row, piece by piece: written, used and deleted within one apply transaction. Never compressed,
-- never in the WAL.
CREATE UNLOGGED TABLE IF NOT EXISTS dr_agent.large_value (
    number bigint NOT NULL,
    bytes  bytea NOT NULL
);
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_attribute
                WHERE attrelid = 'dr_agent.large_value'::pg_catalog.regclass AND attname = 'bytes' AND attstorage <> 'e') THEN
        ALTER TABLE dr_agent.large_value ALTER COLUMN bytes SET STORAGE EXTERNAL;
    END IF;
END
$$;

-- In-band tables; the same as in source.sql.
CREATE TABLE IF NOT EXISTS dr_agent.heartbeat (
    id         smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    beat       bigint NOT NULL,
    written_at timestamptz NOT NULL
);
CREATE TABLE IF NOT EXISTS dr_agent.sequence_state (
    schema_name   text NOT NULL,
    sequence_name text NOT NULL,
    last_value    bigint NOT NULL,
    is_called     boolean NOT NULL,
    PRIMARY KEY (schema_name, sequence_name)
);

CREATE TABLE IF NOT EXISTS dr_agent.listed (
    stream      text NOT NULL,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    listed_as   text NOT NULL,
    PRIMARY KEY (stream, schema_name, table_name)
);
CREATE TABLE IF NOT EXISTS dr_agent.coverage (
    stream    text NOT NULL,
    kind      text NOT NULL,
    protected boolean NOT NULL,
    objects   bigint NOT NULL,
    names     text NOT NULL,    -- a JSON list; empty where there are too many
    PRIMARY KEY (stream, kind, protected)
);

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

-- The same of this database, as it was last looked at here. Of the objects alone, not their shapes.
CREATE TABLE IF NOT EXISTS dr_agent.own_fingerprint (
    class    oid NOT NULL,
    object   oid NOT NULL,
    kind     text NOT NULL,
    names    text[] NOT NULL,
    args     text[] NOT NULL,
    identity text NOT NULL,
    hash     bigint NOT NULL,
    parts    bigint NOT NULL,
    shape    json,
    same_as  text,                  -- the hashes, the source's and this one, that have been found to mean the same
    PRIMARY KEY (class, object)
);
CREATE TABLE IF NOT EXISTS dr_agent.own_fingerprint_at (
    id       smallint PRIMARY KEY DEFAULT 1 CHECK (id = 1),
    horizon  text NOT NULL,
    roles    text,                  -- those there were: who may own something is part of what is compared
    compared timestamptz            -- when everything that the source had told was compared
);

-- What has become of each command of the source: written in the transaction of its rows.
CREATE TABLE IF NOT EXISTS dr_agent.ddl_applied (
    stream     text NOT NULL,
    id         bigint NOT NULL,         -- of dr_agent.ddl
    outcome    text NOT NULL,           -- nothing, statement, shape, copy, skipped, waits
    detail     text NOT NULL DEFAULT '',
    commit_lsn pg_lsn NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (stream, id)
);

-- Objects that are not as the source has them, and why: each is tried again, and named by a promotion.
CREATE TABLE IF NOT EXISTS dr_agent.ddl_waiting (
    stream   text NOT NULL,
    kind     text NOT NULL,             -- kind, names, args: what pg_get_object_address takes
    names    text[] NOT NULL,
    args     text[] NOT NULL,
    identity text NOT NULL,             -- the same for people
    shape    json,                      -- what it should be; NULL: gone
    reason   text NOT NULL,
    ddl      bigint NOT NULL,           -- the command, in dr_agent.ddl
    across   boolean NOT NULL,          -- recorded by a server of another major version
    since    timestamptz NOT NULL DEFAULT clock_timestamp(),
    accepted text,                      -- a person says that it is right as it is, and why
    PRIMARY KEY (stream, kind, names, args)
);
ALTER TABLE dr_agent.ddl_waiting ADD COLUMN IF NOT EXISTS drift boolean NOT NULL DEFAULT false;  -- no command has told of it

-- What people have decided about commands and tables, and why: kept for good.
CREATE TABLE IF NOT EXISTS dr_agent.ddl_decided (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream     text NOT NULL,
    action     text NOT NULL,           -- retry, accept, resync
    object     text NOT NULL,
    reason     text NOT NULL,
    decided_by text NOT NULL DEFAULT session_user,
    decided_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    done_at    timestamptz              -- of a resync: when the agent has begun with it
);

-- The compare-and-set that begins every apply transaction: ordering, exactly-once and fencing in
-- one comparison. It raises instead of returning, so that a chain of pipelined statements fails
-- with it. The row lock it takes makes a promotion wait for, or end, a batch in flight.
CREATE OR REPLACE FUNCTION dr_agent.advance(
    the_stream text, my_term bigint, previous pg_lsn,
    next_batch bigint, next pg_lsn, committed timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    found_term bigint;
    found_lsn  pg_lsn;
BEGIN
    UPDATE dr_agent.progress
       SET batch = next_batch, end_lsn = next, commit_time = committed,
           applied_at = clock_timestamp()
     WHERE stream = the_stream AND term = my_term AND end_lsn = previous;
    IF FOUND THEN
        RETURN;
    END IF;
    SELECT term, end_lsn INTO found_term, found_lsn
      FROM dr_agent.progress WHERE stream = the_stream;
    IF found_term IS NULL THEN
        RAISE EXCEPTION 'dr_agent.progress has no row of stream %', the_stream
            USING ERRCODE = 'DR004';
    END IF;
    IF found_term IS DISTINCT FROM my_term THEN
        RAISE EXCEPTION 'the replica is at term %, this agent at term %', found_term, my_term
            USING ERRCODE = 'DR001';
    END IF;
    RAISE EXCEPTION 'the replica is at %, this agent expected %', found_lsn, previous
        USING ERRCODE = 'DR002';
END
$$;

-- What begins the transaction of every other lane of a batch: the comparison of the term alone. The
-- progress row is lane 0's; this neither locks it nor waits for who has.
CREATE OR REPLACE FUNCTION dr_agent.hold(the_stream text, my_term bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    found_term bigint;
BEGIN
    SELECT term INTO found_term FROM dr_agent.progress WHERE stream = the_stream;
    IF found_term IS NULL THEN
        RAISE EXCEPTION 'dr_agent.progress has no row of stream %', the_stream
            USING ERRCODE = 'DR004';
    END IF;
    IF found_term IS DISTINCT FROM my_term THEN
        RAISE EXCEPTION 'the replica is at term %, this agent at term %', found_term, my_term
            USING ERRCODE = 'DR001';
    END IF;
END
$$;

-- Ends a statement of an apply transaction that did not touch as many rows as it had to. Raising on
-- the server lets COMMIT be sent before the answers are in.
CREATE OR REPLACE FUNCTION dr_agent.expect(touched bigint, wanted bigint, the_table text, doing text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF touched <> wanted AND doing = 'insert' THEN
        RAISE EXCEPTION '% of % rows to insert into % were taken', touched, wanted, the_table
            USING ERRCODE = 'DR005';
    ELSIF touched <> wanted THEN
        RAISE EXCEPTION '% of % rows to % in % are not on the replica',
            wanted - touched, wanted, doing, the_table USING ERRCODE = 'DR003';
    END IF;
END
$$;

-- TRUNCATE of tables that were truncated together on the source. PostgreSQL refuses it, whatever session_replication_role says,
-- where a table that is not among them refers to one that is. A partitioned table comes along if all of its leaves are among
-- them: the source names leaves only. Any other has rows that are not replicated, or none; what it refers to is emptied row
-- by row, and so is what that refers to.
CREATE OR REPLACE FUNCTION dr_agent.truncate(the_tables regclass[], restart boolean)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    remaining oid[] := the_tables::oid[];
    kept      oid[] := '{}';
    referred  oid[];
    wholes    oid[];
    one       oid;
    is_left   boolean;
BEGIN
    LOOP
        SELECT coalesce(array_agg(DISTINCT c.oid), '{}') INTO wholes
          FROM pg_constraint f JOIN pg_class c ON c.oid = f.conrelid
         WHERE f.contype = 'f' AND f.confrelid = ANY (remaining) AND c.relkind = 'p'
           AND NOT EXISTS (SELECT FROM pg_partition_tree(c.oid) AS leaf
                            WHERE leaf.isleaf AND leaf.relid <> ALL (remaining));
        SELECT coalesce(array_agg(DISTINCT f.confrelid), '{}') INTO referred
          FROM pg_constraint f
         WHERE f.contype = 'f' AND f.confrelid = ANY (remaining)
           AND f.conrelid <> ALL (remaining) AND f.conrelid <> ALL (wholes);
        EXIT WHEN referred = '{}';
        kept := kept || referred;
        remaining := ARRAY(SELECT t FROM unnest(remaining) AS t WHERE t <> ALL (referred));
    END LOOP;
    FOREACH one IN ARRAY kept LOOP
        EXECUTE 'DELETE FROM ONLY ' || one::regclass;
        -- A trigger that fires ALWAYS can keep rows.
        EXECUTE 'SELECT EXISTS (SELECT FROM ONLY ' || one::regclass || ')' INTO is_left;
        IF is_left THEN
            RAISE EXCEPTION 'rows of % are left after they were deleted', one::regclass USING ERRCODE = 'DR003';
        END IF;
    END LOOP;
    IF remaining <> '{}' THEN
        EXECUTE 'TRUNCATE '
            || (SELECT string_agg('ONLY ' || t::regclass, ', ') FROM unnest(remaining) AS t)
            || coalesce((SELECT string_agg(', ' || t::regclass, '') FROM unnest(wholes) AS t), '');
    END IF;
    IF restart THEN
        -- What RESTART IDENTITY does, for both.
        FOR one IN
            SELECT d.objid FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
             WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
               AND d.refobjid = ANY (the_tables::oid[]) AND d.deptype IN ('a', 'i')
        LOOP
            EXECUTE 'ALTER SEQUENCE ' || one::regclass || ' RESTART';
        END LOOP;
    END IF;
END
$$;
