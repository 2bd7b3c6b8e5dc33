//! A TCP proxy on the loopback interface: the network, as bad as a test wants it, or as far away.
//!
//! Each direction of a connection is a delay line: what is read is given the moment it is due at the far
//! end, and waits in a queue until then, while more is read. So a [`Line`] that is long costs
//! latency, not throughput. The rate is shared by all connections of the proxy, as a real line's is.
//!
//! # Invariants
//! - [`Proxy::cut`] ends every connection with a reset, not with an orderly end, and refuses new
//!   ones until [`Proxy::heal`].
//! - While [`Network::BlackHole`] lasts nothing passes and nothing ends: what a dead router does.
//! - A queue holds what is on its way, and no more: with a rate the bandwidth-delay product and a
//!   router's buffer, without one `WINDOW`. A sender beyond that is made to wait.
//!
//! # What it does not do
//! It knows no PostgreSQL; TLS passes through untouched. It loses nothing and reorders nothing, and there
//! is no slow start: a connection is at full speed from its first byte. Its delay is exact to about
//! two milliseconds.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// What may be on its way in one direction of a connection whose line has no rate: about the window
/// that Linux grows to by itself.
const WINDOW: usize = 4 << 20;

/// How long a line's router keeps what it cannot send yet, as time at the line's rate.
const ROUTER_BUFFER: Duration = Duration::from_millis(20);

/// How long a line with a delay lets bytes gather before it reads again. A reader that wakes for every
/// small packet would slow a sender on the same machine, as no distant reader does.
const GATHER: Duration = Duration::from_millis(2);

/// What is read at once.
const CHUNK: usize = 64 * 1024;

/// How long, and how thick, the way is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// The time every byte takes, in each direction: half of the round trip.
    pub delay: Duration,
    /// Bytes per second in each direction, all connections together; `None` for no limit.
    pub bytes_per_second: Option<u64>,
}

impl Line {
    /// The time `bytes` keep the line busy.
    fn busy(&self, bytes: usize) -> Duration {
        match self.bytes_per_second {
            Some(rate) => Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64),
            None => Duration::ZERO,
        }
    }

    /// What may be under way in one direction of one connection.
    fn window(&self) -> usize {
        match self.bytes_per_second {
            Some(rate) => {
                let under_way = (self.delay + ROUTER_BUFFER).as_secs_f64() * rate as f64;
                CHUNK + under_way as usize
            }
            None => WINDOW,
        }
    }
}

/// What the network does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Everything passes.
    Up(Line),
    /// Nothing passes; connections stay open.
    BlackHole,
    /// Connections are reset; new ones too.
    Cut,
}

/// Bytes a proxy has carried since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// From those who connected to the proxy.
    pub upstream: u64,
    /// To them.
    pub downstream: u64,
}

/// One direction of the line, shared by all connections.
struct Direction {
    carried: AtomicU64,
    /// When everything accepted so far will have left, at the line's rate.
    free_at: Mutex<Instant>,
}

impl Direction {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            carried: AtomicU64::new(0),
            free_at: Mutex::new(Instant::now()),
        })
    }

    /// Takes bytes in; the moment they are due at the far end.
    fn accept(&self, bytes: usize, line: &Line) -> Instant {
        self.carried.fetch_add(bytes as u64, Ordering::Relaxed);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = Instant::now().max(*free_at) + line.busy(bytes);
        *free_at + line.delay
    }
}

/// How many times somebody has sent something after having heard something: the round trips that followed one another.
///
/// Over a line so long that nobody is slower than it, what is sent together is one round, however much it is.
#[derive(Default)]
struct Rounds {
    /// The round of the last answer that has arrived.
    heard: AtomicU64,
}

impl Rounds {
    /// The round of what is sent now.
    fn next(&self) -> u64 {
        self.heard.load(Ordering::Relaxed) + 1
    }

    /// An answer to something of this round has arrived.
    fn hear(&self, round: u64) {
        self.heard.fetch_max(round, Ordering::Relaxed);
    }
}

/// A proxy; ends with its value.
pub struct Proxy {
    port: u16,
    network: watch::Sender<Network>,
    upstream: Arc<Direction>,
    downstream: Arc<Direction>,
    rounds: Arc<Rounds>,
    apart: Arc<Mutex<Option<String>>>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port and passes everything to `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("the loopback interface is up");
        let own_port = listener.local_addr().expect("it is bound").port();
        let (network, state) = watch::channel(Network::Up(Line::default()));
        let (upstream, downstream) = (Direction::new(), Direction::new());
        let rounds = Arc::<Rounds>::default();
        let apart = Arc::<Mutex<Option<String>>>::default();
        let connection = Connection {
            rounds: Arc::clone(&rounds),
            apart: Arc::clone(&apart),
            target: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            network: state,
            upstream: Arc::clone(&upstream),
            downstream: Arc::clone(&downstream),
        };
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connection.clone().carry(client));
            }
        });
        Self {
            port: own_port,
            network,
            upstream,
            downstream,
            rounds,
            apart,
            accepting,
        }
    }

    /// Does not count the round trips of connections that begin with this text somewhere in what they send first: sessions with
    /// such an `application_name`, as long as nothing is encrypted.
    pub fn do_not_count(&self, text: &str) {
        let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        *apart = Some(text.to_owned());
    }

    /// Round trips one after the other so far, of all connections together. Only on a line with a delay.
    pub fn rounds(&self) -> u64 {
        self.rounds.heard.load(Ordering::Relaxed)
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What has passed so far, both directions.
    pub fn carried(&self) -> Carried {
        Carried {
            upstream: self.upstream.carried.load(Ordering::Relaxed),
            downstream: self.downstream.carried.load(Ordering::Relaxed),
        }
    }

    /// Resets every connection and refuses new ones.
    pub fn cut(&self) {
        self.network.send_replace(Network::Cut);
    }

    /// Swallows everything, silently.
    pub fn black_hole(&self) {
        self.network.send_replace(Network::BlackHole);
    }

    /// Delays everything in both directions.
    pub fn delay(&self, by: Duration) {
        self.stretch(Line {
            delay: by,
            bytes_per_second: None,
        });
    }

    /// Makes the line as long and as thick as this.
    pub fn stretch(&self, line: Line) {
        self.network.send_replace(Network::Up(line));
    }

    /// Lets everything pass again.
    pub fn heal(&self) {
        self.stretch(Line::default());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.accepting.abort();
    }
}

/// What every connection of a proxy is made with.
#[derive(Clone)]
struct Connection {
    rounds: Arc<Rounds>,
    /// Whose rounds are not counted.
    apart: Arc<Mutex<Option<String>>>,
    target: SocketAddr,
    network: watch::Receiver<Network>,
    upstream: Arc<Direction>,
    downstream: Arc<Direction>,
}

impl Connection {
    fn set_apart(&self) -> Option<String> {
        let apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        apart.clone()
    }

    /// Whether this connection is one whose rounds are not counted.
    async fn is_apart(&self, client: &TcpStream) -> bool {
        let Some(text) = self.set_apart() else {
            return false;
        };
        let mut first = vec![0; 4096];
        let length = client.peek(&mut first).await.unwrap_or(0);
        first[..length]
            .windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    async fn carry(self, mut client: TcpStream) {
        let rounds = match self.is_apart(&client).await {
            true => Arc::<Rounds>::default(),
            false => Arc::clone(&self.rounds),
        };
        let Self {
            rounds: _,
            apart: _,
            target,
            mut network,
            upstream,
            downstream,
        } = self;
        let now = *network.borrow();
        match now {
            Network::Up(line) if line.delay.is_zero() => {}
            // The handshake of TCP is a round trip too; the kernel has answered it for us already.
            Network::Up(line) => {
                let round = rounds.next();
                sleep(line.delay * 2).await;
                rounds.hear(round);
            }
            Network::BlackHole => {}
            Network::Cut => {
                let _ = client.set_zero_linger();
                return;
            }
        }
        let Ok(mut server) = TcpStream::connect(target).await else {
            return;
        };
        for stream in [&client, &server] {
            // Dropped in whatever state, a connection ends with a reset.
            let _ = stream.set_zero_linger();
            let _ = stream.set_nodelay(true);
        }
        // Borrowed halves: owned ones would send an orderly end when they are dropped.
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        // The round of what the server has received last, which is what it answers.
        let asked = AtomicU64::new(0);
        let sent = || rounds.next();
        let received = |round| asked.store(round, Ordering::Relaxed);
        let answering = || asked.load(Ordering::Relaxed);
        let answered = |round| rounds.hear(round);
        let there = pass(
            from_client,
            to_server,
            network.clone(),
            &upstream,
            (&sent, &received),
        );
        let back = pass(
            from_server,
            to_client,
            network.clone(),
            &downstream,
            (&answering, &answered),
        );
        tokio::select! {
            _ = async { tokio::join!(there, back) } => {}
            _ = network.wait_for(|state| *state == Network::Cut) => {}
        }
    }
}

/// What is under way in one direction of one connection.
#[derive(Default)]
struct UnderWay {
    bytes: AtomicUsize,
    arrived: Notify,
}

/// Copies until the end of the stream, which it passes on.
async fn pass(
    from: ReadHalf<'_>,
    to: WriteHalf<'_>,
    network: watch::Receiver<Network>,
    direction: &Direction,
    (taken_in, let_out_of): (&(dyn Fn() -> u64 + Sync), &(dyn Fn(u64) + Sync)),
) {
    let under_way = UnderWay::default();
    let (sender, receiver) = mpsc::unbounded_channel();
    let near_end = take_in(
        from,
        network.clone(),
        direction,
        &under_way,
        (sender, taken_in),
    );
    tokio::select! {
        // The far end is the last to finish, or finds that there is nobody to write to.
        () = let_out(to, network, &under_way, receiver, let_out_of) => {}
        () = async { near_end.await; std::future::pending().await } => {}
    }
}

/// What the line carries: when it is due at the far end, the round it belongs to, and its bytes.
type Piece = (Instant, u64, Bytes);

/// The near end of the line: reads as long as the line has room.
async fn take_in(
    mut from: ReadHalf<'_>,
    network: watch::Receiver<Network>,
    direction: &Direction,
    under_way: &UnderWay,
    (line_in, round): (mpsc::UnboundedSender<Piece>, &(dyn Fn() -> u64 + Sync)),
) {
    // A black hole has no length; what it swallowed comes out when it ends.
    let line = || match *network.borrow() {
        Network::Up(line) => line,
        Network::BlackHole | Network::Cut => Line::default(),
    };
    let mut buffer = BytesMut::new();
    loop {
        while under_way.bytes.load(Ordering::Relaxed) >= line().window() {
            under_way.arrived.notified().await;
        }
        buffer.reserve(CHUNK);
        let Ok(length @ 1..) = from.read_buf(&mut buffer).await else {
            return;
        };
        let due = direction.accept(length, &line());
        under_way.bytes.fetch_add(length, Ordering::Relaxed);
        if line_in
            .send((due, round(), buffer.split().freeze()))
            .is_err()
        {
            return;
        }
        if length < CHUNK && line().delay > GATHER {
            sleep(GATHER).await;
        }
    }
}

/// The far end: writes everything when it is due.
async fn let_out(
    mut to: WriteHalf<'_>,
    mut network: watch::Receiver<Network>,
    under_way: &UnderWay,
    mut line_out: mpsc::UnboundedReceiver<Piece>,
    arrived: &(dyn Fn(u64) + Sync),
) {
    while let Some((due, round, bytes)) = line_out.recv().await {
        if due > Instant::now() {
            sleep_until(due).await;
        }
        if network
            .wait_for(|state| *state != Network::BlackHole)
            .await
            .is_err()
            || {
                // Before the other end can have answered.
                arrived(round);
                to.write_all(&bytes).await.is_err()
            }
        {
            return;
        }
        under_way.bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
        under_way.arrived.notify_one();
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo_server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        port
    }

    fn is_reset(error: &std::io::Error) -> bool {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
        matches!(error.kind(), BrokenPipe | ConnectionReset)
    }

    async fn ping(stream: &mut TcpStream) -> std::io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.map(|_| ())
    }

    #[tokio::test]
    async fn a_cut_resets_and_healing_lets_new_connections_through() {
        let proxy = Proxy::start(echo_server().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
        proxy.cut();
        let error = ping(&mut stream).await.unwrap_err();
        assert!(is_reset(&error), "{error:?}");
        proxy.heal();
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
    }

    #[tokio::test]
    async fn a_black_hole_swallows_without_an_end() {
        let proxy = Proxy::start(echo_server().await).await;
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
        proxy.black_hole();
        let waited = tokio::time::timeout(Duration::from_millis(200), ping(&mut stream)).await;
        assert!(waited.is_err(), "something came through");
        proxy.heal();
        let mut rest = [0; 4];
        stream.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"ping");
    }

    #[tokio::test]
    async fn a_long_line_costs_latency_and_not_throughput() {
        let proxy = Proxy::start(echo_server().await).await;
        proxy.delay(Duration::from_millis(40));
        let begun = Instant::now();
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
            .await
            .unwrap();
        ping(&mut stream).await.unwrap();
        // One round trip to connect, one for the answer.
        assert!(begun.elapsed() >= Duration::from_millis(160));
        // 8 MiB there and back are 256 chunks; a delay for each would take 10 seconds.
        let begun = Instant::now();
        let (mut from, mut to) = stream.split();
        let sent = vec![7; 8 << 20];
        let mut received = vec![0; sent.len()];
        let (written, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut received));
        written.unwrap();
        read.unwrap();
        assert!(received == sent, "the bytes were changed");
        assert!(begun.elapsed() >= Duration::from_millis(80));
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
        let all = (sent.len() + 4) as u64;
        assert_eq!(
            proxy.carried(),
            Carried {
                upstream: all,
                downstream: all
            }
        );
    }

    #[tokio::test]
    async fn a_rate_is_kept_by_all_connections_together_and_holds_the_sender_back() {
        let proxy = Proxy::start(echo_server().await).await;
        proxy.stretch(Line {
            delay: Duration::from_millis(10),
            bytes_per_second: Some(4 << 20),
        });
        let begun = Instant::now();
        let pass = || async {
            let mut stream = TcpStream::connect(("127.0.0.1", proxy.port()))
                .await
                .unwrap();
            let (mut from, mut to) = stream.split();
            let sent = vec![7; 1 << 20];
            let mut received = vec![0; sent.len()];
            let (written, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut received));
            written.unwrap();
            read.unwrap();
        };
        tokio::join!(pass(), pass());
        // Two connections, 1 MiB each, at 4 MiB a second together.
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(500), "{took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }

    #[test]
    fn what_is_under_way_is_bounded_by_the_bandwidth_delay_product() {
        let line = Line {
            delay: Duration::from_millis(40),
            bytes_per_second: Some(12_500_000),
        };
        assert_eq!(line.window(), CHUNK + 750_000);
        assert_eq!(Line::default().window(), WINDOW);
    }
}
