//! Nodes of which only the number and the addresses matter, and what real ones may do that measure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use proto::id::NodeId;
use proto::key::NodeKey;
use proto::netmap::{Me, Owner, Peer};

/// The port that all transfers between nodes cross.
pub const PORT: u16 = 5201;

/// Opens it.
pub const POLICY: &str = r#"{
  "tagOwners": {"tag:bench": []},
  "acls": [{"action": "accept", "src": ["tag:bench"], "dst": ["tag:bench:5201"]}],
}"#;

fn owner() -> Owner {
    Owner::User("bench@example.com".to_owned())
}

/// This node.
pub fn me(addrs: Vec<IpAddr>) -> Me {
    Me {
        id: NodeId(1),
        name: "me".to_owned(),
        key: NodeKey([1; 32]),
        addrs,
        routes: BTreeSet::new(),
        owner: owner(),
        labels: BTreeSet::new(),
    }
}

/// Peer number `number`.
pub fn peer(number: u32, addrs: Vec<IpAddr>) -> (NodeId, Peer) {
    let id = NodeId(u64::from(number) + 10);
    let mut key = [0; 32];
    key[..4].copy_from_slice(&number.to_be_bytes());
    let peer = Peer {
        id,
        name: format!("n{number}"),
        key: NodeKey(key),
        addrs,
        routes: BTreeSet::new(),
        endpoints: Vec::new(),
        owner: owner(),
        labels: BTreeSet::new(),
        online: true,
        disco: None,
        home: None,
    };
    (id, peer)
}
