//! Steps become statements with their parameters, in order.
//!
//! Preparing (which may wait for the replica) is apart from sending (which does not), so that a whole
//! batch goes out in one piece.
//!
//! # Invariants
//! Within a stage deletes go first, then updates, then inserts, with a key each sorted by it. Updates that
//! send the same columns share a statement; a column that is only on the replica is in none. Every statement says how many
//! rows it must touch, and the server counts them before anything is committed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use super::SinkError;
use super::array::{ArrayBuilder, ArrayForm, ArrayParameter, INT8_OID};
use super::chain::{Chain, while_settling};
use super::keyless::{self, Nulls};
use super::large::{LARGE_BYTES, LargeValue, Reading};
use super::sql::{self, Sent};
use super::target::{Target, Targets};
use crate::flow::net::{
    KeyChange, Multiset, NetChange, Row, RowKey, RowValues, Stage, Step, TableChanges,
};
use crate::pg::pgoutput::{Tuple, Value};
use crate::schema::large_value;

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
        ahead: Vec<LargeValue>,
    },
    Text(String),
}

/// The statements of some steps, ready to be sent.
pub(super) struct Execution {
    statements: Vec<Ready<Statement>>,
    /// Takes large values in, where there are any.
    copy: Option<Statement>,
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
        let copy = building
            .has_ahead()
            .then(|| large_value::COPY_IN.to_owned());
        let texts = building.ready.iter().filter_map(|ready| match ready {
            Ready::Rows { statement, .. } => Some(statement),
            Ready::Text(_) => None,
        });
        statements.prepare(client, texts.chain(&copy)).await?;
        let ready = building.ready.into_iter().map(|ready| match ready {
            Ready::Text(text) => Ready::Text(text),
            Ready::Rows {
                statement,
                arrays,
                rows,
                ahead,
            } => Ready::Rows {
                statement: statements.prepared[&statement].clone(),
                arrays,
                rows,
                ahead,
            },
        });
        Ok(Self {
            statements: ready.collect(),
            copy: copy.map(|text| statements.prepared[&text].clone()),
        })
    }

    /// Sends the statements behind what the chain already holds.
    pub(super) async fn send(self, client: &Arc<Client>, chain: &mut Chain) {
        for ready in self.statements {
            match ready {
                Ready::Text(text) => send_text(client, text, chain).await,
                Ready::Rows {
                    statement,
                    arrays,
                    rows,
                    ahead,
                } => {
                    let remove = !ahead.is_empty();
                    if let Some(copy) = &self.copy {
                        send_ahead(client, copy, ahead, chain).await;
                    }
                    let client_of_rows = Arc::clone(client);
                    chain
                        .send(async move {
                            let mut parameters: Vec<&(dyn ToSql + Sync)> = Vec::new();
                            parameters.extend(arrays.iter().map(|a| a as &(dyn ToSql + Sync)));
                            parameters.push(&rows);
                            client_of_rows.execute(&statement, &parameters).await
                        })
                        .await;
                    if remove {
                        send_text(client, large_value::REMOVE.to_owned(), chain).await;
                    }
                }
            }
        }
    }
}

async fn send_text(client: &Arc<Client>, text: String, chain: &mut Chain) {
    let client = Arc::clone(client);
    chain
        .send(async move { client.batch_execute(&text).await })
        .await;
}

/// Sends values ahead, one after the other, while the answers of what was sent before them come.
async fn send_ahead(
    client: &Arc<Client>,
    copy: &Statement,
    ahead: Vec<LargeValue>,
    chain: &mut Chain,
) {
    for value in ahead {
        let sent = while_settling(std::iter::once(&mut *chain), value.send(client, copy)).await;
        if let Err(error) = sent {
            // What failed before it, which may be why, counts first.
            chain.send(async move { Err::<(), _>(error) }).await;
            return;
        }
    }
}

/// Builds statements and their parameters, in order.
#[derive(Default)]
struct Building {
    ready: Vec<Ready<String>>,
}

impl Building {
    /// Whether values are to be sent ahead.
    fn has_ahead(&self) -> bool {
        let mut ready = self.ready.iter();
        ready.any(|ready| matches!(ready, Ready::Rows { ahead, .. } if !ahead.is_empty()))
    }

    fn table(&mut self, target: &Target, table: &TableChanges) -> Result<(), SinkError> {
        for stage in &table.stages {
            match stage {
                Stage::Keyed(rows) => self.keyed(target, rows)?,
                Stage::Move(change) => self.one(target, change)?,
                Stage::Multiset(rows) => self.multiset(target, rows)?,
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
            self.rows(target, Verb::Delete, &key, &deletes)?;
        }
        for (unsent, updates) in updates {
            let sent: Vec<usize> = target
                .updated_by()
                .filter(|position| !unsent.contains(position))
                .collect();
            self.rows(target, Verb::Update, &sent, &updates)?;
        }
        self.inserts(target, &inserts)
    }

    fn inserts(&mut self, target: &Target, rows: &[&Row]) -> Result<(), SinkError> {
        if rows.is_empty() {
            return Ok(());
        }
        let sent: Vec<usize> = target.written().collect();
        self.rows(target, Verb::Insert, &sent, rows)
    }

    /// Deletes, updates, inserts. A row whose identity column gets another value, which an UPDATE cannot give it, goes and
    /// comes; it goes apart from the others, which may be equal to it.
    fn multiset(&mut self, target: &Target, rows: &Multiset) -> Result<(), SinkError> {
        let deletes = rows.deletes.iter().map(|(old, copies)| (old, *copies));
        self.delete_equal(target, &deletes.collect::<Vec<_>>())?;
        let fixed: Vec<usize> = target
            .written()
            .filter(|position| target.columns[*position].is_identity_always)
            .collect();
        let stays = |old: &Tuple, new: &Row| is_equal_at(&fixed, old.values(), new.values());
        // By the columns whose new values are sent ahead; nearly always none.
        let mut same: BTreeMap<Vec<usize>, Vec<(&Tuple, Vec<&Row>)>> = BTreeMap::new();
        let (mut replaced, mut inserts) = (Vec::new(), Vec::new());
        let written: Vec<usize> = target.written().collect();
        for (old, news) in &rows.updates {
            let (stay, go): (Vec<&Row>, Vec<&Row>) = news.iter().partition(|new| stays(old, new));
            if !go.is_empty() {
                replaced.push((old, go.len() as u64));
                inserts.extend(go);
            }
            let mut alike: BTreeMap<Vec<usize>, Vec<&Row>> = BTreeMap::new();
            for new in stay {
                let large = match new.bytes() < LARGE_BYTES {
                    true => Vec::new(),
                    false => large_positions(target, &written, new),
                };
                alike.entry(large).or_default().push(new);
            }
            for (large, news) in alike {
                same.entry(large).or_default().push((old, news));
            }
        }
        self.delete_equal(target, &replaced)?;
        for (large, rows) in same {
            self.update_equal(target, &rows, &large)?;
        }
        inserts.extend(&rows.inserts);
        self.inserts(target, &inserts)
    }

    fn delete_equal(&mut self, target: &Target, rows: &[(&Tuple, u64)]) -> Result<(), SinkError> {
        if rows.is_empty() {
            return Ok(());
        }
        let written: Vec<usize> = target.written().collect();
        let olds: Vec<&Tuple> = rows.iter().map(|(old, _)| *old).collect();
        let nulls = nulls(&written, &olds);
        let Columns {
            sent, mut arrays, ..
        } = columns(target, &written, &olds, &[])?;
        arrays.push(numbers(0..rows.len() as u64));
        arrays.push(numbers(rows.iter().map(|(_, copies)| *copies)));
        let count: u64 = rows.iter().map(|(_, copies)| copies).sum();
        let text = keyless::delete(target, &sent, &nulls);
        self.push(text, arrays, count, Vec::new());
        Ok(())
    }

    fn update_equal(
        &mut self,
        target: &Target,
        rows: &[(&Tuple, Vec<&Row>)],
        large: &[usize],
    ) -> Result<(), SinkError> {
        let written: Vec<usize> = target.written().collect();
        let each = || {
            let kinds = rows.iter().zip(0..);
            kinds.flat_map(|((old, news), kind)| {
                let copies = news.iter().zip(1..);
                copies.map(move |(new, copy)| (*old, *new, kind, copy))
            })
        };
        let olds: Vec<&Tuple> = each().map(|(old, ..)| old).collect();
        let news: Vec<&Row> = each().map(|(_, new, ..)| new).collect();
        let nulls = nulls(&written, &olds);
        let old = columns(target, &written, &olds, &[])?;
        let new = columns(target, &written, &news, large)?;
        let mut arrays = old.arrays;
        arrays.extend(new.arrays);
        arrays.push(numbers(each().map(|(.., kind, _)| kind)));
        arrays.push(numbers(each().map(|(.., copy)| copy)));
        let text = keyless::update(target, &old.sent, &nulls, &new.sent);
        self.push(text, arrays, news.len() as u64, new.ahead);
        Ok(())
    }

    /// Statements over many rows: `positions` of each row's values. Nearly always it is one; rows whose large values are in
    /// other columns have another.
    fn rows<R: RowValues>(
        &mut self,
        target: &Target,
        verb: Verb,
        positions: &[usize],
        rows: &[&R],
    ) -> Result<(), SinkError> {
        if rows.iter().all(|row| row.bytes() < LARGE_BYTES) {
            return self.alike(target, verb, positions, rows, &[]);
        }
        let mut alike: BTreeMap<Vec<usize>, Vec<&R>> = BTreeMap::new();
        for row in rows {
            let large = large_positions(target, positions, *row);
            alike.entry(large).or_default().push(*row);
        }
        for (large, rows) in alike {
            self.alike(target, verb, positions, &rows, &large)?;
        }
        Ok(())
    }

    /// A statement over rows whose values at `large` are sent ahead.
    fn alike<R: RowValues>(
        &mut self,
        target: &Target,
        verb: Verb,
        positions: &[usize],
        rows: &[&R],
        large: &[usize],
    ) -> Result<(), SinkError> {
        let Columns {
            sent,
            arrays,
            ahead,
        } = columns(target, positions, rows, large)?;
        let text = match verb {
            Verb::Insert => sql::insert(target, &sent),
            Verb::Update => sql::update(target, &sent),
            Verb::Delete => sql::delete(target, &sent),
        };
        self.push(text, arrays, rows.len() as u64, ahead);
        Ok(())
    }

    /// A statement that must touch so many rows.
    fn push(
        &mut self,
        statement: String,
        arrays: Vec<ArrayParameter>,
        rows: u64,
        ahead: Vec<LargeValue>,
    ) {
        self.ready.push(Ready::Rows {
            statement,
            arrays,
            rows: i64::try_from(rows).expect("a batch has fewer than 2^63 rows"),
            ahead,
        });
    }

    /// A key change of one row.
    fn one(&mut self, target: &Target, change: &KeyChange) -> Result<(), SinkError> {
        let KeyChange { old, new } = change;
        let key: Vec<usize> = target
            .key
            .columns
            .iter()
            .map(|column| column.position)
            .collect();
        let unsent = new.unsent();
        let written: Vec<usize> = target
            .written()
            .filter(|position| !unsent.contains(position))
            .collect();
        let fixed = |position: &usize| target.columns[*position].is_identity_always;
        let (known, unknown): (Vec<usize>, Vec<usize>) = written
            .iter()
            .filter(|position| fixed(position))
            .partition(|position| target.is_key(**position));
        let is_replaced = !unknown.is_empty() || !is_equal_at(&known, old.values(), new.values());
        let large = large_positions(target, &written, new);
        let old = columns(target, &key, &[old], &[])?;
        let new = columns(target, &written, &[new], &large)?;
        let mut arrays = old.arrays;
        arrays.extend(new.arrays);
        let text = sql::move_one(target, &old.sent, &new.sent, is_replaced);
        self.push(text, arrays, 1, new.ahead);
        Ok(())
    }
}

/// Which of the rows have NULL in each of the columns.
fn nulls(positions: &[usize], rows: &[&Tuple]) -> Vec<Nulls> {
    let mut counts = vec![0; positions.len()];
    for row in rows {
        let mut wanted = positions.iter().zip(&mut counts).peekable();
        for (at, value) in row.values().enumerate() {
            if let Some((_, count)) = wanted.next_if(|(position, _)| **position == at) {
                *count += usize::from(matches!(value, Value::Null));
            }
        }
    }
    let verdict = |count| match count {
        0 => Nulls::None,
        count if count == rows.len() => Nulls::All,
        _ => Nulls::Some,
    };
    counts.into_iter().map(verdict).collect()
}

fn is_equal_at<'v>(
    positions: &[usize],
    a: impl Iterator<Item = Value<'v>>,
    b: impl Iterator<Item = Value<'v>>,
) -> bool {
    a.zip(b)
        .enumerate()
        .all(|(at, (a, b))| a == b || positions.binary_search(&at).is_err())
}

fn numbers(numbers: impl Iterator<Item = u64>) -> ArrayParameter {
    let mut builder = ArrayBuilder::new();
    for number in numbers {
        let number = Value::Binary(&number.to_be_bytes());
        builder.push(number).expect("all are in binary form");
    }
    builder.finish(INT8_OID)
}

/// Whether a row's values are such as the replica's types take, column by column: statements, each with its parameter, by the
/// position of the column.
pub(super) fn probes(
    target: &Target,
    row: &Tuple,
) -> Result<Vec<(usize, String, ArrayParameter)>, SinkError> {
    let is_sent = |at: &usize| !matches!(row.values().nth(*at), None | Some(Value::UnchangedToast));
    let mut probes = Vec::new();
    for at in target.written().filter(is_sent) {
        let Columns { sent, arrays, .. } = columns(target, &[at], &[row], &[])?;
        let one = sent.into_iter().zip(arrays);
        probes.extend(one.map(|(sent, array)| (at, sql::probe(target, sent), array)));
    }
    Ok(probes)
}

/// Positions of the values that are sent ahead.
fn large_positions(target: &Target, positions: &[usize], row: &impl RowValues) -> Vec<usize> {
    let values = row.values().enumerate();
    let large = values.filter(|(position, value)| {
        positions.binary_search(position).is_ok()
            && Reading::of(*value, &target.columns[*position]).is_some()
    });
    large.map(|(position, _)| position).collect()
}

/// Rows as the parameters of one statement.
struct Columns {
    sent: Vec<Sent>,
    arrays: Vec<ArrayParameter>,
    ahead: Vec<LargeValue>,
}

/// Turns rows into one array per column of `positions`, which are sorted; the values at `large` are sent ahead.
fn columns<R: RowValues>(
    target: &Target,
    positions: &[usize],
    rows: &[&R],
    large: &[usize],
) -> Result<Columns, SinkError> {
    let mut builders: Vec<ArrayBuilder> = positions.iter().map(|_| ArrayBuilder::new()).collect();
    let mut ahead: Vec<LargeValue> = Vec::new();
    for row in rows {
        let mut wanted = positions.iter().zip(&mut builders).peekable();
        for (at, value) in row.values().enumerate() {
            let Some((position, builder)) = wanted.next_if(|(position, _)| **position == at) else {
                continue;
            };
            let column = &target.columns[*position];
            if large.contains(&at)
                && let Some(reading) = Reading::of(value, column)
            {
                let number = i64::try_from(ahead.len()).expect("a batch has fewer than 2^63 rows");
                ahead.extend(LargeValue::of(number, value, *row));
                builder.push_ahead(number, reading);
                continue;
            }
            let value = match value {
                Value::Binary(label) if column.is_enum => Value::Text(label),
                value => value,
            };
            let pushed = builder.push(value);
            if pushed.is_err() || (builder.form() == ArrayForm::Native && column.native.is_none()) {
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
    Ok(Columns {
        sent,
        arrays,
        ahead,
    })
}
