//! Policy: may this source initiate that to this destination?
//!
//! At most eight look-ups, whatever the number of rules, ports and peers: two exact ones for the
//! addresses (each with one longest-prefix match behind it), one for the pair of classes, two for
//! a protocol that the pair's grant has not, and one for a page of ports. Mostly one: this node's
//! own address is at hand, and the other's line has the grants between the two.

use super::{Answer, At, Branch, Tables, Verdict, holds};
use crate::abi::{
    ANY_PROTOCOL, Addr, Direction, EVERYTHING, FlowKey, GRANT_RANGES, Identity, PAGE_PORTS,
    PageKey, PairKey, PortsKey, SetId, ports_kind, side,
};
use crate::addresses::{Head, Owned, near};
use crate::packet::Packet;
use crate::reason::{Accepted, Reason};
use core::borrow::Borrow as _;
use zerocopy::transmute;

/// May this initiate that?
struct Question<'a> {
    src: &'a Addr,
    dst: &'a Addr,
    /// Destination port; ignored by protocols without.
    port: &'a u16,
    protocol: &'a u8,
    /// Of the first packet.
    direction: Direction,
    /// Slot of the policy tables.
    slot: u32,
}

/// Policy's answer to the first packet of a flow, in the direction of its initiator.
#[inline(always)]
pub fn allows_flow<T: Tables>(tables: &T, key: &FlowKey, initiator: u32, slot: u32) -> Answer {
    let protocol = &key.protocol;
    let question = if holds::<T>(8, initiator == Direction::Ingress as u32) {
        Question {
            src: &key.remote,
            dst: &key.local,
            port: &key.local_port,
            protocol,
            direction: Direction::Ingress,
            slot,
        }
    } else {
        Question {
            src: &key.local,
            dst: &key.remote,
            port: &key.remote_port,
            protocol,
            direction: Direction::Egress,
            slot,
        }
    };
    Answer::from(refusal(tables, &question))
}

/// Policy's answer to a packet that begins a flow.
#[inline(always)]
pub fn allows_packet<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    slot: u32,
) -> Answer {
    let question = Question::of_packet(packet, direction, slot);
    Answer::from(refusal(tables, &question))
}

/// [`allows_packet`], where the line of the peer's address says it; `None` where it does not.
///
/// Of many peers, a line is in no cache, and to wait for it costs more than all else. So it is
/// asked for here, without a call in between, and little is left to do when it is there: a line
/// that says something is that of a peer, and its address and this node's are routable
/// ([`Owned::heads`]).
#[inline(always)]
pub(super) fn at_once<T: Tables>(tables: &T, packet: &Packet, at: &At) -> Option<Answer> {
    let direction = at.direction;
    let question = Question::of_packet(packet, direction, at.active.slot);
    let (ours, theirs) = question.ends();
    let line = tables.line_from_home(question.slot, ours, theirs)?;
    let allowed = by_line(tables, line.borrow(), &question)?;
    Some(Answer::from(if allowed {
        Ok(line.borrow().identity().share)
    } else {
        Err(Reason::Policy)
    }))
}

impl From<Result<u32, Reason>> for Answer {
    /// From a peer's share, or why not.
    #[inline(always)]
    fn from(result: Result<u32, Reason>) -> Self {
        match result {
            Ok(share) => Self {
                verdict: Verdict::accept(Accepted::New),
                share: share as u16,
            },
            Err(reason) => Self {
                verdict: Verdict::deny(reason),
                share: 0,
            },
        }
    }
}

impl<'a> Question<'a> {
    #[inline(always)]
    fn of_packet(packet: &'a Packet, direction: Direction, slot: u32) -> Self {
        let tuple = &packet.tuple;
        Self {
            src: &tuple.src,
            dst: &tuple.dst,
            port: &tuple.dst_port,
            protocol: &tuple.protocol,
            direction,
            slot,
        }
    }

    /// The address on this side, and the other one.
    #[inline(always)]
    fn ends(&self) -> (&'a Addr, &'a Addr) {
        match self.direction {
            Direction::Ingress => (self.dst, self.src),
            Direction::Egress => (self.src, self.dst),
        }
    }
}

/// Why not; or, if it is allowed, the share of the peer at the other end.
#[inline(always)]
fn refusal<T: Tables>(tables: &T, question: &Question) -> Result<u32, Reason> {
    let Question {
        src,
        dst,
        direction,
        slot,
        ..
    } = *question;
    if !tables.complete(slot) {
        tables.probe(Branch::TablesMissing);
        return Err(Reason::TableMissing);
    }
    routable(tables, src)?;
    routable(tables, dst)?;
    let (ours, theirs) = question.ends();
    let home = tables.home(slot, ours);
    let us = match home {
        Some(identity) => identity,
        None => owner(tables, slot, ours),
    };
    let line = tables.line(slot, theirs);
    let peer = match &line {
        Some(line) => line.borrow().identity(),
        None => routed(tables, slot, theirs),
    };
    check_sides(tables, direction, us.side, peer.side)?;
    if let Some(line) = &line
        && holds::<T>(30, home.is_some())
        && let Some(allowed) = by_line(tables, line.borrow(), question)
    {
        return if allowed {
            Ok(peer.share)
        } else {
            Err(Reason::Policy)
        };
    }
    let (source, destination) = match direction {
        Direction::Ingress => (peer.as_source, us.as_destination),
        Direction::Egress => (us.as_source, peer.as_destination),
    };
    if by_pair(tables, question, source, destination) {
        Ok(peer.share)
    } else {
        Err(Reason::Policy)
    }
}

/// Anti-spoof on both ends, the source first.
#[inline(always)]
fn check_sides<T: Tables>(
    tables: &T,
    direction: Direction,
    ours: u32,
    theirs: u32,
) -> Result<(), Reason> {
    let (source, destination) = match direction {
        Direction::Ingress => (theirs, ours),
        Direction::Egress => (ours, theirs),
    };
    check_source(tables, direction, source)?;
    check_destination(tables, direction, destination)
}

/// What the line of a peer's address says; `None` if the table of pairs has to be asked.
#[inline(always)]
fn by_line<T: Tables>(tables: &T, line: &Owned, question: &Question) -> Option<bool> {
    let (Head { kind, protocol }, ranges) = line.head_and_ranges(question.direction);
    let same_protocol = protocol == *question.protocol;
    match kind {
        near::RANGES | near::RANGES_AND_MORE if same_protocol => {
            tables.probe(Branch::LinePorts);
            Some(in_ranges::<T>(ranges, *question.port))
        }
        near::RANGES => {
            tables.probe(Branch::LineOtherProtocol);
            Some(false)
        }
        near::NOTHING => {
            tables.probe(Branch::LineNothing);
            Some(false)
        }
        near::EVERYTHING => {
            tables.probe(Branch::LineEverything);
            Some(true)
        }
        _ => {
            tables.probe(Branch::LineSilent);
            None
        }
    }
}

/// What the table of pairs says.
#[inline(always)]
fn by_pair<T: Tables>(tables: &T, question: &Question, source: u32, destination: u32) -> bool {
    let slot = question.slot;
    if source == 0 || destination == 0 {
        tables.probe(Branch::ClassZero);
        return false;
    }
    let pair = PairKey {
        source,
        destination,
        direction: question.direction as u32,
    };
    let Some(grant) = tables.pair(slot, &pair) else {
        tables.probe(Branch::PairNone);
        return false;
    };
    if holds::<T>(16, grant.set == EVERYTHING) {
        tables.probe(Branch::PairEverything);
        return true;
    }
    let port = *question.port;
    let allowed = if grant.protocol == u16::from(*question.protocol) {
        tables.probe(Branch::PortsOfGrant);
        in_ranges::<T>(&grant.ranges, port)
    } else if grant.more == 0 {
        tables.probe(Branch::NoMorePorts);
        false
    } else {
        in_set(tables, slot, grant.set, u32::from(*question.protocol), port)
    };
    tables.probe(if allowed {
        Branch::PortIn
    } else {
        Branch::PortOut
    });
    allowed
}

/// Refuses addresses that never belong to a peer, whatever the tables say.
#[inline(always)]
fn routable<T: Tables>(tables: &T, addr: &Addr) -> Result<(), Reason> {
    match unroutable(addr) {
        Some((branch, reason)) => {
            tables.probe(branch);
            Err(reason)
        }
        None => {
            tables.probe(Branch::AddressFine);
            Ok(())
        }
    }
}

/// Whether an address may belong to a peer at all.
#[must_use]
pub fn is_routable(addr: &Addr) -> bool {
    unroutable(addr).is_none()
}

#[inline(always)]
fn unroutable(addr: &Addr) -> Option<(Branch, Reason)> {
    let [first, second, _, _] = if addr.is_v4() {
        addr.words[3].to_ne_bytes()
    } else {
        addr.words[0].to_ne_bytes()
    };
    match (addr.is_v4(), first, second) {
        (true, 0 | 127, _) => Some((Branch::MartianV4, Reason::Martian)),
        // Class E with the broadcast address goes with multicast.
        (true, 224..=255, _) => Some((Branch::MulticastV4, Reason::Multicast)),
        (true, 169, 254) => Some((Branch::LinkLocalV4, Reason::LinkLocal)),
        (false, 0xff, _) => Some((Branch::MulticastV6, Reason::Multicast)),
        (false, 0xfe, 0x80..=0xbf) => Some((Branch::LinkLocalV6, Reason::LinkLocal)),
        _ => None,
    }
}

/// Who has an address: nobody, too, is an answer.
#[inline(always)]
fn owner<T: Tables>(tables: &T, slot: u32, addr: &Addr) -> Identity {
    match tables.identity(slot, addr) {
        Some(identity) => identity,
        None => routed(tables, slot, addr),
    }
}

/// Who has the longest prefix around an address that nobody has.
#[inline(always)]
fn routed<T: Tables>(tables: &T, slot: u32, addr: &Addr) -> Identity {
    match tables.route(slot, addr) {
        Some(identity) => {
            tables.probe(Branch::OwnerOfRoute);
            identity
        }
        None => {
            tables.probe(Branch::OwnerNobody);
            NOBODY
        }
    }
}

const NOBODY: Identity = Identity {
    as_source: 0,
    as_destination: 0,
    side: side::NOBODY,
    share: 0,
};

/// Anti-spoof: a packet from the network comes from a peer, one to the network from this side.
#[inline(always)]
fn check_source<T: Tables>(tables: &T, direction: Direction, side: u32) -> Result<(), Reason> {
    match direction {
        Direction::Ingress if holds::<T>(17, side == side::PEER) => Ok(()),
        Direction::Ingress if side == side::NOBODY => {
            tables.probe(Branch::IngressFromNobody);
            Err(Reason::SourceUnknown)
        }
        Direction::Ingress => {
            tables.probe(Branch::IngressFromSelf);
            Err(Reason::SourceForged)
        }
        Direction::Egress if holds::<T>(18, side == side::OWN) => Ok(()),
        Direction::Egress => {
            tables.probe(Branch::EgressFromOther);
            Err(Reason::SourceForged)
        }
    }
}

/// A packet from the network goes to this side, one to the network to a peer.
#[inline(always)]
fn check_destination<T: Tables>(tables: &T, direction: Direction, side: u32) -> Result<(), Reason> {
    match direction {
        Direction::Ingress if holds::<T>(19, side != side::OWN) => {
            tables.probe(Branch::IngressElsewhere);
            Err(Reason::DestinationNotOurs)
        }
        Direction::Egress if holds::<T>(20, side != side::PEER) => {
            tables.probe(Branch::EgressElsewhere);
            Err(Reason::DestinationUnknown)
        }
        Direction::Ingress | Direction::Egress => {
            tables.probe(Branch::SidesFine);
            Ok(())
        }
    }
}

/// Anti-spoof alone, for packets that policy does not judge.
#[inline(never)]
pub(super) fn sender<T: Tables>(tables: &T, src: &Addr, at: &At) -> Result<(), Reason> {
    let side = owner(tables, at.active.slot, src).side;
    check_source(tables, at.direction, side)
}

#[inline(always)]
fn in_set<T: Tables>(tables: &T, slot: u32, set: SetId, protocol: u32, port: u16) -> bool {
    let mut key = PortsKey { set, protocol };
    let ports = match tables.ports(slot, &key) {
        Some(ports) => {
            tables.probe(Branch::ProtocolOwnEntry);
            ports
        }
        None => {
            key.protocol = ANY_PROTOCOL;
            let Some(ports) = tables.ports(slot, &key) else {
                tables.probe(Branch::ProtocolNone);
                return false;
            };
            tables.probe(Branch::ProtocolAnyEntry);
            ports
        }
    };
    match ports.kind {
        ports_kind::ALL => {
            tables.probe(Branch::PortsAll);
            true
        }
        ports_kind::INLINE => {
            tables.probe(Branch::PortsInline);
            let [a, b, c, d, e, f, g] = ports.ranges;
            // The one in the middle twice, which changes nothing.
            in_ranges::<T>(&[a, b, c, d], port) | in_ranges::<T>(&[d, e, f, g], port)
        }
        ports_kind::PAGED => {
            tables.probe(Branch::PortsPaged);
            let page = PageKey {
                set,
                protocol: key.protocol as u16,
                page: port / PAGE_PORTS,
            };
            let bit = u32::from(port % PAGE_PORTS);
            match tables.page_word(slot, &page, bit / 64) {
                Some(word) => word >> (bit % 64) & 1 == 1,
                None => {
                    tables.probe(Branch::PageMissing);
                    false
                }
            }
        }
        _ => {
            tables.probe(Branch::PortsKindUnknown);
            false
        }
    }
}

/// Whether a port is in one of the ranges. Two of them at once, and without a comparison for each:
/// the verifier would follow every way that those may come out, and the fewer steps wait for a line
/// of memory, the more of what comes after them does not.
#[inline(always)]
fn in_ranges<T: Tables>(ranges: &[[u16; 2]; GRANT_RANGES], port: u16) -> bool {
    // Of each range a half word, with room for the carry.
    const LOWS: u64 = 0x0000_ffff_0000_ffff;
    const CARRIES: u64 = 0x0001_0000_0001_0000;
    let port = u64::from(port) << 32 | u64::from(port);
    let words: [u64; 2] = transmute!(*ranges);
    let inside = words.map(|word| {
        let (lows, highs) = (word & LOWS, word >> 16 & LOWS);
        let (first, last) = if cfg!(target_endian = "little") {
            (lows, highs)
        } else {
            (highs, lows)
        };
        // A carry stays where nothing was borrowed.
        let from_first = holding::<T>(21, (port | CARRIES).wrapping_sub(first));
        let to_last = holding::<T>(22, (last | CARRIES).wrapping_sub(port));
        from_first & to_last
    });
    (inside[0] | inside[1]) & CARRIES != 0
}

/// These bits, or their opposites where a test planted the mutant `id`.
#[inline(always)]
fn holding<T: Tables>(id: u32, bits: u64) -> u64 {
    if T::MUTANT == id { !bits } else { bits }
}
