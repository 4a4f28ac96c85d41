//! Why a connection is allowed or denied, straight from the document.
//!
//! [`explain`] asks every rule of the policy about one first packet and says which one allows it,
//! with the selectors that matched; or, if none does, the rules that came closest and what each
//! was missing. It shares no code with the compiler beyond the meaning of names, and a property
//! test holds the two together.

use super::compile::internet;
use super::directory::{Directory, DirectoryNode};
use super::document::{Access, Policy, Section};
use super::render::Resolver;
use super::selector::{Autogroup, Target};
use crate::net::{PortRange, Prefix, Protocol};
use serde::Serialize;
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

/// Why a flow is allowed or denied.
#[must_use]
pub fn explain(policy: &Policy, directory: &Directory, flow: &Flow) -> Explanation {
    let judge = Judge::new(policy, directory, flow);
    let mut near: Vec<(u8, NearMiss)> = Vec::new();
    let mut rule = None;
    for access in policy.access() {
        match judge.rule(access) {
            Ok(matched) => {
                rule = Some(matched);
                break;
            }
            Err((missing, why)) => {
                let place = place(access);
                near.push((missing, NearMiss { place, why }));
            }
        }
    }
    near.sort_by_key(|(missing, _)| *missing);
    let near = near.into_iter().map(|(_, miss)| miss).take(MAX_NEAR_MISSES);
    Explanation {
        allowed: rule.is_some(),
        src_node: judge.src.map(|node| node.name.clone()),
        dst_node: judge.dst.map(|node| node.name.clone()),
        near: if rule.is_some() {
            Vec::new()
        } else {
            near.collect()
        },
        rule,
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
struct Judge<'p> {
    resolver: Resolver<'p>,
    flow: &'p Flow,
    src: Option<&'p DirectoryNode>,
    dst: Option<&'p DirectoryNode>,
}

impl<'p> Judge<'p> {
    fn new(policy: &'p Policy, directory: &'p Directory, flow: &'p Flow) -> Self {
        let owner = |addr: IpAddr| {
            directory
                .nodes
                .values()
                .find(|node| node.addrs.contains(&addr))
        };
        Self {
            resolver: Resolver { policy, directory },
            flow,
            src: owner(flow.src),
            dst: owner(flow.dst),
        }
    }

    /// The match, or how far the rule was from one (less is nearer) and why.
    fn rule(&self, access: &Access) -> Result<RuleMatch, (u8, String)> {
        let src = access.srcs.iter().find(|src| self.is_source(&src.value));
        let mut dsts = access
            .dsts
            .iter()
            .filter(|dst| self.is_destination(&dst.target.value))
            .peekable();
        let Some(src) = src else {
            let missing = if dsts.peek().is_some() { 2 } else { 4 };
            return Err((missing, "the source is none of its `src`".to_owned()));
        };
        if dsts.peek().is_none() {
            return Err((3, "the destination is none of its `dst`".to_owned()));
        }
        let mut why = "it allows other protocols".to_owned();
        for dst in dsts {
            match self.service(access, &dst.ports) {
                Ok(()) => {
                    self.conditions(access)?;
                    return Ok(RuleMatch {
                        place: place(access),
                        src: self.written(src.span),
                        dst: self.written(dst.target.span),
                    });
                }
                Err(reason) => why = reason,
            }
        }
        Err((1, why))
    }

    /// The text of a selector, without its quotes.
    fn written(&self, span: super::document::Span) -> String {
        let text = self.resolver.policy.text();
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
    fn conditions(&self, access: &Access) -> Result<(), (u8, String)> {
        if !access.postures.is_empty() || !self.resolver.policy.default_src_posture.is_empty() {
            return Err((0, "the source's posture is not known".to_owned()));
        }
        if access.via.is_empty() || self.through(access) {
            return Ok(());
        }
        Err((
            0,
            "no router with a tag of its `via` serves the destination".to_owned(),
        ))
    }

    /// Whether a router that `via` names serves the destination.
    fn through(&self, access: &Access) -> bool {
        let tagged = |node: &DirectoryNode| {
            access
                .via
                .iter()
                .any(|via| self.resolver.names(&via.value, node))
        };
        let internet = access
            .dsts
            .iter()
            .any(|dst| dst.target.value == Target::Autogroup(Autogroup::Internet));
        let serves = |node: &DirectoryNode| {
            node.subnet_routes()
                .any(|route| route.contains(self.flow.dst))
                || (internet && node.is_exit())
        };
        let mut nodes = self.resolver.directory.nodes.values();
        self.dst.is_none() && nodes.any(|node| tagged(node) && serves(node))
    }

    fn is_source(&self, target: &Target) -> bool {
        match target {
            Target::Any => {
                let directory = self.resolver.directory;
                let mut routes = directory
                    .nodes
                    .values()
                    .flat_map(DirectoryNode::subnet_routes);
                [directory.v4, directory.v6]
                    .iter()
                    .any(|prefix| prefix.contains(self.flow.src))
                    || routes.any(|route| route.contains(self.flow.src))
            }
            Target::Autogroup(Autogroup::DangerAll) => true,
            other => self.is_named(other, self.flow.src, self.src),
        }
    }

    fn is_destination(&self, target: &Target) -> bool {
        match target {
            Target::Any => true,
            Target::Autogroup(Autogroup::Internet) => {
                let internet = internet(self.resolver.directory);
                internet
                    .iter()
                    .any(|prefix: &Prefix| prefix.contains(self.flow.dst))
            }
            Target::Autogroup(Autogroup::SelfNodes) => {
                let (src, dst) = (
                    self.src.and_then(DirectoryNode::login),
                    self.dst.and_then(DirectoryNode::login),
                );
                src.is_some() && src == dst
            }
            other => self.is_named(other, self.flow.dst, self.dst),
        }
    }

    fn is_named(&self, target: &Target, addr: IpAddr, node: Option<&DirectoryNode>) -> bool {
        match target {
            Target::Host(_) | Target::Ipset(_) | Target::Addrs(_) => {
                self.resolver.set(target).contains(addr)
            }
            Target::Any
            | Target::Autogroup(_)
            | Target::User(_)
            | Target::Domain(_)
            | Target::Group(_)
            | Target::Tag(_)
            | Target::Service(_) => node.is_some_and(|node| self.resolver.names(target, node)),
        }
    }
}
