//! What the engine knows, for people: read-only.

mod path;

pub use crate::relays::Connection;
pub use path::{CandidateStatus, Now, PathStatus, Probe, RegionStatus};

use crate::acl::{self, Acl};
use crate::plan::{Observed, Overlap};
use crate::trust::Distrust;
use proto::net::Prefix;
use proto::netmap::Netmap;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The engine's view of this node.
#[derive(Clone, Debug)]
pub struct Status<'a> {
    /// Whether the operator wants the node up.
    pub up_wanted: bool,
    /// The netmap in force.
    pub netmap: Option<&'a Netmap>,
    /// The lowered policy in force, for `explain`.
    pub lowered: &'a Acl,
    /// The kernel, as last read and as changed since.
    pub observed: Option<&'a Observed>,
    /// Whether the kernel holds what is desired.
    pub converged: bool,
    /// What is left out of peers' subnets, because the tunnel itself needs it.
    pub outside: &'a BTreeSet<IpAddr>,
    /// What is wrong, worst first.
    pub problems: Vec<Problem>,
}

/// Something that is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A device of our name is not WireGuard.
    #[error("the interface {interface} exists, but is not a WireGuard device")]
    ForeignDevice {
        /// Its name.
        interface: String,
    },
    /// The network's own prefix is in use on this host: the device does not come up.
    #[error(
        "the network's prefix {} overlaps with a route of this machine: {} by {}",
        .0.prefix, .0.live.prefix, by(.0)
    )]
    NetworkOverlap(Overlap),
    /// A step failed. The text is the error chain, for people.
    #[error("could not {step}: {detail}")]
    Step {
        /// What was to be done.
        step: String,
        /// What kind of failure.
        kind: FailureKind,
        /// The hand's words.
        detail: String,
    },
    /// The kernel cannot be read. The text is the error chain, for people.
    #[error("could not read the kernel's state: {0}")]
    Unreadable(String),
    /// The coordinator sent a netmap that is not used.
    #[error("a netmap of the coordinator is refused: {0}")]
    Netmap(Distrust),
    /// Policy does not fit the tables: the old one stays.
    #[error("the policy does not fit: {0}")]
    Acl(acl::TooLarge),
    /// A peer's route is in use on this host: it is not routed.
    #[error(
        "{node}'s route {} is not used: it overlaps with a route of this machine, {} by {}",
        overlap.prefix, overlap.live.prefix, by(overlap)
    )]
    RouteOverlap {
        /// The peer's name.
        node: String,
        /// What overlaps.
        overlap: Overlap,
    },
    /// The device has no IPv6: what is IPv4's goes on.
    #[error("IPv6 is switched off on {interface}: this node is reached by IPv4 alone")]
    WithoutV6 {
        /// Its name.
        interface: String,
    },
    /// This node serves a route that leads nowhere from here.
    #[error("this node serves {0}, but no route of this machine leads there")]
    Unserved(Prefix),
}

/// Kinds of failure of a step, as far as they differ in what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The kernel is too old, or lacks WireGuard or BPF features.
    Unsupported,
    /// The process lacks a capability.
    Permission,
    /// The UDP port is taken.
    PortTaken,
    /// The programs cannot be attached: see the text.
    Programs,
    /// The policy is larger than the tables may be.
    TooLarge,
    /// IPv6 forwarding is off for the whole machine and cannot be had for one interface.
    ForwardingV6,
    /// Anything else the kernel said.
    Kernel,
}

fn by(overlap: &Overlap) -> &str {
    match overlap.live.interface.as_str() {
        "" => "no interface",
        name => name,
    }
}

impl Problem {
    /// What a program branches on. Stable.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::ForeignDevice { .. } => "foreign_device",
            Self::NetworkOverlap(_) => "network_overlap",
            Self::Step { kind, .. } => kind.code(),
            Self::Unreadable(_) => "unreadable",
            Self::Netmap(_) => "netmap_refused",
            Self::Acl(_) => "acl_too_large",
            Self::RouteOverlap { .. } => "route_overlap",
            Self::Unserved(_) => "route_unserved",
            Self::WithoutV6 { .. } => "ipv6_off",
        }
    }

    /// What to do, as a sentence.
    #[must_use]
    pub fn next(&self) -> &'static str {
        match self {
            Self::ForeignDevice { .. } => {
                "Start the agent with another --interface, or rename that interface."
            }
            Self::NetworkOverlap(_) => {
                "Remove that route from this machine, or give the network another prefix \
                 (weir-coordinator network create --v4 … --v6 …)."
            }
            Self::Step { kind, .. } => kind.next(),
            Self::Unreadable(_) => "Run weir doctor.",
            Self::Netmap(_) => {
                "The last good netmap stays in force. Look at the coordinator: its log and its \
                 audit list."
            }
            Self::Acl(_) => "The old policy stays in force. Shorten the rule it names.",
            Self::RouteOverlap { .. } => {
                "Withdraw the approval of one of the two, or renumber one of the networks."
            }
            Self::WithoutV6 { .. } => {
                "Nothing else waits for it. To have IPv6 here, set \
                 net.ipv6.conf.all.disable_ipv6=0 (on a machine that was booted without IPv6, boot \
                 with it)."
            }
            Self::Unserved(_) => {
                "Give this machine an address or a route in that subnet, or stop advertising it."
            }
        }
    }
}

impl FailureKind {
    fn code(self) -> &'static str {
        match self {
            Self::Unsupported => "unsupported_kernel",
            Self::Permission => "permission",
            Self::PortTaken => "port_taken",
            Self::Programs => "acl_not_attached",
            Self::TooLarge => "acl_too_large",
            Self::ForwardingV6 => "forwarding_v6",
            Self::Kernel => "kernel",
        }
    }

    fn next(self) -> &'static str {
        match self {
            Self::Unsupported => "Run weir on Linux 6.1 or later, with WireGuard and BPF.",
            Self::Permission => {
                "The agent needs CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON and CAP_NET_RAW: run it as the \
                 unit does."
            }
            Self::PortTaken => {
                "Start the agent with another --listen-port, or stop what listens there."
            }
            Self::Programs => {
                "Nothing passes unchecked meanwhile: a device that is up keeps the last policy, a \
                 new one stays down. Run weir doctor."
            }
            Self::TooLarge => "The old policy stays in force. Shorten the policy.",
            Self::ForwardingV6 => {
                "Set net.ipv6.conf.all.forwarding=1 on this machine (it changes how it takes \
                 router advertisements), or stop advertising IPv6 routes."
            }
            Self::Kernel => "weir tries again by itself. If it stays so, run weir doctor.",
        }
    }
}

/// A step that failed, as the hand tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// How many steps of the plan were done before it.
    pub done: usize,
    /// What kind.
    pub kind: FailureKind,
    /// The error chain, for people.
    pub detail: String,
}
