//! Why a database cannot be brought to where streaming can start.
//!
//! Each variant is a fact that an operator meets by itself; the hint says what to type next.

use std::fmt;

use super::mismatch::Mismatch;
use crate::archive::base::BackupError;
use crate::copy::CopyError;
use crate::error::remedy::{self, SLOT_TOO, start_over};
use crate::error::{Class, Classify};
use crate::names::TableName;
use crate::pg::PgError;
use crate::shape::computed::Difference;

/// Which server is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The server we tail.
    Source,
    /// The server we keep ready.
    Replica,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Replica => "replica",
        })
    }
}

/// Why a database cannot be brought to where streaming can start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A server refused, failed or went away.
    #[error("{side}: {doing}")]
    Sql {
        /// Which server.
        side: Side,
        /// Verb and object.
        doing: String,
        /// What it said.
        #[source]
        source: PgError,
    },
    /// A server that cannot take this part: its version, its settings, its role in another pair.
    #[error("{side}: {what}")]
    Unfit {
        /// Which server.
        side: Side,
        /// What is wrong.
        what: String,
        /// What would be right.
        hint: String,
    },
    /// The role lacks a right.
    #[error("{side}: role \"{role}\" may not {what}: it lacks {right}")]
    RightMissing {
        /// Which server.
        side: Side,
        /// Whom we connect as.
        role: String,
        /// What it was to do.
        what: String,
        /// The right.
        right: String,
    },
    /// The server does not take writes, for a moment or because it is the wrong one.
    #[error("{side}: the server is a standby, or still recovering")]
    InRecovery {
        /// Which one.
        side: Side,
    },
    /// Only a table's owner may publish it.
    #[error("source: role \"{role}\" does not own {}", some(.tables))]
    NotOwner {
        /// Whom we connect as.
        role: String,
        /// The tables.
        tables: Vec<TableName>,
    },
    /// Tables without a key, and `source.keyless = "refuse"`.
    #[error(
        "source: {} without a primary key or replica identity: {}",
        count(.0.len(), "table"), some(.0)
    )]
    Keyless(Vec<TableName>),
    /// The publication of a running stream was dropped, or altered in a way that lost changes.
    #[error("source: publication \"{publication}\" was changed by somebody: {what}")]
    PublicationAltered {
        /// Its name; the slot has the same.
        publication: String,
        /// In which way.
        what: String,
    },
    /// Decoders do not go by the publication as it is yet.
    #[error(
        "source: publication \"{publication}\" was altered, and decoding does not go by it yet"
    )]
    ListIsNew {
        /// Its name.
        publication: String,
    },
    /// The replica was promoted; it is a primary now.
    #[error("this replica was promoted at {at} (term {term}, {mode})")]
    Promoted {
        /// When the promotion began, UTC.
        at: String,
        /// The term it raised.
        term: i64,
        /// Failover or switchover.
        mode: String,
    },
    /// Slot, source and replica do not belong together.
    #[error("database \"{database}\" cannot go on")]
    Mismatch {
        /// The database.
        database: String,
        /// Why.
        #[source]
        source: Mismatch,
    },
    /// There is something in the replica's database that we have not put there.
    #[error(
        "replica: database \"{database}\" is not empty: {} of unknown origin: {}",
        count(.objects.len(), "object"), some(.objects)
    )]
    ReplicaNotEmpty {
        /// The database.
        database: String,
        /// Objects found.
        objects: Vec<String>,
    },
    /// The database under `replica.url` is the source of streams itself.
    #[error(
        "replica: database \"{database}\" is itself a source, of {}", some(.streams)
    )]
    ReplicaIsSource {
        /// The database.
        database: String,
        /// The streams that are sent from it.
        streams: Vec<String>,
    },
    /// The database under `source.url` is a replica, which only its agent writes to.
    #[error("source: it is itself the replica of {}, and was not promoted", some(.streams))]
    SourceIsReplica {
        /// The streams that are applied there.
        streams: Vec<String>,
    },
    /// The database is the replica of a stream of another name.
    #[error(
        "replica: database \"{database}\" is the replica of {}, not of {stream}", some(.others)
    )]
    ReplicaOfAnother {
        /// The database.
        database: String,
        /// Our stream.
        stream: String,
        /// Those it is of.
        others: Vec<String>,
    },
    /// The tables are there, and where they stand is not known any more.
    #[error(
        "replica: the progress row of stream \"{stream}\" in database \"{database}\" is gone; its tables are there"
    )]
    ProgressGone {
        /// The database.
        database: String,
        /// The stream.
        stream: String,
    },
    /// Somebody dropped or renamed tables on the replica.
    #[error("replica: {} missing: {}", count(.0.len(), "table"), some(.0))]
    ReplicaTableMissing(Vec<TableName>),
    /// Another agent works on the same stream.
    #[error("{side}: another agent works on stream \"{stream}\"")]
    Busy {
        /// Where it holds the right to it.
        side: Side,
        /// The stream.
        stream: String,
    },
    /// The session has ended that held the right to work on the stream; another agent may have it now.
    #[error("{side}: the session is lost that holds the right to the stream")]
    RightLost {
        /// Where it held it.
        side: Side,
        /// How it ended.
        #[source]
        source: PgError,
    },
    /// The initial copy failed.
    #[error("copy of database \"{database}\"")]
    Copy {
        /// The database.
        database: String,
        /// Why.
        #[source]
        source: Box<CopyError>,
    },
    /// The replica's first rows have to come from the source, and nothing is sent from there yet.
    #[error("source: stream \"{stream}\" is not sent yet")]
    NotSent {
        /// The stream.
        stream: String,
    },
    /// Neither the source nor an archive can give the replica its first rows.
    #[error("nothing to copy database \"{database}\" from: {why}")]
    NothingToCopyFrom {
        /// The database.
        database: String,
        /// Why the source and the archive cannot.
        why: String,
    },
    /// Columns are computed from something else on the source, or of another domain, which the stream does not tell.
    #[error("{}", some(.0))]
    Computed(Vec<Difference>),
    /// A table has come that the replica does not have, and its source cannot be asked.
    #[error("table {table} is new on the source, which cannot be reached from here to copy it")]
    NewTableElsewhere {
        /// Which one.
        table: TableName,
        /// Why not.
        #[source]
        source: Box<SetupError>,
    },
    /// The archive could not give the replica its first rows.
    #[error("copy of database \"{database}\" from the archive")]
    Base {
        /// The database.
        database: String,
        /// Why.
        #[source]
        source: Box<BackupError>,
    },
    /// The agent was told to stop; the next start goes on from here.
    #[error("stopped while setting up")]
    Stopped,
    /// A partition that is replicated has to be copied again with one that came late. The next start does that.
    #[error(
        "a partition beside {0} came late, and the rows of both cannot be told from one another: both are copied again"
    )]
    CopiedTogether(TableName),
    /// A table that is replicated is another one on the source, or was not published for a while. The next start leaves it out.
    #[error("table {0} is not the one on the source that was copied: it is copied again")]
    ListedAnew(TableName),
}

impl SetupError {
    /// Whether nothing is known of that server, rather than something that is in the way there.
    pub(super) fn is_out_of_reach(&self, of: Side) -> bool {
        match self {
            Self::Sql { side, source, .. } => {
                *side == of && source.sqlstate().is_none() && source.class() == Class::Transient
            }
            _ => false,
        }
    }

    /// Gives an error of `side` the context of what was being done.
    pub(super) fn sql(side: Side, doing: &str) -> impl FnOnce(PgError) -> Self + '_ {
        move |source| Self::Sql {
            side,
            doing: doing.to_owned(),
            source,
        }
    }
}

impl Classify for SetupError {
    fn class(&self) -> Class {
        match self {
            Self::Sql { source, .. } => source.class(),
            Self::Mismatch { source, .. } => source.class(),
            Self::Copy { source, .. } => source.class(),
            Self::Base { source, .. } => source.class(),
            Self::Busy { .. }
            | Self::InRecovery { .. }
            | Self::RightLost { .. }
            | Self::Stopped
            | Self::CopiedTogether(_)
            | Self::ListedAnew(_)
            | Self::ListIsNew { .. }
            | Self::NotSent { .. }
            | Self::NothingToCopyFrom { .. }
            | Self::NewTableElsewhere { .. } => Class::Transient,
            Self::Promoted { .. } => Class::Fenced,
            Self::Unfit { .. }
            | Self::RightMissing { .. }
            | Self::NotOwner { .. }
            | Self::Keyless(_)
            | Self::PublicationAltered { .. }
            | Self::ReplicaNotEmpty { .. }
            | Self::ReplicaIsSource { .. }
            | Self::SourceIsReplica { .. }
            | Self::ReplicaOfAnother { .. }
            | Self::ProgressGone { .. }
            | Self::Computed(_)
            | Self::ReplicaTableMissing(_) => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Sql { source, .. } => return source.hint(),
            Self::Mismatch { source, .. } => return source.hint(),
            Self::Copy { source, .. } => return source.hint(),
            Self::Base { source, .. } => return source.hint(),
            Self::Stopped | Self::CopiedTogether(_) | Self::ListedAnew(_) => return None,
            Self::ListIsNew { .. } => "`dr-agent run` sees to it when it starts, once the transactions that ran then have ended; \
                restart it if it does not; it is retried"
                .to_owned(),
            Self::NotSent { .. } => {
                "start `dr-agent run` with the same configuration on the source's side; it is retried".to_owned()
            }
            Self::NothingToCopyFrom { .. } => "let source.url lead to the source from here as well, or give both sides an \
                [archive] and wait for the first base backup; it is retried"
                .to_owned(),
            Self::NewTableElsewhere { .. } => format!(
                "let source.url lead to the source from here until the table is copied; or leave the table out \
                 (source.exclude, on both sides). Once the archive's newest base backup has the table, another way: {}",
                remedy::start_over_with(None, "`dr-agent apply`, which begins anew from it")
            ),
            Self::Unfit { hint, .. } => hint.clone(),
            Self::InRecovery { side: Side::Source } => "point source.url at the primary; with several hosts in the URL, add \
                target_session_attrs=read-write. It is tried again"
                .to_owned(),
            Self::InRecovery { side: Side::Replica } => "the replica takes the agent's writes: point replica.url at a primary. \
                It is tried again"
                .to_owned(),
            Self::RightMissing { side, right, .. } => format!(
                "grant {right}, or run `dr-agent init --{side}-url URL` once with a role that has \
                 it; `dr-agent init --plan` prints the SQL"
            ),
            Self::NotOwner { .. } => "publishing a table needs its ownership: run `dr-agent init \
                --source-url URL` once as a superuser or the owner, or GRANT the owning role to \
                ours"
                .to_owned(),
            Self::Keyless(_) => "published like this, their UPDATE and DELETE would fail on the \
                source; a key with a generated column is none before 18, which does not send it. Add a primary key; or set source.keyless = \"full\" (REPLICA IDENTITY FULL, \
                slower); or source.keyless = \"exclude\" (left out, unprotected); or name them in \
                source.exclude"
                .to_owned(),
            Self::PublicationAltered { publication, .. } => format!(
                "changes may have been missed since. {}",
                start_over(&format!(
                    "{} (DROP PUBLICATION {publication} as well if it is still there)",
                    remedy::drop_slot(publication)
                ))
            ),
            Self::Promoted { .. } => "it takes writes of its own and is not touched. Stop this \
                agent for good; to protect the new primary, set up an agent next to it with a fresh \
                replica"
                .to_owned(),
            Self::ReplicaNotEmpty { .. } => "replica.url leads to a database that somebody uses, or one that was renamed or \
                promoted: nothing was written there. Point replica.url at another server, or rename what is there; the copy \
                goes into an empty database, or one that is not there yet"
                .to_owned(),
            Self::SourceIsReplica { .. } | Self::ReplicaIsSource { .. } => "source.url and replica.url may be swapped: nothing was written there. Let \
                source.url lead to the server that applications write to, and replica.url to the one that is kept ready"
                .to_owned(),
            Self::ReplicaOfAnother { .. } => "source.slot was changed, or the database renamed: nothing was written there. \
                Give source.slot and the database their names back; or let the copy go into another database or server"
                .to_owned(),
            Self::ProgressGone { .. } => format!(
                "somebody deleted it: {}. Put the row back if you know it (a backup of the replica has it). {}",
                remedy::STAY,
                start_over(SLOT_TOO)
            ),
            Self::Computed(differences) => format!(
                "DDL ran on one side only: make the same ALTER TABLE on the replica (SET default_transaction_read_only = off), \
                 then start the agent again. Where a column became a generated one, or ceased to be one, copy the table again \
                 as well. {}",
                remedy::copy_again(differences.first().map(|one| one.table.name.as_str()))
            ),
            Self::ReplicaTableMissing(tables) => format!(
                "they were copied once and are gone from the replica. {}",
                remedy::copy_again(tables.first().map(|table| table.name.as_str()))
            ),
            Self::RightLost { .. } => {
                "it is taken again; if that repeats, look for what ends sessions: idle_session_timeout, a pooler, a firewall"
                    .to_owned()
            }
            Self::Busy { .. } => {
                "only one agent may run per stream; it is retried until the other has ended"
                    .to_owned()
            }
        })
    }
}

/// How many names an error lists before it counts the rest.
const NAMES_MAX: usize = 8;

fn some(names: &[impl fmt::Display]) -> String {
    let mut text = names
        .iter()
        .take(NAMES_MAX)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > NAMES_MAX {
        text.push_str(&format!(" and {} more", names.len() - NAMES_MAX));
    }
    text
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_keyless_tables_fit_one_readable_line() {
        let tables: Vec<TableName> = (0..1000)
            .map(|n| TableName {
                schema: "public".to_owned(),
                name: format!("t{n}"),
            })
            .collect();
        let text = SetupError::Keyless(tables).to_string();
        assert!(text.starts_with("source: 1000 tables without"), "{text}");
        assert!(text.ends_with("public.t7 and 992 more"), "{text}");
    }

    #[test]
    fn only_a_promotion_fences() {
        let promoted = SetupError::Promoted {
            at: "2026-01-01T00:00:00Z".to_owned(),
            term: 2,
            mode: "failover".to_owned(),
        };
        assert_eq!(promoted.class(), Class::Fenced);
        let keyless = SetupError::Keyless(Vec::new());
        assert_eq!(keyless.class(), Class::Definite);
        assert!(keyless.hint().is_some());
    }
}
