//! ● How far a reader of many shards has come, and which shard may go on. Pure: time is an argument.
//!
//! `shard` asks where a page of records leads, `read` keeps a [`ShardsProgress`] and tells what follows from it. A *position*
//! of a shard is a time on this machine's clock: what the shard had accepted before it has been delivered.
//!
//! A position is rounded down, and the time by which a page had arrived ([`Page::arrived_by`]) up. So the two can be compared
//! over shards: both are differences on one server's clock, taken from ours, and it does not matter that the clocks differ.
//!
//! # Invariants
//! - [`ShardsProgress::read_up_to`] never goes back, is not ahead of any shard's position, and is not ahead of the time at
//!   which the shards were listed last: a shard that is not known yet began after that, and so did its records.
//! - The slowest shard always may go on, and so does one without a position: pausing cannot end in a deadlock.
//!
//! # What it does not do
//! It does not know what is in a record, and it reads no clock.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

/// The most records of a page.
pub(super) const PAGE_RECORDS: i32 = 10_000;

/// A record may be read only a moment after it was accepted, and MillisBehindLatest is rounded: so much is taken off
/// what a shard says. Source: the developer guide, "put-to-get delay is typically less than 1 second".
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// A shard waits when it is so much ahead of the slowest.
const AHEAD_MAX: Duration = Duration::from_secs(30);

/// Five reads per second and shard are allowed; one is left for other readers.
const TIP_EVERY: Duration = Duration::from_millis(250);

/// The same for a shard that has to catch up.
const BEHIND_EVERY: Duration = Duration::from_millis(200);

/// What may be read of a shard per second.
const BYTES_PER_SECOND: u64 = 2 << 20;

/// What may be written into a shard per second.
const WRITTEN_PER_SECOND: u64 = 1 << 20;

/// The most bytes of a page. Source: API reference, GetRecords.
pub(super) const PAGE_BYTES_MAX: u64 = 10 << 20;

/// What a page may bring, `since` the shard was read to its tip; `None` where it has to catch up.
pub(super) fn room_for_page(since: Option<Duration>) -> u64 {
    let Some(since) = since else {
        return PAGE_BYTES_MAX;
    };
    // A second more: what is allowed in one may come at once.
    let millis = since.as_millis().saturating_add(1000);
    let bytes = millis.saturating_mul(u128::from(WRITTEN_PER_SECOND)) / 1000;
    PAGE_BYTES_MAX.min(u64::try_from(bytes).unwrap_or(u64::MAX))
}

/// What an answer to GetRecords says about where it leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// When it was asked for, on this machine's clock.
    pub(super) sent: Instant,
    /// The same in the other clock, to compare with what servers say.
    pub(super) sent_at: SystemTime,
    /// When the answer was here, on this machine's clock.
    pub(super) received: Instant,
    /// MillisBehindLatest.
    pub(super) behind: Duration,
    /// How many records it has.
    pub(super) records: usize,
    /// Bytes of their data.
    pub(super) bytes: u64,
    /// ApproximateArrivalTimestamp of the last.
    pub(super) last_arrival: Option<SystemTime>,
}

impl Page {
    /// The position it leads to; `None` when it says nothing about one.
    ///
    /// A page with room left that is not behind leads to the tip. A full one does not, whatever it says: not every
    /// server counts what comes after it.
    pub(super) fn position(&self) -> Option<Instant> {
        let is_full = self.records >= usize::try_from(PAGE_RECORDS).unwrap_or(usize::MAX);
        match (self.behind.is_zero(), is_full) {
            (true, true) => None,
            (true, false) => Some(self.sent),
            // Not every server counts from its clock; some do from their last record.
            (false, _) => {
                let age = self
                    .last_arrival
                    .and_then(|arrival| self.sent_at.duration_since(arrival).ok());
                self.sent
                    .checked_sub(self.behind.max(age.unwrap_or_default()))
            }
        }
    }

    /// When all of its records had arrived in the stream, on this machine's clock; or later.
    pub(super) fn arrived_by(&self) -> Instant {
        // The last of them is at least so old, whatever a server counts from.
        self.received
            .checked_sub(self.behind)
            .unwrap_or(self.received)
    }

    /// Whether it leads to the tip of the shard.
    pub(super) fn is_tip(&self) -> bool {
        self.behind.is_zero() && self.position().is_some()
    }

    /// How long after this page was asked for the next may be.
    pub(super) fn next_after(&self) -> Duration {
        if self.is_tip() {
            return TIP_EVERY;
        }
        // More would only be refused.
        BEHIND_EVERY.max(Duration::from_millis(self.bytes * 1000 / BYTES_PER_SECOND))
    }
}

/// What every shard is compared with before it reads on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slowest(Option<Instant>);

impl Slowest {
    /// Whether a shard at this position may read on.
    pub(super) fn lets(self, position: Option<Instant>) -> bool {
        match (position, self.0) {
            (None, _) => true,
            // Some shard has not said yet where it is.
            (Some(_), None) => false,
            (Some(own), Some(slowest)) => own <= slowest + AHEAD_MAX,
        }
    }
}

#[derive(Debug)]
struct Shard {
    position: Option<Instant>,
    /// Since when it is to be read.
    added: Instant,
    /// As it said last.
    behind: Duration,
}

/// All shards that are being read.
#[derive(Debug)]
pub(super) struct ShardsProgress {
    began: Instant,
    shards: BTreeMap<String, Shard>,
    /// When the list was asked for that all shards are known from.
    listed: Option<Instant>,
    told: Option<Instant>,
}

impl ShardsProgress {
    /// Nothing is known yet.
    pub(super) fn new(began: Instant) -> Self {
        Self {
            began,
            shards: BTreeMap::new(),
            listed: None,
            told: None,
        }
    }

    /// The shards of a list that was asked for at `sent`; called once the new ones are added.
    pub(super) fn listed(&mut self, sent: Instant) {
        self.listed = self.listed.max(Some(sent));
    }

    /// A shard begins.
    pub(super) fn add(&mut self, shard: &str, now: Instant) {
        let begun = Shard {
            position: None,
            added: now,
            behind: Duration::ZERO,
        };
        self.shards.insert(shard.to_owned(), begun);
    }

    /// Records of a page have been delivered.
    pub(super) fn page(&mut self, shard: &str, page: &Page) {
        if let Some(shard) = self.shards.get_mut(shard) {
            shard.behind = page.behind;
            shard.position = shard.position.max(page.position());
        }
    }

    /// The last record of a closed shard has been delivered. What follows is in its children, which are in the next
    /// list if they are not in the last.
    pub(super) fn ended(&mut self, shard: &str) {
        self.shards.remove(shard);
    }

    /// How far the shard that is furthest behind trails its tip. It grows while a shard does not answer.
    pub(super) fn behind(&self, now: Instant) -> Duration {
        let all = self.shards.values().map(|shard| match shard.position {
            Some(position) => now.saturating_duration_since(position),
            // As it said, if it said anything.
            None => shard.behind.max(now.saturating_duration_since(shard.added)),
        });
        all.max()
            .unwrap_or_else(|| now.saturating_duration_since(self.began))
    }

    /// The position of the slowest shard.
    pub(super) fn slowest(&self) -> Slowest {
        let all = self.shards.values().map(|shard| shard.position);
        // `None` is less than all others.
        Slowest(all.min().flatten())
    }

    /// Up to when everything has been delivered; `None` while there is no news.
    pub(super) fn read_up_to(&mut self) -> Option<Instant> {
        let mut up_to = self.listed?;
        for shard in self.shards.values() {
            up_to = up_to.min(shard.position?);
        }
        let settled = up_to.checked_sub(SETTLED_AFTER)?;
        if self.told.is_some_and(|told| settled <= told) {
            return None;
        }
        self.told = Some(settled);
        Some(settled)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Seconds after some moment.
    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    fn page(sent: Instant, behind: u64, records: usize) -> Page {
        Page {
            sent,
            sent_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
            received: sent + Duration::from_secs(2),
            behind: Duration::from_secs(behind),
            records,
            bytes: 0,
            last_arrival: None,
        }
    }

    #[test]
    fn a_page_leads_to_the_tip_only_with_room_left_and_nothing_behind() {
        let start = Instant::now();
        let sent = at(start, 100);
        assert_eq!(page(sent, 0, 0).position(), Some(sent));
        assert_eq!(page(sent, 0, 9_999).position(), Some(sent));
        assert_eq!(page(sent, 0, 10_000).position(), None);
        assert_eq!(page(sent, 40, 0).position(), Some(at(start, 60)));
        let mut from_an_old_record = page(sent, 40, 10_000);
        from_an_old_record.last_arrival =
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 - 70));
        assert_eq!(from_an_old_record.position(), Some(at(start, 30)));
        // A clock that is behind the server's makes nothing younger than the server says.
        from_an_old_record.last_arrival =
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + 70));
        assert_eq!(from_an_old_record.position(), Some(at(start, 60)));
    }

    #[test]
    fn a_page_had_arrived_when_its_server_says_whatever_the_clocks_say() {
        let start = Instant::now();
        let mut old = page(at(start, 100), 40, 10_000);
        old.last_arrival = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 - 41));
        // Rounded up here and down there: a shard that is read so far has all that had arrived by then.
        assert_eq!(old.arrived_by(), at(start, 62));
        assert_eq!(old.position(), Some(at(start, 59)));
        for clock in [1, 2_000_000] {
            old.last_arrival = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(clock));
            assert_eq!(old.arrived_by(), at(start, 62));
        }
        // At the tip anything may have arrived until the answer.
        assert_eq!(page(at(start, 100), 0, 1).arrived_by(), at(start, 102));
    }

    #[test]
    fn a_shard_at_its_tip_brings_what_may_have_been_written_since() {
        let room = |since: Option<u64>| room_for_page(since.map(Duration::from_millis)) >> 10;
        assert_eq!(room(None), 10 << 10);
        assert_eq!(room(Some(0)), 1 << 10);
        assert_eq!(room(Some(250)), 1280);
        assert_eq!(room(Some(5000)), 6 << 10);
        assert_eq!(room(Some(3_600_000)), 10 << 10);
    }

    #[test]
    fn how_far_behind_a_reader_is_grows_while_a_shard_is_silent() {
        let start = Instant::now();
        let mut progress = ShardsProgress::new(start);
        let behind =
            |progress: &ShardsProgress, seconds| progress.behind(at(start, seconds)).as_secs();
        // No list yet.
        assert_eq!(behind(&progress, 3), 3);
        progress.add("a", at(start, 10));
        progress.add("b", at(start, 10));
        assert_eq!(behind(&progress, 11), 1);
        progress.page("a", &page(at(start, 20), 0, 0));
        progress.page("b", &page(at(start, 20), 7, 5));
        assert_eq!(behind(&progress, 20), 7);
        progress.page("b", &page(at(start, 21), 0, 5));
        assert_eq!(behind(&progress, 21), 1);
        assert_eq!(behind(&progress, 300), 280);
    }

    #[test]
    fn reads_keep_to_the_limits_of_a_shard() {
        let sent = Instant::now();
        let mut large = page(sent, 0, 5);
        large.bytes = 10 << 20;
        assert_eq!(large.next_after(), TIP_EVERY);
        assert_eq!(page(sent, 0, 10_000).next_after(), BEHIND_EVERY);
        large.behind = Duration::from_secs(1);
        assert_eq!(large.next_after(), Duration::from_secs(5));
    }

    #[test]
    fn nothing_is_read_up_to_before_every_shard_has_said_so() {
        let start = Instant::now();
        let mut progress = ShardsProgress::new(start);
        assert_eq!(progress.read_up_to(), None);
        progress.add("a", start);
        progress.add("b", start);
        progress.listed(at(start, 10));
        progress.page("a", &page(at(start, 11), 0, 0));
        assert_eq!(progress.read_up_to(), None);
        progress.page("b", &page(at(start, 12), 4, 3));
        assert_eq!(progress.read_up_to(), Some(at(start, 7)));
        assert_eq!(progress.read_up_to(), None);
        // Not beyond the list: a shard may have been split since.
        progress.page("b", &page(at(start, 13), 0, 0));
        assert_eq!(progress.read_up_to(), Some(at(start, 9)));
        progress.page("a", &page(at(start, 14), 0, 0));
        assert_eq!(progress.read_up_to(), None);
    }

    #[test]
    fn the_children_of_a_shard_take_its_place() {
        let start = Instant::now();
        let mut progress = ShardsProgress::new(start);
        progress.add("parent", start);
        progress.listed(start);
        progress.page("parent", &page(at(start, 9), 0, 0));
        assert_eq!(progress.read_up_to(), start.checked_sub(SETTLED_AFTER));
        progress.ended("parent");
        assert_eq!(progress.read_up_to(), None);
        progress.add("child", start);
        progress.listed(at(start, 10));
        assert_eq!(progress.read_up_to(), None);
        assert!(!progress.slowest().lets(Some(start)));
        progress.page("child", &page(at(start, 11), 0, 1));
        assert_eq!(progress.read_up_to(), Some(at(start, 9)));
    }

    #[test]
    fn a_shard_waits_for_one_that_is_far_behind_it() {
        let start = Instant::now();
        let mut progress = ShardsProgress::new(start);
        progress.add("ahead", start);
        assert!(progress.slowest().lets(None));
        progress.page("ahead", &page(at(start, 100), 0, 0));
        assert!(progress.slowest().lets(Some(at(start, 100))));
        progress.add("late", start);
        assert!(!progress.slowest().lets(Some(at(start, 100))));
        assert!(progress.slowest().lets(None));
        progress.page("late", &page(at(start, 100), 31, 1));
        assert!(!progress.slowest().lets(Some(at(start, 100))));
        assert!(progress.slowest().lets(Some(at(start, 69))));
        progress.page("late", &page(at(start, 100), 30, 1));
        assert!(progress.slowest().lets(Some(at(start, 100))));
    }

    /// One thing that happens to a reader.
    #[derive(Clone, Debug)]
    enum Step {
        List(bool),
        Page(usize, u64, bool),
        End(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any::<bool>().prop_map(Step::List),
            (0..4usize, prop_oneof![Just(0), 0..100u64], any::<bool>())
                .prop_map(|(shard, behind, full)| Step::Page(shard, behind, full)),
            (0..4usize).prop_map(Step::End),
        ]
    }

    proptest! {
        #[test]
        fn it_never_goes_back_is_never_ahead_and_somebody_may_always_go_on(
            steps in prop::collection::vec(step(), 0..60)
        ) {
            let start = Instant::now() + Duration::from_secs(1000);
            let (mut progress, mut told, mut made) = (ShardsProgress::new(start), None, 0);
            // Shards that run, and where they are; a page without a position leaves them there.
            let mut running: BTreeMap<String, Option<Instant>> = BTreeMap::new();
            let mut listed = None;
            for (now, step) in steps.iter().enumerate() {
                let now = at(start, now as u64);
                let nth = |n: usize, running: &BTreeMap<String, Option<Instant>>| {
                    running.keys().nth(n).cloned()
                };
                match step {
                    Step::List(more) => {
                        if *more || running.is_empty() {
                            let shard = format!("{made:04}");
                            made += 1;
                            progress.add(&shard, now);
                            running.insert(shard, None);
                        }
                        progress.listed(now);
                        listed = Some(now);
                    }
                    Step::Page(n, behind, full) => if let Some(shard) = nth(*n, &running) {
                        let page = page(now, *behind, if *full { 10_000 } else { 1 });
                        progress.page(&shard, &page);
                        let position = running.get_mut(&shard).unwrap();
                        *position = (*position).max(page.position());
                    },
                    Step::End(n) => if let Some(shard) = nth(*n, &running) {
                        progress.ended(&shard);
                        running.remove(&shard);
                    },
                }
                if let Some(up_to) = progress.read_up_to() {
                    prop_assert!(told.is_none_or(|told| told < up_to));
                    prop_assert!(Some(up_to) < listed);
                    prop_assert!(running.values().all(|position| Some(up_to) < *position));
                    told = Some(up_to);
                }
                let slowest = progress.slowest();
                prop_assert!(running.is_empty() || running.values().any(|own| slowest.lets(*own)));
            }
        }
    }
}
