-- The source's look at what its objects are: tells the replica what has changed, and writes down as commands what no event trigger has
-- written down. Whoever owns dr_agent.ddl installs it.

CREATE SEQUENCE IF NOT EXISTS dr_agent.ddl_id;

-- Writes a row of dr_agent.ddl, for the event triggers (capture.sql) and for what was found by looking; returns its id.
CREATE OR REPLACE FUNCTION dr_agent.write_down(of_kind text, of_tag text, role_of text, search_path_of text, sent text, context_of text,
                                               nth integer, told json) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    written bigint;
BEGIN
    LOOP
        BEGIN
            INSERT INTO dr_agent.ddl (id, at, kind, tag, role_name, session_role, search_path, query, context, ordinal, objects)
            VALUES (nextval('dr_agent.ddl_id'), clock_timestamp(), of_kind, of_tag, role_of, session_user, search_path_of, sent,
                    context_of, nth, told)
            RETURNING id INTO written;
            RETURN written;
        EXCEPTION WHEN unique_violation THEN
            -- A server that was a replica has the other one's rows.
            PERFORM setval('dr_agent.ddl_id', greatest((SELECT max(id) FROM dr_agent.ddl), (SELECT last_value FROM dr_agent.ddl_id)));
        END;
    END LOOP;
END
$$;

-- Returns how many objects have changed without an event trigger; NULL where somebody else is looking.
CREATE OR REPLACE FUNCTION dr_agent.look(wholly boolean DEFAULT false) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    told    bigint;
    seen    record;
    written bigint;
    changed jsonb;
    others  jsonb;
    gone    jsonb;
    part    record;
    count   integer := 0;
BEGIN
    SELECT coalesce(max(ddl_last), 0) INTO told FROM dr_agent.fingerprint_at;
    -- Before anything is looked at: what commits later is perhaps not seen. Each row says so, and what came in between is left alone.
    SELECT count(*), coalesce(sum(id), 0) AS sum, coalesce(max(id), 0) AS last, pg_current_wal_insert_lsn() AS lsn INTO seen
      FROM dr_agent.ddl;
    changed := dr_agent.take_fingerprint('fingerprint', true, wholly);
    IF changed IS NULL THEN
        RETURN NULL;
    END IF;
    IF changed ->> 'first' = 'false' AND (changed ? 'objects' OR changed ? 'gone') THEN
        -- Who begins later may write down first: some more than were there the last time.
        WITH recorded AS MATERIALIZED (
            SELECT DISTINCT ON (o ->> 'type', (o -> 'names')::text, (o -> 'args')::text)
                   o ->> 'type' AS type, (o -> 'names')::jsonb AS names, (o -> 'args')::jsonb AS args, (o -> 'shape')::jsonb AS shape, d.kind
              FROM dr_agent.ddl d, json_array_elements(d.objects) AS o
             WHERE d.id > told - 200 AND d.kind IN ('command', 'drop')
             ORDER BY o ->> 'type', (o -> 'names')::text, (o -> 'args')::text, d.id DESC)
        SELECT (SELECT jsonb_agg(o) FROM jsonb_array_elements(changed -> 'objects') AS o
                 WHERE NOT EXISTS (SELECT FROM recorded r WHERE r.type = o ->> 'type' AND r.names = o -> 'names' AND r.args = o -> 'args'
                                                            AND r.shape = o -> 'shape')),
               (SELECT jsonb_agg(o) FROM jsonb_array_elements(changed -> 'gone') AS o
                 WHERE NOT EXISTS (SELECT FROM recorded r WHERE r.type = o ->> 'type' AND r.names = o -> 'names' AND r.args = o -> 'args'
                                                            AND r.kind = 'drop')
                   -- It has another oid, or is gone with its table.
                   AND NOT (o ->> 'type' IN ('index', 'trigger', 'policy', 'rule', 'statistics object') AND o ? 'table'
                            AND to_regclass(o ->> 'table') IS NULL)
                   AND dr_agent.shape(o ->> 'type', ARRAY(SELECT jsonb_array_elements_text(o -> 'names')),
                                      ARRAY(SELECT jsonb_array_elements_text(o -> 'args'))) IS NULL)
          INTO others, gone;
        FOR part IN SELECT * FROM (VALUES ('drop', gone), ('command', others)) AS p (kind, objects) WHERE p.objects IS NOT NULL LOOP
            written := dr_agent.write_down(part.kind, 'FINGERPRINT', current_user, '', NULL, NULL, NULL, (
                SELECT json_agg(o || jsonb_build_object('as_of', concat_ws(' ', seen.count, seen.sum, seen.lsn)))
                  FROM jsonb_array_elements(part.objects) AS o));
            seen.count := seen.count + 1;
            seen.sum := seen.sum + written;
            seen.last := greatest(seen.last, written);
            count := count + jsonb_array_length(part.objects);
        END LOOP;
    END IF;
    UPDATE dr_agent.fingerprint_at a
       SET ddl_count = seen.count, ddl_sum = seen.sum::text, ddl_last = seen.last, looked = clock_timestamp(),
           version = current_setting('server_version_num')::integer, roles = r.names
      FROM (SELECT coalesce(array_agg(rolname::text ORDER BY rolname), '{}') FROM pg_roles WHERE oid >= 16384) AS r (names)
     WHERE (a.ddl_count, a.ddl_sum, a.version, a.roles)
           IS DISTINCT FROM (seen.count, seen.sum::text, current_setting('server_version_num')::integer, r.names)
        -- Who looks no more is noticed.
        OR a.looked < clock_timestamp() - interval '10 minutes';
    RETURN count;
END
$$;

-- For migrations on servers that let nobody create event triggers: at the end of the migration, in its transaction or behind it. What
-- was changed takes effect on the replica at this place. Returns how many objects have changed. The agent looks by itself every few
-- seconds: this does not fail, and waits for three seconds at most.
CREATE OR REPLACE FUNCTION dr_agent.ddl_now() RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    count integer;
BEGIN
    -- The agent may be looking: it waits for no lock that this session has.
    FOR nth IN 1..60 LOOP
        count := dr_agent.look();
        EXIT WHEN count IS NOT NULL;
        PERFORM pg_sleep(0.05);
    END LOOP;
    IF count IS NULL THEN
        RAISE NOTICE 'dr-agent: somebody else is looking at what has changed; the agent looks again within seconds';
    END IF;
    RETURN count;
EXCEPTION WHEN OTHERS THEN
    RAISE NOTICE 'dr-agent: what has changed was not written down now, the agent looks by itself within seconds: %', sqlerrm;
    RETURN NULL;
END
$$;

REVOKE EXECUTE ON FUNCTION dr_agent.look(boolean) FROM PUBLIC;
GRANT USAGE ON SCHEMA dr_agent TO PUBLIC;
