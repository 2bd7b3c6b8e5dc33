//! ● Whether the slot, the source and the replica belong together: the verdict at every start.
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
//! - It is begun with instead where the source has noted that it was created to the end, in the history that the replica has
//!   recorded, and it stands where it begins: nothing was acknowledged, so nothing is missing.
//!
//! # What it does not do
//! It knows nothing of promotions: a promoted replica is refused before this is asked.

use super::mismatch::Mismatch;
use super::timeline::{Branch, Fork};
use crate::names::history::Cluster;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::pg::slot::SlotState;
use crate::schema::stream::Recorded;
use crate::time::Micros;

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
    pub slot: Option<SeenSlot>,
    /// When the history began that the source has noted: `dr_agent.sending`.
    pub noted: Option<Micros>,
    /// The timeline on which it did.
    pub noted_timeline: Option<i32>,
    /// Where the slot begins that the source has noted, if it was created to the end and there is still a publication.
    pub since: Option<PgLsn>,
    /// Which source the replica was set up from: `dr_agent.stream`.
    pub recorded: Option<Recorded>,
    /// How far the replica is: `dr_agent.progress.end_lsn`.
    pub applied: Option<PgLsn>,
    /// How the source's timeline came about, oldest first; asked for only where it is not the recorded one.
    pub branches: Vec<Branch>,
    /// How many heartbeats the source has written, and of how many the replica knows: `dr_agent.heartbeat.beat`.
    pub beats: (Option<i64>, Option<i64>),
}

/// What `pg_replication_slots` says about the slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenSlot {
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
    /// Why, where the server's version tells.
    pub reason: Option<String>,
    /// A standby kept it in step with its primary's (17 and later): `failover` and `synced`, and not temporary.
    pub synced: bool,
}

impl From<SlotState> for SeenSlot {
    fn from(state: SlotState) -> Self {
        Self {
            lost: state.is_lost(),
            synced: state.synced,
            reason: state.invalidation_reason,
            plugin: state.plugin,
            database: state.database,
            active_pid: state.active_pid,
            confirmed: state.confirmed_flush_lsn,
        }
    }
}

/// What to do at this start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartVerdict {
    /// Nothing is known anywhere, or a set-up was interrupted before it had a progress row: begin
    /// from nothing.
    Begin {
        /// The interrupted set-up left its slot behind.
        drop_slot: bool,
    },
    /// A set-up was interrupted between its slot and its progress row: begin at the slot, which is whole.
    BeginAt {
        /// Where that is.
        since: PgLsn,
    },
    /// Slot and progress fit together.
    Resume,
    /// The same, on another timeline: the source failed over to its standby, which has everything that was applied. Another history
    /// begins all the same: an archive may have more of the old one than that standby.
    Follow,
}

/// Decides what this start may do.
pub fn verdict(seen: &Observed) -> Result<StartVerdict, Mismatch> {
    let slot_name = || seen.stream.clone();
    if let Some(slot) = &seen.slot {
        is_ours(slot, &seen.stream, &seen.database)?;
    }
    let Some(recorded) = &seen.recorded else {
        return match &seen.slot {
            None => Ok(StartVerdict::Begin { drop_slot: false }),
            Some(_) => Err(Mismatch::SlotOccupied { slot: slot_name() }),
        };
    };
    let Some(applied) = seen.applied else {
        // Interrupted before anything was copied, so whichever source it was does not matter, as
        // long as a slot of that name is not one that another replica of another source needs.
        if seen.slot.is_some() && recorded.cluster != seen.source {
            return Err(Mismatch::SlotOccupied { slot: slot_name() });
        }
        if let Some(since) = begun_at(seen, recorded) {
            return if_free(seen, StartVerdict::BeginAt { since });
        }
        let drop_slot = seen.slot.is_some();
        return if_free(seen, StartVerdict::Begin { drop_slot });
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
    let follows = recorded.cluster.timeline != seen.source.timeline;
    if follows {
        is_in_history(seen, recorded, applied)?;
    }
    let slot = seen.slot.as_ref().ok_or_else(|| Mismatch::SlotLost {
        slot: slot_name(),
        applied,
    })?;
    // A start that followed the source has noted it there, and was ended before the replica had recorded it. Somebody else's slot
    // since then would be beyond what was applied.
    let is_half_followed = follows && seen.noted_timeline > Some(recorded.cluster.timeline);
    if let Some(noted) = seen.noted.filter(|noted| *noted != recorded.began)
        && !is_half_followed
    {
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
            reason: slot.reason.clone(),
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
        Some(_) if follows => if_free(seen, StartVerdict::Follow),
        Some(_) => if_free(seen, StartVerdict::Resume),
    }
}

/// Where the slot of an interrupted set-up begins, if it may be begun with.
fn begun_at(seen: &Observed, recorded: &Recorded) -> Option<PgLsn> {
    let (slot, since) = seen.slot.as_ref().zip(seen.since)?;
    let same = recorded.cluster == seen.source && seen.noted == Some(recorded.began);
    let whole = slot.confirmed == Some(since) && since <= seen.source_lsn;
    (same && whole && !slot.lost).then_some(since)
}

/// Whether everything up to `applied` is part of the timeline that the source is on now, and its slot has come along.
fn is_in_history(seen: &Observed, recorded: &Recorded, applied: PgLsn) -> Result<(), Mismatch> {
    let (from, to) = (recorded.cluster.timeline, seen.source.timeline);
    match Fork::of(&seen.branches, from) {
        Fork::At(forked) if forked >= applied => {}
        Fork::At(forked) => {
            return Err(Mismatch::ForkedBefore {
                recorded: from,
                found: to,
                forked,
                applied,
            });
        }
        Fork::Unknown => {
            return Err(Mismatch::Timeline {
                recorded: from,
                found: to,
            });
        }
    }
    match &seen.slot {
        Some(slot) if slot.synced => Ok(()),
        // A slot of that name that somebody has created since begins where it was created.
        Some(_) => Err(Mismatch::SlotNotSynced {
            slot: seen.stream.clone(),
            found: to,
        }),
        // It says itself that it is gone.
        None => Ok(()),
    }
}

/// Whether a slot of our name can be the stream's.
pub(super) fn is_ours(
    slot: &SeenSlot,
    stream: &StreamName,
    database: &str,
) -> Result<(), Mismatch> {
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
fn if_free(seen: &Observed, verdict: StartVerdict) -> Result<StartVerdict, Mismatch> {
    if let Some(slot) = &seen.slot {
        is_free(slot, &seen.stream)?;
    }
    Ok(verdict)
}

/// Whether nobody holds the slot.
pub(super) fn is_free(slot: &SeenSlot, stream: &StreamName) -> Result<(), Mismatch> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Class, Classify as _};

    fn cluster(system_identifier: u64, timeline: i32) -> Cluster {
        Cluster {
            system_identifier,
            timeline,
        }
    }

    fn slot(confirmed: u64) -> SeenSlot {
        SeenSlot {
            plugin: Some("pgoutput".to_owned()),
            database: Some("app".to_owned()),
            active_pid: None,
            confirmed: Some(PgLsn::from(confirmed)),
            lost: false,
            reason: None,
            synced: false,
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
            noted_timeline: Some(1),
            since: Some(PgLsn::from(80)),
            recorded: Some(Recorded {
                cluster: cluster(7, 1),
                began: 5,
            }),
            applied: Some(PgLsn::from(100)),
            branches: Vec::new(),
            beats: (Some(50), Some(48)),
        }
    }

    fn after(change: impl FnOnce(&mut Observed)) -> Result<StartVerdict, Mismatch> {
        let mut seen = sound();
        change(&mut seen);
        verdict(&seen)
    }

    #[test]
    fn a_sound_stream_resumes_up_to_the_very_position_it_acknowledged() {
        assert_eq!(verdict(&sound()), Ok(StartVerdict::Resume));
        let equal = after(|seen| {
            seen.slot = Some(slot(100));
            seen.source_lsn = PgLsn::from(100);
        });
        assert_eq!(equal, Ok(StartVerdict::Resume));
    }

    #[test]
    fn a_set_up_begins_where_nothing_is_known_or_it_was_interrupted() {
        let nothing = after(|seen| {
            (seen.slot, seen.recorded, seen.applied) = (None, None, None);
        });
        assert_eq!(nothing, Ok(StartVerdict::Begin { drop_slot: false }));
        let before_the_slot = after(|seen| (seen.slot, seen.applied) = (None, None));
        assert_eq!(
            before_the_slot,
            Ok(StartVerdict::Begin { drop_slot: false })
        );
        let before_progress = after(|seen| seen.applied = None);
        assert_eq!(before_progress, Ok(StartVerdict::Begin { drop_slot: true }));
        let another_source_meanwhile = after(|seen| {
            (seen.slot, seen.applied) = (None, None);
            seen.source = cluster(8, 4);
        });
        assert_eq!(
            another_source_meanwhile,
            Ok(StartVerdict::Begin { drop_slot: false })
        );
    }

    #[test]
    fn an_interrupted_set_up_begins_with_its_slot_only_where_that_is_whole() {
        let interrupted = |change: fn(&mut Observed)| {
            after(|seen| {
                (seen.applied, seen.since) = (None, Some(PgLsn::from(90)));
                change(seen);
            })
        };
        let since = PgLsn::from(90);
        assert_eq!(interrupted(|_| {}), Ok(StartVerdict::BeginAt { since }));
        type Change = fn(&mut Observed);
        let drop: [Change; 7] = [
            |seen| seen.since = None,
            |seen| seen.noted = None,
            |seen| seen.noted = Some(6),
            |seen| seen.slot = Some(slot(91)),
            |seen| seen.slot.as_mut().unwrap().confirmed = None,
            |seen| seen.slot.as_mut().unwrap().lost = true,
            |seen| seen.source_lsn = PgLsn::from(89),
        ];
        for change in drop {
            assert_eq!(
                interrupted(change),
                Ok(StartVerdict::Begin { drop_slot: true })
            );
        }
        let busy = interrupted(|seen| seen.slot.as_mut().unwrap().active_pid = Some(42));
        assert!(matches!(busy, Err(Mismatch::SlotActive { .. })));
        let another_timeline = interrupted(|seen| seen.source = cluster(7, 2));
        assert!(matches!(
            another_timeline,
            Err(Mismatch::SlotOccupied { .. })
        ));
        let gone = interrupted(|seen| seen.slot = None);
        assert_eq!(gone, Ok(StartVerdict::Begin { drop_slot: false }));
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

    /// The source is on timeline 2 now, which forked at `forked`; slot synced or not.
    fn promoted(seen: &mut Observed, forked: u64, synced: bool) {
        seen.source.timeline = 2;
        seen.branches = vec![Branch {
            timeline: 1,
            ends: PgLsn::from(forked),
        }];
        seen.slot = Some(SeenSlot { synced, ..slot(90) });
    }

    #[test]
    fn a_clean_failover_of_the_source_is_followed_where_nothing_can_be_missing() {
        type Change = fn(&mut Observed);
        let follow: [Change; 5] = [
            |seen| promoted(seen, 150, true),
            // A start had noted it on the source and was killed; and the source failed over once more after that.
            |seen| {
                promoted(seen, 150, true);
                (seen.noted, seen.noted_timeline) = (Some(6), Some(2));
            },
            |seen| {
                promoted(seen, 150, true);
                seen.source.timeline = 3;
                (seen.noted, seen.noted_timeline) = (Some(6), Some(2));
            },
            // Forked at the very position.
            |seen| promoted(seen, 100, true),
            // Twice in a row.
            |seen| {
                promoted(seen, 150, true);
                seen.source.timeline = 3;
                seen.branches.push(Branch {
                    timeline: 2,
                    ends: PgLsn::from(180),
                });
            },
        ];
        for change in follow {
            assert_eq!(after(change), Ok(StartVerdict::Follow));
        }
    }

    #[test]
    fn any_other_change_of_the_timeline_is_refused_by_its_cause() {
        let behind = after(|seen| promoted(seen, 99, true));
        assert!(matches!(behind, Err(Mismatch::ForkedBefore { .. })));
        let not_synced = after(|seen| promoted(seen, 150, false));
        assert!(matches!(not_synced, Err(Mismatch::SlotNotSynced { .. })));
        let gone = after(|seen| {
            promoted(seen, 150, true);
            seen.slot = None;
        });
        assert!(matches!(gone, Err(Mismatch::SlotLost { .. })));
        let lost = after(|seen| {
            promoted(seen, 150, true);
            seen.slot.as_mut().unwrap().lost = true;
        });
        assert!(matches!(lost, Err(Mismatch::SlotInvalidated { .. })));
        let ahead = after(|seen| {
            promoted(seen, 150, true);
            seen.slot.as_mut().unwrap().confirmed = Some(PgLsn::from(101));
        });
        assert!(matches!(ahead, Err(Mismatch::SlotRecreated { .. })));
        let not_an_ancestor = after(|seen| {
            promoted(seen, 150, true);
            seen.branches[0].timeline = 4;
        });
        assert!(matches!(not_an_ancestor, Err(Mismatch::Timeline { .. })));
        let begun_anew = after(|seen| {
            promoted(seen, 150, true);
            seen.noted = Some(6);
        });
        assert!(matches!(begun_anew, Err(Mismatch::HistoryChanged { .. })));
        let by_others = after(|seen| {
            promoted(seen, 150, true);
            (seen.noted, seen.noted_timeline) = (Some(6), Some(2));
            seen.slot.as_mut().unwrap().confirmed = Some(PgLsn::from(101));
        });
        assert!(matches!(by_others, Err(Mismatch::SlotRecreated { .. })));
        let in_use = after(|seen| {
            promoted(seen, 150, true);
            seen.slot.as_mut().unwrap().active_pid = Some(42);
        });
        assert!(matches!(in_use, Err(Mismatch::SlotActive { .. })));
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
        assert_eq!(equal, Ok(StartVerdict::Resume));
        let unknown = after(|seen| seen.beats = (None, Some(48)));
        assert_eq!(unknown, Ok(StartVerdict::Resume));
        let schema_made_anew = after(|seen| (seen.noted, seen.beats) = (None, (Some(1), Some(48))));
        assert_eq!(schema_made_anew, Ok(StartVerdict::Resume));
    }

    #[test]
    fn a_gap_behind_the_slot_is_never_streamed_over() {
        let gone = after(|seen| seen.slot = None);
        assert!(matches!(gone, Err(Mismatch::SlotLost { .. })));
        let invalidated = after(|seen| {
            seen.slot = Some(SeenSlot {
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
            seen.slot = Some(SeenSlot {
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
            SeenSlot {
                plugin: None,
                ..slot(90)
            },
            SeenSlot {
                plugin: Some("wal2json".to_owned()),
                ..slot(90)
            },
            SeenSlot {
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
        let busy = SeenSlot {
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
}
