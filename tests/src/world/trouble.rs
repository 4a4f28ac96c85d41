//! What breaks in a world, and is made whole again.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use engine::Input;

use super::nat::Kind;
use super::shim::Shim;
use super::{Event, Place, World, authority};

impl World {
    /// Kills a node's agent. Its kernel goes on.
    pub fn kill_agent(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.engine = None;
        node.deadline = None;
        node.table = Arc::default();
        node.connected.clear();
        node.dialling.clear();
        node.shim = Shim::new(node.key);
        node.said.clear();
        node.promoted.clear();
        for relay in self.relays.values_mut() {
            relay.connected.remove(&index);
        }
    }

    /// Takes the coordinator away, or brings it back.
    pub fn set_coordinator(&mut self, up: bool) {
        self.coordinator = up;
        if up {
            for index in 0..self.nodes.len() {
                self.full(index);
            }
        }
    }

    /// Kills a relay region, or brings it back.
    pub fn set_relay(&mut self, region: usize, up: bool) {
        let id = authority::region(region);
        let place = if up { Some(Place::Stun) } else { None };
        let addr = authority::relay_addr(region);
        match place {
            Some(place) => self.realms[0].hosts.insert(addr, place),
            None => self.realms[0].hosts.remove(&addr),
        };
        let Some(relay) = self.relays.get_mut(&id) else {
            return;
        };
        relay.up = up;
        if !up {
            for index in std::mem::take(&mut relay.connected) {
                self.lose(index, id, super::relay_lost());
            }
        }
    }

    /// Changes the kind of a network's router.
    pub fn set_kind(&mut self, realm: usize, kind: Kind) {
        if let Some((nat, _)) = &mut self.realms[realm].router {
            nat.kind = kind;
        }
    }

    /// Other hosts behind a network's router begin so many flows.
    pub fn busy(&mut self, realm: usize, flows: u16) {
        if let Some((nat, _)) = &mut self.realms[realm].router {
            nat.busy(flows);
        }
    }

    /// A network's router restarts: it forgets its mappings.
    pub fn restart_router(&mut self, realm: usize) {
        if let Some((nat, _)) = &mut self.realms[realm].router {
            nat.forget();
        }
    }

    /// Moves a node to another network.
    pub fn roam(&mut self, index: usize, realm: usize) {
        let node = &mut self.nodes[index];
        let (old_realm, old) = (node.realm, node.local);
        let number = node.key.0[0];
        let local = match realm {
            0 => IpAddr::V4(Ipv4Addr::new(203, 0, 113, number)),
            _ => IpAddr::V4(Ipv4Addr::new(10, realm as u8, 0, number)),
        };
        (node.realm, node.local) = (realm, local);
        self.realms[old_realm].hosts.remove(&old);
        self.realms[realm].hosts.insert(local, Place::Node(index));
        // Connections of the old address die.
        for region in std::mem::take(&mut self.nodes[index].connected) {
            if let Some(relay) = self.relays.get_mut(&region) {
                relay.connected.remove(&index);
            }
            self.lose(index, region, "the address is gone".into());
        }
        self.shake(index);
    }

    /// Pulls a node's cable, or plugs it in.
    pub fn set_link(&mut self, index: usize, up: bool) {
        self.nodes[index].linked = up;
        self.shake(index);
    }

    /// Tells a node of its links. A path that it takes on new ones is no flap.
    fn shake(&mut self, index: usize) {
        self.nodes[index].promoted.clear();
        let links = self.links_of(index);
        self.tell(index, Input::Links(links));
    }

    /// From now on datagrams from one node do not arrive at another; or they do again. Relays carry
    /// on.
    pub fn set_cut(&mut self, from: usize, to: usize, cut: bool) {
        match cut {
            true => self.cut.insert((from, to)),
            false => self.cut.remove(&(from, to)),
        };
    }

    /// From now on packets longer than this are dropped between two nodes, both ways, and nobody
    /// says so.
    pub fn set_path_mtu(&mut self, a: usize, b: usize, bytes: u32) {
        self.takes.extend([((a, b), bytes), ((b, a), bytes)]);
    }

    /// From now on something between two nodes lets discovery through and swallows WireGuard, both
    /// ways; or it no longer does.
    pub fn set_swallowing(&mut self, a: usize, b: usize, swallows: bool) {
        for pair in [(a, b), (b, a)] {
            match swallows {
                true => self.swallows.insert(pair),
                false => self.swallows.remove(&pair),
            };
        }
    }

    /// The whole host falls asleep. Its monotonic clock stands still, the kernel's WireGuard's does
    /// not (`CLOCK_MONOTONIC`, `CLOCK_BOOTTIME`).
    pub fn sleep(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        node.asleep.get_or_insert(self.now);
        node.kernel.suspend();
    }

    /// It wakes up, and its connections to relays have died meanwhile.
    pub fn wake(&mut self, index: usize) {
        let Some(since) = self.nodes[index].asleep.take() else {
            return;
        };
        let long = self.now - since;
        let node = &mut self.nodes[index];
        node.slept += long;
        node.deadline = node.deadline.map(|at| at + long);
        let deadline = node.deadline;
        for event in std::mem::take(&mut node.deferred) {
            self.after(Duration::ZERO, event);
        }
        if let Some(at) = deadline {
            self.at_time(at.max(self.now), Event::Deadline(index, at));
        }
        for region in std::mem::take(&mut self.nodes[index].connected) {
            if let Some(relay) = self.relays.get_mut(&region) {
                relay.connected.remove(&index);
            }
            self.lose(index, region, "the relay does not know us any more".into());
        }
        self.tell(index, Input::Woke);
    }

    /// Sets a node's wall clock, to seconds since 1970: handshakes are stamped by it.
    pub fn set_clock(&mut self, index: usize, to: Duration) {
        self.nodes[index].kernel.wall = to.saturating_sub(self.now);
    }

    /// Keeps from a sleeping host what is sent to it, and what is its own until it wakes up. Returns
    /// what happens.
    pub(super) fn unless_asleep(&mut self, event: Event) -> Option<Event> {
        let index = match &event {
            Event::Datagram(index, ..)
            | Event::Frame(index, ..)
            | Event::Input(index, _)
            | Event::Deadline(index, _)
            | Event::Apply(index, _)
            | Event::Observe(index)
            | Event::Repeat(index)
            | Event::Dialled(index, _) => *index,
            Event::Ask(talk) => self.talks[*talk].from,
            Event::Report(..) | Event::KernelTick => return Some(event),
        };
        let node = &mut self.nodes[index];
        if node.asleep.is_none() {
            return Some(event);
        }
        match event {
            Event::Datagram(..) | Event::Frame(..) | Event::Deadline(..) => {}
            event => node.deferred.push(event),
        }
        None
    }
}
