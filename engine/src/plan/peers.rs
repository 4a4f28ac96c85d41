//! Peers, compared: a changed peer is one [`PeerChange`], an unchanged one is none.

use super::{PeerChange, PeerState, WantedPeer};
use proto::key::NodeKey;
use proto::net::Prefix;
use std::collections::{BTreeMap, BTreeSet};

type WantedPeers = BTreeMap<NodeKey, WantedPeer>;
type Peers = BTreeMap<NodeKey, PeerState>;

/// What has to be taken from peers before policy may change: prefixes that get another owner.
/// Owners that stay are narrowed (first), owners that go are removed (second).
pub(super) fn withdrawals(wanted: &WantedPeers, have: &Peers) -> (Vec<PeerChange>, Vec<NodeKey>) {
    let owners: BTreeMap<Prefix, NodeKey> = wanted
        .iter()
        .filter(|(key, peer)| have.get(key).map(|has| &has.allowed_ips) != Some(&peer.allowed_ips))
        .flat_map(|(key, peer)| peer.allowed_ips.iter().map(|prefix| (*prefix, *key)))
        .collect();
    let (mut narrowed, mut removed) = (Vec::new(), Vec::new());
    if owners.is_empty() {
        return (narrowed, removed);
    }
    for (key, peer) in have {
        let moves = |prefix: &&Prefix| owners.get(prefix).is_some_and(|owner| owner != key);
        if !peer.allowed_ips.iter().any(|prefix| moves(&prefix)) {
            continue;
        }
        match wanted.get(key) {
            Some(_) => narrowed.push(PeerChange {
                key: *key,
                create: false,
                replace_allowed_ips: true,
                allowed_ips: peer
                    .allowed_ips
                    .iter()
                    .filter(|prefix| !moves(prefix))
                    .copied()
                    .collect(),
                endpoint: None,
                keepalive: None,
            }),
            None => removed.push(*key),
        }
    }
    (narrowed, removed)
}

/// Peers to make or change.
pub(super) fn changes(wanted: &WantedPeers, have: &Peers) -> Vec<PeerChange> {
    wanted
        .iter()
        .filter_map(|(key, peer)| change(*key, peer, have.get(key)))
        .collect()
}

fn change(key: NodeKey, wanted: &WantedPeer, have: Option<&PeerState>) -> Option<PeerChange> {
    let Some(have) = have else {
        return Some(PeerChange {
            key,
            create: true,
            replace_allowed_ips: true,
            allowed_ips: wanted.allowed_ips.clone(),
            endpoint: wanted.endpoint,
            keepalive: Some(wanted.keepalive),
        });
    };
    // Kernels before 6.16 cannot remove one allowed IP: only then the whole set is replaced, in
    // one message, so that no prefix that stays is ever missing.
    let replace = !have.allowed_ips.is_subset(&wanted.allowed_ips);
    let allowed_ips: BTreeSet<Prefix> = if replace {
        wanted.allowed_ips.clone()
    } else {
        wanted
            .allowed_ips
            .difference(&have.allowed_ips)
            .copied()
            .collect()
    };
    let endpoint = wanted
        .endpoint
        .filter(|endpoint| have.stats.endpoint != Some(*endpoint));
    let keepalive = (wanted.keepalive != have.keepalive).then_some(wanted.keepalive);
    let differs = replace || !allowed_ips.is_empty() || endpoint.is_some() || keepalive.is_some();
    differs.then_some(PeerChange {
        key,
        create: false,
        replace_allowed_ips: replace,
        allowed_ips,
        endpoint,
        keepalive,
    })
}

/// Takes peers away.
pub(super) fn remove(peers: &mut Peers, keys: &[NodeKey]) {
    for key in keys {
        peers.remove(key);
    }
}

/// Peers to remove.
pub(super) fn removals(wanted: &WantedPeers, have: &Peers) -> Vec<NodeKey> {
    have.keys()
        .filter(|key| !wanted.contains_key(key))
        .copied()
        .collect()
}

/// What the kernel does with changes, one after the other (`set_peer` and `set_allowedip` in
/// drivers/net/wireguard/netlink.c). Prefixes change hands in one pass over all peers.
pub(super) fn apply(peers: &mut Peers, changes: &[PeerChange]) {
    let mut owners: BTreeMap<Prefix, NodeKey> = BTreeMap::new();
    let mut made: BTreeSet<NodeKey> = BTreeSet::new();
    let mut effective = Vec::new();
    for change in changes {
        if change.create {
            made.insert(change.key);
        } else if !peers.contains_key(&change.key) && !made.contains(&change.key) {
            continue;
        }
        owners.extend(
            change
                .allowed_ips
                .iter()
                .map(|prefix| (*prefix, change.key)),
        );
        effective.push(change);
    }
    let stays =
        |prefix: &Prefix, key: &NodeKey| owners.get(prefix).is_none_or(|owner| owner == key);
    if !owners.is_empty() {
        for (key, peer) in peers.iter_mut() {
            peer.allowed_ips.retain(|prefix| stays(prefix, key));
        }
    }
    for change in effective {
        let peer = peers.entry(change.key).or_default();
        if change.replace_allowed_ips {
            peer.allowed_ips.clear();
        }
        let kept = change
            .allowed_ips
            .iter()
            .filter(|prefix| stays(prefix, &change.key));
        peer.allowed_ips.extend(kept);
        if let Some(endpoint) = change.endpoint {
            peer.stats.endpoint = Some(endpoint);
        }
        if let Some(keepalive) = change.keepalive {
            peer.keepalive = keepalive;
        }
    }
}
