//! What waits to be sent to one relay: three bounded lanes, the oldest dropped.
//!
//! Answers to the relay itself go first, then discovery, which is small and urgent, then data.
//! Whoever pushes never waits; a relay that takes nothing costs packets, as a full router does.

use bytes::Bytes;
use proto::derp::{Frame, is_disco};
use proto::key::NodeKey;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::sync::Notify;

/// Answers and notes to the relay that may wait.
const MAX_NOTES: usize = 16;
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
    /// Adds packets, discovery or data.
    pub(super) fn push(&self, packets: &[Packet]) {
        self.with(|lanes| {
            for packet in packets {
                match is_disco(&packet.1) {
                    true => add(&mut lanes.urgent, MAX_URGENT, packet.clone()),
                    false => add(&mut lanes.data, MAX_DATA, packet.clone()),
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
            && let Some((dst, packet)) = self.urgent.pop_front().or_else(|| self.data.pop_front())
        {
            let packet = &packet;
            Frame::SendPacket { dst, packet }.encode(&mut out);
        }
        out
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
