-- What writes the source's commands down: three event triggers, and one function that may write. Repeatable. A superuser installs it.
--
--   command ─▶ event trigger ─▶ on_ddl (INVOKER: sees the caller's role and search_path) ─▶ dr_agent.capture (DEFINER) ─▶ dr_agent.ddl
--
-- The user's command never fails because of this: what cannot be written down is said in the server's log, and missing on the
-- replica. Nothing is written at ddl_command_start: DROP INDEX CONCURRENTLY must be the first action of its transaction.

-- Of an earlier form.
DROP FUNCTION IF EXISTS dr_agent.objects_of_command(), dr_agent.is_written(xid);

-- The only one that has it written (look.sql). Anybody may call it, and only in an event trigger's context it does anything: elsewhere the functions
-- that tell of the objects refuse.
CREATE OR REPLACE FUNCTION dr_agent.capture(of_kind text, of_tag text, context text, role_of text, search_path_of text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    setting text := 'dr_agent.ddl_' || of_kind;
    counted text := current_setting(setting, true);
    -- A new string of the client begins to count anew.
    mark    text := extract(epoch FROM statement_timestamp())::text;
    nth     integer := 1;
    told    json;
    sent    text := current_query();
    is_secret boolean;
BEGIN
    -- What runs within something else names itself in the context, and is no statement of the client's. That goes for what we alter.
    IF position(E'\n' IN context) > 0 THEN
        nth := NULL;
    ELSE
        IF split_part(coalesce(counted, ''), ' ', 1) = mark THEN
            nth := split_part(counted, ' ', 2)::integer + 1;
        END IF;
        PERFORM set_config(setting, mark || ' ' || nth, false);
    END IF;
    -- Rows of a materialized view are computed again after a promotion; an index that is built again is the same.
    IF of_tag IN ('REFRESH MATERIALIZED VIEW', 'REINDEX') THEN
        RETURN;
    END IF;
    told := CASE of_kind
        WHEN 'command' THEN dr_agent.objects_of_command(nth IS NULL OR coalesce(sent ~ '\(', true))
        WHEN 'drop' THEN dr_agent.objects_of_drop()
        WHEN 'rewrite' THEN dr_agent.objects_of_rewrite() END;
    IF told IS NULL THEN
        RETURN;
    END IF;
    -- A password belongs into no log, no stream and no archive.
    is_secret := of_tag ~ '(USER MAPPING|SERVER|SUBSCRIPTION|FOREIGN DATA WRAPPER|ROLE)'
                 OR concat(sent, context) ~* 'password\s*(=|''|E''|U&''|\$)'
                 OR concat(sent, context) ~* 'password' AND concat(sent, context) ~* '\m(role|user|mapping|server|subscription)\M';
    IF is_secret THEN
        context := NULL;
    END IF;
    IF is_secret OR length(sent) > 1000000 THEN
        sent := NULL;
    END IF;
    PERFORM dr_agent.write_down(of_kind, of_tag, role_of, search_path_of, sent, context, nth, told);
    -- Behind what says why.
    INSERT INTO dr_agent.listed AS l (stream, schema_name, table_name, listed_as)
    SELECT w.stream, o -> 'names' ->> 0, o -> 'names' ->> 1, o ->> 'listed_as'
      FROM json_array_elements(told) AS o, dr_agent.wanted w WHERE o ->> 'listed_as' IS NOT NULL
        ON CONFLICT (stream, schema_name, table_name) DO UPDATE SET listed_as = excluded.listed_as;
END
$$;

-- An object as schema/ddl.rs reads it. `extra` says what only some have.
CREATE OR REPLACE FUNCTION dr_agent.event_object(class oid, object oid, sub integer, of_tag text, is_new boolean)
RETURNS jsonb LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'type', a.type, 'names', a.object_names, 'args', a.object_args, 'identity', i.identity, 'tag', of_tag,
                   'created', is_new, 'oid', CASE WHEN class = 'pg_class'::regclass THEN object::bigint END,
                   -- As it was last looked at: for where the command itself cannot be run.
                   'was', (SELECT f.names FROM dr_agent.fingerprint f
                            WHERE sub = 0 AND f.class = event_object.class AND f.object = event_object.object
                              AND f.names <> a.object_names)))
               || jsonb_build_object('shape', dr_agent.shape_of(class, object, sub))
          FROM pg_identify_object_as_address(class, object, sub) AS a, pg_identify_object(class, object, sub) AS i
         WHERE a.type IS NOT NULL AND i.identity IS NOT NULL AND coalesce(a.object_names[1], '') NOT LIKE 'pg\_temp%');
END
$$;

-- Not ours, of no session alone, no part of an extension, and no subscription: the replica has its own.
CREATE OR REPLACE FUNCTION dr_agent.is_captured(class oid, object oid, of_schema text, of_type text)
RETURNS boolean LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT coalesce(of_schema, '') NOT LIKE 'pg\_temp%' AND coalesce(of_schema, '') NOT LIKE 'pg\_toast%'
           AND of_schema IS DISTINCT FROM 'dr_agent'
           AND of_type NOT IN ('subscription', 'event trigger', 'publication', 'publication relation', 'publication namespace')
           AND NOT (class = 'pg_namespace'::regclass AND object = 'dr_agent'::regnamespace)
           AND NOT EXISTS (SELECT FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                            WHERE d.classid = class AND d.objid = object AND d.deptype = 'e'
                              AND d.refclassid = 'pg_extension'::regclass));
END
$$;

-- What this transaction, or a savepoint of it, has written has an age of 0 or less, once it has an id. What began later and has
-- committed counts, too: what is told of its objects is true.

-- Whether an object's row was inserted, not replaced, by this transaction: no older one of its name can have been there, as far as
-- that can be told of relations and types; of the rest it does not matter.
CREATE OR REPLACE FUNCTION dr_agent.is_new(class oid, object oid) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT CASE class WHEN 'pg_class'::regclass
               THEN EXISTS (SELECT FROM pg_class c JOIN pg_type t ON c.relkind IN ('r', 'p', 'v', 'm', 'f') AND t.oid = c.reltype
                                                                     OR c.relkind NOT IN ('r', 'p', 'v', 'm', 'f') AND t.oid = 'bool'::regtype
                             WHERE c.oid = object AND age(c.xmin) <= 0 AND (t.oid = 'bool'::regtype OR age(t.xmin) <= 0))
               ELSE true END);
END
$$;

-- Publishes a table that was created, attached or detached a moment ago, and says what it is listed as: all its changes come with the
-- stream. Nothing where it is not wanted, or a right is missing: it is copied beside the stream then, as one that came late.
CREATE OR REPLACE FUNCTION dr_agent.publish(rel oid) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted  record;
    new     record;
    unit    oid;
    way     text;
    version integer := current_setting('server_version_num')::integer;
BEGIN
    -- Of which of several streams it is would not be told.
    SELECT * INTO wanted FROM dr_agent.wanted;
    IF NOT FOUND OR (SELECT count(*) FROM dr_agent.wanted) > 1
       OR NOT EXISTS (SELECT FROM pg_publication WHERE pubname = wanted.stream) THEN
        RETURN NULL;
    END IF;
    SELECT c.oid, c.relkind, c.relpersistence, coalesce(pg_partition_root(c.oid), c.oid) AS root,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid AND i.indimmediate) AS has_key,
           EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> '') AS is_computed,
           EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
                    WHERE i.indrelid = c.oid AND i.indisprimary AND a.attgenerated <> '') AS is_key_computed
      INTO new FROM pg_class c WHERE c.oid = rel;
    IF new.relkind <> 'r' OR new.relpersistence <> 'p' OR new.is_key_computed AND version < 180000
       OR EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, unnest(wanted.exclude) AS pattern
                   WHERE c.oid = new.root AND n.nspname || '.' || c.relname LIKE pattern) THEN
        RETURN NULL;
    END IF;
    IF NOT new.has_key THEN
        IF wanted.keyless <> 'full' OR new.is_computed THEN
            RETURN NULL;
        END IF;
        EXECUTE format('ALTER TABLE ONLY %s REPLICA IDENTITY FULL', rel::regclass);
    END IF;
    unit := CASE WHEN new.root <> rel AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = new.root AND i.indisprimary AND i.indisvalid)
                 THEN new.root ELSE rel END;
    IF NOT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                    WHERE p.pubname = wanted.stream AND r.prrelid = unit) THEN
        EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %s', wanted.stream, unit::regclass);
    END IF;
    -- One that was attached is published by the whole.
    IF unit <> rel AND EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                                WHERE p.pubname = wanted.stream AND r.prrelid = rel) THEN
        EXECUTE format('ALTER PUBLICATION %I DROP TABLE %s', wanted.stream, rel::regclass);
    END IF;
    -- As the agent computes it.
    WITH RECURSIVE up (oid, rest) AS (
        SELECT rel, ''
        UNION ALL
        SELECT i.inhparent, '>' || i.inhparent || '.' || i.xmin || up.rest
          FROM up JOIN pg_inherits i ON i.inhrelid = up.oid JOIN pg_class p ON p.oid = i.inhparent AND p.relkind = 'p')
    SELECT rel || ':' || string_agg(r.oid || up.rest, ',' ORDER BY r.oid || up.rest COLLATE "C")
      INTO way
      FROM up JOIN pg_publication_rel r ON r.prrelid = up.oid JOIN pg_publication p ON p.oid = r.prpubid AND p.pubname = wanted.stream;
    way := way || coalesce('@' || nullif((
        SELECT s.altered + (s.publication_xmin <> p.xmin::text)::integer FROM dr_agent.sending s, pg_publication p
         WHERE s.stream = wanted.stream AND p.pubname = wanted.stream AND s.publication_xmin IS NOT NULL), 0), '');
    RETURN way;
EXCEPTION WHEN insufficient_privilege OR lock_not_available OR undefined_table THEN
    RETURN NULL;
END
$$;

-- What a command has created or altered. GRANT, REVOKE and ALTER DEFAULT PRIVILEGES do not say of what: catalog rows that this
-- transaction has written tell. Those of columns are many, and are looked at only where the command may name columns.
CREATE OR REPLACE FUNCTION dr_agent.objects_of_command(names_columns boolean) RETURNS json LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    told jsonb;
    rights text[];
    listed jsonb := '{}';
    one record;
BEGIN
    PERFORM pg_current_xact_id();
    -- First: it may alter the table.
    FOR one IN SELECT c.objid FROM pg_event_trigger_ddl_commands() AS c
                WHERE c.command_tag = 'CREATE TABLE' AND c.object_type = 'table' AND NOT c.in_extension
                  AND dr_agent.is_captured(c.classid, c.objid, c.schema_name, c.object_type) AND dr_agent.is_new(c.classid, c.objid)
    LOOP
        listed := listed || jsonb_strip_nulls(jsonb_build_object(one.objid::text, dr_agent.publish(one.objid)));
    END LOOP;
    SELECT jsonb_agg(dr_agent.event_object(c.classid, c.objid, c.objsubid, c.command_tag,
                     c.command_tag LIKE 'CREATE %' AND dr_agent.is_new(c.classid, c.objid)) ORDER BY c.n)
             FILTER (WHERE c.object_identity IS NOT NULL AND dr_agent.is_captured(c.classid, c.objid, c.schema_name, c.object_type)),
           array_agg(CASE c.command_tag WHEN 'ALTER DEFAULT PRIVILEGES' THEN 'DEFAULT' ELSE c.object_type END)
             FILTER (WHERE c.object_identity IS NULL)
      INTO told, rights
      FROM pg_event_trigger_ddl_commands() WITH ORDINALITY AS c (classid, objid, objsubid, command_tag, object_type, schema_name,
           object_identity, in_extension, command, n)
     WHERE NOT c.in_extension OR c.object_type = 'extension';
    -- ATTACH, DETACH and INHERIT are told of one of the two tables only. Before the shapes are read: it may alter the table.
    IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS c JOIN pg_class p ON c.classid = 'pg_class'::regclass AND p.oid = c.objid
                WHERE c.command_tag = 'ALTER TABLE' AND (p.relkind = 'p' OR p.relhassubclass)) THEN
        FOR one IN SELECT p.oid AS objid, p.relkind FROM pg_class p JOIN pg_namespace n ON n.oid = p.relnamespace
                    WHERE p.relkind IN ('r', 'p', 'f')
                      AND (age(p.xmin) <= 0
                           OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = p.oid AND age(i.xmin) <= 0))
                      AND NOT EXISTS (SELECT FROM pg_event_trigger_ddl_commands() AS c
                                       WHERE c.classid = 'pg_class'::regclass AND c.objid = p.oid AND c.objsubid = 0)
                      AND dr_agent.is_captured('pg_class'::regclass, p.oid, n.nspname, 'table')
        LOOP
            listed := listed || jsonb_strip_nulls(jsonb_build_object(one.objid::text, dr_agent.publish(one.objid)));
            told := coalesce(told, '[]')
                    || coalesce(dr_agent.event_object('pg_class'::regclass, one.objid, 0, 'ALTER TABLE', false), '[]');
        END LOOP;
    END IF;
    IF rights IS NOT NULL THEN
        SELECT jsonb_agg(dr_agent.event_object(w.class, w.object, 0, 'GRANT', false)) INTO told
          FROM (SELECT 'pg_class'::regclass::oid, oid, relnamespace::regnamespace::text, 'table' FROM pg_class
                 WHERE rights && '{TABLE,SEQUENCE,COLUMN}' AND age(xmin) <= 0 AND relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
                UNION SELECT 'pg_class'::regclass, a.attrelid, c.relnamespace::regnamespace::text, 'table'
                        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                       WHERE names_columns AND rights && '{TABLE,COLUMN}' AND age(a.xmin) <= 0 AND a.attacl IS NOT NULL
                UNION SELECT 'pg_proc'::regclass, oid, pronamespace::regnamespace::text, 'function' FROM pg_proc
                       WHERE rights && '{FUNCTION,PROCEDURE,ROUTINE}' AND age(xmin) <= 0
                UNION SELECT 'pg_type'::regclass, oid, typnamespace::regnamespace::text, 'type' FROM pg_type
                       WHERE rights && '{TYPE,DOMAIN}' AND age(xmin) <= 0 AND typtype <> 'c' AND typcategory <> 'A'
                UNION SELECT 'pg_namespace'::regclass, oid, nspname::text, 'schema' FROM pg_namespace
                       WHERE 'SCHEMA' = ANY (rights) AND age(xmin) <= 0
                UNION SELECT 'pg_language'::regclass, oid, NULL, 'language' FROM pg_language
                       WHERE 'LANGUAGE' = ANY (rights) AND age(xmin) <= 0
                UNION SELECT 'pg_foreign_server'::regclass, oid, NULL, 'server' FROM pg_foreign_server
                       WHERE 'FOREIGN SERVER' = ANY (rights) AND age(xmin) <= 0
                UNION SELECT 'pg_foreign_data_wrapper'::regclass, oid, NULL, 'foreign-data wrapper' FROM pg_foreign_data_wrapper
                       WHERE 'FOREIGN DATA WRAPPER' = ANY (rights) AND age(xmin) <= 0
                UNION SELECT 'pg_default_acl'::regclass, oid, NULL, 'default acl' FROM pg_default_acl
                       WHERE 'DEFAULT' = ANY (rights) AND age(xmin) <= 0
               ) AS w (class, object, of_schema, of_type)
         WHERE dr_agent.is_captured(w.class, w.object, w.of_schema, w.of_type);
    END IF;
    RETURN (SELECT json_agg(CASE WHEN o ->> 'type' = 'table' AND listed ? (o ->> 'oid')
                                 THEN o || jsonb_build_object('listed_as', listed -> (o ->> 'oid')) ELSE o END)
              FROM jsonb_array_elements(told) AS o WHERE jsonb_typeof(o) = 'object');
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.objects_of_drop() RETURNS json LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT json_agg(json_build_object('type', d.object_type, 'names', d.address_names, 'args', d.address_args,
                                          'identity', d.object_identity, 'original', d.original) ORDER BY d.n)
          FROM pg_event_trigger_dropped_objects() WITH ORDINALITY AS d (classid, objid, objsubid, original, normal, is_temporary,
               object_type, schema_name, object_name, object_identity, address_names, address_args, n)
         WHERE NOT d.is_temporary AND (d.original OR d.normal) AND coalesce(d.schema_name, '') NOT LIKE 'pg\_t%'
           AND d.schema_name IS DISTINCT FROM 'dr_agent'
           AND d.object_type NOT IN ('subscription', 'event trigger', 'publication', 'publication relation', 'publication namespace'));
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.objects_of_rewrite() RETURNS json LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT json_agg(json_build_object('type', a.type, 'names', a.object_names, 'args', a.object_args, 'identity', r.oid::regclass,
                                          'reason', pg_event_trigger_table_rewrite_reason()))
          FROM (SELECT pg_event_trigger_table_rewrite_oid()) AS r (oid), pg_class c,
               pg_identify_object_as_address('pg_class'::regclass, r.oid, 0) AS a
         WHERE c.oid = r.oid AND c.relpersistence <> 't' AND c.relnamespace <> 'dr_agent'::regnamespace);
END
$$;

-- The shell: without a SET clause, so that it sees what the caller sees; therefore every name in full.
CREATE OR REPLACE FUNCTION dr_agent.on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$
DECLARE
    context pg_catalog.text;
BEGIN
    GET DIAGNOSTICS context = PG_CONTEXT;
    -- Whoever owns it must not run as somebody else.
    IF NOT (SELECT prosecdef FROM pg_catalog.pg_proc
             WHERE oid = 'dr_agent.capture(text,text,text,text,text)'::pg_catalog.regprocedure) THEN
        RETURN;
    END IF;
    PERFORM dr_agent.capture(CASE tg_event WHEN 'sql_drop' THEN 'drop' WHEN 'table_rewrite' THEN 'rewrite' ELSE 'command' END,
                             tg_tag, context, current_user::pg_catalog.text, pg_catalog.current_setting('search_path'));
EXCEPTION WHEN OTHERS THEN
    RAISE LOG 'dr-agent has not written down this command: %', sqlerrm;
END
$$;

GRANT USAGE ON SCHEMA dr_agent TO PUBLIC;

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = 'dr_agent_command') THEN
        CREATE EVENT TRIGGER dr_agent_command ON ddl_command_end EXECUTE FUNCTION dr_agent.on_ddl();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = 'dr_agent_drop') THEN
        CREATE EVENT TRIGGER dr_agent_drop ON sql_drop EXECUTE FUNCTION dr_agent.on_ddl();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_event_trigger WHERE evtname = 'dr_agent_rewrite') THEN
        CREATE EVENT TRIGGER dr_agent_rewrite ON table_rewrite EXECUTE FUNCTION dr_agent.on_ddl();
    END IF;
END
$$;
ALTER EVENT TRIGGER dr_agent_command ENABLE ALWAYS;
ALTER EVENT TRIGGER dr_agent_drop ENABLE ALWAYS;
ALTER EVENT TRIGGER dr_agent_rewrite ENABLE ALWAYS;

-- What writes belongs to whoever owns what it writes to; the shell stays with the superuser who has installed it, because it runs as
-- whoever defines something.
DO $$
DECLARE
    owner text := (SELECT pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(relowner)) FROM pg_catalog.pg_class
                    WHERE oid = 'dr_agent.ddl'::pg_catalog.regclass);
    one   text;
BEGIN
    FOR one IN SELECT 'FUNCTION ' || oid::pg_catalog.regprocedure FROM pg_catalog.pg_proc
                WHERE pronamespace = 'dr_agent'::pg_catalog.regnamespace
                  AND prorettype <> 'pg_catalog.event_trigger'::pg_catalog.regtype
                UNION ALL SELECT 'SEQUENCE dr_agent.ddl_id'
    LOOP
        EXECUTE pg_catalog.format('ALTER %s OWNER TO %s', one, owner);
    END LOOP;
END
$$;
