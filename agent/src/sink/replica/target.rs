//! Targets: where each relation of the stream goes on the replica, column by column.
//!
//! Looked up once per description of a relation and kept for the session. Columns are matched by name;
//! their order may differ. Types are the replica's: it casts.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use futures_util::future::try_join_all;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::{SinkError, boxed};
use crate::catalog::{TableName, quote_ident};
use crate::net::{Key, KeyColumn, KeyOrder};
use crate::pg::binary;
use crate::pg::pgoutput::ReplicaIdentity;
use crate::plan::Spread;
use crate::txn::SourceRelation;

/// OIDs below this belong to PostgreSQL itself and mean the same on every server
/// (`FirstNormalObjectId` in `src/include/access/transam.h`).
const FIRST_NORMAL_OID: u32 = 16384;

/// A column of the relation on the replica.
#[derive(Clone, Debug)]
pub(super) struct TargetColumn {
    /// Quoted name.
    pub(super) name: String,
    /// The type for a cast, qualified, without length or precision.
    pub(super) type_sql: String,
    /// How values in binary form travel; `None` if they cannot.
    pub(super) native: Option<Native>,
    /// An enum: its binary form is its label, that is, text.
    pub(super) is_enum: bool,
    /// The replica computes it.
    pub(super) is_generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: can be inserted, but not updated.
    pub(super) is_identity_always: bool,
    /// The schema of the type's `=`, quoted; `None` if it has none that an index could use. Others (that
    /// of `box` compares areas) need not even find a value equal to itself.
    pub(super) equality_schema: Option<String>,
}

/// The array type that carries a column's values in binary form.
#[derive(Clone, Debug)]
pub(super) struct Native {
    /// The array type's name in SQL.
    pub(super) array_sql: String,
    /// The element type on the replica.
    pub(super) element_oid: u32,
    /// The element type is a domain of ours ([`boxed`]).
    pub(super) is_boxed: bool,
}

/// Where a relation goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The table.
    pub(super) table: TableName,
    /// By position in the relation.
    pub(super) columns: Vec<TargetColumn>,
    /// How rows are identified.
    pub(super) key: Key,
    /// How its rows may be spread over lanes.
    pub(super) spread: Spread,
}

impl Target {
    /// Positions of the columns that are sent to the replica.
    pub(super) fn written(&self) -> impl Iterator<Item = usize> {
        (0..self.columns.len()).filter(|position| !self.columns[*position].is_generated)
    }

    pub(super) fn is_key(&self, position: usize) -> bool {
        self.key
            .columns
            .iter()
            .any(|column| column.position == position)
    }
}

/// The targets of one session, by description.
#[derive(Debug, Default)]
pub(super) struct Targets {
    /// By address of the description, which the entry keeps alive.
    known: HashMap<usize, (Arc<SourceRelation>, Arc<Target>)>,
}

/// Identifies a description within a session.
pub(super) fn address(relation: &Arc<SourceRelation>) -> usize {
    Arc::as_ptr(relation).addr()
}

impl Targets {
    /// Descriptions kept at most: each spill file brings its own, and ALTER TABLE adds some.
    const KNOWN_MAX: usize = 10_000;

    /// The target of a relation that [`Targets::ensure`] has seen.
    pub(super) fn of(&self, relation: &Arc<SourceRelation>) -> &Arc<Target> {
        let (_, target) = self
            .known
            .get(&address(relation))
            .expect("ensure was called before");
        target
    }

    /// The targets of these relations alone, to go along with steps that need them.
    pub(super) fn of_each<'r>(
        &self,
        relations: impl Iterator<Item = &'r Arc<SourceRelation>>,
    ) -> Self {
        let known = relations
            .filter_map(|relation| {
                let known = self.known.get(&address(relation))?;
                Some((address(relation), known.clone()))
            })
            .collect();
        Self { known }
    }

    /// Forgets everything if too much is known.
    pub(super) fn trim(&mut self) -> bool {
        let trimmed = self.known.len() > Self::KNOWN_MAX;
        if trimmed {
            self.known.clear();
        }
        trimmed
    }

    /// Whether the relation is known.
    pub(super) fn has(&self, relation: &Arc<SourceRelation>) -> bool {
        self.known.contains_key(&address(relation))
    }

    /// Looks relations up on the replica, all at once.
    pub(super) async fn load(
        &mut self,
        client: &Client,
        relations: &[Arc<SourceRelation>],
    ) -> Result<(), SinkError> {
        let targets = relations.iter().map(|relation| load(client, relation));
        let targets = try_join_all(targets).await?;
        for (relation, target) in relations.iter().zip(targets) {
            let known = (Arc::clone(relation), Arc::new(target));
            self.known.insert(address(relation), known);
        }
        Ok(())
    }
}

struct ReplicaColumn {
    column: TargetColumn,
    base_oid: u32,
    in_primary_key: bool,
    /// Values that are equal are the same bytes.
    equal_is_identical: bool,
}

/// `$1` is the schema, `$2` the table. Domains are followed down to their base type.
static COLUMNS: LazyLock<String> = LazyLock::new(|| {
    COLUMNS_OF
        .replace("{travels}", &binary::travels("y"))
        .replace("{array}", &binary::array_travels("y"))
});

const COLUMNS_OF: &str = "
    WITH RECURSIVE t AS (
        SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')
    ), chain(attnum, type) AS (
        SELECT a.attnum, a.atttypid FROM pg_attribute a, t
         WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT chain.attnum, y.typbasetype FROM chain JOIN pg_type y ON y.oid = chain.type
         WHERE y.typtype = 'd'
    )
    SELECT a.attname::text, pg_catalog.format_type(a.atttypid, -1),
           a.attgenerated <> '', a.attidentity = 'a',
           y.oid, y.typtype = 'e',
           {travels} AND (y.typarray <> 0 OR y.typcategory = 'A'),
           pg_catalog.format_type(y.oid, -1) || '[]',
           (SELECT n.nspname::text
              FROM pg_opclass k
              JOIN pg_am m ON m.oid = k.opcmethod AND m.amname IN ('btree', 'hash')
              JOIN pg_amop e ON e.amopfamily = k.opcfamily AND e.amoplefttype = k.opcintype
                   AND e.amoprighttype = k.opcintype
                   AND e.amopstrategy = CASE m.amname WHEN 'btree' THEN 3 ELSE 1 END
              JOIN pg_operator o ON o.oid = e.amopopr
              JOIN pg_namespace n ON n.oid = o.oprnamespace
             WHERE k.opcdefault
               AND (k.opcintype = y.oid
                    OR k.opcintype = 'anyenum'::regtype AND y.typtype = 'e'
                    OR k.opcintype = 'anyarray'::regtype AND y.typcategory = 'A'
                    OR k.opcintype = 'anyrange'::regtype AND y.typtype = 'r'
                    OR k.opcintype = 'anymultirange'::regtype AND y.typtype = 'm'
                    OR k.opcintype = 'text'::regtype AND y.oid = 'varchar'::regtype)
             LIMIT 1),
           coalesce(a.attnum = ANY (i.indkey), false),
           y.typtype = 'e' OR y.oid IN ('bool'::regtype, 'bytea'::regtype,
               'name'::regtype, 'int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'oid'::regtype,
               'date'::regtype, 'time'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype,
               'uuid'::regtype, 'macaddr'::regtype)
               OR y.oid IN ('text'::regtype, 'varchar'::regtype)
                   AND coalesce(l.collisdeterministic, true),
           CASE WHEN {array} THEN (SELECT e.typname::text FROM pg_type e WHERE e.oid = y.typelem) END,
           CASE WHEN {array} THEN (
               SELECT d.oid FROM pg_type e
                 JOIN pg_type d ON d.typname = 'array_of_' || e.typname AND d.typtype = 'd' AND d.typbasetype = y.oid
                 JOIN pg_namespace n ON n.oid = d.typnamespace AND n.nspname = 'dr_agent'
                WHERE e.oid = y.typelem) END
      FROM chain
      JOIN pg_type y ON y.oid = chain.type AND y.typtype <> 'd'
      JOIN t ON true
      JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = chain.attnum
      LEFT JOIN pg_collation l ON l.oid = a.attcollation
      LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid
     ORDER BY a.attnum";

/// Unique and exclusion constraints of the table and its partitions, each as the sorted names of its
/// columns; `NULL` for one on an expression or on some of the rows. `$1` is the table.
const UNIQUE: &str = "
    SELECT CASE WHEN i.indexprs IS NULL AND i.indpred IS NULL AND NOT i.indisexclusion THEN
               (SELECT array_agg(a.attname::text ORDER BY a.attname::text)
                  FROM pg_attribute a
                 WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
           END
      FROM pg_index i
     WHERE (i.indisunique OR i.indisexclusion)
       AND i.indrelid IN (SELECT to_regclass($1)::oid
                          UNION SELECT relid FROM pg_partition_tree(to_regclass($1)))";

/// Rows of a table depend on one another beyond their key where another constraint compares them, and a
/// key only tells rows apart where equal values are the same bytes.
fn spread(unique: &[tokio_postgres::Row], key: &[(String, bool)]) -> Spread {
    if key.is_empty() || !key.iter().all(|(_, identical)| *identical) {
        return Spread::Table;
    }
    let mut names: Vec<&str> = key.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let only_the_key = unique.iter().all(|row| {
        row.get::<_, Option<Vec<&str>>>(0)
            .is_some_and(|unique| unique == names)
    });
    match only_the_key {
        true => Spread::Keys,
        false => Spread::Table,
    }
}

async fn load(client: &Client, relation: &SourceRelation) -> Result<Target, SinkError> {
    let table = TableName {
        schema: relation.schema().to_owned(),
        name: relation.relation.name.clone(),
    };
    // Together, and without preparing: over a long line each would be a round trip of its own.
    let sql = table.sql();
    let named: [(&(dyn ToSql + Sync), Type); 2] =
        [(&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
    let of_table: [(&(dyn ToSql + Sync), Type); 1] = [(&sql, Type::TEXT)];
    let (mut rows, unique) = tokio::try_join!(
        client.query_typed(&COLUMNS, &named),
        client.query_typed(UNIQUE, &of_table),
    )?;
    let missing = boxed::missing(&rows);
    if !missing.is_empty() {
        boxed::create(client, &missing).await?;
        rows = client.query_typed(&COLUMNS, &named).await?;
    }
    if rows.is_empty() && !exists(client, &table).await? {
        return Err(SinkError::TableMissing { table });
    }
    let mut on_replica: HashMap<String, ReplicaColumn> = rows
        .iter()
        .map(|row| (row.get(0), replica_column(row)))
        .collect();
    let primary_key = on_replica
        .values()
        .filter(|column| column.in_primary_key)
        .count();
    let full = relation.relation.identity == ReplicaIdentity::Full;
    let mut columns = Vec::new();
    let mut key = Key::default();
    let mut key_columns = Vec::new();
    for (position, sent) in relation.relation.columns.iter().enumerate() {
        let Some(mut found) = on_replica.remove(&sent.name) else {
            return Err(SinkError::ColumnMissing {
                table,
                column: sent.name.clone(),
            });
        };
        if sent.type_oid < FIRST_NORMAL_OID
            && found.base_oid < FIRST_NORMAL_OID
            && sent.type_oid != found.base_oid
        {
            // Another type on the replica, say a wider integer: text is cast, binary is not.
            found.column.native = None;
        }
        if if full {
            found.in_primary_key
        } else {
            sent.is_key
        } {
            let order = match found.base_oid {
                20 | 21 | 23 => KeyOrder::Integer,
                _ => KeyOrder::Bytes,
            };
            key.columns.push(KeyColumn { position, order });
            key_columns.push((sent.name.clone(), found.equal_is_identical));
        }
        columns.push(found.column);
    }
    if full && key.columns.len() != primary_key {
        key.columns.clear();
        key_columns.clear();
    }
    let spread = spread(&unique, &key_columns);
    Ok(Target {
        table,
        columns,
        key,
        spread,
    })
}

async fn exists(client: &Client, table: &TableName) -> Result<bool, SinkError> {
    let row = client
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&table.sql()])
        .await?;
    Ok(row.get(0))
}

fn replica_column(row: &tokio_postgres::Row) -> ReplicaColumn {
    let base_oid: u32 = row.get(4);
    // The rule by which `setup::form` decides for the stream; this catches what changed since.
    let travels: bool = row.get(6);
    ReplicaColumn {
        column: TargetColumn {
            name: quote_ident(row.get(0)),
            type_sql: row.get(1),
            is_enum: row.get(5),
            native: match boxed::of(row) {
                Some(native) => native,
                None => travels.then(|| Native {
                    array_sql: row.get(7),
                    element_oid: base_oid,
                    is_boxed: false,
                }),
            },
            is_generated: row.get(2),
            is_identity_always: row.get(3),
            equality_schema: row.get::<_, Option<&str>>(8).map(quote_ident),
        },
        base_oid,
        in_primary_key: row.get(9),
        equal_is_identical: row.get(10),
    }
}
