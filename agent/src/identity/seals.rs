//! [`Seals`]: the boxes that discovery travels in, opened and sealed with this node's key.
//!
//! Whoever asks must know whose packets it wants: a box is opened for peers of the netmap alone, so
//! an agreement of keys is made once for each of them, and strangers cost a look at 38 bytes. A
//! peer's key is no secret, and anybody may send garbage in its name, so only so many boxes of one
//! peer are opened in a second, and of all peers; what is more is dropped as if it was lost on its
//! way. All that is dropped is counted.

use super::Identity;
use engine::path::probe::Budget;
use proto::disco::{self, DiscoBox, Message};
use proto::key::DiscoKey;
use proto::nacl::NONCE_BYTES;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Boxes of one peer that are opened in a second, at most: many times what a peer says while it
/// looks for paths, a few microseconds each.
const MAX_OPENED: u32 = 500;
/// Boxes of all peers together.
const MAX_OPENED_ALL: u32 = 20_000;
/// Peers whose agreement is remembered; with more the first is forgotten and made anew.
const MAX_BOXES: usize = 16_384;

/// Opens and seals in the name of one identity.
pub struct Seals {
    identity: Arc<Identity>,
    boxes: BTreeMap<DiscoKey, Entry>,
    budget: Budget,
    dropped: u64,
}

struct Entry {
    /// `None`: its key is a low-order point, and nothing can be said to it.
    seal: Option<DiscoBox>,
    opened: Budget,
}

impl Seals {
    /// No agreements yet.
    #[must_use]
    pub fn new(identity: Arc<Identity>) -> Self {
        Self {
            identity,
            boxes: BTreeMap::new(),
            budget: Budget::default(),
            dropped: 0,
        }
    }

    /// What a packet says, and who says it. `None`, and counted, if it is no discovery, nobody's
    /// whom we `know`, not sealed for us, or one too many.
    pub fn open(
        &mut self,
        now: Instant,
        packet: &[u8],
        know: impl Fn(&DiscoKey) -> bool,
    ) -> Option<(DiscoKey, Message)> {
        let opened = self.try_open(now, packet, know);
        self.dropped += u64::from(opened.is_none());
        opened
    }

    /// The packet that says `message` to a peer. `None` if its key is none, or there are no random
    /// bytes.
    pub fn seal(&mut self, to: DiscoKey, message: &Message) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).ok()?;
        let seal = self.entry(to).seal.as_ref()?;
        Some(seal.seal(nonce, message))
    }

    /// Packets that were dropped since the agent started.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn try_open(
        &mut self,
        now: Instant,
        packet: &[u8],
        know: impl Fn(&DiscoKey) -> bool,
    ) -> Option<(DiscoKey, Message)> {
        let sender = disco::sender(packet).filter(know)?;
        if !self.entry(sender).opened.take(now, MAX_OPENED) {
            return None;
        }
        if !self.budget.take(now, MAX_OPENED_ALL) {
            return None;
        }
        let message = self.entry(sender).seal.as_ref()?.open(packet).ok()?;
        Some((sender, message))
    }

    fn entry(&mut self, peer: DiscoKey) -> &mut Entry {
        if self.boxes.len() >= MAX_BOXES && !self.boxes.contains_key(&peer) {
            self.boxes.pop_first();
        }
        let identity = &self.identity;
        self.boxes.entry(peer).or_insert_with(|| Entry {
            seal: DiscoBox::new(&identity.disco_secret(), peer),
            opened: Budget::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn seals(folder: &std::path::Path) -> (Seals, DiscoKey) {
        let identity = Identity::load_or_create(folder).unwrap();
        let key = identity.disco_key();
        (Seals::new(Arc::new(identity)), key)
    }

    #[test]
    fn two_nodes_understand_each_other_and_nobody_else() {
        let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let [mut a, mut b, mut c] = folders.each_ref().map(|folder| seals(folder.path()));
        let now = Instant::now();
        let message = Message::Unknown(9);
        let packet = a.0.seal(b.1, &message).unwrap();
        assert_ne!(packet, a.0.seal(b.1, &message).unwrap(), "a nonce once");
        let all = |_: &DiscoKey| true;
        assert_eq!(b.0.open(now, &packet, all), Some((a.1, message)));
        assert_eq!(b.0.dropped(), 0);
        assert_eq!(c.0.open(now, &packet, all), None, "sealed for another");
        assert_eq!(b.0.open(now, &packet, |_| false), None, "a stranger's");
        assert_eq!(b.0.open(now, &packet[..40], all), None, "too short");
        assert_eq!(b.0.dropped(), 2);
        assert!(a.0.seal(DiscoKey([0; 32]), &Message::Unknown(1)).is_none());
    }

    #[test]
    fn a_flood_in_one_name_leaves_the_others_heard() {
        let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let [mut a, mut b, mut c] = folders.each_ref().map(|folder| seals(folder.path()));
        let now = Instant::now();
        let message = Message::Unknown(9);
        let mut garbage = a.0.seal(b.1, &message).unwrap();
        *garbage.last_mut().unwrap() ^= 1;
        for _ in 0..5_000 {
            assert_eq!(b.0.open(now, &garbage, |_| true), None);
        }
        let good = a.0.seal(b.1, &message).unwrap();
        assert_eq!(b.0.open(now, &good, |_| true), None, "one too many");
        let other = c.0.seal(b.1, &message).unwrap();
        assert!(b.0.open(now, &other, |_| true).is_some());
        let later = now + Duration::from_secs(1);
        assert!(b.0.open(later, &good, |_| true).is_some());
    }
}
