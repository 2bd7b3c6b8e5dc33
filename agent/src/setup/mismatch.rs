//! ● Why the slot, the source and the replica do not belong together, and what a person does about it.
//!
//! Decided by [`super::identity`].
//!
//! # Invariants
//! - No hint advises to drop a replica but by [`crate::error::remedy`], which says when that loses nothing.

use crate::error::remedy::{SLOT_TOO, drop_slot, start_over};
use crate::error::{Class, Classify};
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::schema::sending;
use crate::time::{Micros, system_time};

/// Why the slot, the source and the replica do not belong together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another cluster answers under the source's URL.
    #[error(
        "the source has system identifier {found}, the replica was copied from a source with \
         {recorded}"
    )]
    SystemIdentifier {
        /// What the replica was set up from.
        recorded: u64,
        /// Who answers now.
        found: u64,
    },
    /// The source was promoted or recovered to a point in time since.
    #[error("the source is on timeline {found}, the replica was copied from timeline {recorded}")]
    Timeline {
        /// What the replica was set up from.
        recorded: i32,
        /// Who answers now.
        found: i32,
    },
    /// The source failed over to a standby that lacked what the replica has.
    #[error(
        "the source is on timeline {found}, which left timeline {recorded} at {forked}; the replica has applied up to \
         {applied}: it has transactions that the source lost"
    )]
    ForkedBefore {
        /// What the replica followed.
        recorded: i32,
        /// What the source is on.
        found: i32,
        /// Where it left the other.
        forked: PgLsn,
        /// The replica's progress.
        applied: PgLsn,
    },
    /// The source failed over to a standby, and the slot there is not the one that was followed.
    #[error(
        "the source failed over to timeline {found}, and replication slot \"{slot}\" there did not come along: it was created \
         on the new primary, or was not in step when that was promoted"
    )]
    SlotNotSynced {
        /// The slot.
        slot: StreamName,
        /// What the source is on.
        found: i32,
    },
    /// The source has less WAL than the replica has applied.
    #[error(
        "the source's WAL ends at {source_lsn}, the replica has already applied up to {applied}: \
         the source went back in time"
    )]
    BackInTime {
        /// The source's flushed WAL position.
        source_lsn: PgLsn,
        /// The replica's progress.
        applied: PgLsn,
    },
    /// The source, with its slot, is as it was before, and its WAL is longer than what was applied.
    #[error(
        "the source knows of {found} heartbeats, the replica has applied {applied}: the source went back in time"
    )]
    FewerHeartbeats {
        /// What the source has written.
        found: i64,
        /// What the replica has of it.
        applied: i64,
    },
    /// The replica has progress, the slot is gone.
    #[error("replication slot \"{slot}\" is gone; the replica is at {applied}")]
    SlotLost {
        /// The slot.
        slot: StreamName,
        /// The replica's progress.
        applied: PgLsn,
    },
    /// The stream was sent from here, and the slot is gone.
    #[error("replication slot \"{slot}\" is gone, by which the stream was sent since {since}")]
    SendingSlotLost {
        /// The slot.
        slot: StreamName,
        /// Where it began.
        since: PgLsn,
    },
    /// The slot is there, what it needs is not.
    #[error(
        "replication slot \"{slot}\" was invalidated ({}): it does not have the changes after {applied} any more",
        reason.as_deref().unwrap_or("wal_status = lost")
    )]
    SlotInvalidated {
        /// The slot.
        slot: StreamName,
        /// The replica's progress.
        applied: PgLsn,
        /// Why, where the server's version tells.
        reason: Option<String>,
    },
    /// The slot has confirmed more than we ever acknowledged.
    #[error(
        "replication slot \"{slot}\" stands at {confirmed}, the replica at {applied}: it was \
         recreated or advanced by somebody else, and the changes between are not in it"
    )]
    SlotRecreated {
        /// The slot.
        slot: StreamName,
        /// `confirmed_flush_lsn`.
        confirmed: PgLsn,
        /// The replica's progress.
        applied: PgLsn,
    },
    /// Another replica was set up under this name since.
    #[error(
        "replication slot \"{slot}\" was created for another replica: the source has noted {}, this replica \
         {}", history(*.noted), history(*.recorded)
    )]
    HistoryChanged {
        /// The slot.
        slot: StreamName,
        /// When the source's history began.
        noted: Micros,
        /// When the replica's did.
        recorded: Micros,
    },
    /// A slot of our name that this replica knows nothing of.
    #[error("replication slot \"{slot}\" exists already, and this replica knows nothing of it")]
    SlotOccupied {
        /// The slot.
        slot: StreamName,
    },
    /// A slot of our name that cannot be ours.
    #[error("replication slot \"{slot}\" is not ours: {what}")]
    SlotForeign {
        /// The slot.
        slot: StreamName,
        /// Its plugin, database or kind.
        what: String,
    },
    /// Somebody else is streaming from the slot.
    #[error("replication slot \"{slot}\" is in use by process {pid} of the source")]
    SlotActive {
        /// The slot.
        slot: StreamName,
        /// The walsender.
        pid: i32,
    },
}

/// When a history began, for people.
fn history(began: Micros) -> impl std::fmt::Display {
    format!(
        "a slot of {}",
        humantime::format_rfc3339_seconds(system_time(began))
    )
}

impl Classify for Mismatch {
    fn class(&self) -> Class {
        match self {
            // A walsender that has not noticed our death ends by itself (wal_sender_timeout).
            Self::SlotActive { .. } => Class::Transient,
            Self::SystemIdentifier { .. }
            | Self::Timeline { .. }
            | Self::ForkedBefore { .. }
            | Self::SlotNotSynced { .. }
            | Self::BackInTime { .. }
            | Self::FewerHeartbeats { .. }
            | Self::SlotLost { .. }
            | Self::SendingSlotLost { .. }
            | Self::SlotInvalidated { .. }
            | Self::SlotRecreated { .. }
            | Self::HistoryChanged { .. }
            | Self::SlotOccupied { .. }
            | Self::SlotForeign { .. } => Class::Definite,
        }
    }

    fn hint(&self) -> Option<String> {
        const KEEPS: &str = "`dr-agent promote` keeps it";
        let drop_slot = |slot: &StreamName| drop_slot(slot.as_str());
        Some(match self {
            Self::SystemIdentifier { .. } => format!(
                "check source.url: it leads to another cluster, or one restored by a dump, and the replica may hold the only \
                 copy of what its own source had. {}",
                start_over(SLOT_TOO)
            ),
            Self::Timeline { .. } => format!(
                "the source failed over to a standby (which under route kinesis cannot be followed), was recovered to a point in \
                 time, or is another branch than this replica followed; what the replica has may not be in its history: \
                 {KEEPS}. {}",
                start_over(SLOT_TOO)
            ),
            Self::ForkedBefore { .. } => format!(
                "the replica holds the only copy of what came in between: {KEEPS}. To keep a standby from being promoted \
                 without it, name its slot in synchronized_standby_slots. {}",
                start_over(SLOT_TOO)
            ),
            Self::SlotNotSynced { slot, .. } => format!(
                "what committed between the replica's position and that slot's beginning is not in it. To have it come along \
                 the next time: sync_replication_slots = on, hot_standby_feedback = on, primary_slot_name, and a dbname in \
                 primary_conninfo on the standby. {}",
                start_over(&drop_slot(slot))
            ),
            Self::BackInTime { .. } => format!(
                "the source was restored from an older backup; the replica may hold the only copy of what came after it: \
                 {KEEPS}. {}",
                start_over(SLOT_TOO)
            ),
            Self::FewerHeartbeats { .. } => format!(
                "the source was set back by a snapshot of its storage, and wrote on from there; the replica may hold the only \
                 copy of what came after it: {KEEPS}. {}",
                start_over(SLOT_TOO)
            ),
            Self::SlotLost { .. } => format!(
                "the source does not have the changes since then any more; if it is not in use or not sound, the \
                 replica is what there is: {KEEPS}. {}",
                start_over(SLOT_TOO)
            ),
            Self::SendingSlotLost { slot, .. } => format!(
                "nobody has the changes since then any more. {} (`dr-agent apply` there), after DELETE FROM {} \
                 WHERE stream = '{slot}' on the source",
                start_over(SLOT_TOO),
                sending::TABLE
            ),
            Self::SlotInvalidated { slot, reason, .. } => {
                format!(
                    "{}. {}",
                    raise(reason.as_deref()),
                    start_over(&drop_slot(slot))
                )
            }
            Self::SlotRecreated { slot, .. } => start_over(&drop_slot(slot)),
            Self::HistoryChanged { .. } => format!(
                "if that other replica is in use, give this one another source.slot. {}",
                start_over(SLOT_TOO)
            ),
            Self::SlotOccupied { slot } => format!(
                "if another dr-agent uses it, give this one another source.slot; if it is left over from a replica that is \
                 not there any more, run {}, then `dr-agent run`",
                drop_slot(slot)
            ),
            Self::SlotForeign { slot, .. } => format!(
                "choose another source.slot, or run {} if nobody needs it",
                drop_slot(slot)
            ),
            Self::SlotActive { .. } => {
                "another agent is running, or a session of this one has not \
                ended yet (wal_sender_timeout); it is retried"
                    .to_owned()
            }
        })
    }
}

/// What keeps a slot from being invalidated again for the same reason.
pub(crate) fn raise(reason: Option<&str>) -> &'static str {
    match reason {
        Some("idle_timeout") => {
            "no agent read it for as long as idle_replication_slot_timeout allows: raise that on the source, or set it to 0"
        }
        Some("wal_level_insufficient") => {
            "wal_level was lowered: set it back to logical on the source"
        }
        Some("rows_removed" | "conflicting with recovery") => {
            "rows that decoding needs were removed while the source was a standby: set hot_standby_feedback = on and \
             primary_slot_name there"
        }
        _ => "the source kept no more WAL for it: raise max_slot_wal_keep_size there",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_lost_for_a_reason_and_the_remedy_is_that_ones() {
        let hint = |reason: Option<&str>| {
            let lost = Mismatch::SlotInvalidated {
                slot: StreamName::new("dr_agent", "app"),
                applied: PgLsn::from(7),
                reason: reason.map(str::to_owned),
            };
            lost.hint().unwrap()
        };
        let cases = [
            (None, "max_slot_wal_keep_size"),
            (Some("wal_removed"), "max_slot_wal_keep_size"),
            (Some("idle_timeout"), "idle_replication_slot_timeout"),
            (Some("wal_level_insufficient"), "wal_level"),
            (Some("rows_removed"), "hot_standby_feedback"),
            (Some("conflicting with recovery"), "hot_standby_feedback"),
        ];
        for (reason, setting) in cases {
            let hint = hint(reason);
            assert!(hint.contains(setting), "{reason:?}: {hint}");
            let is_wal = setting == "max_slot_wal_keep_size";
            assert_eq!(hint.contains("max_slot_wal_keep_size"), is_wal, "{hint}");
        }
    }
}
