//! Relays, and what the agents do with them: connections, frames, the shim.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use engine::{Input, RelayEvent, RelayTable};
use proto::id::RegionId;
use proto::key::NodeKey;

use super::{Event, NOTICED, Payload, REDIAL, World};

/// After this long it is said again that data of a peer comes.
const AGAIN: Duration = Duration::from_secs(5);

impl World {
    /// Whether two nodes can reach each other by relay: each is connected where the other looks for
    /// it, and both kernels know the other.
    #[must_use]
    pub fn meet(&self, one: usize, other: usize) -> bool {
        let reaches = |from: usize, to: usize| {
            let (from, to) = (&self.nodes[from], &self.nodes[to]);
            let region = from.table.peers.get(&to.key).map(|peer| peer.region);
            let stands =
                |region| from.connected.contains(&region) && to.connected.contains(&region);
            let present = from.kernel.present().filter(|present| present.up);
            region.is_some_and(stands) && present.is_some_and(|it| it.peers.contains_key(&to.key))
        };
        reaches(one, other) && reaches(other, one)
    }

    pub(super) fn set_table(&mut self, index: usize, table: Arc<RelayTable>) {
        let wanted: BTreeSet<RegionId> = table.regions.keys().copied().collect();
        let at = self.at(index);
        let node = &mut self.nodes[index];
        node.shim.set(at, &node.table, &table);
        node.table = table;
        node.said.clear();
        let gone: Vec<RegionId> = node.connected.difference(&wanted).copied().collect();
        node.dialling.retain(|region| wanted.contains(region));
        for region in gone {
            self.nodes[index].connected.remove(&region);
            if let Some(relay) = self.relays.get_mut(&region) {
                relay.connected.remove(&index);
            }
        }
        for region in wanted {
            self.dial(index, region, Duration::ZERO);
        }
        self.repeat_later(index);
    }

    pub(super) fn dial(&mut self, index: usize, region: RegionId, pause: Duration) {
        let Some(relay) = self.relays.get(&region) else {
            return;
        };
        let node = &mut self.nodes[index];
        if !node.connected.contains(&region) && node.dialling.insert(region) {
            // TCP, TLS and the login: three times there and back.
            let delay = pause + (node.delay + relay.delay) * 6;
            self.after(delay, Event::Dialled(index, region));
        }
    }

    pub(super) fn dialled(&mut self, index: usize, region: RegionId) {
        let node = &mut self.nodes[index];
        if node.engine.is_none() || !node.dialling.remove(&region) {
            return;
        }
        let linked = node.linked;
        let Some(relay) = self.relays.get_mut(&region) else {
            return;
        };
        if !relay.up || !linked {
            self.nodes[index].shim.waited(region);
            let why = "the relay does not answer".to_owned();
            self.tell(index, Input::Relay(region, RelayEvent::Down(why)));
            if self.nodes[index].table.regions.contains_key(&region) {
                self.dial(index, region, REDIAL);
            }
            return;
        }
        relay.connected.insert(index);
        let latency = (relay.delay + self.nodes[index].delay) * 2;
        self.nodes[index].connected.insert(region);
        for (to, payload) in self.nodes[index].shim.waited(region) {
            self.frame(index, region, to, payload);
        }
        self.tell(index, Input::Relay(region, RelayEvent::Up));
        self.tell(index, Input::Relay(region, RelayEvent::Latency(latency)));
    }

    /// A connection is lost, which is noticed a while later.
    pub(super) fn lose(&mut self, index: usize, region: RegionId, why: String) {
        self.nodes[index].connected.remove(&region);
        let noticed = if self.nodes[index].linked {
            self.nodes[index].delay
        } else {
            NOTICED
        };
        let down = Input::Relay(region, RelayEvent::Down(why));
        self.after(noticed, Event::Input(index, down));
        if self.nodes[index].table.regions.contains_key(&region) {
            self.dial(index, region, REDIAL);
        }
    }

    /// What WireGuard sent to a loopback address: the shim hands it to the peer's region.
    pub(super) fn shim_out(&mut self, index: usize, endpoint: SocketAddr, payload: Payload) {
        let table = Arc::clone(&self.nodes[index].table);
        let peer = table
            .peers
            .iter()
            .find(|(_, peer)| peer.loopback == endpoint);
        if let Some((key, peer)) = peer {
            if let Payload::WireGuard(_, _, message) = payload {
                let at = self.at(index);
                self.nodes[index].shim.sent(at, *key, message);
            }
            self.frame(index, peer.region, *key, payload);
            self.repeat_later(index);
        }
    }

    /// What the agent says again of handshakes.
    pub(super) fn repeat(&mut self, index: usize) {
        let at = self.at(index);
        let me = self.nodes[index].key;
        let table = Arc::clone(&self.nodes[index].table);
        for (peer, message) in self.nodes[index].shim.due(at) {
            if let Some(rule) = table.peers.get(&peer) {
                let payload = Payload::WireGuard(me, peer, message);
                self.frame(index, rule.region, peer, payload);
            }
        }
        self.repeat_later(index);
    }

    fn repeat_later(&mut self, index: usize) {
        let at = self.at(index);
        if let Some(alarm) = self.nodes[index].shim.set_alarm(at) {
            self.after(alarm - at, Event::Repeat(index));
        }
    }

    pub(super) fn frame(&mut self, index: usize, region: RegionId, to: NodeKey, payload: Payload) {
        let node = &mut self.nodes[index];
        if node.dialling.contains(&region) {
            node.shim.wait(region, to, payload);
            return;
        }
        if !node.connected.contains(&region) || !node.linked {
            return;
        }
        let (me, delay) = (node.key, node.delay);
        let Some(relay) = self.relays.get(&region).filter(|relay| relay.up) else {
            return;
        };
        let there = relay.connected.iter().find(|it| self.nodes[**it].key == to);
        match there.copied() {
            Some(other) => {
                let delay = delay + relay.delay * 2 + self.nodes[other].delay;
                self.after(delay, Event::Frame(other, region, me, payload));
            }
            None => {
                let gone = Input::Relay(region, RelayEvent::PeerGone(to));
                self.after((delay + relay.delay) * 2, Event::Input(index, gone));
            }
        }
    }

    pub(super) fn arrive_relayed(
        &mut self,
        index: usize,
        region: RegionId,
        peer: NodeKey,
        payload: Payload,
    ) {
        if !self.nodes[index].connected.contains(&region) {
            return;
        }
        match payload {
            Payload::Disco(sender, to, message) if self.opens(index, sender, to) => {
                let event = RelayEvent::Disco {
                    from: peer,
                    sender,
                    message,
                };
                self.tell(index, Input::Relay(region, event));
            }
            Payload::Disco(..) => {}
            Payload::WireGuard(_, to, message) => {
                let now = self.now;
                let said = self.nodes[index].said.get(&peer);
                if said.is_none_or(|at| now - *at >= AGAIN) {
                    self.nodes[index].said.insert(peer, now);
                    let event = RelayEvent::Data { from: peer };
                    self.tell(index, Input::Relay(region, event));
                }
                let at = self.at(index);
                let table = Arc::clone(&self.nodes[index].table);
                if let Some(rule) = table.peers.get(&peer) {
                    let is_for_kernel = self.nodes[index].shim.received(at, peer, message);
                    self.repeat_later(index);
                    if !is_for_kernel {
                        return;
                    }
                    let from = rule.appear_as.unwrap_or(rule.loopback);
                    self.wireguard(index, from, peer, to, message);
                }
            }
            Payload::StunRequest | Payload::StunAnswer(_) => {}
        }
    }
}
