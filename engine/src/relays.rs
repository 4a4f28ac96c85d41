//! [`Relays`]: which relays to be connected to, and how relayed packets find their way.
//!
//! Relayed packets never meet the engine. It publishes a [`RelayTable`], by which the hand's shim
//! and its connections carry them: the kernel sends what is for a relayed peer to that peer's own
//! address on `lo`, and what comes for us by a relay is given to the kernel as if it came from
//! there, or from the direct endpoint that is wanted, so that it moves nothing.
//!
//! **Regions.** Regions know nothing of each other: a node is found in its *home*, and whoever sends
//! to it connects there. So we are connected to our own home and to the homes of the peers whose
//! path is the relay, and to a region that nobody needs any more for [`LINGER`].
//!
//! **Loss.** When a region cannot be reached for [`GRACE`], whose home it was connects to the *next* one,
//! and moves there when that stands: the next by id, round and round, that is not lost too. Everybody reckons the same, so senders
//! look for a peer in the region next to its lost home without being told, coordinator or not. If it
//! is not there either, they look where its own packets came by, and then region by region.

use crate::RelayEvent;
use proto::id::RegionId;
use proto::key::NodeKey;
use proto::netmap::Region;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a lost connection to a region may take to come back, before others are tried.
pub const GRACE: Duration = Duration::from_secs(2);
/// After news of relayed data, when to ask for the next such news.
const NEWS_PAUSE: Duration = Duration::from_secs(2);
/// How long a first connection may take, while packets are sent to it already.
const CONNECTING: Duration = Duration::from_secs(5);
/// How long the first choice of a home waits for what servers of regions say.
const MEASURING: Duration = Duration::from_secs(4);
/// Most regions that are connected to until there is a home.
const MEASURED: usize = 8;
/// A peer that no region has is not sought again for this long, unless there is news.
const ABSENT: Duration = Duration::from_secs(20);
/// How long a region is kept connected that nobody needs any more.
pub const LINGER: Duration = Duration::from_secs(60);
/// A peer that its relay does not have is looked for elsewhere at most so often: what is on its way
/// there must not count for the next one.
const SEARCH_PAUSE: Duration = Duration::from_millis(500);
/// A peer is looked for at least so long before no region has it: it may just be on its way.
const SEARCH: Duration = Duration::from_secs(5);
/// Where a peer's packets came by this lately, it can most likely be reached.
const CAME: Duration = Duration::from_secs(10);

/// The first of the addresses on `lo`: 127.64.0.0/10 is theirs.
const LOOPBACK: u32 = 0x7f40_0000;
/// How many there are.
const LOOPBACKS: u32 = 1 << 22;

/// How packets go by relays, from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayTable {
    /// The region where others find this node.
    pub home: Option<RegionId>,
    /// Regions to be connected to.
    pub regions: BTreeMap<RegionId, Region>,
    /// Every peer that can be reached by a relay, whether it is now or not.
    pub peers: BTreeMap<NodeKey, RelayedPeer>,
}

/// How packets go to and from one peer by relays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayedPeer {
    /// Where it is found.
    pub region: RegionId,
    /// Its address on `lo`: what the kernel sends there is for it.
    pub loopback: SocketAddr,
    /// Where packets that it sent by relay seem to come from; `None`: from its address on `lo`.
    pub appear_as: Option<SocketAddr>,
}

/// How the connection to a region is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Nobody needs it.
    Unused,
    /// It is being made.
    Connecting,
    /// It stands.
    Up,
    /// It does not stand. Why, for people.
    Down(String),
}

/// What is known of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    up: bool,
    /// Since when it is so.
    since: Option<Instant>,
    /// Since when it cannot be reached, and why.
    down: Option<(Instant, String)>,
    latency: Option<Duration>,
    /// When it was last needed.
    needed: Option<Instant>,
}

/// One peer's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    home: RegionId,
    loopback: SocketAddr,
    /// Regions that did not have it.
    skipped: usize,
    /// Where it is instead.
    detour: Option<RegionId>,
    /// By which region packets of it came last, and when.
    came: Option<(RegionId, Instant)>,
    /// Since when it is looked for, and when last somewhere else.
    missed: Option<Instant>,
    searched: Option<Instant>,
    /// Until when it is taken for reachable by no relay at all.
    absent: Option<Instant>,
}

/// Relays and who is found where.
#[derive(Clone, Debug, Default)]
pub(crate) struct Relays {
    shim_port: u16,
    map: BTreeMap<RegionId, Region>,
    known: BTreeMap<RegionId, Known>,
    home: Option<RegionId>,
    /// Since when there is no home because more will be known in a moment.
    undecided: Option<Instant>,
    places: BTreeMap<NodeKey, Place>,
    taken: BTreeSet<u32>,
    table: Arc<RelayTable>,
    /// Regions that are needed, as of the last table.
    needed: BTreeSet<RegionId>,
    /// When the table is to be said again even if it is the same: that asks for news of data.
    again: Option<Instant>,
}

/// Whether an endpoint is one of the addresses on `lo`.
pub(crate) fn is_loopback(endpoint: SocketAddr) -> bool {
    endpoint.ip().is_loopback()
}

impl Relays {
    pub(crate) fn new(shim_port: u16) -> Self {
        Self {
            shim_port,
            ..Self::default()
        }
    }

    /// The network's relays, and where its peers are found, are these.
    pub(crate) fn set(
        &mut self,
        map: &BTreeMap<RegionId, Region>,
        peers: impl Iterator<Item = (NodeKey, Option<RegionId>)>,
    ) {
        // Without a shim nothing can be relayed.
        let none = BTreeMap::new();
        let map = if self.shim_port == 0 { &none } else { map };
        if self.map != *map {
            let before = std::mem::replace(&mut self.map, map.clone());
            // Another server is another place: what was known does not hold for it.
            let stays = |id: &RegionId| self.map.get(id) == before.get(id);
            self.known.retain(|id, _| stays(id));
        }
        self.home = self.home.filter(|home| self.map.contains_key(home));
        if self.map.is_empty() {
            self.undecided = None;
        }
        let mut before = std::mem::take(&mut self.places);
        for (key, home) in peers {
            let Some(home) = home.filter(|home| self.map.contains_key(home)) else {
                continue;
            };
            let place = match before.remove(&key) {
                Some(place) if place.home == home => place,
                Some(Place { loopback, .. }) => Place::new(home, loopback),
                None => Place::new(home, self.allocate(&key)),
            };
            self.places.insert(key, place);
        }
        for gone in before.into_values() {
            if let IpAddr::V4(addr) = gone.loopback.ip() {
                self.taken.remove(&addr.to_bits());
            }
        }
    }

    /// An address on `lo`: the same after each start, but for peers whose keys begin alike.
    fn allocate(&mut self, key: &NodeKey) -> SocketAddr {
        let start = key.0.iter().take(4);
        let start = start.fold(0, |number, byte| number << 8 | u32::from(*byte)) % LOOPBACKS;
        // There are fewer peers than addresses: `MAX_PEERS`.
        let free = (0..LOOPBACKS)
            .map(|step| LOOPBACK + (start + step) % LOOPBACKS)
            .find(|addr| addr & 0xff != 0 && addr & 0xff != 0xff && !self.taken.contains(addr));
        let addr = free.unwrap_or(LOOPBACK + 1);
        self.taken.insert(addr);
        SocketAddr::from((Ipv4Addr::from_bits(addr), self.shim_port))
    }

    /// Something happened at a connection. Returns whether ways may have changed.
    pub(crate) fn handle(&mut self, now: Instant, region: RegionId, event: &RelayEvent) -> bool {
        if !self.map.contains_key(&region) {
            return false;
        }
        let known = self.known.entry(region).or_default();
        match event {
            RelayEvent::Up => {
                (known.up, known.since, known.down) = (true, Some(now), None);
            }
            RelayEvent::Down(why) => {
                (known.up, known.since) = (false, Some(now));
                let since = known.down.take().map_or(now, |(since, _)| since);
                known.down = Some((since, why.clone()));
            }
            RelayEvent::Latency(latency) => {
                known.latency = Some(*latency);
                // Without servers that say more, this is what there is to choose a home by.
                return self.home.is_none();
            }
            RelayEvent::PeerGone(peer) => self.search(now, region, *peer),
            RelayEvent::Data { from } => {
                self.again.get_or_insert(now + NEWS_PAUSE);
                return self.found(now, region, *from);
            }
            RelayEvent::Disco { from, .. } => return self.found(now, region, *from),
        }
        true
    }

    /// Something came from a peer by relay: some region has it. Returns whether that is news.
    fn found(&mut self, now: Instant, region: RegionId, peer: NodeKey) -> bool {
        let Some(place) = self.places.get_mut(&peer) else {
            return false;
        };
        place.came = Some((region, now));
        place.missed = None;
        place.absent.take().is_some()
    }

    /// A region does not have a peer that is looked for there.
    fn search(&mut self, now: Instant, region: RegionId, peer: NodeKey) {
        if self.region_of(&peer) != Some(region) {
            return;
        }
        let regions = self.map.len();
        let Some(place) = self.places.get_mut(&peer) else {
            return;
        };
        let within = |time| move |at: Instant| now.saturating_duration_since(at) < time;
        if place.searched.is_some_and(within(SEARCH_PAUSE)) {
            return;
        }
        place.searched = Some(now);
        let came = place.came.take();
        let came = came.filter(|(by, at)| *by != region && within(CAME)(*at));
        let before = std::mem::replace(&mut place.detour, came.map(|(by, _)| by));
        if before.is_some() || place.detour.is_some() {
            return;
        }
        place.skipped += 1;
        let missed = *place.missed.get_or_insert(now);
        // Everywhere, and once more: it may just have been on its way.
        if place.skipped >= 2 * regions && !within(SEARCH)(missed) {
            (place.skipped, place.missed) = (0, None);
            place.absent = Some(now + ABSENT);
        }
    }

    fn is_lost(&self, now: Instant, region: RegionId) -> bool {
        let Some(known) = self.known.get(&region).filter(|known| !known.up) else {
            return false;
        };
        let down = known.down.as_ref().map(|(since, _)| *since);
        down.is_some_and(|since| now.saturating_duration_since(since) >= GRACE)
    }

    /// The region itself, or the next by id that is not lost.
    fn at_or_after(&self, now: Instant, region: RegionId) -> RegionId {
        let from = self.map.range(region..).chain(self.map.range(..region));
        let mut from = from.map(|(id, _)| *id);
        from.find(|id| !self.is_lost(now, *id)).unwrap_or(region)
    }

    /// Where a peer is found, as far as can be reckoned.
    pub(crate) fn region_of(&self, peer: &NodeKey) -> Option<RegionId> {
        self.table.peers.get(peer).map(|peer| peer.region)
    }

    fn reckon(&self, now: Instant, place: &Place) -> RegionId {
        if let Some(region) = place.detour.filter(|it| !self.is_lost(now, *it)) {
            return region;
        }
        let region = self.at_or_after(now, place.home);
        let from = self.map.range(region..).chain(self.map.range(..region));
        let mut from = from.filter(|(id, _)| !self.is_lost(now, **id));
        let turn = place.skipped % self.map.len().max(1);
        from.nth(turn).map_or(region, |(id, _)| *id)
    }

    /// A peer's address on `lo` if a relay can carry packets to it, and whether that is connected.
    pub(crate) fn way_to(&self, now: Instant, peer: &NodeKey) -> Option<(SocketAddr, bool)> {
        let place = self.places.get(peer)?;
        if place.absent.is_some_and(|until| now < until) {
            return None;
        }
        let known = self.known.get(&self.reckon(now, place));
        let up = known.is_some_and(|known| known.up);
        let waited = |at: Instant| now.saturating_duration_since(at);
        // One that was never connected may come soon, one that was lost may come back.
        let hopeful = known.is_none_or(|known| match (&known.down, known.since) {
            (Some((since, _)), _) => waited(*since) < CONNECTING,
            (None, Some(since)) => waited(since) < CONNECTING,
            (None, None) => true,
        });
        // What we cannot be answered by is no way.
        (up || hopeful).then_some((place.loopback, up))
    }

    /// The region where others find us.
    pub(crate) fn home(&self) -> Option<RegionId> {
        self.home
    }

    /// Chooses the home: `near` is what is known of latencies, best known first; `wait`: whether
    /// more will be known in a moment. Returns whether it changed.
    pub(crate) fn choose_home(
        &mut self,
        now: Instant,
        near: &BTreeMap<RegionId, Duration>,
        wait: bool,
    ) -> bool {
        let before = self.home;
        let waits = wait && before.is_none() && self.may_wait(now);
        let open = |id: &RegionId| !self.is_lost(now, *id);
        let near: BTreeMap<RegionId, Duration> = near
            .iter()
            .filter(|(id, _)| self.map.contains_key(id) && open(id))
            .map(|(id, latency)| (*id, *latency))
            .collect();
        self.home = match before {
            // Others reckon so too. If it is our own way out that is gone, no other region comes up
            // either, and nothing moves.
            Some(home) if !open(&home) => {
                let next = self.at_or_after(now, home);
                let up = self.known.get(&next).is_some_and(|known| known.up);
                Some(if up { next } else { home })
            }
            Some(home) => Some(crate::netcheck::better_home(home, &near)),
            None if waits => None,
            None => {
                let nearest = near.iter().min_by_key(|(id, latency)| (**latency, **id));
                let any = self.map.keys().find(|id| open(id));
                nearest.map(|(id, _)| *id).or(any.copied())
            }
        };
        self.home != before
    }

    /// Whether there will be a home in a moment.
    pub(crate) fn is_undecided(&self) -> bool {
        self.home.is_none() && !self.map.is_empty()
    }

    fn may_wait(&mut self, now: Instant) -> bool {
        let since = *self.undecided.get_or_insert(now);
        now.saturating_duration_since(since) < MEASURING
    }

    /// The table to publish, if it is another one, or asked for again. `ways`: for each peer whether
    /// its path is the relay or may soon be, and the direct endpoint that is wanted.
    pub(crate) fn publish<'a>(
        &mut self,
        now: Instant,
        ways: impl Iterator<Item = (&'a NodeKey, bool, Option<SocketAddr>)>,
    ) -> Option<Arc<RelayTable>> {
        let next = self.home.map(|home| self.at_or_after(now, home));
        let mut needed: BTreeSet<RegionId> = self.home.into_iter().chain(next).collect();
        if self.is_undecided() {
            // After a new start others look for us where we were.
            needed.extend(self.map.keys().take(MEASURED));
        }
        let mut peers = BTreeMap::new();
        for (key, needs_relay, appear_as) in ways {
            let Some(place) = self.places.get(key) else {
                continue;
            };
            let region = self.reckon(now, place);
            if needs_relay {
                // A lost home is tried on, or nobody would notice that it is back.
                needed.extend([region, place.home]);
            }
            let loopback = place.loopback;
            peers.insert(
                *key,
                RelayedPeer {
                    region,
                    loopback,
                    appear_as,
                },
            );
        }
        let before = std::mem::replace(&mut self.needed, needed);
        for id in before
            .union(&self.needed)
            .filter(|id| self.map.contains_key(id))
        {
            let known = self.known.entry(*id).or_default();
            known.needed = Some(now);
            known.since.get_or_insert(now);
        }
        let mut regions = BTreeMap::new();
        for (id, region) in &self.map {
            let known = self.known.get_mut(id);
            let used = known.as_ref().and_then(|known| known.needed);
            if used.is_some_and(|at| now.saturating_duration_since(at) < LINGER) {
                regions.insert(*id, region.clone());
            } else if let Some(known) = known.filter(|known| known.needed.is_some()) {
                // It is closed now; whether it can be reached is not known any more.
                *known = Known {
                    latency: known.latency,
                    ..Known::default()
                };
            }
        }
        let table = RelayTable {
            home: self.home,
            regions,
            peers,
        };
        let changed = *self.table != table;
        if changed {
            self.table = Arc::new(table);
        }
        let again = self.again.is_some_and(|at| now >= at);
        if again || changed {
            self.again = None;
        }
        (again || changed).then(|| Arc::clone(&self.table))
    }

    /// When the next news of relayed data are to be asked for.
    pub(crate) fn again(&self) -> Option<Instant> {
        self.again
    }

    /// When something of this changes by itself.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        let of = |(id, known): (&RegionId, &Known)| {
            let down = known.down.as_ref().map(|(since, _)| *since);
            let lost = down.map(|since| since + GRACE);
            let waiting = down.or(known.since.filter(|_| !known.up));
            let hopeless = waiting.map(|at| at + CONNECTING);
            let unneeded = known.needed.filter(|_| !self.needed.contains(id));
            [lost, hopeless, unneeded.map(|at| at + LINGER)]
        };
        let all = self.known.iter().flat_map(of).flatten();
        let undecided = self.undecided.filter(|_| self.home.is_none());
        let undecided = undecided.map(|since| since + MEASURING);
        let absent = self.places.values().filter_map(|place| place.absent);
        let all = all.chain(self.again).chain(undecided).chain(absent);
        all.filter(|at| *at > now).min()
    }

    /// What is known of a region's relay connection, for people.
    pub(crate) fn connection(&self, region: RegionId) -> (Connection, Option<Duration>) {
        let wanted = self.table.regions.contains_key(&region);
        let Some(known) = self.known.get(&region) else {
            return (Connection::Unused, None);
        };
        let connection = match &known.down {
            _ if known.up => Connection::Up,
            Some((_, why)) => Connection::Down(why.clone()),
            None if wanted => Connection::Connecting,
            None => Connection::Unused,
        };
        (connection, known.latency)
    }

    /// What connections took to answer.
    pub(crate) fn latencies(&self) -> BTreeMap<RegionId, Duration> {
        let of = |(id, known): (&RegionId, &Known)| Some((*id, known.latency?));
        self.known.iter().filter_map(of).collect()
    }

    pub(crate) fn map(&self) -> &BTreeMap<RegionId, Region> {
        &self.map
    }
}

impl Place {
    fn new(home: RegionId, loopback: SocketAddr) -> Self {
        Self {
            home,
            loopback,
            skipped: 0,
            detour: None,
            came: None,
            missed: None,
            searched: None,
            absent: None,
        }
    }
}

#[cfg(test)]
mod tests;
