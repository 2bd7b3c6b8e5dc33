//! The two halves of a stream: one reads, the other writes, and the reading one may let it rest.
//!
//! Like `tokio::io::split`, whose halves do not let anybody at the stream inside.
//!
//! # Invariants
//! - The lock is held for the length of one poll, never across a wait.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::pg::stream::PgStream;

/// One of two owners of a stream.
pub(super) struct Half(Arc<Mutex<PgStream>>);

/// Makes the two halves.
pub(super) fn split(stream: PgStream) -> (Half, Half) {
    let stream = Arc::new(Mutex::new(stream));
    (Half(Arc::clone(&stream)), Half(stream))
}

impl Half {
    /// See [`PgStream::rest`].
    pub(super) fn rest(&self) {
        self.stream().rest();
    }

    fn stream(&self) -> MutexGuard<'_, PgStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for Half {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Half {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream()).poll_shutdown(cx)
    }
}
