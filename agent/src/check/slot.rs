//! ● What the slot on the source and the progress row on the replica say about each other.
//!
//! Pure. The slot holds what the replica has not acknowledged; the progress row says what it has
//! applied. If the slot is ahead, changes are gone for good (promise 3 of the design), and that must be
//! said before anything is started.
//!
//! Under route `kinesis` the slot holds what is not in the stream yet, and is ahead of the replica as a rule: there the source
//! alone says whether it can be gone on with.

use std::collections::BTreeSet;

use bytesize::ByteSize;

use super::finding::{Finding, FindingPlace};
use super::server::{ServerFacts, SlotFacts};
use crate::error::remedy::{self, SLOT_TOO};
use crate::names::TableName;
use crate::pg::PgLsn;
use crate::pg::quote::quote_literal;
use crate::schema::progress::Progress;
use crate::schema::sending;
use crate::setup::raise;

/// What the replica keeps about one stream in schema `dr_agent`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Kept {
    /// The progress row.
    pub(super) progress: Option<Progress>,
    /// Which source the stream comes from: system identifier and timeline.
    pub(super) origin: Option<(String, i32)>,
    /// Tables whose copy is finished.
    pub(super) copied: BTreeSet<TableName>,
    /// Tables whose copy has begun or is waiting.
    pub(super) copying: BTreeSet<TableName>,
    /// Mode, state and start of a promotion.
    pub(super) promotion: Option<(String, String, String)>,
}

/// What to do about changes that are missing for good.
fn copy_again(name: &str) -> String {
    format!("{MISSING} {}", remedy::start_over(&remedy::drop_slot(name)))
}

const MISSING: &str =
    "changes are missing on the replica, and the source does not have them any more.";

/// Judges the slot `name` of database `database`.
pub(super) fn judge(
    at: &FindingPlace,
    name: &str,
    database: &str,
    slot: Option<&SlotFacts>,
    kept: &Kept,
) -> Vec<Finding> {
    let Some(slot) = slot else {
        return vec![match &kept.progress {
            None => at
                .ok("slot", "is not there yet; dr-agent run creates it")
                .on(name),
            Some(progress) => at
                .error(
                    "slot_missing",
                    format!(
                        "is gone, although the replica was replicated up to {} through it",
                        progress.end_lsn
                    ),
                )
                .on(name)
                .hint(format!(
                    "{MISSING} If the source is not in use or not sound, dr-agent promote keeps what there is. {}",
                    remedy::start_over_with(None, "`dr-agent run`")
                )),
        }];
    };
    if let Some(finding) = unusable(at, name, database, slot, &copy_again(name)) {
        return vec![finding];
    }
    let mut findings: Vec<Finding> = two_phase(at, name, slot).into_iter().collect();
    findings.extend(position(at, name, slot, kept));
    findings.push(retained(at, name, slot));
    findings
}

/// What `dr_agent.sending` on the source says of a stream under route `kinesis`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NotedSlot {
    /// The source it was sent from: system identifier and timeline.
    pub(super) origin: (String, i32),
    /// Since where.
    pub(super) since: PgLsn,
}

/// Judges the slot `name` of database `database` under route `kinesis`, where what was put into the stream is
/// acknowledged and the replica has no part in it.
pub(super) fn sending(
    at: &FindingPlace,
    name: &str,
    database: &str,
    slot: Option<&SlotFacts>,
    noted: Option<&NotedSlot>,
    source: &ServerFacts,
) -> Vec<Finding> {
    let mut findings: Vec<Finding> = noted
        .and_then(|noted| elsewhere(at, name, noted, source))
        .into_iter()
        .collect();
    let Some(slot) = slot else {
        findings.push(match noted {
            None => at
                .ok("slot", "is not there yet; dr-agent run creates it")
                .on(name),
            Some(noted) => at
                .error(
                    "slot_missing",
                    format!(
                        "is gone, although changes were sent through it since {}",
                        noted.since
                    ),
                )
                .on(name)
                .hint(send_again(name)),
        });
        return findings;
    };
    if let Some(finding) = unusable(at, name, database, slot, &send_again(name)) {
        findings.push(finding);
        return findings;
    }
    findings.extend(two_phase(at, name, slot));
    findings.push(match slot.confirmed_flush {
        None if slot.active => being_created(at, name),
        None => at
            .note(
                "slot_unfinished",
                "is left over from a set-up that was interrupted",
            )
            .on(name)
            .hint("dr-agent run drops it and begins again"),
        Some(confirmed) if slot.active => at
            .ok(
                "slot",
                format!("is being sent from; up to {confirmed} is in the stream"),
            )
            .on(name),
        Some(confirmed) => at
            .note(
                "slot_inactive",
                format!("no agent is sending; up to {confirmed} is in the stream"),
            )
            .on(name)
            .hint("start dr-agent run"),
    });
    findings.push(retained(at, name, slot));
    findings
}

/// Under route `kinesis`: what the replica counts on and the source, which was judged by [`sending`], knows nothing of.
pub(super) fn apart(
    at: &FindingPlace,
    name: &str,
    slot: Option<&SlotFacts>,
    noted: bool,
    kept: &Kept,
) -> Option<Finding> {
    let progress = kept.progress.as_ref()?;
    if slot.is_some() || noted {
        return None;
    }
    let finding = at.error(
        "slot_missing",
        format!(
            "is not there, although the replica was replicated up to {} through it",
            progress.end_lsn
        ),
    );
    Some(finding.on(name).hint(format!(
        "{MISSING} {}",
        remedy::start_over_with(None, "`dr-agent run`, and `dr-agent apply`")
    )))
}

/// What must be dropped before everything can be sent again.
fn send_again(name: &str) -> String {
    let also = format!(
        "{} if it is there and the row {} of {} there",
        remedy::drop_slot(name),
        quote_literal(name),
        sending::TABLE
    );
    let over = remedy::start_over_with(Some(&also), "`dr-agent run`, and `dr-agent apply`");
    format!("nobody has the changes since then any more. {over}")
}

fn elsewhere(
    at: &FindingPlace,
    name: &str,
    noted: &NotedSlot,
    source: &ServerFacts,
) -> Option<Finding> {
    let (identifier, timeline) = &noted.origin;
    let here = source.system_identifier.as_ref()?;
    if here != identifier {
        let text = format!("was sent from system {identifier}, the source is {here}");
        return Some(at.error("source_changed", text).on(name).hint(format!(
            "correct source.url; if the source was rebuilt on purpose: {}",
            send_again(name)
        )));
    }
    let now = source.timeline.filter(|now| now != timeline)?;
    let text = format!(
        "was sent from timeline {timeline}, the source is on timeline {now}: it was restored or promoted in between"
    );
    let finding = at.error("timeline_changed", text).on(name);
    Some(finding.hint(send_again(name)))
}

/// A slot that is not ours, or that has lost what it held.
fn unusable(
    at: &FindingPlace,
    name: &str,
    database: &str,
    slot: &SlotFacts,
    begin_again: &str,
) -> Option<Finding> {
    if slot.plugin != "pgoutput" || slot.database != database {
        let finding = at.error(
            "slot_foreign",
            format!(
                "belongs to somebody else (plugin \"{}\", database \"{}\")",
                slot.plugin, slot.database
            ),
        );
        return Some(
            finding
                .on(name)
                .hint("set source.slot to a name that is free"),
        );
    }
    if slot.wal_status == "lost" || slot.invalidation.is_some() {
        let why = slot
            .invalidation
            .as_ref()
            .map(|reason| format!(" ({reason})"))
            .unwrap_or_default();
        let finding = at.error("slot_lost", format!("was given up by the source{why}"));
        let why = raise(slot.invalidation.as_deref());
        return Some(finding.on(name).hint(format!("{why}. {begin_again}")));
    }
    None
}

fn two_phase(at: &FindingPlace, name: &str, slot: &SlotFacts) -> Option<Finding> {
    slot.two_phase.then(|| {
        at.error(
            "slot_two_phase",
            "was created with two_phase, which dr-agent does not read",
        )
        .on(name)
        .hint(remedy::start_over(&remedy::drop_slot(name)))
    })
}

fn position(at: &FindingPlace, name: &str, slot: &SlotFacts, kept: &Kept) -> Option<Finding> {
    let Some(progress) = &kept.progress else {
        return Some(without_progress(at, name, slot, kept));
    };
    let confirmed = slot.confirmed_flush?;
    if confirmed > progress.end_lsn {
        let finding = at.error(
            "slot_recreated",
            format!(
                "was created anew or moved: it starts at {confirmed}, the replica stands at {}",
                progress.end_lsn
            ),
        );
        return Some(finding.on(name).hint(copy_again(name)));
    }
    let age = format!("{:.0} s", progress.since_applied().max(0.0));
    Some(if slot.active {
        at.ok(
            "slot",
            format!(
                "is streaming; replica at {}, last batch {age} ago",
                progress.end_lsn
            ),
        )
        .on(name)
    } else {
        at.note(
            "slot_inactive",
            format!(
                "no agent is streaming; replica at {}, last batch {age} ago",
                progress.end_lsn
            ),
        )
        .on(name)
        .hint("start dr-agent run")
    })
}

/// A slot that somebody works on is nobody's leftover.
fn being_created(at: &FindingPlace, name: &str) -> Finding {
    at.note("slot_being_created", "is being created, or copied from, now")
        .on(name)
        .hint(
            "that waits for every transaction that runs on the source, in any database, prepared ones included: what it \
             waits for is said above, and by `dr-agent status`",
        )
}

fn without_progress(at: &FindingPlace, name: &str, slot: &SlotFacts, kept: &Kept) -> Finding {
    if slot.active {
        return being_created(at, name);
    }
    if kept.origin.is_some() {
        return at
            .note(
                "slot_unfinished",
                "is left over from a set-up that was interrupted",
            )
            .on(name)
            .hint("dr-agent run drops it and begins again");
    }
    at.error(
        "slot_occupied",
        "exists, and this replica knows nothing of it: it may belong to another dr-agent",
    )
    .on(name)
    .hint(format!(
        "if another agent uses it, set source.slot to another name; if it is left over from a replica that is not there any \
         more, {}",
        remedy::drop_slot(name)
    ))
}

fn retained(at: &FindingPlace, name: &str, slot: &SlotFacts) -> Finding {
    let size = |bytes: i64| ByteSize::b(bytes.max(0).unsigned_abs()).display().iec();
    let retained = slot.retained_bytes.unwrap_or(0);
    let text = format!("holds {} of WAL", size(retained));
    match slot.safe_bytes {
        _ if slot.wal_status == "unreserved" => at
            .error(
                "slot_retained",
                format!("{text} and is over max_slot_wal_keep_size: the next checkpoint gives it up"),
            )
            .on(name)
            .hint("raise max_slot_wal_keep_size now (ALTER SYSTEM, pg_reload_conf), then start dr-agent run"),
        Some(safe) if safe < retained => at
            .warning(
                "slot_retained",
                format!("{text}; after {} more it is lost", size(safe)),
            )
            .on(name)
            .hint("start dr-agent run, or raise max_slot_wal_keep_size"),
        Some(safe) => at
            .ok("slot_retained", format!("{text}; {} more until it is lost", size(safe)))
            .on(name),
        None => at.ok("slot_retained", text).on(name),
    }
}

/// Whether the source is still the one the stream was started from.
pub(super) fn origin(
    at: &FindingPlace,
    kept: &Kept,
    source: &ServerFacts,
    wal_end: Option<PgLsn>,
    synced: bool,
    applier: &str,
) -> Option<Finding> {
    let (kept_identifier, kept_timeline) = kept.origin.as_ref()?;
    let here = source.system_identifier.as_ref()?;
    if here != kept_identifier {
        let finding = at.error(
            "source_changed",
            format!("the replica was copied from system {kept_identifier}, the source is {here}"),
        );
        return Some(finding.hint(format!(
            "correct source.url; the replica may hold the only copy of what its own source had. {}",
            remedy::start_over_with(Some(SLOT_TOO), applier)
        )));
    }
    if let (Some(lsn), Some(progress)) = (wal_end, &kept.progress)
        && lsn < progress.end_lsn
    {
        let finding = at.error(
            "source_went_back",
            format!(
                "the source's WAL ends at {lsn}, the replica has applied up to {}: the source was \
                 restored from an older backup",
                progress.end_lsn
            ),
        );
        return Some(finding.hint(format!(
            "the replica may hold the only copy of what came after: dr-agent promote keeps it. {}",
            remedy::start_over_with(Some(SLOT_TOO), applier)
        )));
    }
    match source.timeline {
        Some(timeline) if timeline > *kept_timeline && synced => Some(
            at.warning(
                "timeline_followed",
                format!(
                    "the source failed over to its standby (timeline {timeline}, the replica followed {kept_timeline}), and the \
                     slot has come along"
                ),
            )
            .hint(format!("start {applier}: it goes on if that has everything that was applied, and says so if not")),
        ),
        Some(timeline) if timeline != *kept_timeline => Some(
            at.error(
                "timeline_changed",
                format!(
                    "the source is on timeline {timeline}, the replica followed timeline {kept_timeline}: \
                     the source was restored or promoted in between, and the slot did not come along"
                ),
            )
            .hint(format!(
                "the two may hold different transactions, and the replica the only copy of some: dr-agent promote keeps it. {}",
                remedy::start_over_with(Some(SLOT_TOO), applier)
            )),
        ),
        _ => Some(at.ok("source_identity", format!("is the source of this replica ({here})"))),
    }
}

/// A promotion that was begun or finished.
pub(super) fn promotion(at: &FindingPlace, kept: &Kept, applier: &str) -> Option<Finding> {
    let (mode, state, started_at) = kept.promotion.as_ref()?;
    let finding = at.error(
        "promoted",
        format!("a promotion ({mode}) was started at {started_at}, its state is \"{state}\""),
    );
    Some(finding.hint(format!(
        "it takes writes of its own, is the primary now, and {applier} will not write here: stop that agent for good. To \
         protect the new primary, set up an agent with a replica elsewhere"
    )))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{FindingSide, Severity};
    use super::*;

    fn at() -> FindingPlace {
        FindingPlace::database(FindingSide::Both, "app")
    }

    fn slot() -> SlotFacts {
        SlotFacts {
            name: "dr_agent_app".to_owned(),
            plugin: "pgoutput".to_owned(),
            database: "app".to_owned(),
            wal_status: "reserved".to_owned(),
            confirmed_flush: Some(PgLsn::from(100)),
            retained_bytes: Some(50),
            ..SlotFacts::default()
        }
    }

    fn kept(end_lsn: u64) -> Kept {
        Kept {
            progress: Some(Progress::testing(PgLsn::from(end_lsn))),
            origin: Some(("7".to_owned(), 1)),
            ..Kept::default()
        }
    }

    fn found(slot: Option<&SlotFacts>, kept: &Kept) -> Vec<(Severity, &'static str)> {
        judge(&at(), "dr_agent_app", "app", slot, kept)
            .iter()
            .map(|f| (f.severity, f.code))
            .collect()
    }

    #[test]
    fn a_slot_ahead_of_the_replica_was_recreated() {
        let errors = found(Some(&slot()), &kept(99));
        assert_eq!(errors[0], (Severity::Error, "slot_recreated"));
        let fine = found(Some(&slot()), &kept(100));
        assert_eq!(fine[0], (Severity::Note, "slot_inactive"));
    }

    #[test]
    fn a_missing_slot_is_an_error_only_when_the_replica_counts_on_it() {
        assert_eq!(found(None, &Kept::default()), [(Severity::Ok, "slot")]);
        assert_eq!(found(None, &kept(5)), [(Severity::Error, "slot_missing")]);
        assert_eq!(
            found(Some(&slot()), &Kept::default())[0],
            (Severity::Error, "slot_occupied")
        );
        let interrupted = Kept {
            origin: Some(("7".to_owned(), 1)),
            ..Kept::default()
        };
        assert_eq!(
            found(Some(&slot()), &interrupted)[0],
            (Severity::Note, "slot_unfinished")
        );
    }

    #[test]
    fn under_route_kinesis_the_source_alone_says_whether_its_slot_is_right() {
        let source = ServerFacts {
            system_identifier: Some("7".to_owned()),
            timeline: Some(1),
            ..ServerFacts::default()
        };
        let noted = |identifier: &str, timeline| NotedSlot {
            origin: (identifier.to_owned(), timeline),
            since: PgLsn::from(50),
        };
        let found = |slot: Option<&SlotFacts>, noted: Option<&NotedSlot>| {
            let found = sending(&at(), "dr_agent_app", "app", slot, noted, &source);
            (found[0].severity, found[0].code)
        };
        let (here, lost) = (
            noted("7", 1),
            SlotFacts {
                wal_status: "lost".to_owned(),
                ..slot()
            },
        );
        assert_eq!(found(None, None), (Severity::Ok, "slot"));
        assert_eq!(found(None, Some(&here)), (Severity::Error, "slot_missing"));
        assert_eq!(
            found(Some(&slot()), Some(&here)),
            (Severity::Note, "slot_inactive")
        );
        assert_eq!(found(Some(&lost), None), (Severity::Error, "slot_lost"));
        assert_eq!(
            found(Some(&slot()), Some(&noted("8", 1))),
            (Severity::Error, "source_changed")
        );
        assert_eq!(
            found(Some(&slot()), Some(&noted("7", 2))),
            (Severity::Error, "timeline_changed")
        );
        let code = |slot: Option<&SlotFacts>, noted, kept: &Kept| {
            apart(&at(), "dr_agent_app", slot, noted, kept).map(|finding| finding.code)
        };
        let there = slot();
        assert_eq!(code(Some(&there), true, &kept(5)), None);
        assert_eq!(code(None, true, &kept(5)), None, "the source says it");
        assert_eq!(code(None, false, &kept(5)), Some("slot_missing"));
        assert_eq!(code(None, false, &Kept::default()), None);
    }

    #[test]
    fn a_lost_slot_is_lost_whatever_else_it_says() {
        let lost = SlotFacts {
            wal_status: "lost".to_owned(),
            active: true,
            ..slot()
        };
        assert_eq!(
            found(Some(&lost), &kept(200)),
            [(Severity::Error, "slot_lost")]
        );
        let idle = SlotFacts {
            invalidation: Some("idle_timeout".to_owned()),
            ..slot()
        };
        assert_eq!(
            found(Some(&idle), &kept(200)),
            [(Severity::Error, "slot_lost")]
        );
    }

    #[test]
    fn a_slot_of_somebody_else_is_not_taken_for_ours() {
        for foreign in [
            SlotFacts {
                plugin: "test_decoding".to_owned(),
                ..slot()
            },
            SlotFacts {
                database: "other".to_owned(),
                ..slot()
            },
        ] {
            assert_eq!(
                found(Some(&foreign), &kept(200)),
                [(Severity::Error, "slot_foreign")]
            );
        }
    }

    #[test]
    fn retained_wal_turns_from_ok_to_error_as_the_limit_nears() {
        for (safe, status, expected) in [
            (None, "reserved", Severity::Ok),
            (Some(500), "extended", Severity::Ok),
            (Some(10), "extended", Severity::Warning),
            (Some(-5), "unreserved", Severity::Error),
        ] {
            let slot = SlotFacts {
                safe_bytes: safe,
                wal_status: status.to_owned(),
                ..slot()
            };
            let severity = found(Some(&slot), &kept(200))[1].0;
            assert_eq!(severity, expected, "{safe:?} {status}");
        }
    }

    #[test]
    fn another_source_or_timeline_is_refused() {
        let code = |id: Option<&str>, timeline, lsn: u64| {
            let source = ServerFacts {
                system_identifier: id.map(str::to_owned),
                timeline: Some(timeline),
                ..ServerFacts::default()
            };
            origin(
                &at(),
                &kept(100),
                &source,
                Some(PgLsn::from(lsn)),
                false,
                "dr-agent run",
            )
            .map(|f| f.code)
        };
        assert_eq!(code(Some("7"), 1, 100), Some("source_identity"));
        assert_eq!(code(Some("8"), 1, 100), Some("source_changed"));
        assert_eq!(code(Some("7"), 2, 100), Some("timeline_changed"));
        assert_eq!(code(Some("7"), 1, 99), Some("source_went_back"));
        assert_eq!(code(None, 2, 100), None);
    }
}
