//! Policy compiled for one node, and what it means.
//!
//! A [`Filter`] holds two lists of rules: `ingress` (who may initiate to this node or to the
//! routes it serves) and `egress` (to whom this node, or its routes, may initiate). Rules only
//! allow; their order means nothing; no rule means no packet. Nodes are named by *label* (an index
//! into [`Filter::labels`], the selectors that the policy wrote), and every peer in the netmap
//! carries the labels it has: a peer that joins changes one peer, not the filter. What is no node
//! is named by prefix. A label stands for a node's own addresses, never for its routes.
//!
//! [`Filter::allows`] is the reference semantics: slow, obvious, and sharing no function with the
//! evaluator that the kernel runs (`ebpf::verdict::decide`). Property tests hold the two together.

use crate::net::{PortRange, Prefix, Protocol};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Most rules that one node's filter may have, in each direction.
pub const MAX_RULES: usize = 200_000;

/// An index into [`Filter::labels`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Label(pub u32);

/// Which way a packet crosses the WireGuard device, as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From a peer to this node.
    Ingress,
    /// From this node to a peer.
    Egress,
}

/// Policy compiled for one node. The default value denies everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// The text of each label, as the policy wrote it (`group:dev`, `tag:web`, `ana@example.com`).
    /// Depends on the policy alone, so that labels keep their numbers while nodes come and go.
    pub labels: Vec<String>,
    /// Who may initiate to this node.
    pub ingress: Vec<Rule>,
    /// To whom this node may initiate.
    pub egress: Vec<Rule>,
}

/// One thing that policy allows.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which entry of the policy it comes from, counted from 0 within its section.
    pub index: u32,
    /// The line of the policy file where that entry starts, from 1.
    pub line: u32,
    /// Who may initiate.
    pub srcs: Vec<Selector>,
    /// To whom.
    pub dsts: Vec<Selector>,
    /// What.
    pub services: Vec<Service>,
}

/// A set of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// The own addresses of every node that carries the label.
    Label(Label),
    /// Every address in the prefix, whoever has it.
    Prefix(Prefix),
}

/// A protocol and, where it has ports, the destination ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// `None` means every protocol.
    pub protocol: Option<Protocol>,
    /// Destination ports; ignored by protocols that have none.
    pub ports: PortRange,
}

/// A first packet, as policy sees it: who initiates what to whom.
#[derive(Clone, Copy, Debug)]
pub struct Initiation<'a> {
    /// Source address.
    pub src: IpAddr,
    /// Labels of the node that owns the source address; empty if no node does.
    pub src_labels: &'a BTreeSet<Label>,
    /// Destination address.
    pub dst: IpAddr,
    /// Labels of the node that owns the destination address; empty if no node does.
    pub dst_labels: &'a BTreeSet<Label>,
    /// IP protocol.
    pub protocol: Protocol,
    /// Destination port; 0 where the protocol has none.
    pub port: u16,
}

impl Filter {
    /// The rules of one direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// The first rule that allows `initiation` in `direction`, or `None`: denied.
    #[must_use]
    pub fn allows(&self, direction: Direction, initiation: &Initiation<'_>) -> Option<&Rule> {
        self.rules(direction)
            .iter()
            .find(|rule| rule.allows(initiation))
    }
}

impl Rule {
    /// Whether this rule alone allows `initiation`.
    #[must_use]
    pub fn allows(&self, initiation: &Initiation<'_>) -> bool {
        let Initiation {
            src,
            src_labels,
            dst,
            dst_labels,
            protocol,
            port,
        } = *initiation;
        self.srcs
            .iter()
            .any(|selector| selector.matches(src, src_labels))
            && self
                .dsts
                .iter()
                .any(|selector| selector.matches(dst, dst_labels))
            && self
                .services
                .iter()
                .any(|service| service.matches(protocol, port))
    }
}

impl Selector {
    /// Whether an address, owned by a node with `labels`, is in the set.
    #[must_use]
    pub fn matches(&self, addr: IpAddr, labels: &BTreeSet<Label>) -> bool {
        match self {
            Self::Label(label) => labels.contains(label),
            Self::Prefix(prefix) => prefix.contains(addr),
        }
    }
}

impl Service {
    /// Whether `protocol` is meant, on some port.
    #[must_use]
    pub fn speaks(&self, protocol: Protocol) -> bool {
        self.protocol.is_none_or(|wanted| wanted == protocol)
    }

    /// Whether a packet of `protocol` to `port` is meant.
    #[must_use]
    pub fn matches(&self, protocol: Protocol, port: u16) -> bool {
        self.speaks(protocol) && (!protocol.has_ports() || self.ports.contains(port))
    }
}
