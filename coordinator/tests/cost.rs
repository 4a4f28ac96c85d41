//! What a change costs grows with the change, not with the network.

use crate::store::node;
use coordinator::snapshot::{Snapshot, delta};
use coordinator::store::{NetworkRow, NodeRow, Rows};
use proto::id::{Generation, NetworkId, NodeId};
use proto::netmap::Owner;
use std::collections::BTreeSet;

const NODES: u64 = 1_000;
/// A peer is about 400 bytes of JSON, and the frame of a delta about 100.
const BYTES_PER_CHANGED_PEER: usize = 1_024;

/// One database, and a thousand servers that talk with it but not with each other.
const POLICY: &str = r#"{
    "tagOwners": {"tag:web": [], "tag:db": []},
    "acls": [{"action": "accept", "src": ["tag:web"], "dst": ["tag:db:5432"]}],
}"#;

fn rows(generation: u64, nodes: Vec<NodeRow>, complete: bool) -> Rows {
    let network = NetworkRow {
        id: NetworkId(1),
        name: "home".to_owned(),
        v4: "10.0.0.0/8".parse().unwrap(),
        v6: "fd00::/48".parse().unwrap(),
        generation: Generation(generation),
        policy_generation: Generation(1),
    };
    let policy = complete.then(|| (Vec::new(), Some(POLICY.to_owned())));
    Rows {
        network,
        complete,
        policy,
        nodes,
        removed: Vec::new(),
    }
}

fn tagged(seed: u64, tag: &str) -> NodeRow {
    let owner = Owner::Tags(BTreeSet::from([tag.to_owned()]));
    let advertised = BTreeSet::new();
    NodeRow {
        owner,
        advertised,
        ..node(NetworkId(1), seed)
    }
}

#[test]
fn one_changed_endpoint_in_a_thousand_nodes_is_one_small_message_to_each_who_sees_it() {
    let mut nodes: Vec<NodeRow> = (1..=NODES).map(|seed| tagged(seed, "tag:web")).collect();
    nodes[0] = tagged(1, "tag:db");
    let old = Snapshot::build(rows(2, nodes.clone(), true)).unwrap();
    let sizes = |old: &Snapshot, new: &Snapshot| -> Vec<(NodeId, usize)> {
        (1..=NODES)
            .filter_map(|id| {
                let delta = delta(old, new, NodeId(id), old.generation())?;
                Some((NodeId(id), serde_json::to_vec(&delta).unwrap().len()))
            })
            .collect()
    };

    let mut moved = nodes[499].clone();
    moved.endpoints = vec!["203.0.113.9:9".parse().unwrap()];
    let new = old.advance(rows(3, vec![moved], false)).unwrap();
    let sent = sizes(&old, &new);
    let ids: Vec<NodeId> = sent.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [NodeId(1)], "only the database sees a server");
    assert!(sent[0].1 < BYTES_PER_CHANGED_PEER, "{} bytes", sent[0].1);

    let mut moved = nodes[0].clone();
    moved.endpoints = vec!["203.0.113.9:10".parse().unwrap()];
    let newer = new.advance(rows(4, vec![moved], false)).unwrap();
    let sent = sizes(&new, &newer);
    assert_eq!(
        sent.len() as u64,
        NODES - 1,
        "every server sees the database"
    );
    let largest = sent.iter().map(|(_, bytes)| *bytes).max().unwrap();
    assert!(largest < BYTES_PER_CHANGED_PEER, "{largest} bytes");

    // A server that joins changes the database's netmap and nobody else's, filter included.
    let joined = newer
        .advance(rows(5, vec![tagged(NODES + 1, "tag:web")], false))
        .unwrap();
    let sent = sizes(&newer, &joined);
    assert_eq!(
        sent.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [NodeId(1)]
    );
    assert!(sent[0].1 < BYTES_PER_CHANGED_PEER, "{} bytes", sent[0].1);
}
