//! The shape of every table of one database, read the same way on both sides so that they compare.
//!
//! Reads catalogs only, in one statement per kind of object and not per table. The session's
//! `search_path` must be `pg_catalog`, so that type names are written alike on both sides.

use super::startable::Feature;
use std::collections::BTreeMap;

use tokio_postgres::{Client, Row};

use crate::names::TableName;
use crate::pg::{Again, PgError};

/// One table: what a row of it must look like and what may refuse it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TableShape {
    /// `pg_class.relkind`: `r` table, `p` partitioned, `f` foreign, `v` view, `m` materialized view.
    pub(super) kind: String,
    /// Belongs to an extension.
    pub(super) of_extension: bool,
    /// In the order of the table.
    pub(super) columns: Vec<ColumnShape>,
    /// Unique indexes and exclusion constraints.
    pub(super) uniques: Vec<Unique>,
    /// CHECK constraints, as `name: definition`.
    pub(super) checks: Vec<String>,
    /// Triggers and rules that fire under `session_replication_role = replica`.
    pub(super) firing: Vec<String>,
    /// Row-level security applies to our role.
    pub(super) row_security: bool,
    /// Our role may read it.
    pub(super) may_read: bool,
    /// Our role may insert, update and delete.
    pub(super) may_write: bool,
    /// Our role may truncate.
    pub(super) may_truncate: bool,
    /// Our role may act as its owner.
    pub(super) owned: bool,
}

/// One column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ColumnShape {
    /// Its name.
    pub(super) name: String,
    /// `format_type()`, qualified outside `pg_catalog`.
    pub(super) type_name: String,
    /// NOT NULL, or a domain that is.
    pub(super) not_null: bool,
    /// Has a default, is an identity, or its domain has a default.
    pub(super) has_default: bool,
    /// `GENERATED ALWAYS AS (…)`: never sent, never written.
    pub(super) generated: bool,
}

/// A unique index or an exclusion constraint, without its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unique {
    /// Its name, for messages only.
    pub(super) name: String,
    /// The primary key.
    pub(super) primary: bool,
    /// Whether it is valid; an invalid one still refuses rows.
    pub(super) valid: bool,
    /// Key columns and expressions, or the definition of the exclusion constraint.
    pub(super) keys: Vec<String>,
    /// The predicate of a partial index; empty without.
    pub(super) predicate: String,
    /// NULLS NOT DISTINCT.
    pub(super) nulls_equal: bool,
}

/// Tables, foreign tables and views by name, without the system's own.
pub(super) type Shapes = BTreeMap<TableName, TableShape>;

/// What all statements have in common: the user's tables and what could stand in their place. What is dropped while it is looked at has every right and no definition: the functions answer NULL.
const FROM: &str = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace";
const WHERE: &str = "c.relkind IN ('r', 'p', 'f', 'v', 'm') AND c.relpersistence <> 't'
    AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'";

/// Reads every shape of the database this client is connected to.
pub(super) async fn shapes(client: &Client) -> Result<Shapes, PgError> {
    let mut again = Again::default();
    loop {
        match read(client).await {
            Err(error) if again.after(&error) => {}
            shapes => return shapes,
        }
    }
}

async fn read(client: &Client) -> Result<Shapes, PgError> {
    let mut shapes = relations(client).await?;
    columns(client, &mut shapes).await?;
    uniques(client, &mut shapes).await?;
    checks(client, &mut shapes).await?;
    firing(client, &mut shapes).await?;
    Ok(shapes)
}

async fn relations(client: &Client) -> Result<Shapes, PgError> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text, c.relkind::text,
                c.relrowsecurity AND coalesce(row_security_active(c.oid), false),
                coalesce(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT'), true),
                coalesce(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'INSERT')
                    AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE'), true),
                pg_has_role(c.relowner, 'USAGE'),
                EXISTS (SELECT 1 FROM pg_depend d
                         WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                           AND d.deptype = 'e'),
                coalesce(has_table_privilege(c.oid, 'TRUNCATE'), true)
           FROM {FROM} WHERE {WHERE}"
    );
    let rows = client.query(&sql, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let shape = TableShape {
                kind: row.get(2),
                row_security: row.get(3),
                may_read: row.get(4),
                may_write: row.get(5),
                owned: row.get(6),
                of_extension: row.get(7),
                may_truncate: row.get(8),
                ..TableShape::default()
            };
            (name(row), shape)
        })
        .collect())
}

async fn columns(client: &Client, shapes: &mut Shapes) -> Result<(), PgError> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text, a.attname::text,
                format_type(a.atttypid, a.atttypmod), a.attnotnull OR t.typnotnull,
                a.atthasdef OR a.attidentity <> '' OR t.typdefault IS NOT NULL,
                a.attgenerated <> ''
           FROM {FROM}
           JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
           JOIN pg_type t ON t.oid = a.atttypid
          WHERE {WHERE} ORDER BY c.oid, a.attnum"
    );
    for row in client.query(&sql, &[]).await? {
        if let Some(shape) = shapes.get_mut(&name(&row)) {
            shape.columns.push(ColumnShape {
                name: row.get(2),
                type_name: row.get(3),
                not_null: row.get(4),
                has_default: row.get(5),
                generated: row.get(6),
            });
        }
    }
    Ok(())
}

async fn uniques(client: &Client, shapes: &mut Shapes) -> Result<(), PgError> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text, x.relname::text, i.indisprimary, i.indisvalid,
                CASE WHEN i.indisexclusion
                     THEN ARRAY(SELECT coalesce(pg_get_constraintdef(k.oid), '') FROM pg_constraint k
                                 WHERE k.conindid = i.indexrelid AND k.contype = 'x')
                     ELSE ARRAY(SELECT coalesce(pg_get_indexdef(i.indexrelid, k, true), '')
                                  FROM generate_series(1, i.indnkeyatts::int) k ORDER BY k) END,
                coalesce(pg_get_expr(i.indpred, i.indrelid), ''),
                coalesce((to_jsonb(i)->>'indnullsnotdistinct')::boolean, false)
           FROM {FROM}
           JOIN pg_index i ON i.indrelid = c.oid AND (i.indisunique OR i.indisexclusion)
           JOIN pg_class x ON x.oid = i.indexrelid
          WHERE {WHERE} ORDER BY c.oid, x.relname"
    );
    for row in client.query(&sql, &[]).await? {
        if let Some(shape) = shapes.get_mut(&name(&row)) {
            shape.uniques.push(Unique {
                name: row.get(2),
                primary: row.get(3),
                valid: row.get(4),
                keys: row.get(5),
                predicate: row.get(6),
                nulls_equal: row.get(7),
            });
        }
    }
    Ok(())
}

async fn checks(client: &Client, shapes: &mut Shapes) -> Result<(), PgError> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text,
                k.conname || ': ' || coalesce(pg_get_constraintdef(k.oid), '')
           FROM {FROM} JOIN pg_constraint k ON k.conrelid = c.oid AND k.contype = 'c'
          WHERE {WHERE} ORDER BY c.oid, k.conname"
    );
    for row in client.query(&sql, &[]).await? {
        if let Some(shape) = shapes.get_mut(&name(&row)) {
            shape.checks.push(row.get(2));
        }
    }
    Ok(())
}

/// `session_replication_role = replica` silences triggers and rules enabled in the ordinary way
/// (`O`), foreign keys among them; those enabled ALWAYS or REPLICA fire.
async fn firing(client: &Client, shapes: &mut Shapes) -> Result<(), PgError> {
    let sql = format!(
        "SELECT n.nspname::text, c.relname::text, 'trigger ' || t.tgname
           FROM {FROM} JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgenabled IN ('A', 'R')
          WHERE {WHERE}
         UNION ALL
         SELECT n.nspname::text, c.relname::text, 'rule ' || r.rulename
           FROM {FROM} JOIN pg_rewrite r ON r.ev_class = c.oid AND r.ev_enabled IN ('A', 'R')
          WHERE {WHERE} ORDER BY 1, 2, 3"
    );
    for row in client.query(&sql, &[]).await? {
        if let Some(shape) = shapes.get_mut(&name(&row)) {
            shape.firing.push(row.get(2));
        }
    }
    Ok(())
}

fn name(row: &Row) -> TableName {
    TableName::of(row)
}
/// What is there that not every supported version can have, by the version that brought it.
pub(super) async fn features(client: &Client) -> Result<Vec<Feature>, PgError> {
    // Columns that not every version has are read through jsonb, where a missing one is NULL.
    const SQL: &str = "
        WITH found(since, what, example) AS (
            SELECT 18, 'a virtual generated column', attrelid::regclass::text || '.' || attname
              FROM pg_attribute WHERE attgenerated = 'v' AND NOT attisdropped
            UNION ALL
            SELECT f.since, f.what, c.conname::text
              FROM pg_constraint c
             CROSS JOIN LATERAL (VALUES
                   (18, 'a constraint that is NOT ENFORCED', to_jsonb(c) ->> 'conenforced' = 'false'),
                   (18, 'a key WITHOUT OVERLAPS or with PERIOD', to_jsonb(c) ->> 'conperiod' = 'true'),
                   (18, 'a NOT NULL that is NOT VALID', c.contype = 'n' AND NOT c.convalidated),
                   (15, 'SET NULL or SET DEFAULT of some columns', to_jsonb(c) ->> 'confdelsetcols' IS NOT NULL)
             ) AS f(since, what, has) WHERE f.has
            UNION ALL
            SELECT 17, 'the privilege MAINTAIN', c.oid::regclass::text
              FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a
             WHERE a.privilege_type = 'MAINTAIN' AND a.grantee <> c.relowner
               AND c.relnamespace <> 'pg_catalog'::regnamespace
            UNION ALL
            SELECT 16, 'a collation with rules', collname::text
              FROM pg_collation c WHERE to_jsonb(c) ->> 'collicurules' IS NOT NULL
            UNION ALL
            SELECT 15, 'an index with NULLS NOT DISTINCT', indexrelid::regclass::text
              FROM pg_index i WHERE to_jsonb(i) ->> 'indnullsnotdistinct' = 'true'
            UNION ALL
            SELECT 15, 'a view with security_invoker', oid::regclass::text
              FROM pg_class WHERE relkind = 'v' AND reloptions::text LIKE '%security_invoker=%')
        SELECT since, what, min(example) FROM found GROUP BY 1, 2 ORDER BY 1 DESC, 2";
    let rows = client.query(SQL, &[]).await?;
    Ok(rows
        .iter()
        .map(|row| Feature {
            since: row.get(0),
            what: row.get(1),
            example: row.get(2),
        })
        .collect())
}

/// How many relations `pg_dump` locks, and how many the creation of the schema does, each in one transaction.
pub(super) async fn locked_relations(client: &Client) -> Result<(i64, i64), PgError> {
    const SQL: &str = "
        SELECT count(*) FILTER (WHERE relkind IN ('r', 'p')),
               count(*) FILTER (WHERE relkind IN ('r', 'p', 'S', 'v', 'm', 'f'))
               + 2 * count(*) FILTER (WHERE reltoastrelid <> 0)
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'";
    let row = client.query_one(SQL, &[]).await?;
    Ok((row.get(0), row.get(1)))
}
