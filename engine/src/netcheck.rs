//! [`Netcheck`]: under which addresses the rest of the world sees this node, and what its NAT is like.
//!
//! The network names STUN servers. Each is asked from WireGuard's own UDP port, so the answer is
//! the very mapping that peers must send to. A *round* asks all of them, and again those that stay
//! silent ([`AGAIN`]); the next round begins [`REFRESH`] later, which also keeps the mapping alive
//! (routers forget after 30 s and more, RFC 4787 4.3), or at once when the host's links change.
//!
//! What servers say is compared family by family ([`Nat`]): the same address from all of them means
//! that peers will be seen from there too; different ports mean a NAT that makes another mapping
//! for each destination ("hard"), and then no mapping is worth telling to anybody. Such servers are
//! asked rarely ([`HARD_REFRESH`]), so that the NAT forgets, and shows new ports when a path is
//! looked for: sometimes they tell which port a peer will see ([`ports`]).
//!
//! The servers of regions that have relays are asked too: how long they take to answer says which
//! region is near ([`better_home`]).
//!
//! A router that opens a port on request makes the best address of all, also behind a hard NAT
//! ([`router`]).
//!
//! Random transaction numbers and the matching of answers are the hand's; DNS too. Without servers
//! nothing is asked at all.

pub mod ports;

use crate::{Links, Router};
use proto::id::RegionId;
use proto::net::Prefix;
use proto::netmap::Network;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Pauses after each question of a round; the last one ends it.
pub const AGAIN: [Duration; 4] = [
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
];
/// From the start of a round to the start of the next: below the 30 s after which the strictest
/// routers forget a mapping, with time for a repetition.
pub const REFRESH: Duration = Duration::from_secs(23);
/// The same for servers of whom a hard NAT shows another port to each: nobody needs their mappings,
/// and after five minutes they are forgotten (RFC 4787, REQ-5).
pub const HARD_REFRESH: Duration = Duration::from_secs(310);
/// What servers see behind a hard NAT is asked anew for a path if it is older: mappings last two
/// minutes at least, where RFC 4787 is followed.
const STALE: Duration = Duration::from_secs(125);
/// Servers that were first heard within this time show ports that were given out together.
const TOGETHER: Duration = Duration::from_secs(5);
/// Between two rounds that paths ask for which fell silent.
const DOUBT_PAUSE: Duration = Duration::from_secs(2);
/// Names are looked up again after this long.
pub const RESOLVE: Duration = Duration::from_secs(300);
/// While nobody answers, names are looked up this often.
pub const RESOLVE_UNANSWERED: Duration = Duration::from_secs(30);
/// Most servers that are asked: the first of the list.
pub const MAX_SERVERS: usize = 16;
/// Another region becomes home only if it is nearer by this much,
pub const HOME_GAIN: Duration = Duration::from_millis(10);
/// and takes at most this part of the time: two thirds.
const HOME_RATIO: (u32, u32) = (2, 3);
/// Answers of a server that count for how far it is.
const RECENT: usize = 3;
/// Rounds without an answer after which a server's last word no longer counts.
const PATIENCE_ROUNDS: u32 = 2;

/// What stands between this node and the world, in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nat {
    /// Nobody was asked in this family, or no round has ended.
    Unknown,
    /// No server answered.
    Silent,
    /// Servers see an address of this host.
    None,
    /// Servers see one and the same foreign address: peers can be told.
    Easy,
    /// One server saw a foreign address; it takes two to tell easy from hard.
    OneServer,
    /// Servers see different addresses or ports: another mapping for each destination.
    Hard,
}

/// What one server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its name, as the network has it.
    pub name: String,
    /// The address that it saw, while its word counts.
    pub mapped: Option<SocketAddr>,
    /// How long the last answer took.
    pub rtt: Option<Duration>,
    /// How long the last few answers took.
    recent: VecDeque<Duration>,
    answered: bool,
    asked: Option<Instant>,
    /// When it was asked when it first saw this address.
    since: Option<Instant>,
    misses: u32,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Look these names up.
    Resolve(Vec<String>),
    /// Ask these servers.
    Ask(BTreeSet<SocketAddr>),
}

/// The study of this node's own NAT.
#[derive(Clone, Debug, Default)]
pub struct Netcheck {
    names: BTreeMap<String, Option<RegionId>>,
    resolve_at: Option<Instant>,
    servers: BTreeMap<SocketAddr, Server>,
    /// When to go on with the round, or to begin the next.
    next: Option<Instant>,
    /// When the round began, and how often was asked in it.
    began: Option<Instant>,
    attempt: usize,
    /// Whether the round is one of many, and may leave out who was asked lately.
    usual: bool,
    /// When the last round began.
    last: Option<Instant>,
    /// Whether a round has ended since the servers became known.
    concluded: bool,
    /// Under which address the router opened WireGuard's port, if it did.
    port: Option<SocketAddr>,
}

/// The router that may open a port for us: of a host whose IPv4 default route leads out of a
/// private network (RFC 1918, RFC 6598). Others have nothing to gain, and are not bothered.
#[must_use]
pub fn router(links: &Links) -> Option<Router> {
    let gateway = links.gateway?;
    let own = links.addrs.iter().find_map(|own| match own.addr {
        IpAddr::V4(addr) => {
            let around = Prefix::containing(own.addr, own.prefix_len).ok()?;
            around.contains(gateway.into()).then_some(addr)
        }
        IpAddr::V6(_) => None,
    })?;
    let shared = own.octets()[0] == 100 && (64..128).contains(&own.octets()[1]);
    (own.is_private() || shared).then_some(Router { gateway, own })
}

impl Netcheck {
    /// These are the servers, as [`servers`] has them.
    pub fn set_names(&mut self, now: Instant, names: BTreeMap<String, Option<RegionId>>) {
        if self.names != names {
            *self = Self {
                resolve_at: (!names.is_empty()).then_some(now),
                names,
                port: self.port,
                ..Self::default()
            };
        }
    }

    /// The names were looked up. An empty answer changes nothing: it is a failure of DNS.
    pub fn resolved(&mut self, now: Instant, servers: BTreeMap<SocketAddr, String>) {
        let mut servers = servers;
        servers.retain(|_, name| self.names.contains_key(name));
        if servers.is_empty() {
            return;
        }
        let mut before = std::mem::take(&mut self.servers);
        for (addr, name) in servers {
            let server = before.remove(&addr).unwrap_or_else(|| Server::new(name));
            self.servers.insert(addr, server);
        }
        if self.servers.values().any(|server| server.asked.is_none()) {
            self.begin(now);
        }
    }

    /// The host's links changed: all may be different.
    pub fn hurry(&mut self, now: Instant) {
        if !self.names.is_empty() {
            self.resolve_at = Some(now);
            self.begin(now);
        }
    }

    /// A path fell silent: a router may map us anew. Servers are asked, unless they just were.
    pub fn doubt(&mut self, now: Instant) {
        let lately = |at| now.saturating_duration_since(at) < DOUBT_PAUSE;
        if !self.last.is_some_and(lately) {
            self.begin(now);
        }
    }

    fn begin(&mut self, now: Instant) {
        self.next = (!self.servers.is_empty()).then_some(now);
        self.began = None;
        self.attempt = 0;
        self.usual = false;
    }

    /// A path is looked for: behind a hard NAT, what servers see should be new.
    pub fn sample(&mut self, now: Instant) {
        let asked = self.servers.iter().filter(|(addr, _)| addr.is_ipv4());
        let newest = asked.filter_map(|(_, server)| server.asked).max();
        let stale = |at: Instant| now.saturating_duration_since(at) >= STALE;
        if self.is_hard() && newest.is_some_and(stale) {
            self.begin(now);
        }
    }

    /// Whether the IPv4 NAT shows each server another port.
    fn is_hard(&self) -> bool {
        self.seen(true).len() > 1
    }

    /// What servers see behind a hard NAT, in the order in which they were asked: those of them, two
    /// at least, that were asked at about the same time.
    #[must_use]
    pub fn seen_in_turn(&self) -> Option<(IpAddr, Vec<u16>)> {
        if !self.is_hard() {
            return None;
        }
        let seen = |(addr, server): (&SocketAddr, &Server)| {
            let mapped = server.mapped.filter(SocketAddr::is_ipv4)?;
            Some((server.since?, *addr, mapped))
        };
        let mut turns: Vec<_> = self.servers.iter().filter_map(seen).collect();
        turns.sort();
        let (newest, _, last) = *turns.last()?;
        let together = |at: Instant| newest.saturating_duration_since(at) <= TOGETHER;
        let alike = turns
            .iter()
            .filter(|(at, _, mapped)| together(*at) && mapped.ip() == last.ip());
        let ports: Vec<u16> = alike.map(|(_, _, mapped)| mapped.port()).collect();
        (ports.len() > 1).then(|| (last.ip(), ports))
    }

    /// A server answered. Returns whether that changed what is known.
    pub fn answered(&mut self, now: Instant, server: SocketAddr, mapped: SocketAddr) -> bool {
        let Some(server) = self.servers.get_mut(&server) else {
            return false;
        };
        let mapped = SocketAddr::new(mapped.ip().to_canonical(), mapped.port());
        server.rtt = server.asked.map(|at| now.saturating_duration_since(at));
        if server.recent.len() == RECENT {
            server.recent.pop_front();
        }
        server.recent.extend(server.rtt);
        (server.answered, server.misses) = (true, 0);
        let changed = server.mapped.replace(mapped) != Some(mapped);
        if changed {
            server.since = server.asked;
        }
        if self.servers.values().all(|server| server.answered) {
            self.end(now);
        }
        changed
    }

    /// What is to be done now, if anything.
    pub fn poll(&mut self, now: Instant) -> Option<Wish> {
        if self.resolve_at.is_some_and(|at| now >= at) {
            let unheard = self.servers.values().all(|server| server.mapped.is_none());
            let pause = if unheard { RESOLVE_UNANSWERED } else { RESOLVE };
            self.resolve_at = Some(now + pause);
            return Some(Wish::Resolve(self.names.keys().cloned().collect()));
        }
        if self.next.is_none_or(|at| now < at) {
            return None;
        }
        if self.began.is_none() {
            (self.began, self.attempt) = (Some(now), 0);
            let spares = self.usual && self.is_hard();
            let lately = |at: Instant| now.saturating_duration_since(at) < HARD_REFRESH;
            for (addr, server) in &mut self.servers {
                let known = addr.is_ipv4() && server.mapped.is_some();
                server.answered = spares && known && server.asked.is_some_and(lately);
            }
            if self.servers.values().all(|server| server.answered) {
                self.end(now);
                return None;
            }
            self.last = Some(now);
        }
        let Some(pause) = AGAIN.get(self.attempt) else {
            self.end(now);
            return None;
        };
        self.attempt += 1;
        self.next = Some(now + *pause);
        let mut silent = BTreeSet::new();
        for (addr, server) in &mut self.servers {
            if !server.answered {
                server.asked = Some(now);
                silent.insert(*addr);
            }
        }
        Some(Wish::Ask(silent))
    }

    fn end(&mut self, now: Instant) {
        for server in self.servers.values_mut() {
            if !server.answered {
                server.misses = server.misses.saturating_add(1);
                if server.misses >= PATIENCE_ROUNDS {
                    (server.mapped, server.rtt) = (None, None);
                    server.recent.clear();
                }
            }
        }
        let began = self.began.take().unwrap_or(now);
        self.next = Some((began + REFRESH).max(now + AGAIN[0]));
        self.usual = true;
        self.concluded = true;
    }

    /// When there is something to do at the latest; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.next.into_iter().chain(self.resolve_at).min()
    }

    /// The router opened WireGuard's port under this address, or none. Returns whether that is news.
    pub fn set_port_mapped(&mut self, addr: Option<SocketAddr>) -> bool {
        std::mem::replace(&mut self.port, addr) != addr
    }

    /// Under which address the router opened WireGuard's port.
    #[must_use]
    pub fn port_mapped(&self) -> Option<SocketAddr> {
        self.port
    }

    /// Addresses of ours that peers elsewhere can send to: what all servers of a family agree on,
    /// and the port that the router opened.
    #[must_use]
    pub fn reflexive(&self) -> Vec<SocketAddr> {
        let agreed = |v4| {
            let seen = self.seen(v4);
            (seen.len() == 1).then(|| seen.first().copied()).flatten()
        };
        let agreed = [agreed(true), agreed(false)];
        let port = self.port.filter(|port| !agreed.contains(&Some(*port)));
        agreed.into_iter().chain([port]).flatten().collect()
    }

    /// Where routers are that show each destination another port. Nobody reaches us there, but who
    /// pings such an address opens its own firewall for what we send from it.
    #[must_use]
    pub fn routers(&self) -> BTreeSet<IpAddr> {
        let hard = [true, false].map(|v4| self.seen(v4));
        let hard = hard.into_iter().filter(|seen| seen.len() > 1).flatten();
        hard.map(|seen| seen.ip()).collect()
    }

    fn seen(&self, v4: bool) -> BTreeSet<SocketAddr> {
        let mapped = self.servers.values().filter_map(|server| server.mapped);
        mapped.filter(|addr| addr.is_ipv4() == v4).collect()
    }

    /// What stands between a host with these addresses and the world.
    #[must_use]
    pub fn nat(&self, v4: bool, own: &BTreeSet<IpAddr>) -> Nat {
        let servers = self
            .servers
            .iter()
            .filter(|(addr, _)| addr.is_ipv4() == v4)
            .map(|(_, server)| server);
        let words = servers.clone().filter_map(|server| server.mapped).count();
        if servers.clone().next().is_none() || (words == 0 && !self.concluded) {
            return Nat::Unknown;
        }
        let seen = self.seen(v4);
        match seen.first() {
            None => Nat::Silent,
            Some(_) if seen.len() > 1 => Nat::Hard,
            Some(addr) if own.contains(&addr.ip()) => Nat::None,
            Some(_) if words == 1 => Nat::OneServer,
            Some(_) => Nat::Easy,
        }
    }

    /// Whether a router between us and the world translates addresses, and forgets about us when
    /// we are silent.
    #[must_use]
    pub fn is_behind_nat(&self, own: &BTreeSet<IpAddr>) -> bool {
        let mapped = self.servers.values().filter_map(|server| server.mapped);
        mapped.into_iter().any(|addr| !own.contains(&addr.ip()))
    }

    /// How far the regions are whose servers answered.
    #[must_use]
    pub fn regions(&self) -> BTreeMap<RegionId, Duration> {
        let mut near = BTreeMap::new();
        for server in self.servers.values() {
            let region = self.names.get(&server.name).copied().flatten();
            // The best of the last few: a single late answer must not move anybody.
            if let (Some(region), Some(rtt)) = (region, server.recent.iter().min()) {
                let best = near.entry(region).or_insert(*rtt);
                *best = (*best).min(*rtt);
            }
        }
        near
    }

    /// Whether servers of regions are being asked for the first time.
    #[must_use]
    pub fn is_measuring(&self) -> bool {
        !self.concluded && self.names.values().any(Option::is_some)
    }

    /// Whether the network has servers at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !self.names.is_empty()
    }

    /// The servers and their words.
    #[must_use]
    pub fn servers(&self) -> &BTreeMap<SocketAddr, Server> {
        &self.servers
    }
}

impl Server {
    fn new(name: String) -> Self {
        Self {
            name,
            mapped: None,
            rtt: None,
            recent: VecDeque::new(),
            answered: false,
            asked: None,
            since: None,
            misses: 0,
        }
    }
}

/// The servers of a network that are asked, with the region that each stands for: those that are
/// no relays first, then one of each region, then the others.
#[must_use]
pub fn servers(network: &Network) -> BTreeMap<String, Option<RegionId>> {
    let plain = network.stun.iter().map(|name| (name.clone(), None));
    let most = network
        .relays
        .values()
        .map(|region| region.hosts.len())
        .max();
    let relays = (0..most.unwrap_or(0)).flat_map(|place| {
        network.relays.iter().filter_map(move |(id, region)| {
            let relay = region.hosts.get(place)?;
            let (host, _) = relay.addr.rsplit_once(':')?;
            Some((format!("{host}:{}", relay.stun?), Some(*id)))
        })
    });
    let mut servers = BTreeMap::new();
    for (name, region) in plain.chain(relays) {
        if servers.len() < MAX_SERVERS || servers.contains_key(&name) {
            let known: &mut Option<RegionId> = servers.entry(name).or_default();
            *known = known.or(region);
        }
    }
    servers
}

/// The home to have with these latencies: the one that there is, unless another is much nearer. One
/// whose latency is not known stays: that nobody answers there is no proof of anything.
#[must_use]
pub fn better_home(home: RegionId, near: &BTreeMap<RegionId, Duration>) -> RegionId {
    let Some(have) = near.get(&home) else {
        return home;
    };
    let nearest = near.iter().min_by_key(|(id, latency)| (**latency, **id));
    let (part, whole) = HOME_RATIO;
    nearest
        .filter(|(_, latency)| **latency * whole <= *have * part)
        .filter(|(_, latency)| have.saturating_sub(**latency) >= HOME_GAIN)
        .map_or(home, |(id, _)| *id)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test brings the time")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: &str = "198.51.100.1:3478";
    const TWO: &str = "198.51.100.2:3478";
    const SIX: &str = "[2001:db8::1]:3478";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn asking(servers: &[&str]) -> (Netcheck, Instant) {
        let (mut check, now) = (Netcheck::default(), Instant::now());
        assert_eq!(check.poll(now), None, "nobody is asked without servers");
        let names: Vec<String> = servers.iter().map(ToString::to_string).collect();
        check.set_names(now, names.iter().map(|name| (name.clone(), None)).collect());
        assert!(matches!(check.poll(now), Some(Wish::Resolve(all)) if all.len() == names.len()));
        let known = servers.iter().map(|name| (at(name), (*name).to_owned()));
        check.resolved(now, known.collect());
        let all = servers.iter().map(|name| at(name)).collect();
        assert_eq!(check.poll(now), Some(Wish::Ask(all)));
        (check, now)
    }

    #[test]
    fn two_servers_that_agree_give_an_address_and_two_that_do_not_give_none() {
        let own = BTreeSet::from(["10.0.0.2".parse().unwrap()]);
        let (mut check, now) = asking(&[ONE, TWO]);
        assert_eq!(check.nat(true, &own), Nat::Unknown);
        assert!(check.answered(now, at(ONE), at("192.0.2.1:51820")));
        assert_eq!(check.nat(true, &own), Nat::OneServer);
        check.answered(now, at(TWO), at("192.0.2.1:51820"));
        assert_eq!(check.nat(true, &own), Nat::Easy);
        assert_eq!(check.reflexive(), [at("192.0.2.1:51820")]);
        assert!(check.is_behind_nat(&own));
        assert!(check.answered(now, at(TWO), at("192.0.2.1:1024")));
        assert_eq!(check.nat(true, &own), Nat::Hard);
        assert_eq!(check.reflexive(), []);
        assert_eq!(check.routers(), ["192.0.2.1".parse().unwrap()].into());
        let seen = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
        check.answered(now, at(TWO), at("192.0.2.1:51820"));
        assert_eq!(check.nat(true, &seen), Nat::None);
        assert!(!check.is_behind_nat(&seen));
        assert_eq!(
            check.nat(false, &seen),
            Nat::Unknown,
            "nobody was asked there"
        );
    }

    #[test]
    fn only_who_is_in_a_private_network_asks_its_router_for_a_port() {
        let links = |addr: &str, len, gateway: Option<&str>| Links {
            addrs: BTreeSet::from([crate::LinkAddr {
                interface: "eth0".to_owned(),
                addr: addr.parse().unwrap(),
                prefix_len: len,
            }]),
            routes: BTreeSet::new(),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            mtu: 1500,
        };
        let found = router(&links("10.1.0.2", 24, Some("10.1.0.1"))).unwrap();
        assert_eq!(
            (found.own, found.gateway),
            ([10, 1, 0, 2].into(), [10, 1, 0, 1].into())
        );
        assert!(router(&links("100.64.3.2", 16, Some("100.64.0.1"))).is_some());
        assert_eq!(router(&links("10.1.0.2", 24, None)), None);
        assert_eq!(
            router(&links("10.1.0.2", 24, Some("10.2.0.1"))),
            None,
            "another network's"
        );
        assert_eq!(
            router(&links("198.51.100.2", 24, Some("198.51.100.1"))),
            None
        );
    }

    #[test]
    fn a_port_that_the_router_opened_is_told_once() {
        let mut check = Netcheck::default();
        let port = Some(at("192.0.2.1:51820"));
        assert!(check.set_port_mapped(port));
        assert!(!check.set_port_mapped(port));
        assert_eq!(check.reflexive(), [at("192.0.2.1:51820")]);
        assert!(check.set_port_mapped(None));
        assert_eq!(check.reflexive(), []);
    }

    #[test]
    fn only_the_silent_are_asked_again_and_then_they_rest() {
        let (mut check, start) = asking(&[ONE, SIX]);
        check.answered(start, at(ONE), at("192.0.2.1:51820"));
        let (mut now, mut asked) = (start, Vec::new());
        while now < start + Duration::from_secs(10) {
            now = check.deadline().unwrap();
            if let Some(Wish::Ask(whom)) = check.poll(now) {
                asked.push((now - start, whom));
            }
        }
        let repeated: Vec<_> = asked.iter().filter(|(at, _)| *at < REFRESH).collect();
        assert_eq!(repeated.len(), AGAIN.len() - 1);
        assert!(
            repeated
                .iter()
                .all(|(_, whom)| *whom == BTreeSet::from([at(SIX)]))
        );
        assert_eq!(check.nat(false, &BTreeSet::new()), Nat::Silent);
    }

    #[test]
    fn a_mapping_is_refreshed_in_time_and_a_change_of_links_asks_at_once() {
        let (mut check, start) = asking(&[ONE]);
        check.answered(start, at(ONE), at("192.0.2.1:51820"));
        assert_eq!(check.deadline(), Some(start + REFRESH));
        let later = start + Duration::from_secs(1);
        check.hurry(later);
        assert!(matches!(check.poll(later), Some(Wish::Resolve(_))));
        assert_eq!(check.poll(later), Some(Wish::Ask([at(ONE)].into())));
    }

    #[test]
    fn a_path_that_fell_silent_asks_who_we_are_and_not_more_often_than_it_may() {
        let (mut check, start) = asking(&[ONE]);
        check.answered(start, at(ONE), at("192.0.2.1:51820"));
        check.doubt(start + DOUBT_PAUSE / 2);
        assert_eq!(check.poll(start + DOUBT_PAUSE / 2), None, "it just was");
        let later = start + DOUBT_PAUSE;
        check.doubt(later);
        assert_eq!(check.poll(later), Some(Wish::Ask([at(ONE)].into())));
        check.doubt(later);
        assert_eq!(check.poll(later), None);
    }

    #[test]
    fn the_last_word_of_a_server_that_fell_silent_is_forgotten() {
        let (mut check, start) = asking(&[ONE]);
        check.answered(start, at(ONE), at("192.0.2.1:51820"));
        let mut now = start;
        while now < start + REFRESH * 2 {
            now = check.deadline().unwrap();
            check.poll(now);
        }
        assert_eq!(
            check.reflexive(),
            [at("192.0.2.1:51820")],
            "one silent round is nothing"
        );
        while now < start + REFRESH * 4 {
            now = check.deadline().unwrap();
            check.poll(now);
        }
        assert_eq!(check.reflexive(), []);
    }

    #[test]
    fn behind_a_hard_nat_servers_are_left_alone_so_that_it_forgets_until_a_path_is_looked_for() {
        let (mut check, start) = asking(&[ONE, TWO]);
        assert_eq!(check.seen_in_turn(), None);
        check.answered(start, at(TWO), at("192.0.2.1:40001"));
        check.answered(start, at(ONE), at("192.0.2.1:40000"));
        let seen = |ports: [u16; 2]| Some(("192.0.2.1".parse().unwrap(), ports.to_vec()));
        assert_eq!(check.seen_in_turn(), seen([40_000, 40_001]), "as asked");
        let mut now = start;
        while now < start + STALE {
            now = check.deadline().unwrap();
            let wish = check.poll(now);
            assert!(!matches!(wish, Some(Wish::Ask(_))), "{:?}", now - start);
            check.sample(start + STALE / 2);
        }
        check.sample(now);
        let both = Some(Wish::Ask([at(ONE), at(TWO)].into()));
        assert_eq!(check.poll(now), both);
        check.answered(now, at(ONE), at("192.0.2.1:40123"));
        assert_eq!(check.seen_in_turn(), None, "the other is old");
        check.answered(now, at(TWO), at("192.0.2.1:40124"));
        assert_eq!(check.seen_in_turn(), seen([40_123, 40_124]));
        check.sample(now + STALE / 2);
        assert_eq!(check.poll(now + STALE / 2), None);
        check.doubt(now + STALE / 2);
        assert_eq!(check.poll(now + STALE / 2), both, "in doubt all are asked");
    }

    #[test]
    fn home_moves_only_for_a_much_nearer_region() {
        let near = |two: u64| {
            let far = |millis| Duration::from_millis(millis);
            BTreeMap::from([(RegionId(1), far(60)), (RegionId(2), far(two))])
        };
        let home = |two| better_home(RegionId(1), &near(two));
        assert_eq!([40, 45, 90].map(home), [2, 1, 1].map(RegionId));
        assert_eq!(better_home(RegionId(3), &near(1)), RegionId(3), "not known");
        let short = BTreeMap::from([(RegionId(1), HOME_GAIN), (RegionId(2), HOME_GAIN / 4)]);
        assert_eq!(better_home(RegionId(1), &short), RegionId(1));
    }

    proptest! {
        /// Whatever is answered and whenever it is looked at: nobody else is asked, a deadline is
        /// never left in the past, and no server gets more than its questions.
        #[test]
        fn it_never_hurries_and_asks_only_its_servers(
            steps in prop::collection::vec((0u64..4_000, 0usize..4, 1u16..4), 1..80),
        ) {
            let pool = [at(ONE), at(TWO), at(SIX), at("203.0.113.1:1")];
            let (mut check, start) = asking(&[ONE, TWO, SIX]);
            let (mut now, mut asked) = (start, 3);
            for (millis, server, port) in steps {
                now += Duration::from_millis(millis);
                check.answered(now, pool[server], SocketAddr::from(([192, 0, 2, 1], port)));
                while let Some(wish) = check.poll(now) {
                    if let Wish::Ask(whom) = wish {
                        prop_assert!(whom.iter().all(|server| pool[..3].contains(server)));
                        asked += whom.len();
                    }
                }
                prop_assert!(check.deadline().unwrap() > now);
            }
            let rounds = (now - start).as_secs() / REFRESH.as_secs() + 1;
            prop_assert!(asked as u64 <= rounds * 3 * AGAIN.len() as u64, "{asked}");
        }
    }
}
