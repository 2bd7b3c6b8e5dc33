//! What a database has, by kind and name: on the source as told in-band, on the replica as it is.
//!
//! The source's monitor brings `dr_agent.coverage` up to date; it is published, so the rows stand in the stream where the
//! source was so, and are on the replica when the source is gone.
//!
//! ```text
//! source    catalogs ─▶ dr_agent.coverage (protected: what should be on both sides; not protected: what is not)
//! replica   dr_agent.coverage, catalogs ─▶ [super::kept]
//! ```
//!
//! # Invariants
//! - Catalogs only, and no OID is resolved by a function that fails when it is gone.
//! - A row is bounded: beyond [`NAMES_BYTES_MAX`] names are hashes, and beyond [`HASHES_MAX`] of those there is a number alone.
//! - What takes long or waits for a lock (`definitions`) keeps nothing else from being told.
//!
//! # What it does not do
//! What is compared beside a name stands in `definitions`.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use super::Unprotected;
use super::definitions::{
    self, DEFINITION, PRIVILEGE, ROLE_ATTRIBUTE, ROLE_PASSWORD, SERVER_VERSION,
};
use crate::names::stream::StreamName;
use crate::pg::PgError;
use crate::schema::coverage::{self, HASH_CHARS, HASHED, Told};

/// Every kind of object whose names are compared. An object comes before what belongs to it.
pub(super) const KINDS: [&str; 46] = [
    "role",
    "schema",
    "extension",
    EXTENSION_VERSION,
    "language",
    "type",
    "function",
    "operator",
    "operator_family",
    "operator_class",
    "access_method",
    "cast",
    "transform",
    "conversion",
    "collation",
    "text_search_parser",
    "text_search_template",
    "text_search_dictionary",
    "text_search_configuration",
    "foreign_data_wrapper",
    "foreign_server",
    "user_mapping",
    "table",
    "partitioned_table",
    "foreign_table",
    "view",
    "materialized_view",
    "sequence",
    "column",
    "default",
    "inheritance",
    "constraint",
    "index",
    "statistics",
    "trigger",
    "rule",
    "policy",
    "row_security",
    "event_trigger",
    "publication",
    "default_privileges",
    "comment",
    PRIVILEGE,
    DEFINITION,
    ROLE_ATTRIBUTE,
    ROLE_PASSWORD,
];

/// Extensions with their versions: a newer one serves as well.
pub(super) const EXTENSION_VERSION: &str = "extension_version";

/// Names of one kind, all together.
const NAMES_BYTES_MAX: usize = 100_000;

/// Hashes of names of one kind.
const HASHES_MAX: usize = 50_000;

/// A definition is not worth waiting for whoever has locked what it is made of.
const LOCK_WITHIN: &str = "SET lock_timeout = '200ms'";

/// What the queries below begin with: schemas, extensions' own objects and relations.
const OWN: &str = "
    WITH own AS (
        SELECT oid, nspname::text AS schema, nspacl AS acl, nspowner AS owner FROM pg_catalog.pg_namespace
         WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'dr_agent')),
    extension AS (
        SELECT classid, objid FROM pg_catalog.pg_depend
         WHERE deptype = 'e' AND refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass),
    relation AS (
        SELECT c.oid, c.relkind, c.relrowsecurity, own.schema || '.' || c.relname AS name, c.relacl AS acl, c.relowner AS owner
          FROM pg_catalog.pg_class c JOIN own ON own.oid = c.relnamespace
         WHERE c.relpersistence <> 't'
           AND NOT EXISTS (SELECT FROM extension e
                            WHERE (e.classid, e.objid) = ('pg_catalog.pg_class'::pg_catalog.regclass, c.oid))),
    function AS (
        SELECT p.oid, own.schema || '.' || p.proname || '(' || pg_catalog.oidvectortypes(p.proargtypes) || ')' AS name,
               p.proacl AS acl, p.proowner AS owner
          FROM pg_catalog.pg_proc p JOIN own ON own.oid = p.pronamespace
         WHERE NOT EXISTS (SELECT FROM extension e
                            WHERE (e.classid, e.objid) = ('pg_catalog.pg_proc'::pg_catalog.regclass, p.oid))
           -- A range type brings its constructors along, one more of them in later versions.
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                            WHERE (d.classid, d.objid, d.deptype) = ('pg_catalog.pg_proc'::pg_catalog.regclass, p.oid, 'i'))),
    type AS (
        SELECT t.oid, own.schema || '.' || t.typname AS name, t.typacl AS acl, t.typowner AS owner
          FROM pg_catalog.pg_type t JOIN own ON own.oid = t.typnamespace
         WHERE (t.typtype IN ('e', 'd', 'r') OR t.typtype = 'b' AND t.typarray <> 0
                OR t.typtype = 'c' AND EXISTS (SELECT FROM relation r WHERE r.oid = t.typrelid AND r.relkind = 'c'))
           AND NOT EXISTS (SELECT FROM extension e
                            WHERE (e.classid, e.objid) = ('pg_catalog.pg_type'::pg_catalog.regclass, t.oid)))";

/// `kind, name` of relations and of what belongs to them, which is named after them.
const OF_RELATIONS: &str = "
    SELECT CASE relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned_table' WHEN 'f' THEN 'foreign_table'
                        WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized_view' ELSE 'sequence' END, name
      FROM relation WHERE relkind IN ('r', 'p', 'f', 'v', 'm', 'S')
    UNION ALL
    SELECT 'column', r.name || '.' || a.attname FROM relation r
      JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
     WHERE r.relkind IN ('r', 'p', 'f') AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT 'default', r.name || '.' || a.attname FROM relation r
      JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid
     WHERE a.attnum > 0 AND NOT a.attisdropped AND (a.atthasdef OR a.attidentity <> '')
    UNION ALL
    SELECT 'inheritance', r.name || ' of ' || of.name FROM relation r
      JOIN pg_catalog.pg_inherits i ON i.inhrelid = r.oid JOIN relation of ON of.oid = i.inhparent
     WHERE r.relkind IN ('r', 'p', 'f')
    UNION ALL
    -- Not those that a partition has of its parent: how many there are depends on the version.
    SELECT 'constraint', r.name || '.' || c.conname FROM relation r
      JOIN pg_catalog.pg_constraint c ON c.conrelid = r.oid
     WHERE c.contype IN ('c', 'f', 'p', 'u', 'x') AND c.conparentid = 0
    UNION ALL
    SELECT 'constraint', t.name || '.' || c.conname FROM type t
      JOIN pg_catalog.pg_constraint c ON c.contypid = t.oid WHERE c.contype = 'c'
    UNION ALL
    SELECT 'index', r.name || '.' || i.relname FROM relation r
      JOIN pg_catalog.pg_index x ON x.indrelid = r.oid
      JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
    UNION ALL
    SELECT 'statistics', r.name || '.' || s.stxname FROM relation r
      JOIN pg_catalog.pg_statistic_ext s ON s.stxrelid = r.oid
    UNION ALL
    SELECT 'trigger', r.name || '.' || t.tgname FROM relation r
      JOIN pg_catalog.pg_trigger t ON t.tgrelid = r.oid WHERE NOT t.tgisinternal AND t.tgparentid = 0
    UNION ALL
    SELECT 'rule', r.name || '.' || w.rulename FROM relation r
      JOIN pg_catalog.pg_rewrite w ON w.ev_class = r.oid WHERE w.rulename <> '_RETURN'
    UNION ALL
    SELECT 'policy', r.name || '.' || p.polname FROM relation r
      JOIN pg_catalog.pg_policy p ON p.polrelid = r.oid
    UNION ALL
    SELECT 'row_security', r.name FROM relation r WHERE r.relrowsecurity
    UNION ALL
    SELECT 'comment', r.name || coalesce('.' || a.attname, '') FROM relation r
      JOIN pg_catalog.pg_description d ON (d.classoid, d.objoid) = ('pg_catalog.pg_class'::pg_catalog.regclass, r.oid)
      LEFT JOIN pg_catalog.pg_attribute a ON (a.attrelid, a.attnum) = (d.objoid, d.objsubid) AND d.objsubid <> 0
     WHERE r.relkind IN ('r', 'p', 'f', 'v', 'm', 'S')";

/// `kind, name` of what belongs to no relation.
const OF_DATABASE: &str = "
    SELECT 'function', name FROM function
    UNION ALL
    SELECT 'type', name FROM type
    UNION ALL
    SELECT 'schema', own.schema FROM own
     WHERE NOT EXISTS (SELECT FROM extension e
                        WHERE (e.classid, e.objid) = ('pg_catalog.pg_namespace'::pg_catalog.regclass, own.oid))
    UNION ALL
    SELECT 'extension', extname FROM pg_catalog.pg_extension
    UNION ALL
    SELECT 'extension_version', extname || ' ' || extversion FROM pg_catalog.pg_extension
    UNION ALL
    SELECT 'comment', 'function ' || f.name FROM function f
      JOIN pg_catalog.pg_description d ON (d.classoid, d.objoid) = ('pg_catalog.pg_proc'::pg_catalog.regclass, f.oid)
    UNION ALL
    SELECT 'comment', 'type ' || t.name FROM type t
      JOIN pg_catalog.pg_description d ON (d.classoid, d.objoid) = ('pg_catalog.pg_type'::pg_catalog.regclass, t.oid)
    UNION ALL
    SELECT 'user_mapping', srvname || ' for ' || coalesce(usename, 'public') FROM pg_catalog.pg_user_mappings
    UNION ALL
    SELECT 'default_privileges', pg_catalog.pg_get_userbyid(defaclrole) || coalesce(' in ' || n.nspname, '')
           || CASE defaclobjtype WHEN 'r' THEN ' on tables' WHEN 'S' THEN ' on sequences' WHEN 'f' THEN ' on functions'
                                 WHEN 'T' THEN ' on types' WHEN 'n' THEN ' on schemas' ELSE ' on ' || defaclobjtype::text END
      FROM pg_catalog.pg_default_acl d LEFT JOIN pg_catalog.pg_namespace n ON n.oid = d.defaclnamespace";

/// The catalogs whose rows have a name in a schema: kind, catalog, prefix of its columns, what stands behind the name.
const IN_SCHEMAS: [(&str, &str, &str, &str); 9] = [
    ("collation", "pg_collation", "coll", "''"),
    ("conversion", "pg_conversion", "con", "''"),
    ("text_search_parser", "pg_ts_parser", "prs", "''"),
    ("text_search_template", "pg_ts_template", "tmpl", "''"),
    ("text_search_dictionary", "pg_ts_dict", "dict", "''"),
    ("text_search_configuration", "pg_ts_config", "cfg", "''"),
    ("operator_class", "pg_opclass", "opc", AM_OF_CLASS),
    ("operator_family", "pg_opfamily", "opf", AM_OF_FAMILY),
    ("operator", "pg_operator", "opr", OPERANDS),
];
const AM_OF_CLASS: &str =
    "coalesce((SELECT ' using ' || amname FROM pg_catalog.pg_am a WHERE a.oid = x.opcmethod), '')";
const AM_OF_FAMILY: &str =
    "coalesce((SELECT ' using ' || amname FROM pg_catalog.pg_am a WHERE a.oid = x.opfmethod), '')";
const OPERANDS: &str =
    "'(' || CASE x.oprleft WHEN 0 THEN 'none' ELSE pg_catalog.format_type(x.oprleft, NULL) END
                                || ', ' || pg_catalog.format_type(x.oprright, NULL) || ')'";

/// The catalogs whose rows have a name of the whole database, or none: kind, catalog, name. Those of PostgreSQL itself have low OIDs.
const OUTSIDE_SCHEMAS: [(&str, &str, &str); 7] = [
    ("language", "pg_language", "x.lanname"),
    ("access_method", "pg_am", "x.amname"),
    (
        "foreign_data_wrapper",
        "pg_foreign_data_wrapper",
        "x.fdwname",
    ),
    ("foreign_server", "pg_foreign_server", "x.srvname"),
    ("event_trigger", "pg_event_trigger", "x.evtname"),
    (
        "cast",
        "pg_cast",
        "pg_catalog.format_type(x.castsource, NULL) || ' as ' || pg_catalog.format_type(x.casttarget, NULL)",
    ),
    (
        "transform",
        "pg_transform",
        "pg_catalog.format_type(x.trftype, NULL) || ' for ' || (SELECT lanname FROM pg_catalog.pg_language l WHERE l.oid = x.trflang)",
    ),
];

/// What is read of one side.
struct Of {
    /// The roles that count.
    counted: &'static str,
    /// Whose privileges count.
    grantees: &'static str,
    publications: &'static str,
}

/// Of the source: the roles that the database depends on, with their members and groups, but for the agent's own and the one that
/// every server has; and publications, but for this stream's.
const SOURCE: Of = Of {
    counted: "
        SELECT r.oid FROM pg_catalog.pg_roles r
         WHERE r.rolname !~ '^(pg|rds)_' AND r.rolname <> current_user AND r.oid <> 10 AND r.oid IN (
            WITH RECURSIVE here AS (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()),
            needed (oid) AS (
                SELECT d.refobjid FROM pg_catalog.pg_shdepend d, here
                 WHERE d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
                   AND (d.dbid = here.oid OR d.classid = 'pg_catalog.pg_database'::pg_catalog.regclass AND d.objid = here.oid)
                UNION SELECT CASE WHEN m.member = n.oid THEN m.roleid ELSE m.member END
                        FROM needed n JOIN pg_catalog.pg_auth_members m ON n.oid IN (m.member, m.roleid)
                       WHERE m.roleid >= 16384 AND m.member <> current_user::pg_catalog.regrole)
            SELECT oid FROM needed)",
    grantees: definitions::COUNTS_ON_SOURCE,
    publications: "pubname <> $2",
};

/// The same, of the replica: all there are.
const REPLICA: Of = Of {
    counted: "SELECT oid FROM pg_catalog.pg_roles",
    grantees: definitions::COUNTS_ON_REPLICA,
    publications: "true",
};

/// What is asked for beside names.
#[derive(Clone, Copy, Debug)]
struct AskedBeside {
    /// Who may do what.
    privileges: bool,
    /// What costs most, and may wait for locks.
    definitions: bool,
    /// Which roles have a password, for who may read it.
    passwords: bool,
}

/// `kind, name` of everything that is the users' own.
fn objects(of: &Of, beside: AskedBeside) -> String {
    let counted = "r.oid IN (SELECT oid FROM counted)";
    let mut of_side = vec![
        format!("SELECT 'role', r.rolname::text FROM pg_catalog.pg_roles r WHERE {counted}"),
        format!(
            "SELECT 'publication', pubname FROM pg_catalog.pg_publication WHERE {}",
            of.publications
        ),
        definitions::OF_SERVER.to_owned(),
        definitions::role_attributes(counted),
    ];
    if beside.privileges {
        of_side.push(definitions::privileges(of.grantees));
    }
    if beside.definitions {
        of_side.push(definitions::definitions());
    }
    if beside.passwords {
        of_side.push(definitions::role_passwords(counted));
    }
    let in_schemas = IN_SCHEMAS.iter().map(|(kind, catalog, prefix, behind)| {
        format!(
            "SELECT '{kind}', own.schema || '.' || x.{prefix}name || {behind}
               FROM pg_catalog.{catalog} x JOIN own ON own.oid = x.{prefix}namespace
              WHERE NOT EXISTS (SELECT FROM extension e
                                 WHERE (e.classid, e.objid) = ('pg_catalog.{catalog}'::pg_catalog.regclass, x.oid))"
        )
    });
    let outside = OUTSIDE_SCHEMAS.iter().map(|(kind, catalog, name)| {
        format!(
            "SELECT '{kind}', {name} FROM pg_catalog.{catalog} x
              WHERE x.oid >= 16384 AND {name} NOT LIKE 'dr\\_agent\\_%'
                AND NOT EXISTS (SELECT FROM extension e
                                 WHERE (e.classid, e.objid) = ('pg_catalog.{catalog}'::pg_catalog.regclass, x.oid))"
        )
    });
    let parts: Vec<String> = [OF_RELATIONS, OF_DATABASE]
        .into_iter()
        .map(str::to_owned)
        .chain(of_side)
        .chain(in_schemas)
        .chain(outside)
        .collect();
    format!(
        "{OWN},\n    counted AS ({})\n{}",
        of.counted,
        parts.join("\nUNION ALL\n")
    )
}

/// A JSON list of names; hashes of them where they are too long together, or where `hashed` says so; or nothing.
fn by_kind(of: &Of, beside: AskedBeside, hashed: &str) -> String {
    format!(
        "SELECT k.kind, count(o.name)::bigint AS objects,
                CASE WHEN coalesce(sum(length(o.name)), 0) <= {NAMES_BYTES_MAX} AND NOT ({hashed})
                     THEN coalesce(json_agg(o.name ORDER BY o.name COLLATE \"C\") FILTER (WHERE o.name IS NOT NULL), '[]')::text
                     WHEN count(o.name) <= {HASHES_MAX}
                     THEN '{HASHED}' || coalesce(string_agg(left(md5(o.name), {HASH_CHARS}), '' ORDER BY o.name COLLATE \"C\"), '')
                     ELSE '' END AS names
           FROM unnest($1::text[]) AS k (kind) LEFT JOIN ({}) AS o (kind, name) USING (kind)
          GROUP BY k.kind",
        objects(of, beside)
    )
}

/// The kinds that are asked for; a kind that is not is left as it was told before.
fn kinds(beside: AskedBeside) -> Vec<&'static str> {
    let kinds = KINDS.into_iter().filter(|kind| match *kind {
        PRIVILEGE => beside.privileges,
        DEFINITION => beside.definitions,
        ROLE_PASSWORD => beside.passwords,
        _ => true,
    });
    kinds.chain([SERVER_VERSION]).collect()
}

/// Passwords are read by superusers only.
async fn reads_passwords(client: &Client) -> Result<bool, PgError> {
    const SQL: &str = "SELECT pg_catalog.has_table_privilege('pg_catalog.pg_authid', 'SELECT')";
    Ok(client.query_one(SQL, &[]).await?.get(0))
}

/// Asks with definitions, if they are wanted and can be had at once, and otherwise without. `$1` are the kinds; `rest` is what
/// else the statement needs.
async fn ask(
    client: &Client,
    (privileges, definitions): (bool, bool),
    statement: fn(AskedBeside) -> String,
    rest: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, PgError> {
    let mut beside = AskedBeside {
        privileges,
        definitions,
        passwords: reads_passwords(client).await?,
    };
    if definitions {
        client.batch_execute(LOCK_WITHIN).await?;
        let asked = ask_once(client, beside, statement, rest).await;
        client.batch_execute("RESET lock_timeout").await?;
        match asked {
            Err(error) if error.sqlstate().is_some_and(|code| NOT_NOW.contains(&code)) => {
                tracing::debug!(%error, "definitions are not compared this time");
            }
            asked => return asked,
        }
    }
    beside.definitions = false;
    ask_once(client, beside, statement, rest).await
}

async fn ask_once(
    client: &Client,
    beside: AskedBeside,
    statement: fn(AskedBeside) -> String,
    rest: &[&(dyn ToSql + Sync)],
) -> Result<Vec<Row>, PgError> {
    let kinds = kinds(beside);
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&kinds];
    parameters.extend(rest);
    Ok(client.query(&statement(beside), &parameters).await?)
}

/// Somebody has locked something, or the statement took too long.
const NOT_NOW: [&str; 2] = ["55P03", "57014"];

/// Brings the source's rows of `dr_agent.coverage` up to date; what is as it was is not written. `definitions`: those and privileges as
/// well.
pub async fn tell(
    client: &Client,
    stream: &StreamName,
    unprotected: &[Unprotected],
    definitions: bool,
) -> Result<(), PgError> {
    let has = |beside| coverage::writing(&by_kind(&SOURCE, beside, "false"));
    let beside = (definitions, definitions);
    ask(client, beside, has, &[&stream.as_str()]).await?;
    let unprotected: Vec<(&str, u64, String)> = unprotected
        .iter()
        .map(|one| {
            let names = serde_json::Value::from(one.examples.clone());
            (one.kind, one.count, names.to_string())
        })
        .collect();
    coverage::write_unprotected(client, stream, &unprotected).await?;
    Ok(())
}

/// What the source told last, as far as it has arrived, and what the database has that this client is connected to; nothing of an
/// agent that did not tell. The names of a kind that both have alike are left out.
pub(super) async fn told_and_here(
    client: &Client,
    stream: &StreamName,
) -> Result<(Vec<Told>, Vec<Told>), PgError> {
    let mut told = coverage::read_without_names(client, stream, &["role", SERVER_VERSION]).await?;
    if told.is_empty() {
        return Ok((told, Vec::new()));
    }
    let names_of = |kind: &str| {
        let mut of = told
            .iter()
            .filter(|told| told.protected && told.kind == kind);
        of.next().and_then(|told| told.names.clone())
    };
    const VERSION: &str =
        "SELECT (pg_catalog.current_setting('server_version_num')::int / 10000)::text";
    let version: String = client.query_one(VERSION, &[]).await?.get(0);
    let is_same_version = names_of(SERVER_VERSION).is_some_and(|told| told == [version]);
    let roles = names_of("role").unwrap_or_default();
    let hashed: Vec<&str> = told
        .iter()
        .filter(|told| told.protected && told.hashed)
        .map(|told| told.kind.as_str())
        .collect();
    let unlike = |beside| coverage::unlike(&by_kind(&REPLICA, beside, "k.kind = ANY ($3)"));
    let stream_name = stream.as_str();
    let rest: [&(dyn ToSql + Sync); 3] = [&roles, &hashed, &stream_name];
    let rows = ask(client, (true, is_same_version), unlike, &rest).await?;
    let here: Vec<Told> = rows.iter().map(coverage::counted).collect();
    let differ = rows
        .iter()
        .zip(&here)
        .filter(|(row, _)| row.get::<_, Option<&str>>(2).is_some());
    let differ: Vec<&str> = differ.map(|(_, here)| here.kind.as_str()).collect();
    let named = coverage::read_names(client, stream, &differ).await?;
    told.retain(|told| !told.protected || !differ.contains(&told.kind.as_str()));
    for told in told.iter_mut().filter(|told| told.protected) {
        // Both have the same.
        told.names = Some(Vec::new());
    }
    told.extend(named);
    Ok((told, here))
}
