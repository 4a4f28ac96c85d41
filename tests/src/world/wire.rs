//! Datagrams: what becomes of one on its way through routers, and what a host does with it.

use std::net::SocketAddr;

use engine::Input;
use engine::mtu::OVERHEAD_V4;
use proto::disco::{self, PING_BYTES};
use proto::key::{DiscoKey, NodeKey};

use super::wireguard::{Message, Sent};
use super::{ETHERNET, Event, MAX_HOPS, PORT, Payload, Place, World, disco_key};

/// Headers of IPv4 and UDP.
const IPV4_UDP: u32 = 28;

impl World {
    pub(super) fn send_all(&mut self, index: usize, sent: Vec<Sent>) {
        for (endpoint, peer, message) in sent {
            let me = self.nodes[index].key;
            let payload = Payload::WireGuard(me, peer, message);
            if endpoint.ip().is_loopback() {
                self.shim_out(index, endpoint, payload);
            } else {
                self.datagram(index, endpoint, payload);
            }
        }
    }

    /// Sends a datagram from WireGuard's port.
    pub(super) fn datagram(&mut self, index: usize, to: SocketAddr, payload: Payload) {
        let node = &self.nodes[index];
        if !node.linked || self.chance() % 1000 < self.quality.loss {
            return;
        }
        let node = &self.nodes[index];
        let from = SocketAddr::new(node.local, PORT);
        let (realm, delay) = (node.realm, node.delay);
        let Some((place, seen)) = self.carry(realm, from, to) else {
            return;
        };
        let jitter = self.jitter();
        match (place, payload) {
            (Place::Node(other), payload) => {
                let data = matches!(payload, Payload::WireGuard(..));
                let pair = (index, other);
                if self.cut.contains(&pair) || (data && self.swallows.contains(&pair)) {
                    return;
                }
                let takes = self.takes.get(&pair).copied().unwrap_or(ETHERNET);
                if self.length(index, &payload) > takes {
                    return;
                }
                let delay = delay + self.nodes[other].delay + jitter;
                self.after(delay, Event::Datagram(other, seen, payload));
            }
            (Place::Stun, Payload::StunRequest) => {
                // The answer takes the way back that the question opened.
                if let Some((Place::Node(back), from)) = self.carry(0, to, seen) {
                    let answer = Payload::StunAnswer(seen);
                    self.after(delay * 2 + jitter, Event::Datagram(back, from, answer));
                }
            }
            (Place::Stun | Place::Router(_), _) => {}
        }
    }

    /// How long a packet with this is, in bytes. What applications send is as long as it may be.
    fn length(&self, index: usize, payload: &Payload) -> u32 {
        match payload {
            Payload::WireGuard(_, _, Message::Data(_, Some(inner))) => {
                let to = if inner.answer { inner.src } else { inner.dst };
                self.nodes[index].kernel.mtu(to) + u32::from(OVERHEAD_V4)
            }
            Payload::Disco(_, _, disco::Message::Ping { padding, .. }) => {
                u32::from(*padding) + PING_BYTES as u32 + IPV4_UDP
            }
            Payload::WireGuard(..)
            | Payload::Disco(..)
            | Payload::StunRequest
            | Payload::StunAnswer(_) => 0,
        }
    }

    /// Where a datagram ends, and under which source it is seen there.
    pub(super) fn carry(
        &mut self,
        mut realm: usize,
        mut from: SocketAddr,
        mut to: SocketAddr,
    ) -> Option<(Place, SocketAddr)> {
        let now = self.now;
        for _ in 0..MAX_HOPS {
            match self.realms[realm].hosts.get(&to.ip()).copied() {
                Some(Place::Router(inner)) => {
                    let (nat, _) = self.realms[inner].router.as_mut()?;
                    to = nat.back(now, from, to.port())?;
                    realm = inner;
                }
                Some(place) => return Some((place, from)),
                None => {
                    let (nat, outer) = self.realms[realm].router.as_mut()?;
                    let hairpin = to.ip() == nat.outside;
                    from = nat.out(now, from, to)?;
                    if hairpin {
                        if !nat.kind.hairpin {
                            return None;
                        }
                        to = nat.back(now, from, to.port())?;
                    } else {
                        realm = *outer;
                    }
                }
            }
        }
        None
    }

    pub(super) fn arrive(&mut self, index: usize, from: SocketAddr, payload: Payload) {
        match payload {
            Payload::WireGuard(peer, to, message) => self.wireguard(index, from, peer, to, message),
            Payload::Disco(sender, to, message) if self.opens(index, sender, to) => {
                let input = Input::Disco {
                    from,
                    sender,
                    message,
                };
                self.tell(index, input);
            }
            Payload::Disco(..) => {}
            Payload::StunAnswer(addr) => self.tell(index, Input::Mapped { server: from, addr }),
            Payload::StunRequest => {}
        }
    }

    /// Whether a node's agent opens a box: it is for the node, and a peer's.
    pub(super) fn opens(&self, index: usize, sender: DiscoKey, to: DiscoKey) -> bool {
        let node = &self.nodes[index];
        let engine = node.engine.as_ref();
        to == disco_key(node.key) && engine.is_some_and(|engine| engine.knows(&sender))
    }

    pub(super) fn wireguard(
        &mut self,
        index: usize,
        from: SocketAddr,
        peer: NodeKey,
        to: NodeKey,
        message: Message,
    ) {
        // A stranger's datagram fails its authentication.
        if self.nodes[index].key != to {
            return;
        }
        let (sent, inside) = self.nodes[index]
            .kernel
            .receive(self.now, from, peer, message);
        self.send_all(index, sent);
        if let Some(inner) = inside {
            self.deliver(index, inner);
        }
    }
}
