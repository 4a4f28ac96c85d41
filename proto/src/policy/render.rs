//! The policy in the form in which a hosted control plane hands it to its nodes.
//!
//! Used by `weir policy compile` and by the captures: what an existing network would be told, in
//! that plane's own field names, so that a policy can be moved here and compared. Nothing of it is
//! enforced; the kernel enforces what `compile` makes of the same document.
//!
//! How that plane writes things, as the captures show it:
//! - `*` as a source is the CGNAT range without 100.115.92.0/23 (ChromeOS uses it), the network's
//!   IPv6 prefix, and every approved subnet route; each further source is listed beside it.
//! - `*` as a destination stays `*`; a tag, user or group becomes the addresses of the node at
//!   hand; a prefix stays as written where the node has an address or an approved route in it.
//! - Rules with equal sources and protocols are joined; destinations are not made unique.
//! - Capabilities are rules of their own and are never joined. Some have a companion in the other
//!   direction (who shares drives learns it from the rule that lets others use them).
//! - A rule with `via` exists only on nodes with that tag that serve the destination.

use super::addrset::AddrSet;
use super::directory::{Directory, DirectoryNode};
use super::document::{Access, Policy, Section};
use super::selector::{Autogroup, Protocols, Target};
use crate::id::NodeId;
use crate::net::{PortRange, Prefix};
use crate::netmap::Owner;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

/// Left out of `*`: ChromeOS gives these addresses to its containers.
const CHROME_OS: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 115, 92, 0), 23);

/// Capabilities whose holders get a companion capability at the sources.
const COMPANIONS: [(&str, &str); 2] = [
    ("tailscale.com/cap/drive", "tailscale.com/cap/drive-sharer"),
    ("tailscale.com/cap/relay", "tailscale.com/cap/relay-target"),
];

/// One rule of a node's filter.
pub(super) struct HostedRule {
    srcs: BTreeSet<String>,
    src_set: AddrSet,
    grants: Grants,
}

enum Grants {
    Ports {
        dsts: Vec<(Place, PortRange)>,
        protocols: Protocols,
    },
    Caps(Vec<(Map<String, Value>, Vec<Prefix>)>),
}

/// A destination as written.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Everything,
    At(Prefix),
}

/// Sources of an access rule, resolved once for all nodes.
struct Sources {
    texts: BTreeSet<String>,
    set: AddrSet,
}

/// A policy and the network that it is rendered for.
pub(super) struct Renderer<'p> {
    policy: &'p Policy,
    pub(super) directory: &'p Directory,
    sources: Vec<(&'p Access, Sources)>,
}

impl<'p> Renderer<'p> {
    pub(super) fn new(policy: &'p Policy, directory: &'p Directory) -> Self {
        let resolver = Resolver { policy, directory };
        let access = policy
            .access()
            .map(|access| (access, resolver.sources(access)));
        Self {
            policy,
            directory,
            sources: access.collect(),
        }
    }

    fn resolver(&self) -> Resolver<'p> {
        Resolver {
            policy: self.policy,
            directory: self.directory,
        }
    }

    /// The filter of one node.
    pub(super) fn rules(&self, node: &DirectoryNode) -> Vec<HostedRule> {
        if !self.policy.says_access() {
            return vec![self.allow_all()];
        }
        let mut out = Vec::new();
        for (access, sources) in &self.sources {
            if access.srcs.is_empty() || access.dsts.is_empty() || !access.postures.is_empty() {
                continue;
            }
            if access.via.is_empty() {
                self.direct(access, sources, node, &mut out);
            } else {
                self.via(access, sources, node, &mut out);
            }
        }
        joined(out)
    }

    fn allow_all(&self) -> HostedRule {
        let sources = self.resolver().everyone();
        HostedRule {
            srcs: sources.texts,
            src_set: sources.set,
            grants: Grants::Ports {
                dsts: vec![(Place::Everything, PortRange::ALL)],
                protocols: Protocols::Usual,
            },
        }
    }

    fn direct(
        &self,
        access: &Access,
        sources: &Sources,
        node: &DirectoryNode,
        out: &mut Vec<HostedRule>,
    ) {
        let resolver = self.resolver();
        for (protocols, ports) in by_protocol(access) {
            let mut dsts = Vec::new();
            for dst in &access.dsts {
                let ports = match access.section {
                    Section::Acls => &dst.ports,
                    Section::Grants => &ports,
                };
                for place in resolver.places(&dst.target.value, node) {
                    dsts.extend(ports.iter().map(|ports| (place.clone(), *ports)));
                }
            }
            push_ports(sources, dsts, &protocols, out);
            self.to_self(access, sources, node, &protocols, &ports, out);
        }
        if !access.app.is_empty() {
            self.capabilities(access, sources, node, out);
        }
    }

    /// `autogroup:self` on a node with a user: from and to that user's nodes.
    fn to_self(
        &self,
        access: &Access,
        sources: &Sources,
        node: &DirectoryNode,
        protocols: &Protocols,
        grant_ports: &[PortRange],
        out: &mut Vec<HostedRule>,
    ) {
        let mut dsts = Vec::new();
        for dst in access.dsts.iter().filter(|dst| is_self(&dst.target.value)) {
            let ports = match access.section {
                Section::Acls => &dst.ports[..],
                Section::Grants => grant_ports,
            };
            for addr in &node.addrs {
                let place = Place::At(Prefix::host(*addr));
                dsts.extend(ports.iter().map(|ports| (place.clone(), *ports)));
            }
        }
        if let Some(own) = self.resolver().same_user(node, sources) {
            push_ports(&own, dsts, protocols, out);
        }
    }

    fn via(
        &self,
        access: &Access,
        sources: &Sources,
        node: &DirectoryNode,
        out: &mut Vec<HostedRule>,
    ) {
        let tagged = |target: &Target| matches!(target, Target::Tag(tag) if node.tags().any(|own| own == tag));
        if !access.via.iter().any(|via| tagged(&via.value)) {
            return;
        }
        let resolver = self.resolver();
        for (protocols, ports) in by_protocol(access) {
            let mut dsts = Vec::new();
            for dst in &access.dsts {
                for place in resolver.routed_places(&dst.target.value, node) {
                    dsts.extend(ports.iter().map(|ports| (place.clone(), *ports)));
                }
            }
            push_ports(sources, dsts, &protocols, out);
        }
    }

    /// The capabilities that sources get at this node, and their companions at the sources.
    fn capabilities(
        &self,
        access: &Access,
        sources: &Sources,
        node: &DirectoryNode,
        out: &mut Vec<HostedRule>,
    ) {
        let resolver = self.resolver();
        let caps: Map<String, Value> = access
            .app
            .iter()
            .map(|(name, values)| (name.clone(), Value::Array(values.clone())))
            .collect();
        let own: Vec<Prefix> = node.addrs.iter().copied().map(Prefix::host).collect();
        let others = access.dsts.iter().filter(|dst| !is_self(&dst.target.value));
        let mut grants = Vec::new();
        let mut dst_sources = Sources::empty();
        for dst in others {
            let set = resolver.set(&dst.target.value);
            dst_sources.join(resolver.source(&dst.target.value));
            push_caps(&caps, &own, &set, &mut grants);
        }
        push_grants(sources, grants, out);
        companions(access, &dst_sources, &sources.set, &own, out);
        if access.dsts.iter().any(|dst| is_self(&dst.target.value))
            && let Some(same) = resolver.same_user(node, sources)
        {
            let mut grants = Vec::new();
            push_caps(&caps, &own, &same.set, &mut grants);
            push_grants(&same, grants, out);
            companions(access, &same, &same.set, &own, out);
        }
    }

    /// Who may see whom, and which routes of a peer each node is told. Both come from the filters.
    pub(super) fn visibility(&self, filters: &BTreeMap<NodeId, Vec<HostedRule>>) -> Visibility {
        let primaries = primaries(self.directory);
        let mut out = Visibility::default();
        for (id, node) in &self.directory.nodes {
            let rules = filters.get(id).map_or(&[][..], Vec::as_slice);
            for (other_id, other) in self
                .directory
                .nodes
                .iter()
                .filter(|(other, _)| *other != id)
            {
                let reached: Vec<&HostedRule> = rules
                    .iter()
                    .filter(|rule| matches_node(&rule.src_set, other))
                    .collect();
                let exit = node.is_exit() && self.reaches_internet(other);
                if reached.is_empty() && !exit {
                    continue;
                }
                out.peers.insert((*id, *other_id));
                out.peers.insert((*other_id, *id));
                for route in node
                    .routes
                    .iter()
                    .filter(|route| primaries.get(*route).is_none_or(|p| p == id))
                {
                    if reached.iter().any(|rule| rule.reaches(route)) || (exit && route.len() == 0)
                    {
                        out.routes
                            .entry((*other_id, *id))
                            .or_default()
                            .insert(*route);
                    }
                }
                for route in other
                    .subnet_routes()
                    .filter(|route| primaries.get(*route).is_none_or(|p| p == other_id))
                {
                    if reached.iter().any(|rule| rule.src_set.overlaps(route)) {
                        out.routes
                            .entry((*id, *other_id))
                            .or_default()
                            .insert(*route);
                    }
                }
            }
        }
        out
    }

    /// Whether some rule lets the node out through exit nodes.
    fn reaches_internet(&self, node: &DirectoryNode) -> bool {
        let to_internet = |access: &Access| {
            let internet = Target::Autogroup(Autogroup::Internet);
            access.via.is_empty() && access.dsts.iter().any(|dst| dst.target.value == internet)
        };
        let mut rules = self
            .sources
            .iter()
            .filter(|(access, _)| to_internet(access));
        rules.any(|(_, sources)| matches_node(&sources.set, node))
    }
}

/// Who sees whom: (viewer, peer), and which of the peer's routes the viewer is told.
#[derive(Default)]
pub(super) struct Visibility {
    pub(super) peers: BTreeSet<(NodeId, NodeId)>,
    pub(super) routes: BTreeMap<(NodeId, NodeId), BTreeSet<Prefix>>,
}

/// Of several routers that serve the same subnet one is primary: the last by name.
fn primaries(directory: &Directory) -> BTreeMap<Prefix, NodeId> {
    let mut out: BTreeMap<Prefix, (&str, NodeId)> = BTreeMap::new();
    for (id, node) in &directory.nodes {
        for route in node.subnet_routes() {
            let best = out.entry(*route).or_insert((&node.name, *id));
            *best = (*best).max((&node.name, *id));
        }
    }
    out.into_iter()
        .map(|(route, (_, id))| (route, id))
        .collect()
}

/// Whether a node has an address in the set, or serves a route that overlaps it.
fn matches_node(set: &AddrSet, node: &DirectoryNode) -> bool {
    node.addrs.iter().any(|addr| set.contains(*addr))
        || node.subnet_routes().any(|route| set.overlaps(route))
}

pub(super) fn is_self(target: &Target) -> bool {
    *target == Target::Autogroup(Autogroup::SelfNodes)
}

/// What an access rule allows, one item per set of protocols. In `acls` the ports come with the
/// destinations and are empty here.
fn by_protocol(access: &Access) -> Vec<(Protocols, Vec<PortRange>)> {
    let mut out: Vec<(Protocols, Vec<PortRange>)> = Vec::new();
    for service in &access.services {
        match out
            .iter_mut()
            .find(|(protocols, _)| *protocols == service.protocols)
        {
            Some((_, ports)) => ports.extend(&service.ports),
            None => out.push((service.protocols.clone(), service.ports.clone())),
        }
    }
    out
}

fn push_ports(
    sources: &Sources,
    dsts: Vec<(Place, PortRange)>,
    protocols: &Protocols,
    out: &mut Vec<HostedRule>,
) {
    if !dsts.is_empty() && !sources.texts.is_empty() {
        out.push(HostedRule {
            srcs: sources.texts.clone(),
            src_set: sources.set.clone(),
            grants: Grants::Ports {
                dsts,
                protocols: protocols.clone(),
            },
        });
    }
}

/// Capabilities at those of the node's addresses that are in `set`.
fn push_caps(
    caps: &Map<String, Value>,
    own: &[Prefix],
    set: &AddrSet,
    grants: &mut Vec<(Map<String, Value>, Vec<Prefix>)>,
) {
    let here: Vec<Prefix> = own
        .iter()
        .copied()
        .filter(|addr| set.overlaps(addr))
        .collect();
    if !here.is_empty() {
        grants.push((caps.clone(), here));
    }
}

fn push_grants(
    sources: &Sources,
    grants: Vec<(Map<String, Value>, Vec<Prefix>)>,
    out: &mut Vec<HostedRule>,
) {
    if !grants.is_empty() {
        out.push(HostedRule {
            srcs: sources.texts.clone(),
            src_set: sources.set.clone(),
            grants: Grants::Caps(grants),
        });
    }
}

/// The other direction: at a source, the destinations get the companion capability.
fn companions(
    access: &Access,
    dsts: &Sources,
    srcs: &AddrSet,
    own: &[Prefix],
    out: &mut Vec<HostedRule>,
) {
    for (name, companion) in COMPANIONS {
        if access.app.contains_key(name) {
            let caps = Map::from_iter([(companion.to_owned(), Value::Null)]);
            let mut grants = Vec::new();
            push_caps(&caps, own, srcs, &mut grants);
            push_grants(dsts, grants, out);
        }
    }
}

/// Joins port rules with equal sources and protocols.
fn joined(rules: Vec<HostedRule>) -> Vec<HostedRule> {
    let mut out: Vec<HostedRule> = Vec::new();
    let mut seen: BTreeMap<(BTreeSet<String>, Protocols), usize> = BTreeMap::new();
    for rule in rules {
        let Grants::Ports { dsts, protocols } = &rule.grants else {
            out.push(rule);
            continue;
        };
        let at = *seen
            .entry((rule.srcs.clone(), protocols.clone()))
            .or_insert(out.len());
        match out.get_mut(at) {
            Some(HostedRule {
                grants: Grants::Ports { dsts: all, .. },
                ..
            }) => all.extend(dsts.iter().cloned()),
            Some(_) | None => out.push(rule),
        }
    }
    out
}

impl HostedRule {
    /// Whether the rule lets its sources into a route of the node that has it.
    fn reaches(&self, route: &Prefix) -> bool {
        let Grants::Ports { dsts, .. } = &self.grants else {
            return false;
        };
        dsts.iter().any(|(place, _)| match place {
            Place::Everything => true,
            Place::At(prefix) => (route.len() > 0 || prefix.len() == 0) && prefix.overlaps(route),
        })
    }

    /// The rule in the plane's own JSON.
    pub(super) fn to_json(&self) -> Value {
        match &self.grants {
            Grants::Ports { dsts, protocols } => {
                let dsts = dsts.iter().map(|(place, ports)| {
                    let ip = match place {
                        Place::Everything => "*".to_owned(),
                        Place::At(prefix) => short(prefix),
                    };
                    json!({"IP": ip, "Ports": {"First": ports.first(), "Last": ports.last()}})
                });
                let mut out = json!({"SrcIPs": self.srcs, "DstPorts": dsts.collect::<Vec<_>>()});
                if let Protocols::One(protocol) = protocols {
                    out["IPProto"] = json!([protocol.0]);
                }
                out
            }
            Grants::Caps(grants) => {
                let grants = grants
                    .iter()
                    .map(|(caps, dsts)| json!({"CapMap": caps, "Dsts": dsts}));
                json!({"SrcIPs": self.srcs, "CapGrant": grants.collect::<Vec<_>>()})
            }
        }
    }
}

/// A prefix, or just the address if it holds only one.
fn short(prefix: &Prefix) -> String {
    if prefix.is_host() {
        prefix.addr().to_string()
    } else {
        prefix.to_string()
    }
}

/// A range: as a prefix if it is one, otherwise `FIRST-LAST`.
fn range_text((first, last): (IpAddr, IpAddr)) -> String {
    match super::selector::range_to_prefixes(first, last).as_deref() {
        Some([prefix]) => short(prefix),
        _ => format!("{first}-{last}"),
    }
}

impl Sources {
    fn empty() -> Self {
        Self {
            texts: BTreeSet::new(),
            set: AddrSet::default(),
        }
    }

    fn join(&mut self, other: Self) {
        self.texts.extend(other.texts);
        self.set = self.set.union(&other.set);
    }
}

/// Whether a login ends in `@DOMAIN`. Domains know no case.
pub(super) fn in_domain(login: &str, domain: &str) -> bool {
    let own = login.rsplit_once('@').map(|(_, own)| own);
    own.is_some_and(|own| own.eq_ignore_ascii_case(domain))
}

/// What selectors stand for in one network.
#[derive(Clone, Copy)]
pub(super) struct Resolver<'p> {
    pub(super) policy: &'p Policy,
    pub(super) directory: &'p Directory,
}

impl Resolver<'_> {
    fn sources(&self, access: &Access) -> Sources {
        let danger = Target::Autogroup(Autogroup::DangerAll);
        if access.srcs.iter().any(|src| src.value == danger) {
            return self.source(&danger);
        }
        let mut out = Sources::empty();
        for src in &access.srcs {
            out.join(self.source(&src.value));
        }
        out
    }

    /// One selector as a source.
    fn source(&self, target: &Target) -> Sources {
        match target {
            Target::Any => self.everyone(),
            Target::Autogroup(Autogroup::DangerAll) => Sources {
                texts: BTreeSet::from(["*".to_owned()]),
                set: AddrSet::of(&[Prefix::ALL_V4, Prefix::ALL_V6]),
            },
            other => {
                let set = self.set(other);
                let texts = match self.nodes(other) {
                    Some(nodes) => nodes
                        .flat_map(|node| node.addrs.iter().map(ToString::to_string))
                        .collect(),
                    None => set.ranges().map(range_text).collect(),
                };
                Sources { texts, set }
            }
        }
    }

    fn everyone(&self) -> Sources {
        let chrome_os = Prefix::containing(IpAddr::V4(CHROME_OS.0), CHROME_OS.1).ok();
        let network = AddrSet::of(&[self.directory.v4, self.directory.v6]);
        let network = network.without(&AddrSet::of(&chrome_os));
        let nodes = self.directory.nodes.values();
        let routes: Vec<Prefix> = nodes
            .flat_map(DirectoryNode::subnet_routes)
            .copied()
            .collect();
        let mut texts: BTreeSet<String> = network.ranges().map(range_text).collect();
        texts.extend(routes.iter().map(short));
        Sources {
            texts,
            set: network.union(&AddrSet::of(&routes)),
        }
    }

    /// The nodes that a selector names by what they are; `None` if it names addresses.
    pub(super) fn nodes<'a>(
        &'a self,
        target: &'a Target,
    ) -> Option<impl Iterator<Item = &'a DirectoryNode>> {
        let by_owner = !matches!(
            target,
            Target::Any
                | Target::Host(_)
                | Target::Ipset(_)
                | Target::Addrs(_)
                | Target::Autogroup(Autogroup::DangerAll | Autogroup::Internet)
        );
        let nodes = self.directory.nodes.values();
        by_owner.then(move || nodes.filter(move |node| self.names(target, node)))
    }

    /// Whether a selector names a node by its owner.
    pub(super) fn names(&self, target: &Target, node: &DirectoryNode) -> bool {
        match (&node.owner, target) {
            (Owner::Tags(tags), Target::Tag(tag)) => tags.contains(tag),
            (Owner::Tags(_), Target::Autogroup(Autogroup::Tagged)) => true,
            (Owner::Tags(_), _) => false,
            (Owner::User(login), target) => self.names_user(target, login),
        }
    }

    /// Whether a selector names a user.
    pub(super) fn names_user(&self, target: &Target, login: &str) -> bool {
        match target {
            Target::User(name) => name == login,
            Target::Group(group) => {
                let mut members = self.policy.members(group);
                members.any(|member| self.names_user(member, login))
            }
            Target::Domain(domain) => in_domain(login, domain),
            Target::Autogroup(Autogroup::Member) => true,
            Target::Autogroup(Autogroup::Role(role)) => {
                let mut users = self.directory.users.iter();
                users.any(|user| user.login == login && user.roles.contains(role))
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::Tag(_)
            | Target::Host(_)
            | Target::Ipset(_)
            | Target::Service(_)
            | Target::Addrs(_) => false,
        }
    }

    /// The addresses that a selector stands for.
    pub(super) fn set(&self, target: &Target) -> AddrSet {
        match target {
            Target::Any => self.everyone().set,
            Target::Addrs(list) => AddrSet::of(list),
            Target::Host(name) => AddrSet::of(self.policy.hosts.get(name).map(|host| &host.value)),
            Target::Ipset(name) => self
                .policy
                .ipset_addrs
                .get(name)
                .cloned()
                .unwrap_or_default(),
            other => {
                let nodes = self.nodes(other).into_iter().flatten();
                let addrs: Vec<Prefix> = nodes
                    .flat_map(|node| node.addrs.iter().copied().map(Prefix::host))
                    .collect();
                AddrSet::of(&addrs)
            }
        }
    }

    /// The destinations that a selector means at this node.
    fn places(&self, target: &Target, node: &DirectoryNode) -> Vec<Place> {
        if *target == Target::Any {
            return vec![Place::Everything];
        }
        if self.nodes(target).is_some() {
            let own = self.names(target, node).then_some(&node.addrs);
            let host = |addr: &IpAddr| Place::At(Prefix::host(*addr));
            return own.into_iter().flatten().map(host).collect();
        }
        let here = |prefix: &Prefix| matches_node(&AddrSet::of([prefix]), node);
        let prefixes = self.set(target).prefixes();
        prefixes.into_iter().filter(here).map(Place::At).collect()
    }

    /// The destinations of a `via` rule that this node serves.
    fn routed_places(&self, target: &Target, node: &DirectoryNode) -> Vec<Place> {
        match target {
            Target::Any if !node.routes.is_empty() => vec![Place::Everything],
            Target::Autogroup(Autogroup::Internet) => node
                .routes
                .iter()
                .filter(|route| route.len() == 0)
                .copied()
                .map(Place::At)
                .collect(),
            Target::Addrs(_) | Target::Host(_) | Target::Ipset(_) => {
                let served =
                    |prefix: &Prefix| node.subnet_routes().any(|route| route.overlaps(prefix));
                self.set(target)
                    .prefixes()
                    .into_iter()
                    .filter(served)
                    .map(Place::At)
                    .collect()
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => Vec::new(),
        }
    }

    /// The nodes of the same user that the sources name; `None` on a tagged node or without any.
    fn same_user(&self, node: &DirectoryNode, sources: &Sources) -> Option<Sources> {
        let login = node.login()?;
        let same = self
            .directory
            .nodes
            .values()
            .filter(|other| other.login() == Some(login));
        let named = same.filter(|other| other.addrs.iter().any(|addr| sources.set.contains(*addr)));
        let addrs: Vec<IpAddr> = named
            .flat_map(|other| other.addrs.iter().copied())
            .collect();
        let hosts: Vec<Prefix> = addrs.iter().copied().map(Prefix::host).collect();
        (!addrs.is_empty()).then(|| Sources {
            texts: addrs.iter().map(ToString::to_string).collect(),
            set: AddrSet::of(&hosts),
        })
    }
}
