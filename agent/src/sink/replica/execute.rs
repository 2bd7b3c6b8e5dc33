//! Steps become statements with their parameters, in order.
//!
//! Preparing (which may wait for the replica) is apart from sending (which does not), so that a whole
//! batch goes out in one piece.
//!
//! # Invariants
//! Within a keyed stage deletes go first, then updates, then inserts, each sorted by key. Updates that
//! send the same columns share a statement; a column that is only on the replica is in none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use super::SinkError;
use super::array::{ArrayBuilder, ArrayParameter, Form};
use super::chain::Chain;
use super::sql::{self, Sent};
use super::target::{Target, Targets};
use crate::net::{NetChange, Row, RowChange, RowKey, Stage, Step, TableChanges};
use crate::pg::pgoutput::{Tuple, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Insert,
    Update,
    Delete,
}

/// The prepared statements of one session, by their text.
#[derive(Debug, Default)]
pub(super) struct Statements {
    prepared: HashMap<String, Statement>,
}

impl Statements {
    /// Statements kept at most; beyond it all are forgotten and prepared again as needed. They cost
    /// memory on the replica.
    const PREPARED_MAX: usize = 2_000;

    /// Prepares those of `texts` that are new, all at once: over a long line each by itself would be a round trip.
    async fn prepare(
        &mut self,
        client: &Client,
        texts: impl Iterator<Item = &String> + Clone,
    ) -> Result<(), SinkError> {
        let new = |known: &HashMap<String, Statement>| -> BTreeSet<String> {
            let new = texts.clone().filter(|text| !known.contains_key(*text));
            new.cloned().collect()
        };
        let mut missing = new(&self.prepared);
        if self.prepared.len() + missing.len() > Self::PREPARED_MAX {
            self.prepared.clear();
            missing = new(&self.prepared);
        }
        let preparing = missing.iter().map(|text| client.prepare(text));
        let statements = try_join_all(preparing).await?;
        self.prepared.extend(missing.into_iter().zip(statements));
        Ok(())
    }
}

/// One statement with its parameters; `S` is a prepared one, or the text of one that is not prepared yet.
enum Ready<S> {
    Rows {
        statement: S,
        arrays: Vec<ArrayParameter>,
        rows: i64,
        inserts_into: Option<String>,
    },
    Text(String),
}

/// The statements of some steps, ready to be sent.
pub(super) struct Execution {
    statements: Vec<Ready<Statement>>,
}

impl Execution {
    /// Prepares the statements of `steps`.
    pub(super) async fn prepare(
        client: &Client,
        statements: &mut Statements,
        targets: &Targets,
        steps: &[Step],
    ) -> Result<Self, SinkError> {
        let mut building = Building::default();
        for step in steps {
            match step {
                Step::Tables(tables) => {
                    for table in tables {
                        building.table(targets.of(&table.relation), table)?;
                    }
                }
                Step::Truncate {
                    relations,
                    restart_identity,
                } => {
                    let tables = relations.iter().map(|relation| &**targets.of(relation));
                    building
                        .ready
                        .push(Ready::Text(sql::truncate(tables, *restart_identity)));
                }
            }
        }
        let texts = building.ready.iter().filter_map(|ready| match ready {
            Ready::Rows { statement, .. } => Some(statement),
            Ready::Text(_) => None,
        });
        statements.prepare(client, texts).await?;
        let ready = building.ready.into_iter().map(|ready| match ready {
            Ready::Text(text) => Ready::Text(text),
            Ready::Rows {
                statement,
                arrays,
                rows,
                inserts_into,
            } => Ready::Rows {
                statement: statements.prepared[&statement].clone(),
                arrays,
                rows,
                inserts_into,
            },
        });
        Ok(Self {
            statements: ready.collect(),
        })
    }

    /// Sends the statements behind what the chain already holds.
    pub(super) async fn send(self, client: &Arc<Client>, chain: &mut Chain) {
        for ready in self.statements {
            let client = Arc::clone(client);
            match ready {
                Ready::Text(text) => {
                    chain
                        .send(async move { client.batch_execute(&text).await })
                        .await;
                }
                Ready::Rows {
                    statement,
                    arrays,
                    rows,
                    inserts_into,
                } => {
                    chain
                        .send(async move {
                            let mut parameters: Vec<&(dyn ToSql + Sync)> = Vec::new();
                            parameters.extend(arrays.iter().map(|a| a as &(dyn ToSql + Sync)));
                            // An insert of rows without columns counts them, as every other verb does.
                            if inserts_into.is_none() || arrays.is_empty() {
                                parameters.push(&rows);
                            }
                            let found = client.execute(&statement, &parameters).await?;
                            let expected = rows.unsigned_abs();
                            match inserts_into {
                                Some(table) if found != expected => Err(SinkError::Swallowed {
                                    table,
                                    expected,
                                    found,
                                }),
                                _ => Ok(()),
                            }
                        })
                        .await;
                }
            }
        }
    }
}

/// Builds statements and their parameters, in order.
#[derive(Default)]
struct Building {
    ready: Vec<Ready<String>>,
}

impl Building {
    fn table(&mut self, target: &Target, table: &TableChanges) -> Result<(), SinkError> {
        for stage in &table.stages {
            match stage {
                Stage::Keyed(rows) => self.keyed(target, rows)?,
                Stage::Ordered(changes) => self.ordered(target, changes)?,
            }
        }
        Ok(())
    }

    fn keyed(&mut self, target: &Target, rows: &[(RowKey, NetChange)]) -> Result<(), SinkError> {
        let mut deletes: Vec<&Tuple> = Vec::new();
        // By the columns they leave out; nearly always none.
        let mut updates: BTreeMap<Vec<usize>, Vec<&Row>> = BTreeMap::new();
        let mut inserts: Vec<&Row> = Vec::new();
        for (_, net) in rows {
            match net {
                NetChange::Delete(old) => deletes.push(old),
                NetChange::Update(row) => updates.entry(row.unsent()).or_default().push(row),
                NetChange::Insert(row) => inserts.push(row),
                NetChange::Replace { old, new } => {
                    deletes.push(old);
                    inserts.push(new);
                }
            }
        }
        if !deletes.is_empty() {
            let key: Vec<usize> = target
                .key
                .columns
                .iter()
                .map(|column| column.position)
                .collect();
            let values = deletes.iter().map(|old| old.values());
            self.rows(target, Verb::Delete, &key, values, deletes.len())?;
        }
        for (unsent, updates) in updates {
            let sent: Vec<usize> = target
                .written()
                .filter(|position| !unsent.contains(position))
                .collect();
            let values = updates.iter().map(|row| row.values());
            self.rows(target, Verb::Update, &sent, values, updates.len())?;
        }
        self.inserts(target, &inserts)
    }

    fn inserts(&mut self, target: &Target, rows: &[&Row]) -> Result<(), SinkError> {
        if rows.is_empty() {
            return Ok(());
        }
        let sent: Vec<usize> = target.written().collect();
        let values = rows.iter().map(|row| row.values());
        self.rows(target, Verb::Insert, &sent, values, rows.len())
    }

    /// One by one, except that inserts that follow one another go together.
    fn ordered(&mut self, target: &Target, changes: &[RowChange]) -> Result<(), SinkError> {
        let mut inserts: Vec<&Row> = Vec::new();
        for change in changes {
            match change {
                RowChange::Insert(row) => inserts.push(row),
                RowChange::Update { old, new } => {
                    self.inserts(target, &std::mem::take(&mut inserts))?;
                    self.one(target, old, Some(new))?;
                }
                RowChange::Delete { old } => {
                    self.inserts(target, &std::mem::take(&mut inserts))?;
                    self.one(target, old, None)?;
                }
            }
        }
        self.inserts(target, &inserts)
    }

    /// A statement over many rows: `positions` of each row's values.
    fn rows<'v>(
        &mut self,
        target: &Target,
        verb: Verb,
        positions: &[usize],
        rows: impl Iterator<Item = impl Iterator<Item = Value<'v>>>,
        count: usize,
    ) -> Result<(), SinkError> {
        let (sent, arrays) = columns(target, positions, rows)?;
        let text = match verb {
            Verb::Insert => sql::insert(target, &sent),
            Verb::Update => sql::update(target, &sent),
            Verb::Delete => sql::delete(target, &sent),
        };
        self.ready.push(Ready::Rows {
            statement: text,
            arrays,
            rows: i64::try_from(count).expect("a batch has fewer than 2^63 rows"),
            inserts_into: (verb == Verb::Insert).then(|| target.table.to_string()),
        });
        Ok(())
    }

    /// A statement over one row, identified by `old`; a delete without `new`.
    fn one(&mut self, target: &Target, old: &Tuple, new: Option<&Row>) -> Result<(), SinkError> {
        let identifying: Vec<usize> = if target.key.columns.is_empty() {
            target.written().collect()
        } else {
            target
                .key
                .columns
                .iter()
                .map(|column| column.position)
                .collect()
        };
        let old_is_null = nulls(&identifying, old.values());
        let (old, mut arrays) = columns(target, &identifying, std::iter::once(old.values()))?;
        let text = if let Some(new) = new {
            let unsent = new.unsent();
            let written: Vec<usize> = target
                .written()
                .filter(|position| !unsent.contains(position))
                .collect();
            let new = columns(target, &written, std::iter::once(new.values()))?;
            arrays.extend(new.1);
            sql::update_one(target, &old, &old_is_null, &new.0)
        } else {
            sql::delete_one(target, &old, &old_is_null)
        };
        self.ready.push(Ready::Rows {
            statement: text,
            arrays,
            rows: 1,
            inserts_into: None,
        });
        Ok(())
    }
}

fn nulls<'v>(positions: &[usize], values: impl Iterator<Item = Value<'v>>) -> Vec<bool> {
    values
        .enumerate()
        .filter(|(position, _)| positions.binary_search(position).is_ok())
        .map(|(_, value)| matches!(value, Value::Null))
        .collect()
}

/// Turns rows into one array per column of `positions`, which are sorted.
fn columns<'v>(
    target: &Target,
    positions: &[usize],
    rows: impl Iterator<Item = impl Iterator<Item = Value<'v>>>,
) -> Result<(Vec<Sent>, Vec<ArrayParameter>), SinkError> {
    let mut builders: Vec<ArrayBuilder> = positions.iter().map(|_| ArrayBuilder::new()).collect();
    for row in rows {
        let mut wanted = positions.iter().zip(&mut builders).peekable();
        for (at, value) in row.enumerate() {
            let Some((position, builder)) = wanted.next_if(|(position, _)| **position == at) else {
                continue;
            };
            let column = &target.columns[*position];
            let value = match value {
                Value::Binary(label) if column.is_enum => Value::Text(label),
                value => value,
            };
            let pushed = builder.push(value);
            if pushed.is_err() || (builder.form() == Form::Native && column.native.is_none()) {
                return Err(SinkError::BinaryForm {
                    table: target.table.clone(),
                    column: column.name.clone(),
                });
            }
        }
    }
    let mut sent = Vec::with_capacity(positions.len());
    let mut arrays = Vec::with_capacity(positions.len());
    for (position, builder) in positions.iter().zip(builders) {
        sent.push(Sent {
            position: *position,
            form: builder.form(),
        });
        let element = target.columns[*position]
            .native
            .as_ref()
            .map_or(0, |n| n.element_oid);
        arrays.push(builder.finish(element));
    }
    Ok((sent, arrays))
}
