//! `weir status`, `peers`, `explain`, `counters`: ask, and print for people or programs.

mod table;

use super::arguments::Explain as Arguments;
use super::target::{choose, first_packet};
use super::{Agent, Console, Failure, PATIENCE, astray};
use crate::local::report::{
    Acl, Answers, Coordinator, Counters, End, Explanation, Guarded, Node, PeerStatus, Phase,
    Problem, Refuse, Status, Verdict,
};
use crate::local::{Explain, Request, Response};
use proto::filter::Direction;
use proto::netmap::Owner;
use serde::Serialize;
use std::fmt::Display;
pub(super) use table::Table;

pub(super) fn status(agent: &Agent, console: &Console) -> Result<(), Failure> {
    let Response::Status(status) = agent.ask(Request::Status, PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        console.document(&*status)
    } else {
        console.say(&status_text(&status))
    }
}

pub(super) fn peers(agent: &Agent, console: &Console) -> Result<(), Failure> {
    let Response::Peers(peers) = agent.ask(Request::Peers, PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        #[derive(Serialize)]
        struct Peers {
            peers: Vec<PeerStatus>,
        }
        console.document(Peers { peers })
    } else {
        console.say(&peers_text(&peers))
    }
}

pub(super) fn explain(
    agent: &Agent,
    console: &Console,
    arguments: &Arguments,
) -> Result<(), Failure> {
    let protocol = choose(arguments)?;
    let dst = &arguments.dst.host;
    let protocol = dst
        .parse()
        .map_or(protocol, |addr| first_packet(protocol, addr));
    let request = Request::Explain(Explain {
        src: arguments.src.clone(),
        dst: dst.clone(),
        port: arguments.dst.port,
        protocol,
    });
    let Response::Explanation(explanation) = agent.ask(request, PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        console.document(&*explanation)
    } else {
        console.say(&explanation_text(&explanation))
    }
}

pub(super) fn counters(agent: &Agent, console: &Console) -> Result<(), Failure> {
    let Response::Counters(counters) = agent.ask(Request::Counters, PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        console.document(counters)
    } else {
        console.say(&counters_text(&counters))
    }
}

/// One line for a machine that is up.
pub(super) fn up_line(status: &Status) -> String {
    let addrs = list(&status.interface.addrs);
    let device = &status.interface.name;
    let mut text = match &status.node {
        Some(Node { name, network, .. }) => {
            format!("{name} is up in network {network}: {addrs} on {device}.\n")
        }
        None => format!("{device} is up: {addrs}.\n"),
    };
    text.push_str(&problems_text(&status.problems));
    text
}

fn status_text(status: &Status) -> String {
    let Status {
        phase,
        interface,
        node,
        coordinator,
        generation,
        epoch,
        acl,
        guard,
        peers,
        active,
        problems,
    } = status;
    let device = &interface.name;
    let name = node.as_ref().map_or("", |node| node.name.as_str());
    let network = node.as_ref().map_or("", |node| node.network.as_str());
    let mut text = match phase {
        Phase::NotJoined => {
            "This machine is not in a network. `weir up --token-file FILE` joins one.\n".to_owned()
        }
        Phase::Down => format!("{name} is down. `weir up` brings it back into {network}.\n"),
        Phase::Starting => format!("{name} is on its way up in network {network}.\n"),
        Phase::Up => format!("{name} is up in network {network}.\n"),
    };
    let mut table = Table::plain();
    let up = if interface.up { "up" } else { "not up" };
    let port = interface
        .listen_port
        .map(|port| format!(", UDP port {port}"));
    let mtu = interface.mtu.map(|mtu| format!(", MTU {mtu}"));
    let details = format!("{device} is {up}{}{}", or_nothing(port), or_nothing(mtu));
    table.row(["  device", &details]);
    if !interface.addrs.is_empty() {
        table.row(["  addresses", &list(&interface.addrs)]);
    }
    if !interface.outside.is_empty() {
        let addrs = list(&interface.outside);
        let words = "coordinator or relay in a peer's subnet, reached beside the tunnel";
        table.row(["  outside", &format!("{addrs}: {words}")]);
    }
    if let Some(node) = node {
        table.row(["  owner", &owner(&node.owner)]);
        if !node.advertised_routes.is_empty() {
            table.row(["  routes", &routes(node)]);
        }
    }
    table.row(["  policy", &enforced(acl, *epoch, interface.up)]);
    if acl.shields_up {
        let shields = "up: nothing that others begin is let in (`weir set --shields-up=false`)";
        table.row(["  shields", shields]);
    }
    if acl.refuse == Refuse::Drop {
        table.row(["  refusals", "silent (`weir set --refuse=answer`)"]);
    }
    if !guard.is_empty() {
        let places = guard.iter();
        let places = places.map(|Guarded { interface, hook }| format!("{interface} ({hook})"));
        table.row(["  guard", &format!("on {}", list(places))]);
    }
    if let Some(generation) = generation {
        let netmap = format!("generation {generation}, {}", count(*peers, "peer"));
        table.row(["  netmap", &netmap]);
    }
    table.row(["  coordinator", &coordinator_text(coordinator)]);
    text.push_str(&table.print());
    text.push_str(&active_text(active));
    text.push_str(&problems_text(problems));
    text
}

/// Whether policy is enforced, and how.
fn enforced(acl: &Acl, epoch: Option<u32>, is_up: bool) -> String {
    let attached = acl.hook.as_deref().unwrap_or("tc");
    let why = acl.why.as_ref().map(|why| format!(": {why}"));
    match (acl.attached, epoch) {
        (true, Some(epoch)) => format!("enforced by {attached} programs, epoch {epoch}"),
        (true, None) => format!("{attached} programs are attached and drop everything"),
        (false, _) if acl.why.is_none() && !is_up => {
            "nothing to enforce while the device is not up".to_owned()
        }
        (false, _) => format!("the programs are not attached{}", or_nothing(why)),
    }
}

/// The peers in use, and how they are reached.
fn active_text(active: &[PeerStatus]) -> String {
    /// More would push everything else off the screen; `weir peers` has all.
    const MOST: usize = 20;
    if active.is_empty() {
        return String::new();
    }
    let mut table = Table::headed(["  IN USE", "PATH", "RX/S", "TX/S"]);
    for peer in active.iter().take(MOST) {
        table.row([
            &format!("  {}", peer.name),
            &super::path::by(peer),
            &bytes(peer.rx_bytes_per_second),
            &bytes(peer.tx_bytes_per_second),
        ]);
    }
    let more = active.len().saturating_sub(MOST);
    let rest = match more {
        0 => String::new(),
        more => format!("  and {more} more: `weir peers`\n"),
    };
    table.print() + &rest
}

fn coordinator_text(coordinator: &Coordinator) -> String {
    let Coordinator {
        address,
        proxy,
        connected,
        why,
        retry_in_seconds,
    } = coordinator;
    let Some(address) = address else {
        return "none yet".to_owned();
    };
    let address = match proxy {
        Some(proxy) => &format!("{address} by proxy {proxy}"),
        None => address,
    };
    if *connected {
        return format!("{address}, connected");
    }
    let why = why.as_ref().map(|why| format!(": {why}"));
    let again = retry_in_seconds.map(|seconds| format!(" (again in {seconds} s)"));
    format!(
        "{address}, not connected{}{}",
        or_nothing(why),
        or_nothing(again)
    )
}

fn routes(node: &Node) -> String {
    let said = |route| {
        if node.approved_routes.contains(route) {
            format!("{route}")
        } else {
            format!(
                "{route} (waits for `weir-coordinator route approve {} {route}`)",
                node.name
            )
        }
    };
    let said: Vec<String> = node.advertised_routes.iter().map(said).collect();
    said.join(", ")
}

fn problems_text(problems: &[Problem]) -> String {
    let mut text = String::new();
    if !problems.is_empty() {
        text.push_str("\nProblems:\n");
    }
    for Problem { message, next, .. } in problems {
        text.push_str(&format!("  - {message}\n"));
        if !next.is_empty() {
            text.push_str(&format!("    {next}\n"));
        }
    }
    text
}

fn peers_text(peers: &[PeerStatus]) -> String {
    if peers.is_empty() {
        return "No peers: policy lets this node talk with nobody, or nobody else has joined.\n"
            .to_owned();
    }
    let mut table = Table::headed([
        "NAME",
        "ADDRESSES",
        "OWNER",
        "ENDPOINT",
        "HANDSHAKE",
        "RX",
        "TX",
        "ROUTES",
    ]);
    for peer in peers {
        let endpoint = match (&peer.relay, peer.endpoint) {
            (Some(relay), _) => format!("relay {relay}"),
            (None, Some(endpoint)) => endpoint.to_string(),
            (None, None) => "-".to_owned(),
        };
        let handshake = match (peer.handshake_seconds, peer.online) {
            (Some(seconds), _) => format!("{} ago", age(seconds)),
            (None, true) => "none yet".to_owned(),
            (None, false) => "offline".to_owned(),
        };
        table.row([
            &peer.name,
            &list(&peer.addrs),
            &owner(&peer.owner),
            &endpoint,
            &handshake,
            &bytes(peer.rx_bytes),
            &bytes(peer.tx_bytes),
            &list(&peer.routes),
        ]);
    }
    table.print()
}

/// The sentences, after one that has the verdict.
pub(super) fn explanation_text(explanation: &Explanation) -> String {
    let Explanation {
        src,
        dst,
        protocol,
        port,
        direction,
        verdict,
        reason,
        rule: _,
        matched: _,
        near: _,
        sentences,
    } = explanation;
    let verdict = match verdict {
        Verdict::Accept => "ACCEPT",
        Verdict::Deny => "DENY",
    };
    let crossing = match direction {
        Some(Direction::Ingress) => ", coming in",
        Some(Direction::Egress) => ", going out",
        None => "",
    };
    let to = match (port, dst.addr) {
        (Some(port), std::net::IpAddr::V6(addr)) => format!("[{addr}]:{port}"),
        (Some(port), std::net::IpAddr::V4(addr)) => format!("{addr}:{port}"),
        (None, addr) => addr.to_string(),
    };
    let named = |end: &End| end.node.as_ref().map(|name| format!(" ({name})"));
    let mut text = format!(
        "{verdict} {protocol} {}{} -> {to}{}{crossing}: {reason}\n",
        src.addr,
        or_nothing(named(src)),
        or_nothing(named(dst)),
    );
    for sentence in sentences {
        text.push_str(&format!("  {sentence}\n"));
    }
    text
}

fn counters_text(counters: &Counters) -> String {
    let Counters {
        counters,
        answers,
        guard,
        events_lost,
    } = counters;
    let mut table = Table::headed(["DIRECTION", "VERDICT", "REASON", "PACKETS"]);
    let mut seen = false;
    for counter in counters.iter().filter(|counter| counter.packets > 0) {
        seen = true;
        let direction = match counter.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        table.row([
            direction,
            verdict_word(counter.verdict),
            &counter.reason,
            &counter.packets.to_string(),
        ]);
    }
    for Answers { outcome, packets } in answers.iter().filter(|answers| answers.packets > 0) {
        table.row(["egress", "answer", outcome, &packets.to_string()]);
    }
    for count in guard.iter().filter(|count| count.packets > 0) {
        seen = true;
        let verdict = verdict_word(count.verdict);
        table.row(["guard", verdict, &count.outcome, &count.packets.to_string()]);
    }
    if seen {
        let mut text = table.print();
        if *events_lost > 0 {
            text.push_str(&format!(
                "Events of {events_lost} dropped packets found no reader (`weir monitor`); the packets \
                 are counted above.\n"
            ));
        }
        text
    } else {
        "No packet has met the programs yet.\n".to_owned()
    }
}

fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Accept => "accept",
        Verdict::Deny => "deny",
    }
}

fn owner(owner: &Owner) -> String {
    match owner {
        Owner::User(login) => login.clone(),
        Owner::Tags(tags) => list(tags),
    }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(", ")
    }
}

fn or_nothing(text: Option<String>) -> String {
    text.unwrap_or_default()
}

fn count(number: usize, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Seconds as one number with a unit: what matters of an age is its size.
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Bytes with a binary prefix and one decimal.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10) as usize;
    let whole = 1_u64 << (10 * power);
    let tenths = u128::from(bytes) * 10 / u128::from(whole);
    let unit = UNITS.get(power - 1).unwrap_or(&"");
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests;
