//! Which history a restore is of, where the archive has several of a stream.
//!
//! A source that was built anew, restored or failed over begins another history under the same name; so does the replica of
//! yesterday once it is the source. Usually one of them was alive at the moment that is asked for, and that one is meant.
//!
//! # Invariants
//! - Where more than one may be meant, nothing is guessed: a person says which.

use crate::archive::base::{Bases, Found, Summary};
use crate::archive::log::{Layout, Span};
use crate::cloud::store::Store;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::time::{Micros, pg_micros};

use super::RestoreError;
use super::moment::Moment;

/// One history, as far as choosing one is concerned.
#[derive(Clone, Debug)]
struct Life {
    history: History,
    /// Its base backups, oldest first.
    bases: Vec<(PgLsn, Micros)>,
    /// How far its log leads.
    end: PgLsn,
    /// When something of it was written last, by the store's clock.
    written_at: Option<Micros>,
}

impl Life {
    /// Whether it leads to the moment, as far as can be told without reading it.
    fn leads_to(&self, moment: Moment) -> bool {
        let has_base = |is: &dyn Fn(PgLsn, Micros) -> bool| {
            self.bases.iter().any(|(lsn, time)| is(*lsn, *time))
        };
        match moment {
            Moment::End => !self.bases.is_empty(),
            Moment::Time(moment) => {
                has_base(&|_, time| time <= moment)
                    && self
                        .written_at
                        .is_none_or(|written_at| written_at >= moment)
            }
            Moment::Lsn(moment) => has_base(&|lsn, _| lsn <= moment) && self.end >= moment,
        }
    }
}

/// Finds the history that is meant, and its base backups, oldest first.
///
/// # Errors
/// [`RestoreError::NothingOf`], [`RestoreError::NoHistory`], [`RestoreError::WhichHistory`]
pub(super) async fn find(
    store: &Store,
    stream: &StreamName,
    database: &str,
    moment: Moment,
    asked: Option<History>,
) -> Result<(Layout, Vec<Summary>), RestoreError> {
    let mut found = Vec::new();
    for bases in Bases::all(store, stream).await? {
        let Found {
            bases: summaries,
            unusable,
            ..
        } = bases.find().await?;
        for base in unusable {
            tracing::warn!(
                base = base.base,
                reason = base.reason,
                "a base backup cannot be used"
            );
        }
        if !summaries.is_empty() {
            found.push((bases, summaries));
        }
    }
    let nothing = || RestoreError::NothingOf(database.to_owned());
    if found.is_empty() {
        return Err(nothing());
    }
    let chosen = match (asked, found.len()) {
        (Some(asked), _) => {
            let is_it = |(bases, _): &(Bases, Vec<Summary>)| bases.layout.history() == asked;
            found
                .iter()
                .position(is_it)
                .ok_or_else(|| RestoreError::NoHistory {
                    asked,
                    known: found
                        .iter()
                        .map(|(bases, _)| bases.layout.history())
                        .collect(),
                })?
        }
        (None, 1) => 0,
        (None, _) => {
            let mut lives = Vec::new();
            for (bases, summaries) in &found {
                lives.push(life(bases, summaries).await?);
            }
            choose(&lives, moment)?
        }
    };
    let (bases, summaries) = found.swap_remove(chosen);
    Ok((bases.layout, summaries))
}

async fn life(bases: &Bases, summaries: &[Summary]) -> Result<Life, RestoreError> {
    let log = bases.log(PgLsn::from(0)).await?;
    let written = log.iter().filter_map(|(_, object)| object.written_at);
    let finished = summaries.iter().map(|base| base.finished_at.into());
    Ok(Life {
        history: bases.layout.history(),
        bases: summaries
            .iter()
            .map(|base| (base.lsn, pg_micros(base.as_of.into())))
            .collect(),
        end: log
            .iter()
            .map(|(span, _): &(Span, _)| span.end)
            .max()
            .unwrap_or(PgLsn::from(0)),
        written_at: written.chain(finished).map(pg_micros).max(),
    })
}

/// Chooses; `lives` are in the order in which they began, and there are several.
fn choose(lives: &[Life], moment: Moment) -> Result<usize, RestoreError> {
    let leading: Vec<usize> = (0..lives.len())
        .filter(|i| lives[*i].leads_to(moment))
        .collect();
    let ambiguous = || RestoreError::WhichHistory {
        moment,
        histories: leading.iter().map(|i| lives[*i].history).collect(),
    };
    let last = leading.last().copied();
    match (moment, leading.len()) {
        // What is wrong with the one that began last is said in full.
        (_, 0) => Ok(lives.len() - 1),
        (_, 1) => Ok(leading[0]),
        // One of them goes on to be written while the other has ended: that is the one.
        (Moment::End, _) => {
            let newest = leading.iter().max_by_key(|i| lives[**i].written_at);
            last.filter(|last| newest == Some(last))
                .ok_or_else(ambiguous)
        }
        (Moment::Time(_) | Moment::Lsn(_), _) => Err(ambiguous()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn life(began: Micros, bases: &[(u64, Micros)], end: u64, written_at: Micros) -> Life {
        Life {
            history: History {
                system_identifier: 7,
                began,
            },
            bases: bases.iter().map(|(at, time)| (lsn(*at), *time)).collect(),
            end: lsn(end),
            written_at: Some(written_at),
        }
    }

    #[test]
    fn the_one_that_was_alive_is_meant() {
        // A source, its successor, and the first once more.
        let lives = [
            life(0, &[(100, 5), (300, 25)], 400, 29),
            life(10, &[(50, 12)], 200, 19),
        ];
        let chosen = |moment| choose(&lives, moment).ok();
        assert_eq!(chosen(Moment::Time(7)), Some(0));
        assert_eq!(chosen(Moment::Time(27)), Some(0));
        assert_eq!(chosen(Moment::Lsn(lsn(70))), Some(1));
        assert_eq!(chosen(Moment::Lsn(lsn(300))), Some(0));
        // While both lived.
        assert_eq!(chosen(Moment::Time(15)), None);
        assert_eq!(chosen(Moment::Lsn(lsn(150))), None);
        // The older one lives longer: which of them is the past of today?
        assert_eq!(chosen(Moment::End), None);
        // Nobody leads there.
        assert_eq!(chosen(Moment::Time(99)), Some(1));
    }

    #[test]
    fn the_end_is_that_of_the_successor() {
        let lives = [
            life(0, &[(100, 5)], 400, 19),
            life(20, &[(50, 22)], 200, 30),
        ];
        assert_eq!(choose(&lives, Moment::End).ok(), Some(1));
        let both = [lives[0].clone(), lives[0].clone()];
        let error = choose(&both, Moment::Time(6)).unwrap_err();
        assert!(error.to_string().contains("7-2000"), "{error}");
    }
}
