//! Builds what comes behind the rows: indexes, constraints, triggers, rules.
//!
//! `pg_restore` writes them as SQL, and several sessions of our own send it, each statement without waiting for the one before it
//! ([`super::lanes`]): the replica may be far away, and a schema has thousands of statements.
//!
//! # Invariants
//! - Each object is a transaction of its own: what is built stays, whatever becomes of the others.
//! - After an error nothing more is begun; the first error is the one that is returned.
//! - What attaches indexes comes behind all of them, then triggers and foreign keys.
//!
//! # What it does not do
//! It does not know what is there already: the caller leaves that out ([`super::toc::LeftOut`]).

use std::collections::{BTreeMap, HashMap};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use futures_util::stream::FuturesUnordered;
use futures_util::{StreamExt as _, future};
use tokio_postgres::Client;

use super::error::CopyError;
use super::lanes::{Holds, LaneHold, LaneWork, Lanes};
use super::script::{self, ScriptObject};
use super::session::ReplicaSide;
use crate::error::chain;
use crate::names::TableName;
use crate::pg::PgError;
use crate::pg::quote::identifier;

/// A table that is there.
struct BuiltTable {
    oid: u32,
    /// The topmost partitioned table above it, or itself.
    root: u32,
    bytes: u64,
}

/// Runs the script on at most `jobs` sessions.
pub(super) async fn run(
    script: &str,
    replica: &ReplicaSide<'_>,
    jobs: u16,
) -> Result<(), CopyError> {
    let (preamble, mut objects) = script::objects(script);
    if objects.is_empty() {
        return Ok(());
    }
    objects.sort_by_key(|object| turn(&object.kind));
    let lanes = usize::from(jobs.max(1)).min(objects.len());
    let opening = (0..lanes).map(|_| Box::pin(open(replica, &preamble)));
    let clients = future::try_join_all(opening).await?;
    let tables = tables(&clients[0]).await?;
    let work = objects.into_iter().map(|object| {
        let (holds, bytes) = holds(&object, &tables);
        let what = object;
        LaneWork { holds, bytes, what }
    });
    send_all(&clients, Lanes::new(lanes, work.collect())).await
}

/// Runs the script on one session; what is refused is left out.
pub(super) async fn run_what_can_be(
    script: &str,
    replica: &ReplicaSide<'_>,
) -> Result<(), CopyError> {
    let (preamble, objects) = script::objects(script);
    if objects.is_empty() {
        return Ok(());
    }
    let client = open(replica, &preamble).await?;
    let sent = objects.iter().map(|object| async {
        let done = client.batch_execute(&object.sql).await;
        (&object.what, done)
    });
    for (what, done) in future::join_all(sent).await {
        match done {
            Err(error) if error.as_db_error().is_some() => {
                tracing::debug!(what, error = %chain(&PgError::from(error)), "left out");
            }
            done => done.map_err(CopyError::replica("write what can be written"))?,
        }
    }
    Ok(())
}

/// Which objects come first. Attaching an index, and a foreign key or a trigger of a partitioned table, lock it with all of its
/// partitions.
fn turn(kind: &str) -> u8 {
    match kind {
        "INDEX ATTACH" => 1,
        "FK CONSTRAINT" | "TRIGGER" | "EVENT TRIGGER" => 2,
        _ => 0,
    }
}

async fn open(replica: &ReplicaSide<'_>, preamble: &str) -> Result<Client, CopyError> {
    let client = replica.open().await?;
    client
        .batch_execute(preamble)
        .await
        .map_err(CopyError::replica("set up a session"))?;
    Ok(client)
}

async fn tables(replica: &Client) -> Result<HashMap<TableName, BuiltTable>, CopyError> {
    const TABLES: &str = "
        SELECT n.nspname::text, c.relname::text, c.oid,
               coalesce(pg_catalog.pg_partition_root(c.oid)::oid, c.oid), pg_catalog.pg_relation_size(c.oid)
          FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
         WHERE c.relkind IN ('r', 'p') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'";
    let rows = replica
        .query_typed(TABLES, &[])
        .await
        .map_err(CopyError::replica("read the sizes of the tables"))?;
    let table = |row: &tokio_postgres::Row| {
        let name = TableName::of(row);
        let bytes = row.get::<_, Option<i64>>(4).unwrap_or(0);
        let bytes = u64::try_from(bytes).unwrap_or(0);
        let (oid, root) = (row.get(2), row.get(3));
        (name, BuiltTable { oid, root, bytes })
    };
    Ok(rows.iter().map(table).collect())
}

/// What an object needs while it is built. What is not understood needs everything.
fn holds(object: &ScriptObject, tables: &HashMap<TableName, BuiltTable>) -> (Holds, u64) {
    let known = match object.kind.as_str() {
        "INDEX" => index_of(&object.sql).and_then(|name| {
            let table = tables.get(&name)?;
            let hold = match object.statements {
                1 => LaneHold::Shared,
                _ => LaneHold::Exclusive,
            };
            Some((BTreeMap::from([(table.oid, hold)]), table.bytes))
        }),
        "CONSTRAINT" => altered(&object.sql).and_then(|name| {
            let table = tables.get(&name)?;
            Some((
                BTreeMap::from([(table.oid, LaneHold::Exclusive)]),
                table.bytes,
            ))
        }),
        "FK CONSTRAINT" => altered(&object.sql).and_then(|name| {
            let both = [tables.get(&name)?, tables.get(&referred_to(&object.sql)?)?];
            let oids = both.iter().flat_map(|table| [table.oid, table.root]);
            let held = oids.map(|oid| (oid, LaneHold::Exclusive)).collect();
            Some((held, both[0].bytes))
        }),
        _ => None,
    };
    match known {
        Some((held, bytes)) => (Holds::Tables(held), bytes),
        None => (Holds::Everything, 0),
    }
}

/// `CREATE [UNIQUE] INDEX name ON [ONLY] schema.table …`
fn index_of(sql: &str) -> Option<TableName> {
    let rest = sql.strip_prefix("CREATE ")?;
    let rest = rest.strip_prefix("UNIQUE ").unwrap_or(rest);
    let (_, rest) = identifier(rest.strip_prefix("INDEX ")?)?;
    named(rest.strip_prefix(" ON ")?)
}

/// `ALTER TABLE [ONLY] schema.table …`
fn altered(sql: &str) -> Option<TableName> {
    named(sql.strip_prefix("ALTER TABLE ")?)
}

/// `… REFERENCES schema.table(…`, where nothing else is called so.
fn referred_to(sql: &str) -> Option<TableName> {
    let mut parts = sql.split(" REFERENCES ");
    let (_, referred, None) = (parts.next()?, parts.next()?, parts.next()) else {
        return None;
    };
    named(referred)
}

fn named(text: &str) -> Option<TableName> {
    let text = text.strip_prefix("ONLY ").unwrap_or(text);
    let (schema, rest) = identifier(text)?;
    let (name, _) = identifier(rest.strip_prefix('.')?)?;
    Some(TableName { schema, name })
}

/// Sends everything, each as soon as it may be sent.
async fn send_all(clients: &[Client], mut lanes: Lanes<ScriptObject>) -> Result<(), CopyError> {
    let mut under_way = FuturesUnordered::new();
    let mut first_error = None;
    loop {
        while let Some((lane, object)) = lanes.next() {
            let sent = async move {
                let done = clients[lane].batch_execute(&object.sql).await;
                let doing = format!("create {}", object.what);
                (lane, done.map_err(CopyError::replica(doing)))
            };
            under_way.push(begun(Box::pin(sent)).await);
        }
        match under_way.next().await {
            None => break,
            Some((lane, Ok(()))) => lanes.ended(lane),
            Some((lane, Err(error))) => {
                lanes.ended(lane);
                lanes.stop();
                first_error.get_or_insert(error);
            }
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// A future that has begun: its statement is sent before any that comes later.
async fn begun<T, F>(mut future: Pin<Box<F>>) -> future::Either<future::Ready<T>, Pin<Box<F>>>
where
    F: Future<Output = T>,
{
    match poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        Poll::Ready(done) => future::Either::Left(future::ready(done)),
        Poll::Pending => future::Either::Right(future),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_a_statement_are_found() {
        let table = |schema: &str, name: &str| {
            Some(TableName {
                schema: schema.to_owned(),
                name: name.to_owned(),
            })
        };
        for (sql, expected) in [
            (
                "CREATE INDEX i ON public.t USING btree (v);",
                table("public", "t"),
            ),
            (
                "CREATE UNIQUE INDEX \"a ON b\" ON ONLY s.\"T 1\" USING btree (v);",
                table("s", "T 1"),
            ),
            ("CREATE INDEX CONCURRENTLY i ON public.t (v);", None),
        ] {
            assert_eq!(index_of(sql), expected, "{sql}");
        }
        let key = "ALTER TABLE ONLY s.a\n    ADD CONSTRAINT f FOREIGN KEY (b) REFERENCES s.b(id) ON DELETE CASCADE;";
        assert_eq!(
            (altered(key), referred_to(key)),
            (table("s", "a"), table("s", "b"))
        );
        let odd =
            "ALTER TABLE s.a ADD CONSTRAINT f FOREIGN KEY (\"x REFERENCES y\") REFERENCES s.b(id);";
        assert_eq!(referred_to(odd), None);
    }
}
