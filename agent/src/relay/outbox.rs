//! What waits to be sent to one relay: bounded lanes, the oldest dropped.
//!
//! Answers to the relay itself go first, then WireGuard's handshakes and discovery, which are small
//! and urgent, then data. A message of a handshake that is repeated while nothing can be sent
//! waits once. Whoever pushes never waits; a relay that takes nothing costs packets, as a full
//! router does.

use bytes::Bytes;
use proto::derp::{Frame, is_disco};
use proto::key::NodeKey;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::sync::Notify;

/// Answers and notes to the relay that may wait.
const MAX_NOTES: usize = 16;
/// Messages of handshakes that may wait.
const MAX_HANDSHAKES: usize = 128;
/// Discovery packets that may wait.
const MAX_URGENT: usize = 64;
/// Data packets that may wait: a few milliseconds of a fast connection.
const MAX_DATA: usize = 512;
/// Bytes that are written at once.
const BATCH: usize = 64 << 10;

/// A packet and whom it is for, or whom it is from.
pub type Packet = (NodeKey, Bytes);

#[derive(Default)]
struct Lanes {
    notes: VecDeque<Vec<u8>>,
    handshakes: VecDeque<Packet>,
    urgent: VecDeque<Packet>,
    data: VecDeque<Packet>,
}

/// What waits to be sent to one relay.
#[derive(Default)]
pub(super) struct Outbox {
    lanes: Mutex<Lanes>,
    filled: Notify,
}

impl Outbox {
    /// Adds packets: handshakes, discovery or data.
    pub(super) fn push(&self, packets: &[Packet]) {
        self.with(|lanes| {
            for packet in packets {
                if is_handshake(&packet.1) {
                    lanes.handshakes.retain(|waiting| waiting != packet);
                    add(&mut lanes.handshakes, MAX_HANDSHAKES, packet.clone());
                } else if is_disco(&packet.1) {
                    add(&mut lanes.urgent, MAX_URGENT, packet.clone());
                } else {
                    add(&mut lanes.data, MAX_DATA, packet.clone());
                }
            }
        });
        self.filled.notify_one();
    }

    /// Adds a word to the relay itself.
    pub(super) fn note(&self, frame: &Frame<'_>) {
        self.with(|lanes| add(&mut lanes.notes, MAX_NOTES, frame.to_vec()));
        self.filled.notify_one();
    }

    /// Forgets what was meant for a connection that is gone.
    pub(super) fn clear(&self) {
        self.with(|lanes| *lanes = Lanes::default());
    }

    /// Forgets what was said to the relay on a connection that is gone, and keeps packets.
    pub(super) fn clear_notes(&self) {
        self.with(|lanes| lanes.notes.clear());
    }

    /// Frames to write now, once there are any.
    pub(super) async fn take(&self) -> Vec<u8> {
        loop {
            let frames = self.with(Lanes::take);
            if !frames.is_empty() {
                return frames;
            }
            self.filled.notified().await;
        }
    }

    fn with<T>(&self, use_them: impl FnOnce(&mut Lanes) -> T) -> T {
        use_them(&mut self.lanes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whether a packet is of one of the types that WireGuard paper 5.4 defines for handshakes.
fn is_handshake(packet: &[u8]) -> bool {
    matches!(packet.first_chunk(), Some([1..=3, 0, 0, 0]))
}

fn add<T>(lane: &mut VecDeque<T>, most: usize, item: T) {
    if lane.len() >= most {
        lane.pop_front();
    }
    lane.push_back(item);
}

impl Lanes {
    fn take(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        for note in self.notes.drain(..) {
            out.extend_from_slice(&note);
        }
        while out.len() < BATCH
            && let Some((dst, packet)) = self.next()
        {
            let packet = &packet;
            Frame::SendPacket { dst, packet }.encode(&mut out);
        }
        out
    }

    fn next(&mut self) -> Option<Packet> {
        let urgent = self.handshakes.pop_front();
        let urgent = urgent.or_else(|| self.urgent.pop_front());
        urgent.or_else(|| self.data.pop_front())
    }
}

/// The way out to every relay that is connected to, or is about to be.
#[derive(Clone, Default)]
pub struct Outboxes(Arc<RwLock<BTreeMap<proto::id::RegionId, Arc<Outbox>>>>);

impl Outboxes {
    /// Sends packets to peers by a region's relay; those to a region without a connection are
    /// dropped.
    pub fn push(&self, region: proto::id::RegionId, packets: &[Packet]) {
        let outboxes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(outbox) = outboxes.get(&region) {
            outbox.push(packets);
        }
    }

    pub(super) fn set(&self, region: proto::id::RegionId, outbox: Option<Arc<Outbox>>) {
        let mut outboxes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match outbox {
            Some(outbox) => outboxes.insert(region, outbox),
            None => outboxes.remove(&region),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::derp::{DISCO_MAGIC, DISCO_MIN_BYTES};

    const PEER: NodeKey = NodeKey([7; 32]);

    fn data(number: usize) -> Packet {
        (PEER, Bytes::from(number.to_be_bytes().to_vec()))
    }

    fn packets(mut frames: &[u8]) -> Vec<Bytes> {
        let mut packets = Vec::new();
        while let Some((frame, length)) = Frame::split(frames).unwrap() {
            if let Frame::SendPacket { dst: PEER, packet } = frame {
                packets.push(Bytes::copy_from_slice(packet));
            }
            frames = &frames[length..];
        }
        packets
    }

    #[tokio::test]
    async fn the_oldest_data_is_dropped_and_discovery_goes_first() {
        let outbox = Outbox::default();
        for number in 0..MAX_DATA + 3 {
            outbox.push(&[data(number)]);
        }
        let mut disco = DISCO_MAGIC.to_vec();
        disco.resize(DISCO_MIN_BYTES, 0);
        outbox.push(&[(PEER, Bytes::from(disco.clone()))]);
        outbox.note(&Frame::NotePreferred(true));
        let frames = outbox.take().await;
        assert!(matches!(
            Frame::split(&frames).unwrap(),
            Some((Frame::NotePreferred(true), _))
        ));
        let packets = packets(&frames);
        assert_eq!(packets[0], disco);
        assert_eq!(packets[1], data(3).1, "three too many");
        assert_eq!(packets.len(), 1 + MAX_DATA);
    }

    #[tokio::test]
    async fn a_handshake_that_is_repeated_while_it_waits_goes_out_once() {
        let outbox = Outbox::default();
        let message = |session| Bytes::from(vec![1, 0, 0, 0, session]);
        outbox.push(&[data(1)]);
        for _ in 0..5 {
            outbox.push(&[(PEER, message(1))]);
            outbox.push(&[(PEER, message(2))]);
        }
        let sent = packets(&outbox.take().await);
        assert_eq!(sent, [message(1), message(2), data(1).1]);
    }

    #[tokio::test]
    async fn a_batch_is_bounded_and_nothing_is_lost_between_two() {
        let outbox = Outbox::default();
        let packet = Bytes::from(vec![1; 1_400]);
        let sent = vec![(PEER, packet); 100];
        outbox.push(&sent);
        let mut got = 0;
        while got < sent.len() {
            let frames = outbox.take().await;
            assert!(frames.len() < BATCH + 1_500);
            got += packets(&frames).len();
        }
        assert_eq!(got, sent.len());
    }
}
