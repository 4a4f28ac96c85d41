//! One policy in the words of every contender: peer `i` may be reached at one UDP port, for
//! `i` below the number of rules. Nothing else is allowed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proto::filter::{Filter, Rule, Selector, Service};
use proto::id::NodeId;
use proto::net::{PortRange, Prefix, Protocol};
use proto::netmap::{Me, Peer};

use crate::nodes;

use super::frames::{LOCAL, allowed_port, peer};

/// The device that the packets leave by.
pub const OUT: &str = "weirbench0";

/// Of weir: the filter of the node that sends.
pub fn filter(rules: u32) -> Filter {
    let rule = |number| Rule {
        index: number,
        line: number + 1,
        srcs: vec![Selector::Prefix(Prefix::host(LOCAL.into()))],
        dsts: vec![Selector::Prefix(Prefix::host(peer(number).into()))],
        services: vec![Service {
            protocol: Some(Protocol::UDP),
            ports: PortRange::single(allowed_port(number)),
        }],
    };
    Filter {
        labels: Vec::new(),
        ingress: Vec::new(),
        egress: (0..rules).map(rule).collect(),
    }
}

/// The node that sends.
pub fn me() -> Me {
    nodes::me(vec![LOCAL.into()])
}

/// A peer for every rule.
pub fn peers(rules: u32) -> BTreeMap<NodeId, Peer> {
    let one = |number| nodes::peer(number, vec![peer(number).into()]);
    (0..rules).map(one).collect()
}

/// Of nftables: where its chain hangs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// At the device that packets leave by, where weir's program is too.
    Device,
    /// Where the host forwards, after connection tracking: known flows pass first.
    Tracked,
}

/// How nftables looks for the rule.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// No rule: the chain's policy alone.
    Nothing,
    /// One look-up in a set of concatenations.
    Set,
    /// One rule after the other.
    Linear,
}

/// A table for `nft -f` that replaces itself. With `counted`, what passes by a rule is counted.
pub fn nftables(hook: Hook, form: Form, rules: u32, counted: bool) -> String {
    let (family, place) = match hook {
        Hook::Device => ("netdev", format!("egress device \"{OUT}\"")),
        Hook::Tracked => ("ip", "forward".to_owned()),
    };
    let accept = if counted { "counter accept" } else { "accept" };
    let mut text = format!("table {family} bench\ndelete table {family} bench\n");
    let _ = writeln!(text, "table {family} bench {{");
    if form == Form::Set {
        text += "  set allowed {\n    type ipv4_addr . ipv4_addr . inet_service\n";
        // A set whose size is known is a plain hash table, nft's quickest.
        let _ = writeln!(text, "    size {rules}\n    elements = {{");
        for number in 0..rules {
            let (peer, port) = (peer(number), allowed_port(number));
            let _ = writeln!(text, "      {LOCAL} . {peer} . {port},");
        }
        text += "    }\n  }\n";
    }
    let _ = writeln!(
        text,
        "  chain out {{\n    type filter hook {place} priority 0; policy drop;"
    );
    if hook == Hook::Tracked {
        let _ = writeln!(text, "    ct state established,related {accept}");
    }
    match form {
        Form::Nothing => {}
        Form::Set => {
            let _ = writeln!(
                text,
                "    ip saddr . ip daddr . udp dport @allowed {accept}"
            );
        }
        Form::Linear => {
            for number in 0..rules {
                let (peer, port) = (peer(number), allowed_port(number));
                let _ = writeln!(
                    text,
                    "    ip saddr {LOCAL} ip daddr {peer} udp dport {port} {accept}"
                );
            }
        }
    }
    text + "  }\n}\n"
}

/// For `iptables-restore`: the chain of what is forwarded.
pub fn iptables(rules: u32) -> String {
    let mut text = String::from("*filter\n:INPUT ACCEPT\n:FORWARD DROP\n:OUTPUT ACCEPT\n");
    for number in 0..rules {
        let (peer, port) = (peer(number), allowed_port(number));
        let _ = writeln!(
            text,
            "-A FORWARD -s {LOCAL} -d {peer} -p udp --dport {port} -j ACCEPT"
        );
    }
    text + "COMMIT\n"
}
