//! Targets: where each relation of the stream goes on the replica, column by column.
//!
//! Looked up once per description of a relation and kept for the session. Columns are matched by name;
//! their order may differ. Their types may not: [`super::unfit`] judges that.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use futures_util::future::try_join_all;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::unfit::{self, Misfit, ReplicaType, Unfit};
use super::{SinkError, Synced, boxed};
use crate::catalog::routing;
use crate::flow::lanes::Spread;
use crate::flow::net::{Key, KeyColumn, KeyOrder};
use crate::flow::transaction::{FIRST_NAMED_OID, SourceRelation, TypeName};
use crate::names::TableName;
use crate::pg::binary;
use crate::pg::made_of::made_of;
use crate::pg::pgoutput::{Column, ReplicaIdentity};
use crate::pg::quote::quote_ident;

/// A column of the relation on the replica.
#[derive(Clone, Debug)]
pub(super) struct TargetColumn {
    /// Quoted name.
    pub(super) name: String,
    /// The type for a cast, qualified, without length or precision.
    pub(super) type_sql: String,
    /// The same with them.
    pub(super) full_type_sql: String,
    /// How values in binary form travel; `None` if they cannot.
    pub(super) native: Option<Native>,
    /// An enum: its binary form is its label, that is, text.
    pub(super) is_enum: bool,
    /// The replica computes it.
    pub(super) is_generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: a value can be given to a new row only.
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

/// The partitioned table above a partition whose rows the replica places for itself ([`crate::catalog::routing`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Top {
    pub(super) table: TableName,
    /// How many partitions with rows are below it.
    pub(super) leaves: usize,
}

/// Where a relation goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The table.
    pub(super) table: TableName,
    /// Through which its rows are written and found, where not by its own name.
    pub(super) top: Option<Top>,
    /// By position in the relation.
    pub(super) columns: Vec<TargetColumn>,
    /// How rows are identified.
    pub(super) key: Key,
    /// How its rows may be spread over lanes.
    pub(super) spread: Spread,
    /// Columns that the source does not have, quoted, without those the replica computes.
    pub(super) only_here: Vec<String>,
    /// Why nothing may be applied here.
    pub(super) unfit: Option<Unfit>,
}

impl Target {
    /// What takes new rows, as SQL.
    pub(super) fn taker(&self) -> String {
        self.top
            .as_ref()
            .map_or(&self.table, |top| &top.table)
            .sql()
    }

    /// What holds the rows, as SQL.
    pub(super) fn holder(&self) -> String {
        match &self.top {
            Some(top) => top.table.sql(),
            None => format!("ONLY {}", self.table.sql()),
        }
    }

    /// Positions of the columns that are sent to the replica.
    pub(super) fn written(&self) -> impl Iterator<Item = usize> {
        (0..self.columns.len()).filter(|position| !self.columns[*position].is_generated)
    }

    /// Positions of the columns that a row with a key is updated by: those that are written, and its key.
    pub(super) fn updated_by(&self) -> impl Iterator<Item = usize> {
        let is_wanted =
            |position: &usize| !self.columns[*position].is_generated || self.is_key(*position);
        (0..self.columns.len()).filter(is_wanted)
    }

    /// Whether a column beside the key can be given a value to a new row only.
    pub(super) fn is_fixed(&self, position: usize) -> bool {
        self.columns[position].is_identity_always && !self.is_key(position)
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

    /// Whether something is known that does not fit.
    pub(super) fn any_unfit(&self) -> bool {
        let mut targets = self.known.values();
        targets.any(|(_, target)| target.unfit.is_some())
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
        synced: &Synced,
    ) -> Result<(), SinkError> {
        let targets = relations
            .iter()
            .map(|relation| load(client, relation, synced));
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
    found: ReplicaType,
    in_primary_key: bool,
    in_identity_index: bool,
    /// Values that are equal are the same bytes.
    equal_is_identical: bool,
}

/// `$1` is the schema, `$2` the table. Domains are followed down to their base type.
static COLUMNS: LazyLock<String> = LazyLock::new(|| {
    COLUMNS_OF
        .replace("{travels}", &binary::travels("y"))
        .replace("{array}", &binary::array_travels("y"))
        .replace("{first_named}", &FIRST_NAMED_OID.to_string())
        .replace("{made_of}", &made_of("a.atttypid"))
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
           coalesce(a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]), false),
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
                WHERE e.oid = y.typelem) END,
           coalesce(a.attnum = ANY (r.indkey[0:r.indnkeyatts - 1]), false),
           a.atttypid, a.atttypmod, s.nspname::text, y.typname::text, x.typname::text,
           pg_catalog.format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.atttypid >= {first_named} THEN {made_of} END
      FROM chain
      JOIN pg_type y ON y.oid = chain.type AND y.typtype <> 'd'
      JOIN pg_namespace s ON s.oid = y.typnamespace
      LEFT JOIN pg_type x ON x.oid = y.typelem AND y.typcategory = 'A'
      JOIN t ON true
      JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = chain.attnum
      LEFT JOIN pg_collation l ON l.oid = a.attcollation
      LEFT JOIN pg_index i ON i.indrelid = t.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid
      LEFT JOIN pg_index r ON r.indrelid = t.oid AND r.indisreplident AND r.indisvalid
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

/// The top above the table `$1`, how many leaves it has, and of each of its unique constraints the names of the columns.
static ABOVE: LazyLock<String> =
    LazyLock::new(|| ABOVE_OF.replace("{top}", &routing::top_of("pg_catalog.to_regclass($1)")));

const ABOVE_OF: &str = "
    SELECT n.nspname::text, c.relname::text,
           (SELECT count(*) FROM pg_partition_tree(c.oid) AS t WHERE t.isleaf),
           (SELECT array_agg(a.attname::text) FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1]))
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indexprs IS NULL AND i.indpred IS NULL
     WHERE c.oid = {top}";

/// Whether the key tells a row from those of all other partitions that may be beside it.
fn key_holds_everywhere(above: &[tokio_postgres::Row], key: &[(String, bool)]) -> bool {
    let is_in_key = |name: &&str| key.iter().any(|(column, _)| column == name);
    let holds = |row: &tokio_postgres::Row| {
        let unique: Option<Vec<&str>> = row.get(3);
        unique.is_some_and(|unique| unique.iter().all(is_in_key))
    };
    above.is_empty() || key.is_empty() || above.iter().any(holds)
}

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

async fn load(
    client: &Client,
    relation: &SourceRelation,
    synced: &Synced,
) -> Result<Target, SinkError> {
    let table = TableName {
        schema: relation.schema().to_owned(),
        name: relation.relation.name.clone(),
    };
    // Together, and without preparing: over a long line each would be a round trip of its own.
    let sql = table.sql();
    let named: [(&(dyn ToSql + Sync), Type); 2] =
        [(&table.schema, Type::TEXT), (&table.name, Type::TEXT)];
    let of_table: [(&(dyn ToSql + Sync), Type); 1] = [(&sql, Type::TEXT)];
    let (mut rows, unique, above) = tokio::try_join!(
        client.query_typed(&COLUMNS, &named),
        client.query_typed(UNIQUE, &of_table),
        client.query_typed(&ABOVE, &of_table),
    )?;
    let top = above.first().map(|row| Top {
        table: TableName::of(row),
        leaves: usize::try_from(row.get::<_, i64>(2)).unwrap_or(usize::MAX),
    });
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
    let mut unfit = None;
    for (position, sent) in relation.relation.columns.iter().enumerate() {
        let Some(mut column) = on_replica.remove(&sent.name) else {
            return Err(SinkError::ColumnMissing {
                table,
                column: sent.name.clone(),
            });
        };
        if unfit.is_none() && unfit::differs(sent, &relation.types, &column.found) {
            let why = type_misfit(client, relation, sent, &column.found).await?;
            unfit = Some(misfit(&table, &sent.name, why));
        }
        if unfit.is_none() && column.column.is_generated && !synced.sends_generated {
            unfit = Some(misfit(&table, &sent.name, Misfit::GeneratedHere));
        }
        let base_oid = column.found.base_oid;
        if sent.type_oid < FIRST_NAMED_OID
            && base_oid < FIRST_NAMED_OID
            && sent.type_oid != base_oid
        {
            // Another type on the replica: text is cast, binary is not.
            column.column.native = None;
        }
        if if full {
            column.in_primary_key
        } else {
            sent.is_key
        } {
            let order = match base_oid {
                20 | 21 | 23 => KeyOrder::Integer,
                _ => KeyOrder::Bytes,
            };
            key.columns.push(KeyColumn { position, order });
            key_columns.push((sent.name.clone(), column.equal_is_identical));
        }
        columns.push(column.column);
    }
    let key_holds = key_holds_everywhere(&above, &key_columns);
    if full && (key.columns.len() != primary_key || !key_holds) {
        key.columns.clear();
        key_columns.clear();
    }
    if let (false, Some((column, _))) = (key_holds, key_columns.first()) {
        unfit.get_or_insert_with(|| misfit(&table, column, Misfit::KeyOfAPartition));
    }
    if let Some(column) = key_not_sent(relation.relation.identity, &on_replica) {
        unfit.get_or_insert_with(|| misfit(&table, column, Misfit::KeyNotSent));
    }
    let only_here = on_replica.into_values().map(|it| it.column);
    Ok(Target {
        spread: spread(&unique, &key_columns),
        only_here: only_here
            .filter(|column| !column.is_generated)
            .map(|column| column.name)
            .collect(),
        table,
        top,
        columns,
        key,
        unfit,
    })
}

fn misfit(table: &TableName, column: &str, why: Misfit) -> Unfit {
    Unfit {
        table: table.clone(),
        column: column.to_owned(),
        why,
    }
}

/// Says both types, PostgreSQL's own in the replica's words.
async fn type_misfit(
    client: &Client,
    relation: &SourceRelation,
    sent: &Column,
    found: &ReplicaType,
) -> Result<Misfit, SinkError> {
    let source = match unfit::shown(sent, &relation.types, found) {
        Some(shown) => shown,
        None => client
            .query_typed_one(
                "SELECT pg_catalog.format_type($1, $2)",
                &[
                    (&sent.type_oid, Type::OID),
                    (&sent.type_modifier, Type::INT4),
                ],
            )
            .await?
            .get(0),
    };
    Ok(Misfit::Type {
        source,
        replica: found.shown(),
    })
}

/// A generated column of the key that the source did not send: below 18 it sends none. What is left of the key may stand
/// for several rows. `unsent` are the columns that did not come.
fn key_not_sent(
    identity: ReplicaIdentity,
    unsent: &HashMap<String, ReplicaColumn>,
) -> Option<&String> {
    let in_key = |column: &ReplicaColumn| match identity {
        ReplicaIdentity::Default => column.in_primary_key,
        ReplicaIdentity::Index => column.in_identity_index,
        ReplicaIdentity::Full | ReplicaIdentity::Nothing => false,
    };
    unsent
        .iter()
        .find(|(_, column)| column.column.is_generated && in_key(column))
        .map(|(name, _)| name)
}

async fn exists(client: &Client, table: &TableName) -> Result<bool, SinkError> {
    let row = client
        .query_one("SELECT to_regclass($1) IS NOT NULL", &[&table.sql()])
        .await?;
    Ok(row.get(0))
}

fn replica_column(row: &tokio_postgres::Row) -> ReplicaColumn {
    let base_oid: u32 = row.get(4);
    let type_oid: u32 = row.get(14);
    // The rule by which `setup::form` decides for the stream; this catches what changed since.
    let travels: bool = row.get(6);
    ReplicaColumn {
        column: TargetColumn {
            name: quote_ident(row.get(0)),
            type_sql: row.get(1),
            full_type_sql: row.get(19),
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
        found: ReplicaType {
            oid: type_oid,
            modifier: row.get(15),
            is_domain: type_oid != base_oid,
            base: TypeName {
                schema: row.get(16),
                name: row.get(17),
            },
            base_oid,
            element: row.get(18),
            sql: row.get(19),
            made_of: row.get(20),
        },
        in_primary_key: row.get(9),
        in_identity_index: row.get(13),
        equal_is_identical: row.get(10),
    }
}
