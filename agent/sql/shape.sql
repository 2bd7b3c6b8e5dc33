-- The shapes of objects: what pg_dump would write of them, as JSON, the same for equal objects on any server of one major version.
-- On both sides. Nothing in a shape is an oid or a file; nothing is a password.
--
--   dr_agent.shape(kind, names, args)   of the object that pg_get_object_address finds; NULL where there is none
--   dr_agent.objects()                  every object of the database that has one, by class and oid
--   dr_agent.shapes()                   the same, with the hashes of their shapes
--
-- table, partitioned table, foreign table
--     {kind, persistence, owner, acl, access_method, options, replica_identity, rls, force_rls, partition_key, bound, parents: [name],
--      of_type, server, comment,
--      columns: [{name, type, collation, notnull, default, identity, sequence, generated, storage, compression, statistics, options, acl,
--                 comment, local, inherited, missing}],
--      constraints: {name: {type, definition, local, valid, comment}}}
-- view, materialized view   {kind, definition, options, columns: [name], owner, acl, comment, column_comments}
-- index                     {table_schema, table_name, definition, unique, valid, constraint, clustered, statistics, comment}
-- sequence                  {type, start, increment, min, max, cache, cycle, owned_by: [schema, table, column], identity, owner, acl, comment}
-- function, procedure, aggregate   {definition, owner, acl, comment}
-- trigger, rule             {table_schema, table_name, definition, enabled, comment}
-- policy                    {table_schema, table_name, command, permissive, roles, using, check, comment}
-- type                      {labels | attributes | definition, owner, acl, comment}
-- domain                    {base, collation, default, notnull, constraints: {name: {definition, valid}}, owner, acl, comment}
-- schema, language, extension, statistics object, collation, cast, operator, …   {definition or what it takes, owner, acl, comment}
-- role                      {login, superuser, …, member_of: {name: {admin}}, settings: ["name=value"], settings_here, comment}
-- database                  {owner, acl, settings, comment}
-- event trigger             {event, tags, function, enabled, owner, comment}
-- publication               {all_tables, via_root, publish, tables, schemas, owner, comment}

CREATE OR REPLACE FUNCTION dr_agent.privileges(acl aclitem[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_agg(jsonb_build_object(
                   'grantee', CASE WHEN e.grantee = 0 THEN NULL ELSE pg_get_userbyid(e.grantee) END,
                   'privilege', e.privilege_type, 'grantable', e.is_grantable)
                 ORDER BY e.grantee = 0 DESC, pg_get_userbyid(e.grantee), e.privilege_type, e.is_grantable)
          FROM aclexplode(acl) AS e);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.without_secrets(options text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_agg(o ORDER BY o) FROM unnest(options) AS o
         WHERE split_part(o, '=', 1) !~* '(pass|pwd|secret|token|key)');
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.labels(class oid, object oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_object_agg(provider, label) FROM pg_seclabel WHERE classoid = class AND objoid = object AND objsubid = 0);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_column(rel oid, just smallint) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                   'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                   'collation', CASE WHEN a.attcollation <> t.typcollation THEN a.attcollation::regcollation::text END,
                   'notnull', nullif(a.attnotnull, false), 'default', pg_get_expr(d.adbin, d.adrelid),
                   'identity', nullif(a.attidentity, ''), 'generated', nullif(a.attgenerated, ''),
                   'sequence', CASE WHEN a.attidentity <> '' THEN (
                        SELECT jsonb_build_object('schema', n.nspname, 'name', s.relname, 'start', q.seqstart, 'increment', q.seqincrement,
                                                  'min', q.seqmin, 'max', q.seqmax, 'cache', q.seqcache, 'cycle', q.seqcycle)
                          FROM pg_depend p JOIN pg_class s ON s.oid = p.objid AND s.relkind = 'S'
                          JOIN pg_namespace n ON n.oid = s.relnamespace JOIN pg_sequence q ON q.seqrelid = s.oid
                         WHERE p.classid = 'pg_class'::regclass AND p.refclassid = 'pg_class'::regclass
                           AND p.refobjid = a.attrelid AND p.refobjsubid = a.attnum AND p.deptype = 'i') END,
                   'storage', CASE WHEN a.attstorage <> t.typstorage THEN a.attstorage::text END,
                   'compression', nullif(a.attcompression, ''), 'statistics', nullif(a.attstattarget, -1), 'options', a.attoptions,
                   'acl', CASE WHEN a.attacl IS NOT NULL THEN dr_agent.privileges(a.attacl) END,
                   'local', nullif(a.attislocal, true), 'inherited', nullif(a.attinhcount > 0, false),
                   'missing', CASE WHEN a.atthasmissing THEN (
                        SELECT m.value FROM jsonb_array_elements_text(to_jsonb(a) -> 'attmissingval') AS m (value)) END,
                   'comment', c.description)) ORDER BY a.attnum)
          FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
          LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
          LEFT JOIN pg_description c ON c.classoid = 'pg_class'::regclass AND c.objoid = a.attrelid AND c.objsubid = a.attnum
         WHERE a.attrelid = rel AND a.attnum > 0 AND NOT a.attisdropped AND (just IS NULL OR a.attnum = just));
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_constraints(rel oid, just oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_object_agg(k.conname, jsonb_strip_nulls(jsonb_build_object(
                   'type', k.contype, 'definition', pg_get_constraintdef(k.oid), 'valid', nullif(k.convalidated, true),
                   'local', nullif(k.conislocal, true), 'comment', obj_description(k.oid, 'pg_constraint'))))
          FROM pg_constraint k
         WHERE k.conrelid = rel AND k.conparentid = 0 AND k.contype NOT IN ('n', 't') AND (just IS NULL OR k.oid = just));
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_table(rel oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'kind', c.relkind, 'persistence', c.relpersistence, 'owner', pg_get_userbyid(c.relowner),
                   'acl', dr_agent.privileges(c.relacl),
                   'access_method', (SELECT nullif(m.amname, 'heap') FROM pg_am m WHERE m.oid = c.relam),
                   'options', (SELECT jsonb_agg(o ORDER BY o) FROM unnest(c.reloptions) AS o),
                   'replica_identity', CASE c.relreplident WHEN 'd' THEN NULL
                        WHEN 'i' THEN (SELECT i.indexrelid::regclass::text FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident)
                        ELSE c.relreplident::text END,
                   'rls', nullif(c.relrowsecurity, false), 'force_rls', nullif(c.relforcerowsecurity, false),
                   'partition_key', CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
                   'bound', pg_get_expr(c.relpartbound, c.oid),
                   'parents', (SELECT jsonb_agg(format('%I.%I', n.nspname, p.relname) ORDER BY i.inhseqno)
                                 FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace n ON n.oid = p.relnamespace
                                WHERE i.inhrelid = c.oid),
                   'of_type', CASE WHEN c.reloftype <> 0 THEN c.reloftype::regtype::text END,
                   'server', (SELECT s.srvname FROM pg_foreign_table f JOIN pg_foreign_server s ON s.oid = f.ftserver WHERE f.ftrelid = c.oid),
                   'table_options', (SELECT dr_agent.without_secrets(f.ftoptions) FROM pg_foreign_table f WHERE f.ftrelid = c.oid),
                   'comment', obj_description(c.oid, 'pg_class'),
                   'security_labels', dr_agent.labels('pg_class'::regclass, c.oid),
                   'columns', coalesce(dr_agent.shape_of_column(c.oid, NULL), '[]'),
                   'constraints', dr_agent.shape_of_constraints(c.oid, NULL)))
          FROM pg_class c WHERE c.oid = rel);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_view(rel oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'kind', c.relkind, 'definition', pg_get_viewdef(c.oid), 'options', (SELECT jsonb_agg(o ORDER BY o) FROM unnest(c.reloptions) AS o),
                   'columns', (SELECT jsonb_agg(a.attname ORDER BY a.attnum) FROM pg_attribute a
                                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
                   'column_comments', (SELECT jsonb_object_agg(a.attname, col_description(c.oid, a.attnum)) FROM pg_attribute a
                                        WHERE a.attrelid = c.oid AND a.attnum > 0 AND col_description(c.oid, a.attnum) IS NOT NULL),
                   'column_defaults', (SELECT jsonb_object_agg(a.attname, pg_get_expr(d.adbin, d.adrelid)) FROM pg_attribute a
                                         JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE a.attrelid = c.oid),
                   'owner', pg_get_userbyid(c.relowner), 'acl', dr_agent.privileges(c.relacl), 'comment', obj_description(c.oid, 'pg_class')))
          FROM pg_class c WHERE c.oid = rel);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_index(rel oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'table_schema', n.nspname, 'table_name', t.relname, 'definition', pg_get_indexdef(i.indexrelid),
                   'unique', nullif(i.indisunique, false), 'valid', nullif(i.indisvalid, true),
                   'constraint', nullif(EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.conrelid = i.indrelid), false),
                   'inherited', nullif(c.relispartition, false),
                   'clustered', nullif(i.indisclustered, false),
                   'statistics', (SELECT jsonb_object_agg(a.attnum, a.attstattarget) FROM pg_attribute a
                                   WHERE a.attrelid = i.indexrelid AND coalesce(a.attstattarget, -1) >= 0),
                   'comment', obj_description(i.indexrelid, 'pg_class')))
          FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
          JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
         WHERE i.indexrelid = rel);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_sequence(rel oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'type', s.seqtypid::regtype, 'start', s.seqstart, 'increment', s.seqincrement, 'min', s.seqmin, 'max', s.seqmax,
                   'cache', s.seqcache, 'cycle', nullif(s.seqcycle, false), 'persistence', nullif(c.relpersistence, 'p'),
                   'owned_by', (SELECT jsonb_build_array(n.nspname, t.relname, a.attname)
                                  FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid JOIN pg_namespace n ON n.oid = t.relnamespace
                                  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                                 WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
                                   AND d.deptype IN ('a', 'i')),
                   'identity', nullif(EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                                                 AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i'), false),
                   'owner', pg_get_userbyid(c.relowner), 'acl', dr_agent.privileges(c.relacl), 'comment', obj_description(c.oid, 'pg_class')))
          FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid WHERE s.seqrelid = rel);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_function(fn oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'definition', CASE WHEN p.prokind <> 'a' THEN pg_get_functiondef(p.oid) ELSE (
                        SELECT format('CREATE AGGREGATE %s.%s (%s) (%s)', quote_ident(n.nspname), quote_ident(p.proname),
                                   CASE WHEN p.pronargs = 0 THEN '*' ELSE pg_get_function_arguments(p.oid) END,
                                   concat_ws(', ', 'SFUNC = ' || a.aggtransfn::regproc, 'STYPE = ' || format_type(a.aggtranstype, NULL),
                                       'SSPACE = ' || nullif(a.aggtransspace, 0), 'FINALFUNC = ' || nullif(a.aggfinalfn::oid, 0)::regproc,
                                       CASE WHEN a.aggfinalextra THEN 'FINALFUNC_EXTRA' END,
                                       'COMBINEFUNC = ' || nullif(a.aggcombinefn::oid, 0)::regproc,
                                       'SERIALFUNC = ' || nullif(a.aggserialfn::oid, 0)::regproc,
                                       'DESERIALFUNC = ' || nullif(a.aggdeserialfn::oid, 0)::regproc,
                                       'INITCOND = ' || quote_literal(a.agginitval),
                                       'MSFUNC = ' || nullif(a.aggmtransfn::oid, 0)::regproc,
                                       'MINVFUNC = ' || nullif(a.aggminvtransfn::oid, 0)::regproc,
                                       'MSTYPE = ' || format_type(nullif(a.aggmtranstype, 0), NULL),
                                       'MFINALFUNC = ' || nullif(a.aggmfinalfn::oid, 0)::regproc,
                                       'MINITCOND = ' || quote_literal(a.aggminitval),
                                       CASE WHEN a.aggkind = 'h' THEN 'HYPOTHETICAL' END,
                                       CASE p.proparallel WHEN 's' THEN 'PARALLEL = SAFE' WHEN 'r' THEN 'PARALLEL = RESTRICTED' END))
                          FROM pg_aggregate a JOIN pg_namespace n ON n.oid = p.pronamespace WHERE a.aggfnoid = p.oid) END,
                   'result', pg_get_function_result(p.oid),
                   'owner', pg_get_userbyid(p.proowner), 'acl', dr_agent.privileges(p.proacl), 'comment', obj_description(p.oid, 'pg_proc')))
          FROM pg_proc p WHERE p.oid = fn);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of_type(of_type oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'typtype', t.typtype,
                   'labels', CASE WHEN t.typtype = 'e' THEN coalesce((SELECT jsonb_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e
                                  WHERE e.enumtypid = t.oid), '[]') END,
                   'attributes', CASE WHEN t.typtype = 'c' THEN coalesce((
                        SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                                   'collation', CASE WHEN a.attcollation <> b.typcollation THEN a.attcollation::regcollation::text END,
                                   'comment', col_description(a.attrelid, a.attnum))) ORDER BY a.attnum)
                          FROM pg_attribute a JOIN pg_type b ON b.oid = a.atttypid
                         WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped), '[]') END,
                   'range', CASE WHEN t.typtype = 'r' THEN (
                        SELECT jsonb_strip_nulls(jsonb_build_object('subtype', format_type(r.rngsubtype, NULL),
                                   'collation', nullif(r.rngcollation, 0)::regcollation::text,
                                   'multirange', format_type(r.rngmultitypid, NULL),
                                   'opclass', (SELECT format('%I.%I', n.nspname, o.opcname) FROM pg_opclass o JOIN pg_namespace n ON n.oid = o.opcnamespace
                                                WHERE o.oid = r.rngsubopc AND NOT o.opcdefault),
                                   'canonical', nullif(r.rngcanonical::oid, 0)::regproc::text, 'diff', nullif(r.rngsubdiff::oid, 0)::regproc::text))
                          FROM pg_range r WHERE r.rngtypid = t.oid) END,
                   'base', CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, t.typtypmod) END,
                   'collation', CASE WHEN t.typtype = 'd' AND t.typcollation <> b.typcollation THEN t.typcollation::regcollation::text END,
                   'default', t.typdefault, 'notnull', nullif(t.typnotnull, false),
                   'constraints', CASE WHEN t.typtype = 'd' THEN (
                        SELECT jsonb_object_agg(k.conname, jsonb_strip_nulls(jsonb_build_object('definition', pg_get_constraintdef(k.oid),
                                   'valid', nullif(k.convalidated, true), 'comment', obj_description(k.oid, 'pg_constraint'))))
                          FROM pg_constraint k WHERE k.contypid = t.oid AND k.contype = 'c') END,
                   'owner', pg_get_userbyid(t.typowner), 'acl', dr_agent.privileges(t.typacl),
                   'comment', coalesce(obj_description(t.oid, 'pg_type'), obj_description(nullif(t.typrelid, 0), 'pg_class'))))
          FROM pg_type t LEFT JOIN pg_type b ON b.oid = t.typbasetype WHERE t.oid = of_type);
END
$$;

-- Settings that are stored with a database, a role, or one in the other (pg_db_role_setting). Not those that open or close the standby,
-- and not those with which a session may not come up on a server that lacks something: these are left to a person.
CREATE OR REPLACE FUNCTION dr_agent.settings_to_carry(of_database oid, of_role oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN (
        SELECT jsonb_agg(c ORDER BY c COLLATE "C") FROM pg_db_role_setting s CROSS JOIN unnest(s.setconfig) AS c
         WHERE s.setdatabase = of_database AND s.setrole = of_role
           AND lower(split_part(c, '=', 1)) NOT IN ('default_transaction_read_only', 'session_replication_role', 'session_preload_libraries',
                                                    'local_preload_libraries', 'role', 'session_authorization', 'post_auth_delay'));
END
$$;

-- Version 14 knows none.
CREATE OR REPLACE FUNCTION dr_agent.schemas_of_publication(publication oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    schemas jsonb;
BEGIN
    IF to_regclass('pg_catalog.pg_publication_namespace') IS NOT NULL THEN
        EXECUTE 'SELECT jsonb_agg(quote_ident(n.nspname) ORDER BY n.nspname) FROM pg_publication_namespace p
                   JOIN pg_namespace n ON n.oid = p.pnnspid WHERE p.pnpubid = $1' INTO schemas USING publication;
    END IF;
    RETURN schemas;
END
$$;

-- What is asked for less often: one row, its columns that are not the server's own.
CREATE OR REPLACE FUNCTION dr_agent.shape_of_other(class oid, object oid) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CASE class
    WHEN 'pg_trigger'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('table_schema', n.nspname, 'table_name', c.relname, 'definition', pg_get_triggerdef(g.oid),
                   'enabled', g.tgenabled, 'comment', obj_description(g.oid, 'pg_trigger')))
          FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE g.oid = object AND NOT g.tgisinternal);
    WHEN 'pg_rewrite'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('table_schema', n.nspname, 'table_name', c.relname, 'definition', pg_get_ruledef(r.oid),
                   'enabled', r.ev_enabled, 'comment', obj_description(r.oid, 'pg_rewrite')))
          FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE r.oid = object AND r.rulename <> '_RETURN');
    WHEN 'pg_policy'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('table_schema', n.nspname, 'table_name', c.relname, 'command', p.polcmd,
                   'permissive', p.polpermissive,
                   'roles', (SELECT jsonb_agg(CASE WHEN r = 0 THEN NULL ELSE pg_get_userbyid(r) END ORDER BY 1) FROM unnest(p.polroles) AS r),
                   'using', pg_get_expr(p.polqual, p.polrelid), 'check', pg_get_expr(p.polwithcheck, p.polrelid),
                   'comment', obj_description(p.oid, 'pg_policy')))
          FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.oid = object);
    WHEN 'pg_namespace'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('owner', pg_get_userbyid(n.nspowner), 'acl', dr_agent.privileges(n.nspacl),
                   'comment', obj_description(n.oid, 'pg_namespace'))) FROM pg_namespace n WHERE n.oid = object);
    WHEN 'pg_extension'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('version', e.extversion, 'schema', e.extnamespace::regnamespace::text))
          FROM pg_extension e WHERE e.oid = object);
    WHEN 'pg_statistic_ext'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('table_schema', n.nspname, 'table_name', c.relname,
                   'definition', pg_get_statisticsobjdef(s.oid), 'target', nullif(s.stxstattarget, -1),
                   'owner', pg_get_userbyid(s.stxowner), 'comment', obj_description(s.oid, 'pg_statistic_ext')))
          FROM pg_statistic_ext s JOIN pg_class c ON c.oid = s.stxrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE s.oid = object);
    WHEN 'pg_default_acl'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('role', pg_get_userbyid(d.defaclrole),
                   'schema', nullif(d.defaclnamespace, 0)::regnamespace::text, 'objects', d.defaclobjtype, 'acl', dr_agent.privileges(d.defaclacl)))
          FROM pg_default_acl d WHERE d.oid = object);
    WHEN 'pg_language'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('trusted', l.lanpltrusted, 'handler', nullif(l.lanplcallfoid, 0)::regproc::text,
                   'owner', pg_get_userbyid(l.lanowner), 'acl', dr_agent.privileges(l.lanacl))) FROM pg_language l WHERE l.oid = object);
    WHEN 'pg_collation'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(to_jsonb(c) - '{oid,collname,collnamespace,collowner,collversion}'::text[]
                   || jsonb_build_object('owner', pg_get_userbyid(c.collowner), 'comment', obj_description(c.oid, 'pg_collation')))
          FROM pg_collation c WHERE c.oid = object);
    WHEN 'pg_cast'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('source', c.castsource::regtype::text, 'target', c.casttarget::regtype::text,
                   'function', nullif(c.castfunc, 0)::regprocedure::text, 'context', c.castcontext, 'method', c.castmethod))
          FROM pg_cast c WHERE c.oid = object);
    WHEN 'pg_operator'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('schema', o.oprnamespace::regnamespace::text, 'name', o.oprname,
                   'left', nullif(o.oprleft, 0)::regtype::text, 'right', nullif(o.oprright, 0)::regtype::text, 'function', o.oprcode::text,
                   'commutator', nullif(o.oprcom, 0)::regoperator::text, 'negator', nullif(o.oprnegate, 0)::regoperator::text,
                   'restrict', nullif(o.oprrest::oid, 0)::regproc::text, 'join', nullif(o.oprjoin::oid, 0)::regproc::text,
                   'merges', nullif(o.oprcanmerge, false), 'hashes', nullif(o.oprcanhash, false), 'owner', pg_get_userbyid(o.oprowner)))
          FROM pg_operator o WHERE o.oid = object);
    WHEN 'pg_foreign_data_wrapper'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('handler', nullif(f.fdwhandler, 0)::regproc::text,
                   'validator', nullif(f.fdwvalidator, 0)::regproc::text, 'options', dr_agent.without_secrets(f.fdwoptions),
                   'owner', pg_get_userbyid(f.fdwowner), 'acl', dr_agent.privileges(f.fdwacl)))
          FROM pg_foreign_data_wrapper f WHERE f.oid = object);
    WHEN 'pg_foreign_server'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('wrapper', w.fdwname, 'type', s.srvtype, 'version', s.srvversion,
                   'options', dr_agent.without_secrets(s.srvoptions), 'owner', pg_get_userbyid(s.srvowner), 'acl', dr_agent.privileges(s.srvacl)))
          FROM pg_foreign_server s JOIN pg_foreign_data_wrapper w ON w.oid = s.srvfdw WHERE s.oid = object);
    WHEN 'pg_user_mapping'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('user', u.usename, 'server', u.srvname, 'options', dr_agent.without_secrets(u.umoptions)))
          FROM pg_user_mappings u WHERE u.umid = object);
    WHEN 'pg_authid'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object(
                   'superuser', nullif(r.rolsuper, false), 'noinherit', nullif(NOT r.rolinherit, false), 'createrole', nullif(r.rolcreaterole, false),
                   'createdb', nullif(r.rolcreatedb, false), 'login', nullif(r.rolcanlogin, false),
                   'replication', nullif(r.rolreplication, false), 'bypassrls', nullif(r.rolbypassrls, false),
                   'limit', nullif(r.rolconnlimit, -1), 'until', CASE WHEN isfinite(r.rolvaliduntil) THEN r.rolvaliduntil END,
                   'member_of', (SELECT jsonb_object_agg(m.name, jsonb_strip_nulls(jsonb_build_object('admin', nullif(m.admin, false))))
                                   FROM (SELECT pg_get_userbyid(roleid) AS name, bool_or(admin_option) AS admin FROM pg_auth_members
                                          WHERE member = r.oid
                                            AND roleid NOT IN (SELECT relowner FROM pg_class WHERE oid = to_regclass('dr_agent.heartbeat'))
                                          GROUP BY roleid) AS m),
                   'settings', dr_agent.settings_to_carry(0, r.oid),
                   'settings_here', dr_agent.settings_to_carry((SELECT oid FROM pg_database WHERE datname = current_database()), r.oid),
                   'comment', shobj_description(r.oid, 'pg_authid')))
          FROM pg_roles r WHERE r.oid = object);
    WHEN 'pg_database'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('owner', pg_get_userbyid(d.datdba), 'acl', dr_agent.privileges(d.datacl),
                   'settings', dr_agent.settings_to_carry(d.oid, 0), 'comment', shobj_description(d.oid, 'pg_database')))
          FROM pg_database d WHERE d.oid = object);
    WHEN 'pg_event_trigger'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('event', e.evtevent, 'tags', (SELECT jsonb_agg(t ORDER BY t) FROM unnest(e.evttags) AS t),
                   'function', (SELECT format('%I.%I', n.nspname, p.proname) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                                 WHERE p.oid = e.evtfoid),
                   'enabled', e.evtenabled, 'owner', pg_get_userbyid(e.evtowner), 'comment', obj_description(e.oid, 'pg_event_trigger')))
          FROM pg_event_trigger e WHERE e.oid = object);
    WHEN 'pg_publication'::regclass THEN RETURN (
        SELECT jsonb_strip_nulls(jsonb_build_object('all_tables', nullif(p.puballtables, false), 'via_root', nullif(p.pubviaroot, false),
                   'publish', concat_ws(', ', CASE WHEN p.pubinsert THEN 'insert' END, CASE WHEN p.pubupdate THEN 'update' END,
                                              CASE WHEN p.pubdelete THEN 'delete' END, CASE WHEN p.pubtruncate THEN 'truncate' END),
                   'tables', (SELECT jsonb_agg(format('%I.%I', n.nspname, c.relname)
                                               || coalesce(' (' || (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum)
                                                                     FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = ANY (
                                                                          string_to_array(to_jsonb(r) ->> 'prattrs', ' ')::smallint[])) || ')', '')
                                               || coalesce(' WHERE ' || (SELECT to_jsonb(t) ->> 'rowfilter' FROM pg_publication_tables t
                                                                          WHERE (t.pubname, t.schemaname, t.tablename) = (p.pubname, n.nspname, c.relname)
                                                                            AND to_jsonb(r) ->> 'prqual' IS NOT NULL), '')
                                               ORDER BY n.nspname, c.relname)
                                FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                               WHERE r.prpubid = p.oid),
                   'schemas', dr_agent.schemas_of_publication(p.oid),
                   'owner', pg_get_userbyid(p.pubowner), 'comment', obj_description(p.oid, 'pg_publication')))
          FROM pg_publication p WHERE p.oid = object);
    WHEN 'pg_opclass'::regclass, 'pg_opfamily'::regclass, 'pg_conversion'::regclass, 'pg_ts_config'::regclass, 'pg_ts_dict'::regclass,
         'pg_ts_parser'::regclass, 'pg_ts_template'::regclass, 'pg_transform'::regclass, 'pg_am'::regclass THEN
        -- That it is there.
        RETURN '{}';
    ELSE
        RETURN NULL;
    END CASE;
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape_of(class oid, object oid, sub integer DEFAULT 0) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    of_kind "char";
BEGIN
    IF class = 'pg_class'::regclass THEN
        SELECT relkind INTO of_kind FROM pg_class WHERE oid = object;
        IF sub <> 0 THEN
            RETURN dr_agent.shape_of_column(object, sub::smallint) -> 0;
        END IF;
        RETURN CASE WHEN of_kind IN ('r', 'p', 'f') THEN dr_agent.shape_of_table(object)
                    WHEN of_kind IN ('v', 'm') THEN dr_agent.shape_of_view(object)
                    WHEN of_kind IN ('i', 'I') THEN dr_agent.shape_of_index(object)
                    WHEN of_kind = 'S' THEN dr_agent.shape_of_sequence(object)
                    WHEN of_kind = 'c' THEN dr_agent.shape_of_type((SELECT reltype FROM pg_class WHERE oid = object)) END;
    ELSIF class = 'pg_proc'::regclass THEN
        RETURN dr_agent.shape_of_function(object);
    ELSIF class = 'pg_type'::regclass THEN
        RETURN dr_agent.shape_of_type(object);
    ELSIF class = 'pg_constraint'::regclass THEN
        RETURN (SELECT CASE WHEN k.conrelid <> 0 THEN dr_agent.shape_of_constraints(k.conrelid, k.oid) -> k.conname::text
                            ELSE dr_agent.shape_of_type(k.contypid) -> 'constraints' -> k.conname::text END
                  FROM pg_constraint k WHERE k.oid = object);
    ELSIF class = 'pg_attrdef'::regclass THEN
        RETURN (SELECT jsonb_build_object('default', pg_get_expr(d.adbin, d.adrelid)) FROM pg_attrdef d WHERE d.oid = object);
    END IF;
    RETURN dr_agent.shape_of_other(class, object);
END
$$;

CREATE OR REPLACE FUNCTION dr_agent.shape(kind text, names text[], args text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    object record;
BEGIN
    -- It may have another name here.
    IF kind = 'database' THEN
        RETURN dr_agent.shape_of('pg_database'::regclass, (SELECT oid FROM pg_database WHERE datname = current_database()));
    END IF;
    SELECT * INTO object FROM pg_get_object_address(kind, names, args);
    RETURN dr_agent.shape_of(object.classid, object.objid, object.objsubid);
EXCEPTION
    WHEN undefined_object OR undefined_table OR undefined_column OR undefined_function OR invalid_schema_name OR wrong_object_type
         OR invalid_parameter_value OR invalid_name THEN
        RETURN NULL;
END
$$;

-- The roles that this database depends on, with their groups and members: not the one that every server has, the server's own, and the
-- agent's.
CREATE OR REPLACE FUNCTION dr_agent.roles_of_database() RETURNS TABLE (role oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE here (oid) AS (SELECT oid FROM pg_database WHERE datname = current_database()),
    agent (oid) AS (SELECT relowner FROM pg_class WHERE oid = to_regclass('dr_agent.heartbeat')),
    needed (oid) AS (
        SELECT d.refobjid FROM pg_shdepend d, here
         WHERE d.refclassid = 'pg_authid'::regclass
           AND (d.dbid = here.oid OR d.classid = 'pg_database'::regclass AND d.objid = here.oid)
        UNION SELECT setrole FROM pg_db_role_setting s, here WHERE s.setdatabase = here.oid
        UNION SELECT CASE WHEN m.member = n.oid THEN m.roleid ELSE m.member END
                FROM needed n JOIN pg_auth_members m ON n.oid IN (m.member, m.roleid)
               WHERE m.roleid >= 16384 AND m.member NOT IN (SELECT oid FROM agent))
    SELECT r.oid FROM pg_roles r JOIN needed USING (oid)
     WHERE r.rolname !~ '^(pg|rds)_' AND r.oid <> 10 AND r.oid NOT IN (SELECT oid FROM agent)
$$;

-- Every object that has a shape. What belongs to an extension comes with it; what is ours is not the user's.
CREATE OR REPLACE FUNCTION dr_agent.objects() RETURNS TABLE (class oid, object oid)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH own (oid) AS (
        SELECT oid FROM pg_namespace
         WHERE nspname !~ '^pg_(toast|temp)' AND nspname NOT IN ('pg_catalog', 'information_schema', 'dr_agent')),
    extension (class, object) AS MATERIALIZED (
        SELECT classid, objid FROM pg_depend WHERE deptype = 'e' AND refclassid = 'pg_extension'::regclass),
    found (class, object) AS (
        SELECT 'pg_class'::regclass::oid, oid FROM pg_class c
         WHERE relnamespace IN (SELECT oid FROM own) AND relkind NOT IN ('t', 'c') AND relpersistence <> 't'
        UNION ALL SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_type'::regclass, oid FROM pg_type t
                   WHERE typnamespace IN (SELECT oid FROM own) AND (typtype IN ('e', 'd', 'r')
                         OR typtype = 'c' AND EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind = 'c'))
        UNION ALL SELECT 'pg_trigger'::regclass, g.oid FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid
                   WHERE NOT g.tgisinternal AND g.tgparentid = 0 AND c.relnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_rewrite'::regclass, r.oid FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
                   WHERE r.rulename <> '_RETURN' AND c.relnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_policy'::regclass, p.oid FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid
                   WHERE c.relnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_statistic_ext'::regclass, oid FROM pg_statistic_ext WHERE stxnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_namespace'::regclass, oid FROM own
        UNION ALL SELECT 'pg_extension'::regclass, oid FROM pg_extension
        UNION ALL SELECT 'pg_collation'::regclass, oid FROM pg_collation WHERE collnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_operator'::regclass, oid FROM pg_operator WHERE oprnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_opclass'::regclass, oid FROM pg_opclass WHERE opcnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_opfamily'::regclass, oid FROM pg_opfamily WHERE opfnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_ts_config'::regclass, oid FROM pg_ts_config WHERE cfgnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_ts_dict'::regclass, oid FROM pg_ts_dict WHERE dictnamespace IN (SELECT oid FROM own)
        UNION ALL SELECT 'pg_cast'::regclass, oid FROM pg_cast WHERE oid >= 16384
        UNION ALL SELECT 'pg_default_acl'::regclass, oid FROM pg_default_acl
        UNION ALL SELECT 'pg_foreign_data_wrapper'::regclass, oid FROM pg_foreign_data_wrapper
        UNION ALL SELECT 'pg_foreign_server'::regclass, oid FROM pg_foreign_server
        UNION ALL SELECT 'pg_database'::regclass, oid FROM pg_database WHERE datname = current_database()
        UNION ALL SELECT 'pg_authid'::regclass, r.role FROM dr_agent.roles_of_database() AS r
        UNION ALL SELECT 'pg_event_trigger'::regclass, oid FROM pg_event_trigger WHERE evtname NOT LIKE 'dr\_agent\_%'
        UNION ALL SELECT 'pg_publication'::regclass, p.oid FROM pg_publication p
                   WHERE NOT EXISTS (SELECT FROM pg_publication_rel r JOIN pg_class c ON c.oid = r.prrelid
                                      WHERE r.prpubid = p.oid AND c.relnamespace = 'dr_agent'::regnamespace))
    SELECT f.class, f.object FROM found f
     WHERE NOT EXISTS (SELECT FROM extension e WHERE e.class = f.class AND e.object = f.object)
       -- What a range type brings along.
       AND NOT (f.class IN ('pg_proc'::regclass, 'pg_cast'::regclass)
                AND EXISTS (SELECT FROM pg_depend d WHERE d.classid = f.class AND d.objid = f.object AND d.deptype = 'i'))
$$;

CREATE OR REPLACE FUNCTION dr_agent.shapes() RETURNS TABLE (kind text, names text[], args text[], identity text, hash text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT a.type, a.object_names, a.object_args, i.identity, md5(dr_agent.shape_of(o.class, o.object)::text)
      FROM dr_agent.objects() AS o, pg_identify_object_as_address(o.class, o.object, 0) AS a,
           pg_identify_object(o.class, o.object, 0) AS i
$$;
