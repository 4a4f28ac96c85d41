//! The two classifiers on a node's WireGuard device: `ingress` for what peers send, `egress` for
//! what goes to them.
//!
//! Both read the IP header at offset 0, ask [`ebpf::verdict::decide`], count the outcome, and drop
//! what is not accepted; of some drops they tell ([`ebpf::event`]). An accepted packet goes on to whatever else is attached (`TCX_NEXT`, which
//! clsact calls `TC_ACT_UNSPEC`): weir adds a refusal to the host's own filters, never a permission.
//!
//! Kept within what an interpreter of Linux 6.1 runs: no callbacks, no kfuncs, no tail calls.
//! Headers in the skb's linear part are read in place; everything else through
//! `bpf_skb_load_bytes`, which reads fragments too and leaves the skb as it is.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    reason = "the attribute macros of aya make public items of their own"
)]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(
    internal_features,
    reason = "the target is said to have no atomic operations; Linux 5.12 and later have this one"
)]
#![allow(
    unsafe_code,
    reason = "packets and map values are reached through raw pointers; see each SAFETY"
)]

#[path = "acl/answer.rs"]
mod answer;
#[path = "acl/flows.rs"]
mod flows;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::{
    BPF_F_INNER_MAP, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP, TC_ACT_SHOT,
    TC_ACT_UNSPEC,
};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_skb_load_bytes};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use core::intrinsics::{AtomicOrdering, atomic_or};
use ebpf::abi::{
    Active, Addr, Allowance, Counter, Direction, Dropped, EVENT_BYTES, FRAGMENTED_DATAGRAMS, Flow,
    FlowKey, Fragment, FragmentKey, Grant, Identity, Page, PageKey, PairKey, Ports, PortsKey,
    Quota, SHARES, SLOTS, Share, Told,
};
use ebpf::addresses::{Book, LINE_BYTES, Owned, Place, SLAB_BYTES, SLABS, Slab};
use ebpf::event;
use ebpf::lines::{self, GrantedLine, Shape};
use ebpf::packet::{Bytes, Packet, What, general, parse};
use ebpf::reason::{OUTCOMES, Reason};
use ebpf::tracks;
use ebpf::verdict::{self, Answer, InVain, Store, Tables, Verdict, decide, take_quota};

const SLOTS_LEN: usize = SLOTS as usize;
const SLABS_LEN: usize = (SLOTS * SLABS) as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
/// Lines begin where the processor's do, and slots have different numbers of them.
const LINES: usize = MMAPABLE | BPF_F_INNER_MAP as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
/// Inner maps are created by user space with the size that the policy needs.
const TEMPLATE: usize = 1;

type Slotted<M> = ArrayOfMaps<M, SLOTS_LEN>;

#[btf_map]
static ACTIVE: Array<u64, 1, MMAPABLE> = Array::new();
/// How tables are looked into, by slot.
#[btf_map]
static SHAPES: Array<Shape, SLOTS_LEN> = Array::new();
#[btf_map]
static IDENTITIES: ArrayOfMaps<Array<Slab, 1>, SLABS_LEN> = ArrayOfMaps::new();
#[btf_map]
static PREFIXES: Slotted<LpmTrie<Addr, Identity, TEMPLATE, NO_PREALLOC>> = ArrayOfMaps::new();
#[btf_map]
static PAIRS: Slotted<Array<GrantedLine, TEMPLATE, LINES>> = ArrayOfMaps::new();
#[btf_map]
static PORTS: Slotted<HashMap<PortsKey, Ports, TEMPLATE>> = ArrayOfMaps::new();
#[btf_map]
static PAGES: Slotted<HashMap<PageKey, Page, TEMPLATE>> = ArrayOfMaps::new();
/// Which flows cannot be there: see [`ebpf::tracks`].
#[btf_map]
static TRACKS: Array<u64, { tracks::ALL_WORDS as usize }, MMAPABLE> = Array::new();
#[btf_map(name = "SHARES")]
static SHARE_TABLE: Array<Share, { SHARES as usize }> = Array::new();
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { FRAGMENTED_DATAGRAMS as usize }> =
    LruHashMap::new();
#[btf_map]
static QUOTA: Array<Quota, 1> = Array::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, { 2 * OUTCOMES as usize }> = PerCpuArray::new();
/// What is told of dropped packets: see [`ebpf::event`].
#[btf_map]
static EVENTS: RingBuf<Dropped, { EVENT_BYTES as usize }> = RingBuf::new();
/// Events of this CPU that found the buffer full.
#[btf_map]
static LOST: PerCpuArray<u64, 1> = PerCpuArray::new();
/// The kinds of packets that this CPU told of lately, by kind.
#[btf_map]
static TOLD: PerCpuArray<Told, { event::KINDS as usize }> = PerCpuArray::new();
/// What is at hand. One a CPU is enough: bottom halves are off while a classifier runs.
#[btf_map]
static HAND: PerCpuArray<Hand, 1> = PerCpuArray::new();

/// What every packet needs, behind one look-up.
#[repr(C)]
struct Hand {
    /// The packet. Not on the stack, because it is large and because the verifier would follow
    /// every value that it may have.
    packet: Packet,
    clock: Clock,
    /// What this CPU may still tell, by counter.
    allowances: [Allowance; ALLOWANCES],
}

/// A power of two, so that a mask bounds the number of one.
const ALLOWANCES: usize = (2 * OUTCOMES as usize).next_power_of_two();

impl Hand {
    #[inline(always)]
    fn allowance(&mut self, counter: u32) -> &mut Allowance {
        let index = counter as usize & (ALLOWANCES - 1);
        // SAFETY: the mask bounds it.
        unsafe { self.allowances.get_unchecked_mut(index) }
    }
}

/// What the coarse clock said, and in which tick.
#[repr(C)]
struct Clock {
    tick: u64,
    now_ns: u64,
}

/// The coarse monotonic clock. It moves once a tick; the tick is one load, the clock three calls.
#[inline(always)]
fn now_ns(clock: &mut Clock) -> u64 {
    // SAFETY: takes no argument and changes nothing.
    let tick = unsafe { bpf_jiffies64() };
    if clock.tick != tick {
        // SAFETY: as above.
        clock.now_ns = unsafe { bpf_ktime_get_coarse_ns() };
        clock.tick = tick;
    }
    clock.now_ns
}

/// The loaded maps.
struct Maps;

/// Leaves a flow's track in both halves.
#[inline(always)]
fn leave_tracks(place: u32) {
    let bit = tracks::bit(place);
    for half in 0..2 {
        if let Some(word) = TRACKS.get_ptr_mut(tracks::word_of(half, place)) {
            // SAFETY: a valid, aligned array element, which is only ever changed in one step. Where
            // the track is there already, the line stays in every CPU's cache.
            unsafe {
                if word.read_volatile() & bit == 0 {
                    atomic_or::<u64, u64, { AtomicOrdering::Relaxed }>(word, bit);
                }
            }
        }
    }
}

/// A place of the table of addresses, with so many bytes after it.
#[inline(always)]
fn in_slab<const BYTES: usize>(slot: u32, place: Place) -> Option<*const u8> {
    let number = slot * SLABS + (place.slab & (SLABS - 1));
    let slab = IDENTITIES.get(number)?.get_ptr(0)?;
    let at = place.at as usize;
    // SAFETY: the slab has so many bytes there.
    (at <= SLAB_BYTES - BYTES).then(|| unsafe { slab.cast::<u8>().add(at) })
}

#[inline(always)]
fn line_at(slot: u32, place: Place) -> Option<&'static Owned> {
    let line = in_slab::<LINE_BYTES>(slot, place)?;
    // SAFETY: a line of a slab; entries of an active slot are added and never changed or removed.
    Some(unsafe { &*line.cast::<Owned>() })
}

/// The pilot of an address of this hash. Volatile, so that it is on its way before what follows.
#[inline(always)]
fn pilot_of(slot: u32, book: &Book, hash: u64) -> Option<u8> {
    let pilot = in_slab::<1>(slot, Book::pilot(book.bucket(hash)))?;
    // SAFETY: a byte of a slab.
    Some(unsafe { pilot.read_volatile() })
}

/// Whether two addresses are the same. The second is read anew: kept since it was hashed, it would
/// take room of the stack.
#[inline(always)]
fn is_same(one: &Addr, other: &Addr) -> bool {
    let mut addr: *const Addr = other;
    // SAFETY: leaves the pointer as it is, which the compiler does not know. It is an instruction,
    // because the kernel takes no two lines of source for one.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) addr, options(pure, nomem, nostack)) };
    let one: *const Addr = one;
    // SAFETY: two valid addresses; unaligned reads are fine.
    let [one, two] = unsafe { one.cast::<[u64; 2]>().read_unaligned() };
    // SAFETY: as above.
    let [three, four] = unsafe { addr.cast::<[u64; 2]>().read_unaligned() };
    one == three && two == four
}

/// This node's identity, if this is its first address of the family.
#[inline(always)]
fn home_of(shape: &Shape, addr: &Addr) -> Option<Identity> {
    let [v6, v4] = &shape.own;
    let own = if addr.is_v4() { v4 } else { v6 };
    is_same(&own.addr, addr).then_some(own.identity)
}

impl Tables for Maps {
    type Entry = flows::Found;
    type Line = &'static Owned;

    #[inline(always)]
    fn active(&self) -> Active {
        match ACTIVE.get_ptr(0) {
            // SAFETY: a valid, aligned array element; volatile, because user space stores to it
            // through a mapping and one packet must see one value.
            Some(word) => Active::from_word(unsafe { word.read_volatile() }),
            None => Active::from_word(0),
        }
    }

    #[inline(always)]
    fn complete(&self, slot: u32) -> bool {
        // Written when all of them are there. What is missing nevertheless is not found.
        SHAPES.get(slot).is_some_and(|shape| shape.pairs.lines != 0)
    }

    #[inline(always)]
    fn line(&self, slot: u32, addr: &Addr) -> Option<&'static Owned> {
        let book = &SHAPES.get(slot)?.book;
        let hash = book.hash(addr);
        let line = line_at(slot, book.line(hash, pilot_of(slot, book, hash)?))?;
        if is_same(&line.addr, addr) {
            return Some(line);
        }
        let line = line_at(slot, book.newcomer(hash))?;
        is_same(&line.addr, addr).then_some(line)
    }

    #[inline(always)]
    fn line_from_home(&self, slot: u32, ours: &Addr, theirs: &Addr) -> Option<&'static Owned> {
        let shape = SHAPES.get(slot)?;
        if shape.pairs.lines == 0 {
            return None;
        }
        let hash = shape.book.hash(theirs);
        let pilot = pilot_of(slot, &shape.book, hash)?;
        home_of(shape, ours)?;
        let line = line_at(slot, shape.book.line(hash, pilot))?;
        is_same(&line.addr, theirs).then_some(line)
    }

    #[inline(always)]
    fn home(&self, slot: u32, addr: &Addr) -> Option<Identity> {
        home_of(SHAPES.get(slot)?, addr)
    }

    #[inline(always)]
    fn route(&self, slot: u32, addr: &Addr) -> Option<Identity> {
        PREFIXES.get(slot)?.get(&Key::new(128, *addr)).copied()
    }

    #[inline(always)]
    fn pair(&self, slot: u32, key: &PairKey) -> Option<Grant> {
        let plan = SHAPES.get(slot)?.pairs;
        let table = PAIRS.get(slot)?;
        let pair = lines::pair_word(key);
        let [one, two] = lines::places(lines::hash_of_pair(pair, plan.seed), plan.lines);
        match table.get(one)?.find(pair) {
            Some(grant) => Some(*grant),
            None => table.get(two)?.find(pair).copied(),
        }
    }

    #[inline(always)]
    fn ports(&self, slot: u32, key: &PortsKey) -> Option<Ports> {
        // SAFETY: entries of an active slot are added and never changed or removed.
        unsafe { PORTS.get(slot)?.get(key).copied() }
    }

    #[inline(always)]
    fn page_word(&self, slot: u32, key: &PageKey, word: u32) -> Option<u64> {
        // SAFETY: as for ports.
        let page = unsafe { PAGES.get(slot)?.get(key)? };
        page.words.get((word & 7) as usize).copied()
    }

    #[inline(always)]
    fn is_new(&self, packet: &Packet, direction: Direction) -> bool {
        if !tracks::is_for(packet) {
            return false;
        }
        let Some(half) = TRACKS.get_ptr(tracks::HALF) else {
            return false;
        };
        let place = tracks::of_packet(packet, direction);
        // SAFETY: valid, aligned array elements; volatile, because others write them.
        unsafe {
            match TRACKS.get_ptr(tracks::word_of(half.read_volatile() as u32, place)) {
                Some(word) => word.read_volatile() & tracks::bit(place) == 0,
                None => false,
            }
        }
    }

    #[inline(always)]
    fn find(&self, store: Store, key: &FlowKey) -> Option<Self::Entry> {
        flows::find(store, key)
    }

    #[inline(always)]
    fn load(&self, entry: Self::Entry) -> Flow {
        entry.load()
    }

    #[inline(always)]
    fn freshen(&self, entry: Self::Entry, flow: Flow) {
        entry.freshen(flow.last_seen_ns);
    }

    #[inline(always)]
    fn save(&self, entry: Self::Entry, flow: Flow) {
        entry.save(flow);
    }

    #[inline(always)]
    fn insert(&self, store: Store, key: &FlowKey, flow: &Flow) -> bool {
        // Before it is there: whoever finds no track can find no flow.
        leave_tracks(tracks::of_key(key));
        flows::insert(store, key, flow)
    }

    #[inline(always)]
    fn remove(&self, store: Store, key: &FlowKey) {
        flows::remove(store, key);
    }

    #[inline(always)]
    fn share(&self, number: u16) -> Option<Share> {
        let share = SHARE_TABLE.get_ptr(u32::from(number))?;
        // SAFETY: a valid array element; as for `take_picked_up`.
        Some(unsafe { share.read() })
    }

    #[inline(always)]
    fn set_opened(&self, number: u16, since_ns: u64, opened: u32) {
        if let Some(share) = SHARE_TABLE.get_ptr_mut(u32::from(number)) {
            // SAFETY: as for `share`.
            unsafe {
                (*share).since_ns = since_ns;
                (*share).opened = opened;
            }
        }
    }

    #[inline(always)]
    fn set_established(&self, number: u16, established: u32) {
        if let Some(share) = SHARE_TABLE.get_ptr_mut(u32::from(number)) {
            // SAFETY: as for `share`.
            unsafe { (*share).established = established }
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // SAFETY: a value of a preallocated map: always readable. It may meanwhile be another
        // datagram's; then one fragment passes on the account of one that policy allowed.
        unsafe { FRAGMENTS.get(key).copied() }
    }

    #[inline(always)]
    fn keep_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        // Without it the later fragments are dropped, which is the safe side.
        let _ = FRAGMENTS.insert(key, fragment, 0);
    }

    #[inline(always)]
    fn allows(&self, key: &FlowKey, initiator: u32, slot: u32) -> Answer {
        Answer::from_code(acl_allows(key, initiator, slot))
    }

    #[inline(always)]
    fn at_length(
        &self,
        packet: &Packet,
        direction: Direction,
        now_ns: u64,
        in_vain: InVain,
    ) -> Verdict {
        // Which find the packet where it is.
        let way = direction as u32;
        match packet.tuple.what {
            What::LaterFragment => Verdict::from_code(acl_later_fragment(way, now_ns)),
            What::Error => Verdict::from_code(acl_related(way, now_ns)),
            What::Segment
            | What::Datagram
            | What::SctpInit
            | What::SctpOther
            | What::Request
            | What::Reply
            | What::OtherIcmp => Verdict::from_code(acl_of_flow(way, now_ns, in_vain as u32)),
        }
    }

    #[inline(always)]
    fn allows_packet(&self, _packet: &Packet, direction: Direction, slot: u32) -> Answer {
        Answer::from_code(acl_allows_packet(direction as u32, slot))
    }

    #[inline(always)]
    fn begin(
        &self,
        _packet: &Packet,
        direction: Direction,
        now_ns: u64,
        share: u16,
        picked_up: bool,
    ) -> Verdict {
        let way = direction as u32;
        Verdict::from_code(acl_begin(
            way,
            now_ns,
            u32::from(share),
            u32::from(picked_up),
        ))
    }

    #[inline(always)]
    fn take_picked_up(&self, now_ns: u64) -> bool {
        match QUOTA.get_ptr_mut(0) {
            // SAFETY: a valid array element. Two CPUs may lose a count to each other: the quota
            // bounds a rate, it does not keep accounts.
            Some(quota) => take_quota(unsafe { &mut *quota }, now_ns),
            None => false,
        }
    }
}

/// Policy's answer, as a global function: the verifier looks at it once, not once for every state
/// of every caller.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_allows(key: *const FlowKey, initiator: u32, slot: u32) -> u64 {
    if key.is_null() {
        let verdict = Verdict::deny(Reason::TableMissing);
        return Answer { verdict, share: 0 }.code();
    }
    // SAFETY: callers pass a whole key; the verifier checks that it is readable. No map is asked
    // with a pointer into it, which Linux 6.1 would not take.
    let key = unsafe { &*key };
    verdict::allows_flow(&Maps, key, initiator, slot).code()
}

/// The packet at hand.
#[inline(always)]
fn packet_at_hand() -> Option<&'static Packet> {
    // SAFETY: this CPU's element, which nobody else touches while a classifier runs.
    HAND.get_ptr(0).map(|hand| unsafe { &(*hand).packet })
}

#[inline(always)]
fn direction_of(number: u32) -> Direction {
    if number == Direction::Ingress as u32 {
        Direction::Ingress
    } else {
        Direction::Egress
    }
}

/// [`verdict::of_flow`], as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_of_flow(direction: u32, now_ns: u64, in_vain: u32) -> u32 {
    match packet_at_hand() {
        Some(packet) => verdict::of_flow(
            &Maps,
            packet,
            direction_of(direction),
            now_ns,
            InVain::from_number(in_vain),
        ),
        None => Verdict::deny(Reason::TableMissing),
    }
    .code()
}

/// [`verdict::allows_packet`], as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_allows_packet(direction: u32, slot: u32) -> u64 {
    match packet_at_hand() {
        Some(packet) => verdict::allows_packet(&Maps, packet, direction_of(direction), slot),
        None => Answer {
            verdict: Verdict::deny(Reason::TableMissing),
            share: 0,
        },
    }
    .code()
}

/// [`verdict::begin`], as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_begin(direction: u32, now_ns: u64, share: u32, picked_up: u32) -> u32 {
    let direction = direction_of(direction);
    match packet_at_hand() {
        Some(packet) => {
            let (share, picked_up) = (share as u16, picked_up != 0);
            verdict::begin(&Maps, packet, direction, now_ns, share, picked_up)
        }
        None => Verdict::deny(Reason::TableMissing),
    }
    .code()
}

/// [`verdict::later_fragment`], as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_later_fragment(direction: u32, now_ns: u64) -> u32 {
    match packet_at_hand() {
        Some(packet) => verdict::later_fragment(&Maps, packet, direction_of(direction), now_ns),
        None => Verdict::deny(Reason::TableMissing),
    }
    .code()
}

/// [`verdict::related`], as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_related(direction: u32, now_ns: u64) -> u32 {
    match packet_at_hand() {
        Some(packet) => verdict::related(&Maps, packet, direction_of(direction), now_ns),
        None => Verdict::deny(Reason::TableMissing),
    }
    .code()
}

/// The general reader, as a global function for the same reason.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_general(skb: *mut __sk_buff) -> u32 {
    match HAND.get_ptr_mut(0) {
        // SAFETY: this CPU's element, which nobody else touches meanwhile.
        Some(hand) => general(&ByCall { skb }, unsafe { &mut (*hand).packet }).code(),
        None => Verdict::deny(Reason::TableMissing).code(),
    }
}

/// The skb, read by helper call: any offset, linear or not.
#[derive(Clone, Copy)]
struct ByCall {
    skb: *mut __sk_buff,
}

impl Bytes for ByCall {
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the context is valid.
        unsafe { (*self.skb).len }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0_u32; N];
        // SAFETY: the context is valid, the buffer has 4 N bytes; the helper checks the offset.
        let failed = unsafe {
            bpf_skb_load_bytes(
                self.skb.cast(),
                offset,
                words.as_mut_ptr().cast(),
                4 * N as u32,
            )
        };
        (failed == 0).then_some(words)
    }

    #[inline(always)]
    fn general(&self, packet: &mut Packet) -> Verdict {
        general(self, packet)
    }
}

/// The linear part of the skb, read in place at offsets known when this is built.
struct InPlace {
    skb: *mut __sk_buff,
}

impl Bytes for InPlace {
    #[inline(always)]
    fn len(&self) -> u32 {
        ByCall { skb: self.skb }.len()
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: the context is valid. Volatile, so that the two pointers are loaded where they
        // are compared: kept across branches, the compiler computes with them as the verifier
        // forbids.
        let (data, end) = unsafe {
            (
                (&raw const (*self.skb).data).read_volatile() as usize,
                (&raw const (*self.skb).data_end).read_volatile() as usize,
            )
        };
        let start = data + offset as usize;
        if start + 4 * N > end {
            return None;
        }
        // SAFETY: checked against the end of the linear part, and unaligned reads are fine.
        Some(unsafe { (start as *const [u32; N]).read_unaligned() })
    }

    #[inline(always)]
    fn general(&self, _packet: &mut Packet) -> Verdict {
        // Which writes into the same place.
        Verdict::from_code(acl_general(self.skb))
    }
}

#[inline(always)]
fn classify(ctx: &TcContext, direction: Direction) -> i32 {
    let Some(hand) = HAND.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: this CPU's element, which nobody else touches meanwhile.
    let hand = unsafe { &mut *hand };
    let now_ns = now_ns(&mut hand.clock);
    let len = ctx.len();
    let bytes = InPlace { skb: ctx.skb.skb };
    let mut verdict = parse(&bytes, &mut hand.packet);
    let read = verdict.passes();
    if read {
        verdict = decide(&Maps, &hand.packet, direction, now_ns);
    }
    count(verdict.counter(direction), len);
    if verdict.passes() {
        return TC_ACT_UNSPEC;
    }
    if event::look(hand.allowance(verdict.counter(direction)), now_ns) {
        acl_tell(
            ctx.skb.skb,
            verdict.code(),
            direction as u32,
            u32::from(read),
            now_ns,
        );
    }
    match direction {
        Direction::Ingress => TC_ACT_SHOT,
        Direction::Egress => answer::refuse(ctx.skb.skb, verdict),
    }
}

/// Tells of a dropped packet, if it is its turn. A global function, because drops are rare and the
/// verifier has enough to follow without it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_tell(
    skb: *mut __sk_buff,
    code: u32,
    direction: u32,
    read: u32,
    now_ns: u64,
) -> u32 {
    let direction = if direction == Direction::Ingress as u32 {
        Direction::Ingress
    } else {
        Direction::Egress
    };
    let verdict = Verdict::from_code(code);
    let packet = packet_at_hand().filter(|_| read != 0);
    let (counter, window) = (verdict.counter(direction), event::window(now_ns));
    let kind = event::kind(counter, packet);
    let Some(told) = TOLD.get_ptr_mut(kind % event::KINDS) else {
        return 0;
    };
    // SAFETY: this CPU's element, which nobody else touches meanwhile.
    if !event::is_news(unsafe { &mut *told }, kind, window) {
        return 0;
    }
    let Some(hand) = HAND.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: as above.
    if !event::take(unsafe { (*hand).allowance(counter) }, window) {
        return 0;
    }
    let dropped = event::describe(&Maps, &ByCall { skb }, packet, verdict, direction, now_ns);
    // Full where nobody reads. The reader looks by itself: nothing here wakes it.
    let written = EVENTS.output(&dropped, u64::from(BPF_RB_NO_WAKEUP));
    if written.is_err()
        && let Some(lost) = LOST.get_ptr_mut(0)
    {
        // SAFETY: as above.
        unsafe { *lost += 1 };
    }
    1
}

#[inline(always)]
fn count(index: u32, len: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: this CPU's element; nothing else runs this program on this CPU meanwhile.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(len);
        }
    }
}

/// What peers send.
#[classifier]
pub fn ingress(ctx: TcContext) -> i32 {
    if answer::is_ours(ctx.skb.skb) {
        return TC_ACT_UNSPEC;
    }
    classify(&ctx, Direction::Ingress)
}

/// What goes to peers.
#[classifier]
pub fn egress(ctx: TcContext) -> i32 {
    classify(&ctx, Direction::Egress)
}

/// BPF has no panics: the verifier refuses what could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
