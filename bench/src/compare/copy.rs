//! The initial copy: a filled source into an empty server, with as many jobs for everybody.

use anyhow::Result;

use super::arena::{Arena, Base};
use super::contestant::{Contestant, CopyGround, Outcome};
use super::drain::{show, workload};
use super::{Journal, Options};
use crate::results::{Drain, Skipped};

/// As in the results.
const NAME: &str = "copy";

/// Measures all contestants that copy, and adds them to the results.
pub(crate) async fn measure(
    contestants: &[Contestant],
    options: &Options,
    fsync: bool,
    journal: &mut Journal,
) -> Result<()> {
    eprintln!("\n== initial copy: set up");
    let arena = Arena::open(workload("tpcb")?, options.scale, fsync).await?;
    let session = arena.session().await;
    let rows = session
        .number(
            "SELECT (SELECT count(*) FROM pgbench_accounts) + (SELECT count(*) FROM pgbench_tellers)
                 + (SELECT count(*) FROM pgbench_branches)",
        )
        .await
        .unsigned_abs();
    let mut contestants: Vec<&Contestant> = contestants
        .iter()
        .filter(|contestant| contestant.copies())
        .collect();
    for network in &options.network {
        for number in 0..options.rounds {
            let begin = number as usize % contestants.len().max(1);
            let mut given_up = Vec::new();
            for place in 0..contestants.len() {
                let contestant = contestants[(begin + place) % contestants.len()];
                let replica = Base::new_replica(fsync).await;
                let ground = CopyGround {
                    arena: &arena,
                    replica: &replica,
                    network: *network,
                    wan: options.wan,
                    jobs: options.jobs,
                    patience: options.patience(),
                };
                let why = match contestant.copy(ground).await {
                    Ok(Outcome::Measured(round)) => {
                        show(network.name(), contestant.name(), &round);
                        let drain = Drain {
                            workload: NAME.to_owned(),
                            network: network.name().to_owned(),
                            contestant: contestant.name().to_owned(),
                            transactions: 0,
                            rows,
                            wal_bytes: 0,
                            compared_equal: true,
                            rounds: Vec::new(),
                        };
                        journal.add_round(drain, round)?;
                        continue;
                    }
                    Ok(Outcome::Skipped(why)) => why,
                    Err(error) => format!("{}: {error:#}", network.name()),
                };
                eprintln!("   {}: skipped, {why}", contestant.name());
                given_up.push(contestant);
                journal.skip(Skipped {
                    workload: NAME.to_owned(),
                    contestant: contestant.name().to_owned(),
                    why,
                })?;
            }
            contestants.retain(|contestant| !given_up.contains(contestant));
        }
    }
    Ok(())
}
