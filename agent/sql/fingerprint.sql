-- What every object of a database is: kept beside it, brought up to date at the price of what has changed. On both sides.
--
--   source    dr_agent.look(), dr_agent.ddl_now() ─▶ dr_agent.fingerprint: published, with the shapes
--                                                 └▶ dr_agent.ddl: what no event trigger has written down
--   replica   dr_agent.take_fingerprint           ─▶ dr_agent.own_fingerprint ─▶ compared
--
-- An object is looked at again where a catalog row of it was written since the last time, where it has other parts (constraints,
-- comments) than then, or where it depends on one that was. All of them are from time to time, for what that does not tell: a role
-- that was renamed, a sequence that belongs to no column any more.

-- The objects of which a catalog row was written at or behind a transaction, and those that mention them.
CREATE OR REPLACE FUNCTION dr_agent.touched_objects(since xid) RETURNS TABLE (class oid, object oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH lately (age) AS MATERIALIZED (SELECT age(since)),
    -- A default that is set, or another one, is told by its column's row, too.
    written (class, object) AS MATERIALIZED (
        SELECT 'pg_class'::regclass::oid, oid FROM pg_class WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, attrelid FROM pg_attribute WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, indexrelid FROM pg_index WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, indrelid FROM pg_index WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, inhrelid FROM pg_inherits WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, seqrelid FROM pg_sequence WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, ftrelid FROM pg_foreign_table WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, partrelid FROM pg_partitioned_table WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT CASE WHEN conrelid <> 0 THEN 'pg_class'::regclass ELSE 'pg_type'::regclass END,
                     CASE WHEN conrelid <> 0 THEN conrelid ELSE contypid END
                FROM pg_constraint WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_trigger'::regclass, oid FROM pg_trigger WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_rewrite'::regclass, oid FROM pg_rewrite WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_class'::regclass, ev_class FROM pg_rewrite WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_policy'::regclass, oid FROM pg_policy WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_proc'::regclass, aggfnoid FROM pg_aggregate WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_type'::regclass, oid FROM pg_type WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_type'::regclass, enumtypid FROM pg_enum WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_type'::regclass, rngtypid FROM pg_range WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_namespace'::regclass, oid FROM pg_namespace WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_extension'::regclass, oid FROM pg_extension WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_statistic_ext'::regclass, oid FROM pg_statistic_ext WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_collation'::regclass, oid FROM pg_collation WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_operator'::regclass, oid FROM pg_operator WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_opclass'::regclass, oid FROM pg_opclass WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_opfamily'::regclass, oid FROM pg_opfamily WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_ts_config'::regclass, oid FROM pg_ts_config WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_ts_dict'::regclass, oid FROM pg_ts_dict WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_cast'::regclass, oid FROM pg_cast WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_default_acl'::regclass, oid FROM pg_default_acl WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_foreign_data_wrapper WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT 'pg_foreign_server'::regclass, oid FROM pg_foreign_server WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT classoid, objoid FROM pg_description WHERE age(xmin) <= (SELECT age FROM lately)
        UNION SELECT classoid, objoid FROM pg_seclabel WHERE age(xmin) <= (SELECT age FROM lately)),
    -- What says the name of something has it from the catalogs, not from a row of its own.
    concerned (class, object) AS MATERIALIZED (
        SELECT w.class, w.object FROM written w
        UNION SELECT d.classid, d.objid FROM written w
                JOIN pg_depend d ON d.refclassid = w.class AND d.refobjid = w.object
               WHERE w.class <> 'pg_namespace'::regclass AND d.deptype <> 'e'
        -- One of a constraint depends on that alone.
        UNION SELECT 'pg_class'::regclass, i.indexrelid FROM written w JOIN pg_index i ON i.indrelid = w.object
               WHERE w.class = 'pg_class'::regclass)
    SELECT c.class, c.object FROM concerned c
    UNION SELECT 'pg_class'::regclass, r.ev_class FROM concerned c JOIN pg_rewrite r ON r.oid = c.object WHERE c.class = 'pg_rewrite'::regclass
    UNION SELECT 'pg_class'::regclass, d.adrelid FROM concerned c JOIN pg_attrdef d ON d.oid = c.object WHERE c.class = 'pg_attrdef'::regclass
    UNION SELECT CASE WHEN k.conrelid <> 0 THEN 'pg_class'::regclass ELSE 'pg_type'::regclass END,
                 CASE WHEN k.conrelid <> 0 THEN k.conrelid ELSE k.contypid END
            FROM concerned c JOIN pg_constraint k ON k.oid = c.object WHERE c.class = 'pg_constraint'::regclass
    UNION SELECT 'pg_type'::regclass, r.reltype FROM concerned c JOIN pg_class r ON r.oid = c.object AND r.relkind = 'c'
           WHERE c.class = 'pg_class'::regclass
$$;

-- How many rows of its own an object has in other catalogs, where one that is deleted leaves no trace.
CREATE OR REPLACE FUNCTION dr_agent.parts_of_objects() RETURNS TABLE (class oid, object oid, parts bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.class, p.object, count(*)
      FROM (SELECT CASE WHEN conrelid <> 0 THEN 'pg_class'::regclass ELSE 'pg_type'::regclass END::oid,
                   CASE WHEN conrelid <> 0 THEN conrelid ELSE contypid END FROM pg_constraint
            UNION ALL SELECT classoid, objoid FROM pg_description WHERE objoid >= 16384
            UNION ALL SELECT classoid, objoid FROM pg_seclabel
            UNION ALL SELECT 'pg_class'::regclass, inhrelid FROM pg_inherits) AS p (class, object)
     GROUP BY 1, 2
$$;

-- What a role or a database had been told to have, and has no longer: a setting that is not there may be the standby's own.
CREATE OR REPLACE FUNCTION dr_agent.settings_reset(before jsonb, after jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(jsonb_object_agg(gone.key || '_reset', gone.names), '{}')
      FROM (SELECT k.key, jsonb_agg(b.name) AS names
              FROM unnest('{settings,settings_here}'::text[]) AS k (key),
                   LATERAL (SELECT split_part(s, '=', 1) FROM jsonb_array_elements_text(before -> k.key) AS s
                            EXCEPT SELECT split_part(s, '=', 1) FROM jsonb_array_elements_text(after -> k.key) AS s) AS b (name)
             GROUP BY k.key) AS gone
$$;

-- Brings a fingerprint up to date, and returns what has changed: {"objects": [as schema/ddl.rs reads them], "gone": [the same]}; the
-- objects have their shapes where these are kept. NULL where somebody else is at it.
CREATE OR REPLACE FUNCTION dr_agent.take_fingerprint(of_table text, with_shapes boolean, wholly boolean) RETURNS jsonb
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    horizon xid8 := pg_snapshot_xmin(pg_current_snapshot());
    since   xid8;
    renamed boolean;
    changed jsonb;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7258163, hashtext(of_table)) THEN
        RETURN NULL;
    END IF;
    EXECUTE format('SELECT horizon::xid8 FROM dr_agent.%I', of_table || '_at') INTO since;
    EXECUTE format('SELECT EXISTS (SELECT FROM dr_agent.%I f JOIN pg_namespace n ON n.oid = f.object AND f.class = $1
                                    WHERE f.names[1] <> n.nspname)', of_table)
       INTO renamed USING 'pg_namespace'::regclass;
    -- An age is told for half of all transaction ids.
    wholly := wholly OR since IS NULL OR renamed OR (horizon::text::numeric - since::text::numeric) > 1000000000;
    EXECUTE format($sql$
        WITH object AS MATERIALIZED (SELECT o.class, o.object FROM dr_agent.objects() AS o),
        candidate AS MATERIALIZED (
            SELECT o.class, o.object, coalesce(p.parts, 0) AS parts
              FROM object o LEFT JOIN dr_agent.parts_of_objects() AS p USING (class, object)
              LEFT JOIN dr_agent.%1$I f USING (class, object)
             WHERE $1 OR f.hash IS NULL OR f.parts <> coalesce(p.parts, 0)
                -- What they are is in too many places.
                OR o.class IN ('pg_database'::regclass, 'pg_authid'::regclass, 'pg_event_trigger'::regclass, 'pg_publication'::regclass)
                OR (o.class, o.object) IN (SELECT t.class, t.object FROM dr_agent.touched_objects($2) AS t)),
        shaped AS MATERIALIZED (
            SELECT c.class, c.object, c.parts, a.type AS kind, a.object_names AS names, a.object_args AS args, i.identity,
                   dr_agent.shape_of(c.class, c.object) AS shape
              FROM candidate c, pg_identify_object_as_address(c.class, c.object, 0) AS a,
                   pg_identify_object(c.class, c.object, 0) AS i
             WHERE a.type IS NOT NULL AND i.identity IS NOT NULL),
        new AS MATERIALIZED (
            SELECT s.*, hashtextextended(s.shape::text, 0) AS hash, f.names AS was, f.shape AS before
              FROM shaped s LEFT JOIN dr_agent.%1$I f USING (class, object)
             WHERE s.shape IS NOT NULL
               AND (f.kind, f.names, f.args, f.hash, f.parts) IS DISTINCT FROM (s.kind, s.names, s.args, hashtextextended(s.shape::text, 0), s.parts)),
        gone AS (
            DELETE FROM dr_agent.%1$I f
             WHERE NOT EXISTS (SELECT FROM object o WHERE o.class = f.class AND o.object = f.object)
            RETURNING f.kind, f.names, f.args, f.identity,
                      CASE WHEN f.shape ->> 'table_name' IS NOT NULL
                           THEN format('%%I.%%I', f.shape ->> 'table_schema', f.shape ->> 'table_name') END AS of_table),
        written AS (
            INSERT INTO dr_agent.%1$I AS f (class, object, kind, names, args, identity, hash, parts, shape)
            SELECT n.class, n.object, n.kind, n.names, n.args, n.identity, n.hash, n.parts, CASE WHEN $3 THEN n.shape::json END FROM new n
                ON CONFLICT (class, object) DO UPDATE
               SET kind = excluded.kind, names = excluded.names, args = excluded.args, identity = excluded.identity,
                   hash = excluded.hash, parts = excluded.parts, shape = excluded.shape)
        SELECT jsonb_strip_nulls(jsonb_build_object(
            'objects', (SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                               'type', n.kind, 'names', n.names, 'args', n.args, 'identity', n.identity,
                               'was', CASE WHEN n.was <> n.names THEN n.was END, 'created', n.was IS NULL,
                               'oid', CASE WHEN n.class = 'pg_class'::regclass THEN n.object::bigint END,
                               'shape', CASE WHEN $3 THEN n.shape || dr_agent.settings_reset(n.before::jsonb, n.shape) END))) FROM new n),
            'gone', (SELECT jsonb_agg(jsonb_build_object('type', g.kind, 'names', g.names, 'args', g.args, 'identity', g.identity,
                                                         'table', g.of_table, 'original', true)) FROM gone g)))
        $sql$, of_table)
       INTO changed USING wholly, since::xid, with_shapes;
    IF changed <> '{}' OR since IS NULL THEN
        EXECUTE format('INSERT INTO dr_agent.%I AS a (id, horizon) VALUES (1, $1)
                            ON CONFLICT (id) DO UPDATE SET horizon = excluded.horizon', of_table || '_at')
          USING horizon::text;
    END IF;
    RETURN changed || jsonb_build_object('first', since IS NULL);
END
$$;
