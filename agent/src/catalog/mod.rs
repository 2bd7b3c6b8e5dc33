//! What a database of the source holds: the tables that can be published and those that cannot.
//!
//! Read by `check`, by the set-up before anything is published, and by the monitor that counts
//! unprotected objects. Only reads; decides nothing about publications.

pub mod names;
pub mod publication;
pub mod routing;

use std::collections::BTreeSet;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::config::{Config, Keyless};
use crate::names::TableName;
use crate::pg::PgError;

/// How UPDATE and DELETE of a table's rows can be told to a subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// Primary key, or REPLICA IDENTITY USING INDEX. A DEFERRABLE primary key is none: PostgreSQL
    /// does not accept a key that may be violated for a moment.
    Key,
    /// REPLICA IDENTITY FULL: the whole old row.
    Full,
    /// None: published, the source's own UPDATE and DELETE would fail. A key with a stored generated column is none before
    /// 18: such a column is not sent, and what is left of the key may stand for several rows.
    Missing,
}

/// A table with storage of its own: an ordinary table or a leaf partition.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its name.
    pub name: TableName,
    /// Its oid, by which it is told from another one of that name.
    pub oid: u32,
    /// The topmost partitioned table above it; itself where it is no partition.
    pub root: TableName,
    /// How its old rows are identified.
    pub identity: Identity,
    /// It has a key, and a column of it is generated and not sent.
    pub generated_key: bool,
    /// Has a VIRTUAL generated column (18 and later). Published with REPLICA IDENTITY FULL, its UPDATE and
    /// DELETE would fail on the source; only a key helps.
    pub virtual_generated: bool,
    /// UNLOGGED tables are not in the WAL and cannot be published.
    pub unlogged: bool,
    /// Belongs to an extension; its rows are the extension's configuration.
    pub of_extension: bool,
}

/// What becomes of one table under the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Published, through its root.
    Published,
    /// Left out by `source.exclude`.
    Excluded,
    /// Keyless, and `source.keyless = "exclude"`.
    KeylessExcluded,
    /// Keyless, and nobody has decided: nothing is published before somebody does.
    KeylessRefused,
    /// Published once it has REPLICA IDENTITY FULL (`source.keyless = "full"`).
    KeylessFull,
    /// Not in the WAL.
    Unlogged,
}

impl Table {
    /// What becomes of this table under `config`.
    pub fn protection(&self, config: &Config) -> Protection {
        // `exclude = ["*.heartbeat"]` means a table of the user's.
        if self.name.schema == "dr_agent" {
            Protection::Published
        } else if config.excludes(&self.root.schema, &self.root.name) {
            Protection::Excluded
        } else if self.unlogged {
            Protection::Unlogged
        } else if self.identity != Identity::Missing {
            Protection::Published
        } else {
            match config.source.keyless {
                Keyless::Refuse => Protection::KeylessRefused,
                Keyless::Full if self.virtual_generated => Protection::KeylessExcluded,
                Keyless::Full => Protection::KeylessFull,
                Keyless::Exclude => Protection::KeylessExcluded,
            }
        }
    }
}

/// Every table of the database this client is connected to that holds rows of the user's, in name
/// order. The in-band tables of schema `dr_agent` are among them, so that they are published and
/// copied like any other; what else that schema holds, on a server that was a replica once, is not.
pub async fn tables(client: &Client) -> Result<Vec<Table>, PgError> {
    // Without sizes: reading one opens the table, which waits behind ALTER TABLE and VACUUM FULL.
    const SQL: &str = "
        SELECT n.nspname, c.relname, rn.nspname, r.relname,
               CASE WHEN c.relreplident = 'f' AND NOT v.virtual THEN 'full'
                    WHEN c.relreplident = 'i' AND EXISTS (
                         SELECT 1 FROM pg_index i
                          WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid)
                         THEN CASE WHEN k.hidden THEN 'missing' ELSE 'key' END
                    WHEN c.relreplident = 'd' AND EXISTS (
                         SELECT 1 FROM pg_index i
                          WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid
                            AND i.indimmediate)
                         THEN CASE WHEN k.hidden THEN 'missing' ELSE 'key' END
                    ELSE 'missing' END,
               c.relpersistence = 'u',
               EXISTS (SELECT 1 FROM pg_depend d
                        WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                          AND d.deptype = 'e'),
               v.virtual, c.oid, k.hidden AND c.relreplident <> 'f'
          FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace
          JOIN pg_class r ON r.oid = coalesce(pg_partition_root(c.oid), c.oid)
          JOIN pg_namespace rn ON rn.oid = r.relnamespace
         CROSS JOIN LATERAL (
               SELECT EXISTS (SELECT 1 FROM pg_attribute a
                               WHERE a.attrelid = c.oid AND a.attgenerated = 'v') AS virtual) v
         CROSS JOIN LATERAL (
               SELECT current_setting('server_version_num')::int < 180000 AND EXISTS (
                      SELECT 1 FROM pg_index i
                        JOIN pg_attribute a ON a.attrelid = i.indrelid
                             AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
                       WHERE i.indrelid = c.oid AND a.attgenerated <> ''
                         AND CASE c.relreplident WHEN 'i' THEN i.indisreplident
                                                 WHEN 'd' THEN i.indisprimary END) AS hidden) k
         WHERE c.relkind = 'r' AND c.relpersistence IN ('p', 'u')
           AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
           AND (n.nspname <> 'dr_agent' OR c.relname = ANY ($1::text[]))
         ORDER BY 1, 2";
    let in_band = publication::IN_BAND;
    let rows = client
        .query_typed(SQL, &[(&in_band.as_slice(), Type::TEXT_ARRAY)])
        .await?;
    Ok(rows
        .iter()
        .map(|row| Table {
            name: TableName::of(row),
            root: TableName {
                schema: row.get(2),
                name: row.get(3),
            },
            identity: match row.get::<_, &str>(4) {
                "full" => Identity::Full,
                "key" => Identity::Key,
                _ => Identity::Missing,
            },
            oid: row.get(8),
            unlogged: row.get(5),
            of_extension: row.get(6),
            virtual_generated: row.get(7),
            generated_key: row.get(9),
        })
        .filter(|table: &Table| !table.of_extension)
        .collect())
}

/// Partitioned tables whose valid primary key is handed down to every partition to come.
pub async fn keyed_roots(client: &Client) -> Result<BTreeSet<TableName>, PgError> {
    const SQL: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace
          JOIN pg_index i ON i.indrelid = c.oid AND i.indisprimary AND i.indisvalid
         WHERE c.relkind = 'p' AND NOT c.relispartition
           AND (current_setting('server_version_num')::int >= 180000 OR NOT EXISTS (
                SELECT 1 FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attgenerated <> ''
                   AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])))";
    let rows = client.query_typed(SQL, &[]).await?;
    Ok(rows.iter().map(TableName::of).collect())
}

/// Databases of the server this client is connected to that allow connections, without templates.
pub async fn databases(client: &Client) -> Result<Vec<String>, PgError> {
    const SQL: &str = "SELECT datname FROM pg_database
         WHERE datallowconn AND NOT datistemplate ORDER BY datname";
    Ok(client
        .query(SQL, &[])
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect())
}

/// `server_version_num`, for example 150018.
pub async fn server_version(client: &Client) -> Result<i32, PgError> {
    let row = client
        .query_typed_one("SELECT current_setting('server_version_num')::int", &[])
        .await?;
    Ok(row.get(0))
}
