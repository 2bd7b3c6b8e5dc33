//! Whether the peer of a TCP connection is silent: it does not acknowledge what was sent.
//!
//! `TCP_USER_TIMEOUT` would be the kernel's way to end such a connection, but it also counts the time in which the peer
//! acknowledges everything and takes nothing more, because it is busy with what it was sent before: a statement that runs for
//! longer with more data behind it ends there, and every repetition of it. So the kernel is asked instead, now and then, what it
//! knows: retransmissions and probes count only while nothing at all comes back.
//!
//! # Invariants
//! - A connection is ended only after its peer was found silent at every look for the whole limit.
//! - Nobody looks while nothing was sent since the last answer.
//!
//! # What it does not do
//! It does not end a connection whose peer answers, however slow: what that waits for is its statement's business. A connection
//! without anything to send is looked after by keepalives.

use std::fs;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// One connection under watch.
pub(super) struct Silence {
    /// The socket's number in the kernel's tables.
    inode: u64,
    limit: Duration,
    /// When to look next; none while nothing was sent.
    look: Option<Pin<Box<Sleep>>>,
    /// Since when it is silent.
    since: Option<Instant>,
}

impl Silence {
    pub(super) fn new(inode: u64, limit: Duration) -> Self {
        Self {
            inode,
            limit,
            look: None,
            since: None,
        }
    }

    /// Something was sent.
    pub(super) fn sent(&mut self) {
        if self.look.is_none() {
            self.look_in_a_while();
        }
    }

    /// Something has come.
    pub(super) fn heard(&mut self) {
        self.look = None;
        self.since = None;
    }

    /// Ready with an error once the peer was silent for too long. Asked while a read waits.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            match &mut self.look {
                None => return Poll::Pending,
                Some(look) => std::task::ready!(look.as_mut().poll(cx)),
            }
            // A kernel that does not tell gives up by itself, after a quarter of an hour.
            let silent = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
                .iter()
                .filter_map(|table| fs::read_to_string(table).ok())
                .any(|table| is_silent(&table, self.inode));
            if !silent {
                self.since = None;
            } else if self.since.get_or_insert_with(now).elapsed() >= self.limit {
                self.look = None;
                return Poll::Ready(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "the server's machine has not acknowledged anything for {:?}",
                        self.limit
                    ),
                ));
            }
            self.look_in_a_while();
        }
    }

    fn look_in_a_while(&mut self) {
        self.look = Some(Box::pin(sleep_until(now() + self.limit / 6)));
    }
}

fn now() -> Instant {
    Instant::now()
}

/// Whether the kernel's table says that this socket sends again and again, or asks for room, and hears nothing.
fn is_silent(table: &str, inode: u64) -> bool {
    /// What is pending for a socket (`get_tcp4_sock()` of Linux): a retransmission, or a probe of a closed window.
    const RETRANSMISSION: &str = "01";
    const PROBE: &str = "04";
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, _, _, _, _, timer, again, _, probes, number, ..] = fields.as_slice() else {
            return false;
        };
        if number.parse() != Ok(inode) {
            return false;
        }
        let again = u32::from_str_radix(again, 16).unwrap_or(0);
        let probes = probes.parse().unwrap_or(0);
        match timer.split(':').next() {
            // The first may just have been sent.
            Some(RETRANSMISSION) => again >= 2,
            Some(PROBE) => probes >= 2,
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2F8D 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 000000006935e920 100 0 0 10 0
   1: 0100007F:33F4 0100007F:1538 01 00112233:00000000 01:00000014 00000005     0        0 12 2 000000000d958cca 20 4 30 10 -1
   2: 0100007F:33F5 0100007F:1538 01 00112233:00000000 01:00000014 00000000     0        0 13 2 000000000d958cca 20 4 30 10 -1
   3: 0100007F:33F6 0100007F:1538 01 00112233:00000000 04:00000014 00000000     0        0 14 2 000000000d958cca 20 4 30 10 -1
   4: 0100007F:33F7 0100007F:1538 01 00112233:00000000 04:00000014 00000000     0        7 15 2 000000000d958cca 20 4 30 10 -1
   5: 0100007F:33F8 0100007F:1538 01 00000000:00000000 02:00000014 00000000     0        0 16 2 000000000d958cca 20 4 30 10 -1
";

    #[test]
    fn who_hears_nothing_is_told_from_who_waits_for_room() {
        let expected = [
            (11, false, "listens"),
            (12, true, "sends the same again"),
            (13, false, "has just sent"),
            (14, false, "is answered that there is no room"),
            (15, true, "asks for room in vain"),
            (16, false, "has nothing to send"),
            (17, false, "is not there"),
        ];
        for (inode, silent, what) in expected {
            assert_eq!(is_silent(TABLE, inode), silent, "one that {what}");
        }
    }
}
