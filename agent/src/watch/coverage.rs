//! What a failure of the source's site would lose although replication runs: the unprotected objects.
//!
//! Feeds `dr_agent_unprotected_objects{kind}` and the notes of `check`. The monitor asks every 30
//! seconds, so it reads catalogs only, opens no user table, waits for no lock, and stops counting
//! large objects at a limit.
//!
//! The monitor also tells it in-band (`inventory`), so that the replica can say by itself what is not protected (`kept`) when
//! the source is gone.
//!
//! # Invariants
//! - Every kind is in the answer, with 0 where there is none: a gauge that was set goes back.
//! - What is counted is either not on the replica at all or not kept up to date there.
//!
//! # What it does not do
//! - It does not count what the initial copy takes along and what changes by DDL only (views,
//!   functions, triggers, policies): what comes later is DDL, which [`crate::schema::ddl`] carries.
//! - It does not count what a start brings along and what a server may lack (roles): `inventory` compares their names.

mod definitions;
mod inventory;
mod kept;

use std::collections::BTreeSet;

use tokio_postgres::Client;

use crate::catalog::publication::Wanted;
use crate::catalog::{Protection, Table, keyed_roots, tables};
use crate::config::{Config, Ddl};
use crate::names::TableName;
use crate::names::stream::StreamName;
use crate::pg::{Again, PgError};
use crate::schema::listing;
pub use definitions::CHANGES;
pub use inventory::tell;
pub use kept::{Coverage, DRIFT_KINDS, NOT_COPIED, NotProtected, SET_ASIDE, of};

/// The unprotected objects of one kind in one database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unprotected {
    /// Value of the metric's label; one of [`KINDS`].
    pub kind: &'static str,
    /// How many; large objects are counted up to [`LARGE_OBJECTS_MAX`].
    pub count: u64,
    /// The first few names, in order.
    pub examples: Vec<String>,
}

/// Tables that are to be published and are not: new ones, until their pipeline starts again.
pub const UNPUBLISHED_TABLE: &str = "unpublished_table";

/// Tables that took the place of another one, or were not published for a while, since `dr_agent.listed` was written: the
/// pipeline starts again to say so.
pub const RELISTED_TABLE: &str = "relisted_table";

/// Tables that are published and have lost their key or replica identity: their UPDATE and DELETE fail on the source until the
/// pipeline has mended it, which it does at once.
pub const UNIDENTIFIED_TABLE: &str = "unidentified_table";

/// Every kind, in the order of the answer.
pub const KINDS: [&str; 12] = [
    "keyless_table",
    "excluded_table",
    "unlogged_table",
    UNPUBLISHED_TABLE,
    RELISTED_TABLE,
    UNIDENTIFIED_TABLE,
    "extension_table",
    "foreign_table",
    "materialized_view",
    "large_object",
    "subscription",
    "database_setting",
];

/// Large objects are counted up to here: beyond, the number tells nobody anything new, and counting
/// millions of them every 30 seconds would.
pub const LARGE_OBJECTS_MAX: u64 = 100_000;

/// Settings that a standby must not have, or with which a session may not come up where something is missing (`agent/sql/shape.sql`).
const LEFT_SETTINGS: &str = "lower(split_part(item, '=', 1)) IN ('default_transaction_read_only', 'session_replication_role',
    'session_preload_libraries', 'local_preload_libraries', 'role', 'session_authorization', 'post_auth_delay')";

/// How many names of a kind are returned.
const EXAMPLES_MAX: usize = 100;

/// Counts what is unprotected in the source database this client is connected to.
pub async fn unprotected(client: &Client, config: &Config) -> Result<Vec<Unprotected>, PgError> {
    let mut again = Again::default();
    loop {
        match count(client, config).await {
            Err(error) if again.after(&error) => {}
            found => return found,
        }
    }
}

async fn count(client: &Client, config: &Config) -> Result<Vec<Unprotected>, PgError> {
    let tables = tables(client).await?;
    let row = client
        .query_one("SELECT current_database()::text", &[])
        .await?;
    let stream = config.stream(row.get(0));
    let listed = listed(client, stream.as_str()).await?;
    let wanted = Wanted::of(&tables, &keyed_roots(client).await?, config);
    let mut all = of_tables(&tables, &wanted, &listed);
    all.push(relisted(client, &stream).await?);
    all.extend(of_catalog(client, config).await?);
    all.sort_by_key(|one| KINDS.iter().position(|kind| *kind == one.kind));
    Ok(all)
}

async fn relisted(client: &Client, stream: &StreamName) -> Result<Unprotected, PgError> {
    let is = listing::read(client, stream).await?;
    let was = listing::noted(client, stream).await?;
    let others = was.iter().filter(|(table, listed_as)| {
        let is = is.get(table);
        is.is_some_and(|is| is != *listed_as)
    });
    Ok(unprotected_tables(
        RELISTED_TABLE,
        others.map(|(table, _)| table.to_string()).collect(),
    ))
}

fn unprotected_tables(kind: &'static str, mut names: Vec<String>) -> Unprotected {
    let count = names.len() as u64;
    names.truncate(EXAMPLES_MAX);
    Unprotected {
        kind,
        count,
        examples: names,
    }
}

/// The tables a publication lists; empty where there is no such publication.
pub(crate) async fn listed(
    client: &Client,
    publication: &str,
) -> Result<BTreeSet<TableName>, PgError> {
    const SQL: &str = "
        SELECT n.nspname::text, c.relname::text
          FROM pg_publication p
          JOIN pg_publication_rel pr ON pr.prpubid = p.oid
          JOIN pg_class c ON c.oid = pr.prrelid
          JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE p.pubname = $1";
    let rows = client.query(SQL, &[&publication]).await?;
    Ok(rows.iter().map(TableName::of).collect())
}

/// Sorts the tables into the kinds that concern tables.
fn of_tables(tables: &[Table], wanted: &Wanted, listed: &BTreeSet<TableName>) -> Vec<Unprotected> {
    let mut keyless = Vec::new();
    let mut excluded = Vec::new();
    let mut unlogged = Vec::new();
    for (name, why) in &wanted.unpublished {
        match why {
            Protection::Excluded => &mut excluded,
            Protection::Unlogged => &mut unlogged,
            Protection::KeylessExcluded
            | Protection::KeylessRefused
            | Protection::KeylessFull
            | Protection::Published => &mut keyless,
        }
        .push(name.to_string());
    }
    let is_listed = |table: &Table| listed.contains(&table.root) || listed.contains(&table.name);
    let is_named = |name: &TableName| {
        let mut tables = tables.iter();
        tables.any(|table| table.name == *name && is_listed(table))
    };
    let keyless_of = wanted.unpublished.iter().filter(|(_, why)| {
        matches!(
            why,
            Protection::KeylessExcluded | Protection::KeylessRefused
        )
    });
    let unidentified: Vec<String> = keyless_of
        .map(|(name, _)| name)
        .chain(&wanted.identity_full)
        .filter(|name| is_named(name))
        .map(ToString::to_string)
        .collect();
    let unpublished: Vec<String> = wanted
        .published
        .iter()
        .filter(|table| !is_listed(table))
        .map(|table| table.name.to_string())
        .collect();
    [
        ("keyless_table", keyless),
        ("excluded_table", excluded),
        ("unlogged_table", unlogged),
        (UNPUBLISHED_TABLE, unpublished),
        (UNIDENTIFIED_TABLE, unidentified),
    ]
    .into_iter()
    .map(|(kind, names)| unprotected_tables(kind, names))
    .collect()
}

/// The kinds that one statement over the catalogs can count.
async fn of_catalog(client: &Client, config: &Config) -> Result<Vec<Unprotected>, PgError> {
    // The others are followed.
    let settings = match config.source.ddl {
        Ddl::Replicate => LEFT_SETTINGS,
        Ddl::Off => "true",
    };
    // pg_subscription.subconninfo holds passwords and is not for everybody; the other columns are.
    let sql = format!(
        "WITH found (kind, name) AS (
            SELECT 'extension_table', e.extname || ' ' || t.oid::regclass::text
              FROM pg_extension e, unnest(e.extconfig) AS t(oid)
              JOIN pg_class c ON c.oid = t.oid AND c.relkind IN ('r', 'p')
            UNION ALL
            SELECT CASE c.relkind WHEN 'f' THEN 'foreign_table' ELSE 'materialized_view' END,
                   n.nspname || '.' || c.relname
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('f', 'm')
            UNION ALL
            SELECT * FROM (SELECT 'large_object', oid::text
                             FROM pg_largeobject_metadata LIMIT {LARGE_OBJECTS_MAX}) AS l
            UNION ALL
            SELECT 'subscription', s.subname::text FROM pg_subscription s
             WHERE s.subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())
            UNION ALL
            SELECT 'database_setting', split_part(item, '=', 1)
              FROM pg_db_role_setting s, unnest(s.setconfig) AS item
             WHERE s.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()) AND {settings}
         )
         SELECT kind, count(*), (array_agg(name ORDER BY name))[1:{EXAMPLES_MAX}]
           FROM found GROUP BY kind"
    );
    let rows = client.query(&sql, &[]).await?;
    let mut found: Vec<Unprotected> = Vec::new();
    for kind in &KINDS[6..] {
        let row = rows.iter().find(|row| row.get::<_, &str>(0) == *kind);
        found.push(Unprotected {
            kind,
            count: row.map_or(0, |row| row.get::<_, i64>(1).unsigned_abs()),
            examples: row.map(|row| row.get(2)).unwrap_or_default(),
        });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Identity;

    fn name(text: &str) -> TableName {
        let (schema, name) = text.split_once('.').unwrap();
        TableName {
            schema: schema.to_owned(),
            name: name.to_owned(),
        }
    }

    fn table(text: &str, root: &str, identity: Identity) -> Table {
        Table {
            virtual_generated: false,
            generated_key: false,
            oid: 7,
            name: name(text),
            root: name(root),
            identity,
            unlogged: false,
            of_extension: false,
        }
    }

    fn config(source: &str) -> Config {
        let text = format!(
            "[source]\nurl = \"postgres://a@localhost/x\"\n{source}\n\
             [replica]\nurl = \"postgres://b@localhost/y\"\n"
        );
        Config::parse("f", &text, []).unwrap()
    }

    fn wanted(tables: &[Table], config: &Config) -> Wanted {
        Wanted::of(tables, &BTreeSet::from([name("s.m")]), config)
    }

    fn count(found: &[Unprotected], kind: &str) -> u64 {
        found.iter().find(|one| one.kind == kind).unwrap().count
    }

    #[test]
    fn a_leaf_is_protected_when_its_root_is_published() {
        let tables = [
            table("s.m1", "s.m", Identity::Key),
            table("s.late", "s.late", Identity::Key),
            table("s.log", "s.log", Identity::Missing),
        ];
        let listed = BTreeSet::from([name("s.m")]);
        let found = of_tables(&tables, &wanted(&tables, &config("")), &listed);
        assert_eq!(count(&found, "unpublished_table"), 1);
        assert_eq!(count(&found, "keyless_table"), 1);
        assert_eq!(count(&found, "excluded_table"), 0);
    }

    #[test]
    fn a_published_table_that_lost_its_identity_is_named_whatever_the_configuration_does_with_it() {
        let tables = [
            table("s.m1", "s.m", Identity::Missing),
            table("s.log", "s.log", Identity::Missing),
            table("s.never", "s.never", Identity::Missing),
            table("s.a", "s.a", Identity::Key),
        ];
        let listed = BTreeSet::from([name("s.m"), name("s.log"), name("s.a")]);
        for keyless in ["full", "exclude", "refuse"] {
            let config = config(&format!("keyless = \"{keyless}\""));
            let found = of_tables(&tables, &wanted(&tables, &config), &listed);
            assert_eq!(count(&found, UNIDENTIFIED_TABLE), 2, "{keyless}");
        }
    }

    #[test]
    fn every_table_is_in_exactly_one_kind_or_protected() {
        let config = config("keyless = \"full\"\nexclude = [\"s.scratch*\"]");
        let mut unlogged = table("s.u", "s.u", Identity::Key);
        unlogged.unlogged = true;
        let tables = [
            unlogged,
            table("s.scratch_1", "s.scratch_1", Identity::Missing),
            table("s.log", "s.log", Identity::Missing),
            table("s.a", "s.a", Identity::Key),
        ];
        let listed = BTreeSet::from([name("s.a")]);
        let found = of_tables(&tables, &wanted(&tables, &config), &listed);
        let total: u64 = found.iter().map(|one| one.count).sum();
        assert_eq!(total, 3);
        assert_eq!(count(&found, "unlogged_table"), 1);
        assert_eq!(count(&found, "excluded_table"), 1);
        assert_eq!(count(&found, "unpublished_table"), 1);
    }

    #[test]
    fn examples_are_few_and_the_count_is_whole() {
        let tables: Vec<Table> = (0..EXAMPLES_MAX + 4)
            .map(|n| table(&format!("s.t{n}"), &format!("s.t{n}"), Identity::Key))
            .collect();
        let found = of_tables(&tables, &wanted(&tables, &config("")), &BTreeSet::new());
        let one = found.iter().find(|one| one.count > 0).unwrap();
        assert_eq!(one.examples.len(), EXAMPLES_MAX);
        assert_eq!(one.count, EXAMPLES_MAX as u64 + 4);
    }
}
