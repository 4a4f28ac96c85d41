//! A model of in-kernel WireGuard: sessions, timers, roaming and counters, without cryptography.
//!
//! What it keeps of the original (drivers/net/wireguard, WireGuard paper 5 and 6): an initiation at
//! most every 5 s; a responder that may not send before it heard from the initiator; two sessions
//! that are good at a time; an authenticated packet moves the endpoint to where it came from; a
//! keepalive 10 s after data that nothing answered, a new handshake 15 s after data that nobody
//! answered; rekeying after 120 s, death after 180 s. `tests/lab` runs the same scenarios on the
//! real one.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ebpf::abi::Direction;
use engine::plan::{Observed, PeerState, Present, Step};
use proto::key::NodeKey;

use super::acl::Acl;
use super::mix;

const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// `REKEY_TIMEOUT_JITTER_MAX_JIFFIES`.
const REKEY_TIMEOUT_JITTER: Duration = Duration::from_millis(333);
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// `MAX_STAGED_PACKETS`.
const QUEUE: usize = 128;
/// The world's first moment, as seconds since 1970: handshakes carry wall-clock time.
pub const EPOCH: Duration = Duration::from_secs(1_700_000_000);

/// A packet inside the tunnel: a question, or the answer to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Whose question.
    pub src: IpAddr,
    /// Who is asked.
    pub dst: IpAddr,
    /// Its number in the world.
    pub number: u64,
    /// Whether it is the answer; then it goes from `dst` to `src`.
    pub answer: bool,
}

/// A message of WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Type 1.
    Initiation(u64),
    /// Type 2.
    Response(u64),
    /// Type 4; a keepalive without a packet.
    Data(u64, Option<Inner>),
}

impl Message {
    fn bytes(self) -> u64 {
        match self {
            Message::Initiation(_) => 148,
            Message::Response(_) => 92,
            Message::Data(_, None) => 32,
            Message::Data(_, Some(_)) => 128,
        }
    }
}

/// A datagram that the kernel sends: where to, for which peer, what.
pub type Sent = (SocketAddr, NodeKey, Message);

#[derive(Clone, Copy, Debug)]
struct Session {
    since: Duration,
    initiator: bool,
    /// A responder may send only after it heard from the initiator.
    confirmed: bool,
}

#[derive(Default)]
struct Tunnel {
    sessions: BTreeMap<u64, Session>,
    current: Option<u64>,
    queue: VecDeque<Inner>,
    /// When the last initiation was sent, and the number it proposed, if an answer to it counts.
    initiated: Option<(Duration, Option<u64>)>,
    /// The newest initiation that was taken: replays are dropped.
    taken: Option<u64>,
    trying_since: Option<Duration>,
    sent_at: Option<Duration>,
    /// Since when data is unanswered.
    unanswered: Option<Duration>,
    /// Since when received data is without anything sent back.
    owed: Option<Duration>,
    /// How many handshakes were completed.
    handshakes: u64,
}

/// One host's device, and what the kernel holds of it.
#[derive(Default)]
pub struct Kernel {
    /// What [`engine::Output::Observe`] reads.
    pub observed: Observed,
    acl: Acl,
    tunnels: BTreeMap<NodeKey, Tunnel>,
    /// Makes session numbers that differ between hosts.
    salt: u64,
    made: u64,
    /// The world's first moment by this host's wall clock.
    pub wall: Duration,
}

impl Kernel {
    /// A kernel without a device. `salt` differs from host to host.
    #[must_use]
    pub fn new(salt: u64) -> Kernel {
        Kernel {
            salt,
            wall: EPOCH,
            ..Kernel::default()
        }
    }

    /// The device's peers, if there is one.
    #[must_use]
    pub fn present(&self) -> Option<&Present> {
        self.observed.present()
    }

    /// Where packets for this peer go.
    #[must_use]
    pub fn endpoint(&self, peer: &NodeKey) -> Option<SocketAddr> {
        self.present()?.peers.get(peer)?.stats.endpoint
    }

    /// How many handshakes with this peer were completed.
    #[must_use]
    pub fn handshakes(&self, peer: &NodeKey) -> u64 {
        self.tunnels.get(peer).map_or(0, |tunnel| tunnel.handshakes)
    }

    /// Whose prefix an inner address is.
    #[must_use]
    pub fn peer_of(&self, addr: IpAddr) -> Option<NodeKey> {
        let peers = &self.present().filter(|present| present.up)?.peers;
        let has = |state: &PeerState| state.allowed_ips.iter().any(|it| it.contains(addr));
        peers
            .iter()
            .find(|(_, state)| has(state))
            .map(|(key, _)| *key)
    }

    /// The longest packet that goes to an inner address, as routes say.
    #[must_use]
    pub fn mtu(&self, to: IpAddr) -> u32 {
        let routes = self.present().into_iter().flat_map(|it| &it.routes);
        let leads = routes.filter(|(prefix, _)| prefix.contains(to));
        let nearest = leads.max_by_key(|(prefix, _)| prefix.len());
        nearest.map_or(0, |(_, route)| route.mtu)
    }

    /// Carries out a step of a plan.
    pub fn apply(&mut self, now: Duration, step: &Step) -> Vec<Sent> {
        self.observed.apply(step);
        self.acl.apply(step);
        let peers: Vec<NodeKey> = self
            .present()
            .map(|present| present.peers.keys().copied().collect())
            .unwrap_or_default();
        self.tunnels.retain(|key, _| peers.contains(key));
        match step {
            Step::SetUp(false) | Step::DeleteLink => {
                self.tunnels.clear();
                Vec::new()
            }
            Step::Greet(peers) => {
                let greet = |(key, _): &(NodeKey, u16)| self.push(now, *key, None);
                peers.iter().flat_map(greet).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The host is suspended: its keys are wiped (`wg_pm_notification`).
    pub fn suspend(&mut self) {
        for tunnel in self.tunnels.values_mut() {
            tunnel.sessions.clear();
            tunnel.current = None;
            tunnel.initiated = tunnel.initiated.map(|(at, _)| (at, None));
        }
    }

    /// An application sends a packet.
    pub fn send(&mut self, now: Duration, inner: Inner) -> Vec<Sent> {
        let to = if inner.answer { inner.src } else { inner.dst };
        let passes = self.acl.passes(now, Direction::Egress, inner);
        match self.peer_of(to).filter(|_| passes) {
            Some(peer) => self.push(now, peer, Some(inner)),
            None => Vec::new(),
        }
    }

    /// A datagram came in. Returns what is sent for it, and the packet inside.
    pub fn receive(
        &mut self,
        now: Duration,
        from: SocketAddr,
        peer: NodeKey,
        message: Message,
    ) -> (Vec<Sent>, Option<Inner>) {
        if self.endpoint_of(&peer).is_none() {
            return (Vec::new(), None);
        }
        let tunnel = self.tunnels.entry(peer).or_default();
        let mut out = Vec::new();
        let mut inside = None;
        match message {
            Message::Initiation(number) => {
                if tunnel.taken.is_some_and(|taken| number <= taken) {
                    return (Vec::new(), None);
                }
                tunnel.taken = Some(number);
                // There is one handshake of a peer at a time: an own one is forgotten, and the next
                // may not begin soon after a response either (`last_sent_handshake`).
                tunnel.initiated = Some((now, None));
                let session = Session {
                    since: now,
                    initiator: false,
                    confirmed: false,
                };
                // One unconfirmed session at a time, as the kernel's `next_keypair`.
                tunnel.sessions.retain(|_, session| session.confirmed);
                tunnel.sessions.insert(number, session);
                self.count_in(now, peer, from, message);
                out.extend(self.emit(now, peer, Message::Response(number)));
            }
            Message::Response(number) => {
                let proposed = tunnel.initiated.and_then(|(_, proposed)| proposed);
                if proposed != Some(number) || tunnel.trying_since.is_none() {
                    return (Vec::new(), None);
                }
                let session = Session {
                    since: now,
                    initiator: true,
                    confirmed: true,
                };
                tunnel.sessions.insert(number, session);
                tunnel.trying_since = None;
                self.made_current(now, peer, number);
                self.count_in(now, peer, from, message);
                out.extend(self.flush(now, peer, true));
            }
            Message::Data(number, inner) => {
                let Some(session) = tunnel.sessions.get_mut(&number) else {
                    return (Vec::new(), None);
                };
                if now - session.since >= REJECT_AFTER_TIME {
                    return (Vec::new(), None);
                }
                let news = !std::mem::replace(&mut session.confirmed, true);
                tunnel.unanswered = None;
                if inner.is_some() && tunnel.owed.is_none() {
                    tunnel.owed = Some(now);
                }
                if news {
                    tunnel.trying_since = None;
                    self.made_current(now, peer, number);
                }
                self.count_in(now, peer, from, message);
                if news {
                    out.extend(self.flush(now, peer, false));
                }
                inside = inner.filter(|inner| {
                    let from = if inner.answer { inner.dst } else { inner.src };
                    self.peer_of(from) == Some(peer)
                        && self.acl.passes(now, Direction::Ingress, *inner)
                });
            }
        }
        (out, inside)
    }

    /// What timers do. To be called often.
    pub fn tick(&mut self, now: Duration) -> Vec<Sent> {
        let mut out = Vec::new();
        let keys: Vec<NodeKey> = self.tunnels.keys().copied().collect();
        for key in keys {
            let keepalive = self
                .present()
                .and_then(|present| present.peers.get(&key))
                .map_or(0, |peer| peer.keepalive);
            let Some(tunnel) = self.tunnels.get_mut(&key) else {
                continue;
            };
            tunnel
                .sessions
                .retain(|_, session| now - session.since < REJECT_AFTER_TIME * 3);
            if let Some(since) = tunnel.trying_since {
                if now - since >= REKEY_ATTEMPT_TIME {
                    (tunnel.trying_since, tunnel.initiated) = (None, None);
                    tunnel.queue.clear();
                } else {
                    out.extend(self.initiate(now, key));
                }
                continue;
            }
            let long = |since: Option<Duration>, limit| since.is_some_and(|it| now - it >= limit);
            if long(tunnel.unanswered, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT) {
                tunnel.unanswered = None;
                out.extend(self.initiate(now, key));
            } else if long(tunnel.owed, KEEPALIVE_TIMEOUT) {
                out.extend(self.push(now, key, None));
            } else if keepalive > 0 {
                let pause = Duration::from_secs(keepalive.into());
                if tunnel.sent_at.is_none_or(|at| now - at >= pause) {
                    out.extend(self.push(now, key, None));
                }
            }
        }
        out
    }

    fn endpoint_of(&self, peer: &NodeKey) -> Option<Option<SocketAddr>> {
        let present = self.present().filter(|present| present.up)?;
        present.peers.get(peer).map(|peer| peer.stats.endpoint)
    }

    /// Sends a packet, or a keepalive, by the session at hand, or queues it and starts one.
    fn push(&mut self, now: Duration, peer: NodeKey, inner: Option<Inner>) -> Vec<Sent> {
        if self.endpoint_of(&peer).flatten().is_none() {
            return Vec::new();
        }
        let tunnel = self.tunnels.entry(peer).or_default();
        let current = tunnel.current.and_then(|number| {
            let session = tunnel.sessions.get(&number)?;
            (now - session.since < REJECT_AFTER_TIME).then_some((number, *session))
        });
        let Some((number, session)) = current else {
            if let Some(inner) = inner {
                tunnel.queue.push_back(inner);
                if tunnel.queue.len() > QUEUE {
                    tunnel.queue.pop_front();
                }
            }
            // A packet of an application gives a handshake that failed for long a new start.
            tunnel.trying_since.get_or_insert(now);
            return self.initiate(now, peer).into_iter().collect();
        };
        if inner.is_some() {
            tunnel.unanswered.get_or_insert(now);
        }
        tunnel.owed = None;
        let mut out: Vec<Sent> = Vec::new();
        out.extend(self.emit(now, peer, Message::Data(number, inner)));
        if session.initiator && now - session.since >= REKEY_AFTER_TIME {
            out.extend(self.initiate(now, peer));
        }
        out
    }

    fn initiate(&mut self, now: Duration, peer: NodeKey) -> Option<Sent> {
        let tunnel = self.tunnels.entry(peer).or_default();
        // By chance, or two that began together would cross for ever.
        let chance = mix(self.salt << 32 | self.made) % 16;
        let jitter = REKEY_TIMEOUT_JITTER.mul_f64(chance as f64 / 16.0);
        let pause = REKEY_TIMEOUT + jitter;
        if tunnel.initiated.is_some_and(|(at, _)| now - at < pause) {
            return None;
        }
        tunnel.trying_since.get_or_insert(now);
        self.made += 1;
        let number = self.salt << 32 | self.made;
        tunnel.initiated = Some((now, Some(number)));
        self.emit(now, peer, Message::Initiation(number))
    }

    fn made_current(&mut self, now: Duration, peer: NodeKey, number: u64) {
        let Some(tunnel) = self.tunnels.get_mut(&peer) else {
            return;
        };
        let before = tunnel.current.replace(number);
        tunnel
            .sessions
            .retain(|it, session| *it == number || Some(*it) == before || !session.confirmed);
        tunnel.handshakes += 1;
        let wall = self.wall;
        if let Some(state) = self.state(&peer) {
            state.stats.last_handshake = Some(wall + now);
        }
    }

    /// Sends what waited; the initiator confirms with an empty packet if nothing did.
    fn flush(&mut self, now: Duration, peer: NodeKey, confirm: bool) -> Vec<Sent> {
        let waiting = self
            .tunnels
            .get_mut(&peer)
            .map(|tunnel| std::mem::take(&mut tunnel.queue))
            .unwrap_or_default();
        if waiting.is_empty() && confirm {
            return self.push(now, peer, None);
        }
        let send = |inner| self.push(now, peer, Some(inner));
        waiting.into_iter().flat_map(send).collect()
    }

    fn state(&mut self, peer: &NodeKey) -> Option<&mut PeerState> {
        match &mut self.observed.device {
            engine::plan::Device::Present(present) => present.peers.get_mut(peer),
            _ => None,
        }
    }

    fn emit(&mut self, now: Duration, peer: NodeKey, message: Message) -> Option<Sent> {
        let state = self.state(&peer)?;
        let endpoint = state.stats.endpoint?;
        state.stats.tx_bytes += message.bytes();
        if let Some(tunnel) = self.tunnels.get_mut(&peer) {
            tunnel.sent_at = Some(now);
        }
        Some((endpoint, peer, message))
    }

    fn count_in(&mut self, _now: Duration, peer: NodeKey, from: SocketAddr, message: Message) {
        if let Some(state) = self.state(&peer) {
            state.stats.rx_bytes += message.bytes();
            state.stats.endpoint = Some(from);
        }
    }
}
