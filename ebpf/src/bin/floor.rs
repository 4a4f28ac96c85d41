//! What a filter with state costs at least: for the bench alone, never part of an agent.
//!
//! It does for one kind of packet (IPv4 without options, UDP) what weir's programs promise for all,
//! with the kernel's own tables and the smallest keys that could do: one look-up for the flow,
//! because a filter that knows flows has to look; one for the peer's address; one for what may be
//! initiated to it; a flow that begins is written, and a refused packet is counted. No family, no
//! fragment, no direction, no time, no epoch, no share, no event, no second policy.
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
use aya_ebpf::btf_maps::{HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;

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

const IPV4_WITHOUT_OPTIONS: u32 = 0x45;
const UDP: u32 = 17;

#[inline(always)]
fn decide(ctx: &TcContext) -> Option<()> {
    let start = ctx.data();
    if start + 24 > ctx.data_end() {
        return None;
    }
    // SAFETY: so many bytes are there, and unaligned reads are fine.
    let words = unsafe { (start as *const [u32; 6]).read_unaligned() };
    let [first, _, third, src, dst, ports] = words;
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
