//! Sets every sequence of a database ahead, piece by piece.
//!
//! ```text
//! list ─oids─▶ [piece ▶ facts ▶ furthest values of its columns ▶ target ● ▶ setval] ─▶ told ─▶ the next piece
//! ```
//!
//! # Invariants
//! - Nothing here grows faster than the number of sequences, and no statement is about more than a piece of them: a repeat goes on
//!   behind the last piece that was told.
//! - One sequence, or one column, that gives trouble is named, and the others are set: users wait for all of them.
//! - Looking at columns takes [`COLUMNS_WITHIN`] at most, all together.
//! - What the source is known to have and the replica has not is named.
//!
//! # What it does not do
//! It decides nothing: see [`super::sequences`].

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::Oid;
use tokio_postgres::{Client, Row};

use super::sequences::{self, SequenceFacts, SequencePosition, Since};
use crate::error::chain;
use crate::names::TableName;
use crate::pg::PgError;
use crate::pg::quote::quote_ident;
use crate::schema::sequence_state::{self, State};

/// Sequences in one piece: a statement locks all it touches, and a server's lock table may be small.
const PIECE: usize = 200;
/// Columns that one statement looks at.
const COLUMNS_AT_ONCE: usize = 25;
/// What a statement of a piece may take before it is given up. With an index, as keys have, the furthest value of a column is found in
/// milliseconds; without one the users do not wait for a scan of a large table.
const STATEMENT_WITHIN: &str = "5s";
/// How long a lock on one table or sequence is waited for.
const LOCK_WITHIN: &str = "2s";
/// What all looks at columns together may take.
const COLUMNS_WITHIN: Duration = Duration::from_secs(60);

/// What setting a piece of the sequences did.
#[derive(Clone, Debug, Default)]
pub(super) struct SequencePiece {
    /// A repeat goes on behind this one.
    pub(super) last: Oid,
    /// Sequences set.
    pub(super) set: u64,
    /// What a person should look at.
    pub(super) warnings: Vec<String>,
}

/// The sequences of a database that are still to be set.
pub(super) struct Setting<'c> {
    client: &'c Client,
    left: std::vec::IntoIter<Oid>,
    since: Since,
    columns_until: Instant,
}

/// A column that a sequence feeds.
struct SequenceColumn {
    table: TableName,
    name: String,
    indexed: bool,
}

struct Sequence {
    oid: Oid,
    name: TableName,
    facts: SequenceFacts,
    columns: Vec<SequenceColumn>,
}

impl<'c> Setting<'c> {
    /// Lists the sequences behind `last`, but temporary and our own.
    ///
    /// # Errors
    /// When the database refuses.
    pub(super) async fn begin(
        client: &'c Client,
        last: Oid,
        since: Since,
    ) -> Result<Self, PgError> {
        const LIST: &str = "
            SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'S' AND c.relpersistence <> 't' AND n.nspname <> 'dr_agent' AND c.oid > $1
             ORDER BY c.oid";
        // A large catalog takes what it takes; everything behind it is in pieces.
        client.batch_execute("SET statement_timeout = 0").await?;
        let rows = client.query(LIST, &[&last]).await?;
        client
            .batch_execute(&format!(
                "SET statement_timeout = '{STATEMENT_WITHIN}'; SET lock_timeout = '{LOCK_WITHIN}'"
            ))
            .await?;
        let left: Vec<Oid> = rows.iter().map(|row| row.get(0)).collect();
        Ok(Self {
            client,
            left: left.into_iter(),
            since,
            columns_until: Instant::now() + COLUMNS_WITHIN,
        })
    }

    /// Sets the next piece; none where all are set.
    ///
    /// # Errors
    /// Where the session has ended, or the replica is in trouble: what was told is done.
    pub(super) async fn next(&mut self) -> Result<Option<SequencePiece>, PgError> {
        let oids: Vec<Oid> = self.left.by_ref().take(PIECE).collect();
        let Some(&last) = oids.last() else {
            return Ok(None);
        };
        let mut piece = SequencePiece {
            last,
            ..SequencePiece::default()
        };
        let mut sequences = self.facts(&oids).await?;
        self.look_at_columns(&mut sequences, &mut piece).await?;
        let mut targets = Vec::new();
        for sequence in &sequences {
            let target = sequences::target(&sequence.facts);
            if let Some(warning) = target.warning {
                piece.warnings.push(format!("{}: {warning}", sequence.name));
            }
            targets.extend(target.position.map(|position| (sequence, position)));
        }
        self.set(&targets, &mut piece).await?;
        Ok(Some(piece))
    }

    /// Sequences that the source has and the replica has not.
    ///
    /// # Errors
    /// When the database refuses.
    pub(super) async fn missing(&self) -> Result<Vec<String>, PgError> {
        let missing = sequence_state::missing(self.client).await?;
        let said = missing.iter().map(|(name, value)| {
            format!(
                "{name}: the source has it, at {value}, and the replica does not: create it beyond that"
            )
        });
        Ok(said.collect())
    }

    async fn facts(&self, oids: &[Oid]) -> Result<Vec<Sequence>, PgError> {
        const FACTS: &str = "
            SELECT c.oid, n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax, s.seqstart, s.seqcache,
                   s.seqcycle,
                   CASE WHEN has_sequence_privilege(s.seqrelid, 'USAGE, SELECT') THEN pg_sequence_last_value(s.seqrelid) END
              FROM pg_sequence s
              JOIN pg_class c ON c.oid = s.seqrelid
              JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE s.seqrelid = ANY ($1) ORDER BY c.oid";
        let rows = self.client.query(FACTS, &[&oids]).await?;
        let known = sequence_state::of(self.client, oids).await?;
        let sequences = rows.iter().map(|row| {
            let known = known.get(&row.get(0)).copied().unwrap_or_default();
            sequence(row, known, self.since)
        });
        let mut sequences: Vec<Sequence> = sequences.collect();
        let mut columns = self.columns(oids).await?;
        for sequence in &mut sequences {
            let (fits, columns) = columns.remove(&sequence.oid).unwrap_or_default();
            let is_up = sequence.facts.increment > 0;
            // As many below 0 as above, and one more.
            sequence.facts.fits = fits.map(|most| if is_up { most } else { -most - 1 });
            sequence.columns = columns;
        }
        Ok(sequences)
    }

    /// The columns that own the sequences (serial, identity) or use them as a default, and the largest value that fits into all of
    /// one sequence's. Partitions are left out where their root is there.
    async fn columns(
        &self,
        oids: &[Oid],
    ) -> Result<BTreeMap<Oid, (Option<i64>, Vec<SequenceColumn>)>, PgError> {
        const COLUMNS: &str = "
            WITH used AS (
                SELECT d.objid AS seq, d.refobjid AS rel, d.refobjsubid AS att
                  FROM pg_depend d
                 WHERE d.classid = 'pg_class'::regclass AND d.objid = ANY ($1)
                   AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
                UNION
                SELECT d.refobjid, a.adrelid, a.adnum
                  FROM pg_depend d JOIN pg_attrdef a ON a.oid = d.objid
                 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY ($1)
                   AND d.classid = 'pg_attrdef'::regclass
            )
            SELECT used.seq, tn.nspname, t.relname, a.attname,
                   EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam
                            WHERE i.indrelid = t.oid AND i.indkey[0] = a.attnum AND i.indpred IS NULL AND i.indisvalid
                              AND m.amname = 'btree'),
                   b.oid, CASE WHEN y.typbasetype = 0 THEN a.atttypmod ELSE y.typtypmod END
              FROM used
              JOIN pg_class t ON t.oid = used.rel AND t.relkind IN ('r', 'p')
              JOIN pg_namespace tn ON tn.oid = t.relnamespace
              JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = used.att AND NOT a.attisdropped
              JOIN pg_type y ON y.oid = a.atttypid
              JOIN pg_type b ON b.oid = coalesce(nullif(y.typbasetype, 0), y.oid)
             WHERE b.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype)
               AND NOT (t.relispartition AND EXISTS (
                   SELECT 1 FROM used root
                    WHERE root.seq = used.seq AND root.rel = pg_partition_root(t.oid)))
             ORDER BY 1, 2, 3, 4";
        let mut found: BTreeMap<Oid, (Option<i64>, Vec<SequenceColumn>)> = BTreeMap::new();
        for row in self.client.query(COLUMNS, &[&oids]).await? {
            let (fits, columns) = found.entry(row.get(0)).or_default();
            *fits = [*fits, largest(row.get(5), row.get(6))]
                .into_iter()
                .flatten()
                .min();
            columns.push(SequenceColumn {
                table: TableName {
                    schema: row.get(1),
                    name: row.get(2),
                },
                name: row.get(3),
                indexed: row.get(4),
            });
        }
        Ok(found)
    }

    /// Indexed columns first, many with one statement; the others, and those that gave trouble, one by one.
    async fn look_at_columns(
        &self,
        sequences: &mut [Sequence],
        piece: &mut SequencePiece,
    ) -> Result<(), PgError> {
        let mut quick = Vec::new();
        let mut slow = Vec::new();
        for (at, sequence) in sequences.iter().enumerate() {
            for (column, found) in sequence.columns.iter().enumerate() {
                match found.indexed {
                    true => quick.push((at, column)),
                    false => slow.push((at, column)),
                }
            }
        }
        let mut again = Vec::new();
        for some in quick.chunks(COLUMNS_AT_ONCE) {
            match self.furthest(sequences, some).await {
                Ok(values) => take(sequences, some, &values),
                Err(error) if is_its_own(&error) => again.extend_from_slice(some),
                Err(error) => return Err(error),
            }
        }
        for one in again.into_iter().chain(slow) {
            let found = match Instant::now() < self.columns_until {
                true => self.furthest(sequences, &[one]).await,
                false => Err(PgError::Timeout {
                    doing: "look at columns",
                    after: COLUMNS_WITHIN,
                }),
            };
            match found {
                Ok(values) => take(sequences, &[one], &values),
                Err(error) if is_its_own(&error) || Instant::now() >= self.columns_until => {
                    // Not worth the users' waiting, and not worth hiding either.
                    let sequence = &sequences[one.0];
                    let column = &sequence.columns[one.1];
                    piece.warnings.push(format!(
                        "{}: {}.{} could not be read ({})",
                        sequence.name,
                        column.table,
                        column.name,
                        chain(&error)
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The largest (or smallest) values of some columns, in their order.
    async fn furthest(
        &self,
        sequences: &[Sequence],
        some: &[(usize, usize)],
    ) -> Result<Vec<Option<i64>>, PgError> {
        let each: Vec<String> = some
            .iter()
            .enumerate()
            .map(|(place, (at, column))| {
                let sequence = &sequences[*at];
                let column = &sequence.columns[*column];
                let function = if sequence.facts.increment > 0 { "max" } else { "min" };
                // A numeric column may hold more than a sequence ever reaches.
                format!(
                    "SELECT {place}, CASE WHEN v IS NOT NULL THEN trunc(greatest(least(v, {}), {}))::bigint END
                       FROM (SELECT {function}({})::numeric AS v FROM {}) AS f",
                    i64::MAX,
                    i64::MIN,
                    quote_ident(&column.name),
                    column.table.sql()
                )
            })
            .collect();
        let sql = format!("{} ORDER BY 1", each.join(" UNION ALL "));
        let rows = self.client.query(&sql, &[]).await?;
        Ok(rows.iter().map(|row| row.get(1)).collect())
    }

    /// All with one statement; where that gives trouble, one by one.
    async fn set(
        &self,
        targets: &[(&Sequence, SequencePosition)],
        piece: &mut SequencePiece,
    ) -> Result<(), PgError> {
        match self.setval(targets).await {
            Ok(()) => {
                piece.set += targets.len() as u64;
                return Ok(());
            }
            Err(error) if is_its_own(&error) => {}
            Err(error) => return Err(error),
        }
        for target in targets {
            match self.setval(std::slice::from_ref(target)).await {
                Ok(()) => piece.set += 1,
                Err(error) if is_its_own(&error) => piece.warnings.push(format!(
                    "{}: it could not be set to {} ({}): set it by hand before it is used",
                    target.0.name,
                    target.1.value,
                    chain(&error)
                )),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn setval(&self, targets: &[(&Sequence, SequencePosition)]) -> Result<(), PgError> {
        let oids: Vec<Oid> = targets.iter().map(|(sequence, _)| sequence.oid).collect();
        let values: Vec<i64> = targets.iter().map(|(_, at)| at.value).collect();
        let called: Vec<bool> = targets.iter().map(|(_, at)| at.called).collect();
        self.client
            .execute(
                "SELECT setval(s.oid::regclass, s.value, s.called)
                   FROM unnest($1::oid[], $2::bigint[], $3::boolean[]) AS s (oid, value, called)",
                &[&oids, &values, &called],
            )
            .await?;
        Ok(())
    }
}

/// Whether an error is about what the statement touched, and not about the session or the server: too slow, locked, no right, a
/// lock table that is too small for so many at once.
fn is_its_own(error: &PgError) -> bool {
    error.sqlstate().is_some_and(is_of_one_object)
}

fn is_of_one_object(code: &str) -> bool {
    // query_canceled, out_of_memory (of the lock table).
    const OF_ONE: [&str; 2] = ["57014", "53200"];
    // Connections, transaction states, resources, the operator, the system.
    const OF_ALL: [&str; 5] = ["08", "25", "53", "57", "58"];
    OF_ONE.contains(&code) || !OF_ALL.iter().any(|class| code.starts_with(class))
}

fn take(sequences: &mut [Sequence], some: &[(usize, usize)], values: &[Option<i64>]) {
    for ((at, _), value) in some.iter().zip(values) {
        let facts = &mut sequences[*at].facts;
        facts.column = further(facts, *value);
    }
}

fn further(facts: &SequenceFacts, value: Option<i64>) -> Option<i64> {
    match (facts.column, value) {
        (Some(a), Some(b)) if facts.increment > 0 => Some(a.max(b)),
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn sequence(row: &Row, (known, rate): (Option<State>, i64), since: Since) -> Sequence {
    Sequence {
        oid: row.get(0),
        name: TableName {
            schema: row.get(1),
            name: row.get(2),
        },
        facts: SequenceFacts {
            increment: row.get(3),
            min: row.get(4),
            max: row.get(5),
            start: row.get(6),
            cache: row.get(7),
            cycle: row.get(8),
            fits: None,
            known: known.map(|(value, called)| SequencePosition { value, called }),
            here: row.get(9),
            column: None,
            calls_per_second: rate_of(rate),
            since,
        },
        columns: Vec::new(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate is far below 2^52")]
fn rate_of(noted: i64) -> f64 {
    noted as f64
}

/// The largest value of a column's type; none where a sequence does not get that far.
fn largest(base: Oid, typmod: i32) -> Option<i64> {
    use tokio_postgres::types::Type;
    match base {
        oid if oid == Type::INT2.oid() => Some(i16::MAX.into()),
        oid if oid == Type::INT4.oid() => Some(i32::MAX.into()),
        oid if oid == Type::NUMERIC.oid() && typmod >= 4 => {
            let packed = typmod - 4;
            // Eleven bits with a sign, since PostgreSQL 15; before it no scale was that large.
            let scale = ((packed & 0x7ff) ^ 1024) - 1024;
            let digits = ((packed >> 16) & 0xffff) - scale;
            let digits = u32::try_from(digits).ok()?;
            Some(10_i64.checked_pow(digits)? - 1)
        }
        _ => None,
    }
}

/// How many seconds may have passed between the last look at the source and `until`, by whichever clocks say more; without it, up to
/// the last transaction that was applied.
///
/// # Errors
/// When the database refuses.
pub(super) async fn since_last_look(
    client: &Client,
    stream: &str,
    until: Option<&str>,
) -> Result<Since, PgError> {
    let seconds = sequence_state::since_last_look(client, stream, until).await?;
    // A source whose agent did not note it yet: as long as the longest period that anybody would choose.
    Ok(Since::Seconds(seconds.unwrap_or(600.0)))
}

/// Sets every sequence of a database ahead of what the source may have given out since its last look; returns how many, and what
/// a person should look at.
///
/// # Errors
/// When the database refuses.
pub async fn set_sequences_ahead(
    client: &Client,
    stream: &str,
) -> Result<(u64, Vec<String>), PgError> {
    let since = since_last_look(client, stream, None).await?;
    let mut setting = Setting::begin(client, 0, since).await?;
    let (mut set, mut warnings) = (0, Vec::new());
    while let Some(piece) = setting.next().await? {
        set += piece.set;
        warnings.extend(piece.warnings);
    }
    warnings.extend(setting.missing().await?);
    client
        .batch_execute("RESET statement_timeout; RESET lock_timeout")
        .await?;
    Ok((set, warnings))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::types::Type;

    #[test]
    fn what_fits_into_a_column() {
        let numeric = |precision: i32, scale: i32| {
            let typmod = ((precision << 16) | (scale & 0x7ff)) + 4;
            largest(Type::NUMERIC.oid(), typmod)
        };
        assert_eq!(numeric(6, 0), Some(999_999));
        assert_eq!(numeric(8, 2), Some(999_999));
        assert_eq!(numeric(3, -2), Some(99_999));
        assert_eq!(numeric(30, 0), None);
        assert_eq!(numeric(2, 5), None);
        assert_eq!(largest(Type::NUMERIC.oid(), -1), None);
        assert_eq!(largest(Type::INT2.oid(), -1), Some(32_767));
        assert_eq!(largest(Type::INT8.oid(), -1), None);
    }

    #[test]
    fn only_what_a_statement_touched_is_passed_over() {
        for own in ["57014", "55P03", "42501", "42P01", "XX000", "53200"] {
            assert!(is_of_one_object(own), "{own}");
        }
        for session in ["57P01", "57P02", "53300", "25006", "08006"] {
            assert!(!is_of_one_object(session), "{session}");
        }
    }
}
