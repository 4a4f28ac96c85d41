//! Why a connection is allowed or denied, straight from the document.
//!
//! An [`Explainer`] asks every rule of the policy about one first packet and says which one allows it,
//! with the selectors that matched; or, if none does, the rules that came closest and what each
//! was missing. It shares no code with the compiler beyond the meaning of names, and a property
//! test holds the two together.

use super::addrset::AddrSet;
use super::compile::internet;
use super::directory::{Directory, DirectoryNode};
use super::document::{Access, Destination, Policy, Section, Span, Spanned};
use super::render::Resolver;
use super::selector::{Autogroup, Target};
use crate::net::{PortRange, Protocol};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Most rules that are named as near misses.
const MAX_NEAR_MISSES: usize = 3;

/// One first packet: who initiates what to whom.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol.
    pub protocol: Protocol,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
}

/// The answer to one [`Flow`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Whether policy allows it.
    pub allowed: bool,
    /// The node that owns the source address.
    pub src_node: Option<String>,
    /// The node that owns the destination address.
    pub dst_node: Option<String>,
    /// The rule that allows it.
    pub rule: Option<RuleMatch>,
    /// When it is denied: the rules that came closest.
    pub near: Vec<NearMiss>,
}

/// Where a rule stands in the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RulePlace {
    /// `acls` or `grants`.
    pub section: &'static str,
    /// Place in its section, from 0.
    pub index: u32,
    /// Line, from 1.
    pub line: u32,
}

/// A rule that allows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RuleMatch {
    /// Which one.
    #[serde(flatten)]
    pub place: RulePlace,
    /// The source selector that matched, as written.
    pub src: String,
    /// The destination selector that matched, as written.
    pub dst: String,
}

/// A rule that does not allow, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearMiss {
    /// Which one.
    #[serde(flatten)]
    pub place: RulePlace,
    /// What it was missing, in a sentence.
    pub why: String,
}

/// Answers many flows about one policy in one network.
pub struct Explainer<'p> {
    resolver: Resolver<'p>,
    rules: Vec<Prepared<'p>>,
    owners: BTreeMap<IpAddr, &'p DirectoryNode>,
    everyone: AddrSet,
    internet: AddrSet,
}

/// A rule whose selectors were resolved once.
struct Prepared<'p> {
    access: &'p Access,
    srcs: Vec<(Span, Matcher<'p>)>,
    dsts: Vec<(Span, Matcher<'p>, &'p [PortRange])>,
}

/// What a selector asks of an address.
enum Matcher<'p> {
    Everything,
    Everyone,
    Internet,
    SameUser,
    Addrs(Cow<'p, AddrSet>),
    Owner(&'p Target),
}

impl<'p> Explainer<'p> {
    /// Prepares the rules of `policy` for the network in `directory`.
    #[must_use]
    pub fn new(policy: &'p Policy, directory: &'p Directory) -> Self {
        let resolver = Resolver { policy, directory };
        let nodes = directory.nodes.values();
        let owners = nodes
            .clone()
            .flat_map(|node| node.addrs.iter().map(move |addr| (*addr, node)));
        let routes = nodes.clone().flat_map(DirectoryNode::subnet_routes);
        let network = [directory.v4, directory.v6];
        Self {
            resolver,
            rules: policy
                .access()
                .map(|access| prepare(resolver, access))
                .collect(),
            everyone: AddrSet::of(network.iter().chain(routes)),
            internet: AddrSet::of(&internet(directory)),
            owners: owners.collect(),
        }
    }

    /// Why a flow is allowed or denied.
    #[must_use]
    pub fn explain(&self, flow: &Flow) -> Explanation {
        let judge = Judge {
            explainer: self,
            flow,
            src: self.owners.get(&flow.src).copied(),
            dst: self.owners.get(&flow.dst).copied(),
        };
        let mut near: Vec<(u8, NearMiss)> = Vec::new();
        let mut rule = None;
        for prepared in &self.rules {
            match judge.rule(prepared) {
                Ok(matched) => {
                    rule = Some(matched);
                    near.clear();
                    break;
                }
                Err((missing, why)) => {
                    let place = place(prepared.access);
                    near.push((missing, NearMiss { place, why }));
                }
            }
        }
        near.sort_by_key(|(missing, _)| *missing);
        Explanation {
            allowed: rule.is_some(),
            src_node: judge.src.map(|node| node.name.clone()),
            dst_node: judge.dst.map(|node| node.name.clone()),
            near: near
                .into_iter()
                .map(|(_, miss)| miss)
                .take(MAX_NEAR_MISSES)
                .collect(),
            rule,
        }
    }
}

/// Why one flow is allowed or denied; for many of them prepare an [`Explainer`].
#[must_use]
pub fn explain(policy: &Policy, directory: &Directory, flow: &Flow) -> Explanation {
    Explainer::new(policy, directory).explain(flow)
}

fn prepare<'p>(resolver: Resolver<'p>, access: &'p Access) -> Prepared<'p> {
    let src = |src: &'p Spanned<Target>| {
        let matcher = match &src.value {
            Target::Any => Matcher::Everyone,
            Target::Autogroup(Autogroup::DangerAll) => Matcher::Everything,
            other => named(resolver, other),
        };
        (src.span, matcher)
    };
    let dst = |dst: &'p Destination| {
        let matcher = match &dst.target.value {
            Target::Any => Matcher::Everything,
            Target::Autogroup(Autogroup::Internet) => Matcher::Internet,
            Target::Autogroup(Autogroup::SelfNodes) => Matcher::SameUser,
            other => named(resolver, other),
        };
        (dst.target.span, matcher, &dst.ports[..])
    };
    Prepared {
        access,
        srcs: access.srcs.iter().map(src).collect(),
        dsts: access.dsts.iter().map(dst).collect(),
    }
}

/// A selector that means the same as a source and as a destination.
fn named<'p>(resolver: Resolver<'p>, target: &'p Target) -> Matcher<'p> {
    match target {
        Target::Ipset(name) => match resolver.policy.ipset_addrs.get(name) {
            Some(set) => Matcher::Addrs(Cow::Borrowed(set)),
            None => Matcher::Addrs(Cow::default()),
        },
        Target::Host(_) | Target::Addrs(_) => Matcher::Addrs(Cow::Owned(resolver.set(target))),
        Target::Any
        | Target::Autogroup(_)
        | Target::User(_)
        | Target::Domain(_)
        | Target::Group(_)
        | Target::Tag(_)
        | Target::Service(_) => Matcher::Owner(target),
    }
}

fn place(access: &Access) -> RulePlace {
    RulePlace {
        section: match access.section {
            Section::Acls => "acls",
            Section::Grants => "grants",
        },
        index: access.index,
        line: access.line,
    }
}

impl Explanation {
    /// The answer in sentences.
    #[must_use]
    pub fn sentences(&self) -> String {
        let Some(rule) = &self.rule else {
            let mut out = "denied: no rule allows it".to_owned();
            for miss in &self.near {
                let RulePlace {
                    section,
                    index,
                    line,
                } = &miss.place;
                out += &format!("\n  {section}[{index}] at line {line}: {}", miss.why);
            }
            return out;
        };
        let RulePlace {
            section,
            index,
            line,
        } = &rule.place;
        format!(
            "allowed by {section}[{index}] at line {line}: source {}, destination {}",
            rule.src, rule.dst
        )
    }
}

/// One flow before the rules.
struct Judge<'e, 'p> {
    explainer: &'e Explainer<'p>,
    flow: &'e Flow,
    src: Option<&'p DirectoryNode>,
    dst: Option<&'p DirectoryNode>,
}

impl Judge<'_, '_> {
    /// The match, or how far the rule was from one (less is nearer) and why.
    fn rule(&self, rule: &Prepared<'_>) -> Result<RuleMatch, (u8, String)> {
        let Flow { src, dst, .. } = *self.flow;
        let source = rule
            .srcs
            .iter()
            .find(|(_, matcher)| self.fits(matcher, src, self.src));
        let fits = |(_, matcher, _): &&(_, Matcher<'_>, _)| self.fits(matcher, dst, self.dst);
        let mut dsts = rule.dsts.iter().filter(fits).peekable();
        let Some((src_span, _)) = source else {
            let missing = if dsts.peek().is_some() { 2 } else { 4 };
            return Err((missing, "the source is none of its `src`".to_owned()));
        };
        if dsts.peek().is_none() {
            return Err((3, "the destination is none of its `dst`".to_owned()));
        }
        let mut why = "it allows other protocols".to_owned();
        for (dst_span, matcher, ports) in dsts {
            match self.service(rule.access, ports) {
                Ok(()) => {
                    self.conditions(rule.access, matcher)?;
                    return Ok(RuleMatch {
                        place: place(rule.access),
                        src: self.written(*src_span),
                        dst: self.written(*dst_span),
                    });
                }
                Err(reason) => why = reason,
            }
        }
        Err((1, why))
    }

    fn fits(&self, matcher: &Matcher<'_>, addr: IpAddr, node: Option<&DirectoryNode>) -> bool {
        let explainer = self.explainer;
        match matcher {
            Matcher::Everything => true,
            Matcher::Everyone => explainer.everyone.contains(addr),
            Matcher::Internet => explainer.internet.contains(addr),
            Matcher::Addrs(set) => set.contains(addr),
            Matcher::Owner(target) => {
                node.is_some_and(|node| explainer.resolver.names(target, node))
            }
            Matcher::SameUser => {
                let src = self.src.and_then(DirectoryNode::login);
                src.is_some() && src == node.and_then(DirectoryNode::login)
            }
        }
    }

    /// The text of a selector, without its quotes.
    fn written(&self, span: Span) -> String {
        let text = self.explainer.resolver.policy.text();
        let part = text
            .get(span.start as usize..span.end as usize)
            .unwrap_or_default();
        part.trim_matches('"').to_owned()
    }

    fn service(&self, access: &Access, dst_ports: &[PortRange]) -> Result<(), String> {
        if access.services.is_empty() {
            return Err("it grants capabilities, no connections".to_owned());
        }
        let mut ports_seen = Vec::new();
        for service in &access.services {
            if !service.protocols.list().contains(&self.flow.protocol) {
                continue;
            }
            let ports = match access.section {
                Section::Acls => dst_ports,
                Section::Grants => &service.ports,
            };
            let open = |ports: &PortRange| ports.contains(self.flow.port);
            if !self.flow.protocol.has_ports() || ports.iter().any(open) {
                return Ok(());
            }
            ports_seen.extend(ports.iter().map(ToString::to_string));
        }
        Err(if ports_seen.is_empty() {
            format!("it does not allow protocol {}", self.flow.protocol)
        } else {
            format!(
                "it allows ports {}, not {}",
                ports_seen.join(","),
                self.flow.port
            )
        })
    }

    /// `via` and `srcPosture`.
    fn conditions(&self, access: &Access, dst: &Matcher<'_>) -> Result<(), (u8, String)> {
        let policy = self.explainer.resolver.policy;
        if !access.postures.is_empty() || !policy.default_src_posture.is_empty() {
            return Err((0, "the source's posture is not known".to_owned()));
        }
        if access.via.is_empty() || self.through(access, dst) {
            return Ok(());
        }
        Err((
            0,
            "no router with a tag of its `via` serves the destination".to_owned(),
        ))
    }

    /// Whether a router that `via` names serves the destination.
    fn through(&self, access: &Access, dst: &Matcher<'_>) -> bool {
        let Resolver { directory, .. } = self.explainer.resolver;
        let tagged = |node: &DirectoryNode| {
            let mut via = access.via.iter();
            via.any(|via| self.explainer.resolver.names(&via.value, node))
        };
        let beyond = matches!(dst, Matcher::Everything | Matcher::Internet)
            && self.explainer.internet.contains(self.flow.dst);
        let serves = |node: &DirectoryNode| {
            node.subnet_routes()
                .any(|route| route.contains(self.flow.dst))
                || (beyond && node.is_exit())
        };
        let mut nodes = directory.nodes.values();
        self.dst.is_none() && nodes.any(|node| tagged(node) && serves(node))
    }
}
