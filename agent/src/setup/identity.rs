//! Whether the slot, the source and the replica belong together: the verdict at every start.
//!
//! Pure. [`super::prepare`] observes both sides, asks here, and acts on the answer. A wrong "resume"
//! here would be a silent gap in the replica, so whatever is not understood is refused.
//!
//! # Invariants
//! - "Resume" is answered only when the slot exists, is usable, has confirmed nothing beyond the
//!   replica's progress, and source and replica are on the same history (system identifier,
//!   timeline, position).
//! - A slot is given up for dropping only when the replica says that this stream began to be set up
//!   and never got as far as a progress row: then nothing depends on it.
//!
//! # What it does not do
//! It knows nothing of promotions: a promoted replica is refused before this is asked.

use crate::error::{Class, Classify};
use crate::history::History;
use crate::lag::{Micros, system_time};
use crate::pg::PgLsn;
use crate::pg::slot::SlotState;
use crate::stream::StreamName;

/// What both sides say about one stream.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The stream; its slot has the same name.
    pub stream: StreamName,
    /// The source's database.
    pub database: String,
    /// Who the source is, from `IDENTIFY_SYSTEM`.
    pub source: Cluster,
    /// The source's flushed WAL position.
    pub source_lsn: PgLsn,
    /// The slot, where there is one.
    pub slot: Option<Slot>,
    /// When the history began that the source has noted: `dr_agent.sending`.
    pub noted: Option<Micros>,
    /// Which source the replica was set up from: `dr_agent.stream`.
    pub recorded: Option<Recorded>,
    /// How far the replica is: `dr_agent.progress.end_lsn`.
    pub applied: Option<PgLsn>,
    /// How many heartbeats the source has written, and of how many the replica knows: `dr_agent.heartbeat.beat`.
    pub beats: (Option<i64>, Option<i64>),
}

/// What tells one source from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// `pg_control`'s system identifier, made by `initdb`.
    pub system_identifier: u64,
    /// Raised by every promotion and point-in-time recovery of the source.
    pub timeline: i32,
}

/// What a replica has recorded of where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its source.
    pub cluster: Cluster,
    /// When its history began.
    pub began: Micros,
}

impl Recorded {
    /// What the replica's LSNs are of.
    pub fn history(self) -> History {
        History {
            system_identifier: self.cluster.system_identifier,
            began: self.began,
        }
    }
}

/// What `pg_replication_slots` says about the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// The database it decodes.
    pub database: Option<String>,
    /// The walsender that holds it.
    pub active_pid: Option<i32>,
    /// Position up to which it was acknowledged; unset until it is built.
    pub confirmed: Option<PgLsn>,
    /// Its WAL is gone: `wal_status = 'lost'`.
    pub lost: bool,
}

impl From<SlotState> for Slot {
    fn from(state: SlotState) -> Self {
        Self {
            lost: state.is_lost(),
            plugin: state.plugin,
            database: state.database,
            active_pid: state.active_pid,
            confirmed: state.confirmed_flush_lsn,
        }
    }
}

/// What to do at this start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is known anywhere, or a set-up was interrupted before it had a progress row: begin
    /// from nothing.
    Begin {
        /// The interrupted set-up left its slot behind.
        drop_slot: bool,
    },
    /// Slot and progress fit together.
    Resume,
}

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
    /// The slot is there, the WAL it needs is not.
    #[error(
        "replication slot \"{slot}\" was invalidated: the WAL after {applied} was removed \
         (wal_status = lost)"
    )]
    SlotInvalidated {
        /// The slot.
        slot: StreamName,
        /// The replica's progress.
        applied: PgLsn,
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

/// Decides what this start may do.
pub fn verdict(seen: &Observed) -> Result<Verdict, Mismatch> {
    let slot_name = || seen.stream.clone();
    if let Some(slot) = &seen.slot {
        is_ours(slot, &seen.stream, &seen.database)?;
    }
    let Some(recorded) = &seen.recorded else {
        return match &seen.slot {
            None => Ok(Verdict::Begin { drop_slot: false }),
            Some(_) => Err(Mismatch::SlotOccupied { slot: slot_name() }),
        };
    };
    let Some(applied) = seen.applied else {
        // Interrupted before anything was copied, so whichever source it was does not matter, as
        // long as a slot of that name is not one that another replica of another source needs.
        if seen.slot.is_some() && recorded.cluster != seen.source {
            return Err(Mismatch::SlotOccupied { slot: slot_name() });
        }
        let drop_slot = seen.slot.is_some();
        return if_free(seen, Verdict::Begin { drop_slot });
    };
    if recorded.cluster.system_identifier != seen.source.system_identifier {
        return Err(Mismatch::SystemIdentifier {
            recorded: recorded.cluster.system_identifier,
            found: seen.source.system_identifier,
        });
    }
    // Before the timeline: a restored backup usually changes both, and this one says what happened.
    if seen.source_lsn < applied {
        return Err(Mismatch::BackInTime {
            source_lsn: seen.source_lsn,
            applied,
        });
    }
    if recorded.cluster.timeline != seen.source.timeline {
        return Err(Mismatch::Timeline {
            recorded: recorded.cluster.timeline,
            found: seen.source.timeline,
        });
    }
    let slot = seen.slot.as_ref().ok_or_else(|| Mismatch::SlotLost {
        slot: slot_name(),
        applied,
    })?;
    if let Some(noted) = seen.noted.filter(|noted| *noted != recorded.began) {
        return Err(Mismatch::HistoryChanged {
            slot: slot_name(),
            noted,
            recorded: recorded.began,
        });
    }
    if slot.lost {
        return Err(Mismatch::SlotInvalidated {
            slot: slot_name(),
            applied,
        });
    }
    // Where the source's note is gone as well, somebody has made its schema anew.
    if let (Some(_), (Some(found), Some(applied))) = (seen.noted, seen.beats)
        && found < applied
    {
        return Err(Mismatch::FewerHeartbeats { found, applied });
    }
    match slot.confirmed {
        // Never built to the end; ours was, or there would be no progress row.
        None => Err(Mismatch::SlotLost {
            slot: slot_name(),
            applied,
        }),
        Some(confirmed) if confirmed > applied => Err(Mismatch::SlotRecreated {
            slot: slot_name(),
            confirmed,
            applied,
        }),
        Some(_) => if_free(seen, Verdict::Resume),
    }
}

/// Whether a slot of our name can be the stream's.
pub(super) fn is_ours(slot: &Slot, stream: &StreamName, database: &str) -> Result<(), Mismatch> {
    let foreign = |what: String| {
        Err(Mismatch::SlotForeign {
            slot: stream.clone(),
            what,
        })
    };
    match (slot.plugin.as_deref(), slot.database.as_deref()) {
        (None, _) => foreign("it is a physical slot".to_owned()),
        (Some("pgoutput"), Some(decodes)) if decodes == database => Ok(()),
        (Some("pgoutput"), decodes) => {
            let decodes = decodes.unwrap_or_default();
            foreign(format!("it decodes database \"{decodes}\""))
        }
        (Some(plugin), _) => foreign(format!("its output plugin is {plugin}")),
    }
}

/// `verdict`, unless somebody holds the slot that it would use or drop.
fn if_free(seen: &Observed, verdict: Verdict) -> Result<Verdict, Mismatch> {
    if let Some(slot) = &seen.slot {
        is_free(slot, &seen.stream)?;
    }
    Ok(verdict)
}

/// Whether nobody holds the slot.
pub(super) fn is_free(slot: &Slot, stream: &StreamName) -> Result<(), Mismatch> {
    match slot.active_pid {
        Some(pid) => Err(Mismatch::SlotActive {
            slot: stream.clone(),
            pid,
        }),
        None => Ok(()),
    }
}

/// Whether what a replica has recorded is what the source `found` sends by the slot that it has noted.
pub(super) fn same_history(
    stream: &StreamName,
    recorded: &Recorded,
    noted: &Recorded,
    found: &Cluster,
) -> Result<(), Mismatch> {
    same_cluster(&recorded.cluster, found)?;
    match recorded.began == noted.began {
        true => Ok(()),
        false => Err(Mismatch::HistoryChanged {
            slot: stream.clone(),
            noted: noted.began,
            recorded: recorded.began,
        }),
    }
}

/// Whether it is the same source, on the same timeline.
pub(super) fn same_cluster(recorded: &Cluster, found: &Cluster) -> Result<(), Mismatch> {
    if recorded.system_identifier != found.system_identifier {
        return Err(Mismatch::SystemIdentifier {
            recorded: recorded.system_identifier,
            found: found.system_identifier,
        });
    }
    if recorded.timeline != found.timeline {
        return Err(Mismatch::Timeline {
            recorded: recorded.timeline,
            found: found.timeline,
        });
    }
    Ok(())
}

impl Classify for Mismatch {
    fn class(&self) -> Class {
        match self {
            // A walsender that has not noticed our death ends by itself (wal_sender_timeout).
            Self::SlotActive { .. } => Class::Transient,
            Self::SystemIdentifier { .. }
            | Self::Timeline { .. }
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
        const START_OVER: &str = "To start over, run DROP DATABASE for this database on the \
            replica";
        const SLOT_TOO: &str = "drop the slot on the source if it is there";
        const THEN: &str = "then `dr-agent run`";
        let drop_slot =
            |slot: &StreamName| format!("SELECT pg_drop_replication_slot('{slot}') on the source");
        Some(match self {
            Self::SystemIdentifier { .. } => format!(
                "check source.url: it leads to another cluster, or one restored by a dump. \
                 {START_OVER}, {SLOT_TOO}, {THEN}"
            ),
            Self::Timeline { .. } => format!(
                "the source failed over to its standby or was restored; what the replica applied \
                 may not be in its history. {START_OVER}, {SLOT_TOO}, {THEN}; if the replica is \
                 the one to keep, `dr-agent promote` instead"
            ),
            Self::BackInTime { .. } => format!(
                "the source was restored from an older backup; the replica may hold the only copy \
                 of what came after it: `dr-agent promote` keeps it. {START_OVER}, {SLOT_TOO}, \
                 {THEN}"
            ),
            Self::FewerHeartbeats { .. } => format!(
                "the source was set back by a snapshot of its storage, and wrote on from there; the replica may hold the only \
                 copy of what came after it: `dr-agent promote` keeps it. {START_OVER}, {SLOT_TOO}, {THEN}"
            ),
            Self::SlotLost { .. } => {
                format!("the changes since then cannot be had any more. {START_OVER}, {THEN}")
            }
            Self::SendingSlotLost { slot, .. } => format!(
                "the changes since then cannot be had any more. To start over, run DELETE FROM dr_agent.sending \
                 WHERE stream = '{slot}' on the source and DROP DATABASE for this database on the replica, {THEN} \
                 here and `dr-agent apply` there"
            ),
            Self::SlotInvalidated { slot, .. } => format!(
                "raise max_slot_wal_keep_size on the source. {START_OVER} and {}, {THEN}",
                drop_slot(slot)
            ),
            Self::SlotRecreated { slot, .. } => {
                format!("{START_OVER} and {}, {THEN}", drop_slot(slot))
            }
            Self::HistoryChanged { .. } => format!(
                "if that other replica is in use, give this one another source.slot. {START_OVER}, {SLOT_TOO}, {THEN}"
            ),
            Self::SlotOccupied { slot } => format!(
                "if another dr-agent uses it, give this one another source.slot; if it is left over \
                 from a replica that was dropped, run {}, {THEN}",
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(system_identifier: u64, timeline: i32) -> Cluster {
        Cluster {
            system_identifier,
            timeline,
        }
    }

    fn slot(confirmed: u64) -> Slot {
        Slot {
            plugin: Some("pgoutput".to_owned()),
            database: Some("app".to_owned()),
            active_pid: None,
            confirmed: Some(PgLsn::from(confirmed)),
            lost: false,
        }
    }

    /// A stream in good order: slot at 90, replica at 100, source at 200.
    fn sound() -> Observed {
        Observed {
            stream: StreamName::new("dr_agent", "app"),
            database: "app".to_owned(),
            source: cluster(7, 1),
            source_lsn: PgLsn::from(200),
            slot: Some(slot(90)),
            noted: Some(5),
            recorded: Some(Recorded {
                cluster: cluster(7, 1),
                began: 5,
            }),
            applied: Some(PgLsn::from(100)),
            beats: (Some(50), Some(48)),
        }
    }

    fn after(change: impl FnOnce(&mut Observed)) -> Result<Verdict, Mismatch> {
        let mut seen = sound();
        change(&mut seen);
        verdict(&seen)
    }

    #[test]
    fn a_sound_stream_resumes_up_to_the_very_position_it_acknowledged() {
        assert_eq!(verdict(&sound()), Ok(Verdict::Resume));
        let equal = after(|seen| {
            seen.slot = Some(slot(100));
            seen.source_lsn = PgLsn::from(100);
        });
        assert_eq!(equal, Ok(Verdict::Resume));
    }

    #[test]
    fn a_set_up_begins_where_nothing_is_known_or_it_was_interrupted() {
        let nothing = after(|seen| {
            (seen.slot, seen.recorded, seen.applied) = (None, None, None);
        });
        assert_eq!(nothing, Ok(Verdict::Begin { drop_slot: false }));
        let before_the_slot = after(|seen| (seen.slot, seen.applied) = (None, None));
        assert_eq!(before_the_slot, Ok(Verdict::Begin { drop_slot: false }));
        let before_progress = after(|seen| seen.applied = None);
        assert_eq!(before_progress, Ok(Verdict::Begin { drop_slot: true }));
        let another_source_meanwhile = after(|seen| {
            (seen.slot, seen.applied) = (None, None);
            seen.source = cluster(8, 4);
        });
        assert_eq!(
            another_source_meanwhile,
            Ok(Verdict::Begin { drop_slot: false })
        );
    }

    #[test]
    fn another_source_under_the_same_url_is_noticed() {
        let other = after(|seen| seen.source = cluster(8, 1));
        assert!(matches!(other, Err(Mismatch::SystemIdentifier { .. })));
        let promoted = after(|seen| seen.source = cluster(7, 2));
        assert!(matches!(
            promoted,
            Err(Mismatch::Timeline {
                recorded: 1,
                found: 2
            })
        ));
        let restored = after(|seen| seen.source_lsn = PgLsn::from(99));
        assert!(matches!(restored, Err(Mismatch::BackInTime { .. })));
        let restored_and_promoted = after(|seen| {
            seen.source = cluster(7, 2);
            seen.source_lsn = PgLsn::from(99);
        });
        assert!(matches!(
            restored_and_promoted,
            Err(Mismatch::BackInTime { .. })
        ));
    }

    /// A snapshot of its storage was brought back: slot, timeline and identifier are the same, and WAL there is enough.
    #[test]
    fn a_source_that_was_set_back_and_wrote_on_is_noticed_by_its_heartbeats() {
        let back = after(|seen| seen.beats = (Some(47), Some(48)));
        assert!(matches!(
            back,
            Err(Mismatch::FewerHeartbeats {
                found: 47,
                applied: 48
            })
        ));
        let equal = after(|seen| seen.beats = (Some(48), Some(48)));
        assert_eq!(equal, Ok(Verdict::Resume));
        let unknown = after(|seen| seen.beats = (None, Some(48)));
        assert_eq!(unknown, Ok(Verdict::Resume));
        let schema_made_anew = after(|seen| (seen.noted, seen.beats) = (None, (Some(1), Some(48))));
        assert_eq!(schema_made_anew, Ok(Verdict::Resume));
    }

    #[test]
    fn a_gap_behind_the_slot_is_never_streamed_over() {
        let gone = after(|seen| seen.slot = None);
        assert!(matches!(gone, Err(Mismatch::SlotLost { .. })));
        let invalidated = after(|seen| {
            seen.slot = Some(Slot {
                lost: true,
                ..slot(90)
            });
        });
        assert!(matches!(invalidated, Err(Mismatch::SlotInvalidated { .. })));
        let recreated = after(|seen| seen.slot = Some(slot(101)));
        assert!(matches!(recreated, Err(Mismatch::SlotRecreated { .. })));
        let anothers = after(|seen| seen.noted = Some(6));
        assert!(matches!(anothers, Err(Mismatch::HistoryChanged { .. })));
        let unfinished = after(|seen| {
            seen.slot = Some(Slot {
                confirmed: None,
                ..slot(90)
            });
        });
        assert!(matches!(unfinished, Err(Mismatch::SlotLost { .. })));
    }

    #[test]
    fn a_slot_that_may_be_somebody_elses_is_never_dropped() {
        let unknown = after(|seen| (seen.recorded, seen.applied) = (None, None));
        assert!(matches!(unknown, Err(Mismatch::SlotOccupied { .. })));
        let of_another_source = after(|seen| {
            seen.applied = None;
            seen.source = cluster(8, 1);
        });
        assert!(matches!(
            of_another_source,
            Err(Mismatch::SlotOccupied { .. })
        ));
        for foreign in [
            Slot {
                plugin: None,
                ..slot(90)
            },
            Slot {
                plugin: Some("wal2json".to_owned()),
                ..slot(90)
            },
            Slot {
                database: Some("other".to_owned()),
                ..slot(90)
            },
        ] {
            for applied in [None, Some(PgLsn::from(100))] {
                let found = after(|seen| {
                    seen.slot = Some(foreign.clone());
                    seen.applied = applied;
                });
                assert!(matches!(found, Err(Mismatch::SlotForeign { .. })));
            }
        }
    }

    #[test]
    fn a_slot_in_use_is_waited_for_unless_waiting_cannot_help() {
        let busy = Slot {
            active_pid: Some(42),
            ..slot(90)
        };
        for applied in [None, Some(PgLsn::from(100))] {
            let error = after(|seen| {
                seen.slot = Some(busy.clone());
                seen.applied = applied;
            })
            .unwrap_err();
            assert_eq!(error.class(), Class::Transient);
            assert!(matches!(error, Mismatch::SlotActive { pid: 42, .. }));
        }
        let somebody_elses = after(|seen| {
            seen.slot = Some(busy);
            (seen.recorded, seen.applied) = (None, None);
        });
        assert!(matches!(somebody_elses, Err(Mismatch::SlotOccupied { .. })));
    }

    #[test]
    fn every_mismatch_says_what_to_do_next() {
        let error = after(|seen| seen.slot = Some(slot(101))).unwrap_err();
        let hint = error.hint().unwrap();
        assert!(hint.contains("DROP DATABASE"), "{hint}");
        assert!(
            hint.contains("pg_drop_replication_slot('dr_agent_app')"),
            "{hint}"
        );
    }
}
