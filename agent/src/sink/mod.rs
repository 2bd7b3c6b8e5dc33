//! Sinks: places where a batch becomes durable. The replica under route `direct`, a Kinesis stream under route
//! `kinesis`; the archive takes batches beside either ([`crate::archive::log`]).
//!
//! ```text
//! whoever ships ─batch─▶ [a channel] ─▶ Sink ─Outcome, in the order of batches─▶ [hand_on] ─▶ whoever ships
//! ```
//!
//! # What a sink promises
//! What [`Sink`] and [`Outcome`] say: an answer for each batch, in order, and one that is `Ok` lets the slot forget the batch.
//! It is given each batch once per session. After an error it is gone, with the session: the pipeline starts again from the
//! progress row, or from where the slot was confirmed.

pub mod kinesis;
pub mod replica;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::ddl::CommandCounts;
use crate::flow::batch::Batch;

/// What a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Net changes carried out.
    pub net_changes: u64,
    /// Whether the slow path was needed.
    pub slow_path: bool,
    /// Whether it was spread over lanes.
    pub spread: bool,
    /// Commands of the source in it, by outcome.
    pub commands: CommandCounts,
}

/// What became of a batch.
#[derive(Debug)]
pub struct Outcome<E> {
    /// The batch.
    pub batch: Arc<Batch>,
    /// `Ok`: it is durable. After an error the sink is of no further use.
    pub result: Result<Applied, E>,
    /// From sending its first statement, or record, to the answer of its last.
    pub took: Duration,
}

/// Takes batches from a channel that whoever opened it holds the other end of.
pub trait Sink: Send {
    /// Why a batch could not be made durable.
    type Error: Send;

    /// The next outcome, in the order of batches; none once there are no more batches and all are answered.
    fn next(&mut self) -> impl Future<Output = Option<Outcome<Self::Error>>> + Send;
}

/// Hands out what a sink answers, until there is no more, nobody listens, or a batch has failed: the sink ends with it.
pub async fn hand_on<S: Sink, E: From<S::Error> + Send>(
    mut sink: S,
    outcomes: mpsc::Sender<Outcome<E>>,
) {
    while let Some(outcome) = sink.next().await {
        let failed = outcome.result.is_err();
        if outcomes.send(outcome.handed_on()).await.is_err() || failed {
            return;
        }
    }
}

impl<E> Outcome<E> {
    /// The same, with the error of whoever hands it on.
    pub fn handed_on<F: From<E>>(self) -> Outcome<F> {
        Outcome {
            batch: self.batch,
            result: self.result.map_err(F::from),
            took: self.took,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::flow::ledger::BatchNumber;
    use crate::flow::testing::{lsn, transaction};

    /// Answers what it was told to.
    struct Told(VecDeque<Result<(), &'static str>>, i64);

    impl Sink for Told {
        type Error = &'static str;

        async fn next(&mut self) -> Option<Outcome<&'static str>> {
            let result = self.0.pop_front()?;
            self.1 += 1;
            let batch = Arc::new(Batch {
                number: BatchNumber(self.1),
                previous: lsn(1),
                transactions: vec![transaction(2)],
            });
            let result = result.map(|()| Applied::default());
            let took = Duration::ZERO;
            Some(Outcome {
                batch,
                result,
                took,
            })
        }
    }

    #[tokio::test]
    async fn an_error_is_the_last_answer_of_a_sink() {
        for (told, expected) in [
            (vec![], vec![]),
            (vec![Ok(()), Ok(())], vec![Ok(1), Ok(2)]),
            (
                vec![Ok(()), Err("full"), Ok(())],
                vec![Ok(1), Err("full".to_owned())],
            ),
        ] {
            let (outcomes, mut seen) = mpsc::channel::<Outcome<String>>(4);
            hand_on(Told(told.into(), 0), outcomes).await;
            let mut answers = Vec::new();
            while let Some(outcome) = seen.recv().await {
                let number = outcome.batch.number.0;
                answers.push(outcome.result.map(|_| number));
            }
            assert_eq!(answers, expected);
        }
    }
}
