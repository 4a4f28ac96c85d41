//! What a weir node decides: a pure state machine from inputs to plans.
//!
//! No I/O, no clock, no threads, no randomness. Whoever drives it (the agent; a test; a replay of
//! recorded inputs) brings time and facts, and carries out what comes back:
//!
//! ```
//! use engine::{Config, Engine, Input, Output};
//! use std::time::Instant;
//!
//! let config = Config {
//!     interface: "weir0".into(),
//!     listen_port: 51820,
//!     shim_port: 51821,
//! };
//! let me = (proto::key::NodeKey([7; 32]), proto::key::DiscoKey([8; 32]));
//! let mut engine = Engine::new(config, me.0, me.1, [9; 32]);
//! let now = Instant::now();
//! engine.handle(now, Input::Up(true));
//! let deadline = loop {
//!     match engine.poll(now) {
//!         Output::Timeout(at) => break at,     // nothing more to do until then, or the next input
//!         Output::Observe => engine.handle(now, Input::Observed(Default::default())),
//!         other => panic!("there is no netmap yet, so nothing to plan: {other:?}"),
//!     }
//! };
//! assert!(deadline > now);
//! ```
//!
//! | module | what it decides |
//! |---|---|
//! | [`trust`] | netmap -> [`trust::VerifiedNetmap`], or why not |
//! | [`netcheck`] | how the world sees this node, and what its NAT is like |
//! | [`path`] | how one peer is reached: by relay, or at which endpoint |
//! | [`mtu`] | how long the packets may be that a direct path takes |
//! | [`relays`] | which relays to be connected to, and how relayed packets find their way |
//! | [`acl`] | filter -> table contents, what changes, `explain` |
//! | [`plan`] | desired and observed state, and the steps from one to the other |
//! | [`status`] | what is known and what is wrong, for people |
//! | [`trace`] | what an engine was told, to be told again |
//!
//! The machines do not know each other; they meet through values in [`Engine`].
//!
//! What must not be guessed (transaction ids) is drawn from a seed that is passed at the start, so a
//! run with the same seed and inputs is the same run. No secret key comes in here: discovery is
//! opened and sealed by whoever drives the engine.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod acl;
mod dice;
mod engine;
pub mod mtu;
pub mod netcheck;
mod outside;
pub mod path;
mod paths;
pub mod plan;
pub mod relays;
pub mod status;
pub mod trace;
pub mod trust;

pub use engine::{
    CLOSE_TICK, Engine, FIRST_PAUSE, KEEPALIVE_SECONDS, LONGEST_PAUSE, TICK, TICK_PER_PEER,
};
pub use paths::EAGER_PEERS;
pub use relays::{RelayTable, RelayedPeer};

use plan::{LiveRoute, Observed, Step};
use proto::control::Report;
use proto::disco::Message;
use proto::id::RegionId;
use proto::key::{DiscoKey, NodeKey};
use proto::net::Prefix;
use proto::netmap::{Netmap, Update};
use serde::{Deserialize, Serialize};
use status::Failure;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What does not change while an engine lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the WireGuard device.
    pub interface: String,
    /// Its UDP port.
    pub listen_port: u16,
    /// The UDP port of the shim, which carries relayed packets, on addresses of `lo`; 0 if there is
    /// none, and nothing can be relayed.
    pub shim_port: u16,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Input {
    /// The operator wants the node up, or down. Before the first word nothing is touched.
    Up(bool),
    /// The operator wants these subnets offered.
    Advertise(BTreeSet<Prefix>),
    /// The operator wants no new flow from others let in, whatever policy says.
    ShieldsUp(bool),
    /// The coordinator sent a netmap, or a change of one.
    Netmap(Update),
    /// The netmap of an earlier run was found on disk.
    Cached(Box<Netmap>),
    /// The node left its network: nothing of it holds any more.
    Forget,
    /// The coordinator is spoken to at this `HOST:PORT`.
    Coordinator(String),
    /// Servers are reached through the HTTP proxy at this `HOST:PORT`.
    Proxy(String),
    /// The host's addresses or routes are these now.
    Links(Links),
    /// The host slept and is awake again: what was known of the world is older than it seems.
    Woke,
    /// What the kernel holds of ours, as asked by [`Output::Observe`].
    Observed(Observed),
    /// The kernel could not be read: the error chain, for people.
    Unreadable(String),
    /// All steps of the plan in flight are done.
    Applied,
    /// A step of the plan in flight failed; those after it were not tried.
    Failed(Failure),
    /// Servers that were looked up for [`Output::Resolve`], with their names.
    Resolved(BTreeMap<SocketAddr, String>),
    /// A STUN server that was asked by [`Output::Ask`] sees our UDP port under this address.
    Mapped {
        /// Who answered.
        server: SocketAddr,
        /// What it sees.
        addr: SocketAddr,
    },
    /// A discovery packet came to the UDP port of WireGuard, and its box opened.
    Disco {
        /// Where it came from.
        from: SocketAddr,
        /// Whose box it is.
        sender: DiscoKey,
        /// What it says.
        message: Message,
    },
    /// Something happened at the connection to a region's relay.
    Relay(RegionId, RelayEvent),
    /// The router opened WireGuard's port to the world under this address, or no longer does.
    PortMapped(Option<SocketAddr>),
    /// The deadline of [`Output::Timeout`] has passed.
    Timeout,
}

/// What happened at the connection to a region's relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RelayEvent {
    /// It stands.
    Up,
    /// It does not stand, or no longer. Why, for people.
    Down(String),
    /// How long an answer of the relay took.
    Latency(Duration),
    /// The relay does not have this node, for which something was sent.
    PeerGone(NodeKey),
    /// A discovery packet came by it, and its box opened.
    Disco {
        /// Who sent it, in the relay's words.
        from: NodeKey,
        /// Whose box it is.
        sender: DiscoKey,
        /// What it says.
        message: Message,
    },
    /// Packets of this peer come by it: said once after each [`Output::Relays`], and again every
    /// few seconds while they do.
    Data {
        /// Who sends them, in the relay's words.
        from: NodeKey,
    },
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Carry out these steps, in order, and answer with [`Input::Applied`] or [`Input::Failed`].
    /// No other plan and no [`Output::Observe`] comes before the answer.
    Apply(Vec<Step>),
    /// Read the kernel, and answer with [`Input::Observed`] or [`Input::Unreadable`].
    Observe,
    /// Ask the coordinator for a full netmap.
    NeedFull,
    /// Tell the coordinator where this node can be reached and what it offers.
    Report(Report),
    /// Keep this netmap on disk: it is in force.
    Persist(Box<Netmap>),
    /// Look up these servers (`HOST:PORT`), and answer with [`Input::Resolved`].
    Resolve(Vec<String>),
    /// Ask these STUN servers, from the UDP port of WireGuard, how they see it. Each answer is an
    /// [`Input::Mapped`]; there may be none.
    Ask(BTreeSet<SocketAddr>),
    /// Seal this message of discovery, and send it.
    Transmit {
        /// Which way.
        via: Via,
        /// Who alone can open it.
        to: DiscoKey,
        /// What to say.
        message: Message,
    },
    /// These relays are to be connected to, and relayed packets go by these rules from now on.
    Relays(Arc<RelayTable>),
    /// Ask this router to open WireGuard's port to the world, from now on; each news of it is an
    /// [`Input::PortMapped`]. `None`: give back what was opened.
    Router(Option<Router>),
    /// Nothing more to do until then. Always last.
    Timeout(Instant),
}

/// The way of a discovery packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// From the UDP port of WireGuard to this address.
    Direct(SocketAddr),
    /// By the relay of this region to this node.
    Relay(RegionId, NodeKey),
}

/// The host's own addresses and routes: those of our device are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Links {
    /// Addresses that others may reach: no loopback, link-local, tentative or temporary ones.
    pub addrs: BTreeSet<LinkAddr>,
    /// Unicast routes of the main table, and those that lead nowhere.
    pub routes: BTreeSet<LiveRoute>,
    /// The gateway of the IPv4 default route, the best of them.
    pub gateway: Option<Ipv4Addr>,
    /// The longest packet, in bytes, that one of the interfaces with such an address takes; 0 if
    /// there is none.
    pub mtu: u32,
}

/// The router between a private IPv4 network and the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Router {
    /// Its address in our network.
    pub gateway: Ipv4Addr,
    /// Ours.
    pub own: Ipv4Addr,
}

/// An address of this host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkAddr {
    /// The interface that has it.
    pub interface: String,
    /// The address.
    pub addr: IpAddr,
    /// Length of the prefix of its network.
    pub prefix_len: u8,
}
