//! One reader of a stream for all databases of this process that follow it.
//!
//! A stream may carry many databases, and Kinesis lets a shard be read five times a second by everybody together. Each database
//! begins somewhere else, so it reads by itself until it is near the tip; there it joins the one reader, and both overlap until
//! nothing can be left out in between.
//!
//! ```text
//! own reading ──near the tip──▶ own reading and the shared one ──own is past where the other was whole──▶ the shared one
//!      ▲                                                                                                    │
//!      └──────────────── too slow for the others, or the shared one has ended ─────────────────────────────┘
//! ```
//!
//! # Invariants
//! - Nothing is left out: the own reading ends once it has delivered everything up to a time at which the shared one had a place
//!   in every shard and gave to this follower. Records may come twice.
//! - No follower waits for another: who does not take what comes loses its place, and reads by itself again from there.
//! - Of the shared reading a follower holds [`FOLLOWER_BYTES`] at most, of its own records alone.
//! - What is wrong with the shared reading is no follower's error: its own reading says what it is.
//! - A follower that is alone shares with nobody.
//!
//! # What it does not do
//! It shares nothing between processes.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use super::list::now;
use super::read::{Event, ReadStats, Records, StartAt};
use super::{Kinesis, KinesisError};
use crate::time::wall_clock;

/// Pages on their way from the own reading.
const OWN_EVENTS: usize = 2;

/// Events of the shared reading that wait for a follower.
const FOLLOWER_EVENTS: usize = 256;

/// Bytes of them.
const FOLLOWER_BYTES: usize = 12 << 20;

/// Who has read so far is near the tip. While everybody still reads alone a shard gives each of them a page in seconds.
const NEAR: Duration = Duration::from_secs(30);

/// After a shared reading has ended, or given one up.
const APART_FOR: Duration = Duration::from_secs(30);

/// How much earlier a reading begins than where another one was: clocks differ.
const EARLIER: Duration = Duration::from_secs(60);

/// Whether a record is of any use to a follower.
pub type Wanted = Arc<dyn Fn(&Bytes) -> bool + Send + Sync>;

/// Hears of what happens.
pub type OnRead = Arc<dyn Fn(ReadStats) + Send + Sync>;

/// Every stream that is followed in this process.
static STREAMS: LazyLock<Mutex<HashMap<String, Arc<Mutex<SharedRead>>>>> =
    LazyLock::new(Mutex::default);

/// What the followers of a stream have in common.
#[derive(Default)]
struct SharedRead {
    followers: usize,
    places: Vec<SharedPlace>,
    /// Somebody reads for them.
    is_read: bool,
    /// Since when it has a place in every shard.
    whole: Option<Instant>,
}

/// A follower, as the shared reading sees it.
struct SharedPlace {
    events: mpsc::Sender<Event>,
    room: Arc<Semaphore>,
    wanted: Wanted,
    on: OnRead,
}

/// A follower's place among the others.
struct Seat {
    events: mpsc::Receiver<Event>,
    since: Instant,
    shared: Arc<Mutex<SharedRead>>,
}

impl Seat {
    /// From when on nothing of what the stream accepts is left out here; none while that is not so.
    fn whole(&self) -> Option<Instant> {
        let whole = lock(&self.shared).whole;
        whole.map(|whole| whole.max(self.since))
    }
}

/// Counts a follower for as long as it is one.
struct Follower {
    stream: String,
    shared: Arc<Mutex<SharedRead>>,
}

impl Follower {
    fn new(stream: &str) -> Self {
        let mut streams = lock(&STREAMS);
        let shared = Arc::clone(streams.entry(stream.to_owned()).or_default());
        lock(&shared).followers += 1;
        Self {
            stream: stream.to_owned(),
            shared,
        }
    }

    fn is_alone(&self) -> bool {
        lock(&self.shared).followers < 2
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut streams = lock(&STREAMS);
        let mut shared = lock(&self.shared);
        shared.followers -= 1;
        if shared.followers == 0 {
            streams.remove(&self.stream);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a follower is.
struct Following<'a> {
    kinesis: &'a Kinesis,
    follower: Follower,
    events: mpsc::Sender<Event>,
    wanted: Wanted,
    on: OnRead,
    /// Up to when everything has been delivered.
    read_up_to: Option<Instant>,
    /// It reads by itself until then.
    apart_until: Option<Instant>,
}

/// Nobody takes events any more.
struct Unwanted;

impl Kinesis {
    /// The same as [`Kinesis::read`], together with all who follow the stream in this process. Records that are not `wanted` may
    /// be left out.
    ///
    /// # Errors
    /// What somebody has to mend: no stream, no right.
    pub async fn follow(
        &self,
        from: StartAt,
        events: mpsc::Sender<Event>,
        wanted: Wanted,
        on: OnRead,
    ) -> Result<(), KinesisError> {
        let mut following = Following {
            kinesis: self,
            follower: Follower::new(self.stream()),
            events,
            wanted,
            on,
            read_up_to: None,
            apart_until: None,
        };
        let mut from = from;
        loop {
            let Some(mut seat) = following.read_alone(from).await? else {
                return Ok(());
            };
            if following.read_with_others(&mut seat).await.is_err() {
                return Ok(());
            }
            following.apart_until = Some(now() + APART_FOR);
            from = match following.read_up_to {
                Some(at) => StartAt::Timestamp(wall_clock() - now().duration_since(at) - EARLIER),
                None => from,
            };
        }
    }
}

impl Following<'_> {
    /// Reads by itself until the shared reading can be relied on; none once nobody wants more.
    async fn read_alone(&mut self, from: StartAt) -> Result<Option<Seat>, KinesisError> {
        let (own, mut own_events) = mpsc::channel(OWN_EVENTS);
        let (kinesis, on) = (self.kinesis.clone(), Arc::clone(&self.on));
        let mut reading = AbortOnDropHandle::new(tokio::spawn(async move {
            kinesis.read(from, own, &|stats| on(stats)).await
        }));
        let mut seat: Option<Seat> = None;
        loop {
            // In any order: under load neither of the two may keep the other waiting.
            let event = tokio::select! {
                () = self.events.closed() => return Ok(None),
                event = own_events.recv() => match event {
                    Some(event) => event,
                    None => return match (&mut reading).await {
                        Ok(ended) => ended.map(|()| None),
                        Err(error) => match error.try_into_panic() {
                            Ok(panic) => std::panic::resume_unwind(panic),
                            Err(_) => Ok(None),
                        },
                    },
                },
                event = of_others(&mut seat) => match event {
                    // What it has read up to says nothing yet.
                    Some(Event::ReadUpTo(_)) => continue,
                    Some(records) => records,
                    None => {
                        seat = None;
                        self.apart_until = Some(now() + APART_FOR);
                        continue;
                    }
                },
            };
            let at = match event {
                Event::ReadUpTo(at) => Some(at),
                Event::Records(_) => None,
            };
            if self.pass_on(event).await.is_err() {
                return Ok(None);
            }
            let Some(at) = at else { continue };
            match &seat {
                None if self.may_join(at) => seat = Some(self.join()),
                Some(there) if there.whole().is_some_and(|whole| at >= whole) => return Ok(seat),
                _ => {}
            }
        }
    }

    fn may_join(&self, read_up_to: Instant) -> bool {
        let apart = self.apart_until.is_some_and(|until| now() < until);
        !apart && !self.follower.is_alone() && now().duration_since(read_up_to) < NEAR
    }

    /// Passes on what the shared reading gives, until it gives no more.
    async fn read_with_others(&mut self, seat: &mut Seat) -> Result<(), Unwanted> {
        loop {
            let event = tokio::select! {
                biased;
                () = self.events.closed() => return Err(Unwanted),
                event = seat.events.recv() => event,
            };
            match event {
                Some(event) => self.pass_on(event).await?,
                None => return Ok(()),
            }
        }
    }

    async fn pass_on(&mut self, event: Event) -> Result<(), Unwanted> {
        if let Event::ReadUpTo(at) = event {
            // Of two readings the one that is further has been believed.
            if self.read_up_to.is_some_and(|before| at <= before) {
                return Ok(());
            }
            self.read_up_to = Some(at);
        }
        self.events.send(event).await.map_err(|_| Unwanted)
    }

    /// Takes a place among the others; whoever is the first of them begins the shared reading.
    fn join(&self) -> Seat {
        let (events, seat) = mpsc::channel(FOLLOWER_EVENTS);
        let mut shared = lock(&self.follower.shared);
        shared.places.push(SharedPlace {
            events,
            room: Arc::new(Semaphore::new(FOLLOWER_BYTES)),
            wanted: Arc::clone(&self.wanted),
            on: Arc::clone(&self.on),
        });
        if !shared.is_read {
            (shared.is_read, shared.whole) = (true, None);
            let reading = read_for_all(self.kinesis.clone(), Arc::clone(&self.follower.shared));
            tokio::spawn(reading);
        }
        Seat {
            events: seat,
            since: now(),
            shared: Arc::clone(&self.follower.shared),
        }
    }
}

async fn of_others(seat: &mut Option<Seat>) -> Option<Event> {
    match seat {
        Some(seat) => seat.events.recv().await,
        None => std::future::pending().await,
    }
}

/// Reads the stream for everybody who has a place; ends with the last of them, or with the first error, which their own readings
/// will meet and tell.
async fn read_for_all(kinesis: Kinesis, shared: Arc<Mutex<SharedRead>>) {
    let (events, mut read) = mpsc::channel(OWN_EVENTS);
    let stats = Arc::clone(&shared);
    let reader = kinesis.clone();
    let reading = AbortOnDropHandle::new(tokio::spawn(async move {
        let from = StartAt::Timestamp(wall_clock() - EARLIER);
        reader.read(from, events, &|said| tell(&stats, said)).await
    }));
    while let Some(event) = read.recv().await {
        if lock(&shared).give(&event) == 0 {
            break;
        }
    }
    {
        let mut shared = lock(&shared);
        shared.is_read = false;
        shared.whole = None;
        shared.places.clear();
    }
    if reading.is_finished()
        && let Ok(Err(error)) = reading.await
    {
        tracing::debug!(stream = kinesis.stream(), %error, "the shared reading has ended");
    }
}

/// A follower that reads by itself as well hears of both; the last word is soon that of the one it relies on.
fn tell(shared: &Mutex<SharedRead>, said: ReadStats) {
    let heard: Vec<OnRead> = lock(shared)
        .places
        .iter()
        .map(|place| Arc::clone(&place.on))
        .collect();
    heard.iter().for_each(|on| on(said));
}

impl SharedRead {
    /// Gives an event to all; who has no room for it loses its place. Returns how many are left.
    fn give(&mut self, event: &Event) -> usize {
        if matches!(event, Event::ReadUpTo(_)) {
            self.whole.get_or_insert_with(now);
        }
        self.places.retain(|place| place.take(event));
        self.places.len()
    }
}

impl SharedPlace {
    /// False where there is no room, or nobody any more.
    fn take(&self, event: &Event) -> bool {
        let event = match event {
            Event::ReadUpTo(at) => Event::ReadUpTo(*at),
            Event::Records(records) => match self.own(records) {
                Some(own) if own.data.is_empty() => return !self.events.is_closed(),
                Some(own) => Event::Records(own),
                None => return false,
            },
        };
        self.events.try_send(event).is_ok()
    }

    /// The records that are wanted here; none where there is no room for them.
    fn own(&self, records: &Records) -> Option<Records> {
        let data: Vec<Bytes> = records
            .data
            .iter()
            .filter(|record| (self.wanted)(record))
            .cloned()
            .collect();
        let bytes: usize = data.iter().map(Bytes::len).sum();
        let room = Arc::clone(&self.room);
        let room = room
            .try_acquire_many_owned(u32::try_from(bytes).ok()?)
            .ok()?;
        Some(Records {
            data,
            arrived_by: records.arrived_by,
            _room: room,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(
        wanted: &'static [u8],
        events: usize,
        bytes: usize,
    ) -> (SharedPlace, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(events);
        let place = SharedPlace {
            events: sender,
            room: Arc::new(Semaphore::new(bytes)),
            wanted: Arc::new(move |record| record.starts_with(wanted)),
            on: Arc::new(|_| {}),
        };
        (place, receiver)
    }

    fn records(data: &[&'static str]) -> Event {
        let room = Arc::new(Semaphore::new(1));
        Event::Records(Records {
            data: data
                .iter()
                .map(|it| Bytes::from_static(it.as_bytes()))
                .collect(),
            arrived_by: now(),
            _room: room.try_acquire_owned().unwrap(),
        })
    }

    fn taken(receiver: &mut mpsc::Receiver<Event>) -> Vec<Bytes> {
        let mut taken = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            if let Event::Records(records) = event {
                taken.extend(records.data);
            }
        }
        taken
    }

    #[tokio::test]
    async fn each_gets_its_own_and_the_slow_one_loses_its_place_alone() {
        let mut shared = SharedRead::default();
        let (quick, mut quick_events) = place(b"a", 8, 100);
        let (slow, mut slow_events) = place(b"b", 2, 100);
        let (narrow, mut narrow_events) = place(b"c", 8, 4);
        shared.places = vec![quick, slow, narrow];
        assert_eq!(shared.give(&records(&["a1", "b1", "c1", "a2"])), 3);
        assert_eq!(shared.whole, None);
        assert_eq!(shared.give(&Event::ReadUpTo(now())), 3);
        assert!(shared.whole.is_some());
        assert_eq!(shared.give(&records(&["c12", "a3"])), 2);
        assert_eq!(shared.give(&records(&["b2"])), 1);
        assert_eq!(shared.give(&records(&["b3"])), 1);
        assert_eq!(taken(&mut quick_events), ["a1", "a2", "a3"]);
        // What was given before is there still.
        assert_eq!(taken(&mut slow_events), ["b1"]);
        assert_eq!(taken(&mut narrow_events), ["c1"]);
        drop(quick_events);
        assert_eq!(shared.give(&records(&["a4"])), 0);
    }
}
