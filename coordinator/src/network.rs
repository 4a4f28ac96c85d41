//! The commands: everything that changes a network.
//!
//! A command checks what it was given, then makes one [`Change`]: a transaction that raises the
//! network's generation, changes rows, and leaves a note in the audit log. It ends whole or not at
//! all. A command that finds nothing to change commits nothing.
//!
//! Here are the commands that an administrator gives; `node` has those of the nodes themselves and
//! of the coordinator on their behalf; `check` says which names, prefixes and offers are legal.

mod check;
pub mod node;

use crate::config::Relays;
use crate::snapshot::Snapshot;
use crate::store::{
    AuditEntry, AuditRow, Chain, NetworkRow, NewNetwork, NodeRow, Store, StoreError, Timestamp,
    TokenHash, TokenRow, Tx,
};
use check::nearest;
pub use check::{NameKind, OfferError, hostname, login, name, owner_tags};
use proto::control::{TOKEN_SECRET_BYTES, TokenSecret};
use proto::id::{NetworkId, NodeId};
use proto::net::Prefix;
use proto::netmap::Owner;
use proto::permit::PermitSecret;
use proto::policy::{self, Compiled, Diagnostics, Diff, Directory, TooLarge};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// Longest validity of a join token.
pub const MAX_TOKEN_VALIDITY: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// Most networks on one coordinator.
pub const MAX_NETWORKS: usize = 10_000;
/// Most users of one network.
pub const MAX_USERS: usize = 100_000;

/// Why a command was not carried out. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The database's.
    #[error("the coordinator's database does not answer; nothing was changed, try again")]
    Store(#[from] StoreError),
    /// There is nothing to choose from.
    #[error("there is no network yet; make one with `weir-coordinator network create NAME`")]
    NoNetwork,
    /// There is too much to choose from.
    #[error("there are several networks: say which with `--network`: {}", .0.join(", "))]
    SeveralNetworks(Vec<String>),
    /// Nothing has this name.
    #[error("there is no {kind} `{name}`{}", hint(.near))]
    Unknown {
        /// What was looked for.
        kind: NameKind,
        /// Its name.
        name: String,
        /// What was probably meant.
        near: Option<String>,
    },
    /// Something has this name.
    #[error("the {kind} `{name}` exists already")]
    Exists {
        /// What was to be made.
        kind: NameKind,
        /// Its name.
        name: String,
    },
    /// The name is not legal.
    #[error("`{name}` cannot name a {kind}: {}", .kind.rule())]
    Name {
        /// What was to be named.
        kind: NameKind,
        /// The name.
        name: String,
    },
    /// Nodes cannot get addresses from this prefix.
    #[error("nodes cannot get addresses from {prefix}: {reason}")]
    Addresses {
        /// The prefix.
        prefix: Prefix,
        /// Why not.
        reason: check::AddressReason,
    },
    /// The policy is wrong; nothing of it was applied.
    #[error("the policy was refused and the one before stays:\n{}", .0.render("policy"))]
    Policy(Diagnostics),
    /// See [`MAX_TOKEN_VALIDITY`].
    #[error("a token is valid for at most 366 days, and for more than nothing")]
    Validity,
    /// Nobody offers the route.
    #[error("`{node}` does not offer {route}; {}", offers(.offered))]
    NotOffered {
        /// The node.
        node: String,
        /// The route.
        route: Prefix,
        /// What it offers.
        offered: BTreeSet<Prefix>,
    },
    /// Two nodes would serve the same addresses.
    #[error("{route} overlaps {other}, which `{node}` serves already; one address has one router")]
    RouteTaken {
        /// The route.
        route: Prefix,
        /// The route that it overlaps.
        other: Prefix,
        /// Who serves that.
        node: String,
    },
    /// What a node says of itself is not legal.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// The token does not admit.
    #[error("{0}")]
    Token(node::TokenFault),
    /// The channel's machine is no node.
    #[error("this machine is not a node here (any more); join again with a token")]
    NotANode,
    /// The WireGuard key is another node's.
    #[error("this WireGuard key belongs to another node; delete it and join with a new one")]
    KeyTaken,
    /// There is nothing that a permit would be for.
    #[error("this network has no relays")]
    NoRelays,
    /// A limit is reached.
    #[error("{0}")]
    Limit(Limit),
}

/// A limit that a command met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Limit {
    /// See [`MAX_NETWORKS`].
    #[error("this coordinator holds as many networks as it may")]
    Networks,
    /// See [`MAX_USERS`].
    #[error("the network has as many users as it may")]
    Users,
    /// [`proto::netmap::MAX_PEERS`].
    #[error("the network has as many nodes as it may")]
    Nodes,
    /// Every address of the network's prefixes is taken.
    #[error("the network's prefixes have no free address; remove nodes that are gone")]
    Addresses,
}

/// Who gives a command, as the audit log names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A user of the coordinator's machine, over the local socket.
    Local {
        /// The kernel's word for who is at the other end.
        uid: u32,
    },
    /// A node, by the name that it has in the network.
    Node(String),
    /// The coordinator itself.
    Coordinator,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "local uid {uid}"),
            Self::Node(name) => write!(f, "node {name}"),
            Self::Coordinator => f.write_str("coordinator"),
        }
    }
}

fn hint(near: &Option<String>) -> String {
    near.as_ref()
        .map_or_else(String::new, |near| format!("; did you mean `{near}`?"))
}

fn offers(offered: &BTreeSet<Prefix>) -> String {
    if offered.is_empty() {
        return "it offers no route: start it with `weir up --advertise-routes CIDR`".to_owned();
    }
    let list: Vec<String> = offered.iter().map(Prefix::to_string).collect();
    format!("it offers {}", list.join(", "))
}

/// A change of one network in the making.
struct Change {
    tx: Tx,
    network: NetworkRow,
    now: Timestamp,
}

impl Change {
    async fn begin(store: &Store, network: NetworkId, now: Timestamp) -> Result<Self, StoreError> {
        Self::from(store.write().await?, network, now).await
    }

    async fn from(mut tx: Tx, network: NetworkId, now: Timestamp) -> Result<Self, StoreError> {
        let network = tx.raise(network).await?;
        Ok(Self { tx, network, now })
    }

    /// Notes who did what, and makes it true.
    async fn commit(mut self, actor: &Actor, note: Note<'_>) -> Result<(), StoreError> {
        let Note {
            action,
            subject,
            before,
            after,
        } = note;
        let actor = &actor.to_string();
        let (before, after) = (&before, &after);
        let entry = AuditEntry {
            actor,
            action,
            subject,
            before,
            after,
        };
        self.tx
            .append_audit(&self.network, self.now, &entry)
            .await?;
        self.tx.commit().await
    }
}

/// What the audit log says of a change.
struct Note<'a> {
    action: &'a str,
    subject: &'a str,
    before: String,
    after: String,
}

/// The network of this name, or the only one.
///
/// # Errors
/// If there is no such network, or `name` is missing and there is not exactly one.
pub async fn find(store: &Store, name: Option<&str>) -> Result<NetworkRow, CommandError> {
    let mut networks = store.read().await?.networks().await?;
    let Some(name) = name else {
        return match networks.len() {
            0 => Err(CommandError::NoNetwork),
            1 => Ok(networks.remove(0)),
            _ => Err(CommandError::SeveralNetworks(
                networks.into_iter().map(|network| network.name).collect(),
            )),
        };
    };
    let near = nearest(name, networks.iter().map(|network| network.name.as_str()));
    networks
        .into_iter()
        .find(|network| network.name == name)
        .ok_or_else(|| CommandError::Unknown {
            kind: NameKind::Network,
            name: name.to_owned(),
            near,
        })
}

/// Every network, by name.
///
/// # Errors
/// The database's.
pub async fn list(store: &Store) -> Result<Vec<NetworkRow>, CommandError> {
    Ok(store.read().await?.networks().await?)
}

/// Makes a network. Prefixes that are not given are 100.64.0.0/10 and a random local v6 /48.
///
/// # Errors
/// If the name is taken or not legal, or nodes cannot get addresses from a prefix.
pub async fn create(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    new: (&str, Option<Prefix>, Option<Prefix>),
) -> Result<NetworkRow, CommandError> {
    let (given, v4, v6) = new;
    let name = name(NameKind::Network, given)?;
    let v4 = check::v4(v4.unwrap_or_else(check::default_v4))?;
    let v6 = check::v6(v6.unwrap_or_else(check::random_v6))?;
    let id = check::random_network_id();
    let mut tx = store.write().await?;
    if tx.networks().await?.len() >= MAX_NETWORKS {
        return Err(CommandError::Limit(Limit::Networks));
    }
    let inserted = tx
        .insert_network(NewNetwork {
            id,
            name: &name,
            v4,
            v6,
        })
        .await;
    if inserted.as_ref().is_err_and(StoreError::is_duplicate) {
        return Err(CommandError::Exists {
            kind: NameKind::Network,
            name,
        });
    }
    inserted?;
    let change = Change::from(tx, id, now).await?;
    let network = change.network.clone();
    let after = format!("{v4}, {v6}");
    let note = Note {
        action: "network.create",
        subject: &name,
        before: String::new(),
        after,
    };
    change.commit(actor, note).await?;
    Ok(network)
}

/// Raises every network's generation, so that nodes get a netmap with the relays of now.
///
/// # Errors
/// The database's.
pub async fn tell_relays(store: &Store, now: Timestamp, relays: &Relays) -> Result<(), StoreError> {
    let networks = store.read().await?.networks().await?;
    for network in networks {
        let change = Change::begin(store, network.id, now).await?;
        let note = Note {
            action: "relays.change",
            subject: &network.name,
            before: String::new(),
            after: serde_json::to_string(relays).unwrap_or_default(),
        };
        change.commit(&Actor::Coordinator, note).await?;
    }
    Ok(())
}

/// What signs relay permits: made once, and the same for all coordinators of the database.
///
/// # Errors
/// The database's.
pub async fn permit_signer(store: &Store, now: Timestamp) -> Result<PermitSecret, StoreError> {
    let mut fresh = zeroize::Zeroizing::new([0; 32]);
    check::fill_random(&mut *fresh);
    let mut tx = store.write().await?;
    let seed = tx.permit_seed(&fresh, now).await?;
    tx.commit().await?;
    PermitSecret::from_seed(&seed).map_err(|_| StoreError::Corrupt { column: "seed" })
}

/// Adds a user.
///
/// # Errors
/// If the login is taken or not legal.
pub async fn create_user(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    network: NetworkId,
    given: &str,
) -> Result<String, CommandError> {
    let login = login(given)?;
    let mut change = Change::begin(store, network, now).await?;
    if change.tx.users(network).await?.len() >= MAX_USERS {
        return Err(CommandError::Limit(Limit::Users));
    }
    if !change.tx.insert_user(&change.network, &login, now).await? {
        return Err(CommandError::Exists {
            kind: NameKind::User,
            name: login,
        });
    }
    let note = Note {
        action: "user.create",
        subject: &login,
        before: String::new(),
        after: String::new(),
    };
    change.commit(actor, note).await?;
    Ok(login)
}

/// A join token to be made.
pub struct NewToken {
    /// Whose the nodes will be.
    pub owner: Owner,
    /// Whether it admits more than one node.
    pub reusable: bool,
    /// Whether its nodes are removed some time after they go offline.
    pub ephemeral: bool,
    /// For how long it admits.
    pub valid: Duration,
}

/// Makes a join token. Its secret exists in the returned value and nowhere else.
///
/// # Errors
/// If the user does not exist, a tag is not legal, or it would be valid for too long.
pub async fn create_token(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    network: NetworkId,
    new: NewToken,
) -> Result<(TokenSecret, TokenRow), CommandError> {
    if new.valid.is_zero() || new.valid > MAX_TOKEN_VALIDITY {
        return Err(CommandError::Validity);
    }
    let owner = match new.owner {
        Owner::User(given) => Owner::User(login(&given)?),
        Owner::Tags(tags) => Owner::Tags(owner_tags(tags)?),
    };
    let mut change = Change::begin(store, network, now).await?;
    if let Owner::User(login) = &owner {
        let users = change.tx.users(network).await?;
        if !users.contains(login) {
            let near = nearest(login, users.iter().map(String::as_str));
            let (kind, name) = (NameKind::User, login.clone());
            return Err(CommandError::Unknown { kind, name, near });
        }
    }
    let mut random = zeroize::Zeroizing::new([0; TOKEN_SECRET_BYTES]);
    check::fill_random(&mut *random);
    let secret = TokenSecret::from_bytes(*random);
    let row = TokenRow {
        network,
        owner,
        reusable: new.reusable,
        ephemeral: new.ephemeral,
        created: now,
        expires: now.after(new.valid),
    };
    change.tx.insert_token(TokenHash::of(&secret), &row).await?;
    let subject = owner_text(&row.owner);
    let kind = if row.reusable {
        "reusable"
    } else {
        "single use"
    };
    let life = if row.ephemeral { ", ephemeral" } else { "" };
    let after = format!("{kind}{life}, until {}", row.expires);
    let note = Note {
        action: "token.create",
        subject: &subject,
        before: String::new(),
        after,
    };
    change.commit(actor, note).await?;
    Ok((secret, row))
}

/// The owner, for people.
#[must_use]
pub fn owner_text(owner: &Owner) -> String {
    match owner {
        Owner::User(login) => login.clone(),
        Owner::Tags(tags) => tags.iter().cloned().collect::<Vec<_>>().join(","),
    }
}

/// Replaces the policy, if it is right, compiles for the nodes as they are, and passes its own
/// tests. The text is kept as it is, with its comments. Returns what was in force before, and where.
///
/// # Errors
/// [`CommandError::Policy`] with every fault, line and column.
pub async fn set_policy(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    network: NetworkId,
    text: &str,
) -> Result<InForce, CommandError> {
    let parsed = policy::parse(text).map_err(CommandError::Policy)?;
    policy::check_write(&parsed).map_err(|fault| CommandError::Policy(fault.into()))?;
    let mut change = Change::begin(store, network, now).await?;
    let before = change.tx.policy(network).await?;
    let same = before.as_deref() == Some(text);
    if !same {
        change.tx.set_policy(&change.network, text).await?;
    }
    let missing = StoreError::Corrupt { column: "network" };
    let rows = change.tx.load(network, None).await?.ok_or(missing)?;
    let snapshot = Snapshot::build(rows).map_err(CommandError::Policy)?;
    let directory = snapshot.directory();
    if !same {
        policy::run_tests(&parsed, &directory).map_err(CommandError::Policy)?;
        let note = Note {
            action: "policy.set",
            subject: "policy",
            before: before.clone().unwrap_or_default(),
            after: text.to_owned(),
        };
        change.commit(actor, note).await?;
    }
    Ok(InForce {
        policy: before,
        directory,
    })
}

/// A policy and the network that it is in force for.
pub struct InForce {
    /// Its text; `None`: nobody may talk with anybody.
    pub policy: Option<String>,
    /// The users and nodes.
    pub directory: Directory,
}

/// The policy as it is in force now.
///
/// # Errors
/// The database's.
pub async fn in_force(store: &Store, network: NetworkId) -> Result<InForce, CommandError> {
    let missing = StoreError::Corrupt { column: "network" };
    let rows = store
        .read()
        .await?
        .load(network, None)
        .await?
        .ok_or(missing)?;
    let policy = rows.policy.as_ref().and_then(|(_, text)| text.clone());
    let snapshot = Snapshot::build(rows).map_err(CommandError::Policy)?;
    Ok(InForce {
        policy,
        directory: snapshot.directory(),
    })
}

impl InForce {
    /// Who may reach more or less once the policy is `text`. Takes up to seconds in a large network:
    /// not for a thread that has others to serve.
    ///
    /// # Errors
    /// The faults of either policy, or that too much differs.
    pub fn diff(&self, text: &str) -> Result<Diff, CompareError> {
        let compiled = |text: &str| {
            let policy = policy::parse(text)?;
            policy::check_write(&policy)?;
            Compiled::new(&policy, &self.directory)
        };
        let old = self.policy.as_deref().unwrap_or("{\"acls\": []}");
        let old = compiled(old).map_err(CompareError::Old)?;
        let new = compiled(text).map_err(CompareError::New)?;
        Ok(policy::diff(&old, &new, &self.directory)?)
    }
}

/// Why two policies cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The one in force cannot be read (any more).
    #[error("the policy in force cannot be compared with:\n{}", .0.render("policy"))]
    Old(Diagnostics),
    /// The new one is wrong.
    #[error("the policy would be refused:\n{}", .0.render("policy"))]
    New(Diagnostics),
    /// Too much differs.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

/// The policy as it was written, or `None`: nobody may talk with anybody.
///
/// # Errors
/// The database's.
pub async fn policy(store: &Store, network: NetworkId) -> Result<Option<String>, CommandError> {
    Ok(store.read().await?.policy(network).await?)
}

/// The network and its nodes, by name.
///
/// # Errors
/// The database's.
pub async fn nodes(store: &Store, network: NetworkId) -> Result<Vec<NodeRow>, CommandError> {
    let mut nodes = store.read().await?.nodes(network).await?;
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(nodes)
}

/// The audit log, oldest first, and whether it is whole.
///
/// # Errors
/// The database's.
pub async fn audit(
    store: &Store,
    network: NetworkId,
) -> Result<(Vec<AuditRow>, Chain), CommandError> {
    Ok(store.read().await?.audit(network).await?)
}

/// Takes a node out of the network: its peers forget it, and it may not come back without a token.
///
/// # Errors
/// If there is no such node.
pub async fn remove_node(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    network: NetworkId,
    name: &str,
) -> Result<NodeId, CommandError> {
    let mut change = Change::begin(store, network, now).await?;
    let row = node_named(&mut change.tx, network, name).await?;
    change.tx.delete_node(&change.network, row.id).await?;
    let before = row.key.to_string();
    let note = Note {
        action: "node.remove",
        subject: &row.name,
        before,
        after: String::new(),
    };
    change.commit(actor, note).await?;
    Ok(row.id)
}

/// Lets a node serve a route that it offers.
///
/// # Errors
/// If there is no such node, it does not offer the route, or another node serves part of it.
pub async fn approve_route(
    store: &Store,
    now: Timestamp,
    actor: &Actor,
    network: NetworkId,
    (name, route): (&str, Prefix),
) -> Result<(), CommandError> {
    let mut change = Change::begin(store, network, now).await?;
    let mut row = node_named(&mut change.tx, network, name).await?;
    if row.approved.contains(&route) {
        return Ok(());
    }
    if !row.advertised.contains(&route) {
        let (node, offered) = (row.name, row.advertised);
        return Err(CommandError::NotOffered {
            node,
            route,
            offered,
        });
    }
    for other in change.tx.nodes(network).await? {
        let taken = other
            .approved
            .iter()
            .find(|approved| approved.overlaps(&route));
        if let Some(taken) = taken.filter(|_| other.id != row.id) {
            let (other, node) = (*taken, other.name);
            return Err(CommandError::RouteTaken { route, other, node });
        }
    }
    row.approved.insert(route);
    change.tx.update_node(&change.network, &row).await?;
    let note = Note {
        action: "route.approve",
        subject: &row.name,
        before: String::new(),
        after: route.to_string(),
    };
    change.commit(actor, note).await?;
    Ok(())
}

async fn node_named(tx: &mut Tx, network: NetworkId, name: &str) -> Result<NodeRow, CommandError> {
    let nodes = tx.nodes(network).await?;
    let near = nearest(name, nodes.iter().map(|node| node.name.as_str()));
    nodes
        .into_iter()
        .find(|node| node.name == name)
        .ok_or_else(|| CommandError::Unknown {
            kind: NameKind::Node,
            name: name.to_owned(),
            near,
        })
}
