//! The shim and the outboxes of one node's agent: what waits for a connection, and which messages of
//! handshakes are said again. The latter by the agent's own code.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use agent::shim::handshakes::Handshakes;
use bytes::Bytes;
use engine::RelayTable;
use proto::id::RegionId;
use proto::key::NodeKey;

use super::Payload;
use super::wireguard::Message;

/// Frames that wait for a connection, at most.
const WAITING: usize = 512;

/// What an agent keeps of relayed packets.
pub(super) struct Shim {
    handshakes: Handshakes,
    waiting: BTreeMap<RegionId, VecDeque<(NodeKey, Payload)>>,
    /// When it will be asked what is due.
    alarm: Option<Instant>,
}

impl Shim {
    pub(super) fn new(me: NodeKey) -> Shim {
        Shim {
            handshakes: Handshakes::new(me),
            waiting: BTreeMap::new(),
            alarm: None,
        }
    }

    /// A frame for a relay that is being dialled.
    pub(super) fn wait(&mut self, region: RegionId, to: NodeKey, payload: Payload) {
        let lane = self.waiting.entry(region).or_default();
        if lane.len() == WAITING {
            lane.pop_front();
        }
        lane.push_back((to, payload));
    }

    /// What waited for a connection that stands, or failed.
    pub(super) fn waited(&mut self, region: RegionId) -> VecDeque<(NodeKey, Payload)> {
        self.waiting.remove(&region).unwrap_or_default()
    }

    /// The rules for relayed packets were these and are those.
    pub(super) fn set(&mut self, now: Instant, old: &RelayTable, new: &RelayTable) {
        let region = |table: &RelayTable, key: &NodeKey| {
            let peer = table.peers.get(key);
            peer.map(|peer| peer.region)
        };
        let keys: Vec<NodeKey> = self.handshakes.unanswered().copied().collect();
        for key in keys {
            if region(old, &key) != region(new, &key) {
                self.handshakes.moved(now, &key);
            }
        }
    }

    pub(super) fn sent(&mut self, now: Instant, peer: NodeKey, message: Message) {
        self.handshakes.sent(now, peer, &bytes(message));
    }

    /// Whether the kernel is given a message.
    pub(super) fn received(&mut self, now: Instant, peer: NodeKey, message: Message) -> bool {
        self.handshakes.received(now, peer, &bytes(message))
    }

    /// When to ask what is due, if that is not known yet.
    pub(super) fn set_alarm(&mut self, now: Instant) -> Option<Instant> {
        let deadline = self.handshakes.deadline(now)?.max(now);
        if self.alarm.is_some_and(|alarm| alarm <= deadline) {
            return None;
        }
        self.alarm = Some(deadline);
        self.alarm
    }

    /// What is to be said again now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<(NodeKey, Message)> {
        self.alarm = self.alarm.filter(|alarm| *alarm > now);
        let due = self.handshakes.due(now).into_iter();
        due.filter_map(|(peer, packet)| Some((peer, message(&packet)?)))
            .collect()
    }
}

/// As much of a message as its first bytes say: its kind, and whose sessions it names.
fn bytes(message: Message) -> Bytes {
    let (kind, sender, receiver) = match message {
        Message::Initiation(number) => (1, number, 0),
        Message::Response(number) => (2, 0, number),
        Message::Data(number, _) => (4, 0, number),
    };
    let mut bytes = vec![kind, 0, 0, 0];
    for session in [sender, receiver] {
        // What sets sessions of one node apart is in the low half.
        bytes.extend(session.to_le_bytes().iter().take(4));
    }
    bytes.extend(sender.max(receiver).to_le_bytes());
    bytes.into()
}

fn message(bytes: &[u8]) -> Option<Message> {
    let number = u64::from_le_bytes(*bytes.last_chunk()?);
    match bytes.first()? {
        1 => Some(Message::Initiation(number)),
        2 => Some(Message::Response(number)),
        _ => None,
    }
}
