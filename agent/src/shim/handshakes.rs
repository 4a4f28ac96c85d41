//! [`Handshakes`]: messages of WireGuard's handshake that get lost on a relayed path are sent again
//! before the kernel would.
//!
//! The kernel begins a session with one packet, and if no answer comes, with another one 5 s later
//! (`REKEY_TIMEOUT`); what applications send waits meanwhile. On the internet a packet is rarely
//! lost. On a relayed path this one often is, although nothing is broken: two nodes that have just
//! started are not connected to their relays yet, or one looks for the other at another relay, or
//! the other's kernel has not heard of the peer.
//!
//! So the newest *initiation* to each peer is kept until it is answered, for [`LIFE`] at most, and
//! sent again at the pace of [`pause`], by whatever relay the peer is looked for at then. The first
//! packet comes through within one such pause from the moment that both are connected. That does no
//! harm: whoever took the first one takes no other of the same time stamp (WireGuard paper 5.1),
//! and the kernel's own next one takes its place.
//!
//! For the same reason a lost *response* would never be said again. So the newest one is kept too,
//! and an initiation that is a repetition is answered with it, without the kernel.
//!
//! Two initiations that *cross* cancel each other: each kernel forgets its own when it takes the
//! other's, nobody takes a response, and 5 s pass. Both nodes have just started, so this is no rare
//! case here. The one of the node with the smaller key goes on, for [`CROSSING`]: that node drops
//! the other's and repeats its own, the other takes it and is silent.

use bytes::Bytes;
use proto::key::NodeKey;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long a message is kept: after that the kernel says it anew (`REKEY_TIMEOUT`).
pub const LIFE: Duration = Duration::from_secs(5);
/// For how long an initiation of ours is worth more than one of the peer.
const CROSSING: Duration = Duration::from_secs(1);
/// Between two repetitions at first, and so many of these,
const FIRST_PAUSE: Duration = Duration::from_millis(150);
const FIRST_REPEATS: u32 = 6;
/// and from then on.
const PAUSE: Duration = Duration::from_millis(500);
/// Most peers whose messages are kept. Those of others are as good as the kernel's own patience.
const MAX_PEERS: usize = 1_024;

/// Where a message names its sender's session, and where it names the receiver's.
const SENDER: std::ops::Range<usize> = 4..8;
const RECEIVER: std::ops::Range<usize> = 8..12;

/// A message of a handshake (WireGuard paper 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first.
    Initiation,
    /// Its answer.
    Response,
    /// Instead of one: the initiator is to try again, and to prove its address.
    Cookie,
}

impl Kind {
    /// What kind of message this packet is; `None` if of no handshake.
    #[must_use]
    pub fn of(packet: &[u8]) -> Option<Self> {
        match packet.first_chunk()? {
            [1, 0, 0, 0] => Some(Self::Initiation),
            [2, 0, 0, 0] => Some(Self::Response),
            [3, 0, 0, 0] => Some(Self::Cookie),
            _ => None,
        }
    }
}

/// After so many repetitions, how long to the next one.
fn pause(repeats: u32) -> Duration {
    match repeats < FIRST_REPEATS {
        true => FIRST_PAUSE,
        false => PAUSE,
    }
}

/// Handshake messages that may have to be said again.
#[derive(Debug)]
pub struct Handshakes {
    me: NodeKey,
    peers: BTreeMap<NodeKey, Talk>,
    /// Responses that were asked for again.
    ready: Vec<(NodeKey, Bytes)>,
}

/// The handshakes of one peer.
#[derive(Debug, Default)]
struct Talk {
    asked: Option<Asked>,
    heard: Option<Heard>,
}

/// An initiation of ours that has no answer.
#[derive(Debug)]
struct Asked {
    packet: Bytes,
    at: Instant,
    next: Instant,
    repeats: u32,
}

/// An initiation of the peer, and our kernel's response, once there is one.
#[derive(Debug)]
struct Heard {
    packet: Bytes,
    at: Instant,
    response: Option<Bytes>,
}

impl Handshakes {
    /// Of nobody yet. `me`: our own key.
    #[must_use]
    pub fn new(me: NodeKey) -> Self {
        Self {
            me,
            peers: BTreeMap::new(),
            ready: Vec::new(),
        }
    }

    /// The kernel sends a packet to a peer by relay.
    pub fn sent(&mut self, now: Instant, peer: NodeKey, packet: &Bytes) {
        match Kind::of(packet) {
            Some(Kind::Initiation) => {
                if let Some(talk) = self.talk(now, peer) {
                    talk.asked = Some(Asked {
                        packet: packet.clone(),
                        at: now,
                        next: now + pause(0),
                        repeats: 0,
                    });
                }
            }
            Some(Kind::Response) => {
                let talk = self.peers.get_mut(&peer);
                let heard = talk.and_then(|talk| talk.heard.as_mut());
                if let Some(heard) = heard.filter(|it| it.is_answered_by(packet)) {
                    heard.response = Some(packet.clone());
                }
            }
            _ => {}
        }
    }

    /// A packet of a peer comes by relay. Returns whether the kernel is to have it.
    pub fn received(&mut self, now: Instant, peer: NodeKey, packet: &Bytes) -> bool {
        match Kind::of(packet) {
            Some(Kind::Initiation) => self.begun(now, peer, packet),
            Some(Kind::Response | Kind::Cookie) => {
                if let Some(talk) = self.peers.get_mut(&peer) {
                    talk.asked = None;
                }
                true
            }
            _ => true,
        }
    }

    fn begun(&mut self, now: Instant, peer: NodeKey, packet: &Bytes) -> bool {
        let goes_first = self.me < peer;
        let Some(talk) = self.talk(now, peer) else {
            return true;
        };
        let heard = talk.heard.as_ref().filter(|it| it.packet == *packet);
        if let Some(response) = heard.and_then(|it| it.response.clone()) {
            // Once, however often it was asked for since.
            self.ready.retain(|(to, _)| *to != peer);
            self.ready.push((peer, response));
            return false;
        }
        let young = |asked: &&mut Asked| now.saturating_duration_since(asked.at) < CROSSING;
        if let Some(asked) = talk.asked.as_mut().filter(young)
            && goes_first
        {
            // Whoever says this is there now.
            asked.next = now;
            return false;
        }
        talk.asked = None;
        talk.heard = Some(Heard {
            packet: packet.clone(),
            at: now,
            response: None,
        });
        true
    }

    fn talk(&mut self, now: Instant, peer: NodeKey) -> Option<&mut Talk> {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
            self.forget(now);
        }
        let room = self.peers.len() < MAX_PEERS || self.peers.contains_key(&peer);
        room.then(|| self.peers.entry(peer).or_default())
    }

    /// A peer is looked for elsewhere: what it has not answered goes there now.
    pub fn moved(&mut self, now: Instant, peer: &NodeKey) {
        let talk = self.peers.get_mut(peer);
        if let Some(asked) = talk.and_then(|talk| talk.asked.as_mut()) {
            asked.next = now;
        }
    }

    /// Peers that have not answered.
    pub fn unanswered(&self) -> impl Iterator<Item = &NodeKey> {
        let asked = |(key, talk): (_, &Talk)| talk.asked.is_some().then_some(key);
        self.peers.iter().filter_map(asked)
    }

    /// What is to be sent now, and to whom.
    pub fn due(&mut self, now: Instant) -> Vec<(NodeKey, Bytes)> {
        self.forget(now);
        let mut due = std::mem::take(&mut self.ready);
        for (peer, talk) in &mut self.peers {
            let Some(asked) = talk.asked.as_mut().filter(|it| it.next <= now) else {
                continue;
            };
            asked.repeats += 1;
            asked.next = now + pause(asked.repeats);
            due.push((*peer, asked.packet.clone()));
        }
        due
    }

    /// When something is to be sent at the latest; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        if !self.ready.is_empty() {
            return Some(now);
        }
        let asked = self.peers.values().filter_map(|talk| talk.asked.as_ref());
        asked.map(|asked| asked.next).min()
    }

    fn forget(&mut self, now: Instant) {
        let old = |at| now.saturating_duration_since(at) >= LIFE;
        self.peers.retain(|_, talk| {
            talk.asked.take_if(|asked| old(asked.at));
            talk.heard.take_if(|heard| old(heard.at));
            talk.asked.is_some() || talk.heard.is_some()
        });
    }
}

impl Heard {
    fn is_answered_by(&self, response: &[u8]) -> bool {
        let session = self.packet.get(SENDER);
        session.is_some() && session == response.get(RECEIVER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: NodeKey = NodeKey([1; 32]);
    const HIGH: NodeKey = NodeKey([9; 32]);
    const MS: Duration = Duration::from_millis(1);

    fn initiation(session: u8) -> Bytes {
        let mut packet = vec![0; 148];
        (packet[0], packet[4]) = (1, session);
        packet.into()
    }

    fn response(to: u8) -> Bytes {
        let mut packet = vec![0; 92];
        (packet[0], packet[4], packet[8]) = (2, 77, to);
        packet.into()
    }

    #[test]
    fn what_is_not_answered_is_said_again_until_the_kernel_says_it_anew() {
        let (mut low, start) = (Handshakes::new(LOW), Instant::now());
        low.sent(start, HIGH, &initiation(1));
        assert_eq!(low.due(start), [], "the first one is on its way");
        let (mut now, mut said) = (start, Vec::new());
        while let Some(next) = low.deadline(now) {
            now = next;
            said.extend(low.due(now).iter().map(|_| now - start));
        }
        assert_eq!(said[..3], [150 * MS, 300 * MS, 450 * MS]);
        assert!(said.len() <= 15, "{said:?}");
        assert!(said.iter().all(|at| *at < LIFE), "{said:?}");
        let apart = said.windows(2).map(|pair| pair[1] - pair[0]).max();
        assert_eq!(apart, Some(PAUSE));
    }

    #[test]
    fn an_answer_ends_it_and_a_new_initiation_takes_its_place() {
        let (mut low, now) = (Handshakes::new(LOW), Instant::now());
        low.sent(now, HIGH, &initiation(1));
        low.sent(now, HIGH, &initiation(2));
        assert_eq!(low.due(now + FIRST_PAUSE), [(HIGH, initiation(2))]);
        assert!(low.received(now, HIGH, &response(2)));
        assert_eq!(low.deadline(now), None);
        let data = Bytes::from_static(&[4, 0, 0, 0, 1, 2, 3, 4, 5]);
        low.sent(now, HIGH, &data);
        assert!(low.received(now, HIGH, &data));
        assert_eq!(low.deadline(now), None, "data is none of its business");
    }

    #[test]
    fn a_peer_that_is_looked_for_elsewhere_hears_it_at_once() {
        let (mut low, now) = (Handshakes::new(LOW), Instant::now());
        low.sent(now, HIGH, &initiation(1));
        assert_eq!(low.unanswered().collect::<Vec<_>>(), [&HIGH]);
        low.moved(now, &HIGH);
        assert_eq!(low.due(now), [(HIGH, initiation(1))]);
    }

    #[test]
    fn a_repetition_is_answered_without_the_kernel_and_only_once_that_has_answered() {
        let (mut high, now) = (Handshakes::new(HIGH), Instant::now());
        assert!(high.received(now, LOW, &initiation(1)));
        assert!(
            high.received(now, LOW, &initiation(1)),
            "the kernel may not have known the peer"
        );
        high.sent(now, LOW, &response(8));
        assert!(high.received(now, LOW, &initiation(1)), "another's answer");
        high.sent(now, LOW, &response(1));
        assert!(!high.received(now, LOW, &initiation(1)));
        assert_eq!(high.deadline(now), Some(now));
        assert_eq!(high.due(now), [(LOW, response(1))]);
        assert_eq!(high.due(now), []);
        assert!(high.received(now, LOW, &initiation(2)), "a new one");
        high.due(now + LIFE);
        assert!(high.peers.is_empty());
    }

    #[test]
    fn of_two_that_cross_one_goes_on() {
        let now = Instant::now();
        let (mut low, mut high) = (Handshakes::new(LOW), Handshakes::new(HIGH));
        low.sent(now, HIGH, &initiation(1));
        high.sent(now, LOW, &initiation(2));
        let soon = now + 50 * MS;
        assert!(!low.received(soon, HIGH, &initiation(2)));
        assert_eq!(low.due(soon), [(HIGH, initiation(1))], "it may be lost");
        assert!(high.received(soon, LOW, &initiation(1)));
        assert_eq!(high.deadline(soon), None, "and is not disturbed");
        // A node that does not get through gives in.
        assert!(low.received(now + CROSSING, HIGH, &initiation(2)));
        assert_eq!(low.deadline(now + CROSSING), None);
    }

    #[test]
    fn there_is_a_limit_and_what_is_old_makes_room() {
        let (mut low, now) = (Handshakes::new(LOW), Instant::now());
        let key = |n: usize| {
            let mut key = [5; 32];
            key[..8].copy_from_slice(&n.to_be_bytes());
            NodeKey(key)
        };
        for n in 0..MAX_PEERS + 10 {
            low.sent(now, key(n), &initiation(1));
            assert!(low.received(now, key(n), &response(9)));
            low.sent(now, key(n), &initiation(2));
        }
        assert_eq!(low.peers.len(), MAX_PEERS);
        low.sent(now + LIFE, key(MAX_PEERS), &initiation(3));
        assert_eq!(low.peers.len(), 1);
    }
}
