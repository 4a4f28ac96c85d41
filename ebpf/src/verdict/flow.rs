//! State of flows: finding, renewing, opening them, and how long they live.

use super::{At, Branch, InVain, Store, Tables, Verdict, holds};
use crate::abi::{
    Addr, Direction, ECHO_FROM_LOCAL, ECHO_FROM_REMOTE, Flow, FlowKey, Share, flow_flags,
};
use crate::packet::{Packet, Part, Tuple, What, protocol, tcp};
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
/// In which time the flows are counted that a peer opens.
pub const OPENED_WINDOW_NS: u64 = 10 * SECOND_NS;
/// The share that is all peers together.
const TOGETHER: u16 = 0;

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
pub(super) fn sides(direction: Direction, tuple: &Tuple) -> (&Addr, &Addr) {
    match direction {
        Direction::Ingress => (&tuple.dst, &tuple.src),
        Direction::Egress => (&tuple.src, &tuple.dst),
    }
}

/// The key of a packet's flow.
#[inline(always)]
pub(crate) fn key(direction: Direction, tuple: &Tuple) -> FlowKey {
    let (local, remote) = sides(direction, tuple);
    let egress = matches!(direction, Direction::Egress);
    let (local_port, remote_port) = match (tuple.what, egress) {
        (What::Request, true) | (What::Reply, false) => (tuple.src_port, ECHO_FROM_LOCAL),
        (What::Request, false) | (What::Reply, true) => (tuple.src_port, ECHO_FROM_REMOTE),
        (_, true) => (tuple.src_port, tuple.dst_port),
        (_, false) => (tuple.dst_port, tuple.src_port),
    };
    FlowKey::new((local, local_port), (remote, remote_port), tuple.protocol)
}

/// Whether the other side has answered, so that packets of both can be on their way.
#[inline(always)]
pub(super) fn is_answered(store: Store, flow: &Flow) -> bool {
    // Flows that another layout left in the table of lasting ones have no such flag.
    store == Store::Established || flow.flags & flow_flags::ANSWERED != 0
}

/// Whether nothing more is to come than what is late.
#[inline(always)]
fn is_over(flow: &Flow) -> bool {
    let both = flow_flags::INITIATOR_CLOSED | flow_flags::RESPONDER_CLOSED;
    flow.flags & flow_flags::RESET != 0 || flow.flags & both == both
}

#[inline(always)]
fn timeout(protocol: u8, store: Store, flow: &Flow) -> (Branch, u64) {
    if !is_answered(store, flow) {
        return if flow.flags & flow_flags::PICKED_UP != 0 {
            (Branch::TimeoutPickedUp, PICKED_UP_NS)
        } else {
            (Branch::TimeoutOpening, OPENING_NS)
        };
    }
    match protocol {
        protocol::TCP | protocol::SCTP => {
            if flow.flags & flow_flags::RESET != 0 {
                (Branch::TimeoutReset, STREAM_RESET_NS)
            } else if is_over(flow) {
                (Branch::TimeoutClosed, STREAM_CLOSED_NS)
            } else {
                (Branch::TimeoutStream, STREAM_NS)
            }
        }
        protocol::UDP => (Branch::TimeoutUdp, UDP_NS),
        protocol::ICMP | protocol::ICMPV6 => (Branch::TimeoutIcmp, ICMP_NS),
        _ => (Branch::TimeoutOther, OTHER_NS),
    }
}

/// Whether an entry counts as a flow at `now_ns`, or has timed out.
#[must_use]
pub fn is_live(key: &FlowKey, store: Store, flow: &Flow, now_ns: u64) -> bool {
    now_ns.saturating_sub(flow.last_seen_ns) <= timeout(key.protocol, store, flow).1
}

/// Lets a packet of an established flow pass that changes nothing about it but its time: nearly
/// every packet there is, at the cost of one look-up. [`known`] would say the same. `Err` tells
/// whether the look-up was made, in vain.
#[inline(always)]
pub(super) fn hit<T: Tables>(tables: &T, packet: &Packet, at: &At) -> Result<(), InVain> {
    let changes = tcp::SYN | tcp::RST | tcp::FIN;
    let plain = match packet.tuple.what {
        What::Segment => packet.tcp_flags & (changes | tcp::ACK) == tcp::ACK,
        What::Datagram | What::SctpOther | What::Request | What::Reply => true,
        What::SctpInit | What::Error | What::OtherIcmp | What::LaterFragment => false,
    };
    if !plain || packet.part != Part::Whole {
        return Err(InVain::Nowhere);
    }
    let key = key(at.direction, &packet.tuple);
    let Some(entry) = tables.find(Store::Established, &key) else {
        return Err(InVain::Established);
    };
    let flow = tables.load(entry);
    let age_ns = at.now_ns.saturating_sub(flow.last_seen_ns);
    let (_, timeout_ns) = timeout(key.protocol, Store::Established, &flow);
    if holds::<T>(27, flow.epoch != at.active.epoch) || holds::<T>(28, age_ns > timeout_ns) {
        tables.probe(Branch::HitNeedsMore);
        return Err(InVain::Nowhere);
    }
    tables.probe(Branch::Hit);
    if holds::<T>(29, age_ns >= FRESHEN_NS) {
        tables.probe(Branch::HitRefreshed);
        let last_seen_ns = at.now_ns;
        tables.freshen(
            entry,
            Flow {
                last_seen_ns,
                ..flow
            },
        );
    }
    Ok(())
}

/// The flow of this key, if it has not timed out.
#[inline(always)]
pub(super) fn live<T: Tables>(
    tables: &T,
    key: &FlowKey,
    now_ns: u64,
    in_vain: InVain,
) -> Option<(Store, T::Entry, Flow)> {
    let established = if in_vain == InVain::Nowhere {
        tables.find(Store::Established, key)
    } else {
        None
    };
    let (store, entry) = if let Some(entry) = established {
        tables.probe(Branch::FlowInEstablished);
        (Store::Established, entry)
    } else if let Some(entry) = tables.find(Store::Opening, key) {
        tables.probe(Branch::FlowInOpening);
        (Store::Opening, entry)
    } else if let Some(entry) = tables.find(Store::Surplus, key) {
        tables.probe(Branch::FlowInSurplus);
        (Store::Surplus, entry)
    } else {
        tables.probe(Branch::FlowNone);
        return None;
    };
    let flow = tables.load(entry);
    let (branch, timeout_ns) = timeout(key.protocol, store, &flow);
    tables.probe(branch);
    // Clocks of two CPUs may differ by a tick; a flow of the future is fresh.
    let age_ns = now_ns.saturating_sub(flow.last_seen_ns);
    if holds::<T>(6, age_ns > timeout_ns) {
        tables.probe(Branch::FlowExpired);
        forget(tables, store, key, flow.share);
        return None;
    }
    Some((store, entry, flow))
}

/// Takes a flow out of its table, and gives back what it took of its peer's share. Not inlined,
/// because stack is scarce where it is called.
#[inline(never)]
fn forget<T: Tables>(tables: &T, store: Store, key: &FlowKey, share: u16) {
    tables.remove(store, key);
    if store == Store::Established {
        count::<T, false>(tables, share);
    }
}

/// Counts one lasting flow more, or one less: of its peer, and of all together.
#[inline(never)]
fn count<T: Tables, const MORE: bool>(tables: &T, number: u16) {
    count_one::<T, MORE>(tables, TOGETHER);
    if number != TOGETHER {
        count_one::<T, MORE>(tables, number);
    }
}

#[inline(always)]
fn count_one<T: Tables, const MORE: bool>(tables: &T, number: u16) {
    let Some(share) = tables.share(number) else {
        return;
    };
    let established = if MORE {
        share.established.saturating_add(1)
    } else {
        share.established.saturating_sub(1)
    };
    tables.set_established(number, established);
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
    if answer.verdict.passes() {
        let renewed = Flow {
            epoch: at.active.epoch,
            ..flow
        };
        tables.save(entry, renewed);
        Ok(renewed)
    } else if answer.verdict == Verdict::deny(Reason::TableMissing) {
        tables.probe(Branch::EpochTableMissing);
        Err(answer.verdict)
    } else {
        tables.probe(Branch::EpochRevoked);
        forget(tables, store, key, flow.share);
        Err(Verdict::deny(Reason::Revoked))
    }
}

/// Decides a packet by the flow that it belongs to. `Err` if no flow speaks for it, with the table
/// of the flow that it would replace.
#[inline(always)]
pub(super) fn known<T: Tables>(
    tables: &T,
    key: &FlowKey,
    packet: &Packet,
    at: &At,
    in_vain: InVain,
) -> Result<Verdict, Option<Store>> {
    let Some((store, entry, flow)) = live(tables, key, at.now_ns, in_vain) else {
        return Err(None);
    };
    let forward = flow.initiator == at.direction as u8;
    if is_syn(packet) || matches!(packet.tuple.what, What::SctpInit) {
        let over = flow_flags::RESET | flow_flags::INITIATOR_CLOSED | flow_flags::RESPONDER_CLOSED;
        if holds::<T>(9, !forward) {
            tables.probe(Branch::SynAgainst);
            return Err(Some(store));
        }
        if flow.flags & over != 0 {
            tables.probe(Branch::SynReopens);
            return Err(Some(store));
        }
    }
    let flow = match renew(tables, key, store, entry, flow, at) {
        Ok(flow) => flow,
        Err(refused) => return Ok(refused),
    };
    let age_ns = at.now_ns.saturating_sub(flow.last_seen_ns);
    let mut next = flow;
    next.flags |= closing(tables, packet.tcp_flags, forward);
    if holds::<T>(11, !forward) {
        next.flags |= flow_flags::ANSWERED;
    }
    if place_again(tables, key, store, &flow, &next, packet, at) {
        return Ok(Verdict::accept(Accepted::Established));
    }
    if holds::<T>(12, age_ns >= FRESHEN_NS) || next.flags != flow.flags {
        tables.probe(Branch::Refreshed);
        next.last_seen_ns = at.now_ns;
        tables.save(entry, next);
    } else {
        tables.probe(Branch::NotRefreshed);
    }
    Ok(Verdict::accept(Accepted::Established))
}

/// Notes that the flow is in use.
#[inline(always)]
pub(super) fn freshen<T: Tables>(tables: &T, entry: T::Entry, flow: Flow, at: &At) {
    let last_seen_ns = at.now_ns;
    if last_seen_ns.saturating_sub(flow.last_seen_ns) >= FRESHEN_NS {
        tables.freshen(
            entry,
            Flow {
                last_seen_ns,
                ..flow
            },
        );
    }
}

/// Moves a flow to another table if this packet, which makes `next` of it, shows that it lasts, or
/// that it is over; whether it did.
#[inline(always)]
fn place_again<T: Tables>(
    tables: &T,
    key: &FlowKey,
    store: Store,
    flow: &Flow,
    next: &Flow,
    packet: &Packet,
    at: &At,
) -> bool {
    let fresh = Flow {
        last_seen_ns: at.now_ns,
        ..*next
    };
    if store == Store::Established {
        let over = next.flags != flow.flags && is_over(next);
        return holds::<T>(26, over) && retire(tables, key, &fresh);
    }
    let lasts = holds::<T>(23, lasts(key.protocol, packet, flow, at)) && !is_over(next);
    lasts && promote(tables, key, store, &fresh)
}

/// Whether a flow proves by this packet that it lasts: it was answered, and goes on. For protocols
/// with a handshake its initiator must finish that; in others either side may go on, the one that
/// answers not before a second has gone by, because an answer may be several packets.
#[inline(always)]
fn lasts(protocol: u8, packet: &Packet, flow: &Flow, at: &At) -> bool {
    if flow.flags & flow_flags::ANSWERED == 0 {
        return false;
    }
    let forward = flow.initiator == at.direction as u8;
    match protocol {
        protocol::TCP => forward && packet.tcp_flags & tcp::SYN == 0,
        protocol::SCTP => forward && !matches!(packet.tuple.what, What::SctpInit),
        _ => forward || at.now_ns.saturating_sub(flow.last_seen_ns) >= FRESHEN_NS,
    }
}

/// Moves a flow to the table of those that last, if its peer has room there; whether it did.
#[inline(always)]
fn promote<T: Tables>(tables: &T, key: &FlowKey, store: Store, flow: &Flow) -> bool {
    if holds::<T>(24, !has_room(tables, flow.share)) {
        tables.probe(Branch::ShareSpent);
        return false;
    }
    if !tables.insert(Store::Established, key, flow) {
        tables.probe(Branch::PromotionFailed);
        return false;
    }
    tables.probe(Branch::Promoted);
    tables.remove(store, key);
    count::<T, true>(tables, flow.share);
    true
}

#[inline(always)]
fn has_room<T: Tables>(tables: &T, number: u16) -> bool {
    match (tables.share(number), tables.share(TOGETHER)) {
        (Some(own), Some(all)) => {
            leaves_room(own.established, all.established, T::LIMITS.established)
        }
        (_, None) | (None, _) => false,
    }
}

/// Whether a peer that has so many may have one more: if it has fewer than are still free.
#[inline(always)]
fn leaves_room(own: u32, together: u32, limit: u32) -> bool {
    own < limit.saturating_sub(together)
}

/// Moves a flow that is over out of the table of those that last; whether it did.
#[inline(always)]
fn retire<T: Tables>(tables: &T, key: &FlowKey, flow: &Flow) -> bool {
    if !tables.insert(Store::Surplus, key, flow) {
        tables.probe(Branch::RetirementFailed);
        return false;
    }
    tables.probe(Branch::Retired);
    forget(tables, Store::Established, key, flow.share);
    true
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
pub(super) fn opens<T: Tables>(tables: &T, packet: &Packet) -> Result<bool, Reason> {
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

/// Decides a packet that belongs to no flow, or begins another in place of the one in `former`.
#[inline(always)]
pub(super) fn first<T: Tables>(
    tables: &T,
    key: &FlowKey,
    packet: &Packet,
    at: &At,
    former: Option<Store>,
) -> Verdict {
    let picked_up = match opens(tables, packet) {
        Ok(picked_up) => picked_up,
        Err(reason) => return Verdict::deny(reason),
    };
    let answer = tables.allows(key, at.direction as u32, at.active.slot);
    if !answer.verdict.passes() {
        return answer.verdict;
    }
    begin(tables, key, at, answer.share, picked_up, former)
}

/// Begins a flow that policy allows.
#[inline(always)]
pub(super) fn begin<T: Tables>(
    tables: &T,
    key: &FlowKey,
    at: &At,
    share: u16,
    picked_up: bool,
    former: Option<Store>,
) -> Verdict {
    if picked_up && holds::<T>(15, !tables.take_picked_up(at.now_ns)) {
        tables.probe(Branch::QuotaSpent);
        return Verdict::deny(Reason::PickedUpQuota);
    }
    let flow = Flow {
        last_seen_ns: at.now_ns,
        epoch: at.active.epoch,
        initiator: at.direction as u8,
        flags: if picked_up { flow_flags::PICKED_UP } else { 0 },
        share,
    };
    let store = place(tables, share, at.now_ns);
    if !tables.insert(store, key, &flow) {
        tables.probe(Branch::TableFull);
        return Verdict::deny(Reason::FlowTableFull);
    }
    if let Some(former) = former
        && former != store
        && let Some(entry) = tables.find(former, key)
    {
        tables.probe(Branch::FormerForgotten);
        let share = tables.load(entry).share;
        forget(tables, former, key, share);
    }
    if picked_up {
        tables.probe(Branch::PickedUpPasses);
        Verdict::accept(Accepted::PickedUp)
    } else {
        tables.probe(Branch::FirstPasses);
        Verdict::accept(Accepted::New)
    }
}

/// Where a new flow goes: if that is where flows open, it counts against its peer's share.
#[inline(never)]
fn place<T: Tables>(tables: &T, number: u16, now_ns: u64) -> Store {
    let (Some(own), Some(all)) = (
        opened_lately(tables, number, now_ns),
        opened_lately(tables, TOGETHER, now_ns),
    ) else {
        return Store::Surplus;
    };
    if holds::<T>(25, !leaves_room(own.opened, all.opened, T::LIMITS.opened)) {
        tables.probe(Branch::OpensTooMany);
        return Store::Surplus;
    }
    tables.set_opened(TOGETHER, all.since_ns, all.opened.saturating_add(1));
    if number != TOGETHER {
        tables.set_opened(number, own.since_ns, own.opened.saturating_add(1));
    }
    Store::Opening
}

/// What a share has, of which what it opened in an earlier window is left out.
#[inline(always)]
fn opened_lately<T: Tables>(tables: &T, number: u16, now_ns: u64) -> Option<Share> {
    let share = tables.share(number)?;
    if now_ns.wrapping_sub(share.since_ns) < OPENED_WINDOW_NS {
        return Some(share);
    }
    Some(Share {
        since_ns: now_ns,
        opened: 0,
        ..share
    })
}
