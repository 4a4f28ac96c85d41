//! The tracks of flows ([`ebpf::tracks`]), as the agent keeps them few.

use super::{Acl, AclError, Mapped, policy};
use ebpf::abi::{Direction, FlowKey};
use ebpf::packet::Packet;
use ebpf::tracks::{self, HALF, TRACKS, WORDS};
use std::sync::atomic::{AtomicU64, Ordering};

/// Tracks are made anew when more than so many are there: one in so many packets is then looked for
/// in vain.
const MOST: u32 = TRACKS / 32;

/// The map, mapped.
pub(super) struct Tracks(Mapped);

impl Tracks {
    pub(super) fn new(map: Mapped) -> Self {
        Self(map)
    }

    fn word(&self, index: u32) -> Option<&AtomicU64> {
        self.0.words().get(index as usize)
    }

    /// The half that programs read.
    fn half(&self) -> u32 {
        let half = self.word(HALF);
        half.map_or(0, |word| word.load(Ordering::Acquire) as u32 & 1)
    }

    /// All words of one half.
    fn all_of(&self, half: u32) -> &[AtomicU64] {
        let from = ((half & 1) * WORDS) as usize;
        let all = self.0.words().get(from..from + WORDS as usize);
        all.unwrap_or_default()
    }

    /// As the programs ask it.
    pub(super) fn is_new(&self, packet: &Packet, direction: Direction) -> bool {
        let place = tracks::of_packet(packet, direction);
        let word = self.word(tracks::word_of(self.half(), place));
        let clear = |word: &AtomicU64| word.load(Ordering::Acquire) & tracks::bit(place) == 0;
        tracks::is_for(packet) && word.is_some_and(clear)
    }

    /// Leaves a flow's track in both halves, before the flow is written.
    pub(super) fn leave(&self, key: &FlowKey) {
        for half in 0..2 {
            self.leave_in(half, key);
        }
    }

    fn leave_in(&self, half: u32, key: &FlowKey) {
        let place = tracks::of_key(key);
        if let Some(word) = self.word(tracks::word_of(half, place)) {
            word.fetch_or(tracks::bit(place), Ordering::AcqRel);
        }
    }
}

impl Acl {
    /// Forgets the tracks of flows that are gone, if there are many tracks.
    pub(super) fn renew_tracks(&mut self) -> Result<(), AclError> {
        let half = self.tracks.half();
        let set = |word: &AtomicU64| word.load(Ordering::Relaxed).count_ones();
        if self.tracks.all_of(half).iter().map(set).sum::<u32>() <= MOST {
            return Ok(());
        }
        let idle = 1 - half;
        for word in self.tracks.all_of(idle) {
            word.store(0, Ordering::Relaxed);
        }
        // Whoever left a track before, and it was cleared, has then written the flow.
        policy::grace_now(self)?;
        for (_, key, _) in self.flows.table()?.iter() {
            self.tracks.leave_in(idle, &key);
        }
        if let Some(half) = self.tracks.word(HALF) {
            half.store(u64::from(idle), Ordering::Release);
        }
        Ok(())
    }
}
