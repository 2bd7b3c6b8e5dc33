//! Backlogs: every contestant drains the same one, in turn, several times.

use std::collections::HashMap;

use anyhow::{Context as _, Result};

use super::arena::Arena;
use super::contestant::{Contestant, Family, Ground, Outcome};
use super::workload::Workload;
use super::{Journal, Options};
use crate::results::{Drain, Round, Skipped};

/// Measures one workload through all networks and adds it to the results.
pub(crate) async fn measure(
    workload: Workload,
    contestants: &[Contestant],
    options: &Options,
    fsync: bool,
    journal: &mut Journal,
) -> Result<()> {
    let mut contestants: Vec<&Contestant> = contestants
        .iter()
        .filter(|contestant| {
            let networks = options.network.iter();
            networks
                .filter(|network| contestant.takes_part(workload.name, **network))
                .count()
                > 0
        })
        .collect();
    if contestants.is_empty() {
        return Ok(());
    }
    eprintln!("\n== {}: set up", workload.title);
    let arena = Arena::open(workload, options.scale, fsync).await?;
    let mut bases = HashMap::new();
    // Agent and pgcopydb put a schema of their own on the source, which a subscription would not
    // understand; pgcopydb starts where the agent is.
    let order = [
        Family::BareSlot,
        Family::Subscription,
        Family::Agent,
        Family::Pgcopydb,
    ];
    for family in order {
        if !contestants
            .iter()
            .any(|contestant| contestant.family() == family)
        {
            continue;
        }
        match family.missing(&arena.source) {
            None => {
                bases.insert(family, family.prepare(&arena, fsync).await?);
            }
            Some(why) => {
                eprintln!("   {family:?} does not take part: {why}");
                for contestant in contestants.iter().filter(|c| c.family() == family) {
                    journal.skip(Skipped {
                        workload: workload.name.to_owned(),
                        contestant: contestant.name().to_owned(),
                        why: why.clone(),
                    })?;
                }
                contestants.retain(|contestant| contestant.family() != family);
            }
        }
    }
    let backlog = arena.run_workload().await?;
    eprintln!(
        "   {} transactions, {} rows, {} MiB of WAL",
        backlog.size.transactions,
        backlog.size.changes,
        backlog.wal_bytes >> 20
    );

    for network in &options.network {
        for number in 0..options.rounds {
            // Nobody is always the first after the others' caches.
            let begin = number as usize % contestants.len().max(1);
            let mut given_up = Vec::new();
            for place in 0..contestants.len() {
                let contestant = contestants[(begin + place) % contestants.len()];
                if !contestant.takes_part(workload.name, *network)
                    || number >= contestant.rounds_max()
                {
                    continue;
                }
                let ground = Ground {
                    arena: &arena,
                    backlog: &backlog,
                    network: *network,
                    wan: options.wan,
                    patience: options.patience(),
                    compare: number == 0,
                };
                let base = bases.get(&contestant.family()).and_then(Option::as_ref);
                match contestant.drain(ground, base).await {
                    Ok(Outcome::Measured(round)) => {
                        show(network.name(), contestant.name(), &round);
                        let empty = Drain {
                            workload: workload.name.to_owned(),
                            network: network.name().to_owned(),
                            contestant: contestant.name().to_owned(),
                            transactions: backlog.size.transactions,
                            rows: backlog.size.changes,
                            wal_bytes: backlog.wal_bytes.unsigned_abs(),
                            compared_equal: base.is_some(),
                            rounds: Vec::new(),
                        };
                        journal.add_round(empty, round)?;
                    }
                    Ok(Outcome::Skipped(why)) => {
                        eprintln!("   {}: skipped, {why}", contestant.name());
                        given_up.push((contestant, why));
                    }
                    // A contestant that fails loses; the others go on.
                    Err(error) => {
                        let why = format!("{}: {error:#}", network.name());
                        eprintln!("   {}: failed, {why}", contestant.name());
                        given_up.push((contestant, why));
                        if let Some(base) = base {
                            base.retire().await;
                        }
                    }
                }
            }
            for (contestant, why) in given_up {
                journal.skip(Skipped {
                    workload: workload.name.to_owned(),
                    contestant: contestant.name().to_owned(),
                    why,
                })?;
                contestants.retain(|other| *other != contestant);
            }
        }
    }
    drop(bases);
    arena.source.stop_immediately().await;
    Ok(())
}

/// One line while it measures.
pub(crate) fn show(network: &str, contestant: &str, round: &Round) {
    let or_dash = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
    eprintln!(
        "   {network:<5} {contestant:<18} {:>8.2} s   cpu source {:>6.1}  agent {:>6}  replica {:>6}   wire {:>7} MiB   peak {:>5} MiB",
        round.seconds,
        round.cpu_source,
        or_dash(round.cpu_agent),
        or_dash(round.cpu_replica),
        round
            .wire_bytes
            .map_or("-".to_owned(), |bytes| (bytes >> 20).to_string()),
        round
            .agent_peak_bytes
            .map_or("-".to_owned(), |bytes| (bytes >> 20).to_string()),
    );
}

/// A workload of the table.
pub(crate) fn workload(name: &str) -> Result<Workload> {
    super::workload::ALL
        .iter()
        .find(|workload| workload.name == name)
        .copied()
        .with_context(|| format!("there is no workload \"{name}\""))
}
