//! The two networks of the comparison: none, and a long line.
//!
//! The line lies between the source's site and the replica. An agent sits beside the source, so its line is
//! between agent and replica; a subscription pulls from the replica's side, so its line is between its
//! apply worker and the source. Each contestant says to which server its line leads.

use std::time::Duration;

use clap::{Args, ValueEnum};
use dr_agent_tests::proxy::{Line, Proxy};
use dr_agent_tests::server::PgServer;

/// Whether there is a distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Network {
    /// Everything on the loopback interface.
    Local,
    /// Through the long line.
    Wan,
}

impl Network {
    /// As in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Wan => "wan",
        }
    }
}

/// How long and how thick the line is.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Wan {
    /// Round trip of the long line, in milliseconds.
    #[arg(long, default_value_t = 80)]
    pub(crate) rtt_ms: u64,
    /// Its rate in each direction, in Mbit/s.
    #[arg(long, default_value_t = 1000)]
    pub(crate) mbit: u64,
}

impl Wan {
    fn line(self) -> Line {
        Line {
            delay: Duration::from_millis(self.rtt_ms) / 2,
            bytes_per_second: Some(self.mbit * 1_000_000 / 8),
        }
    }
}

/// The way to a server.
pub(crate) struct Way {
    direct: u16,
    proxy: Option<Proxy>,
}

impl Way {
    /// Opens it; it ends with its value.
    pub(crate) async fn to(server: &PgServer, network: Network, wan: Wan) -> Self {
        let proxy = match network {
            Network::Local => None,
            Network::Wan => {
                let proxy = Proxy::start(server.port()).await;
                proxy.stretch(wan.line());
                Some(proxy)
            }
        };
        Self {
            direct: server.port(),
            proxy,
        }
    }

    /// The port on 127.0.0.1 to connect to.
    pub(crate) fn port(&self) -> u16 {
        self.proxy.as_ref().map_or(self.direct, Proxy::port)
    }

    /// Bytes carried in both directions; unknown without a proxy.
    pub(crate) fn bytes(&self) -> Option<u64> {
        let carried = self.proxy.as_ref()?.carried();
        Some(carried.upstream + carried.downstream)
    }
}
