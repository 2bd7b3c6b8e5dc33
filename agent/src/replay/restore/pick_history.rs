//! ● Which history a restore is of, where the archive has several of a stream.
//!
//! Pure. A source that was built anew, restored or failed over begins another history under the same name; so does the replica
//! of yesterday once it is the source. Usually one of them was alive at the moment that is asked for, and that one is meant.
//!
//! # Invariants
//! - Where more than one may be meant, nothing is guessed: a person says which.

use super::RestoreError;
use super::moment::RestoreMoment;
use crate::names::history::History;
use crate::pg::PgLsn;
use crate::time::Micros;

/// One history, as far as choosing one is concerned.
#[derive(Clone, Debug)]
pub(super) struct ArchivedLife {
    pub(super) history: History,
    /// Its base backups, oldest first.
    pub(super) bases: Vec<(PgLsn, Micros)>,
    /// How far its log leads.
    pub(super) end: PgLsn,
    /// When something of it was written last, by the store's clock.
    pub(super) written_at: Option<Micros>,
}

impl ArchivedLife {
    /// Whether it leads to the moment, as far as can be told without reading it.
    fn leads_to(&self, moment: RestoreMoment) -> bool {
        let has_base = |is: &dyn Fn(PgLsn, Micros) -> bool| {
            self.bases.iter().any(|(lsn, time)| is(*lsn, *time))
        };
        match moment {
            RestoreMoment::End => !self.bases.is_empty(),
            RestoreMoment::Time(moment) => {
                has_base(&|_, time| time <= moment)
                    && self
                        .written_at
                        .is_none_or(|written_at| written_at >= moment)
            }
            RestoreMoment::Lsn(moment) => has_base(&|lsn, _| lsn <= moment) && self.end >= moment,
        }
    }
}

/// Chooses by the name that was asked for, or else by the moment; `lives` are in the order in which they began, and there is
/// at least one.
///
/// # Errors
/// [`RestoreError::NoHistory`], [`RestoreError::WhichHistory`]
pub(super) fn choose(
    lives: &[ArchivedLife],
    moment: RestoreMoment,
    asked: Option<History>,
) -> Result<usize, RestoreError> {
    match asked {
        Some(asked) => {
            let chosen = lives.iter().position(|life| life.history == asked);
            chosen.ok_or_else(|| RestoreError::NoHistory {
                asked,
                known: lives.iter().map(|life| life.history).collect(),
            })
        }
        None => by_moment(lives, moment),
    }
}

fn by_moment(lives: &[ArchivedLife], moment: RestoreMoment) -> Result<usize, RestoreError> {
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
        (RestoreMoment::End, _) => {
            let newest = leading.iter().max_by_key(|i| lives[**i].written_at);
            last.filter(|last| newest == Some(last))
                .ok_or_else(ambiguous)
        }
        (RestoreMoment::Time(_) | RestoreMoment::Lsn(_), _) => Err(ambiguous()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::testing::lsn;

    fn life(began: Micros, bases: &[(u64, Micros)], end: u64, written_at: Micros) -> ArchivedLife {
        ArchivedLife {
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
        let chosen = |moment| choose(&lives, moment, None).ok();
        assert_eq!(chosen(RestoreMoment::Time(7)), Some(0));
        assert_eq!(chosen(RestoreMoment::Time(27)), Some(0));
        assert_eq!(chosen(RestoreMoment::Lsn(lsn(70))), Some(1));
        assert_eq!(chosen(RestoreMoment::Lsn(lsn(300))), Some(0));
        // While both lived.
        assert_eq!(chosen(RestoreMoment::Time(15)), None);
        assert_eq!(chosen(RestoreMoment::Lsn(lsn(150))), None);
        // The older one lives longer: which of them is the past of today?
        assert_eq!(chosen(RestoreMoment::End), None);
        // Nobody leads there.
        assert_eq!(chosen(RestoreMoment::Time(99)), Some(1));
    }

    #[test]
    fn the_one_that_is_named_is_meant_whatever_it_leads_to() {
        let lives = [life(0, &[(100, 5)], 400, 29), life(10, &[], 200, 19)];
        for (at, life) in lives.iter().enumerate() {
            let chosen = choose(&lives, RestoreMoment::Lsn(lsn(350)), Some(life.history));
            assert_eq!(chosen.ok(), Some(at));
        }
        let other = life(11, &[], 0, 0).history;
        let error = choose(&lives, RestoreMoment::End, Some(other)).unwrap_err();
        assert!(
            matches!(error, RestoreError::NoHistory { asked, ref known } if asked == other && known.len() == 2),
            "{error}"
        );
    }

    #[test]
    fn the_end_is_that_of_the_successor() {
        let lives = [
            life(0, &[(100, 5)], 400, 19),
            life(20, &[(50, 22)], 200, 30),
        ];
        assert_eq!(choose(&lives, RestoreMoment::End, None).ok(), Some(1));
        let both = [lives[0].clone(), lives[0].clone()];
        let error = choose(&both, RestoreMoment::Time(6), None).unwrap_err();
        assert!(error.to_string().contains("7-2000"), "{error}");
    }
}
