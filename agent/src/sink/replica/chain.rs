//! A chain of pipelined statements: all are sent before the first answer is awaited.
//!
//! One batch then costs one round trip, however many statements it takes. If one fails, the server
//! skips the rest up to and including COMMIT, which answers ROLLBACK; the first error is the true one
//! and those after it only echo it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use futures_util::poll;

use super::SinkError;

type Answer = Result<u64, SinkError>;

struct Link {
    answer: Pin<Box<dyn Future<Output = Answer> + Send>>,
    /// The answer, if sending alone already produced it.
    early: Option<Answer>,
}

/// Statements on their way, in order.
#[derive(Default)]
pub(super) struct Chain {
    links: VecDeque<Link>,
    failed: Option<SinkError>,
    /// Statements sent since the last mark.
    since_mark: usize,
}

impl Chain {
    /// Sends a statement behind the ones before it.
    ///
    /// `tokio-postgres` hands a request to its connection when the future is first polled, so polling
    /// each once, in order, is what sends them in order.
    pub(super) async fn send<T, E>(
        &mut self,
        statement: impl Future<Output = Result<T, E>> + Send + 'static,
    ) where
        T: IntoCount,
        SinkError: From<E>,
    {
        let mut answer: Pin<Box<dyn Future<Output = Answer> + Send>> =
            Box::pin(async move { Ok(statement.await.map(IntoCount::into_count)?) });
        let early = match poll!(answer.as_mut()) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => None,
        };
        self.links.push_back(Link { answer, early });
        self.since_mark += 1;
    }

    /// A chain that failed before anything was sent.
    pub(super) fn failed(error: SinkError) -> Self {
        Self {
            failed: Some(error),
            ..Self::default()
        }
    }

    /// Awaits the answers of everything sent before the last mark, and marks this place. So at most what
    /// lies between two marks is on its way. Stops at the first error.
    pub(super) async fn mark(&mut self) -> Result<(), SinkError> {
        while self.links.len() > self.since_mark && self.failed.is_none() {
            self.next_answer().await;
        }
        self.since_mark = 0;
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Awaits every answer; the first error counts. Cancel-safe: called again it goes on.
    pub(super) async fn finish(&mut self) -> Result<(), SinkError> {
        while !self.links.is_empty() {
            self.next_answer().await;
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Takes every answer as it comes and keeps the first error for whoever asks next. Cancel-safe.
    async fn settle(&mut self) {
        while !self.links.is_empty() {
            self.next_answer().await;
        }
    }

    async fn next_answer(&mut self) {
        let Some(link) = self.links.front_mut() else {
            return;
        };
        let answer = match link.early.take() {
            Some(answer) => answer,
            None => link.answer.as_mut().await,
        };
        self.links.pop_front();
        if let Err(error) = answer {
            self.failed.get_or_insert(error);
        }
    }
}

/// Does `work` on a connection while answers of `chains` are still to come over it.
///
/// `tokio-postgres` stops reading a connection as long as an answer is not taken, so whoever waits for
/// something else on it waits for ever.
pub(super) async fn while_settling<'c, T>(
    chains: impl Iterator<Item = &'c mut Chain>,
    work: impl Future<Output = T>,
) -> T {
    let settling = async {
        for chain in chains {
            chain.settle().await;
        }
    };
    tokio::pin!(work, settling);
    let mut settled = false;
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = &mut settling, if !settled => settled = true,
        }
    }
}

/// What a statement's answer tells of rows; nothing for most.
pub(super) trait IntoCount {
    fn into_count(self) -> u64;
}

impl IntoCount for () {
    fn into_count(self) -> u64 {
        0
    }
}

impl IntoCount for u64 {
    fn into_count(self) -> u64 {
        self
    }
}
