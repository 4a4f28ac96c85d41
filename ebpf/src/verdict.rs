//! The one policy evaluator: flow state first, policy for what begins something.
//!
//! ```text
//! packet ── nothing active? ─────────────────────────────────────── drop no_policy
//!   ├─ later fragment ── its datagram's first one passed? ── then as its flow
//!   ├─ ICMP error ────── embeds a packet of a live flow? ─── related
//!   ├─ of a known flow ─ same epoch? ─────────────────────── established
//!   │                    older: decide its *first* packet again, or drop revoked
//!   └─ first packet ──── can it open a flow? may it (policy)? new flow, opening
//! ```
//!
//! [`decide`] runs in the kernel on the loaded maps, in `weir explain` on the same maps through
//! system calls, and in tests on plain maps: [`Tables`] is all it knows of them. It has no clock
//! and no allocation; `now_ns` is the coarse monotonic clock (`CLOCK_MONOTONIC_COARSE`).
//!
//! *Flows* live in three tables. A first packet makes an entry in [`Store::Opening`], and replies
//! pass by it; a flow that goes on after the reply moves to [`Store::Established`]. So a flood of
//! flows that ask once, answered or not, evicts only its like. What is over leaves for
//! [`Store::Surplus`]. Each peer has a share of what is free ([`Limits`]): beyond it, what it opens
//! goes to [`Store::Surplus`], and what lasts stays where it is. That denies nothing, it only
//! protects less.
//! One key serves both directions ([`FlowKey`]). Nobody need collect garbage: an entry that is
//! older than its timeout counts as absent, and the tables evict what was unused longest
//! ([`crate::flows`]).
//!
//! *TCP*: only a SYN opens a flow. A pure ACK (with or without PSH) without flow, which policy
//! allows in its direction now, may pick one up, as after an eviction or an upgrade, but not more
//! than [`PICKED_UP_QUOTA`] in [`PICKED_UP_WINDOW_NS`]. A SYN against the direction of a flow, or
//! on a closed one, is judged as the first packet that it is.
//!
//! *Probes and mutants* prove the tests: [`Tables::probe`] records which branches a test took, and
//! [`Tables::MUTANT`] inverts one condition. Both vanish in the kernel.

mod flow;
mod policy;

use crate::abi::{
    Active, Addr, Direction, ESTABLISHED_FLOWS, Flow, FlowKey, Fragment, FragmentKey, Grant,
    Identity, OPENING_FLOWS, PageKey, PairKey, Ports, PortsKey, Quota, Share,
};
use crate::addresses::Owned;
use crate::packet::{Bytes, Packet, Part, What, deciding_bytes, parse};
use crate::reason::{Accepted, OUTCOMES, Reason};
use core::borrow::Borrow;

pub use policy::{allows_flow, allows_packet, is_routable};

pub(crate) use flow::key as flow_key;
pub use flow::{
    FRAGMENT_NS, FRESHEN_NS, ICMP_NS, OPENED_WINDOW_NS, OPENING_NS, OTHER_NS, PICKED_UP_NS,
    PICKED_UP_QUOTA, PICKED_UP_WINDOW_NS, STREAM_CLOSED_NS, STREAM_NS, STREAM_RESET_NS, UDP_NS,
    is_live,
};

/// What becomes of a packet: accepted or denied, and how or why. One number inside, the index of
/// its counter, because BPF functions return one register.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(PartialOrd, Ord, Hash))]
#[repr(transparent)]
pub struct Verdict(u32);

impl Verdict {
    const FIRST_DENY: u32 = Accepted::ALL.len() as u32;

    /// It passes.
    #[inline(always)]
    #[must_use]
    pub const fn accept(how: Accepted) -> Self {
        Self(how as u32)
    }

    /// It is dropped.
    #[inline(always)]
    #[must_use]
    pub const fn deny(why: Reason) -> Self {
        Self(Self::FIRST_DENY + why as u32)
    }

    /// Whether the packet passes.
    #[inline(always)]
    #[must_use]
    pub const fn passes(self) -> bool {
        self.0 < Self::FIRST_DENY
    }

    /// Index of its counter.
    #[inline(always)]
    #[must_use]
    pub const fn counter(self, direction: Direction) -> u32 {
        direction as u32 * OUTCOMES + self.0
    }

    /// The number inside, for functions that may return no more.
    #[inline(always)]
    #[must_use]
    pub const fn code(self) -> u32 {
        self.0
    }

    /// From [`Self::code`]. What no verdict has as its code is none that passes.
    #[inline(always)]
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        Self(code)
    }

    /// How it passes, if it does.
    #[must_use]
    pub fn accepted(self) -> Option<Accepted> {
        Accepted::ALL.get(self.0 as usize).copied()
    }

    /// Why it is dropped, if it is.
    #[must_use]
    pub fn reason(self) -> Option<Reason> {
        let index = self.0.checked_sub(Self::FIRST_DENY)?;
        Reason::ALL.get(index as usize).copied()
    }

    /// Its stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self.accepted(), self.reason()) {
            (Some(how), _) => how.name(),
            (None, Some(why)) => why.name(),
            (None, None) => "?",
        }
    }

    /// Every verdict, in the order of the counters of one direction.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..OUTCOMES).map(Self)
    }
}

#[cfg(not(target_arch = "bpf"))]
impl core::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let verb = if self.passes() { "accept" } else { "deny" };
        write!(f, "{verb} {}", self.name())
    }
}

/// Where a flow is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
#[repr(u8)]
pub enum Store {
    /// Not known to last.
    Opening,
    /// Went on after the reply.
    Established,
    /// Over, or of a peer that opens too many.
    Surplus,
}

/// What all peers together may have of the flow tables. One of them gets one more only while it has
/// fewer than are still free: alone it gets half of them, and *n* that take all that they get have
/// an *n + 1*th each, with as much left for everyone else.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Limits {
    /// Flows opened in [`Store::Opening`] within [`OPENED_WINDOW_NS`]; more go to
    /// [`Store::Surplus`].
    pub opened: u32,
    /// Flows in [`Store::Established`]; more stay where they are.
    pub established: u32,
}

impl Limits {
    /// What is opened fills no more than three quarters of the table before it times out there, and
    /// what lasts no more than half of the places that there are: so sets are hardly ever full.
    pub const USUAL: Self = Self {
        opened: OPENING_FLOWS / 4,
        established: ESTABLISHED_FLOWS,
    };
}

/// Where a packet's flow was looked for in vain.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
#[repr(u32)]
pub enum InVain {
    /// Nowhere yet.
    Nowhere,
    /// In [`Store::Established`].
    Established,
}

impl InVain {
    /// From its number.
    #[inline(always)]
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Established,
            _ => Self::Nowhere,
        }
    }
}

/// What policy says to the first packet of a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "bpf"), derive(Debug))]
pub struct Answer {
    /// Passing means no more than that a rule allows it.
    pub verdict: Verdict,
    /// The share of the peer, if it passes.
    pub share: u16,
}

impl Answer {
    /// Both in one register.
    #[inline(always)]
    #[must_use]
    pub const fn code(self) -> u64 {
        (self.share as u64) << 32 | self.verdict.code() as u64
    }

    /// From [`Self::code`].
    #[inline(always)]
    #[must_use]
    pub const fn from_code(code: u64) -> Self {
        Self {
            verdict: Verdict::from_code(code as u32),
            share: (code >> 32) as u16,
        }
    }
}

/// All that [`decide`] needs of the maps.
///
/// Look-ups return `None` for what is absent. Nothing here may allow anything by being absent.
pub trait Tables: Sized {
    /// A handle on a flow's entry, good until the next call that changes its table.
    type Entry: Copy;
    /// The line of an address.
    type Line: Borrow<Owned>;

    /// Which condition of the evaluator is inverted; 0 for none. Only tests set it.
    const MUTANT: u32 = 0;
    /// What one peer may have. Only tests have others.
    const LIMITS: Limits = Limits::USUAL;

    /// The active word, read once.
    fn active(&self) -> Active;
    /// Whether every policy table has this slot.
    fn complete(&self, slot: u32) -> bool;
    /// What is known of exactly this address.
    fn line(&self, slot: u32, addr: &Addr) -> Option<Self::Line>;
    /// This node's identity, if this is its address that lines speak of ([`Owned::near`]).
    fn home(&self, slot: u32, addr: &Addr) -> Option<Identity>;
    /// [`Self::line`] of `theirs`, if the slot is complete and `ours` is [`Self::home`]. In the
    /// kernel it may be there and not found.
    #[inline(always)]
    fn line_from_home(&self, slot: u32, ours: &Addr, theirs: &Addr) -> Option<Self::Line> {
        if !self.complete(slot) {
            return None;
        }
        self.home(slot, ours)?;
        self.line(slot, theirs)
    }
    /// Who has exactly this address.
    #[inline(always)]
    fn identity(&self, slot: u32, addr: &Addr) -> Option<Identity> {
        Some(self.line(slot, addr)?.borrow().identity())
    }
    /// Who has the longest prefix that contains this address.
    fn route(&self, slot: u32, addr: &Addr) -> Option<Identity>;
    /// What one class may initiate to another.
    fn pair(&self, slot: u32, key: &PairKey) -> Option<Grant>;
    /// One protocol of a port set, if not the one that the grant has.
    fn ports(&self, slot: u32, key: &PortsKey) -> Option<Ports>;
    /// One word (of eight) of a page.
    fn page_word(&self, slot: u32, key: &PageKey, word: u32) -> Option<u64>;

    /// Whether no table can have this packet's flow ([`crate::tracks`]). `false` where that is not
    /// known: then it is looked for.
    fn is_new(&self, packet: &Packet, direction: Direction) -> bool;
    /// Looks up a flow.
    fn find(&self, store: Store, key: &FlowKey) -> Option<Self::Entry>;
    /// Reads its state.
    fn load(&self, entry: Self::Entry) -> Flow;
    /// Writes its state.
    fn save(&self, entry: Self::Entry, flow: Flow);
    /// Writes a state in which nothing is new but when the flow was last seen.
    fn freshen(&self, entry: Self::Entry, flow: Flow) {
        self.save(entry, flow);
    }
    /// Adds or replaces a flow; whether that worked.
    fn insert(&self, store: Store, key: &FlowKey, flow: &Flow) -> bool;
    /// Forgets a flow.
    fn remove(&self, store: Store, key: &FlowKey);
    /// What a share is used for. `None` counts as used up.
    fn share(&self, number: u16) -> Option<Share>;
    /// Writes what was opened of it.
    fn set_opened(&self, number: u16, since_ns: u64, opened: u32);
    /// Writes what lasts of it.
    fn set_established(&self, number: u16, established: u32);

    /// Looks up a fragmented datagram.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;
    /// Remembers a fragmented datagram.
    fn keep_fragment(&self, key: &FragmentKey, fragment: &Fragment);
    /// Takes one from the quota of picked-up flows, by [`take_quota`].
    fn take_picked_up(&self, now_ns: u64) -> bool;

    /// [`allows_flow`] on these tables. In the kernel a function that is verified on its own and
    /// takes no more than this, because the frames of all callers together have 512 bytes.
    #[inline(always)]
    fn allows(&self, key: &FlowKey, initiator: u32, slot: u32) -> Answer {
        allows_flow(self, key, initiator, slot)
    }

    /// Decides whatever is neither new nor simply the next packet of an established flow, by
    /// [`of_flow`], [`later_fragment`] and [`related`]. In the kernel functions that are verified
    /// on their own.
    #[inline(always)]
    fn at_length(
        &self,
        packet: &Packet,
        direction: Direction,
        now_ns: u64,
        in_vain: InVain,
    ) -> Verdict {
        match packet.tuple.what {
            What::LaterFragment => later_fragment(self, packet, direction, now_ns),
            What::Error => related(self, packet, direction, now_ns),
            What::Segment
            | What::Datagram
            | What::SctpInit
            | What::SctpOther
            | What::Request
            | What::Reply
            | What::OtherIcmp => of_flow(self, packet, direction, now_ns, in_vain),
        }
    }

    /// [`allows_packet`] on these tables. In the kernel a function that is verified on its own.
    #[inline(always)]
    fn allows_packet(&self, packet: &Packet, direction: Direction, slot: u32) -> Answer {
        allows_packet(self, packet, direction, slot)
    }

    /// [`begin`]. In the kernel a function that is verified on its own.
    #[inline(always)]
    fn begin(
        &self,
        packet: &Packet,
        direction: Direction,
        now_ns: u64,
        share: u16,
        picked_up: bool,
    ) -> Verdict {
        begin(self, packet, direction, now_ns, share, picked_up)
    }

    /// Told of every branch taken. Only tests listen.
    #[inline(always)]
    fn probe(&self, _branch: Branch) {}
}

/// Takes one from the quota, which starts afresh every [`PICKED_UP_WINDOW_NS`].
#[inline(always)]
pub fn take_quota(quota: &mut Quota, now_ns: u64) -> bool {
    if now_ns.wrapping_sub(quota.since_ns) >= PICKED_UP_WINDOW_NS {
        quota.since_ns = now_ns;
        quota.used = 0;
    }
    quota.used += 1;
    quota.used <= PICKED_UP_QUOTA
}

macro_rules! branches {
    ($($name:ident)*) => {
        /// The branches of [`decide`], for coverage in tests.
        #[derive(Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(not(target_arch = "bpf"), derive(Debug, PartialOrd, Ord))]
        #[allow(missing_docs, reason = "each name is that of the place that it marks")]
        #[repr(u8)]
        pub enum Branch { $($name,)* }

        impl Branch {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

branches! {
    NothingActive New Hit HitRefreshed HitNeedsMore FlagsInvalid
    LaterUnknown LaterExpired LaterOverlap LaterFlowGone LaterDenied LaterPasses
    ErrorUnreadable ErrorNotToSender ErrorNoFlow ErrorAgainstOpening ErrorRevoked ErrorSpoofed
    ErrorPasses
    FlowNone FlowExpired FlowInOpening FlowInEstablished FlowInSurplus
    SynReopens SynAgainst EpochOld EpochGood EpochRevoked EpochTableMissing
    Promoted PromotionFailed ShareSpent Retired RetirementFailed Refreshed NotRefreshed
    FinOfInitiator FinOfResponder ResetSeen
    TimeoutOpening TimeoutPickedUp TimeoutStream TimeoutClosed TimeoutReset TimeoutUdp TimeoutIcmp
    TimeoutOther
    OpensSyn OpensAck OpensNot SctpOpens SctpOpensNot AsksIcmp AnswersNobody IcmpOther OpensDatagram
    QuotaSpent OpensTooMany TableFull FormerForgotten FirstPasses PickedUpPasses FragmentKept
    TablesMissing MartianV4 MulticastV4 LinkLocalV4 MulticastV6 LinkLocalV6 AddressFine
    OwnerOfRoute OwnerNobody
    IngressFromNobody IngressFromSelf EgressFromOther IngressElsewhere EgressElsewhere SidesFine
    LineSilent LineEverything LineNothing LinePorts LineOtherProtocol
    ClassZero PairNone PairEverything ProtocolOwnEntry ProtocolAnyEntry ProtocolNone
    PortsOfGrant NoMorePorts
    PortsAll PortsInline PortsPaged PortsKindUnknown PortIn PortOut PageMissing
}

/// `condition`, or its opposite where a test planted the mutant `id`.
#[inline(always)]
fn holds<T: Tables>(id: u32, condition: bool) -> bool {
    if T::MUTANT == id {
        !condition
    } else {
        condition
    }
}

/// Which packet is decided: in which direction, when, and under which active word.
#[derive(Clone, Copy)]
struct At {
    now_ns: u64,
    active: Active,
    direction: Direction,
}

/// Reads a packet into `packet` and decides.
#[inline(always)]
pub fn judge<T: Tables, B: Bytes>(
    tables: &T,
    bytes: &B,
    packet: &mut Packet,
    direction: Direction,
    now_ns: u64,
) -> Verdict {
    let read = parse(bytes, packet);
    if read.passes() {
        decide(tables, packet, direction, now_ns)
    } else {
        read
    }
}

/// Decides what becomes of a packet, and keeps the state of its flow.
#[inline(always)]
pub fn decide<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    now_ns: u64,
) -> Verdict {
    let Some(at) = now(tables, direction, now_ns) else {
        return Verdict::deny(Reason::NoPolicy);
    };
    if tables.is_new(packet, direction) {
        tables.probe(Branch::New);
        return of_new(tables, packet, &at);
    }
    match flow::hit(tables, packet, &at) {
        Ok(()) => Verdict::accept(Accepted::Established),
        Err(in_vain) => tables.at_length(packet, direction, now_ns, in_vain),
    }
}

/// Decides a packet that has the headers of its flow, which is in no table.
#[inline(always)]
fn of_new<T: Tables>(tables: &T, packet: &Packet, at: &At) -> Verdict {
    let picked_up = match may_begin(tables, packet) {
        Ok(picked_up) => picked_up,
        Err(reason) => return Verdict::deny(reason),
    };
    let answer = match policy::at_once(tables, packet, at) {
        Some(answer) => answer,
        None => tables.allows_packet(packet, at.direction, at.active.slot),
    };
    if !answer.verdict.passes() {
        return answer.verdict;
    }
    tables.begin(packet, at.direction, at.now_ns, answer.share, picked_up)
}

/// Whether a packet may begin a flow, as far as its headers are concerned; `true` if it would be
/// picked up.
#[inline(always)]
fn may_begin<T: Tables>(tables: &T, packet: &Packet) -> Result<bool, Reason> {
    let segment = packet.tuple.what == What::Segment;
    if segment && holds::<T>(2, !flow::flags_valid(packet.tcp_flags)) {
        tables.probe(Branch::FlagsInvalid);
        return Err(Reason::TcpFlags);
    }
    flow::opens(tables, packet)
}

/// Begins the flow of a packet that policy allows.
#[inline(always)]
pub fn begin<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    now_ns: u64,
    share: u16,
    picked_up: bool,
) -> Verdict {
    let Some(at) = now(tables, direction, now_ns) else {
        return Verdict::deny(Reason::NoPolicy);
    };
    let key = flow::key(direction, &packet.tuple);
    let verdict = flow::begin(tables, &key, &at, share, picked_up, None);
    if packet.part == Part::First && verdict.passes() {
        tables.probe(Branch::FragmentKept);
        keep_fragment(tables, packet, &key, now_ns);
    }
    verdict
}

/// Decides a packet that has the headers of its flow: known, or the first of one.
#[inline(always)]
pub fn of_flow<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    now_ns: u64,
    in_vain: InVain,
) -> Verdict {
    let Some(at) = now(tables, direction, now_ns) else {
        return Verdict::deny(Reason::NoPolicy);
    };
    let segment = packet.tuple.what == What::Segment;
    if segment && holds::<T>(2, !flow::flags_valid(packet.tcp_flags)) {
        tables.probe(Branch::FlagsInvalid);
        return Verdict::deny(Reason::TcpFlags);
    }
    let key = flow::key(direction, &packet.tuple);
    let verdict = match flow::known(tables, &key, packet, &at, in_vain) {
        Ok(verdict) => verdict,
        Err(former) => flow::first(tables, &key, packet, &at, former),
    };
    if packet.part == Part::First && verdict.passes() {
        tables.probe(Branch::FragmentKept);
        keep_fragment(tables, packet, &key, now_ns);
    }
    verdict
}

/// The key of the flow that a packet belongs to, if it has the headers of one.
#[inline(always)]
#[must_use]
pub fn key_of(packet: &Packet, direction: Direction) -> FlowKey {
    flow::key(direction, &packet.tuple)
}

/// What counts now, read once; `None` if no policy does.
#[inline(always)]
fn now<T: Tables>(tables: &T, direction: Direction, now_ns: u64) -> Option<At> {
    let active = tables.active();
    if holds::<T>(1, active.epoch == 0) {
        tables.probe(Branch::NothingActive);
        return None;
    }
    Some(At {
        now_ns,
        active,
        direction,
    })
}

#[inline(never)]
fn keep_fragment<T: Tables>(tables: &T, packet: &Packet, key: &FlowKey, now_ns: u64) {
    let fragment = Fragment {
        seen_ns: now_ns,
        local_port: key.local_port,
        remote_port: key.remote_port,
        protocol: key.protocol,
        zero: [0; 3],
    };
    tables.keep_fragment(&fragment_key(packet), &fragment);
}

#[inline(always)]
fn fragment_key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        src: packet.tuple.src,
        dst: packet.tuple.dst,
        id: packet.fragment_id,
        protocol: u32::from(packet.fragment_protocol),
    }
}

/// A later fragment goes with the flow of its first one, which said all that there was to say.
#[inline(always)]
pub fn later_fragment<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    now_ns: u64,
) -> Verdict {
    let Some(at) = &now(tables, direction, now_ns) else {
        return Verdict::deny(Reason::NoPolicy);
    };
    let Some(fragment) = tables.fragment(&fragment_key(packet)) else {
        tables.probe(Branch::LaterUnknown);
        return Verdict::deny(Reason::FragmentNoState);
    };
    let age_ns = at.now_ns.saturating_sub(fragment.seen_ns);
    if holds::<T>(3, age_ns > FRAGMENT_NS) {
        tables.probe(Branch::LaterExpired);
        return Verdict::deny(Reason::FragmentNoState);
    }
    if u32::from(packet.fragment_offset) < deciding_bytes(fragment.protocol) {
        tables.probe(Branch::LaterOverlap);
        return Verdict::deny(Reason::FragmentOverlap);
    }
    let (local, remote) = flow::sides(at.direction, &packet.tuple);
    let key = FlowKey::new(
        (local, fragment.local_port),
        (remote, fragment.remote_port),
        fragment.protocol,
    );
    let Some((store, entry, flow)) = flow::live(tables, &key, at.now_ns, InVain::Nowhere) else {
        tables.probe(Branch::LaterFlowGone);
        return Verdict::deny(Reason::FragmentNoState);
    };
    match flow::renew(tables, &key, store, entry, flow, at) {
        Ok(flow) => {
            tables.probe(Branch::LaterPasses);
            flow::freshen(tables, entry, flow, at);
            Verdict::accept(Accepted::Fragment)
        }
        Err(refused) => {
            tables.probe(Branch::LaterDenied);
            refused
        }
    }
}

/// An ICMP error passes if it embeds a packet that a live flow sent the other way.
#[inline(always)]
pub fn related<T: Tables>(
    tables: &T,
    packet: &Packet,
    direction: Direction,
    now_ns: u64,
) -> Verdict {
    let Some(at) = &now(tables, direction, now_ns) else {
        return Verdict::deny(Reason::NoPolicy);
    };
    let inner = &packet.inner;
    if inner.what == What::Error {
        tables.probe(Branch::ErrorUnreadable);
        return Verdict::deny(Reason::IcmpUnrelated);
    }
    // An error goes to whoever sent what it embeds.
    if holds::<T>(4, inner.src != packet.tuple.dst) {
        tables.probe(Branch::ErrorNotToSender);
        return Verdict::deny(Reason::IcmpUnrelated);
    }
    let key = flow::key(at.direction.flip(), inner);
    let Some((store, entry, flow)) = flow::live(tables, &key, at.now_ns, InVain::Nowhere) else {
        tables.probe(Branch::ErrorNoFlow);
        return Verdict::deny(Reason::IcmpUnrelated);
    };
    // While nobody has answered, only the initiator's packets can have met an error.
    let backwards = flow.initiator == at.direction as u8;
    if holds::<T>(5, !flow::is_answered(store, &flow) && backwards) {
        tables.probe(Branch::ErrorAgainstOpening);
        return Verdict::deny(Reason::IcmpUnrelated);
    }
    if let Err(refused) = flow::renew(tables, &key, store, entry, flow, at) {
        tables.probe(Branch::ErrorRevoked);
        return refused;
    }
    if let Err(reason) = policy::sender(tables, &packet.tuple.src, at) {
        tables.probe(Branch::ErrorSpoofed);
        return Verdict::deny(reason);
    }
    tables.probe(Branch::ErrorPasses);
    Verdict::accept(Accepted::Related)
}
