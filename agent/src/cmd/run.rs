//! `dr-agent run` and `dr-agent apply`: a pipeline for every database, until told to stop.
//!
//! Pipelines share the HTTP listener, the watch of the two servers and the configuration, and nothing else. One that stops
//! with a definite error leaves the others running, shows its error and looks again from time to time whether it was mended.
//! So the process stays even when none streams any more: somebody has to go on saying so, with a lag that grows. It ends when
//! it is told to, or once every pipeline is fenced, which no time mends. SIGHUP has it read its configuration file again
//! ([`super::reload`]).
//!
//! # Invariants
//! - What a pipeline's task leaves behind when it dies of a bug is shown as stopped, and it is begun anew.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch::{Receiver, channel};
use tokio::task::{Id, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::reload::Reloading;
use crate::backoff::{self, Decision};
use crate::config::{Config, Databases, Route};
use crate::error::{Classify as _, chain};
use crate::observe::http::{self, ServedState};
use crate::observe::lag::Lag;
use crate::observe::metrics;
use crate::observe::status::{Registry, State, StatusCell};
use crate::pipeline::schedule;
use crate::pipeline::{End, Leg, Pipeline, Wake, Waker};
use crate::setup;
use crate::time;
use crate::watch::{self, WatchedSide};

/// How often the source is asked for new databases under `databases = ["*"]`.
const DISCOVER_EVERY: Duration = Duration::from_secs(30);

/// Before a pipeline that has died of a bug is begun anew.
const PAUSE_AFTER_PANIC: Duration = Duration::from_secs(60);

/// Exit code of a fenced agent.
const FENCED: u8 = 3;

/// Exit code of a command that the configuration does not allow.
const USAGE: u8 = 2;

/// `dr-agent run`.
pub async fn run(config: Config, file: PathBuf) -> anyhow::Result<ExitCode> {
    let leg = match config.route {
        Route::Direct => Leg::Whole,
        Route::Kinesis { .. } => Leg::Send,
    };
    serve(config, file, leg).await
}

/// `dr-agent apply`.
pub async fn apply(config: Config, file: PathBuf) -> anyhow::Result<ExitCode> {
    if config.route == Route::Direct {
        eprintln!(
            "dr-agent: route.kind is \"direct\": `dr-agent run` applies to the replica itself"
        );
        eprintln!("  hint: apply belongs to route.kind = \"kinesis\"");
        return Ok(ExitCode::from(USAGE));
    }
    serve(config, file, Leg::Apply).await
}

/// Runs until stopped: 0 after SIGTERM or SIGINT, 1 where not everything that had been received was applied in time, 3 once
/// all are fenced, 1 where it cannot begin.
async fn serve(config: Config, file: PathBuf, leg: Leg) -> anyhow::Result<ExitCode> {
    let config = Arc::new(config);
    let (in_use, config_in_use) = channel(Arc::clone(&config));
    let prometheus =
        metrics::install(&config.objectives).context("install the metrics recorder")?;
    let listener = http::bind(config.http_listen).await.with_context(|| {
        format!(
            "listen on {} (http.listen); is another dr-agent running here?",
            config.http_listen
        )
    })?;
    tracing::info!(
        version = crate::VERSION, ?leg, source = %config.source.conninfo,
        replica = %config.replica.conninfo, http = %config.http_listen, "dr-agent starts"
    );
    let stop = CancellationToken::new();
    let served = CancellationToken::new();
    let registry = Registry::default();
    let shown = ServedState {
        prometheus,
        registry: registry.clone(),
        config: config_in_use.clone(),
    };
    let http = tokio::spawn(http::serve(listener, shown, served.clone()));
    for side in WatchedSide::ALL {
        // Under route `kinesis` the sites need not see one another.
        let expected = match (leg, side) {
            (Leg::Send, WatchedSide::Replica) => continue,
            (Leg::Apply, WatchedSide::Source) => true,
            _ => false,
        };
        let (config, servers) = (Arc::clone(&config), registry.servers().clone());
        tokio::spawn(watch::watch(side, config, servers, expected, stop.clone()));
    }
    let waker = Waker::default();
    let mut supervisor = Supervisor {
        in_use: config_in_use,
        leg,
        registry,
        stop: stop.clone(),
        wake: waker.wake(),
        started: BTreeSet::new(),
        cells: HashMap::new(),
        pipelines: JoinSet::new(),
        fenced: false,
        died: false,
        not_drained: false,
    };
    let reloading = Reloading {
        file,
        in_use,
        waker,
    };
    tokio::spawn(reloading.on_signal());
    tokio::spawn(stop_on_signal(
        stop,
        "stopping: what has been received is still applied",
    ));
    let code = supervisor.run().await;
    served.cancel();
    http.await
        .context("join the HTTP listener")?
        .context("serve HTTP")?;
    Ok(code)
}

/// The first SIGTERM or SIGINT asks to stop; the second ends the process at once, as `kill -9` would.
pub(super) async fn stop_on_signal(stop: CancellationToken, saying: &'static str) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signal handlers cannot be installed; stop with kill -9, it is safe");
        return;
    };
    let mut either = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    either().await;
    tracing::info!("{saying}");
    stop.cancel();
    either().await;
    std::process::abort();
}

struct Supervisor {
    in_use: Receiver<Arc<Config>>,
    leg: Leg,
    registry: Registry,
    stop: CancellationToken,
    wake: Wake,
    started: BTreeSet<String>,
    /// Which pipeline a task is.
    cells: HashMap<Id, (String, StatusCell)>,
    pipelines: JoinSet<End>,
    fenced: bool,
    died: bool,
    not_drained: bool,
}

impl Supervisor {
    async fn run(&mut self) -> ExitCode {
        if let Err(code) = self.first_discovery().await {
            return code;
        }
        let mut discover = tokio::time::interval(DISCOVER_EVERY);
        discover.reset();
        let discovers = self.config().source.databases == Databases::All;
        loop {
            tokio::select! {
                biased;
                ended = self.pipelines.join_next_with_id() => match ended {
                    None => break,
                    Some(Ok((_, End::Stopped))) => {}
                    Some(Ok((_, End::Fenced))) => self.fenced = true,
                    Some(Ok((_, End::NotDrained))) => self.not_drained = true,
                    Some(Ok((id, End::Reconfigured))) => {
                        if let Some((database, cell)) = self.cells.remove(&id) {
                            self.begin(database, cell, Duration::ZERO);
                        }
                    }
                    Some(Err(error)) => self.died(&error),
                },
                _ = discover.tick(), if discovers && !self.stop.is_cancelled() => {
                    match setup::source_databases(&self.config()).await {
                        Ok(databases) => self.start(databases),
                        // The pipelines notice an unreachable source themselves.
                        Err(error) => tracing::debug!(error = %chain(&error), "could not list new databases"),
                    }
                }
            }
        }
        if self.fenced {
            ExitCode::from(FENCED)
        } else if self.died || self.not_drained {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }

    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.in_use.borrow())
    }

    /// Finds the databases; without a source there is nothing to start, so it waits for one.
    async fn first_discovery(&mut self) -> Result<(), ExitCode> {
        let mut attempt = 0;
        loop {
            let error = match setup::source_databases(&self.config()).await {
                Ok(databases) => {
                    self.start(databases);
                    return Ok(());
                }
                Err(error) => error,
            };
            attempt += 1;
            let hint = error.hint();
            let hint = hint.as_deref();
            let text = chain(&error);
            let retry_max = self.config().limits.retry_max;
            match backoff::decide(error.class(), attempt, retry_max, rand::random()) {
                Decision::Retry(pause) => {
                    tracing::warn!(attempt, ?pause, error = %text, hint, "no databases known yet, will retry");
                    if tokio::time::timeout(pause, self.stop.cancelled())
                        .await
                        .is_ok()
                    {
                        return Err(ExitCode::SUCCESS);
                    }
                }
                Decision::Stop => {
                    tracing::error!(error = %text, hint, "cannot ask the source for its databases");
                    return Err(ExitCode::FAILURE);
                }
            }
        }
    }

    fn start(&mut self, databases: Vec<String>) {
        for database in databases {
            if !self.started.insert(database.clone()) {
                continue;
            }
            let (config, leg) = (self.config(), self.leg);
            let stream = config.stream(&database);
            let lag = Lag::new(config.source.heartbeat_every, config.objectives.rpo);
            let servers = self.registry.servers();
            let cell = StatusCell::new(&database, stream.as_str(), leg, lag, servers);
            self.registry.add(cell.clone());
            self.begin(database, cell, Duration::ZERO);
        }
    }

    /// A panic is a bug; it is shown, the other databases are still worth protecting, and this one may be, too.
    fn died(&mut self, error: &JoinError) {
        let Some((database, cell)) = self.cells.remove(&error.id()) else {
            return;
        };
        tracing::error!(database, %error, "a pipeline ended because of a bug and is restarted; please report it");
        cell.end(State::Stopped, time::now());
        cell.update(|status| {
            status.error =
                Some("it ended by a bug of dr-agent's own, which is in the log".to_owned());
            status.hint = Some("please report it; it is restarted within a minute".to_owned());
        });
        if self.stop.is_cancelled() {
            self.died = true;
        } else {
            self.begin(database, cell, PAUSE_AFTER_PANIC);
        }
    }

    /// Begins a database's pipeline after a pause.
    fn begin(&mut self, database: String, cell: StatusCell, pause: Duration) {
        let (broken, broken_at) = channel(None);
        let (in_use, leg, stop) = (self.in_use.clone(), self.leg, self.stop.clone());
        let wake = self.wake.clone();
        let known = (database.clone(), cell.clone());
        let task = self.pipelines.spawn(async move {
            if !pause.is_zero() && tokio::time::timeout(pause, stop.cancelled()).await.is_ok() {
                return End::Stopped;
            }
            let config = Arc::clone(&in_use.borrow());
            let pipeline = Pipeline::new(in_use, leg, &database, cell, stop.clone(), wake, broken);
            // Base backups are taken for as long as the pipeline runs.
            let backing_up = stop.child_token();
            let keeping = async {
                // Whoever tails the source keeps the archive.
                if leg != Leg::Apply {
                    schedule::keep(&config, &database, broken_at, &backing_up).await;
                }
            };
            let running = async {
                let end = Box::pin(pipeline.run()).await;
                backing_up.cancel();
                end
            };
            let ((), end) = tokio::join!(Box::pin(keeping), running);
            end
        });
        self.cells.insert(task.id(), known);
    }
}
