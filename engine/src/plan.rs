//! Desired and observed state of the kernel, and [`diff`]: the steps from one to the other.
//!
//! Everything here is plain data. The same code serves the first start, a change, the recovery
//! from a crash and leaving: look, compare, step. [`Observed::apply`] says what each [`Step`] does
//! to a kernel; the engine keeps its picture current with it instead of reading the kernel after
//! each write, and a lab test runs scripts of steps through it and through a real kernel.
//!
//! **Laws** (property tests in `tests/plan.rs`):
//! 1. `apply(observed, diff(desired, observed))` is what was desired; then `diff` is empty.
//! 2. No prefix of the steps lets a flow through that neither the old nor the new state would.
//! 3. No prefix of the steps cuts a flow that both would let through.
//! 4. The device is never up without programs attached to it.
//!
//! **The order that keeps them.** The acl is swapped in one atomic write, so before the swap the
//! old policy holds and after it the new one. A prefix that changes its owner is taken from the old
//! owner *before* the swap, or the old owner could for a moment use what policy gives the new one.
//! Then: swap, set peers, remove peers (their addresses mean nothing to the new acl any more),
//! addresses, up, routes, a greeting to the peers. A device that is new is made *down* and gets its programs before its
//! first peer or address; one that is found up without programs is taken down first.
//!
//! **Foreign state is never touched.** Only the device of our name is ours, with all that is on it,
//! and routes that lead to it *and* carry our protocol number. A device of our name that is not
//! WireGuard is [`Device::Foreign`]: nothing is planned for it.

use crate::acl::{Change, Tables};
use proto::key::NodeKey;
use proto::net::Prefix;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

mod peers;
mod routes;

pub use routes::{Host, LEAST_MTU, LiveRoute, Overlap, RouteMtu, Routing};

/// Most peers that are greeted: each costs a handshake, and those beyond will notice by themselves.
pub const MAX_GREETED: usize = 1_024;

/// What the kernel should hold. `None`: nothing of ours.
pub type Desired = Option<Wanted>;

/// The device as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Public half of the device's key.
    pub key: NodeKey,
    /// UDP port.
    pub listen_port: u16,
    /// Largest packet inside the tunnel, in bytes.
    pub mtu: u32,
    /// Own addresses, each as a host prefix.
    pub addrs: BTreeSet<IpAddr>,
    /// Peers.
    pub peers: BTreeMap<NodeKey, WantedPeer>,
    /// What is routed into the device, and how long its packets may be.
    pub routes: BTreeMap<Prefix, RouteMtu>,
    /// Where packets must be forwarded.
    pub forwarding: BTreeSet<Forwarding>,
    /// Policy, lowered.
    pub policy: Arc<Policy>,
}

/// Policy as the programs read it. One engine numbers them 1, 2, 3, …, so that two are compared by
/// their number, and a hand that holds number n makes n + 1 of it by the change alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its number.
    pub serial: u64,
    /// What leads to it from the one before.
    pub change: Change,
    /// All of it, for a hand that does not hold the one before.
    pub tables: Arc<Tables>,
}

/// A peer as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedPeer {
    /// Prefixes that are its own.
    pub allowed_ips: BTreeSet<Prefix>,
    /// The endpoint to tell the kernel; `None` leaves the kernel's own.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: u16,
    /// Whether a packet to it would be lost now: it is greeted later.
    pub mute: bool,
}

/// Forwarding of packets that come in by one side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forwarding {
    /// Where they come in.
    pub side: Side,
    /// The family.
    pub family: Family,
}

/// One side of a subnet router.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Our device.
    Tunnel,
    /// The interface of this name.
    Lan(String),
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of a prefix.
    #[must_use]
    pub fn of(prefix: &Prefix) -> Self {
        if prefix.is_v4() { Self::V4 } else { Self::V6 }
    }
}

/// What the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observed {
    /// The device of our name.
    pub device: Device,
    /// Our programs and maps.
    pub acl: Acl,
    /// Where we switched forwarding on, and owe restoring what was there.
    pub forwarding: BTreeSet<Forwarding>,
}

/// The device of our name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// There is none.
    #[default]
    Absent,
    /// There is one, but it is not WireGuard: somebody else's.
    Foreign,
    /// There is one.
    Present(Present),
}

/// A WireGuard device that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Present {
    /// Public half of its key; `None` before it has one.
    pub key: Option<NodeKey>,
    /// UDP port; 0 before one is set.
    pub listen_port: u16,
    /// Largest packet inside the tunnel, in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Addresses on it, with their prefix lengths.
    pub addrs: BTreeSet<(IpAddr, u8)>,
    /// Peers.
    pub peers: BTreeMap<NodeKey, PeerState>,
    /// Routes to it that carry our protocol number, in the main table.
    pub routes: BTreeMap<Prefix, RouteMtu>,
    /// Whether somebody switched IPv6 off on it, or for all of the machine: then addresses and routes
    /// of IPv6 are not wanted, and hold up nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_v6: bool,
}

/// A peer that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerState {
    /// Prefixes that are its own.
    pub allowed_ips: BTreeSet<Prefix>,
    /// Persistent keepalive in seconds; 0 is off.
    pub keepalive: u16,
    /// What the kernel counts, and the endpoint that it may have changed itself.
    pub stats: Stats,
}

/// What moves by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// Where the kernel sends to.
    pub endpoint: Option<SocketAddr>,
    /// Wall-clock time of the last handshake, since the Unix epoch; `None` if there was none.
    pub last_handshake: Option<Duration>,
    /// Bytes received, handshakes included.
    pub rx_bytes: u64,
    /// Bytes sent, handshakes included.
    pub tx_bytes: u64,
}

/// Our programs and maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Acl {
    /// None are loaded.
    #[default]
    Absent,
    /// Maps or links are pinned, but no program of ours is on the device.
    Pinned,
    /// Programs are on the device, with the policy of this number. An agent that just started
    /// does not know what it found (`None`): that still decides, and is written anew.
    Attached(Option<u64>),
}

/// One change to the kernel. Each is idempotent: what is already so counts as done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Makes the device, down and empty.
    CreateLink {
        /// Largest packet inside the tunnel, in bytes.
        mtu: u32,
    },
    /// Deletes the device, and with it its peers, addresses and routes.
    DeleteLink,
    /// Sets the largest packet inside the tunnel, in bytes.
    SetMtu(u32),
    /// Brings the device up or takes it down.
    SetUp(bool),
    /// Loads or adopts the programs and puts them on the device; they deny until a table is set.
    AttachAcl,
    /// Replaces policy in one atomic write.
    SetAcl(Arc<Policy>),
    /// Takes programs, links and maps away.
    DetachAcl,
    /// Gives the device the key whose public half this is, and its port.
    Configure {
        /// Public half of the key; the hand fetches the secret.
        key: NodeKey,
        /// UDP port.
        listen_port: u16,
    },
    /// Makes or changes peers.
    SetPeers(Vec<PeerChange>),
    /// Removes peers.
    RemovePeers(Vec<NodeKey>),
    /// Adds an own address, as a host prefix.
    AddAddr(IpAddr),
    /// Removes an address from the device.
    RemoveAddr(IpAddr, u8),
    /// Routes a prefix into the device; one that is there stays as it is.
    AddRoute(Prefix, RouteMtu),
    /// Changes what a route into the device says of its packets, at no moment without the route.
    ChangeRoute(Prefix, RouteMtu),
    /// No longer routes a prefix into the device.
    RemoveRoute(Prefix),
    /// Sends each peer an empty packet, and leaves it with this persistent keepalive. A device that
    /// comes up has lost all its sessions, and peers that have not would send into nothing for 15 s
    /// (`KEEPALIVE_TIMEOUT + REKEY_TIMEOUT`) before they notice; so we call first.
    Greet(Vec<(NodeKey, u16)>),
    /// Switches forwarding on for an interface, noting what was there.
    Forward(Forwarding),
    /// Restores what was there.
    RestoreForwarding(Forwarding),
}

/// One peer on the wire to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerChange {
    /// Which peer.
    pub key: NodeKey,
    /// Whether it is made if it is not there. An update of a peer that somebody removed meanwhile
    /// must not bring it back (`WGPEER_F_UPDATE_ONLY`).
    pub create: bool,
    /// Whether `allowed_ips` replace those that are there; otherwise they are added.
    pub replace_allowed_ips: bool,
    /// Prefixes to give to it. The kernel takes each from whoever had it.
    pub allowed_ips: BTreeSet<Prefix>,
    /// Where to send, if that is to change.
    pub endpoint: Option<SocketAddr>,
    /// Persistent keepalive in seconds, if that is to change.
    pub keepalive: Option<u16>,
}

/// The steps that lead from `observed` to `desired`, in an order that keeps the laws above.
#[must_use]
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Step> {
    static NO_PEERS: BTreeMap<NodeKey, PeerState> = BTreeMap::new();
    let (device, peers) = match &observed.device {
        Device::Present(present) => (
            Device::Present(present.clone_without_peers()),
            &present.peers,
        ),
        other => (other.clone(), &NO_PEERS),
    };
    let mut plan = Plan {
        state: Observed {
            device,
            acl: observed.acl.clone(),
            forwarding: observed.forwarding.clone(),
        },
        peers: Cow::Borrowed(peers),
        steps: Vec::new(),
    };
    match (desired, &observed.device) {
        (Some(_), Device::Foreign) => {}
        (Some(wanted), Device::Absent | Device::Present(_)) => plan.build(wanted),
        (None, _) => plan.leave(),
    }
    plan.steps
}

/// Steps so far, and the state that they lead to.
struct Plan<'a> {
    /// All but the peers.
    state: Observed,
    /// The peers, copied only if that cannot be avoided: there may be many.
    peers: Cow<'a, BTreeMap<NodeKey, PeerState>>,
    steps: Vec<Step>,
}

impl Plan<'_> {
    fn step(&mut self, step: Step) {
        match &step {
            Step::SetPeers(changes) => peers::apply(self.peers.to_mut(), changes),
            Step::RemovePeers(keys) => peers::remove(self.peers.to_mut(), keys),
            _ => self.state.apply(&step),
        }
        self.steps.push(step);
    }

    fn step_if(&mut self, needed: bool, step: Step) {
        if needed {
            self.step(step);
        }
    }

    /// The device as it is after the steps so far, without its peers.
    fn device(&self) -> Present {
        match &self.state.device {
            Device::Present(present) => present.clone(),
            Device::Absent | Device::Foreign => Present::default(),
        }
    }

    fn build(&mut self, wanted: &Wanted) {
        if self.state.device == Device::Absent {
            self.step(Step::CreateLink { mtu: wanted.mtu });
        }
        self.secure(wanted);
        self.set_peers(wanted);
        self.address(wanted);
        self.route(wanted);
        if self.steps.contains(&Step::SetUp(true)) {
            self.greet(wanted);
        }
    }

    fn greet(&mut self, wanted: &Wanted) {
        let peers = wanted.peers.iter().filter(|(_, peer)| !peer.mute);
        let peers = peers.map(|(key, peer)| (*key, peer.keepalive));
        let peers: Vec<_> = peers.take(MAX_GREETED).collect();
        self.step_if(!peers.is_empty(), Step::Greet(peers));
    }

    /// Programs, key and policy: everything that must hold before a peer is touched.
    fn secure(&mut self, wanted: &Wanted) {
        if !matches!(self.state.acl, Acl::Attached(_)) {
            self.step_if(self.device().up, Step::SetUp(false));
            self.step(Step::AttachAcl);
        }
        let device = self.device();
        let configured = device.key == Some(wanted.key) && device.listen_port == wanted.listen_port;
        let configure = Step::Configure {
            key: wanted.key,
            listen_port: wanted.listen_port,
        };
        self.step_if(!configured, configure);
        let (changes, removed) = peers::withdrawals(&wanted.peers, &self.peers);
        self.step_if(!removed.is_empty(), Step::RemovePeers(removed));
        self.step_if(!changes.is_empty(), Step::SetPeers(changes));
        let current = self.state.acl == Acl::Attached(Some(wanted.policy.serial));
        self.step_if(!current, Step::SetAcl(Arc::clone(&wanted.policy)));
    }

    fn set_peers(&mut self, wanted: &Wanted) {
        let changes = peers::changes(&wanted.peers, &self.peers);
        let removed = peers::removals(&wanted.peers, &self.peers);
        // Nothing after this asks for the peers, so nothing is copied for it.
        if !changes.is_empty() {
            self.steps.push(Step::SetPeers(changes));
        }
        if !removed.is_empty() {
            self.steps.push(Step::RemovePeers(removed));
        }
    }

    fn address(&mut self, wanted: &Wanted) {
        let device = self.device();
        // Below IPv6's least the kernel has no IPv6 on a device, and takes no address of it.
        self.step_if(device.mtu != wanted.mtu, Step::SetMtu(wanted.mtu));
        let addrs = wanted.addrs.iter();
        let addrs = addrs.filter(|addr| addr.is_ipv4() || !device.without_v6);
        let hosts: BTreeSet<(IpAddr, u8)> = addrs.map(|addr| host(*addr)).collect();
        for (addr, _) in hosts.difference(&device.addrs) {
            self.step(Step::AddAddr(*addr));
        }
        for (addr, len) in device.addrs.difference(&hosts) {
            self.step(Step::RemoveAddr(*addr, *len));
        }
        self.step_if(!device.up, Step::SetUp(true));
    }

    fn route(&mut self, wanted: &Wanted) {
        let device = self.device();
        let is_wanted = |route: &Prefix| route.is_v4() || !device.without_v6;
        for (route, mtu) in wanted.routes.iter().filter(|(route, _)| is_wanted(route)) {
            match device.routes.get(route) {
                None => self.step(Step::AddRoute(*route, *mtu)),
                Some(has) => self.step_if(has != mtu, Step::ChangeRoute(*route, *mtu)),
            }
        }
        // Last: what goes may be one that others of them stand for.
        for route in device.routes.keys() {
            if !wanted.routes.contains_key(route) {
                self.step(Step::RemoveRoute(*route));
            }
        }
        let forwarding = self.state.forwarding.clone();
        for gone in forwarding.difference(&wanted.forwarding) {
            self.step(Step::RestoreForwarding(gone.clone()));
        }
        for new in wanted.forwarding.difference(&forwarding) {
            self.step(Step::Forward(new.clone()));
        }
    }

    /// The device goes first: no packet may meet it without its programs.
    fn leave(&mut self) {
        let present = matches!(self.state.device, Device::Present(_));
        self.step_if(present, Step::DeleteLink);
        self.step_if(self.state.acl != Acl::Absent, Step::DetachAcl);
        for forwarding in self.state.forwarding.clone() {
            self.step(Step::RestoreForwarding(forwarding));
        }
    }
}

/// An address as the prefix that it has on the device.
fn host(addr: IpAddr) -> (IpAddr, u8) {
    (addr, Prefix::host(addr).len())
}

impl Present {
    pub(crate) fn clone_without_peers(&self) -> Self {
        Self {
            key: self.key,
            listen_port: self.listen_port,
            mtu: self.mtu,
            up: self.up,
            addrs: self.addrs.clone(),
            peers: BTreeMap::new(),
            routes: self.routes.clone(),
            without_v6: self.without_v6,
        }
    }
}

impl Observed {
    /// The device, if it is there and ours.
    #[must_use]
    pub fn present(&self) -> Option<&Present> {
        match &self.device {
            Device::Present(present) => Some(present),
            Device::Absent | Device::Foreign => None,
        }
    }

    /// What `step` does to a kernel that holds this.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::CreateLink { mtu } => {
                if self.device == Device::Absent {
                    self.device = Device::Present(Present {
                        mtu: *mtu,
                        ..Present::default()
                    });
                }
            }
            Step::DeleteLink => {
                self.device = Device::Absent;
                self.forwarding.retain(|gone| gone.side != Side::Tunnel);
                if self.acl != Acl::Absent {
                    self.acl = Acl::Pinned;
                }
            }
            Step::AttachAcl => {
                if !matches!(self.acl, Acl::Attached(_)) {
                    self.acl = Acl::Attached(None);
                }
            }
            Step::SetAcl(policy) => self.acl = Acl::Attached(Some(policy.serial)),
            Step::Greet(_) => {}
            Step::DetachAcl => self.acl = Acl::Absent,
            Step::Forward(forwarding) => {
                self.forwarding.insert(forwarding.clone());
            }
            Step::RestoreForwarding(forwarding) => {
                self.forwarding.remove(forwarding);
            }
            Step::SetMtu(_)
            | Step::SetUp(_)
            | Step::Configure { .. }
            | Step::SetPeers(_)
            | Step::RemovePeers(_)
            | Step::AddAddr(_)
            | Step::RemoveAddr(..)
            | Step::AddRoute(..)
            | Step::ChangeRoute(..)
            | Step::RemoveRoute(_) => {
                if let Device::Present(present) = &mut self.device {
                    present.apply(step);
                }
            }
        }
    }
}

impl Present {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::SetMtu(mtu) => self.set_mtu(*mtu),
            Step::SetUp(up) => self.set_up(*up),
            Step::Configure { key, listen_port } => {
                self.key = Some(*key);
                self.listen_port = *listen_port;
            }
            Step::SetPeers(changes) => {
                peers::apply(&mut self.peers, changes);
            }
            Step::RemovePeers(keys) => peers::remove(&mut self.peers, keys),
            Step::AddAddr(addr) => {
                self.addrs.insert(host(*addr));
            }
            Step::RemoveAddr(addr, len) => self.remove_addr(*addr, *len),
            Step::AddRoute(route, mtu) => {
                self.routes.entry(*route).or_insert(*mtu);
            }
            Step::ChangeRoute(route, mtu) => {
                self.routes.insert(*route, *mtu);
            }
            Step::RemoveRoute(route) => {
                self.routes.remove(route);
            }
            Step::CreateLink { .. }
            | Step::DeleteLink
            | Step::AttachAcl
            | Step::SetAcl(_)
            | Step::DetachAcl
            | Step::Greet(_)
            | Step::Forward(_)
            | Step::RestoreForwarding(_) => {}
        }
    }

    /// IPv6 routes that said more than a device's new MTU, or as much as its old one, say what the
    /// new one is (`rt6_nh_mtu_change` in net/ipv6/route.c).
    fn set_mtu(&mut self, mtu: u32) {
        let before = std::mem::replace(&mut self.mtu, mtu);
        for (prefix, route) in &mut self.routes {
            let follows = route.mtu >= mtu || route.mtu == before;
            if !prefix.is_v4() && follows {
                route.mtu = mtu;
            }
        }
    }

    /// A device that loses its last IPv4 address loses its IPv4 routes (`fib_disable_ip` in
    /// net/ipv4/fib_frontend.c).
    fn remove_addr(&mut self, addr: IpAddr, len: u8) {
        let removed = self.addrs.remove(&(addr, len));
        if removed && addr.is_ipv4() && !self.addrs.iter().any(|(addr, _)| addr.is_ipv4()) {
            self.routes.retain(|route, _| !route.is_v4());
        }
    }

    /// A device that goes down loses its routes and its IPv6 addresses (`addrconf_ifdown` in
    /// net/ipv6/addrconf.c; IPv4 addresses stay).
    fn set_up(&mut self, up: bool) {
        if self.up && !up {
            self.routes.clear();
            self.addrs.retain(|(addr, _)| addr.is_ipv4());
        }
        self.up = up;
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tunnel => f.write_str("the tunnel"),
            Self::Lan(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for RouteMtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mtu {}", self.mtu)?;
        if self.mss > 0 {
            write!(f, ", mss {}", self.mss)?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateLink { mtu } => write!(f, "create the device, mtu {mtu}"),
            Self::DeleteLink => f.write_str("delete the device"),
            Self::SetMtu(mtu) => write!(f, "set mtu {mtu}"),
            Self::SetUp(true) => f.write_str("bring the device up"),
            Self::SetUp(false) => f.write_str("take the device down"),
            Self::AttachAcl => f.write_str("attach the programs"),
            Self::SetAcl(_) => f.write_str("swap the policy"),
            Self::DetachAcl => f.write_str("remove programs, links and maps"),
            Self::Configure { key, listen_port } => {
                write!(f, "configure key {key} port {listen_port}")
            }
            Self::SetPeers(changes) => write!(f, "set {} peer(s)", changes.len()),
            Self::RemovePeers(keys) => write!(f, "remove {} peer(s)", keys.len()),
            Self::AddAddr(addr) => write!(f, "add address {addr}"),
            Self::RemoveAddr(addr, len) => write!(f, "remove address {addr}/{len}"),
            Self::AddRoute(route, mtu) => write!(f, "add route {route}, {mtu}"),
            Self::ChangeRoute(route, mtu) => write!(f, "change route {route}: {mtu}"),
            Self::RemoveRoute(route) => write!(f, "remove route {route}"),
            Self::Greet(peers) => write!(f, "greet {} peer(s)", peers.len()),
            Self::Forward(Forwarding { side, family }) => {
                write!(f, "forward {family} from {side}")
            }
            Self::RestoreForwarding(Forwarding { side, family }) => {
                write!(f, "restore {family} forwarding of {side}")
            }
        }
    }
}
