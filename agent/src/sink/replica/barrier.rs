//! A transaction with barriers: rows and commands in the order of the source, in one transaction on one lane.
//!
//! ```text
//! BEGIN · advance · rows ▶ event ▶ what is known of tables is renewed ▶ rows ▶ event ▶ … ▶ COMMIT
//! ```
//! Where rows go is looked up in the session that applies: only there is visible what the commands have done.
//!
//! # Invariants
//! - A command takes effect with the row that tells of it, or not at all.
//! - Whoever applies a table's rows applies its commands: the stream, or who catches up with a late table beside it.
//! - What `dr_agent.table_sync` calls a table changes with the table's name.
//!
//! # What it does not do
//! How a command takes effect is [`crate::ddl`]'s.

use super::divide::Divided;
use super::fold::Folder;
use super::lane::Lane;
use super::moved::{Move, Moved};
use super::relations::Standing;
use super::slice::Slices;
use super::{Events, SinkError, SinkSettings, attempt};
use crate::catalog::names::{self, TableNames};
use crate::ddl::{self, CommandCounts, Done, Newer, Outcome, Replay};
use crate::failpoint;
use crate::flow::batch::Batch;
use crate::flow::transaction::Change;
use crate::names::TableName;
use crate::pg::PgLsn;
use crate::schema::ddl::{AsOf, DdlEvent, EventKind, EventObject, FOUND};
use crate::schema::listing::{Copied, ListedAs};
use crate::schema::set_aside::{self, Aside, Noted};
use crate::schema::{self, ddl_applied, ddl_waiting, firing, table_sync};
use crate::sink::Applied;

/// Applies a batch of one transaction with barriers; returns what has become of the tables, too.
pub(super) async fn apply(
    settings: &SinkSettings,
    lane: &mut Lane,
    folder: &mut Folder,
    batch: &Batch,
) -> Result<(Applied, Moved), SinkError> {
    let begin = attempt::begin(settings, batch, batch.last());
    lane.run(&format!("{begin}; SET CONSTRAINTS ALL DEFERRED"))
        .await?;
    let mut barrier = Barrier {
        divided: Divided::new(settings, lane, folder, batch),
        replay: None,
        commit_lsn: batch.last().commit_lsn,
        moved: Moved::default(),
        names: None,
        commands: CommandCounts::default(),
    };
    let applying = barrier.transaction().await;
    if let Err(error) = applying {
        return Err(barrier.divided.placed(0, error));
    }
    barrier.divided.commit().await?;
    failpoint::hit("barrier:committed");
    let applied = Applied {
        net_changes: barrier.divided.net_changes,
        slow_path: false,
        spread: false,
        commands: barrier.commands,
    };
    Ok((applied, barrier.moved))
}

struct Barrier<'a> {
    divided: Divided<'a>,
    /// The commands so far.
    replay: Option<Replay>,
    commit_lsn: PgLsn,
    moved: Moved,
    /// What tables are called, as of the last command.
    names: Option<TableNames>,
    commands: CommandCounts,
}

impl Barrier<'_> {
    async fn transaction(&mut self) -> Result<(), SinkError> {
        let (batch, limits) = (self.divided.batch, self.divided.folder.limits());
        let mut slices = Slices::new(&batch.transactions, limits);
        while let Some(slice) = slices.next()? {
            let changes: Vec<&Change> = slice.changes().map(|(_, change)| change).collect();
            for run in changes.chunk_by(|a, b| !a.is_of_barriers() && !b.is_of_barriers()) {
                match run {
                    [change] if change.is_of_barriers() => self.event(change).await?,
                    rows => self.rows(rows).await?,
                }
            }
        }
        Ok(())
    }

    async fn rows(&mut self, changes: &[&Change]) -> Result<(), SinkError> {
        let divided = &mut self.divided;
        let changes = changes.iter().map(|change| (self.commit_lsn, *change));
        let wanted = divided.folder.wanted(divided.lane.client(), changes);
        let wanted = wanted.await?;
        match wanted.is_empty() {
            true => Ok(()),
            false => divided.rows(wanted).await,
        }
    }

    /// A row of `dr_agent.ddl`: what it tells of, and then itself.
    async fn event(&mut self, change: &Change) -> Result<(), SinkError> {
        let table = schema::ddl::name();
        if self.divided.folder.standing(&table, self.commit_lsn) == Standing::InTheCopy {
            return Ok(());
        }
        if let Some(event) = schema::ddl::event(change)? {
            self.command(&event).await?;
            failpoint::hit("barrier:applied");
        }
        self.rows(&[change]).await
    }

    async fn command(&mut self, event: &DdlEvent) -> Result<(), SinkError> {
        let renames = may_rename(event);
        if renames && self.names.is_none() {
            self.names = Some(names::of_tables(self.divided.lane.client()).await?);
        }
        let done = self.replayed(event).await?;
        let mut moves = Vec::new();
        if renames {
            moves.extend(self.renamed().await?);
        }
        moves.extend(self.came(event, &done).await?);
        moves.extend(self.aside(event, &done).await?);
        self.quiet(event).await?;
        self.note(event, &done).await?;
        self.commands.count(done.outcome);
        let moved = Moved(moves);
        self.divided.lane.forget();
        self.divided.folder.renew(&moved);
        self.moved.0.extend(moved.0);
        Ok(())
    }

    async fn replayed(&mut self, event: &DdlEvent) -> Result<Done, SinkError> {
        let newer = self.newer(event).await?;
        let mut objects: Vec<&EventObject> = Vec::new();
        for object in &event.objects {
            let is_newer = newer.as_ref().is_none_or(|newer| newer.is_about(object));
            if !is_newer && self.is_concerned(object).await? {
                objects.push(object);
            }
        }
        let Divided { settings, lane, .. } = &self.divided;
        let client = lane.client();
        let tables: Vec<TableName> = objects.iter().filter_map(|it| ddl::table_of(it)).collect();
        ddl::yield_indexes(client, &settings.stream, &tables).await?;
        let replay = match &mut self.replay {
            Some(replay) => replay,
            none => none.insert(Replay::new(
                ddl::is_across(client, event).await?,
                settings.index_bytes,
            )),
        };
        Ok(replay.apply(client, event, &objects).await?)
    }

    /// What other commands are about that committed while the source looked for this one; none where that is not known, and everything
    /// may be. What is left alone, and differs, is found by comparing.
    async fn newer(&self, event: &DdlEvent) -> Result<Option<Newer>, SinkError> {
        let Some(as_of) = AsOf::of(event) else {
            return Ok(Some(Newer::default()));
        };
        let (client, stream) = (self.divided.lane.client(), &self.divided.settings.stream);
        let now = schema::ddl::seen(client).await?;
        if !as_of.is_overtaken(&now) {
            return Ok(Some(Newer::default()));
        }
        let new = ddl_applied::objects_since(client, stream, as_of.lsn, self.commit_lsn).await?;
        Ok(as_of.are_all(new.len(), &now).then(|| Newer::of(&new)))
    }

    /// Whether what is here of an object is as of right before the command, and this sink's. Of a table whose copy was taken later,
    /// or is being taken, it is not.
    async fn is_concerned(&self, object: &EventObject) -> Result<bool, SinkError> {
        let Divided {
            settings,
            lane,
            folder,
            ..
        } = &self.divided;
        let all = settings.events == Events::All;
        let Some(table) = ddl::table_of(object) else {
            return Ok(all);
        };
        Ok(match folder.standing(&table, self.commit_lsn) {
            Standing::Applied => true,
            Standing::InTheCopy => false,
            Standing::LeftOut => {
                all && !table_sync::is_unfinished(lane.client(), &settings.stream, &table).await?
            }
        })
    }

    /// Tables that have another name, and those that are gone.
    async fn renamed(&mut self) -> Result<Vec<Move>, SinkError> {
        let client = self.divided.lane.client();
        let behind = names::of_tables(client).await?;
        let before = self.names.replace(behind).unwrap_or_default();
        let Some(behind) = &self.names else {
            return Ok(Vec::new());
        };
        let stream = &self.divided.settings.stream;
        let mut moves = Vec::new();
        for (oid, table) in before {
            match behind.get(&oid) {
                Some(now) if *now == table => {}
                Some(now) => {
                    table_sync::rename(client, stream, &table, now).await?;
                    moves.push(Move::Renamed(table, now.clone()));
                }
                None => {
                    table_sync::gone(client, stream, &table).await?;
                    moves.push(Move::Gone(table));
                }
            }
        }
        Ok(moves)
    }

    /// Tables that the source has published in the same transaction: new ones, and those that are published otherwise now.
    async fn came(&mut self, event: &DdlEvent, done: &Done) -> Result<Vec<Move>, SinkError> {
        let mut moves = Vec::new();
        let stream = &self.divided.settings.stream;
        let client = self.divided.lane.client();
        for object in &event.objects {
            let table = ddl::table_of(object).filter(|_| object.address.kind == "table");
            let (Some(table), Some(listed_as)) = (table, &object.listed_as) else {
                continue;
            };
            let listed_as = ListedAs::new(listed_as.clone());
            if !object.created {
                let standing = self.divided.folder.standing(&table, self.commit_lsn);
                if standing == Standing::Applied {
                    table_sync::relist(client, stream, &table, &listed_as).await?;
                    moves.push(Move::Relisted(table, listed_as));
                }
                continue;
            }
            let is_there = done.settled.contains(&object.address);
            if !is_there || done.copy_again.contains(&table) {
                continue;
            }
            table_sync::came(client, stream, &table, &listed_as).await?;
            let copied = Copied {
                snapshot_lsn: None,
                listed_as: Some(listed_as),
            };
            moves.push(Move::Came(table, copied));
        }
        Ok(moves)
    }

    /// Tables whose rows no stream has carried.
    async fn aside(&mut self, event: &DdlEvent, done: &Done) -> Result<Vec<Move>, SinkError> {
        if done.copy_again.is_empty() {
            return Ok(Vec::new());
        }
        let (client, stream) = (self.divided.lane.client(), &self.divided.settings.stream);
        let tables: Vec<TableName> = done.copy_again.iter().cloned().collect();
        let out = table_sync::take_out(client, stream, &tables).await?;
        let reason = format!(
            "its rows are copied again: {} has changed them where no change is sent",
            event.tag
        );
        let aside = out.iter().map(|table| Aside {
            table: table.clone(),
            reason: reason.clone(),
        });
        set_aside::note(client, stream, &aside.collect::<Vec<_>>(), Noted::Beside).await?;
        Ok(out.into_iter().map(Move::Aside).collect())
    }

    /// A trigger that fires ALWAYS would act on what is applied.
    async fn quiet(&mut self, event: &DdlEvent) -> Result<(), SinkError> {
        let may_fire = ["TRIGGER", "TABLE", "RULE", "VIEW"];
        if event.tag == FOUND || may_fire.iter().any(|word| event.tag.contains(word)) {
            let (client, stream) = (self.divided.lane.client(), &self.divided.settings.stream);
            firing::quiet(client, Some(stream)).await?;
        }
        Ok(())
    }

    async fn note(&mut self, event: &DdlEvent, done: &Done) -> Result<(), SinkError> {
        let settings = self.divided.settings;
        let (client, stream) = (self.divided.lane.client(), &settings.stream);
        let mut detail: Vec<String> = Vec::new();
        ddl_waiting::settled(client, stream, &done.settled).await?;
        for waiting in &done.waiting {
            detail.push(format!("{}: {}", waiting.identity, waiting.reason));
            ddl_waiting::note(client, stream, waiting).await?;
        }
        if settings.strict && done.outcome == Outcome::Waits {
            return Err(SinkError::Command {
                id: event.id,
                tag: event.tag.as_str().into(),
                reason: detail.join("; ").into(),
            });
        }
        let at = (event.id, self.commit_lsn);
        let (outcome, detail) = (done.outcome.as_str(), detail.join("; "));
        ddl_applied::note(client, stream, at, outcome, &detail).await?;
        match done.outcome {
            Outcome::Waits => tracing::error!(
                %stream, ddl = event.id, tag = event.tag, lsn = %self.commit_lsn, reason = detail,
                "a command of the source could not be carried out on the replica; the rest goes on, and it is tried again: `dr-agent ddl`"
            ),
            Outcome::Later => tracing::info!(
                %stream, ddl = event.id, tag = event.tag, "an index on a large table is built beside the stream"
            ),
            Outcome::Copy => tracing::warn!(
                %stream, ddl = event.id, tag = event.tag, tables = ?done.copy_again,
                "a command of the source has changed rows where no change is sent: these tables are copied again"
            ),
            _ => {
                tracing::info!(%stream, ddl = event.id, tag = event.tag, outcome, "a command of the source");
            }
        }
        Ok(())
    }
}

/// Whether a table may have another name behind it, or be gone.
fn may_rename(event: &DdlEvent) -> bool {
    event.kind == EventKind::Drop
        || event.kind == EventKind::Command
            && (event.tag == FOUND || event.tag.starts_with("ALTER"))
}
