//! A policy and a described network in, JSON out: what `weir policy compile` prints.
//!
//! The network is described as the captures do it (`topology`): users with email, nodes by name
//! with a user or tags, addresses, advertised and approved routes. Unknown fields are ignored, so
//! that descriptions may carry more than is needed here.

use super::attrs::attributes;
use super::diagnostic::{Code, Diagnostic, Diagnostics};
use super::directory::{Directory, DirectoryNode, DirectoryUser};
use super::document::Policy;
use super::render::{HostedRule, Renderer, Resolver};
use super::selector::Role;
use super::{parse, ssh, trial};
use crate::id::NodeId;
use crate::net::Prefix;
use crate::netmap::Owner;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Nodes' addresses, where a topology does not say otherwise: RFC 6598, and the ULA prefix that
/// the captured networks use.
const DEFAULT_V4: &str = "100.64.0.0/10";
const DEFAULT_V6: &str = "fd7a:115c:a1e0::/48";

/// Why nothing was compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OfflineError {
    /// Stable name of the kind of fault.
    pub code: Code,
    /// All faults as text, each with its line and a caret.
    pub message: String,
    /// Line of the first fault, from 1; 0 if it has none.
    pub line: u32,
    /// Column of the first fault, from 1; 0 if it has none.
    pub column: u32,
}

impl std::fmt::Display for OfflineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for OfflineError {}

impl From<Diagnostics> for OfflineError {
    fn from(faults: Diagnostics) -> Self {
        let first = faults.items.first();
        Self {
            code: first.map_or(Code::Syntax, |fault| fault.code),
            line: first.map_or(0, |fault| fault.line),
            column: first.map_or(0, |fault| fault.column),
            message: faults.render("policy"),
        }
    }
}

impl From<Diagnostic> for OfflineError {
    fn from(fault: Diagnostic) -> Self {
        Diagnostics::from(fault).into()
    }
}

#[derive(Deserialize)]
struct Topology {
    #[serde(default)]
    users: Vec<TopologyUser>,
    nodes: BTreeMap<String, TopologyNode>,
    v4: Option<Prefix>,
    v6: Option<Prefix>,
}

#[derive(Deserialize)]
struct TopologyUser {
    #[serde(default)]
    id: u64,
    name: String,
    #[serde(default)]
    email: String,
    #[serde(default)]
    roles: Option<BTreeSet<String>>,
}

#[derive(Deserialize)]
struct TopologyNode {
    #[serde(default)]
    user: Option<String>,
    #[serde(default, deserialize_with = "or_empty")]
    tags: BTreeSet<String>,
    #[serde(default)]
    ipv4: Option<IpAddr>,
    #[serde(default)]
    ipv6: Option<IpAddr>,
    #[serde(default, deserialize_with = "or_empty")]
    routable_ips: BTreeSet<Prefix>,
    #[serde(default, deserialize_with = "or_empty")]
    approved_routes: BTreeSet<Prefix>,
}

/// `null` is an empty list.
fn or_empty<'de, D, T>(deserializer: D) -> Result<BTreeSet<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Ord,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Compiles `policy_text` for the network that `topology_json` describes, in the hosted control
/// plane's form: `{"nodes": {NAME: {filter, ssh, attrs, peers, routes}}}`. `settings_json`, if
/// given, must be JSON; none of the settings known today changes what policy means.
///
/// # Errors
/// A refused policy, a failing test of its own, or a network that cannot be read.
pub fn compile_offline(
    policy_text: &str,
    topology_json: &str,
    settings_json: Option<&str>,
) -> Result<Value, OfflineError> {
    let policy = parse(policy_text)?;
    let directory = read_topology(topology_json)?;
    settings_json.map_or(Ok(()), check_settings)?;
    trial::check(&policy, &directory)?;
    Ok(render(&policy, &directory))
}

/// Whether a network's settings can be read. None of those known today changes what policy means.
///
/// # Errors
/// If they are no JSON.
pub fn check_settings(settings_json: &str) -> Result<(), OfflineError> {
    let parsed: Result<Value, _> = serde_json::from_str(settings_json);
    let fault = |error| bad_network(&format!("the settings are no JSON: {error}"));
    parsed.map(drop).map_err(fault)
}

/// Reads the description of a network.
///
/// # Errors
/// What is wrong with it; it is never a fault of the policy.
pub fn read_topology(topology_json: &str) -> Result<Directory, OfflineError> {
    let topology: Topology = serde_json::from_str(topology_json)
        .map_err(|error| bad_network(&format!("the network's description: {error}")))?;
    let network = |given: Option<Prefix>, default: &str| {
        let parsed = given.map_or_else(|| default.parse(), Ok);
        parsed.map_err(|error| bad_network(&format!("the network's prefix: {error}")))
    };
    let mut users: Vec<&TopologyUser> = topology.users.iter().collect();
    users.sort_by_key(|user| user.id);
    let logins = users.iter().map(|user| (user.name.as_str(), login(user)));
    let logins: BTreeMap<&str, String> = logins.collect();
    let mut nodes = BTreeMap::new();
    for (number, (name, node)) in topology.nodes.iter().enumerate() {
        nodes.insert(
            NodeId(number as u64 + 1),
            directory_node(name, node, &logins)?,
        );
    }
    let numbered = users.iter().enumerate();
    Ok(Directory {
        v4: network(topology.v4, DEFAULT_V4)?,
        v6: network(topology.v6, DEFAULT_V6)?,
        users: numbered
            .map(|(number, user)| directory_user(user, number == 0))
            .collect(),
        nodes,
    })
}

fn login(user: &TopologyUser) -> String {
    if user.email.is_empty() {
        format!("{}@", user.name).to_ascii_lowercase()
    } else {
        user.email.to_ascii_lowercase()
    }
}

/// Roles, where the description has none: the first user owns the network, all administer it.
fn directory_user(user: &TopologyUser, first: bool) -> DirectoryUser {
    let roles = match &user.roles {
        Some(names) => Role::ALL
            .into_iter()
            .filter(|role| names.contains(role.name()))
            .collect(),
        None if first => BTreeSet::from([Role::Owner, Role::Admin]),
        None => BTreeSet::from([Role::Admin]),
    };
    DirectoryUser {
        login: login(user),
        roles,
    }
}

fn directory_node(
    name: &str,
    node: &TopologyNode,
    logins: &BTreeMap<&str, String>,
) -> Result<DirectoryNode, OfflineError> {
    let owner = match &node.user {
        Some(user) if node.tags.is_empty() => {
            let known = logins.values().find(|login| *login == user);
            let login = logins.get(user.as_str()).or(known);
            let unknown =
                || bad_network(&format!("node `{name}` belongs to unknown user `{user}`"));
            Owner::User(login.cloned().ok_or_else(unknown)?)
        }
        _ => Owner::Tags(node.tags.clone()),
    };
    Ok(DirectoryNode {
        name: name.to_owned(),
        owner,
        addrs: node.ipv4.into_iter().chain(node.ipv6).collect(),
        routes: node.approved_routes.clone(),
        advertised: node.routable_ips.clone(),
    })
}

fn bad_network(message: &str) -> OfflineError {
    OfflineError {
        code: Code::BadNetwork,
        message: message.to_owned(),
        line: 0,
        column: 0,
    }
}

fn render(policy: &Policy, directory: &Directory) -> Value {
    let renderer = Renderer::new(policy, directory);
    let resolver = Resolver { policy, directory };
    let filters = directory
        .nodes
        .iter()
        .map(|(id, node)| (*id, renderer.rules(node)));
    let filters: BTreeMap<NodeId, Vec<HostedRule>> = filters.collect();
    let visibility = renderer.visibility(&filters);
    let mut nodes = Map::new();
    for (id, node) in &directory.nodes {
        let name = |other: &NodeId| directory.nodes.get(other).map_or("", |node| &node.name);
        let mut peers = Vec::new();
        let mut routes = Map::new();
        for (_, peer) in visibility
            .peers
            .range((*id, NodeId(0))..=(*id, NodeId(u64::MAX)))
        {
            let addrs = directory
                .nodes
                .get(peer)
                .into_iter()
                .flat_map(|peer| &peer.addrs);
            let own = addrs.copied().map(Prefix::host);
            let told = visibility
                .routes
                .get(&(*id, *peer))
                .into_iter()
                .flatten()
                .copied();
            let all: Vec<Prefix> = own.chain(told).collect();
            routes.insert(name(peer).to_owned(), json!(all));
            peers.push(name(peer));
        }
        let filter = filters.get(id).into_iter().flatten();
        let ssh = ssh::entries(resolver, node);
        let rendered = json!({
            "filter": filter.map(HostedRule::to_json).collect::<Vec<_>>(),
            "ssh": ssh.iter().map(ssh::SshEntry::to_json).collect::<Vec<_>>(),
            "attrs": attributes(resolver, node),
            "peers": peers,
            "routes": routes,
        });
        nodes.insert(node.name.clone(), rendered);
    }
    json!({ "nodes": nodes })
}
