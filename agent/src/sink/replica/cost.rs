//! ● What an error on the way into the replica costs: one table, or the database.
//!
//! Pure. One table's trouble is what would be over if that table were copied again, created anew where needed: its type, a row that
//! is not there, a constraint, a trigger. Whoever can copy sets the table aside for it and goes on; see [`SinkError::costs`].
//!
//! # Invariants
//! - What concerns the right to apply at all (a promotion, another agent, the progress row) is no table's.
//! - What may be over by itself is no table's either: it is tried again.
//! - Nor is anything of the tables of dr-agent: without them nobody knows where the replica stands.

use super::SinkError;
use super::relations::OURS;
use super::unfit::Misfit;
use crate::error::{Class, Classify as _};
use crate::names::TableName;
use crate::pg::PgError;

/// A table that costs itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Which one.
    pub table: TableName,
    /// Its definition on the replica is in the way: rows alone would not do.
    pub of_definition: bool,
    /// A right is missing, perhaps of every table.
    pub of_a_right: bool,
}

impl SinkError {
    /// The table that this error costs; none where it is not one table's.
    pub fn costs(&self) -> Option<Cost> {
        if self.class() != Class::Definite {
            return None;
        }
        let table = self.table().filter(|table| table.schema != OURS)?.clone();
        let (of_definition, of_a_right) = match self.cause() {
            Self::Unfit(unfit) => (unfit.why != Misfit::KeyNotSent, false),
            Self::TableMissing { .. } | Self::ColumnMissing { .. } | Self::BinaryForm { .. } => {
                (true, false)
            }
            Self::Diverged(_) | Self::Swallowed(_) | Self::Refused { .. } | Self::Fold(_) => {
                (false, false)
            }
            Self::Pg(PgError::Server(error)) if is_of_the_server(&error.sqlstate) => return None,
            Self::Pg(PgError::Server(error)) => (false, error.sqlstate == "42501"),
            Self::Fenced(_)
            | Self::ProgressGone(_)
            | Self::PositionMismatch(_)
            | Self::TableNotCopied { .. }
            | Self::TruncatedInPart { .. }
            | Self::PartitionMissing { .. }
            | Self::At(..)
            | Self::Unplannable(_)
            | Self::Interrupted
            | Self::Event(_)
            | Self::Command { .. }
            | Self::Spill(_)
            | Self::Pg(_) => return None,
        };
        Some(Cost {
            table,
            of_definition,
            of_a_right,
        })
    }
}

impl SinkError {
    /// For whoever sees that a table was set aside for it: what may be behind it, and what is to be done where copying the table
    /// again is not enough.
    pub fn behind_it(&self) -> &'static str {
        match self.cause() {
            Self::Unfit(unfit) if unfit.why == Misfit::KeyNotSent => {
                "ALTER TABLE … REPLICA IDENTITY FULL on the source, or leave the table out with source.exclude"
            }
            Self::Unfit(_) | Self::TableMissing { .. } | Self::ColumnMissing { .. } => {
                "DDL ran on one side only, and the table is created anew; where views depend on the replica's table, make the same \
                 ALTER TABLE there (SET default_transaction_read_only = off)"
            }
            Self::Diverged(_) => {
                "a row is not there as the source had it: somebody wrote to the replica, a trigger there that fires ALWAYS did, or it \
                 is an error of dr-agent. Find out which; if nobody did, report it with the table's definition"
            }
            Self::Swallowed(_) => {
                "a trigger or a rule of the replica's that fires ALWAYS does away with rows; created anew, the table is without it"
            }
            Self::Refused { .. } => {
                "the replica has a constraint, or rows, that the source does not have; created anew, the table is without them"
            }
            Self::Fold(_) => "the change stream contradicts itself: report it",
            _ => {
                "the replica does not take what the source has: a type that is not the same there, a trigger, an index; compare \
                 both sides with `dr-agent check`"
            }
        }
    }
}

/// SQLSTATEs that say nothing of the table they were met at: no database, no way in, a file of the installation.
fn is_of_the_server(state: &str) -> bool {
    const CLASSES: [&str; 7] = ["08", "28", "3D", "53", "57", "58", "F0"];
    CLASSES.iter().any(|class| state.starts_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::net::FoldError;
    use crate::flow::testing::lsn;
    use crate::pg::ServerError;
    use crate::sink::replica::{Place, Unfit};

    fn name(schema: &str) -> TableName {
        TableName {
            schema: schema.to_owned(),
            name: "t".to_owned(),
        }
    }

    fn server(sqlstate: &str, table: Option<&str>) -> PgError {
        PgError::Server(Box::new(ServerError {
            sqlstate: sqlstate.to_owned(),
            table: table.map(str::to_owned),
            ..ServerError::default()
        }))
    }

    fn at(schema: &str, error: SinkError) -> SinkError {
        error.at(Place {
            table: name(schema),
            column: None,
            commit_lsn: lsn(7),
        })
    }

    #[test]
    fn what_copying_the_table_again_would_heal_costs_the_table_and_nothing_else_does() {
        let unfit = |why| {
            SinkError::Unfit(Box::new(Unfit {
                table: name("public"),
                column: "c".to_owned(),
                why,
            }))
        };
        let of = |sqlstate: &str| SinkError::from(server(sqlstate, None));
        // What, the error, and whether it is of the definition.
        let costing: Vec<(&str, SinkError, bool)> = vec![
            ("generated here", unfit(Misfit::GeneratedHere), true),
            ("half a key", unfit(Misfit::KeyNotSent), false),
            (
                "no table",
                SinkError::TableMissing {
                    table: name("public"),
                },
                true,
            ),
            (
                "no column",
                SinkError::ColumnMissing {
                    table: name("public"),
                    column: "c".to_owned(),
                },
                true,
            ),
            ("a row that is not there", at("public", of("DR003")), false),
            ("a trigger", at("public", of("DR005")), false),
            ("a constraint", at("public", of("23505")), false),
            (
                "a constraint that is looked at in the end",
                SinkError::from(server("23505", Some("public.t"))),
                false,
            ),
            ("a value", at("public", of("22P02")), false),
            (
                "an exception of a trigger",
                at("public", of("P0001")),
                false,
            ),
            ("an index that is damaged", at("public", of("XX002")), false),
            (
                "a row too large for an index",
                at("public", of("54000")),
                false,
            ),
            (
                "no identity",
                at(
                    "public",
                    SinkError::Fold(FoldError::NoIdentity {
                        table: "public.t".to_owned(),
                    }),
                ),
                false,
            ),
        ];
        for (what, error, of_definition) in &costing {
            let expected = Cost {
                table: name("public"),
                of_definition: *of_definition,
                of_a_right: false,
            };
            assert_eq!(error.costs(), Some(expected), "{what}");
        }
        assert!(at("public", of("42501")).costs().unwrap().of_a_right);
        let others = [
            ("fenced", at("public", of("DR001"))),
            ("another agent", at("public", of("DR002"))),
            ("no progress row", at("public", of("DR004"))),
            ("a full disk", at("public", of("53100"))),
            ("a lock", at("public", of("55P03"))),
            ("no database", at("public", of("3D000"))),
            ("a file of the installation", at("public", of("58P01"))),
            (
                "a lost connection",
                at("public", SinkError::Pg(PgError::Closed)),
            ),
            ("no table is named", of("23505")),
            ("nobody is named", of("P0001")),
            ("ours", at("dr_agent", of("22P02"))),
            (
                "what is copied as it is",
                SinkError::TableNotCopied {
                    table: name("public"),
                },
            ),
        ];
        for (what, error) in others {
            assert_eq!(error.costs(), None, "{what}");
        }
    }
}
