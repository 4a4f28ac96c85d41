//! Sends the answers of [`ebpf::refuse`], and lets them in again.
//!
//! On egress the refused packet itself becomes its answer, gets a mark, and is sent back into the
//! device that it was leaving by ([`send`]). On ingress a packet with that mark is let in, and the
//! mark taken off ([`is_ours`]). No packet from the network can carry it: WireGuard clears the mark
//! of what it decrypted (`wg_reset_packet` in drivers/net/wireguard/queueing.h), and nothing of the
//! host runs between that and our program, which is the first on the device. Besides, the mark is a
//! number that the agent draws at random; 0 means that nothing is answered.
//!
//! *From a packet to another one.* The helper made for control messages is `bpf_skb_change_tail`: it
//! makes the packet linear, its own, and no longer one of several segments. But a checksum that the
//! device was to complete (`CHECKSUM_PARTIAL`) stays promised, at a place inside the old packet, and
//! would be written into the answer when that is forwarded. No helper takes the promise back, except
//! that removing the bytes up to that place and then some more does (`skb_postpull_rcsum` in
//! include/linux/skbuff.h). So the answer is written into a packet that was made longer first and
//! then cut twice behind its IP header.

use aya_ebpf::bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_INVALIDATE_HASH, TC_ACT_SHOT};
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
    bpf_skb_store_bytes,
};
use aya_ebpf::macros::btf_map;
use ebpf::abi::{Counter, FlowKey, Quota};
use ebpf::refuse::{self, BUCKETS, Outcome, REFUSAL_WORDS, Refusal};
use ebpf::verdict::Verdict;

use super::{ByCall, Maps, packet_at_hand};

/// The mark of an answer; 0 while refusals are silent.
#[btf_map]
static MARK: Array<u32, 1> = Array::new();
/// What became of answers, by [`Outcome`].
#[btf_map]
static ANSWERS: PerCpuArray<Counter, { Outcome::ALL.len() }> = PerCpuArray::new();
/// Answers of the current window, by pair of addresses; the last one counts all.
#[btf_map]
static WINDOWS: PerCpuArray<Quota, { BUCKETS as usize + 1 }> = PerCpuArray::new();
/// A key to look for and the answer at hand: not on the stack, as with the packet.
#[btf_map]
static KEY: PerCpuArray<FlowKey, 1> = PerCpuArray::new();
#[btf_map]
static REFUSAL: PerCpuArray<Refusal, 1> = PerCpuArray::new();

/// Bytes of the second cut: the shortest that there is.
const SECOND_CUT: u32 = 4;

#[inline(always)]
fn mark() -> u32 {
    match MARK.get_ptr(0) {
        // SAFETY: a valid, aligned array element; volatile, because user space may write it.
        Some(mark) => unsafe { mark.read_volatile() },
        None => 0,
    }
}

/// Whether a packet that comes in is an answer of ours. Its mark is taken off.
#[inline(always)]
pub fn is_ours(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid, and its mark may be read and written.
    unsafe {
        let found = (*skb).mark;
        if found == 0 || found != mark() {
            return false;
        }
        (*skb).mark = 0;
    }
    true
}

/// What becomes of a packet that was refused on egress: its answer, sent back in, if one is due.
/// Returns the classifier's action.
#[inline(always)]
pub fn refuse(skb: *mut __sk_buff, verdict: Verdict) -> i32 {
    if mark() == 0 || acl_due(verdict.code()) == 0 {
        return TC_ACT_SHOT;
    }
    acl_answer(skb) as i32
}

/// Whether the packet at hand gets an answer. A global function, as [`acl_answer`] is, because
/// refusals are rare and the verifier has enough to follow without them.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_due(code: u32) -> u32 {
    let (Some(packet), Some(key)) = (packet_at_hand(), KEY.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: this CPU's element, which nobody else touches meanwhile.
    let key = unsafe { &mut *key };
    u32::from(refuse::is_due(&Maps, packet, Verdict::from_code(code), key))
}

/// Turns the packet into its answer and sends that back in, if there were not too many lately.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn acl_answer(skb: *mut __sk_buff) -> u32 {
    let (Some(packet), Some(refusal)) = (packet_at_hand(), REFUSAL.get_ptr_mut(0)) else {
        return TC_ACT_SHOT as u32;
    };
    // SAFETY: this CPU's element, which nobody else touches meanwhile.
    let refusal = unsafe { &mut *refusal };
    let outcome = if !is_within_limits(refuse::bucket(&packet.tuple)) {
        Outcome::Limited
    } else if refuse::write(&ByCall { skb }, packet, refusal).is_some()
        && become_answer(skb, refusal).is_some()
    {
        Outcome::Sent
    } else {
        Outcome::Failed
    };
    count(outcome);
    if outcome != Outcome::Sent {
        return TC_ACT_SHOT as u32;
    }
    // SAFETY: the context is valid, and its mark may be written.
    unsafe {
        (*skb).mark = mark();
        bpf_redirect((*skb).ifindex, u64::from(BPF_F_INGRESS)) as u32
    }
}

#[inline(always)]
fn is_within_limits(bucket: u32) -> bool {
    // SAFETY: takes no argument and changes nothing.
    let now_ns = unsafe { bpf_ktime_get_coarse_ns() };
    let take = |index: u32, most: u64| match WINDOWS.get_ptr_mut(index) {
        // SAFETY: this CPU's element, which nobody else touches meanwhile.
        Some(window) => refuse::take(unsafe { &mut *window }, most, now_ns),
        None => false,
    };
    take(bucket, refuse::ANSWERS_PER_PAIR) && take(BUCKETS, refuse::ANSWERS_PER_CPU)
}

/// Makes the packet its answer. If that fails half-way, it has to be dropped.
#[inline(always)]
fn become_answer(skb: *mut __sk_buff, refusal: &Refusal) -> Option<()> {
    const MOST: u32 = REFUSAL_WORDS as u32 * 4;
    let (len, first_cut) = (refusal.len, refusal.transport + SECOND_CUT);
    if len == 0 || len > MOST {
        return None;
    }
    let cut = |bytes: u32| {
        // SAFETY: the context is valid; the helper checks the length.
        unsafe { bpf_skb_adjust_room(skb.cast(), -(bytes as i32), 0, 0) }
    };
    // SAFETY: as above; the bytes stored are the answer's first `len`, which it has.
    let failed = unsafe {
        bpf_skb_change_tail(skb.cast(), len + first_cut + SECOND_CUT, 0) != 0
            || cut(first_cut) != 0
            || cut(SECOND_CUT) != 0
            || bpf_skb_store_bytes(
                skb.cast(),
                0,
                refusal.words.as_ptr().cast(),
                len,
                u64::from(BPF_F_INVALIDATE_HASH),
            ) != 0
    };
    (!failed).then_some(())
}

#[inline(always)]
fn count(outcome: Outcome) {
    if let Some(counter) = ANSWERS.get_ptr_mut(outcome as u32) {
        // SAFETY: this CPU's element; nothing else runs this program on this CPU meanwhile.
        unsafe { (*counter).packets += 1 };
    }
}
