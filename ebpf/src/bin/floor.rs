//! What a filter costs at least: for the bench alone, never part of an agent.
//!
//! Two programs, for one kind of packet (IPv4 without options, UDP).
//!
//! `floor` does what weir's programs promise, with the kernel's own tables and the smallest keys
//! that could do: one look-up for the flow, because a filter that knows flows has to look; one for
//! the peer's address; one for what may be initiated to it; a flow that begins is written, and a
//! refused packet is counted. No family, no fragment, no direction, no time, no epoch, no share, no
//! event, no second policy.
//!
//! `one_line` is less than any filter: it knows no flows, and takes for granted that the packet is
//! such a one and that this node sent it. It reads one line of a table like weir's
//! ([`ebpf::addresses`]), and what that says of the peer's port; a refused packet is not even
//! counted. To find the line without a look-up before it, the peers' addresses are consecutive
//! numbers, which a product spreads over the table without a collision. What it costs beside an
//! empty program is the wait for the line.
#![no_std]
#![no_main]
#![allow(
    missing_docs,
    reason = "the attribute macros of aya make public items of their own"
)]
#![allow(
    unsafe_code,
    reason = "packets and map values are reached through raw pointers; see each SAFETY"
)]

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use ebpf::addresses::{LINE_BYTES, Owned, SLAB_BYTES, SLABS, Slab};

/// Flows, by both addresses and both ports.
#[btf_map]
static FLOWS: LruHashMap<[u32; 3], u32, 65_536> = LruHashMap::new();
/// The number of a peer, by its address.
#[btf_map]
static PEERS: HashMap<u32, u32, 1> = HashMap::new();
/// The port of a peer that may be reached, by its number.
#[btf_map]
static GRANTS: HashMap<u32, u32, 1> = HashMap::new();
/// Packets that were refused.
#[btf_map]
static REFUSED: PerCpuArray<u64, 1> = PerCpuArray::new();
/// Lines, of `one_line`.
#[btf_map]
static SLABS_OF_LINES: ArrayOfMaps<Array<Slab, 1>, { SLABS as usize }> = ArrayOfMaps::new();
/// How a line is found: a factor, what is added to the product, slabs, lines of a slab (told, so
/// that the compiler keeps the comparison that the verifier asks for), and where the first begins.
#[btf_map]
static WAY: Array<[u64; 5], 1> = Array::new();
/// Packets that `one_line` let pass.
#[btf_map]
static PASSED: PerCpuArray<u64, 1> = PerCpuArray::new();

const IPV4_WITHOUT_OPTIONS: u32 = 0x45;
const UDP: u32 = 17;

#[inline(always)]
fn decide(ctx: &TcContext) -> Option<()> {
    let [first, _, third, src, dst, ports] = words(ctx)?;
    if first & 0xff != IPV4_WITHOUT_OPTIONS || third >> 8 & 0xff != UDP {
        return None;
    }
    let key = [src, dst, ports];
    if FLOWS.get_ptr(&key).is_some() {
        return Some(());
    }
    // SAFETY: nobody writes these while packets are decided.
    let peer = unsafe { PEERS.get(&dst) }?;
    // SAFETY: as above.
    let port = unsafe { GRANTS.get(peer) }?;
    if *port != u32::from_be(ports) & 0xffff {
        return None;
    }
    FLOWS.insert(&key, &0, 0).ok()
}

/// The first words of the packet, to the ports.
#[inline(always)]
fn words(ctx: &TcContext) -> Option<[u32; 6]> {
    let start = ctx.data();
    if start + 24 > ctx.data_end() {
        return None;
    }
    // SAFETY: so many bytes are there, and unaligned reads are fine.
    Some(unsafe { (start as *const [u32; 6]).read_unaligned() })
}

/// The line of an address.
#[inline(always)]
fn line(dst: u32) -> Option<&'static Owned> {
    let way = WAY.get_ptr(0)?;
    // SAFETY: nobody writes it while packets are decided.
    let [factor, offset, slabs, lines, shift] = unsafe { *way };
    let hash = u64::from(u32::from_be(dst))
        .wrapping_mul(factor)
        .wrapping_add(offset);
    // The whole part is the slab, what is behind the point the line in it.
    let scaled = (hash >> 32) * (slabs & 0xffff_ffff);
    let within = (scaled & 0xffff_ffff) * (lines & 0xffff) >> 32;
    let at = within as usize * LINE_BYTES + (shift as usize & (LINE_BYTES - 8));
    let slab = SLABS_OF_LINES.get((scaled >> 32) as u32)?.get_ptr(0)?;
    if at > SLAB_BYTES - LINE_BYTES {
        return None;
    }
    // SAFETY: the slab has a line's bytes there, and nobody writes them while packets are decided.
    Some(unsafe { &*slab.cast::<u8>().add(at).cast::<Owned>() })
}

/// Whether the line of the peer says that this port may be reached.
#[inline(always)]
fn by_one_line(ctx: &TcContext) -> Option<()> {
    let [.., dst, ports] = words(ctx)?;
    let line = line(dst)?;
    let [_, egress] = &line.ranges;
    let [[first, last], ..] = egress;
    let port = u16::from_be((ports >> 16) as u16);
    (line.addr.words[3] == dst && *first <= port && port <= *last).then_some(())
}

#[classifier]
pub fn one_line(ctx: TcContext) -> i32 {
    if by_one_line(&ctx).is_none() {
        return TC_ACT_SHOT;
    }
    if let Some(passed) = PASSED.get_ptr_mut(0) {
        // SAFETY: this CPU's element, which nobody else touches meanwhile.
        unsafe { *passed += 1 }
    }
    TC_ACT_UNSPEC
}

#[classifier]
pub fn floor(ctx: TcContext) -> i32 {
    if decide(&ctx).is_some() {
        return TC_ACT_UNSPEC;
    }
    if let Some(refused) = REFUSED.get_ptr_mut(0) {
        // SAFETY: this CPU's element, which nobody else touches meanwhile.
        unsafe { *refused += 1 }
    }
    TC_ACT_SHOT
}

/// BPF has no panics: the verifier refuses what could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
