//! What the policy means for a stream of packets, in plain words and without tables.
//!
//! Slow on purpose, and independent: it shares no function with the evaluator, knows no classes,
//! no epochs and no byte layouts, asks [`Filter::allows`] anew for every packet of every flow, and
//! states its own numbers.

use super::craft::{ACK, Body, FIN, Fragment, RST, SYN, Spec};
use proto::filter::{Direction, Filter, Initiation, Label};
use proto::id::NodeId;
use proto::net::{Prefix, Protocol};
use proto::netmap::{Me, Peer};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Everyone and what they may do.
pub struct World {
    pub filter: Filter,
    pub me: Me,
    pub peers: BTreeMap<NodeId, Peer>,
}

#[derive(PartialEq, Eq)]
enum Owner {
    Us,
    Peer,
    Nobody,
}

impl World {
    /// Who has an address, and with which labels: exact addresses first, then the longest route.
    fn owner(&self, addr: IpAddr) -> (Owner, BTreeSet<Label>) {
        if self.me.addrs.contains(&addr) {
            return (Owner::Us, self.me.labels.clone());
        }
        if let Some(peer) = self.peers.values().find(|peer| peer.addrs.contains(&addr)) {
            return (Owner::Peer, peer.labels.clone());
        }
        let longest = |routes: &BTreeSet<Prefix>| {
            let around = routes.iter().filter(|route| route.contains(addr));
            around
                .map(|route| i32::from(route.len()))
                .max()
                .unwrap_or(-1)
        };
        let ours = longest(&self.me.routes);
        let theirs = self.peers.values().map(|peer| longest(&peer.routes)).max();
        let owner = match theirs.unwrap_or(-1) {
            theirs if ours < 0 && theirs < 0 => Owner::Nobody,
            theirs if theirs > ours => Owner::Peer,
            _ => Owner::Us,
        };
        (owner, BTreeSet::new())
    }

    /// Which peer has an address, or the longest route around it.
    fn peer(&self, addr: IpAddr) -> Option<NodeId> {
        let exact = self.peers.values().find(|peer| peer.addrs.contains(&addr));
        let around = |peer: &&Peer| {
            let lengths = peer.routes.iter().filter(|route| route.contains(addr));
            lengths.map(|route| route.len()).max()
        };
        let by_route = || {
            let behind = self.peers.values().filter(|peer| around(peer).is_some());
            behind.max_by_key(around)
        };
        exact.or_else(by_route).map(|peer| peer.id)
    }

    fn allows(&self, direction: Direction, flow: &Key) -> bool {
        let (src, dst, port) = match direction {
            Direction::Ingress => (flow.remote, flow.local, flow.local_port),
            Direction::Egress => (flow.local, flow.remote, flow.remote_port),
        };
        let never = |addr: IpAddr| match addr {
            IpAddr::V4(v4) => {
                let [first, second, ..] = v4.octets();
                matches!(first, 0 | 127 | 224..) || (first, second) == (169, 254)
            }
            IpAddr::V6(v6) => v6.segments()[0] >= 0xfe80,
        };
        if never(src) || never(dst) {
            return false;
        }
        let ((src_owner, src_labels), (dst_owner, dst_labels)) = (self.owner(src), self.owner(dst));
        let sides = match direction {
            Direction::Ingress => src_owner == Owner::Peer && dst_owner == Owner::Us,
            Direction::Egress => src_owner == Owner::Us && dst_owner == Owner::Peer,
        };
        let initiation = Initiation {
            src,
            src_labels: &src_labels,
            dst,
            dst_labels: &dst_labels,
            protocol: Protocol(flow.protocol),
            port,
        };
        sides && self.filter.allows(direction, &initiation).is_some()
    }
}

/// A flow's name. Echo: the identifier as both ports, and who asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub local: IpAddr,
    pub remote: IpAddr,
    pub local_port: u16,
    pub remote_port: u16,
    pub protocol: u8,
    pub asked_by_us: Option<bool>,
}

/// How well a flow is protected from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// From peers that open more than they may.
    Opening,
    /// From all flows that do not last, too.
    Lasting,
    /// From none.
    Surplus,
}

/// What all peers together may have: flows opened within ten seconds, and lasting flows. One of them
/// gets another while it has fewer than are left.
pub const OPENED: usize = 4;
pub const LASTING: usize = 4;

#[derive(Clone, Debug)]
struct Flow {
    began: Direction,
    peer: Option<NodeId>,
    place: Place,
    answered: bool,
    picked_up: bool,
    closed: [bool; 2],
    reset: bool,
    last_ns: u64,
}

/// The state of one node.
#[derive(Default)]
pub struct Model {
    flows: BTreeMap<Key, Flow>,
    datagrams: BTreeMap<(IpAddr, IpAddr, u16, u8), (Key, u64)>,
    /// Since when, and how many flows each peer opened since; and the same of all together.
    opened: BTreeMap<Option<NodeId>, (u64, usize)>,
    opened_together: (u64, usize),
}

/// What a packet says to a flow.
#[derive(Clone, Copy)]
struct Word {
    direction: Direction,
    flags: u8,
    /// It asks for a new connection.
    opening: bool,
}

const SECOND: u64 = 1_000_000_000;

impl Model {
    /// Every flow, dead or alive, and how well it is protected.
    pub fn places(&self) -> BTreeMap<Key, Place> {
        let flows = self.flows.iter();
        flows.map(|(key, flow)| (key.clone(), flow.place)).collect()
    }

    /// Whether the packet passes.
    pub fn passes(&mut self, world: &World, now: u64, direction: Direction, spec: &Spec) -> bool {
        let datagram = |part: Fragment| (spec.src, spec.dst, part.id, spec.protocol());
        if let Some(part) = spec.fragment.filter(|part| part.offset != 0) {
            let Some((key, since)) = self.datagrams.get(&datagram(part)).cloned() else {
                return false;
            };
            let head = match key.protocol {
                6 => 20,
                132 => 16,
                1 | 17 | 58 => 8,
                _ => 0,
            };
            return now - since <= 30 * SECOND
                && part.offset >= head
                && self.later(world, now, &key);
        }
        if let Body::Error(inner) = &spec.body {
            let whole = spec.fragment.is_none_or(|part| !part.more);
            return whole && self.error(world, now, direction, spec, inner);
        }
        if let Body::Tcp(_, _, flags) = spec.body
            && !sane(flags)
        {
            return false;
        }
        let Some(key) = key_of(direction, spec) else {
            return false;
        };
        let passes = self.whole(world, now, direction, spec, &key);
        if passes && let Some(part) = spec.fragment.filter(|part| part.more) {
            self.datagrams.insert(datagram(part), (key, now));
        }
        passes
    }

    fn whole(
        &mut self,
        world: &World,
        now: u64,
        direction: Direction,
        spec: &Spec,
        key: &Key,
    ) -> bool {
        let flags = if let Body::Tcp(_, _, flags) = spec.body {
            flags
        } else {
            0
        };
        let opening = match spec.body {
            Body::Tcp(..) => flags & (SYN | ACK) == SYN,
            Body::Sctp(_, _, chunk) => chunk == 1,
            _ => false,
        };
        self.expire(now, key);
        let over = |flow: &Flow| flow.reset || flow.closed != [false, false];
        let begins_anew = |flow: &Flow| opening && (flow.began != direction || over(flow));
        if !self.flows.get(key).is_some_and(begins_anew)
            && let Some(passes) = self.of_flow(
                world,
                now,
                key,
                Word {
                    direction,
                    flags,
                    opening,
                },
            )
        {
            return passes;
        }
        let middle = matches!(spec.body, Body::Tcp(..)) && flags & !0xc8 == ACK;
        let may_begin = match spec.body {
            Body::Tcp(..) => opening || middle,
            Body::Sctp(..) => opening,
            Body::Echo(request, _) => request,
            Body::Udp(..) | Body::Other(_) => true,
            Body::Icmp(_) | Body::Error(_) => false,
        };
        if !may_begin || !world.allows(direction, key) {
            return false;
        }
        let peer = world.peer(key.remote);
        let place = self.open(peer, now);
        self.flows.insert(
            key.clone(),
            Flow {
                began: direction,
                peer,
                place,
                answered: false,
                picked_up: middle,
                closed: [false, false],
                reset: false,
                last_ns: now,
            },
        );
        true
    }

    /// A peer opens one more flow.
    fn open(&mut self, peer: Option<NodeId>, now: u64) -> Place {
        let lately = |(since, count): (u64, usize)| {
            if now - since < 10 * SECOND {
                (since, count)
            } else {
                (now, 0)
            }
        };
        let (all_since, all) = lately(self.opened_together);
        let (since, own) = lately(self.opened.get(&peer).copied().unwrap_or_default());
        if own + all >= OPENED {
            return Place::Surplus;
        }
        self.opened.insert(peer, (since, own + 1));
        self.opened_together = (all_since, all + 1);
        Place::Opening
    }

    /// Whether this flow may be among those that last.
    fn has_room(&self, peer: Option<NodeId>) -> bool {
        let lasting = self
            .flows
            .values()
            .filter(|flow| flow.place == Place::Lasting);
        let of_peer = lasting.clone().filter(|flow| flow.peer == peer);
        of_peer.count() + lasting.count() < LASTING
    }

    /// Whether a later fragment of a packet of this flow passes.
    fn later(&mut self, world: &World, now: u64, key: &Key) -> bool {
        self.expire(now, key);
        let Some(flow) = self.flows.get_mut(key) else {
            return false;
        };
        if now - flow.last_ns >= SECOND {
            flow.last_ns = now;
        }
        let passes = world.allows(flow.began, key);
        if !passes {
            self.flows.remove(key);
        }
        passes
    }

    /// The verdict by a flow that exists; `None` if none does.
    fn of_flow(&mut self, world: &World, now: u64, key: &Key, word: Word) -> Option<bool> {
        self.expire(now, key);
        let Word {
            direction, flags, ..
        } = word;
        let room = self
            .flows
            .get(key)
            .is_some_and(|flow| self.has_room(flow.peer));
        let flow = self.flows.get_mut(key)?;
        if !world.allows(flow.began, key) {
            self.flows.remove(key);
            return Some(false);
        }
        let forward = flow.began == direction;
        let before = (flow.answered, flow.closed, flow.reset);
        flow.answered |= !forward;
        flow.closed[usize::from(forward)] |= flags & FIN != 0;
        flow.reset |= flags & RST != 0;
        let place = flow.place;
        if flow.reset || flow.closed == [true, true] {
            if place == Place::Lasting {
                flow.place = Place::Surplus;
            }
        } else if before.0 && room {
            // An answered flow lasts if it goes on.
            let goes_on = match key.protocol {
                6 => forward && flags & SYN == 0,
                132 => forward && !word.opening,
                _ => forward || now - flow.last_ns >= SECOND,
            };
            if goes_on {
                flow.place = Place::Lasting;
            }
        }
        // Times are written at most once a second, which is as exact as timeouts need to be; what
        // changes a flow is always written.
        let changed = before != (flow.answered, flow.closed, flow.reset) || place != flow.place;
        if changed || now - flow.last_ns >= SECOND {
            flow.last_ns = now;
        }
        Some(true)
    }

    fn expire(&mut self, now: u64, key: &Key) {
        let Some(flow) = self.flows.get(key) else {
            return;
        };
        let seconds = match (flow.answered, key.protocol) {
            (false, _) if flow.picked_up => 60,
            (false, _) => 30,
            (true, 6 | 132) if flow.reset => 10,
            (true, 6 | 132) if flow.closed == [true, true] => 60,
            (true, 6 | 132) => 5 * 24 * 3600,
            (true, 17) => 180,
            (true, 1 | 58) => 30,
            (true, _) => 600,
        };
        if now - flow.last_ns > seconds * SECOND {
            self.flows.remove(key);
        }
    }

    fn error(
        &mut self,
        world: &World,
        now: u64,
        direction: Direction,
        spec: &Spec,
        inner: &Spec,
    ) -> bool {
        // What it embeds was sent by whom it goes to, the other way; a later fragment of it names
        // no flow, and neither does another error.
        let sent = match direction {
            Direction::Ingress => Direction::Egress,
            Direction::Egress => Direction::Ingress,
        };
        let first = inner.fragment.is_none_or(|part| part.offset == 0);
        let Some(key) = key_of(sent, inner).filter(|_| first && inner.src == spec.dst) else {
            return false;
        };
        self.expire(now, &key);
        let Some(flow) = self.flows.get(&key) else {
            return false;
        };
        if !flow.answered && flow.began != sent {
            return false;
        }
        if !world.allows(flow.began, &key) {
            self.flows.remove(&key);
            return false;
        }
        let wanted = match direction {
            Direction::Ingress => Owner::Peer,
            Direction::Egress => Owner::Us,
        };
        world.owner(spec.src).0 == wanted
    }
}

/// Flags that a real segment may carry.
fn sane(flags: u8) -> bool {
    match (flags & SYN != 0, flags & RST != 0, flags & FIN != 0) {
        (true, false, false) | (false, true, false) => true,
        (false, false, _) => flags & ACK != 0,
        (true, true, _) | (true, _, true) | (_, true, true) => false,
    }
}

fn key_of(direction: Direction, spec: &Spec) -> Option<Key> {
    let (src_port, dst_port) = match spec.body {
        Body::Tcp(src, dst, _) | Body::Udp(src, dst) | Body::Sctp(src, dst, _) => (src, dst),
        Body::Echo(_, id) => (id, id),
        Body::Other(_) | Body::Icmp(_) => (0, 0),
        Body::Error(_) => return None,
    };
    let ours = direction == Direction::Egress;
    let asked_by_us = match spec.body {
        Body::Echo(request, _) => Some(request == ours),
        _ => None,
    };
    let (local, remote) = if ours {
        (spec.src, spec.dst)
    } else {
        (spec.dst, spec.src)
    };
    let (local_port, remote_port) = if ours {
        (src_port, dst_port)
    } else {
        (dst_port, src_port)
    };
    Some(Key {
        local,
        remote,
        local_port,
        remote_port,
        protocol: spec.protocol(),
        asked_by_us,
    })
}
