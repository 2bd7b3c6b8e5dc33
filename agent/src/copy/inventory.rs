//! What the two servers have and have not: the questions the schema's restore asks their catalogs.
//!
//! Only reads. The answers are compared here, so that [`super::schema`] only acts.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, Row};

use super::error::CopyError;
use super::roles::LackingRoles;
use super::toc::Entry;
use crate::names::TableName;
use crate::pg::{Again, PgError};

fn table(row: &Row, schema: usize) -> TableName {
    TableName {
        schema: row.get(schema),
        name: row.get(schema + 1),
    }
}

/// `tables`, preceded by the partitioned tables above them.
pub(super) async fn with_ancestors(
    source: &Client,
    tables: Vec<TableName>,
) -> Result<Vec<TableName>, CopyError> {
    const SQL: &str = "
        SELECT DISTINCT an.nspname::text, a.relname::text
          FROM unnest($1::text[], $2::text[]) AS wanted (s, n)
          JOIN pg_namespace n ON n.nspname = wanted.s
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = wanted.n
         CROSS JOIN LATERAL pg_partition_ancestors(c.oid) AS up (relid)
          JOIN pg_class a ON a.oid = up.relid AND a.oid <> c.oid
          JOIN pg_namespace an ON an.oid = a.relnamespace";
    let (schemas, names) = TableName::arrays(&tables);
    let rows = source
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(CopyError::source("read the partitioned tables"))?;
    let mut all: Vec<TableName> = rows.iter().map(|row| table(row, 0)).collect();
    all.extend(tables);
    Ok(all)
}

/// Those of `tables` that the replica has not.
pub(crate) async fn missing_on(
    replica: &Client,
    tables: &[TableName],
) -> Result<Vec<TableName>, CopyError> {
    const SQL: &str = "
        SELECT s, t FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
         WHERE NOT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                            WHERE n.nspname = s AND c.relname = t AND c.relkind IN ('r', 'p'))";
    let (schemas, names) = TableName::arrays(tables);
    let rows = replica
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(CopyError::replica("look for the tables"))?;
    Ok(rows.iter().map(|row| table(row, 0)).collect())
}

/// Sequences of the source that the replica has not and that come with no table of theirs: those that columns of `tables` call by
/// default, whoever's they are, and those that are nobody's, which a function may call.
pub(super) async fn lacking_sequences(
    source: &Client,
    replica: &Client,
    tables: &[TableName],
) -> Result<Vec<TableName>, CopyError> {
    const SQL: &str = "
        WITH called AS (
            SELECT d.refobjid AS oid
              FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
              JOIN pg_namespace n ON n.nspname = s
              JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t
              JOIN pg_attrdef a ON a.adrelid = c.oid
              JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid
                              AND d.refclassid = 'pg_class'::regclass)
        SELECT n.nspname::text, s.relname::text, s.oid IN (SELECT oid FROM called)
          FROM pg_class s JOIN pg_namespace n ON n.oid = s.relnamespace
         WHERE s.relkind = 'S' AND s.relpersistence <> 't' AND n.nspname <> 'dr_agent' AND n.nspname NOT LIKE 'pg\\_%'
           AND NOT EXISTS (SELECT 1 FROM pg_depend d
                            WHERE d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype = 'e')
           AND (s.oid IN (SELECT oid FROM called)
                OR has_sequence_privilege(s.oid, 'SELECT')
                   AND NOT EXISTS (SELECT 1 FROM pg_depend d
                                    WHERE d.classid = 'pg_class'::regclass AND d.objid = s.oid AND d.deptype IN ('a', 'i')))";
    // What a table of the list owns comes with it.
    const OWNED: &str = "
        SELECT n.nspname::text, s.relname::text
          FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
          JOIN pg_namespace tn ON tn.nspname = wanted.s
          JOIN pg_class c ON c.relnamespace = tn.oid AND c.relname = wanted.t
          JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = c.oid
                          AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
          JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
          JOIN pg_namespace n ON n.oid = s.relnamespace";
    const FREE: &str = "
        SELECT s, t, c.relkind IS NOT DISTINCT FROM 'S', c.oid IS NULL
          FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
          LEFT JOIN pg_namespace n ON n.nspname = s
          LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t";
    let (schemas, names) = TableName::arrays(tables);
    let doing = || CopyError::source("read the sequences");
    let owned = source.query(OWNED, &[&schemas, &names]).await;
    let owned: HashSet<TableName> = owned
        .map_err(doing())?
        .iter()
        .map(|row| table(row, 0))
        .collect();
    let found = source.query(SQL, &[&schemas, &names]).await;
    let mut found: Vec<(TableName, bool)> = found
        .map_err(doing())?
        .iter()
        .map(|row| (table(row, 0), row.get(2)))
        .collect();
    found.retain(|(name, _)| !owned.contains(name));
    let wanted: Vec<TableName> = found.iter().map(|(name, _)| name.clone()).collect();
    let (schemas, names) = TableName::arrays(&wanted);
    let there = replica.query(FREE, &[&schemas, &names]).await;
    let there = there.map_err(CopyError::replica("look for the sequences"))?;
    let called: HashSet<&TableName> = found
        .iter()
        .filter(|(_, called)| *called)
        .map(|(name, _)| name)
        .collect();
    // Where something else has the name of one that nobody calls, it is not this table's trouble.
    let lacks = |row: &&Row| {
        let (is_there, is_free): (bool, bool) = (row.get(2), row.get(3));
        !is_there && (is_free || called.contains(&table(row, 0)))
    };
    Ok(there
        .iter()
        .filter(lacks)
        .map(|row| table(row, 0))
        .collect())
}

/// The source's extensions.
pub(crate) async fn extensions(source: &Client) -> Result<Vec<String>, CopyError> {
    Ok(source
        .query("SELECT extname::text FROM pg_extension ORDER BY 1", &[])
        .await
        .map_err(CopyError::source("read the extensions"))?
        .iter()
        .map(|row| row.get(0))
        .collect())
}

/// The owners of the source's extensions.
pub(crate) async fn extension_owners(
    source: &Client,
) -> Result<BTreeMap<String, String>, CopyError> {
    const OWNERS: &str = "SELECT extname::text, pg_get_userbyid(extowner)::text FROM pg_extension";
    let rows = source.query(OWNERS, &[]).await;
    let rows = rows.map_err(CopyError::source("read the extensions"))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Refuses when only a superuser could create what the source uses, and ours is none.
pub(crate) async fn check_untrusted(replica: &Client, used: &[String]) -> Result<(), CopyError> {
    const UNTRUSTED: &str = "
        SELECT DISTINCT v.name::text FROM pg_available_extension_versions v
         WHERE v.name = ANY ($1::text[]) AND v.superuser AND NOT v.trusted
           AND NOT EXISTS (SELECT FROM pg_extension e WHERE e.extname = v.name)
           AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
           AND NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_superuser') ORDER BY 1";
    let rows = replica.query(UNTRUSTED, &[&used]).await;
    let rows = rows.map_err(CopyError::replica("read the extensions"))?;
    match rows.is_empty() {
        true => Ok(()),
        false => Err(CopyError::ExtensionsUntrusted {
            names: rows.iter().map(|row| row.get(0)).collect(),
        }),
    }
}

/// Refuses when the source uses extensions that the replica's server cannot create.
pub(crate) async fn check_extensions(replica: &Client, used: &[String]) -> Result<(), CopyError> {
    const MISSING: &str = "
        SELECT used FROM unnest($1::text[]) AS used
         WHERE used NOT IN (SELECT name FROM pg_available_extensions)
           AND used NOT IN (SELECT extname FROM pg_extension)";
    let names: Vec<String> = replica
        .query(MISSING, &[&used])
        .await
        .map_err(CopyError::replica("read the extensions"))?
        .iter()
        .map(|row| row.get(0))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(CopyError::ExtensionsMissing { names })
}

/// The roles that own or may use something in the source's database; some of them nothing that is dumped
/// ([`super::roles`] looks at that).
pub(crate) async fn roles(source: &Client) -> Result<Vec<String>, CopyError> {
    // The role that owns the system (10) is in no dependency; its objects must change hands too.
    const USED: &str = "
        SELECT DISTINCT r.rolname::text
          FROM pg_shdepend d
          JOIN pg_roles r ON r.oid = d.refobjid
         CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) AS o
         WHERE d.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND d.refclassid = 'pg_authid'::regclass
           AND o.schema IS DISTINCT FROM 'dr_agent'
           AND NOT (o.type = 'schema' AND o.name = 'dr_agent')
        UNION SELECT rolname::text FROM pg_roles WHERE oid = 10";
    Ok(source
        .query(USED, &[])
        .await
        .map_err(CopyError::source("read the owners"))?
        .iter()
        .map(|row| row.get(0))
        .collect())
}

/// Those of these roles that the replica has not, or in whose name ours may not act there.
pub(crate) async fn lacking_roles(
    replica: &Client,
    used: &[String],
) -> Result<LackingRoles, CopyError> {
    const FOUND: &str = "
        SELECT used, r.oid IS NULL,
               r.oid IS NOT NULL AND pg_has_role(current_user, r.oid, 'MEMBER')
               AND (pg_has_role(current_user, r.oid, 'USAGE')
                    OR current_setting('server_version_num')::int < 160000),
               NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
          FROM unnest($1::text[]) AS used LEFT JOIN pg_roles r ON r.rolname = used ORDER BY 1";
    let rows = replica
        .query(FOUND, &[&used])
        .await
        .map_err(CopyError::replica("read the roles"))?;
    let mut lacking = LackingRoles::default();
    for row in &rows {
        lacking.restricted = row.get(3);
        match (row.get(1), row.get(2)) {
            (true, _) => lacking.absent.insert(row.get(0)),
            (false, false) => lacking.foreign.insert(row.get(0)),
            (false, true) => false,
        };
    }
    Ok(lacking)
}

/// A partition that the replica has as a table of its own.
#[derive(Clone, Debug)]
pub(super) struct Attachment {
    pub(super) parent: TableName,
    pub(super) child: TableName,
    /// `FOR VALUES …` or `DEFAULT`.
    pub(super) bound: String,
}

/// Those of `tables` that are partitions on the source and not yet on the replica.
pub(super) async fn unattached(
    source: &Client,
    replica: &Client,
    tables: &[TableName],
) -> Result<Vec<Attachment>, CopyError> {
    const PARTITIONS: &str = "
        SELECT pn.nspname::text, p.relname::text, n.nspname::text, c.relname::text,
               pg_get_expr(c.relpartbound, c.oid)
          FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
          JOIN pg_namespace n ON n.nspname = s
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t AND c.relispartition
          JOIN pg_inherits i ON i.inhrelid = c.oid
          JOIN pg_class p ON p.oid = i.inhparent
          JOIN pg_namespace pn ON pn.oid = p.relnamespace";
    let (schemas, names) = TableName::arrays(tables);
    let wanted = source
        .query(PARTITIONS, &[&schemas, &names])
        .await
        .map_err(CopyError::source("read the partitions"))?;
    let attached: HashSet<TableName> = replica
        .query(PARTITIONS, &[&schemas, &names])
        .await
        .map_err(CopyError::replica("read the partitions"))?
        .iter()
        .map(|row| table(row, 2))
        .collect();
    Ok(wanted
        .iter()
        .map(|row| Attachment {
            parent: table(row, 0),
            child: table(row, 2),
            bound: row.get(4),
        })
        .filter(|attachment| !attached.contains(&attachment.child))
        .collect())
}

/// The archive's entries that attach the indexes of these partitions.
pub(super) async fn index_attachments(
    source: &Client,
    attachments: &[Attachment],
) -> Result<Vec<Entry>, CopyError> {
    const SQL: &str = "
        SELECT xn.nspname::text, x.relname::text, pg_get_userbyid(c.relowner)::text,
               pg_get_userbyid(parent.relowner)::text
          FROM unnest($1::text[], $2::text[]) AS wanted (s, t)
          JOIN pg_namespace n ON n.nspname = s
          JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t
          JOIN pg_index i ON i.indrelid = c.oid
          JOIN pg_class x ON x.oid = i.indexrelid AND x.relispartition
          JOIN pg_namespace xn ON xn.oid = x.relnamespace
          JOIN pg_inherits xi ON xi.inhrelid = x.oid
          JOIN pg_class parent ON parent.oid = xi.inhparent";
    let children: Vec<TableName> = attachments.iter().map(|a| a.child.clone()).collect();
    let (schemas, names) = TableName::arrays(&children);
    let rows = source
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(CopyError::source("read the partitions' indexes"))?;
    // Releases differ in whether the entry has an owner, and whether it is the partition's or the
    // parent's.
    let entry = |row: &Row, owner: String| Entry {
        kind: "INDEX ATTACH".to_owned(),
        schema: row.get(0),
        tag: row.get(1),
        owner,
    };
    Ok(rows
        .iter()
        .flat_map(|row| {
            [
                entry(row, String::new()),
                entry(row, row.get(2)),
                entry(row, row.get(3)),
            ]
        })
        .collect())
}

/// Everything `post-data` creates that fails when it is there already, as the archive names it.
const POST_DATA: &str = "
    WITH t AS (
        SELECT c.oid, c.relname, n.nspname, pg_get_userbyid(c.relowner) AS owner
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%')
    SELECT 'INDEX', n.nspname::text, x.relname::text, t.owner::text
      FROM pg_index i JOIN t ON t.oid = i.indrelid JOIN pg_class x ON x.oid = i.indexrelid
      JOIN pg_namespace n ON n.oid = x.relnamespace
    UNION ALL
    SELECT CASE contype WHEN 'f' THEN 'FK CONSTRAINT' WHEN 'c' THEN 'CHECK CONSTRAINT'
                        ELSE 'CONSTRAINT' END, nspname, relname || ' ' || conname, owner
      FROM pg_constraint JOIN t ON t.oid = conrelid
    UNION ALL
    SELECT 'CHECK CONSTRAINT', n.nspname, typname || ' ' || conname, pg_get_userbyid(typowner)
      FROM pg_constraint JOIN pg_type d ON d.oid = contypid JOIN pg_namespace n ON n.oid = typnamespace
    UNION ALL
    SELECT 'TRIGGER', nspname, relname || ' ' || tgname, owner
      FROM pg_trigger JOIN t ON t.oid = tgrelid WHERE NOT tgisinternal
    UNION ALL
    SELECT 'RULE', nspname, relname || ' ' || rulename, owner
      FROM pg_rewrite JOIN t ON t.oid = ev_class WHERE rulename <> '_RETURN'
    UNION ALL
    SELECT 'POLICY', nspname, relname || ' ' || polname, owner
      FROM pg_policy JOIN t ON t.oid = polrelid
    UNION ALL
    SELECT 'STATISTICS', n.nspname, stxname, pg_get_userbyid(stxowner)
      FROM pg_statistic_ext JOIN pg_namespace n ON n.oid = stxnamespace
    UNION ALL
    SELECT 'EVENT TRIGGER', NULL, evtname, pg_get_userbyid(evtowner) FROM pg_event_trigger";

/// What tables may need that is none of them, as the archive names it.
const PRE_DATA: &str = "
    WITH s AS (
        SELECT oid, nspname FROM pg_namespace
         WHERE nspname <> 'information_schema' AND nspname NOT LIKE 'pg\\_%')
    SELECT CASE typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, s.nspname::text, typname::text,
           pg_get_userbyid(typowner)::text
      FROM pg_type JOIN s ON s.oid = typnamespace WHERE typtype IN ('b', 'c', 'd', 'e', 'r')
    UNION ALL
    SELECT CASE prokind WHEN 'a' THEN 'AGGREGATE' WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, s.nspname,
           proname || '(' || coalesce((SELECT string_agg(format_type(type, NULL), ', ' ORDER BY place)
                                         FROM unnest(proargtypes) WITH ORDINALITY AS a (type, place)), '') || ')',
           pg_get_userbyid(proowner)
      FROM pg_proc JOIN s ON s.oid = pronamespace
    UNION ALL
    SELECT 'COLLATION', s.nspname, collname, pg_get_userbyid(collowner)
      FROM pg_collation JOIN s ON s.oid = collnamespace
    UNION ALL
    SELECT 'SCHEMA', NULL, nspname, pg_get_userbyid(nspowner) FROM pg_namespace
    UNION ALL
    SELECT 'EXTENSION', NULL, extname, '' FROM pg_extension";

/// Entries of `pre-data` beside tables that the replica has already.
pub(super) async fn present_pre_data(
    source: &Client,
    replica: &Client,
) -> Result<Vec<Entry>, CopyError> {
    present(source, replica, PRE_DATA, "read types and functions").await
}

fn entry(row: &Row) -> Entry {
    Entry {
        kind: row.get(0),
        schema: row.get(1),
        tag: row.get(2),
        owner: row.get(3),
    }
}

/// Entries of `post-data` that the replica has already.
pub(super) async fn present_post_data(
    source: &Client,
    replica: &Client,
) -> Result<Vec<Entry>, CopyError> {
    present(source, replica, POST_DATA, "read indexes and constraints").await
}

/// What a query finds on both sides, as the source has it.
async fn present(
    source: &Client,
    replica: &Client,
    sql: &str,
    doing: &str,
) -> Result<Vec<Entry>, CopyError> {
    let there = replica
        .query(sql, &[])
        .await
        .map_err(CopyError::replica(doing))?;
    let there: Vec<Entry> = there.iter().map(entry).collect();
    let there: HashSet<_> = there.iter().map(Entry::key).collect();
    let rows = source
        .query(sql, &[])
        .await
        .map_err(CopyError::source(doing))?;
    let mut entries: Vec<Entry> = rows.iter().map(entry).collect();
    entries.retain(|entry| there.contains(&entry.key()));
    Ok(entries)
}

/// A foreign key of the source, as it was declared; not its copies on partitions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ForeignKey {
    /// How the archive names it.
    pub(crate) entry: Entry,
    /// The table that refers.
    pub(crate) table: TableName,
    /// The constraint's name.
    pub(crate) name: String,
    /// `FOREIGN KEY … REFERENCES …`
    pub(super) definition: String,
    /// What somebody has written on it.
    #[serde(default)]
    pub(super) comment: Option<String>,
    /// The tables referred to; several where the table is partitioned.
    pub(crate) refers_to: Vec<TableName>,
}

impl ForeignKey {
    /// Why it cannot be there when these tables alone have rows; `None` if it can.
    pub(crate) fn cannot_hold(&self, filled: &HashSet<TableName>) -> Option<String> {
        // It would find no rows: those it had, and those a promoted replica gets.
        let other = self
            .refers_to
            .iter()
            .find(|table| !filled.contains(table))?;
        Some(format!(
            "foreign key {} of {}: {other}, which it refers to, is not replicated",
            self.name, self.table
        ))
    }
}

/// All foreign keys of the source.
pub(crate) async fn foreign_keys(source: &Client) -> Result<Vec<ForeignKey>, CopyError> {
    const SQL: &str = "
        SELECT f.oid, n.nspname::text, c.relname::text, f.conname::text,
               pg_get_userbyid(c.relowner)::text, coalesce(pg_get_constraintdef(f.oid), ''),
               ln.nspname::text, l.relname::text, obj_description(f.oid, 'pg_constraint')
          FROM pg_constraint f
          JOIN pg_class c ON c.oid = f.conrelid
          JOIN pg_namespace n ON n.oid = c.relnamespace
          LEFT JOIN LATERAL pg_partition_tree(f.confrelid) AS leaf ON leaf.isleaf
          JOIN pg_class l ON l.oid = coalesce(leaf.relid, f.confrelid)
          JOIN pg_namespace ln ON ln.oid = l.relnamespace
         WHERE f.contype = 'f' AND f.conparentid = 0
         ORDER BY f.oid";
    let mut again = Again::default();
    let rows = loop {
        match source.query(SQL, &[]).await.map_err(PgError::from) {
            Ok(rows) => break rows,
            Err(error) if again.after(&error) => {}
            Err(source) => {
                let doing = "read the foreign keys".to_owned();
                return Err(CopyError::Source { doing, source });
            }
        }
    };
    let mut keys: Vec<(u32, ForeignKey)> = Vec::new();
    for row in &rows {
        let oid: u32 = row.get(0);
        if keys.last().is_none_or(|(last, _)| *last != oid) {
            let (table, name) = (table(row, 1), row.get::<_, String>(3));
            let entry = Entry {
                kind: "FK CONSTRAINT".to_owned(),
                schema: Some(table.schema.clone()),
                tag: format!("{} {name}", table.name),
                owner: row.get(4),
            };
            let key = ForeignKey {
                entry,
                table,
                name,
                definition: row.get(5),
                comment: row.get(8),
                refers_to: Vec::new(),
            };
            keys.push((oid, key));
        }
        if let Some((_, key)) = keys.last_mut() {
            key.refers_to.push(table(row, 6));
        }
    }
    Ok(keys.into_iter().map(|(_, key)| key).collect())
}

/// Event triggers of our own, which act on the source.
pub(crate) async fn own_event_triggers(source: &Client) -> Result<Vec<Entry>, CopyError> {
    const SQL: &str = "
        SELECT evtname::text, pg_get_userbyid(evtowner)::text
          FROM pg_event_trigger e
          JOIN pg_proc p ON p.oid = e.evtfoid JOIN pg_namespace n ON n.oid = p.pronamespace
         WHERE n.nspname = 'dr_agent'";
    Ok(source
        .query(SQL, &[])
        .await
        .map_err(CopyError::source("read the event triggers"))?
        .iter()
        .map(|row| Entry {
            kind: "EVENT TRIGGER".to_owned(),
            schema: None,
            tag: row.get(0),
            owner: row.get(1),
        })
        .collect())
}
