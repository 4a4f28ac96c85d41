//! The guard before WireGuard's UDP port, on the interfaces of the underlay: `driver` runs in a
//! network card's driver (XDP), `ethernet` and `bare` at ingress of any other interface (tc).
//!
//! All three find the datagram, ask [`ebpf::guard`], and count what it says. What is not for our port
//! goes on at once and is not counted.
//!
//! Kept within what an interpreter of Linux 6.1 runs: no callbacks, no kfuncs, no tail calls.
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

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray};
use aya_ebpf::helpers::generated::bpf_xdp_load_bytes;
use aya_ebpf::helpers::{bpf_ktime_get_coarse_ns, bpf_skb_load_bytes};
use aya_ebpf::macros::{btf_map, classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf::abi::Addr;
use ebpf::guard::{self, BUCKETS, Config, Frame, OWN_ADDRS, Outcome, PEER_PREFIXES};

#[btf_map(name = "CONFIG")]
static TOLD: Array<Config, 1> = Array::new();
#[btf_map]
static OWN: HashMap<Addr, u32, { OWN_ADDRS as usize }> = HashMap::new();
#[btf_map]
static PEERS: HashMap<Addr, u32, { PEER_PREFIXES as usize }> = HashMap::new();
#[btf_map]
static PREFIXES: LruHashMap<Addr, u64, { BUCKETS as usize }> = LruHashMap::new();
#[btf_map]
static TOTAL: Array<u64, 1> = Array::new();
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Outcome::ALL.len() }> = PerCpuArray::new();

/// The loaded maps.
struct Maps;

impl guard::Tables for Maps {
    /// The coarse clock: limits are about seconds, and it moves a hundred times in one.
    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: takes no argument and changes nothing.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn config(&self) -> Option<Config> {
        // SAFETY: a valid array element; the agent replaces it whole.
        TOLD.get_ptr(0).map(|config| unsafe { config.read() })
    }

    #[inline(always)]
    fn is_own(&self, addr: &Addr) -> bool {
        // SAFETY: nothing of the value is read.
        unsafe { OWN.get(addr) }.is_some()
    }

    #[inline(always)]
    fn has_peer(&self, prefix: &Addr) -> bool {
        // SAFETY: nothing of the value is read.
        unsafe { PEERS.get(prefix) }.is_some()
    }

    #[inline(always)]
    fn paid(&self, prefix: &Addr) -> Option<u64> {
        // SAFETY: a word of a preallocated map: always readable. If it meanwhile belongs to another
        // prefix, one initiation is judged by that one's account.
        unsafe { PREFIXES.get(prefix).copied() }
    }

    #[inline(always)]
    fn pay(&self, prefix: &Addr, until_ns: u64) {
        match PREFIXES.get_ptr_mut(prefix) {
            // SAFETY: as for `paid`; one word is written.
            Some(paid) => unsafe { paid.write_volatile(until_ns) },
            // Without it this prefix is not limited, but all together are.
            None => drop(PREFIXES.insert(prefix, &until_ns, 0)),
        }
    }

    #[inline(always)]
    fn all_paid(&self) -> Option<u64> {
        // SAFETY: a valid array element.
        TOTAL.get_ptr(0).map(|paid| unsafe { paid.read_volatile() })
    }

    #[inline(always)]
    fn pay_all(&self, until_ns: u64) {
        if let Some(paid) = TOTAL.get_ptr_mut(0) {
            // SAFETY: a valid array element; one word is written.
            unsafe { paid.write_volatile(until_ns) }
        }
    }
}

/// The bytes at `start` of a linear part that ends at `end`.
#[inline(always)]
fn in_place<const N: usize>(start: usize, end: usize) -> Option<[u32; N]> {
    if start + 4 * N > end {
        return None;
    }
    // SAFETY: checked against the end, and unaligned reads are fine.
    Some(unsafe { (start as *const [u32; N]).read_unaligned() })
}

/// A frame in the driver's hands.
struct Received {
    md: *mut xdp_md,
}

impl Frame for Received {
    #[inline(always)]
    fn near<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: the context is valid. Volatile, so that the two pointers are loaded where they
        // are compared, as the verifier wants it.
        let (data, end) = unsafe {
            (
                (&raw const (*self.md).data).read_volatile() as usize,
                (&raw const (*self.md).data_end).read_volatile() as usize,
            )
        };
        in_place(data + offset as usize, end).or_else(|| self.far(offset))
    }

    #[inline(always)]
    fn far<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0_u32; N];
        // SAFETY: the context is valid, and `words` has room for `4 * N` bytes.
        let failed =
            unsafe { bpf_xdp_load_bytes(self.md, offset, words.as_mut_ptr().cast(), 4 * N as u32) };
        (failed == 0).then_some(words)
    }

    #[inline(always)]
    fn segments(&self) -> Option<(u32, u32)> {
        // A driver puts nothing together before this.
        None
    }
}

/// A frame in the stack's hands.
struct Buffered {
    skb: *mut __sk_buff,
}

impl Frame for Buffered {
    #[inline(always)]
    fn near<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        // SAFETY: as for a received frame.
        let (data, end) = unsafe {
            (
                (&raw const (*self.skb).data).read_volatile() as usize,
                (&raw const (*self.skb).data_end).read_volatile() as usize,
            )
        };
        in_place(data + offset as usize, end).or_else(|| self.far(offset))
    }

    #[inline(always)]
    fn far<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = [0_u32; N];
        // SAFETY: the context is valid, and `words` has room for `4 * N` bytes.
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
    fn segments(&self) -> Option<(u32, u32)> {
        // SAFETY: the context is valid.
        let (bytes, count) = unsafe { ((*self.skb).gso_size, (*self.skb).gso_segs) };
        (bytes != 0).then_some((bytes, count.max(1)))
    }
}

/// Counts an outcome; whether the packet goes on.
#[inline(always)]
fn passes(outcome: Option<Outcome>) -> bool {
    let Some(outcome) = outcome else {
        return true;
    };
    if let Some(counter) = COUNTERS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's element. An interrupt in between costs a count at most.
        unsafe { *counter += 1 };
    }
    outcome.passes()
}

/// In a network card's driver.
#[xdp(frags)]
pub fn driver(ctx: XdpContext) -> u32 {
    if passes(guard::judge_ethernet(&Maps, &Received { md: ctx.ctx })) {
        xdp_action::XDP_PASS
    } else {
        xdp_action::XDP_DROP
    }
}

/// At ingress of an interface with Ethernet headers.
#[classifier]
pub fn ethernet(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is valid.
    let (tagged, tag) = unsafe { ((*skb).vlan_present, (*skb).vlan_tci) };
    if tagged != 0 && tag & 0x0fff != 0 {
        // A frame of a VLAN whose tag the kernel has taken off already.
        return TC_ACT_UNSPEC;
    }
    verdict(guard::judge_ethernet(&Maps, &Buffered { skb }))
}

/// At ingress of an interface whose packets begin with the IP header.
#[classifier]
pub fn bare(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    verdict(guard::judge_bare(&Maps, &Buffered { skb }))
}

#[inline(always)]
fn verdict(outcome: Option<Outcome>) -> i32 {
    if passes(outcome) {
        TC_ACT_UNSPEC
    } else {
        TC_ACT_SHOT
    }
}

/// BPF has no panics: the verifier refuses what could.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
