//! What is looked at while a world runs: nodes that flap; and what is told of a failed test.

use std::net::SocketAddr;

use engine::path::HOLD;
use engine::plan::Step;
use proto::id::RegionId;

use super::{HAND, World};

impl World {
    /// The region where others are to find a node.
    #[must_use]
    pub fn home(&self, index: usize) -> Option<RegionId> {
        self.nodes[index].table.home
    }

    /// Whether a region's relay runs.
    #[must_use]
    pub fn is_up(&self, region: RegionId) -> bool {
        self.relays.get(&region).is_some_and(|relay| relay.up)
    }

    /// Nothing flaps: between two returns to a direct path there is a while.
    pub(super) fn count_promotions(&mut self, index: usize, step: &Step) {
        let Step::SetPeers(changes) = step else {
            return;
        };
        let node = &mut self.nodes[index];
        let is_relay = |endpoint: SocketAddr| endpoint.ip().is_loopback();
        let direct = changes.iter().filter(|change| {
            let relayed = node.kernel.endpoint(&change.key).is_some_and(is_relay);
            relayed && change.endpoint.is_some_and(|it| !is_relay(it))
        });
        for change in direct {
            let before = node.promoted.insert(change.key, self.now);
            let pause = before.map(|before| self.now - before);
            assert!(
                pause.is_none_or(|pause| pause + HAND * 2 >= HOLD),
                "node {index} flaps: direct again after {pause:?}"
            );
        }
    }

    /// What is known of a pair, for a failed test.
    #[must_use]
    pub fn describe(&self, from: usize, to: usize) -> String {
        let one = |from: usize, to: usize| {
            let node = &self.nodes[from];
            let peer = &self.nodes[to].key;
            let engine = node.engine.as_ref();
            let path = engine.and_then(|engine| engine.path_of(self.at(from), peer));
            format!(
                "{from}: home {:?}, connected {:?}, endpoint {:?}, relayed {:?}, handshakes {}, \
                 {path:?}",
                node.table.home,
                node.connected,
                node.kernel.endpoint(peer),
                node.table.peers.get(peer),
                node.kernel.handshakes(peer),
            )
        };
        format!(
            "at {:?}\n  {}\n  {}",
            self.now,
            one(from, to),
            one(to, from)
        )
    }
}
