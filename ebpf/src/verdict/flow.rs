//! State of flows: finding, renewing, opening them, and how long they live.

use super::{At, Branch, Store, Tables, Verdict, holds};
use crate::abi::{Addr, Direction, ECHO_FROM_LOCAL, ECHO_FROM_REMOTE, Flow, FlowKey, flow_flags};
use crate::packet::{Packet, Tuple, What, protocol, tcp};
use crate::reason::{Accepted, Reason};

const SECOND_NS: u64 = 1_000_000_000;

/// How long a flow without reply lives. A SYN that is sent again refreshes it.
pub const OPENING_NS: u64 = 30 * SECOND_NS;
/// How long a picked-up flow lives without a packet of the other side.
pub const PICKED_UP_NS: u64 = 60 * SECOND_NS;
/// How long a silent TCP or SCTP flow lives. The tables evict by age, so memory does not ask for
/// less; RFC 5382 5 asks for at least two hours and four minutes.
pub const STREAM_NS: u64 = 5 * 24 * 3600 * SECOND_NS;
/// How long a TCP flow lives after both sides closed it (TIME_WAIT and late segments).
pub const STREAM_CLOSED_NS: u64 = 60 * SECOND_NS;
/// How long a TCP flow lives after a reset.
pub const STREAM_RESET_NS: u64 = 10 * SECOND_NS;
/// How long a silent UDP flow lives (RFC 4787 4.3 asks for at least two minutes).
pub const UDP_NS: u64 = 180 * SECOND_NS;
/// How long a silent echo flow lives.
pub const ICMP_NS: u64 = 30 * SECOND_NS;
/// How long a silent flow of any other protocol lives.
pub const OTHER_NS: u64 = 600 * SECOND_NS;
/// How long later fragments may follow the first one (as long as Linux reassembles IPv4).
pub const FRAGMENT_NS: u64 = 30 * SECOND_NS;
/// An entry's time is written again only when it is this old: most packets write nothing.
pub const FRESHEN_NS: u64 = SECOND_NS;
/// Flows that may be picked up in one window.
pub const PICKED_UP_QUOTA: u64 = 4_096;
/// Length of that window.
pub const PICKED_UP_WINDOW_NS: u64 = 10 * SECOND_NS;

/// Whether a valid segment may carry these flags together (RFC 9293 3.10.7; NULL, Xmas and SYN+FIN
/// scans do not).
#[inline(always)]
pub(super) fn flags_valid(flags: u8) -> bool {
    match flags & (tcp::SYN | tcp::RST | tcp::FIN) {
        tcp::SYN | tcp::RST => true,
        0 | tcp::FIN => flags & tcp::ACK != 0,
        _ => false,
    }
}

#[inline(always)]
fn is_syn(packet: &Packet) -> bool {
    matches!(packet.tuple.what, What::Segment)
        && packet.tcp_flags & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
}

/// A segment in the middle of a connection: ACK, perhaps PSH, nothing else.
#[inline(always)]
fn is_pure_ack(packet: &Packet) -> bool {
    let all = tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN | tcp::URG;
    packet.tcp_flags & all == tcp::ACK
}

/// Local and remote address of a packet.
#[inline(always)]
pub(super) fn sides(direction: Direction, tuple: &Tuple) -> (Addr, Addr) {
    match direction {
        Direction::Ingress => (tuple.dst, tuple.src),
        Direction::Egress => (tuple.src, tuple.dst),
    }
}

/// The key of a packet's flow.
#[inline(always)]
pub(super) fn key(direction: Direction, tuple: &Tuple) -> FlowKey {
    let (local, remote) = sides(direction, tuple);
    let egress = matches!(direction, Direction::Egress);
    let (local_port, remote_port) = match (tuple.what, egress) {
        (What::Request, true) | (What::Reply, false) => (tuple.src_port, ECHO_FROM_LOCAL),
        (What::Request, false) | (What::Reply, true) => (tuple.src_port, ECHO_FROM_REMOTE),
        (_, true) => (tuple.src_port, tuple.dst_port),
        (_, false) => (tuple.dst_port, tuple.src_port),
    };
    FlowKey {
        local,
        remote,
        local_port,
        remote_port,
        protocol: tuple.protocol,
        zero: [0; 3],
    }
}

#[inline(always)]
fn timeout_ns<T: Tables>(tables: &T, protocol: u8, store: Store, flow: &Flow) -> u64 {
    let both = flow_flags::INITIATOR_CLOSED | flow_flags::RESPONDER_CLOSED;
    let (branch, timeout) = if store == Store::Opening {
        if flow.flags & flow_flags::PICKED_UP != 0 {
            (Branch::TimeoutPickedUp, PICKED_UP_NS)
        } else {
            (Branch::TimeoutOpening, OPENING_NS)
        }
    } else {
        match protocol {
            protocol::TCP | protocol::SCTP => {
                if flow.flags & flow_flags::RESET != 0 {
                    (Branch::TimeoutReset, STREAM_RESET_NS)
                } else if flow.flags & both == both {
                    (Branch::TimeoutClosed, STREAM_CLOSED_NS)
                } else {
                    (Branch::TimeoutStream, STREAM_NS)
                }
            }
            protocol::UDP => (Branch::TimeoutUdp, UDP_NS),
            protocol::ICMP | protocol::ICMPV6 => (Branch::TimeoutIcmp, ICMP_NS),
            _ => (Branch::TimeoutOther, OTHER_NS),
        }
    };
    tables.probe(branch);
    timeout
}

/// The flow of this key, if it has not timed out.
#[inline(always)]
pub(super) fn live<T: Tables>(
    tables: &T,
    key: &FlowKey,
    now_ns: u64,
) -> Option<(Store, T::Entry, Flow)> {
    let (store, entry) = match tables.find(Store::Established, key) {
        Some(entry) => {
            tables.probe(Branch::FlowInEstablished);
            (Store::Established, entry)
        }
        None => {
            let Some(entry) = tables.find(Store::Opening, key) else {
                tables.probe(Branch::FlowNone);
                return None;
            };
            tables.probe(Branch::FlowInOpening);
            (Store::Opening, entry)
        }
    };
    let flow = tables.load(entry);
    // Clocks of two CPUs may differ by a tick; a flow of the future is fresh.
    let age_ns = now_ns.saturating_sub(flow.last_seen_ns);
    if holds::<T>(6, age_ns > timeout_ns(tables, key.protocol, store, &flow)) {
        tables.probe(Branch::FlowExpired);
        tables.remove(store, key);
        return None;
    }
    Some((store, entry, flow))
}

/// Makes sure that policy of the active epoch allows the flow: if it was decided under an older
/// one, its *first* packet is decided again. A flow that is no longer allowed is forgotten.
#[inline(always)]
pub(super) fn renew<T: Tables>(
    tables: &T,
    key: &FlowKey,
    store: Store,
    entry: T::Entry,
    flow: Flow,
    at: &At,
) -> Result<Flow, Verdict> {
    if holds::<T>(7, flow.epoch == at.active.epoch) {
        tables.probe(Branch::EpochGood);
        return Ok(flow);
    }
    tables.probe(Branch::EpochOld);
    let answer = tables.allows(key, u32::from(flow.initiator), at.active.slot);
    if answer.passes() {
        let renewed = Flow {
            epoch: at.active.epoch,
            ..flow
        };
        tables.save(entry, renewed);
        Ok(renewed)
    } else if answer == Verdict::deny(Reason::TableMissing) {
        tables.probe(Branch::EpochTableMissing);
        Err(answer)
    } else {
        tables.probe(Branch::EpochRevoked);
        tables.remove(store, key);
        Err(Verdict::deny(Reason::Revoked))
    }
}

/// Decides a packet by the flow that it belongs to; `None` if no flow speaks for it.
#[inline(always)]
pub(super) fn known<T: Tables>(
    tables: &T,
    key: &FlowKey,
    packet: &Packet,
    at: &At,
) -> Option<Verdict> {
    let (store, entry, flow) = live(tables, key, at.now_ns)?;
    let forward = flow.initiator == at.direction as u8;
    if is_syn(packet) || matches!(packet.tuple.what, What::SctpInit) {
        let over = flow_flags::RESET | flow_flags::INITIATOR_CLOSED | flow_flags::RESPONDER_CLOSED;
        if holds::<T>(9, !forward) {
            tables.probe(Branch::SynAgainst);
            return None;
        }
        if flow.flags & over != 0 {
            tables.probe(Branch::SynReopens);
            return None;
        }
    }
    let flow = match renew(tables, key, store, entry, flow, at) {
        Ok(flow) => flow,
        Err(refused) => return Some(refused),
    };
    let mut next = flow;
    next.flags |= closing(tables, packet.tcp_flags, forward);
    if store == Store::Opening && holds::<T>(11, !forward) {
        next.last_seen_ns = at.now_ns;
        if tables.insert(Store::Established, key, &next) {
            tables.probe(Branch::Promoted);
            tables.remove(Store::Opening, key);
            return Some(Verdict::accept(Accepted::Established));
        }
        tables.probe(Branch::PromotionFailed);
    }
    let age_ns = at.now_ns.saturating_sub(flow.last_seen_ns);
    if holds::<T>(12, age_ns >= FRESHEN_NS) || next.flags != flow.flags {
        tables.probe(Branch::Refreshed);
        next.last_seen_ns = at.now_ns;
        tables.save(entry, next);
    } else {
        tables.probe(Branch::NotRefreshed);
    }
    Some(Verdict::accept(Accepted::Established))
}

/// The bits of [`flow_flags`] that these TCP flags set.
#[inline(always)]
fn closing<T: Tables>(tables: &T, tcp_flags: u8, forward: bool) -> u8 {
    let mut bits = 0;
    if tcp_flags & tcp::FIN != 0 {
        if forward {
            tables.probe(Branch::FinOfInitiator);
            bits = flow_flags::INITIATOR_CLOSED;
        } else {
            tables.probe(Branch::FinOfResponder);
            bits = flow_flags::RESPONDER_CLOSED;
        }
    }
    if holds::<T>(10, tcp_flags & tcp::RST != 0) {
        tables.probe(Branch::ResetSeen);
        bits |= flow_flags::RESET;
    }
    bits
}

/// Whether a packet without flow may begin one, as far as its protocol is concerned; `true` if it
/// begins in the middle.
#[inline(always)]
fn opens<T: Tables>(tables: &T, packet: &Packet) -> Result<bool, Reason> {
    let (branch, result) = match packet.tuple.what {
        What::Segment if holds::<T>(13, is_syn(packet)) => (Branch::OpensSyn, Ok(false)),
        What::Segment if holds::<T>(14, is_pure_ack(packet)) => (Branch::OpensAck, Ok(true)),
        What::Segment => (Branch::OpensNot, Err(Reason::TcpNoFlow)),
        What::SctpInit => (Branch::SctpOpens, Ok(false)),
        What::SctpOther => (Branch::SctpOpensNot, Err(Reason::SctpNoFlow)),
        What::Request => (Branch::AsksIcmp, Ok(false)),
        What::Reply => (Branch::AnswersNobody, Err(Reason::IcmpNoFlow)),
        What::OtherIcmp | What::Error => (Branch::IcmpOther, Err(Reason::IcmpType)),
        What::Datagram | What::LaterFragment => (Branch::OpensDatagram, Ok(false)),
    };
    tables.probe(branch);
    result
}

/// Decides a packet that belongs to no flow.
#[inline(never)]
pub(super) fn first<T: Tables>(tables: &T, key: &FlowKey, packet: &Packet, at: &At) -> Verdict {
    let picked_up = match opens(tables, packet) {
        Ok(picked_up) => picked_up,
        Err(reason) => return Verdict::deny(reason),
    };
    let answer = tables.allows(key, at.direction as u32, at.active.slot);
    if !answer.passes() {
        return answer;
    }
    if picked_up && holds::<T>(15, !tables.take_picked_up(at.now_ns)) {
        tables.probe(Branch::QuotaSpent);
        return Verdict::deny(Reason::PickedUpQuota);
    }
    let flow = Flow {
        last_seen_ns: at.now_ns,
        epoch: at.active.epoch,
        initiator: at.direction as u8,
        flags: if picked_up { flow_flags::PICKED_UP } else { 0 },
        zero: [0; 2],
    };
    if !tables.insert(Store::Opening, key, &flow) {
        tables.probe(Branch::TableFull);
        return Verdict::deny(Reason::FlowTableFull);
    }
    // What this flow replaces, where a new one began on the ports of an old one.
    tables.remove(Store::Established, key);
    if picked_up {
        tables.probe(Branch::PickedUpPasses);
        Verdict::accept(Accepted::PickedUp)
    } else {
        tables.probe(Branch::FirstPasses);
        Verdict::accept(Accepted::New)
    }
}
