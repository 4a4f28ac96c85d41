//! Why a first packet passes or does not: the programs' own evaluator on the loaded maps for the
//! verdict, the lowered policy for the rule.
//!
//! The verdict is the maps' alone. The rule is found by the netmap that is in force, whose policy
//! the maps hold but for the moment between a new one and its being written.

use super::answer::not_attached;
use super::{Daemon, refused, send};
use crate::kernel::bpf::First;
use crate::local::report::{End, Explanation, Matched, NearMiss, RuleRef, Verdict};
use crate::local::{Explain, RefusedCode, Response};
use ebpf::abi;
use ebpf::reason::Reason;
use engine::acl::{self, Flow, Lacks};
use proto::filter::{Direction, Rule, Selector};
use proto::net::Protocol;
use proto::netmap::Peer;
use std::collections::BTreeSet;
use std::net::IpAddr;
use tokio::sync::oneshot;

/// What comes first when shields, and not the policy, keep a packet out.
const SHIELDED: &str = "The shields of this node are up: whatever policy says, nothing that others \
                        begin is let in. `weir set --shields-up=false` lowers them.";
/// Most rules that are named as near misses.
const MAX_NEAR: usize = 3;
/// Most selectors or ports of a rule that a sentence lists.
const MAX_LISTED: usize = 4;

impl Daemon {
    pub(super) fn answer_explain(&self, explain: &Explain, reply: oneshot::Sender<Response>) {
        let (src, dst) = match (self.find(&explain.src), self.find(&explain.dst)) {
            (Ok(src), Ok(dst)) => same_family(src, dst),
            (Err(response), _) | (_, Err(response)) => return send(reply, response),
        };
        let Some((src, dst)) = src.zip(dst) else {
            let message = "the two have no addresses of the same family";
            return send(reply, refused(RefusedCode::BadRequest, message, ""));
        };
        let port = explain
            .protocol
            .has_ports()
            .then_some(explain.port)
            .flatten();
        self.explain(src, dst, explain.protocol, port, move |explanation| {
            let response = explanation.map(|found| Response::Explanation(Box::new(found)));
            send(reply, response.unwrap_or_else(not_attached));
        });
    }

    /// What the loaded tables say of a first packet; `None` if none are loaded.
    pub(super) fn explain(
        &self,
        src: IpAddr,
        dst: IpAddr,
        protocol: Protocol,
        port: Option<u16>,
        with: impl FnOnce(Option<Explanation>) + Send + 'static,
    ) {
        let mut explanation = Explanation {
            src: self.end(src),
            dst: self.end(dst),
            protocol,
            port,
            direction: self.direction(src, dst),
            verdict: Verdict::Deny,
            reason: "not_here".to_owned(),
            rule: None,
            matched: None,
            near: Vec::new(),
            sentences: Vec::new(),
        };
        let Some(direction) = explanation.direction else {
            explanation.sentences = elsewhere();
            return with(Some(explanation));
        };
        let flow = Flow {
            src,
            dst,
            protocol,
            port: port.unwrap_or_default(),
        };
        let lowered = self.engine.status().lowered;
        let rule = lowered.allowing(direction, src, dst, protocol, flow.port);
        let rule = rule
            .first()
            .map(|rule| (place(rule), matched(lowered, rule, &flow)));
        let near = near(lowered, direction, &flow, MAX_NEAR);
        let first = first(&flow, direction);
        let shielded = self.settings.shields_up && direction == Direction::Ingress;
        self.ask_maps(
            move |acl| acl.map(|acl| acl.view().explain(&first)),
            move |verdict| {
                with(verdict.map(|verdict| {
                    explanation.reason = verdict.name().to_owned();
                    if verdict.passes() {
                        explanation.verdict = Verdict::Accept;
                        explanation.rule = rule.as_ref().map(|(place, _)| *place);
                        explanation.matched = rule.and_then(|(_, matched)| matched);
                    } else if verdict.reason() == Some(Reason::Policy) {
                        explanation.near = near;
                    }
                    explanation.sentences = sentences(&explanation, verdict.reason(), &flow);
                    if shielded && verdict.reason() == Some(Reason::Policy) {
                        explanation.sentences.insert(0, SHIELDED.to_owned());
                    }
                    explanation
                }));
            },
        );
    }

    /// Which way a first packet would cross the device: whichever end is ours says it.
    fn direction(&self, src: IpAddr, dst: IpAddr) -> Option<Direction> {
        let me = &self.engine.status().netmap?.me;
        let ours = |addr: IpAddr| {
            me.addrs.contains(&addr) || me.routes.iter().any(|route| route.contains(addr))
        };
        match (ours(src), ours(dst)) {
            (true, false) => Some(Direction::Egress),
            (false, true) => Some(Direction::Ingress),
            (true, true) | (false, false) => None,
        }
    }

    pub(super) fn end(&self, addr: IpAddr) -> End {
        let node = self.engine.status().netmap.and_then(|netmap| {
            if netmap.me.addrs.contains(&addr) {
                return Some(netmap.me.name.clone());
            }
            let has = |peer: &&Peer| peer.addrs.contains(&addr);
            netmap
                .peers
                .values()
                .find(has)
                .map(|peer| peer.name.clone())
        });
        End { addr, node }
    }
}

/// One address of each, of a family that both have; IPv4 first.
pub(super) fn same_family(src: Vec<IpAddr>, dst: Vec<IpAddr>) -> (Option<IpAddr>, Option<IpAddr>) {
    let pair = [true, false].into_iter().find_map(|v4| {
        let of = |addrs: &[IpAddr]| addrs.iter().copied().find(|addr| addr.is_ipv4() == v4);
        of(&src).zip(of(&dst))
    });
    pair.unzip()
}

/// The direction in the words of the documents.
pub(super) fn way(direction: abi::Direction) -> Direction {
    match direction {
        abi::Direction::Ingress => Direction::Ingress,
        abi::Direction::Egress => Direction::Egress,
    }
}

fn first(flow: &Flow, direction: Direction) -> First {
    First {
        src: flow.src,
        dst: flow.dst,
        protocol: flow.protocol.0,
        port: flow.port,
        direction: match direction {
            Direction::Ingress => abi::Direction::Ingress,
            Direction::Egress => abi::Direction::Egress,
        },
    }
}

fn place(rule: &Rule) -> RuleRef {
    RuleRef {
        index: rule.index,
        line: rule.line,
    }
}

fn matched(lowered: &acl::Acl, rule: &Rule, flow: &Flow) -> Option<Matched> {
    let found = lowered.matched(rule, flow.src, flow.dst);
    found.map(|(src, dst)| Matched { src, dst })
}

/// The rules that came closest to allowing what none allows, nearest first.
pub(super) fn near(
    lowered: &acl::Acl,
    direction: Direction,
    flow: &Flow,
    limit: usize,
) -> Vec<NearMiss> {
    let written =
        |selectors: &[Selector]| listed(selectors.iter().map(|selector| lowered.written(selector)));
    let miss = |near: acl::Near<'_>| NearMiss {
        rule: place(near.rule),
        why: match near.lacks {
            Lacks::Port => {
                let services = near.rule.services.iter();
                let ports = services
                    .filter(|service| service.speaks(flow.protocol))
                    .map(|service| service.ports.to_string());
                format!(
                    "it allows {} port {}, not {}",
                    flow.protocol,
                    listed(ports),
                    flow.port
                )
            }
            Lacks::Protocol => {
                let services = near.rule.services.iter();
                let spoken: BTreeSet<Protocol> = services.filter_map(|one| one.protocol).collect();
                let spoken = listed(spoken.iter().map(Protocol::to_string));
                format!("it allows {spoken}, not {}", flow.protocol)
            }
            Lacks::Destination => {
                let dsts = written(&near.rule.dsts);
                format!(
                    "it is for {} too, but {} is none of its destinations ({dsts})",
                    flow.src, flow.dst
                )
            }
            Lacks::Source => {
                let srcs = written(&near.rule.srcs);
                format!(
                    "it is for {} too, but {} is none of its sources ({srcs})",
                    flow.dst, flow.src
                )
            }
        },
    };
    let found = lowered.near(direction, flow, limit);
    found.into_iter().map(miss).collect()
}

/// Some of many, and how many more.
fn listed(items: impl Iterator<Item = String>) -> String {
    let mut seen = BTreeSet::new();
    let items: Vec<String> = items.filter(|item| seen.insert(item.clone())).collect();
    let more = items.len().saturating_sub(MAX_LISTED);
    let shown = items[..items.len() - more].join(", ");
    if more == 0 {
        shown
    } else {
        format!("{shown} and {more} more")
    }
}

fn elsewhere() -> Vec<String> {
    vec![
        "Such a packet does not cross this node's device: neither end (or both) is this node or a \
         subnet that it serves."
            .to_owned(),
        "Ask on the node of either end, or ask the policy file: `weir explain SRC DST --policy FILE \
         --network FILE` answers for any two nodes."
            .to_owned(),
    ]
}

fn sentences(explanation: &Explanation, reason: Option<Reason>, flow: &Flow) -> Vec<String> {
    let Explanation {
        rule,
        matched,
        near,
        direction,
        ..
    } = explanation;
    let mut sentences = Vec::new();
    match (reason, rule, matched) {
        (Some(reason), _, _) => {
            sentences.push(why(reason, Some((flow.src, flow.dst))));
            for NearMiss { rule, why } in near {
                let RuleRef { index, line } = rule;
                sentences.push(format!(
                    "Entry {index} of the policy, at line {line}, comes close: {why}."
                ));
            }
        }
        (None, Some(RuleRef { index, line }), Some(Matched { src, dst })) => {
            sentences.push(format!(
                "Entry {index} of the policy, at line {line}, allows it: its source {src} and its \
                 destination {dst} match."
            ));
        }
        (None, Some(RuleRef { index, line }), None) => {
            sentences.push(format!(
                "Entry {index} of the policy, at line {line}, allows it."
            ));
        }
        (None, None, _) => sentences.push("The tables that are loaded allow it.".to_owned()),
    }
    let there = match direction {
        Some(Direction::Egress) => "The receiver decides too: ask there with the same words.",
        Some(Direction::Ingress) => "The sender decides too: ask there with the same words.",
        None => return sentences,
    };
    sentences.push(there.to_owned());
    sentences
}

/// Why a packet is dropped, as a sentence. Without its ends where they could not be read.
pub(super) fn why(reason: Reason, ends: Option<(IpAddr, IpAddr)>) -> String {
    let (src, dst) = match ends {
        Some((src, dst)) => (src.to_string(), dst.to_string()),
        None => ("its source".to_owned(), "its destination".to_owned()),
    };
    match reason {
        Reason::Policy => "No rule of the policy allows it.".to_owned(),
        Reason::NoPolicy => "No policy is loaded: all is denied.".to_owned(),
        Reason::SourceUnknown => format!(
            "{src} belongs to nobody that this node may talk with: no peer has it, and no approved \
             route leads to it."
        ),
        Reason::SourceForged => format!("{src} is not an address that its sender may use."),
        Reason::DestinationNotOurs => format!(
            "{dst} is neither this node's nor behind it: a peer may send nothing through here."
        ),
        Reason::DestinationUnknown => format!(
            "{dst} belongs to nobody that this node may talk with: no peer has it, and no approved \
             route leads to it."
        ),
        Reason::Martian => format!("No packet of a network has {src} or {dst} as an address."),
        Reason::Multicast => "Multicast and broadcast do not cross the network.".to_owned(),
        Reason::LinkLocal => "Link-local addresses do not cross the network.".to_owned(),
        Reason::Revoked => "Policy allowed this flow before, and no longer does.".to_owned(),
        Reason::TcpFlags => "No valid TCP segment carries these flags together.".to_owned(),
        Reason::TcpNoFlow => {
            "It belongs to no known connection, and only a SYN begins one.".to_owned()
        }
        Reason::SctpNoFlow => {
            "It belongs to no known association, and only an INIT begins one.".to_owned()
        }
        Reason::IcmpNoFlow => "It answers a question that nobody asked.".to_owned(),
        Reason::IcmpUnrelated => "It reports an error about no known flow.".to_owned(),
        Reason::IcmpType => "ICMP messages of this type do not cross the network.".to_owned(),
        Reason::FragmentNoState => "The first fragment of its datagram did not pass.".to_owned(),
        other => format!("It is dropped before any rule is asked: {}.", other.name()),
    }
}
