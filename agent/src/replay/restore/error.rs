//! Why a restore did not come to its end.

use super::moment::RestoreMoment;
use crate::archive::base::BackupError;
use crate::archive::log::ArchiveError;
use crate::cloud::store::StoreError;
use crate::copy::locale::Locale;
use crate::error::{Because, Class, Classify, hands_on};
use crate::flow::spill::SpillError;
use crate::names::history::History;
use crate::pg::pgoutput::DecodeError;
use crate::pg::quote::quote_literal;
use crate::pg::{ConnInfoError, PgError, PgLsn};
use crate::replay::ReplayError;
use crate::sink::replica::{Misfit, SinkError};
use crate::source::SourceError;
use crate::time::{Micros, system_time};

/// Why a restore did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The configuration names no archive.
    #[error("there is no [archive] in the configuration")]
    NoArchive,
    /// The URL of the target cannot be used.
    #[error("--target")]
    TargetUrl(#[source] ConnInfoError),
    /// A table that was asked for is no SQL name.
    #[error("--table {0} does not name a table")]
    TableName(String),
    /// Which database is not clear.
    #[error("there may be several databases in the archive{}", named(.0))]
    WhichDatabase(Vec<String>),
    /// The archive knows nothing of it.
    #[error("the archive has no base backup of database \"{0}\"")]
    NothingOf(String),
    /// The archive has no such history.
    #[error("the archive has no base backup of history {asked}; it has{}", listed(.known))]
    NoHistory {
        /// What was asked for.
        asked: History,
        /// What there is.
        known: Vec<History>,
    },
    /// More than one history may be meant.
    #[error("several histories of the database lead to {moment}:{}", listed(.histories))]
    WhichHistory {
        /// What was asked for.
        moment: RestoreMoment,
        /// Those that do, in the order in which they began.
        histories: Vec<History>,
    },
    /// No base backup is old enough.
    #[error("no base backup leads to {moment}{}", since(.oldest))]
    NoBase {
        /// What was asked for.
        moment: RestoreMoment,
        /// When the oldest base backup was taken.
        oldest: Option<Micros>,
    },
    /// Nothing proves that the log reaches the moment.
    #[error("the change log ends at {end}, before {moment}")]
    LogEnds {
        /// Where it ends.
        end: PgLsn,
        /// What was asked for.
        moment: RestoreMoment,
    },
    /// An interrupted restore went further than the moment that is asked for now.
    #[error("the target already is at {at}, behind {moment}")]
    TooFar {
        /// How far it is.
        at: PgLsn,
        /// What was asked for.
        moment: RestoreMoment,
    },
    /// An interrupted restore was of other tables.
    #[error("the restore that was interrupted in the target was of other tables")]
    OtherTables,
    /// Something is in the target.
    #[error("the target is not empty: it has {}", shown(objects))]
    NotEmpty {
        /// What is in it.
        objects: Vec<String>,
    },
    /// What is in the target, a restore of something else has put there.
    #[error(
        "the target holds a restore that was interrupted, of another database or source ({stream} of history {history})"
    )]
    OtherRestore {
        /// Under which name it worked.
        stream: String,
        /// What its LSNs are of.
        history: String,
    },
    /// The target has another encoding.
    #[error("the target's encoding is {target}, the source's was {}", wanted.encoding)]
    Encoding {
        /// The source's encoding and locale.
        wanted: Box<Locale>,
        /// The target's encoding.
        target: String,
    },
    /// Another restore works on the target.
    #[error("another dr-agent works on the target")]
    Busy,
    /// A table that was asked for is not in the base backup.
    #[error("the base backup has no table {0}")]
    NoTable(String),
    /// The target refused.
    #[error("{doing} (target)")]
    Target {
        /// What was to be done.
        doing: &'static str,
        /// Why it was not.
        #[source]
        source: PgError,
    },
    /// The archive.
    #[error("read the change log")]
    Archive(#[from] ArchiveError),
    /// The store.
    #[error("use the archive")]
    Store(#[from] StoreError),
    /// A record makes no sense.
    #[error("read the change log")]
    Decode(#[from] DecodeError),
    /// The target could not take the log.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// Another part failed: the base backup, the messages of the log, room for large transactions.
    #[error(transparent)]
    Because(Because),
}

hands_on!(RestoreError:
    BackupError => "restore the base backup",
    SourceError => "read the change log",
    SpillError => "open the spill directory",
);

fn named(names: &[String]) -> String {
    match names {
        [] => String::new(),
        names => format!(": {}", names.join(", ")),
    }
}

fn listed(histories: &[History]) -> String {
    let each = histories.iter().map(|history| format!(" {history}"));
    each.collect::<Vec<_>>().join(",")
}

fn since(oldest: &Option<Micros>) -> String {
    oldest.map_or_else(String::new, |time| {
        let time = humantime::format_rfc3339_micros(system_time(time));
        format!("; the oldest is of {time}")
    })
}

fn shown(objects: &[String]) -> String {
    const SHOWN_MAX: usize = 10;
    let mut text = objects[..objects.len().min(SHOWN_MAX)].join(", ");
    if objects.len() > SHOWN_MAX {
        text.push_str(&format!(" and {} more", objects.len() - SHOWN_MAX));
    }
    text
}

impl RestoreError {
    /// Whether the command line or the configuration is wrong.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::NoArchive | Self::TargetUrl(_) | Self::TableName(_) | Self::WhichDatabase(_)
        )
    }

    /// The target refused to do this.
    pub(super) fn target(doing: &'static str) -> impl FnOnce(PgError) -> Self {
        move |source| Self::Target { doing, source }
    }
}

impl Classify for RestoreError {
    fn class(&self) -> Class {
        match self {
            Self::Target { source, .. } => source.class(),
            Self::Archive(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Replay(error) => error.class(),
            Self::Because(error) => error.class(),
            _ => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Target { source, .. } if source.sqlstate() == Some("3D000") => {
                "create the database first, empty: createdb -T template0, with the encoding and locale of the source"
            }
            Self::Target { source, .. } => return source.hint(),
            Self::Archive(error) => return error.hint(),
            Self::Store(error) => return error.hint(),
            Self::Because(error) => return error.hint(),
            Self::Replay(ReplayError::Sink(error)) => match error.cause() {
                SinkError::TruncatedInPart { .. } | SinkError::PartitionMissing { .. } => {
                    "restore to a moment before that, or behind the next base backup (dr-agent backup --list); or all other \
                     tables, with --table"
                }
                SinkError::TableNotCopied { .. } => {
                    "the table came after this base backup, or took the place of another one or was not published for a while \
                     behind it, and what is missing of it is in no log: restore to a moment behind the next base backup \
                     (dr-agent backup --list), or before that; or all other tables, with --table"
                }
                SinkError::BinaryForm { .. } => {
                    "the column's type was changed after this base backup, and DDL is in no log: restore to a moment before \
                     that, or behind the next base backup"
                }
                SinkError::Unfit(unfit) if unfit.why != Misfit::KeyNotSent => {
                    "the column's type was changed after this base backup, and DDL is in no log: restore to a moment before \
                     that, or behind the next base backup; or make the same ALTER TABLE here and run the same command again"
                }
                // What the sink would say is of a replica.
                SinkError::Diverged(_) => {
                    "the change log does not fit this base backup: read both with dr-agent backup --verify, restore a moment \
                     that another base backup leads to, and report it"
                }
                _ => return error.hint(),
            },
            Self::Replay(error) => return error.hint(),
            Self::NoArchive => "write [archive] with its url",
            Self::WhichDatabase(_) => "name one with --database",
            Self::NoHistory { .. } => "dr-agent backup --list shows the histories there are",
            Self::WhichHistory { .. } => {
                "name one with --history; its name ends with when its slot was created. dr-agent backup --list shows the base \
                 backups of each"
            }
            Self::NothingOf(_) => "dr-agent backup --list shows what there is",
            Self::NoBase { .. } => "dr-agent backup --list shows the base backups",
            Self::LogEnds { .. } => {
                "without --to-time and --to-lsn everything is restored that the archive has; if the agent \
                 still runs, the next segment may be on its way"
            }
            Self::TooFar { .. } | Self::OtherTables => {
                "restore into another database, created for it: CREATE DATABASE … TEMPLATE template0"
            }
            Self::NotEmpty { .. } => {
                "restore builds an empty database: create one (CREATE DATABASE … TEMPLATE template0)"
            }
            Self::OtherRestore { .. } => {
                "if nobody needs it, drop the database and create it again from template0"
            }
            Self::Encoding { wanted, .. } => {
                return Some(format!(
                    "restore into a database created by CREATE DATABASE … TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
                    quote_literal(&wanted.encoding),
                    quote_literal(&wanted.collate),
                    quote_literal(&wanted.ctype),
                ));
            }
            Self::Busy => "wait for it, or end it",
            Self::TableName(_) => {
                "write it as in SQL: schema.table, in double quotes where SQL needs them"
            }
            Self::NoTable(_) => {
                "the base's manifest.json lists the tables there are; a name in capital letters needs double quotes, as in SQL"
            }
            Self::TargetUrl(_) | Self::Decode(_) => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    /// Class, hint and the beginning of the text.
    fn of(error: &impl Classify) -> (Class, Option<String>) {
        (error.class(), error.hint())
    }

    #[test]
    fn what_other_parts_say_is_handed_on() {
        let backup = || BackupError::NotFound {
            base: "b/".to_owned(),
        };
        let full = || SpillError::Full { limit: 1 };
        let waits = || SourceError::TooMuchWaits { limit: 1 };
        let store = || StoreError::Torn {
            object: "o".to_owned(),
        };
        let log = || ArchiveError::Lost {
            object: "o".to_owned(),
        };
        let cases = [
            (
                RestoreError::from(backup()),
                of(&backup()),
                "restore the base backup: there is no base backup b/",
            ),
            (full().into(), of(&full()), "open the spill directory: "),
            (waits().into(), of(&waits()), "read the change log: "),
            (store().into(), of(&store()), "use the archive: write o: "),
            (log().into(), of(&log()), "read the change log: o, which"),
        ];
        for (error, expected, begins) in cases {
            assert!(expected.1.is_some(), "{begins}");
            assert_eq!(of(&error), expected, "{begins}");
            assert!(chain(&error).starts_with(begins), "{}", chain(&error));
        }
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        let lsn = PgLsn::from(1);
        let moment = RestoreMoment::End;
        let history = History {
            system_identifier: 7,
            began: 0,
        };
        let locale = Locale {
            encoding: "UTF8".to_owned(),
            provider: crate::copy::locale::Provider::Libc,
            collate: "C".to_owned(),
            ctype: "C.UTF-8".to_owned(),
            owner: "app".to_owned(),
            icu_rules: None,
        };
        let refusals = [
            (RestoreError::NoArchive, "[archive]"),
            (RestoreError::WhichDatabase(vec![]), "--database"),
            (
                RestoreError::NoHistory {
                    asked: history,
                    known: vec![],
                },
                "backup --list",
            ),
            (
                RestoreError::WhichHistory {
                    moment,
                    histories: vec![history],
                },
                "--history",
            ),
            (RestoreError::NothingOf("app".to_owned()), "backup --list"),
            (
                RestoreError::NoBase {
                    moment,
                    oldest: None,
                },
                "backup --list",
            ),
            (RestoreError::LogEnds { end: lsn, moment }, "--to-time"),
            (
                RestoreError::TooFar { at: lsn, moment },
                "TEMPLATE template0",
            ),
            (RestoreError::OtherTables, "TEMPLATE template0"),
            (
                RestoreError::NotEmpty { objects: vec![] },
                "TEMPLATE template0",
            ),
            (
                RestoreError::OtherRestore {
                    stream: "s".to_owned(),
                    history: "h".to_owned(),
                },
                "if nobody needs it",
            ),
            (
                RestoreError::Encoding {
                    wanted: Box::new(locale),
                    target: "LATIN1".to_owned(),
                },
                "ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C.UTF-8'",
            ),
            (RestoreError::Busy, "wait for it"),
            (RestoreError::TableName("t".to_owned()), "schema.table"),
            (RestoreError::NoTable("t".to_owned()), "manifest.json"),
        ];
        for (error, words) in refusals {
            let hint = error.hint().unwrap_or_default();
            assert!(hint.contains(words), "{error}: {hint}");
            assert_eq!(error.class(), Class::Definite, "{error}");
        }
    }
}
