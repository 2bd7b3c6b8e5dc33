//! A chain of pipelined statements: all are sent before the first answer is awaited.
//!
//! One batch then costs one round trip, however many statements it takes. If one fails, the server
//! skips the rest up to and including COMMIT, which answers ROLLBACK; the first error is the true one
//! and those after it only echo it.

use std::future::Future;
use std::pin::Pin;
use std::task::Poll;

use futures_util::poll;

use super::SinkError;

type Answer = Result<u64, SinkError>;

struct Link<'c> {
    answer: Pin<Box<dyn Future<Output = Answer> + Send + 'c>>,
    /// The answer, if sending alone already produced it.
    early: Option<Answer>,
}

/// Statements on their way, in order.
#[derive(Default)]
pub(super) struct Chain<'c> {
    links: Vec<Link<'c>>,
}

impl<'c> Chain<'c> {
    /// Sends a statement behind the ones before it.
    ///
    /// `tokio-postgres` hands a request to its connection when the future is first polled, so polling
    /// each once, in order, is what sends them in order.
    pub(super) async fn send<T, E>(
        &mut self,
        statement: impl Future<Output = Result<T, E>> + Send + 'c,
    ) where
        T: IntoCount,
        SinkError: From<E>,
    {
        let mut answer: Pin<Box<dyn Future<Output = Answer> + Send + 'c>> =
            Box::pin(async move { Ok(statement.await.map(IntoCount::into_count)?) });
        let early = match poll!(answer.as_mut()) {
            Poll::Ready(answer) => Some(answer),
            Poll::Pending => None,
        };
        self.links.push(Link { answer, early });
    }

    /// Awaits every answer; the first error counts.
    pub(super) async fn finish(self) -> Result<(), SinkError> {
        for link in self.links {
            match link.early {
                Some(answer) => answer?,
                None => link.answer.await?,
            };
        }
        Ok(())
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
