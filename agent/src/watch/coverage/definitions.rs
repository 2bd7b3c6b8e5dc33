//! ● What an object may do and is, beside its name: who may use it, what defines it, what a role may do.
//!
//! SQL that [`super::inventory`] puts behind its own. An object is one line of text: its name, and what is compared.
//!
//! # Invariants
//! - Definitions are those that the server writes, with an empty search_path, and hashed; they are compared between servers of one
//!   major version only, because each writes them in its own way.
//! - A definition that was loaded from a dump is written with other casts, parentheses and spaces than before: these do not count.
//! - What belongs to an agent does not count: its roles' privileges, and what a copy changes on purpose (when a trigger
//!   fires, whether a constraint is validated).
//!
//! # What it does not do
//! It names what differs, not how. It compares neither owners nor the types of columns, which the stream itself tells, and
//! no password, only whether there is one.

/// The kinds, in the order of the inventory's.
pub(super) const PRIVILEGE: &str = "privilege";
pub(super) const DEFINITION: &str = "definition";
pub(super) const ROLE_ATTRIBUTE: &str = "role_attribute";
pub(super) const ROLE_PASSWORD: &str = "role_password";

/// The major version of a server; no kind of object.
pub(super) const SERVER_VERSION: &str = "server_version";

/// What changes when one of these does, most of the time: as many rows were written to the catalogs that hold them.
pub const CHANGES: &str = "
    SELECT coalesce(sum(pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid)
                        + pg_stat_get_tuples_deleted(oid)), 0)::bigint
      FROM pg_catalog.pg_class
     WHERE relnamespace = 'pg_catalog'::regnamespace
       AND relname IN ('pg_class', 'pg_attribute', 'pg_attrdef', 'pg_constraint', 'pg_index', 'pg_trigger', 'pg_rewrite', 'pg_policy',
                       'pg_proc', 'pg_type', 'pg_enum', 'pg_range', 'pg_sequence', 'pg_namespace', 'pg_default_acl', 'pg_authid',
                       'pg_auth_members', 'pg_database', 'pg_language', 'pg_foreign_server', 'pg_foreign_data_wrapper',
                       'pg_db_role_setting', 'pg_shdescription', 'pg_event_trigger', 'pg_publication', 'pg_publication_rel',
                       'pg_publication_namespace', 'pg_description', 'pg_seclabel', 'pg_inherits', 'pg_statistic_ext', 'pg_extension',
                       'pg_collation', 'pg_operator', 'pg_opclass', 'pg_opfamily', 'pg_cast', 'pg_ts_config', 'pg_ts_dict')";

/// `kind, name` of the server's version.
pub(super) const OF_SERVER: &str = "
    SELECT 'server_version', (pg_catalog.current_setting('server_version_num')::int / 10000)::text";

/// Whose privileges count on the source: all but the agent's own and the first superuser's, whose name is the server's own affair.
pub(super) const COUNTS_ON_SOURCE: &str =
    "a.grantee NOT IN (10, (SELECT oid FROM pg_catalog.pg_roles WHERE rolname = current_user))";

/// The same, on the replica: those that the source has told of.
pub(super) const COUNTS_ON_REPLICA: &str =
    "(a.grantee = 0 OR pg_catalog.pg_get_userbyid(a.grantee) ~ '^(pg|rds)_'
      OR pg_catalog.pg_get_userbyid(a.grantee)::text = ANY ($2::text[]))";

/// `kind, name` of who may do what, `counts` being one of the conditions above.
pub(super) fn privileges(counts: &str) -> String {
    format!(
        "SELECT '{PRIVILEGE}', o.name || ': ' || coalesce(granted.list, 'its owner only')
           FROM (SELECT name, acl, owner FROM relation WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
                 UNION ALL SELECT name, coalesce(acl, pg_catalog.acldefault('f', owner)), owner FROM function
                 UNION ALL SELECT name, coalesce(acl, pg_catalog.acldefault('T', owner)), owner FROM type
                 UNION ALL SELECT 'schema ' || schema, acl, owner FROM own
                 UNION ALL SELECT 'the database', coalesce(datacl, pg_catalog.acldefault('d', datdba)), datdba
                             FROM pg_catalog.pg_database WHERE datname = current_database()
                 UNION ALL SELECT 'server ' || srvname, srvacl, srvowner FROM pg_catalog.pg_foreign_server
                 UNION ALL SELECT 'wrapper ' || fdwname, fdwacl, fdwowner FROM pg_catalog.pg_foreign_data_wrapper
                            WHERE oid >= 16384
                 UNION ALL SELECT 'language ' || lanname, coalesce(lanacl, pg_catalog.acldefault('l', lanowner)), lanowner
                             FROM pg_catalog.pg_language WHERE oid >= 16384
                 UNION ALL SELECT r.name || '.' || a.attname, a.attacl, r.owner FROM relation r
                             JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
                            WHERE a.attacl IS NOT NULL AND NOT a.attisdropped
                 UNION ALL SELECT 'default of ' || pg_catalog.pg_get_userbyid(defaclrole) || coalesce(' in ' || n.nspname, '')
                                  || CASE defaclobjtype WHEN 'r' THEN ' on tables' WHEN 'S' THEN ' on sequences'
                                       WHEN 'f' THEN ' on functions' WHEN 'T' THEN ' on types' WHEN 'n' THEN ' on schemas'
                                       ELSE ' on ' || defaclobjtype::text END, defaclacl, defaclrole
                             FROM pg_catalog.pg_default_acl d
                             LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace) AS o
          CROSS JOIN LATERAL (
                SELECT string_agg(item, ' ' ORDER BY item COLLATE \"C\") AS list
                  FROM (SELECT CASE a.grantee WHEN 0 THEN 'public' ELSE pg_catalog.pg_get_userbyid(a.grantee) END || '='
                               || a.privilege_type || CASE WHEN a.is_grantable THEN '*' ELSE '' END AS item
                          FROM pg_catalog.aclexplode(o.acl) a
                         WHERE a.grantee <> o.owner AND {counts}) AS i) AS granted"
    )
}

/// What is left of a definition: no casts, parentheses and spaces, and not whether it has been validated.
fn hashed(definition: &str) -> String {
    format!(
        r#"left(md5(regexp_replace({definition}, '::("[^"]*"|[a-z_ .\[\]])+|[\s()]|NOT VALID$', '', 'g')), 12)"#
    )
}

/// `kind, name` of what defines an object. Reading a view's definition takes the weakest lock on what it selects from.
pub(super) fn definitions() -> String {
    let of_relations = [
        (
            "r.name",
            "pg_catalog.pg_get_viewdef(r.oid)",
            "relation r WHERE r.relkind IN ('v', 'm')",
        ),
        (
            "r.name || '.' || a.attname",
            "coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), '') || a.attidentity::text || a.attgenerated::text",
            "relation r JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
               LEFT JOIN pg_catalog.pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
              WHERE a.attnum > 0 AND NOT a.attisdropped AND (a.atthasdef OR a.attidentity <> '')",
        ),
        (
            "r.name || '.' || c.conname",
            "pg_catalog.pg_get_constraintdef(c.oid)",
            "relation r JOIN pg_catalog.pg_constraint c ON c.conrelid = r.oid
              WHERE c.contype IN ('c', 'f', 'p', 'u', 'x') AND c.conparentid = 0",
        ),
        (
            "t.name || '.' || c.conname",
            "pg_catalog.pg_get_constraintdef(c.oid)",
            "type t JOIN pg_catalog.pg_constraint c ON c.contypid = t.oid WHERE c.contype = 'c'",
        ),
        (
            "r.name || '.' || i.relname",
            "pg_catalog.pg_get_indexdef(i.oid)",
            "relation r JOIN pg_catalog.pg_index x ON x.indrelid = r.oid
               JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
              WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_constraint c WHERE c.conindid = i.oid AND c.contype IN ('p', 'u', 'x'))",
        ),
        (
            "r.name || '.' || t.tgname",
            "pg_catalog.pg_get_triggerdef(t.oid)",
            "relation r JOIN pg_catalog.pg_trigger t ON t.tgrelid = r.oid WHERE NOT t.tgisinternal AND t.tgparentid = 0",
        ),
        (
            "r.name || '.' || w.rulename",
            "pg_catalog.pg_get_ruledef(w.oid)",
            "relation r JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.oid WHERE w.rulename <> '_RETURN'",
        ),
        (
            "r.name || '.' || p.polname",
            "p.polcmd::text || p.polpermissive::text || coalesce(pg_catalog.pg_get_expr(p.polqual, p.polrelid), '')
               || coalesce(pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid), '')",
            "relation r JOIN pg_catalog.pg_policy p ON p.polrelid = r.oid",
        ),
        (
            "r.name",
            "concat_ws(',', pg_catalog.format_type(s.seqtypid, NULL), s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle)",
            "relation r JOIN pg_catalog.pg_sequence s ON s.seqrelid = r.oid",
        ),
        (
            "f.name",
            "md5(p.prosrc) || concat_ws(',', pg_catalog.pg_get_function_sqlbody(p.oid), pg_catalog.pg_get_function_arguments(p.oid),
                       pg_catalog.pg_get_function_result(p.oid), p.prokind, p.prosecdef, p.proleakproof, p.proisstrict, p.provolatile,
                       p.proparallel, p.proconfig::text, (SELECT lanname FROM pg_catalog.pg_language l WHERE l.oid = p.prolang))",
            "function f JOIN pg_catalog.pg_proc p ON p.oid = f.oid",
        ),
        (
            "t.name",
            "concat_ws(',', (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid),
                       CASE y.typtype WHEN 'd' THEN pg_catalog.format_type(y.typbasetype, y.typtypmod) || y.typnotnull::text END,
                       CASE y.typtype WHEN 'd' THEN y.typdefault END,
                       (SELECT pg_catalog.format_type(rngsubtype, NULL) FROM pg_catalog.pg_range g WHERE g.rngtypid = t.oid),
                       (SELECT string_agg(attname || ' ' || pg_catalog.format_type(atttypid, atttypmod), ',' ORDER BY attnum)
                          FROM pg_catalog.pg_attribute a WHERE y.typtype = 'c' AND a.attrelid = y.typrelid AND NOT attisdropped))",
            "type t JOIN pg_catalog.pg_type y ON y.oid = t.oid",
        ),
    ];
    let parts = of_relations.map(|(name, definition, from)| {
        format!(
            "SELECT '{DEFINITION}', {name} || ' ' || {} FROM {from}",
            hashed(definition)
        )
    });
    parts.join("\nUNION ALL\n")
}

/// `kind, name` of what a role may do and what it is a member of, `of` being a condition about `r`.
pub(super) fn role_attributes(of: &str) -> String {
    format!(
        "SELECT '{ROLE_ATTRIBUTE}', r.rolname || ': ' || concat_ws(' ',
                CASE WHEN r.rolsuper THEN 'SUPERUSER' END, CASE WHEN r.rolcanlogin THEN 'LOGIN' END,
                CASE WHEN NOT r.rolinherit THEN 'NOINHERIT' END, CASE WHEN r.rolcreatedb THEN 'CREATEDB' END,
                CASE WHEN r.rolcreaterole THEN 'CREATEROLE' END, CASE WHEN r.rolreplication THEN 'REPLICATION' END,
                CASE WHEN r.rolbypassrls THEN 'BYPASSRLS' END, 'LIMIT ' || nullif(r.rolconnlimit, -1),
                'UNTIL ' || CASE WHEN isfinite(r.rolvaliduntil) THEN extract(epoch FROM r.rolvaliduntil)::bigint END)
           FROM pg_catalog.pg_roles r WHERE {of}
         UNION ALL
         SELECT '{ROLE_ATTRIBUTE}', r.rolname || ': member of ' || g.rolname
           FROM pg_catalog.pg_roles r JOIN pg_catalog.pg_auth_members m ON m.member = r.oid
           JOIN pg_catalog.pg_roles g ON g.oid = m.roleid WHERE {of}"
    )
}

/// `kind, name` of the roles with a password, for who may read that.
pub(super) fn role_passwords(of: &str) -> String {
    format!(
        "SELECT '{ROLE_PASSWORD}', r.rolname::text FROM pg_catalog.pg_authid r WHERE r.rolpassword IS NOT NULL AND {of}"
    )
}
