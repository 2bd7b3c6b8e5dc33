//! ● Decides what a restore does: which base backup, how much of the log, and what becomes of the target.
//!
//! Pure, and in two steps, because the manifest that the second needs is that of the base backup the first has chosen. The same
//! plan is printed by `--plan` and obeyed by [`super::execute`].
//!
//! # Invariants
//! - What a plan refuses, the restore refuses, too.
//! - A target that holds anything but a restore of ours, of this database and history, is refused.
//! - A restore that was interrupted goes on to where it was going, or further, with the tables it began with.

use super::closing_notes::ClosingNotes;
use super::observe::{ArchivedBase, ArchivedHistory};
use super::pick_base::{self, DatedBase, Needed};
use super::pick_history::{self, ArchivedLife};
use super::target::{Tables, TargetFound, TargetPosition};
use super::{RestoreError, RestoreOptions};
use crate::archive::base::{self, Manifest};
use crate::archive::log::Span;
use crate::names::TableName;
use crate::names::history::History;
use crate::names::stream::StreamName;
use crate::pg::PgLsn;
use crate::time::Micros;

/// What becomes of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetStart {
    /// It is empty.
    Empty,
    /// What a restore left that was interrupted within the base backup is removed first.
    Anew,
    /// A restore that was interrupted goes on from this position.
    Resumed(PgLsn),
}

/// What a restore will do.
#[derive(Clone, Debug)]
pub struct RestorePlan {
    /// The base backup.
    pub base: base::BaseSummary,
    /// Bytes of the base backup that are read.
    pub base_bytes: u64,
    /// The tables whose rows are wanted; none: all.
    pub tables: Option<Vec<TableName>>,
    /// Segments of the change log that are read, at most.
    pub log_segments: usize,
    /// Their bytes in the store.
    pub log_bytes: u64,
    /// Where they lead.
    pub log_end: PgLsn,
    /// What comes before the log.
    pub(super) begin: FirstStage,
}

impl RestorePlan {
    /// What becomes of the target.
    pub fn start(&self) -> TargetStart {
        match &self.begin {
            FirstStage::Load(load) if load.wipes => TargetStart::Anew,
            FirstStage::Load(_) => TargetStart::Empty,
            FirstStage::Resume(position) => TargetStart::Resumed(position.end_lsn),
        }
    }
}

/// What comes before the log.
#[derive(Clone, Debug)]
pub(super) enum FirstStage {
    /// The base backup is loaded.
    Load(Load),
    /// It was loaded by an earlier run, which came as far as this.
    Resume(TargetPosition),
}

/// A load of the base backup.
#[derive(Clone, Debug)]
pub(super) struct Load {
    /// What an interrupted load left is removed first.
    pub(super) wipes: bool,
    /// The tables that are wanted, by every name the log may call them.
    pub(super) names: Tables,
    /// What is to be told at the end, as far as it is known beforehand.
    pub(super) kept: ClosingNotes,
}

/// Where a restore begins in the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// Which of the histories.
    pub(super) history: usize,
    /// Which of its base backups.
    pub(super) base: usize,
}

/// Chooses history and base backup.
///
/// # Errors
/// [`RestoreError::NothingOf`], [`RestoreError::NoHistory`], [`RestoreError::WhichHistory`], [`RestoreError::NoBase`]
pub(super) fn choose(
    histories: &[ArchivedHistory],
    options: &RestoreOptions,
) -> Result<Choice, RestoreError> {
    if histories.is_empty() {
        return Err(RestoreError::NothingOf(options.database.clone()));
    }
    let lives: Vec<ArchivedLife> = histories.iter().map(ArchivedHistory::life).collect();
    let history = pick_history::choose(&lives, options.moment, options.history)?;
    let bases: Vec<DatedBase> = histories[history].bases().collect();
    let base = pick_base::choose(&bases, options.moment)?;
    Ok(Choice { history, base })
}

/// Decides everything else; `stream` is the name under which this restore works.
///
/// # Errors
/// [`RestoreError::NoTable`]; what is wrong with the target; [`RestoreError::LogEnds`] and a gap in the log, where that can be
/// told without reading it.
pub(super) fn decide(
    archive: &ArchivedBase,
    found: &TargetFound,
    options: &RestoreOptions,
    stream: &StreamName,
) -> Result<RestorePlan, RestoreError> {
    let tables = wanted(&archive.manifest, options)?;
    let interrupted = ours(found, stream, archive.history.layout.history())?;
    let load = |wipes| {
        FirstStage::Load(Load {
            wipes,
            names: names(&archive.manifest, tables.as_deref()),
            kept: kept(&archive.manifest, tables.as_deref(), options),
        })
    };
    let begin = match interrupted {
        None => load(false),
        Some(None) => load(true),
        Some(Some(position)) => {
            expect_the_same(position, &archive.base, options)?;
            FirstStage::Resume(position.clone())
        }
    };
    let (base, base_bytes, from) = match &begin {
        FirstStage::Load(_) => {
            let bytes = bytes(&archive.manifest, tables.as_deref());
            (&archive.base, bytes, archive.base.lsn)
        }
        FirstStage::Resume(position) => (began_with(archive, position), 0, position.end_lsn),
    };
    let log = log(&archive.history, from, options)?;
    let sizes = log.spans.iter().map(|span| archive.history.segments[span]);
    Ok(RestorePlan {
        base: base.clone(),
        base_bytes,
        log_segments: log.spans.len(),
        log_bytes: sizes.sum(),
        log_end: log.end,
        tables,
        begin,
    })
}

/// The tables that are meant by those that were asked for; none if all are.
fn wanted(
    manifest: &Manifest,
    options: &RestoreOptions,
) -> Result<Option<Vec<TableName>>, RestoreError> {
    if options.tables.is_empty() {
        return Ok(None);
    }
    let meant = manifest.meant(&options.tables);
    let meant = meant.map_err(|name| RestoreError::NoTable(name.to_string()))?;
    Ok(Some(meant))
}

/// The restore of ours that was interrupted in the target, if there was one, and how far it came, if it came behind the base
/// backup.
fn ours<'f>(
    found: &'f TargetFound,
    stream: &StreamName,
    history: History,
) -> Result<Option<Option<&'f TargetPosition>>, RestoreError> {
    match found {
        TargetFound::Empty => Ok(None),
        TargetFound::Foreign(objects) => Err(RestoreError::NotEmpty {
            objects: objects.clone(),
        }),
        TargetFound::Begun { by, position } => {
            let history = history.to_string();
            let is_other =
                |one: &&(String, String)| (&*one.0, &*one.1) != (stream.as_str(), &*history);
            match by.iter().find(is_other) {
                Some((stream, history)) => Err(RestoreError::OtherRestore {
                    stream: stream.clone(),
                    history: history.clone(),
                }),
                None => Ok(Some(position.as_ref())),
            }
        }
    }
}

/// A restore that was interrupted can only go on to where it was going, or further. `base` is the newest base backup that leads
/// to the moment.
fn expect_the_same(
    position: &TargetPosition,
    base: &base::BaseSummary,
    options: &RestoreOptions,
) -> Result<(), RestoreError> {
    let time = position.commit_time.unwrap_or(Micros::MIN);
    let too_far =
        position.base > base.lsn || !options.moment.is_at_or_after(position.end_lsn, time);
    if too_far {
        return Err(RestoreError::TooFar {
            at: position.end_lsn,
            moment: options.moment,
        });
    }
    match position.kept.asked == options.asked() {
        true => Ok(()),
        false => Err(RestoreError::OtherTables),
    }
}

/// The base backup that an interrupted restore has loaded, where the archive still has it.
fn began_with<'a>(archive: &'a ArchivedBase, position: &TargetPosition) -> &'a base::BaseSummary {
    let mut bases = archive.history.bases.iter();
    let loaded = bases.find(|base| base.lsn == position.base);
    loaded.unwrap_or(&archive.base)
}

/// What of the log is read at most.
fn log(
    history: &ArchivedHistory,
    from: PgLsn,
    options: &RestoreOptions,
) -> Result<Needed, RestoreError> {
    let spans: Vec<Span> = history.segments.keys().copied().collect();
    let chain = pick_base::log(from, &spans, options.moment)?;
    let bases: Vec<DatedBase> = history.bases().collect();
    Ok(pick_base::needed(&chain, &bases, options.moment))
}

/// Whether the rows of a table are wanted.
fn is_wanted(tables: Option<&[TableName]>, table: &TableName) -> bool {
    tables.is_none_or(|tables| tables.contains(table))
}

/// What of the base backup is read.
fn bytes(manifest: &Manifest, tables: Option<&[TableName]>) -> u64 {
    let is_read = |object: &&base::Object| {
        let data = object.data.as_ref();
        data.is_none_or(|data| is_wanted(tables, &data.table))
    };
    let read = manifest.objects.iter().filter(is_read);
    read.map(|object| object.sum.bytes).sum()
}

/// The tables that are wanted, by every name the log may call them.
fn names(manifest: &Manifest, tables: Option<&[TableName]>) -> Tables {
    let data = manifest.data().map(|(_, data)| data);
    let listed = manifest.listed();
    let names = data
        .filter(|data| is_wanted(tables, &data.table))
        .flat_map(|data| [&data.table, &data.root]);
    names
        .map(|table| (table.clone(), listed.get(table).cloned()))
        .collect()
}

/// What is to be told at the end, as far as it is known beforehand.
fn kept(
    manifest: &Manifest,
    tables: Option<&[TableName]>,
    options: &RestoreOptions,
) -> ClosingNotes {
    let mut kept = ClosingNotes::of(options.asked());
    let views = &manifest.materialized_views;
    match tables {
        None => kept.views.clone_from(views),
        // What a view of a part of the tables would hold, nobody asked for.
        Some(_) => {
            let empty = views
                .iter()
                .map(|view| format!("rows of materialized view {view}"));
            kept.left_out.extend(empty);
        }
    }
    kept
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::archive::base::example_manifest;
    use crate::archive::log::Layout;
    use crate::error::chain;
    use crate::flow::testing::lsn;
    use crate::pg::ConnInfo;
    use crate::replay::restore::{RestoreError, RestoreMoment};
    use crate::time::system_time;

    fn name(name: &str) -> TableName {
        TableName {
            schema: "public".to_owned(),
            name: name.to_owned(),
        }
    }

    pub(crate) fn options(moment: RestoreMoment) -> RestoreOptions {
        RestoreOptions {
            target: ConnInfo::parse("postgres://postgres@there/app", None).unwrap(),
            database: "app".to_owned(),
            history: None,
            moment,
            tables: Vec::new(),
            no_owner: false,
            no_privileges: false,
        }
    }

    fn base(at: u64, time: Micros) -> base::BaseSummary {
        let time = system_time(time).try_into().unwrap();
        base::BaseSummary {
            base: format!("dr_agent_app/h/base/{at}/"),
            lsn: lsn(at),
            as_of: time,
            finished_at: time,
            begun_at: None,
            server_version: 150_018,
            tables: 2,
            rows: 1,
            raw_bytes: 1,
            bytes: 3 << 20,
        }
    }

    fn history(
        began: Micros,
        bases: &[(u64, Micros)],
        log: &[(u64, u64)],
        written_at: Micros,
    ) -> ArchivedHistory {
        let history = History {
            system_identifier: 7,
            began,
        };
        let span = |(start, end): &(u64, u64)| Span {
            start: lsn(*start),
            end: lsn(*end),
        };
        ArchivedHistory {
            layout: Layout::new(&StreamName::new("dr_agent", "app"), history),
            bases: bases.iter().map(|(at, time)| base(*at, *time)).collect(),
            segments: log.iter().map(|one| (span(one), one.1 - one.0)).collect(),
            written_at: Some(written_at),
        }
    }

    /// A schema of 10 bytes, table `t` of 3, and `p1` and `p2` of 100 each, which are partitions of `p`.
    fn manifest() -> Manifest {
        let mut manifest = example_manifest();
        manifest.materialized_views = vec![name("seen")];
        let of_t = manifest.objects[0].clone();
        for partition in ["p1", "p2"] {
            let mut object = of_t.clone();
            object.sum.bytes = 100;
            let data = object.data.as_mut().unwrap();
            (data.table, data.root) = (name(partition), name("p"));
            manifest.objects.push(object);
        }
        let mut schema = of_t;
        schema.sum.bytes = 10;
        schema.data = None;
        manifest.objects.push(schema);
        manifest
    }

    /// Base backups at 100 and 300, as of the times 10 and 30; a log from 90 to 500 with the newer of them chosen.
    fn archived() -> ArchivedBase {
        let log = [(90, 200), (200, 350), (350, 500)];
        let history = history(0, &[(100, 10), (300, 30)], &log, 60);
        ArchivedBase {
            base: history.bases[1].clone(),
            history,
            manifest: manifest(),
        }
    }

    fn own() -> StreamName {
        StreamName::new("restore", "app_dr_agent_app")
    }

    fn position(base: u64, at: u64, asked: Vec<TableName>) -> TargetPosition {
        TargetPosition {
            base: lsn(base),
            end_lsn: lsn(at),
            commit_time: Some(40),
            batch: 3,
            whole: asked.is_empty(),
            tables: Tables::new(),
            kept: ClosingNotes::of(asked),
        }
    }

    /// A restore of ours that came as far as this.
    fn begun(position: Option<TargetPosition>) -> TargetFound {
        let history = archived().history.layout.history().to_string();
        TargetFound::Begun {
            by: vec![(own().to_string(), history)],
            position,
        }
    }

    /// A plan, in an empty target or another.
    pub(crate) fn example(start: TargetStart) -> RestorePlan {
        let found = match start {
            TargetStart::Empty => TargetFound::Empty,
            TargetStart::Anew => begun(None),
            TargetStart::Resumed(at) => begun(Some(position(300, at.into(), Vec::new()))),
        };
        decide(&archived(), &found, &options(RestoreMoment::End), &own()).unwrap()
    }

    /// In short; or why not.
    fn said(plan: Result<RestorePlan, RestoreError>) -> String {
        match plan {
            Ok(plan) => format!(
                "{:?} base {} ({} bytes), log {} ({} bytes) to {}",
                plan.start(),
                u64::from(plan.base.lsn),
                plan.base_bytes,
                plan.log_segments,
                plan.log_bytes,
                u64::from(plan.log_end)
            ),
            Err(error) => chain(&error),
        }
    }

    #[test]
    fn history_and_base_backup_are_those_that_lead_to_the_moment() {
        let one = || history(0, &[(100, 10), (300, 30)], &[(100, 500)], 60);
        let successor = || history(70, &[(50, 80)], &[(50, 90)], 95);
        let both = || vec![one(), successor()];
        let cases = [
            (vec![one()], RestoreMoment::End, Ok((0, 1))),
            (vec![one()], RestoreMoment::Time(29), Ok((0, 0))),
            (vec![one()], RestoreMoment::Time(30), Ok((0, 1))),
            (vec![one()], RestoreMoment::Lsn(lsn(299)), Ok((0, 0))),
            (
                vec![one()],
                RestoreMoment::Lsn(lsn(99)),
                Err("no base backup leads to"),
            ),
            (
                vec![one()],
                RestoreMoment::Time(9),
                Err("the oldest is of 2000-01-01T00:00:00.000010Z"),
            ),
            (both(), RestoreMoment::End, Ok((1, 0))),
            (both(), RestoreMoment::Time(20), Ok((0, 0))),
            (both(), RestoreMoment::Lsn(lsn(400)), Ok((0, 1))),
            (both(), RestoreMoment::Lsn(lsn(60)), Ok((1, 0))),
            (
                vec![one(), one()],
                RestoreMoment::Time(20),
                Err("several histories"),
            ),
            (
                vec![],
                RestoreMoment::End,
                Err("no base backup of database \"app\""),
            ),
        ];
        for (histories, moment, expected) in cases {
            let choice = choose(&histories, &options(moment));
            let choice = choice.map(|choice| (choice.history, choice.base));
            match (choice, expected) {
                (Ok(choice), Ok(expected)) => assert_eq!(choice, expected, "{moment}"),
                (Err(error), Err(words)) => {
                    assert!(error.to_string().contains(words), "{error}");
                }
                (choice, expected) => panic!("{moment}: {choice:?}, and not {expected:?}"),
            }
        }
        let mut named = options(RestoreMoment::Lsn(lsn(400)));
        named.history = Some(successor().layout.history());
        let choice = choose(&both(), &named).unwrap();
        assert_eq!((choice.history, choice.base), (1, 0));
    }

    #[test]
    fn the_target_decides_where_a_restore_begins_and_whether() {
        let (end, early) = (RestoreMoment::End, RestoreMoment::Lsn(lsn(320)));
        let at = |at| begun(Some(position(300, at, vec![])));
        let other = TargetFound::Begun {
            by: vec![(
                "restore_x".to_owned(),
                "7-20000101T000000.000000Z".to_owned(),
            )],
            position: None,
        };
        let foreign = TargetFound::Foreign(vec!["table public.t".to_owned()]);
        let whole = "base 300 (213 bytes), log 2 (300 bytes) to 500";
        let cases = [
            (TargetFound::Empty, end, format!("Empty {whole}")),
            (begun(None), end, format!("Anew {whole}")),
            (
                at(400),
                end,
                "Resumed(0/190) base 300 (0 bytes), log 1 (150 bytes) to 500".to_owned(),
            ),
            // Loaded by a run before there was the newer base backup: it goes on from there.
            (
                begun(Some(position(100, 150, vec![]))),
                end,
                "Resumed(0/96) base 100 (0 bytes), log 3 (410 bytes) to 500".to_owned(),
            ),
            (
                at(310),
                early,
                "Resumed(0/136) base 300 (0 bytes), log 1 (150 bytes) to 320".to_owned(),
            ),
            // Refused.
            (at(400), early, "the target already is at 0/190, behind 0/140".to_owned()),
            (
                at(310),
                RestoreMoment::Time(39),
                "the target already is at 0/136, behind 2000-01-01T00:00:00.000039Z".to_owned(),
            ),
            (
                begun(Some(position(301, 310, vec![]))),
                end,
                "the target already is at 0/136, behind the end of the archive".to_owned(),
            ),
            (
                begun(Some(position(300, 400, vec![name("t")]))),
                end,
                "the restore that was interrupted in the target was of other tables".to_owned(),
            ),
            (foreign, end, "the target is not empty: it has table public.t".to_owned()),
            (
                other,
                end,
                "the target holds a restore that was interrupted, of another database or source (restore_x of history \
                 7-20000101T000000.000000Z)"
                    .to_owned(),
            ),
        ];
        for (found, moment, expected) in cases {
            let plan = decide(&archived(), &found, &options(moment), &own());
            assert_eq!(said(plan), expected);
        }
    }

    #[test]
    fn of_the_log_is_read_what_leads_to_the_moment() {
        let gap = [(90, 200), (200, 350), (400, 500)];
        let cases = [
            (None, RestoreMoment::End, "log 2 (300 bytes) to 500"),
            (
                None,
                RestoreMoment::Lsn(lsn(340)),
                "log 1 (150 bytes) to 340",
            ),
            (None, RestoreMoment::Time(1_000), "log 2 (300 bytes) to 500"),
            (
                None,
                RestoreMoment::Lsn(lsn(501)),
                "the change log ends at 0/1F4, before 0/1F5",
            ),
            (
                Some(gap),
                RestoreMoment::Lsn(lsn(340)),
                "log 1 (150 bytes) to 340",
            ),
            // It may lie before the gap: only the log knows.
            (
                Some(gap),
                RestoreMoment::Time(1_000),
                "log 1 (150 bytes) to 350",
            ),
            (
                Some(gap),
                RestoreMoment::End,
                "the change log from 0/15E on is missing; it goes on at 0/190",
            ),
            (
                Some(gap),
                RestoreMoment::Lsn(lsn(450)),
                "the change log from 0/15E on is missing; it goes on at 0/190",
            ),
        ];
        for (log, moment, expected) in cases {
            let mut archived = archived();
            if let Some(log) = log {
                archived.history = history(0, &[(100, 10), (300, 30)], &log, 60);
            }
            let plan = decide(&archived, &TargetFound::Empty, &options(moment), &own());
            let said = said(plan);
            assert!(said.contains(expected), "{moment}: {said}");
        }
        // The time of a later base backup bounds what an earlier moment reads.
        let mut archived = archived();
        archived.base = archived.history.bases[0].clone();
        let moment = options(RestoreMoment::Time(20));
        let plan = decide(&archived, &TargetFound::Empty, &moment, &own());
        assert_eq!(
            said(plan),
            "Empty base 100 (213 bytes), log 2 (260 bytes) to 300"
        );
    }

    #[test]
    fn a_part_of_the_tables_is_loaded_and_its_views_stay_empty() {
        let names = |plan: &RestorePlan| match &plan.begin {
            FirstStage::Load(load) => {
                let names = load.names.keys().map(|name| name.name.clone());
                (names.collect::<Vec<_>>().join(" "), load.kept.clone())
            }
            FirstStage::Resume(_) => panic!("the target is empty"),
        };
        let decided = |tables: &[&str]| {
            let mut options = options(RestoreMoment::End);
            options.tables = tables.iter().map(|table| name(table)).collect();
            decide(&archived(), &TargetFound::Empty, &options, &own())
        };
        let all = decided(&[]).unwrap();
        assert_eq!((all.base_bytes, &all.tables), (213, &None));
        let (named, kept) = names(&all);
        assert_eq!(named, "p p1 p2 t");
        assert_eq!(kept.views, [name("seen")]);
        assert!(kept.left_out.is_empty() && kept.asked.is_empty());

        let part = decided(&["p"]).unwrap();
        assert_eq!(part.base_bytes, 210);
        assert_eq!(part.tables, Some(vec![name("p1"), name("p2")]));
        let (named, kept) = names(&part);
        assert_eq!(named, "p p1 p2");
        assert!(kept.views.is_empty());
        assert_eq!(kept.left_out, ["rows of materialized view public.seen"]);
        assert_eq!(kept.asked, [name("p")]);

        let unknown = decided(&["t", "nobody"]).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "the base backup has no table public.nobody"
        );
    }
}
