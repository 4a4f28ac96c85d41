//! The documents that the agent answers with and that `--json` prints.
//!
//! Absent values are `null`, never missing; durations are whole seconds (`…_seconds`), sizes bytes
//! (`…_bytes`). With `--json` each document stands alone with `"version": 1` beside its fields;
//! lists stand under their name (`{"version":1,"peers":[…]}`).

use proto::filter::Direction;
use proto::id::{Generation, NodeId, RegionId};
use proto::key::NodeKey;
use proto::net::{Prefix, Protocol};
use proto::netmap::Owner;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// `weir status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where this machine stands.
    pub phase: Phase,
    /// The WireGuard device.
    pub interface: Interface,
    /// What this machine is in its network; `null` before it joined.
    pub node: Option<Node>,
    /// The conversation with the coordinator.
    pub coordinator: Coordinator,
    /// The network's version that is in force here; `null` before the first netmap.
    pub generation: Option<Generation>,
    /// The version of the loaded tables; `null` while none are.
    pub epoch: Option<u32>,
    /// Enforcement.
    pub acl: Acl,
    /// Where floods to WireGuard's port are held off; empty while that is switched off.
    pub guard: Vec<Guarded>,
    /// How many peers this node has.
    pub peers: usize,
    /// The peers with which packets were exchanged lately, by name.
    pub active: Vec<PeerStatus>,
    /// What is wrong, worst first; empty when all is well.
    pub problems: Vec<Problem>,
}

impl Status {
    /// Whether `weir up` is done: the device is up and has an address, and the ACL is attached.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let Self { interface, acl, .. } = self;
        interface.up && !interface.addrs.is_empty() && acl.attached
    }
}

/// Where a machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It is no node of any network.
    NotJoined,
    /// It is a node, and was told to stay down.
    Down,
    /// It is on its way up.
    Starting,
    /// The device is up with an address, and the ACL is attached.
    Up,
}

/// The WireGuard device as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether it exists and is up.
    pub up: bool,
    /// Its UDP port; `null` while it does not exist.
    pub listen_port: Option<u16>,
    /// Its MTU in bytes; `null` while it does not exist.
    pub mtu: Option<u32>,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// Addresses in peers' subnets that are not routed into it, because it is built on them: those
    /// of the coordinator and of relays.
    pub outside: Vec<IpAddr>,
}

/// What this machine is in its network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its name in the network.
    pub name: String,
    /// Its WireGuard public key.
    pub key: NodeKey,
    /// Who it belongs to.
    pub owner: Owner,
    /// Its addresses in the network, whether or not they are on the device yet.
    pub addrs: Vec<IpAddr>,
    /// The network's name.
    pub network: String,
    /// The network's IPv4 prefix.
    pub v4: Prefix,
    /// The network's IPv6 prefix.
    pub v6: Prefix,
    /// Subnets that it offers.
    pub advertised_routes: BTreeSet<Prefix>,
    /// Those of them that the coordinator approved.
    pub approved_routes: BTreeSet<Prefix>,
}

/// The conversation with the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinator {
    /// `HOST:PORT`; `null` before a token named one.
    pub address: Option<String>,
    /// `HOST:PORT` of the proxy that it is reached through; `null` if directly.
    #[serde(default)]
    pub proxy: Option<String>,
    /// Whether its stream of netmaps is open.
    pub connected: bool,
    /// Why it is not, as a sentence; `null` while it is, or before the first attempt.
    pub why: Option<String>,
    /// When the next attempt comes.
    pub retry_in_seconds: Option<u64>,
}

/// Whether policy is enforced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acl {
    /// Whether the programs are on the device, in both directions.
    pub attached: bool,
    /// How: `tcx` or `clsact`; `null` while they are not attached.
    pub hook: Option<String>,
    /// Why they are not attached, as a sentence; `null` where that is nothing unusual.
    pub why: Option<String>,
    /// Whether this machine lets nothing in that others begin, whatever policy says.
    pub shields_up: bool,
    /// What becomes of packets that this machine refuses to send.
    pub refuse: Refuse,
}

/// What whoever sent a packet learns when this machine refuses to let it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refuse {
    /// At once that it is not permitted: by a reset, or an ICMP error.
    #[default]
    Answer,
    /// Nothing.
    Drop,
}

/// An interface where the guard stands before WireGuard's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guarded {
    /// Its name.
    pub interface: String,
    /// How: `xdp` in its driver, `tcx` or `clsact` behind it.
    pub hook: String,
}

/// Whether and how the guard stands before WireGuard's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuardMode {
    /// In the driver of a network card that takes it, elsewhere behind it.
    #[default]
    On,
    /// Never in a driver.
    Tc,
    /// Not at all.
    Off,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What a program branches on: stable, snake_case (`route_overlap`, `bpffs_hidden`).
    pub code: String,
    /// What is wrong, as a sentence.
    pub message: String,
    /// What to do, as a sentence.
    pub next: String,
}

/// One line of `weir peers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
    /// Its WireGuard public key.
    pub key: NodeKey,
    /// Who it belongs to.
    pub owner: Owner,
    /// Subnets behind it.
    pub routes: BTreeSet<Prefix>,
    /// Whether the coordinator has a live connection to it (as far as this node heard).
    pub online: bool,
    /// Where the kernel sends its packets now.
    pub endpoint: Option<SocketAddr>,
    /// Time since the last WireGuard handshake; `null` if there was none.
    pub handshake_seconds: Option<u64>,
    /// Bytes received from it through the tunnel.
    pub rx_bytes: u64,
    /// Bytes sent to it through the tunnel.
    pub tx_bytes: u64,
    /// The same for the last seconds.
    pub rx_bytes_per_second: u64,
    /// Likewise.
    pub tx_bytes_per_second: u64,
    /// The way that its packets take.
    pub way: Way,
    /// The region whose relay they take; `null` unless they are relayed.
    pub relay: Option<String>,
    /// How long the last probe of a direct path took, or the relay's last answer; `null` if unknown.
    pub rtt_us: Option<u64>,
    /// The longest packet, in bytes, that the direct path takes (1,280 may stand for less); `null` if
    /// there is none, or that is not known yet.
    pub path_mtu: Option<u16>,
    /// The longest packet to it inside the tunnel, in bytes: what its IPv4 routes say. IPv6's never
    /// say less than 1,280.
    pub mtu: u32,
}

/// The way of packets to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// From kernel to kernel.
    Direct,
    /// By a relay, sealed.
    Relayed,
    /// None is known to work.
    None,
}

/// `weir path`: how a peer is reached, and why so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPath {
    /// The peer.
    pub peer: PeerStatus,
    /// Why its packets go as they go, as a clause.
    pub why: String,
    /// For how long they have; `null`: since there is a path.
    pub since_seconds: Option<u64>,
    /// Whether packets were exchanged lately.
    pub active: bool,
    /// Whether direct paths are being looked for right now.
    pub probing: bool,
    /// The region where the peer can be found; `null` if no relay leads to it.
    pub region: Option<String>,
    /// Everywhere it may be reached directly: the one in use first, then best first.
    pub candidates: Vec<Candidate>,
}

/// An endpoint that a peer may be reached at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// Where.
    pub endpoint: SocketAddr,
    /// How near: `on_link`, `private`, `public`, or `unrouted` while no route leads there. Stable.
    pub tier: String,
    /// Who named it: `netmap`, `call` (the peer, by relay), `seen` (its packets came from there).
    pub sources: Vec<String>,
    /// Time since it was last probed; `null`: never.
    pub probed_ms_ago: Option<u64>,
    /// What came of it: `never`, `waiting`, `answered`, `silent`, `swallows` (it answers probes and
    /// carries no packets), `overruled` (the peer prefers another). Stable.
    pub result: String,
    /// How long the answer took; `null` without one.
    pub rtt_us: Option<u64>,
    /// Whether packets go there now.
    pub in_use: bool,
}

/// One region of the network's relay map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its id.
    pub id: RegionId,
    /// Its name.
    pub name: String,
    /// Whether peers find this node there.
    pub home: bool,
    /// `up`, `connecting`, `down`, or `unused` while nobody needs it. Stable.
    pub connection: String,
    /// Why it is down, as a clause; `null` unless it is.
    pub why: Option<String>,
    /// What it goes through while it is up: `derp`, or `websocket` where something in between lets
    /// nothing else pass. Stable.
    #[serde(default)]
    pub transport: Option<String>,
    /// `HOST:PORT` of the proxy that its relay is reached through; `null` if directly.
    #[serde(default)]
    pub proxy: Option<String>,
    /// How far it is; `null` if that was not measured.
    pub latency_us: Option<u64>,
}

/// Whom `weir ping` is about to ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingTarget {
    /// The peer.
    pub peer: PeerStatus,
    /// Which of its addresses to ask: the one named, else its first.
    pub addr: IpAddr,
    /// What policy says of an echo request from this node to that address.
    pub policy: Explanation,
}

/// `weir explain`: what becomes of a first packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Who initiates.
    pub src: End,
    /// To whom.
    pub dst: End,
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port; `null` where the protocol has none.
    pub port: Option<u16>,
    /// Which way such a packet crosses the device; `null` if it would not.
    pub direction: Option<Direction>,
    /// What the programs do with it.
    pub verdict: Verdict,
    /// Why it is denied, or why accepted: the name of the counter that it raises.
    pub reason: String,
    /// The rule that allows it; `null` when denied.
    pub rule: Option<RuleRef>,
    /// The selectors of that rule that matched, as the policy has them; `null` when denied.
    pub matched: Option<Matched>,
    /// The rules that came closest, nearest first; empty unless no rule allows it.
    pub near: Vec<NearMiss>,
    /// The same in sentences: what matched, or what came closest and why it failed.
    pub sentences: Vec<String>,
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Its address.
    pub addr: IpAddr,
    /// The name of the node that has the address; `null` if no known node has.
    pub node: Option<String>,
}

/// What the programs do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Let it through.
    Accept,
    /// Drop it.
    Deny,
}

/// A place in the policy file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRef {
    /// Which entry of its section, from 0.
    pub index: u32,
    /// The line where it starts, from 1.
    pub line: u32,
}

/// Which selectors of a rule matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Matched {
    /// Of its sources.
    pub src: String,
    /// Of its destinations.
    pub dst: String,
}

/// A rule that does not allow a flow, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NearMiss {
    /// Which one.
    #[serde(flatten)]
    pub rule: RuleRef,
    /// What it lacks, as a clause.
    pub why: String,
}

/// One line of `weir monitor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Seen {
    /// From here on drops are told.
    Begun,
    /// A packet was dropped.
    Drop(Box<Drop>),
    /// More packets were dropped than told.
    LeftOut(LeftOut),
    /// Events were lost, because packets of too many kinds were dropped at once.
    Lost(Lost),
}

/// Events that found no room in the buffer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// How many, since the last such line.
    pub events: u64,
}

/// A dropped packet. Never what it carried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// Which way.
    pub direction: Direction,
    /// Why: the name of the counter that it raised.
    pub reason: String,
    /// Who sent it; `null` where the packet could not be read so far.
    pub src: Option<Party>,
    /// To whom; `null` likewise.
    pub dst: Option<Party>,
    /// The protocol; `null` likewise.
    pub protocol: Option<Protocol>,
    /// Letters of its TCP flags (`S`, `SA`, `R` …); `null` of other protocols.
    pub tcp_flags: Option<String>,
    /// Its ICMP type; `null` of other protocols.
    pub icmp_type: Option<u8>,
    /// Whether it is a fragment after the first, which has no ports.
    pub later_fragment: bool,
    /// Its length, IP header included.
    pub length_bytes: u32,
    /// The rule that came closest, where no rule allows it; `null` if none came close, or the reason
    /// is another.
    pub near: Option<NearMiss>,
    /// Why, as a sentence.
    pub why: String,
}

/// One end of a dropped packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// Its address.
    pub addr: IpAddr,
    /// Its port; `null` where there is none.
    pub port: Option<u16>,
    /// The name of the node that has the address, or a subnet with it behind it; `null` if no known
    /// node has.
    pub node: Option<String>,
    /// Whose the loaded tables say that it is.
    pub side: Side,
    /// Its class in the loaded tables, as a source or as a destination: addresses that no rule tells
    /// apart have the same; 0 is named by no rule.
    pub class: u32,
}

/// Whose an address is in the loaded tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Nobody's.
    Nobody,
    /// A peer's, or behind a peer.
    Peer,
    /// This node's, or behind it.
    Own,
}

/// Drops that were counted and not told: alike to one that was, or too many at a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Which way.
    pub direction: Direction,
    /// Why they were dropped.
    pub reason: String,
    /// How many, since the last such line.
    pub packets: u64,
}

/// `weir netcheck`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netcheck {
    /// WireGuard's UDP port on this machine.
    pub listen_port: u16,
    /// This machine's own addresses, those of the tunnel left out.
    pub addrs: Vec<IpAddr>,
    /// IPv4.
    pub v4: Family,
    /// IPv6.
    pub v6: Family,
    /// What each server said, by address.
    pub servers: Vec<StunServer>,
    /// The region where peers find this node; `null` while it has none.
    pub home: Option<String>,
    /// The network's relays, by id.
    pub regions: Vec<Region>,
    /// The port that the router opened on request; `null` if none is.
    #[serde(default)]
    pub port_mapping: Option<PortMapping>,
    /// Peers that are on line and from which no packet came by the endpoint in use, by name.
    pub unreached: Vec<String>,
    /// Packets that looked like discovery and were dropped since the agent started: of nobody in
    /// this network, not sealed for this node, or too many at once.
    #[serde(default)]
    pub discovery_dropped: u64,
}

/// A port of the router that leads to WireGuard's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Where the world finds it.
    pub addr: SocketAddr,
    /// By what it was asked for: `PCP`, `NAT-PMP` or `UPnP`.
    pub protocol: String,
}

/// How the world sees this node in one address family.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// What stands between.
    pub nat: Nat,
    /// The same as a clause.
    pub words: String,
    /// Address and port that all servers see; `null` if they do not agree, or none answers.
    pub reflexive: Option<SocketAddr>,
    /// Where peers are told that this node can be reached, best first.
    pub endpoints: Vec<SocketAddr>,
}

/// What stands between this node and the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nat {
    /// Nobody was asked.
    Unknown,
    /// Nobody answered.
    Silent,
    /// Nothing: servers see an address of this machine.
    None,
    /// A NAT that shows all servers the same address and port.
    Easy,
    /// A NAT, and only one server to judge it by.
    OneServer,
    /// A NAT that shows each server another port.
    Hard,
}

/// A STUN server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StunServer {
    /// `HOST:PORT`, as the network names it.
    pub name: String,
    /// One of its addresses.
    pub addr: SocketAddr,
    /// The address and port that it sees; `null` while it does not answer.
    pub mapped: Option<SocketAddr>,
    /// How long its last answer took; `null` likewise.
    pub rtt_ms: Option<u64>,
}

/// `weir counters`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets by direction and what became of them.
    pub counters: Vec<Counter>,
    /// Packets that this machine refused to send and that were due an answer, by what became of
    /// that. Each is also counted as dropped, under its reason.
    pub answers: Vec<Answers>,
    /// Datagrams that WireGuard's port was sent from the underlay, by what the guard made of them;
    /// empty while it is switched off.
    pub guard: Vec<GuardCount>,
    /// Events of dropped packets that `weir monitor` could not be told, because nobody took those
    /// before them: most of them from when nobody followed. The packets are counted.
    #[serde(default)]
    pub events_lost: u64,
}

/// What the guard made of datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardCount {
    /// Whether they were let through.
    pub verdict: Verdict,
    /// What they were, or which limit they were over: stable, snake_case.
    pub outcome: String,
    /// How many, since the programs were loaded.
    pub packets: u64,
}

/// Answers to refused packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// `sent`; `limited`, when there were too many lately; `failed`, when the kernel could not make
    /// one. Stable.
    pub outcome: String,
    /// How many, since the programs were loaded.
    pub packets: u64,
}

/// One line of `weir counters`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Counter {
    /// Which way.
    pub direction: Direction,
    /// What became of the packets.
    pub verdict: Verdict,
    /// Why: stable, snake_case.
    pub reason: String,
    /// How many packets, since the programs were loaded.
    pub packets: u64,
}
