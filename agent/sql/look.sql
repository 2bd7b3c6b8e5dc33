-- The source's look at what its objects are: tells the replica what has changed, and writes down as commands what no event trigger has
-- written down. Whoever owns dr_agent.ddl installs it.

CREATE SEQUENCE IF NOT EXISTS dr_agent.ddl_id;

-- Writes a row of dr_agent.ddl about objects that have changed, whoever has changed them, and returns its id. `as_of` says which
-- commands had been written down before it was looked: where there is one more by then, the objects may have changed again.
CREATE OR REPLACE FUNCTION dr_agent.note_changes(of_kind text, objects jsonb, as_of text) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    noted bigint;
BEGIN
    LOOP
        BEGIN
            INSERT INTO dr_agent.ddl (id, at, kind, tag, role_name, session_role, search_path, objects)
            SELECT nextval('dr_agent.ddl_id'), clock_timestamp(), of_kind, 'FINGERPRINT', current_user, session_user, '',
                   json_agg(o || jsonb_build_object('as_of', as_of)) FROM jsonb_array_elements(objects) AS o
            RETURNING id INTO noted;
            RETURN noted;
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
    noted   bigint;
    changed jsonb;
    others  jsonb;
    gone    jsonb;
    count   integer := 0;
BEGIN
    SELECT coalesce(max(ddl_last), 0) INTO told FROM dr_agent.fingerprint_at;
    -- Before anything is looked at: what is written down later may not be seen.
    SELECT count(*), coalesce(sum(id), 0) AS sum, coalesce(max(id), 0) AS last INTO seen FROM dr_agent.ddl;
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
        IF gone IS NOT NULL THEN
            noted := dr_agent.note_changes('drop', gone, seen.count || ' ' || seen.sum);
            seen.count := seen.count + 1;
            seen.sum := seen.sum + noted;
            seen.last := greatest(seen.last, noted);
        END IF;
        IF others IS NOT NULL THEN
            noted := dr_agent.note_changes('command', others, seen.count || ' ' || seen.sum);
            seen.count := seen.count + 1;
            seen.sum := seen.sum + noted;
            seen.last := greatest(seen.last, noted);
        END IF;
        count := coalesce(jsonb_array_length(others), 0) + coalesce(jsonb_array_length(gone), 0);
    END IF;
    UPDATE dr_agent.fingerprint_at a
       SET ddl_count = seen.count, ddl_sum = seen.sum::text, ddl_last = seen.last, version = current_setting('server_version_num')::integer
     WHERE (a.ddl_count, a.ddl_sum, a.version)
           IS DISTINCT FROM (seen.count, seen.sum::text, current_setting('server_version_num')::integer);
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
