//! [`Engine`]: routes inputs to `trust`, `path` and `plan`, and collects what they want done.
//!
//! It holds four truths and derives the rest from them: what the operator wants, what the
//! coordinator claims (and the part of it that is trusted), what the host's links and routes are,
//! and what the kernel holds of ours. Whenever one of them changed, [`Engine::poll`] computes
//! desired state and its difference to the observed one. At most one plan is in the hand's hands at
//! a time; when it reports success, the steps are applied to the picture of the kernel, and nothing
//! is read back. When it reports a failure, the kernel is read, and the next plan is made from what is
//! true, without the step that failed, which rests (`held`).
//!
//! The kernel is read once a tick ([`TICK`], longer with many peers): WireGuard announces nothing,
//! so this is how roaming, dead endpoints and foreign hands are seen.

mod held;
mod kernel;
mod view;

pub use held::{FIRST_PAUSE, LONGEST_PAUSE};

use crate::acl::{self, Change};
use crate::mtu;
use crate::netcheck::{self, Netcheck, Wish};
use crate::outside::Outside;
use crate::path::{Path, Surroundings, Way};
use crate::paths::Paths;
use crate::plan::{Desired, Host, Observed, Policy, Routing, Step, Wanted, WantedPeer};
use crate::relays::Relays;
use crate::status::Problem;
use crate::trust::{Distrust, VerifiedNetmap, allowed_ips, verify};
use crate::{Config, Input, LinkAddr, Links, Output, RelayEvent, Router, Via};
use held::Held;
use proto::control::Report;
use proto::filter::Filter;
use proto::id::RegionId;
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{MAX_ENDPOINTS_PER_NODE, Netmap, Peer, Update};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the kernel is read when nothing else asks for it.
pub const TICK: Duration = Duration::from_secs(2);
/// What a tick is longer for each peer: reading costs time in proportion.
pub const TICK_PER_PEER: Duration = Duration::from_millis(1);
/// How often while direct paths are in use that a relay could replace.
pub const CLOSE_TICK: Duration = Duration::from_secs(1);
/// How soon it is read after something that leads to a new session,
const FIRST_LOOK: Duration = Duration::from_millis(500);
/// and how often: the first look may come just before that session.
const FIRST_LOOKS: u32 = 3;

/// Peers' persistent keepalive, in seconds, while this node is behind a NAT: routers may forget a
/// mapping after 30 s of silence.
pub const KEEPALIVE_SECONDS: u16 = 25;

/// What a node decides. Plain data; see the crate's documentation for how to drive it.
pub struct Engine {
    config: Config,
    me: NodeKey,
    /// What the operator wants; `None` until the first word: nothing is touched before.
    up: Option<bool>,
    advertised: BTreeSet<Prefix>,
    /// Whether nothing that others begin is let in.
    shields_up: bool,
    /// The netmap as the coordinator has it, trusted or not: the base of its deltas.
    claimed: Option<Netmap>,
    /// A trusted netmap that is not in force yet: the next plan is made for it.
    offered: Option<VerifiedNetmap>,
    /// The netmap in force.
    trusted: Option<VerifiedNetmap>,
    /// Whether the newest netmap came from the coordinator and not from the disk.
    unkept: bool,
    lowered: acl::Acl,
    policy: Option<Arc<Policy>>,
    links: Option<Links>,
    observed: Option<Observed>,
    paths: Paths,
    relays: Relays,
    /// When what relays are to do changes by itself.
    relays_at: Option<Instant>,
    netcheck: Netcheck,
    outside: Outside,
    /// The router that is asked for a port.
    router: Option<Router>,
    in_flight: Option<Vec<Step>>,
    observing: bool,
    /// Whether desired or observed state changed since the last comparison.
    dirty: bool,
    observe_at: Option<Instant>,
    /// How many of the next looks follow [`FIRST_LOOK`] after one another.
    looks: u32,
    held: Held,
    /// Not before this, after failures that no step can be named for.
    retry_at: Option<Instant>,
    failures: u32,
    outbox: VecDeque<Output>,
    reported: Option<Report>,
    distrust: Option<Distrust>,
    acl_error: Option<acl::TooLarge>,
    failed: Option<Problem>,
    routing: Routing,
}

impl Engine {
    /// An engine that knows nothing yet of network and kernel. `me` is the node's public key, `disco`
    /// its key for discovery, `seed` new random bytes of each start.
    #[must_use]
    pub fn new(config: Config, me: NodeKey, disco: DiscoKey, seed: [u8; 32]) -> Self {
        Self {
            paths: Paths::new(me, disco, seed),
            relays: Relays::new(config.shim_port),
            relays_at: None,
            config,
            me,
            up: None,
            advertised: BTreeSet::new(),
            shields_up: false,
            claimed: None,
            offered: None,
            trusted: None,
            unkept: false,
            lowered: acl::Acl::default(),
            policy: None,
            links: None,
            observed: None,
            netcheck: Netcheck::default(),
            outside: Outside::default(),
            router: None,
            in_flight: None,
            observing: false,
            dirty: false,
            observe_at: None,
            looks: 0,
            held: Held::default(),
            retry_at: None,
            failures: 0,
            outbox: VecDeque::new(),
            reported: None,
            distrust: None,
            acl_error: None,
            failed: None,
            routing: Routing::default(),
        }
    }

    /// Takes in what happened. Any input in any order is legal.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::Up(up) => {
                self.up = Some(up);
                self.refresh_router();
                self.refresh_paths(now);
                self.hurry();
            }
            Input::Advertise(routes) => {
                self.advertised = routes;
                self.report();
            }
            Input::ShieldsUp(up) => self.handle_shields(up),
            Input::Netmap(update) => self.handle_update(update),
            Input::Cached(netmap) => {
                if self.claimed.is_none() {
                    self.claim(*netmap);
                    self.unkept = false;
                }
            }
            Input::Forget => self.forget(now),
            Input::Links(links) => self.handle_links(now, links),
            Input::Woke => {
                self.paths.woke(now);
                self.shaken(now);
            }
            Input::Observed(observed) => self.handle_observed(now, observed),
            Input::Unreadable(detail) => {
                self.observing = false;
                self.failed = Some(Problem::Unreadable(detail));
                self.pause(now);
            }
            Input::Applied => self.handle_applied(now),
            Input::Failed(failure) => self.handle_failed(now, failure),
            Input::Coordinator(name) => {
                self.outside.set_coordinator(now, name);
                self.dirty = true;
            }
            Input::Proxy(name) => {
                self.outside.set_proxy(now, name);
                self.dirty = true;
            }
            Input::Resolved(servers) => {
                self.dirty |= self.outside.resolved(&servers);
                self.netcheck.resolved(now, servers);
            }
            Input::Mapped { server, addr } => self.handle_mapped(now, server, addr),
            Input::Disco {
                from,
                sender,
                message,
            } => {
                let via = Via::Direct(from);
                self.paths.receive(now, via, sender, message, &self.relays);
            }
            Input::Relay(region, event) => self.handle_relay(now, region, event),
            Input::PortMapped(addr) => self.handle_port(now, addr),
            Input::Timeout => {}
        }
    }

    /// What is to be done next. Call until it is [`Output::Timeout`].
    pub fn poll(&mut self, now: Instant) -> Output {
        loop {
            if let Some(output) = self.outbox.pop_front() {
                return output;
            }
            if self.up == Some(true)
                && let Some(output) = self.poll_network(now)
            {
                return output;
            }
            if self.paths.take_moved() || self.relays_at.is_some_and(|at| now >= at) {
                self.refresh_relays(now);
                continue;
            }
            if let Some(output) = self.poll_kernel(now) {
                return output;
            }
            if self.outbox.is_empty() && !self.is_due(now) {
                return Output::Timeout(self.deadline(now));
            }
        }
    }

    /// What is to be asked and sent now.
    fn poll_network(&mut self, now: Instant) -> Option<Output> {
        self.dirty |= self.outside.take_waited(now);
        if let Some(names) = self.outside.poll(now) {
            return Some(Output::Resolve(names));
        }
        if let Some(wish) = self.netcheck.poll(now) {
            return Some(match wish {
                Wish::Resolve(names) => Output::Resolve(names),
                Wish::Ask(servers) => Output::Ask(servers),
            });
        }
        let transmit = self.paths.poll(now, &self.relays);
        if self.paths.take_look() {
            self.observe_at = Some(now);
            self.netcheck.doubt(now);
        }
        if self.paths.take_sought() {
            self.netcheck.sample(now);
        }
        let (via, to, message) = transmit?;
        Some(Output::Transmit { via, to, message })
    }

    /// Whether a plan has changed what paths or relays want now, or a path what servers are asked.
    fn is_due(&self, now: Instant) -> bool {
        self.network_at().is_some_and(|at| at <= now) || self.paths.is_moved()
    }

    /// When something is to be asked or sent.
    fn network_at(&self) -> Option<Instant> {
        let all = [
            self.paths.deadline(),
            self.netcheck.deadline(),
            self.outside.deadline(),
        ];
        let first = all.into_iter().flatten().min();
        first.filter(|_| self.up == Some(true))
    }

    fn deadline(&self, now: Instant) -> Instant {
        let kernel = match self.retry_at {
            Some(at) if now < at => Some(at),
            _ => self.observe_at,
        };
        let kernel = kernel.filter(|at| *at > now).unwrap_or(now + TICK);
        let all = [self.network_at(), self.relays_at, self.held.deadline()];
        let all = all.into_iter().flatten();
        all.filter(|at| *at > now).fold(kernel, Instant::min)
    }

    /// Where this node can be reached and what it offers, as far as is known.
    #[must_use]
    pub fn about(&self) -> Report {
        let no_addrs = BTreeSet::new();
        let addrs = self.links.as_ref().map_or(&no_addrs, |links| &links.addrs);
        // What servers see comes first: peers rank what is in their own LAN before all else.
        let own = self.own_addrs();
        let mut endpoints: Vec<SocketAddr> = self.netcheck.reflexive();
        endpoints.retain(|endpoint| !own.contains(&endpoint.ip()));
        endpoints.extend(local_endpoints(
            addrs,
            &self.advertised,
            self.config.listen_port,
        ));
        let routers = self.netcheck.routers().into_iter();
        let routers = routers.map(|ip| SocketAddr::new(ip, self.config.listen_port));
        endpoints.extend(routers);
        endpoints.truncate(MAX_ENDPOINTS_PER_NODE);
        Report {
            routes: self.advertised.clone(),
            endpoints,
            listen_port: self.config.listen_port,
            disco: Some(self.paths.disco_key()),
            home: self.relays.home(),
        }
    }

    /// Whether a peer has this key for discovery. What others sealed says nothing to us.
    #[must_use]
    pub fn knows(&self, disco: &DiscoKey) -> bool {
        self.paths.knows(disco)
    }

    /// The kernel as the engine takes it to be.
    pub(crate) fn observed(&self) -> Option<&Observed> {
        self.observed.as_ref()
    }

    /// What is known of this node's NAT.
    #[must_use]
    pub fn netcheck(&self) -> &Netcheck {
        &self.netcheck
    }

    /// The host's own addresses, as far as they are known.
    #[must_use]
    pub fn own_addrs(&self) -> BTreeSet<IpAddr> {
        let links = self.links.iter().flat_map(|links| &links.addrs);
        links.map(|own| own.addr).collect()
    }

    fn handle_update(&mut self, update: Update) {
        match update {
            Update::Full(netmap) => self.claim(*netmap),
            Update::Delta(delta) => {
                let Some(mut netmap) = self.claimed.take() else {
                    self.outbox.push_back(Output::NeedFull);
                    return;
                };
                match netmap.apply(*delta) {
                    Ok(()) => self.claim(netmap),
                    Err(stale) => {
                        tracing::debug!(base = %stale.base, have = %stale.have, "stale delta");
                        self.claimed = Some(netmap);
                        self.outbox.push_back(Output::NeedFull);
                    }
                }
            }
        }
    }

    /// The netmap in force is offered once more, to be lowered anew.
    fn handle_shields(&mut self, up: bool) {
        if self.shields_up == up {
            return;
        }
        self.shields_up = up;
        if self.offered.is_none() {
            self.offered.clone_from(&self.trusted);
        }
        self.hurry();
    }

    /// A netmap is claimed: it is checked, and then offered to the next plan, or refused.
    fn claim(&mut self, netmap: Netmap) {
        self.unkept = true;
        self.claimed = Some(netmap.clone());
        let last = self.offered.as_ref().or(self.trusted.as_ref());
        match verify(netmap, self.me, last) {
            Ok(trusted) => {
                self.distrust = None;
                self.offered = Some(trusted);
                self.hurry();
            }
            Err(distrust) => {
                tracing::warn!(reason = %distrust, "netmap refused");
                self.distrust = Some(distrust);
            }
        }
    }

    /// Lowers the policy of the netmap on offer and puts it in force, unless it does not fit.
    /// Done just before a plan, so that netmaps that come while one is carried out are taken
    /// together, and each lowered policy is one change away from the one in the kernel.
    fn put_in_force(&mut self, now: Instant) {
        let Some(offered) = self.offered.take() else {
            return;
        };
        let filter = in_force(offered.filter(), self.shields_up);
        let change = self.lowered.lower(&filter, offered.me(), offered.peers());
        let change = match change {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(reason = %error, "policy refused");
                self.acl_error = Some(error);
                return;
            }
        };
        self.acl_error = None;
        if self.policy.is_none() || change != Change::None {
            let serial = self.policy.as_ref().map_or(0, |policy| policy.serial) + 1;
            let tables = Arc::new(self.lowered.tables().clone());
            self.policy = Some(Arc::new(Policy {
                serial,
                change,
                tables,
            }));
        }
        if std::mem::take(&mut self.unkept) {
            let netmap = Box::new(offered.netmap().clone());
            self.outbox.push_back(Output::Persist(netmap));
        }
        let servers = netcheck::servers(offered.network());
        self.netcheck.set_names(now, servers);
        self.outside.set_relays(now, offered.network());
        self.trusted = Some(offered);
        self.refresh_paths(now);
    }

    fn forget(&mut self, now: Instant) {
        self.claimed = None;
        self.offered = None;
        self.trusted = None;
        self.paths.clear();
        self.netcheck = Netcheck::default();
        self.refresh_paths(now);
        self.distrust = None;
        self.acl_error = None;
        self.reported = None;
        self.hurry();
    }

    fn handle_links(&mut self, now: Instant, links: Links) {
        if self.links.as_ref() == Some(&links) {
            return;
        }
        self.links = Some(links);
        self.refresh_router();
        self.shaken(now);
    }

    /// What is known of the world outside may hold no longer.
    fn shaken(&mut self, now: Instant) {
        self.netcheck.hurry(now);
        self.outside.hurry(now);
        self.refresh_paths(now);
        self.paths.shaken(now);
        self.report();
        self.tell_paths(now);
        self.dirty = true;
    }

    fn handle_port(&mut self, now: Instant, addr: Option<SocketAddr>) {
        if self.netcheck.set_port_mapped(addr) {
            self.report();
            self.tell_paths(now);
        }
    }

    /// The router to ask for a port is another, or there is none any more.
    fn refresh_router(&mut self) {
        let wanted = self.links.as_ref().filter(|_| self.up == Some(true));
        let wanted = wanted.and_then(netcheck::router);
        if self.router != wanted {
            self.router = wanted;
            self.outbox.push_back(Output::Router(wanted));
        }
    }

    /// The world sees us elsewhere: peers are told, and those that do not answer yet may now.
    fn handle_mapped(&mut self, now: Instant, server: SocketAddr, addr: SocketAddr) {
        if !self.netcheck.answered(now, server, addr) {
            // It may have told how far a region is, all the same.
            let home = self.relays.home();
            if home.is_some_and(|home| netcheck::better_home(home, &self.near()) != home) {
                self.refresh_relays(now);
            }
            return;
        }
        self.report();
        self.tell_paths(now);
        self.refresh_relays(now);
    }

    /// Paths are told where we can be reached.
    fn tell_paths(&mut self, now: Instant) {
        let endpoints = self.about().endpoints;
        self.paths.set_endpoints(now, &endpoints);
        self.paths.set_seen(now, self.netcheck.seen_in_turn());
    }

    fn handle_relay(&mut self, now: Instant, region: RegionId, event: RelayEvent) {
        let changed = self.relays.handle(now, region, &event);
        if let RelayEvent::Disco {
            from,
            sender,
            message,
        } = event
        {
            let via = Via::Relay(region, from);
            self.paths.receive(now, via, sender, message, &self.relays);
        } else if let RelayEvent::Data { from } = event {
            if self.paths.get(&from).is_some_and(|path| !path.is_live()) {
                self.look_soon(now);
            }
            self.paths.relayed(now, from);
            self.relays_at = self.relays_at.into_iter().chain(self.relays.again()).min();
        }
        if changed {
            self.refresh_relays(now);
        }
    }

    /// How far regions are: by the same measure for all of them.
    fn near(&self) -> BTreeMap<RegionId, Duration> {
        let near = self.netcheck.regions();
        if near.is_empty() {
            return self.relays.latencies();
        }
        near
    }

    /// Home, the regions to be connected to, and the rules for relayed packets.
    fn refresh_relays(&mut self, now: Instant) {
        let near = self.near();
        let measuring = self.netcheck.is_measuring();
        let moved = self.relays.choose_home(now, &near, measuring);
        self.paths.refresh_relays(now, &self.relays);
        let ways = self.paths.iter().map(|(key, path)| match path.way() {
            Way::Relay | Way::Blind => (key, path.needs_relay(), None),
            Way::Direct(endpoint) => (key, path.needs_relay(), Some(endpoint)),
        });
        if let Some(table) = self.relays.publish(now, ways) {
            self.outbox.push_back(Output::Relays(table));
        }
        self.relays_at = self.relays.deadline(now);
        self.dirty = true;
        if moved {
            self.report();
        }
    }

    fn report(&mut self) {
        if self.relays.is_undecided() {
            // The coordinator would take away the home that it has of us.
            return;
        }
        let about = self.about();
        if self.links.is_some() && self.reported.as_ref() != Some(&about) {
            self.reported = Some(about.clone());
            self.outbox.push_back(Output::Report(about));
        }
    }

    fn refresh_routing(&mut self) {
        let (Some(netmap), Some(links)) = (&self.trusted, &self.links) else {
            self.routing = Routing::default();
            return;
        };
        let none = BTreeMap::new();
        let present = self.observed.as_ref().and_then(Observed::present);
        let outside = self.outside.addrs();
        let host = Host {
            live: &links.routes,
            installed: present.map_or(&none, |present| &present.routes),
            outside: outside.as_ref(),
        };
        let inner = |peer: &NodeKey| self.paths.inner(peer);
        self.routing = Routing::choose(netmap, host, inner);
    }

    /// What the kernel should hold; `None` as long as that cannot be said, and nothing is touched.
    fn desired(&self) -> Option<Desired> {
        if !self.up? {
            return Some(None);
        }
        let (netmap, policy) = (self.trusted.as_ref()?, self.policy.as_ref()?);
        let links = self.links.as_ref()?;
        let routes = match self.routing.is_refused() {
            true => self.routes_left()?,
            false => self.routing.routes.clone(),
        };
        let keepalive = match self.netcheck.is_behind_nat(&self.own_addrs()) {
            true => KEEPALIVE_SECONDS,
            false => 0,
        };
        let peers = netmap.peers().values();
        let peers = peers.map(|peer| (peer.key, self.wanted(peer, keepalive)));
        let wanted = Wanted {
            key: self.me,
            listen_port: self.config.listen_port,
            mtu: mtu::of_device(links.mtu),
            addrs: netmap.me().addrs.iter().copied().collect(),
            peers: peers.collect(),
            routes,
            forwarding: self.routing.forwarding.clone(),
            policy: Arc::clone(policy),
        };
        Some(Some(wanted))
    }

    fn wanted(&self, peer: &Peer, keepalive: u16) -> WantedPeer {
        let path = self.paths.get(&peer.key);
        WantedPeer {
            allowed_ips: allowed_ips(&peer.addrs, &peer.routes)
                .filter(|prefix| !self.routing.refuses(prefix))
                .collect(),
            endpoint: path.and_then(Path::wanted),
            keepalive: path.map_or(0, |path| if path.wants_keepalive() { keepalive } else { 0 }),
            mute: path.is_some_and(Path::is_mute),
        }
    }

    /// Candidates of every peer, ranked for this host; new peers get a path, gone ones lose it. The
    /// same for relays. While the node is not to be up, there is none of it.
    fn refresh_paths(&mut self, now: Instant) {
        self.refresh_routing();
        let (Some(netmap), Some(true)) = (&self.trusted, self.up) else {
            self.relays.set(&BTreeMap::new(), std::iter::empty());
            self.paths.clear();
            self.refresh_relays(now);
            return;
        };
        let Some(links) = &self.links else {
            return;
        };
        let on_link = links.addrs.iter();
        let on_link = on_link.filter_map(|own| Prefix::containing(own.addr, own.prefix_len).ok());
        let network = netmap.network();
        let routes = netmap.peers().values().flat_map(|peer| &peer.routes);
        let routes = routes.filter(|prefix| !self.routing.refuses(prefix));
        let ground = Surroundings {
            own: self.own_addrs(),
            on_link: on_link.collect(),
            routed: links.routes.iter().map(|route| route.prefix).collect(),
            tunnelled: routes.copied().chain([network.v4, network.v6]).collect(),
            mtu: links.mtu,
        };
        let peers = netmap.peers().values();
        // Who has not said yet where its home is most likely has the same as we.
        let first = network.relays.keys().next().copied();
        let guess = self.relays.home().or(first);
        let home = |peer: &Peer| peer.home.or(guess.filter(|_| peer.disco.is_some()));
        let homes = peers.clone().map(|peer| (peer.key, home(peer)));
        self.relays.set(&network.relays, homes);
        let present = self.observed.as_ref().and_then(Observed::present);
        self.paths
            .refresh(now, peers, ground, &self.relays, present);
        self.refresh_relays(now);
    }
}

/// A tick with so many peers.
fn longer(tick: Duration, peers: usize) -> Duration {
    let peers = u32::try_from(peers).unwrap_or(u32::MAX);
    tick + TICK_PER_PEER.saturating_mul(peers)
}

/// The filter that is lowered: with shields up it permits nothing to come in.
fn in_force(filter: &Filter, shields_up: bool) -> Cow<'_, Filter> {
    if !shields_up {
        return Cow::Borrowed(filter);
    }
    Cow::Owned(Filter {
        ingress: Vec::new(),
        ..filter.clone()
    })
}

/// Where peers may reach this node: its addresses, those in subnets that it serves last (peers
/// elsewhere cannot reach them but through this node).
fn local_endpoints(
    addrs: &BTreeSet<LinkAddr>,
    served: &BTreeSet<Prefix>,
    listen_port: u16,
) -> Vec<SocketAddr> {
    let behind = |addr: IpAddr| served.iter().any(|prefix| prefix.contains(addr));
    let mut addrs: Vec<IpAddr> = addrs.iter().map(|own| own.addr).collect();
    addrs.sort_by_key(|addr| (behind(*addr), *addr));
    addrs.dedup();
    addrs.truncate(MAX_ENDPOINTS_PER_NODE);
    let with_port = |addr| SocketAddr::new(addr, listen_port);
    addrs.into_iter().map(with_port).collect()
}
