//! What nodes ask for, and what the coordinator does on their behalf.
//!
//! A node is its machine key: every call here acts for the machine at the other end of the
//! channel and for no other.

use super::{Actor, Change, CommandError, Limit, Note, check};
use crate::snapshot::addrs;
use crate::store::{NetworkRow, NodeRow, Store, StoreError, Timestamp, TokenHash, TokenState, Tx};
use proto::control::{RegisterRequest, Registered, Report};
use proto::id::{Generation, NetworkId, NodeId};
use proto::key::MachineId;
use proto::netmap::{MAX_PEERS, Network};
use proto::permit::{Permit, PermitSecret, VALIDITY};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Why a token does not admit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenFault {
    /// None was shown.
    #[error("this machine is not a node yet: join with a token, from `token create`")]
    Missing,
    /// It is not ours.
    #[error("the coordinator does not know this token; make one with `token create`")]
    Unknown,
    /// It admitted its one node.
    #[error("this token was for one node, and one has joined with it; make another")]
    Used,
    /// Its time is over.
    #[error("this token has expired; make another with `token create`")]
    Expired,
    /// The machine is a node of another network.
    #[error("this machine is a node of another network; leave it first with `weir down --purge`")]
    OtherNetwork,
}

/// A machine, as its channel shows it.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Who it is.
    pub id: MachineId,
    /// Where it is.
    pub addr: IpAddr,
}

/// The node that this machine is, if it is one.
///
/// # Errors
/// The database's.
pub async fn known(store: &Store, machine: MachineId) -> Result<Option<NodeRow>, CommandError> {
    Ok(store.read().await?.node_by_machine(machine).await?)
}

/// Makes the machine a node, or takes its word for what changed if it is one. The proof of its key
/// was checked before.
///
/// # Errors
/// If neither a token nor the machine's key admits it, its WireGuard key is another's, what it
/// offers is not legal, or there is no room.
pub async fn register(
    store: &Store,
    now: Timestamp,
    machine: Machine,
    request: &RegisterRequest,
) -> Result<Registered, CommandError> {
    let hash = request.token.as_ref().map(TokenHash::of);
    let mut tx = store.write().await?;
    let token = match hash {
        Some(hash) => tx.token(hash, now).await?,
        None => TokenState::Unknown,
    };
    let known = tx.node_by_machine(machine.id).await?;
    let network = match (&known, token) {
        (Some(node), TokenState::Good(token)) if token.network != node.network => {
            return Err(CommandError::Token(TokenFault::OtherNetwork));
        }
        (Some(node), _) => node.network,
        (None, TokenState::Good(token)) => token.network,
        (None, _) if hash.is_none() => return Err(CommandError::Token(TokenFault::Missing)),
        (None, TokenState::Unknown) => return Err(CommandError::Token(TokenFault::Unknown)),
        (None, TokenState::Used) => return Err(CommandError::Token(TokenFault::Used)),
        (None, TokenState::Expired) => return Err(CommandError::Token(TokenFault::Expired)),
    };
    let mut change = Change::from(tx, network, now).await?;
    // Now that nobody else changes the network: the same machine may have joined meanwhile.
    let row = match (change.tx.node_by_machine(machine.id).await?, hash) {
        (Some(node), _) => return again(change, node, machine, request).await,
        (None, Some(hash)) => join(&mut change, hash, machine, request).await?,
        (None, None) => return Err(CommandError::Token(TokenFault::Missing)),
    };
    let answer = registered(&change.network, &row);
    let note = Note {
        action: "node.join",
        subject: &row.name,
        before: String::new(),
        after: describe(&row),
    };
    change.commit(&Actor::Node(row.name.clone()), note).await?;
    Ok(answer)
}

async fn join(
    change: &mut Change,
    hash: TokenHash,
    machine: Machine,
    request: &RegisterRequest,
) -> Result<NodeRow, CommandError> {
    let id = change.network.id;
    let network = network(&change.network);
    let endpoints = check::offer(&network, &request.routes, &request.endpoints)?;
    let Some(token) = change.tx.claim_token(hash, change.now).await? else {
        return Err(CommandError::Token(TokenFault::Used));
    };
    if token.network != id {
        return Err(CommandError::Token(TokenFault::Unknown));
    }
    check_key(&mut change.tx, machine, request).await?;
    let names = change.tx.names(id).await?;
    if names.len() >= MAX_PEERS {
        return Err(CommandError::Limit(Limit::Nodes));
    }
    let last = check::last_host(network.v4, network.v6);
    let host = change.tx.next_host(id, last).await?;
    let row = NodeRow {
        network: id,
        id: change.tx.next_node_id(id).await?,
        name: check::unique(&check::hostname(&request.hostname), &names),
        machine: machine.id,
        key: request.key,
        host: host.ok_or(CommandError::Limit(Limit::Addresses))?,
        owner: token.owner,
        ephemeral: token.ephemeral,
        advertised: request.routes.clone(),
        approved: BTreeSet::new(),
        endpoints,
        listen_port: request.listen_port,
        seen_addr: Some(machine.addr),
        online: false,
        last_seen: change.now,
        created: change.now,
        disco: request.disco,
        home: None,
    };
    let inserted = change.tx.insert_node(&change.network, &row).await;
    if inserted.as_ref().is_err_and(StoreError::is_duplicate) {
        return Err(CommandError::KeyTaken);
    }
    inserted?;
    Ok(row)
}

/// A node registers again: after a restart, or with a new WireGuard key.
async fn again(
    mut change: Change,
    mut row: NodeRow,
    machine: Machine,
    request: &RegisterRequest,
) -> Result<Registered, CommandError> {
    let network = network(&change.network);
    let endpoints = check::offer(&network, &request.routes, &request.endpoints)?;
    check_key(&mut change.tx, machine, request).await?;
    let answer = registered(&change.network, &row);
    let before = row.clone();
    row.key = request.key;
    row.advertised.clone_from(&request.routes);
    row.endpoints = endpoints;
    row.listen_port = request.listen_port;
    row.disco = request.disco;
    row.seen_addr = Some(machine.addr);
    if row == before {
        return Ok(answer);
    }
    save(change, &before, row, "node.register").await?;
    Ok(answer)
}

async fn check_key(
    tx: &mut Tx,
    machine: Machine,
    request: &RegisterRequest,
) -> Result<(), CommandError> {
    match tx.machine_by_key(request.key).await? {
        Some(owner) if owner != machine.id => Err(CommandError::KeyTaken),
        Some(_) | None => Ok(()),
    }
}

async fn save(
    mut change: Change,
    before: &NodeRow,
    mut row: NodeRow,
    action: &str,
) -> Result<(), CommandError> {
    row.last_seen = change.now;
    let saved = change.tx.update_node(&change.network, &row).await;
    if saved.as_ref().is_err_and(StoreError::is_duplicate) {
        return Err(CommandError::KeyTaken);
    }
    saved?;
    let (subject, before, after) = (&row.name, describe(before), describe(&row));
    let note = Note {
        action,
        subject,
        before,
        after,
    };
    change.commit(&Actor::Node(row.name.clone()), note).await?;
    Ok(())
}

/// Takes a node's word for what it offers and where it is. The same word twice changes nothing.
///
/// # Errors
/// If the machine is no node, or what it offers is not legal.
pub async fn report(
    store: &Store,
    now: Timestamp,
    machine: Machine,
    report: &Report,
) -> Result<(), CommandError> {
    let change = |row: &NodeRow, network: &Network| {
        let mut row = row.clone();
        row.endpoints = check::offer(network, &report.routes, &report.endpoints)?;
        row.advertised.clone_from(&report.routes);
        row.listen_port = report.listen_port;
        row.disco = report.disco;
        row.home = report.home;
        row.seen_addr = Some(machine.addr);
        Ok(row)
    };
    update(store, now, machine, "node.report", change).await?;
    Ok(())
}

/// A permit for this node to use its network's relays for a while.
#[must_use]
pub fn permit(row: &NodeRow, now: Timestamp, signer: &PermitSecret) -> Permit {
    let expires = now.after(VALIDITY).seconds();
    signer.permit(row.network, row.key, expires)
}

/// Notes where a node's stream comes from. Its network, its id, and the generation that its
/// netmap must at least have.
///
/// # Errors
/// If the machine is no node.
pub async fn connect(
    store: &Store,
    now: Timestamp,
    machine: Machine,
) -> Result<(NetworkId, NodeId, Generation), CommandError> {
    let change = |row: &NodeRow, _: &Network| {
        let mut row = row.clone();
        row.seen_addr = Some(machine.addr);
        Ok(row)
    };
    let (network, node) = update(store, now, machine, "node.connect", change).await?;
    Ok((network.id, node, network.generation))
}

/// Changes the machine's row, if `change` does.
async fn update(
    store: &Store,
    now: Timestamp,
    machine: Machine,
    action: &str,
    change: impl Fn(&NodeRow, &Network) -> Result<NodeRow, CommandError>,
) -> Result<(NetworkRow, NodeId), CommandError> {
    let mut tx = store.read().await?;
    let row = tx
        .node_by_machine(machine.id)
        .await?
        .ok_or(CommandError::NotANode)?;
    let as_read = tx
        .network(row.network)
        .await?
        .ok_or(CommandError::NotANode)?;
    drop(tx);
    if change(&row, &network(&as_read))? == row {
        return Ok((as_read, row.id));
    }
    let mut writing = Change::begin(store, row.network, now).await?;
    let before = writing
        .tx
        .node_by_machine(machine.id)
        .await?
        .ok_or(CommandError::NotANode)?;
    let after = change(&before, &network(&writing.network))?;
    let done = (writing.network.clone(), before.id);
    if after != before {
        save(writing, &before, after, action).await?;
    }
    Ok(done)
}

/// Takes the machine's node out of its network, because it said so.
///
/// # Errors
/// If the machine is no node.
pub async fn logout(store: &Store, now: Timestamp, machine: MachineId) -> Result<(), CommandError> {
    let row = known(store, machine).await?.ok_or(CommandError::NotANode)?;
    let actor = Actor::Node(row.name.clone());
    remove(store, now, &actor, (row.network, row.id), "node.logout").await
}

/// Removes an ephemeral node that did not come back.
///
/// # Errors
/// The database's.
pub async fn expire(
    store: &Store,
    now: Timestamp,
    node: (NetworkId, NodeId),
) -> Result<(), CommandError> {
    remove(store, now, &Actor::Coordinator, node, "node.expire").await
}

async fn remove(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    (network, node): (NetworkId, NodeId),
    action: &str,
) -> Result<(), CommandError> {
    let mut change = Change::begin(store, network, now).await?;
    let row = change
        .tx
        .node(network, node)
        .await?
        .ok_or(CommandError::NotANode)?;
    change.tx.delete_node(&change.network, node).await?;
    let before = describe(&row);
    let note = Note {
        action,
        subject: &row.name,
        before,
        after: String::new(),
    };
    change.commit(actor, note).await?;
    Ok(())
}

/// Writes down which nodes' streams came and went at this replica: one change of the network,
/// however many nodes. Presence is no deed of anybody's, so the audit log does not hear of it.
///
/// # Errors
/// The database's.
pub async fn set_presence(
    store: &Store,
    now: Timestamp,
    replica: &str,
    network: NetworkId,
    nodes: &[(NodeId, bool)],
) -> Result<(), CommandError> {
    let Change {
        mut tx,
        network,
        now,
    } = Change::begin(store, network, now).await?;
    let mut news = false;
    for (node, online) in nodes {
        news |= if *online {
            tx.set_online(&network, *node, replica, now).await?
        } else {
            tx.set_offline(&network, *node, replica, now).await?
        };
    }
    if !news {
        // Who holds a stream changed, but not what peers see: keep the generation.
        tx.lower(&network).await?;
    }
    tx.commit().await?;
    Ok(())
}

fn network(row: &NetworkRow) -> Network {
    Network {
        id: row.id,
        name: row.name.clone(),
        v4: row.v4,
        v6: row.v6,
        stun: Vec::new(),
        relays: BTreeMap::new(),
    }
}

fn registered(network_row: &NetworkRow, row: &NodeRow) -> Registered {
    Registered {
        network: row.network,
        node: row.id,
        name: row.name.clone(),
        addrs: addrs((network_row.v4, network_row.v6), row.host).to_vec(),
    }
}

/// A node's row as the audit log shows it: public keys, names and addresses.
fn describe(row: &NodeRow) -> String {
    serde_json::json!({
        "machine": row.machine,
        "key": row.key,
        "owner": row.owner,
        "ephemeral": row.ephemeral,
        "routes": row.advertised,
        "endpoints": row.endpoints,
        "listen_port": row.listen_port,
        "seen": row.seen_addr,
        "disco": row.disco,
        "home": row.home,
    })
    .to_string()
}
