//! `weir path`: how a peer is reached, and why so.

use super::show::Table;
use super::{Agent, Console, Failure, PATIENCE, astray};
use crate::local::report::{PeerPath, PeerStatus, Way};
use crate::local::{Request, Response};
use engine::plan::LEAST_MTU;

pub(super) fn path(agent: &Agent, console: &Console, peer: &str) -> Result<(), Failure> {
    let path = ask(agent, peer)?;
    if console.json {
        console.document(&path)
    } else {
        console.say(&text(&path))
    }
}

pub(super) fn ask(agent: &Agent, peer: &str) -> Result<PeerPath, Failure> {
    let request = Request::Path {
        peer: peer.to_owned(),
    };
    match agent.ask(request, PATIENCE)? {
        Response::Path(path) => Ok(*path),
        _ => Err(astray()),
    }
}

/// The way of a peer's packets: `directly by ENDPOINT, 1.20 ms away`.
pub(super) fn by(peer: &PeerStatus) -> String {
    let time = peer.rtt_us.map(|us| format!(", {} away", millis(us)));
    let time = time.unwrap_or_default();
    let endpoint = peer.endpoint.map(|endpoint| endpoint.to_string());
    let endpoint = endpoint.unwrap_or_else(|| "an endpoint to come".to_owned());
    match (peer.way, &peer.relay) {
        (Way::Direct, _) => format!("directly by {endpoint}{time}"),
        (Way::Relayed, Some(relay)) => format!("by relay {relay}{time}"),
        (Way::Relayed, None) => "by relay".to_owned(),
        (Way::None, _) => match peer.endpoint {
            Some(endpoint) => format!("by {endpoint}, unproven"),
            None => "no endpoint known yet".to_owned(),
        },
    }
}

pub(super) fn millis(us: u64) -> String {
    format!("{}.{:02} ms", us / 1000, us % 1000 / 10)
}

fn text(path: &PeerPath) -> String {
    let PeerPath {
        peer,
        why,
        since_seconds,
        active,
        probing,
        region,
        candidates,
    } = path;
    let since = since_seconds.map(|seconds| format!(" for {seconds} s"));
    let mut text = format!(
        "{} is reached {}{}: {why}.\n",
        peer.name,
        by(peer),
        since.unwrap_or_default()
    );
    text.push_str(&lengths(peer));
    if peer.way == Way::Direct
        && let Some(region) = region
    {
        text.push_str(&format!("If that breaks, relay {region} takes over.\n"));
    }
    if !active {
        text.push_str("No packets were exchanged lately: nothing is probed before some are.\n");
    }
    if *probing {
        text.push_str("Direct paths are being looked for now.\n");
    }
    if candidates.is_empty() {
        return text;
    }
    let mut table = Table::headed(["", "ENDPOINT", "TIER", "FROM", "PROBED", "RESULT"]);
    for candidate in candidates {
        let probed = candidate
            .probed_ms_ago
            .map(|ms| format!("{}.{} s ago", ms / 1000, ms % 1000 / 100));
        let rtt = candidate.rtt_us.map(millis);
        table.row([
            if candidate.in_use { "*" } else { "" },
            &candidate.endpoint.to_string(),
            &candidate.tier.replace('_', " "),
            &candidate.sources.join(", "),
            probed.as_deref().unwrap_or("never"),
            &result(&candidate.result, rtt),
        ]);
    }
    text + &table.print()
}

/// How long packets may be.
fn lengths(peer: &PeerStatus) -> String {
    let inside = peer.mtu;
    let bytes = match (peer.path_mtu, peer.way) {
        (Some(bytes), _) => bytes,
        (None, Way::Direct) => {
            return format!(
                "How long its packets may be is not known yet: its routes say {inside} bytes.\n"
            );
        }
        (None, Way::Relayed | Way::None) => return String::new(),
    };
    let mut text = format!("Packets of {bytes} bytes pass: its routes say {inside}.\n");
    if is_narrow(peer) {
        text.push_str(NARROW);
        text.push('\n');
    }
    text
}

/// What a path means that takes less than IPv6's least packet needs.
pub(super) const NARROW: &str = "IPv6 needs more: TCP and IPv4 fit themselves in, IPv6 datagrams \
    beyond that are fragmented on the way, or lost.";

/// Whether IPv6's least packet is too long for the path.
pub(super) fn is_narrow(peer: &PeerStatus) -> bool {
    peer.path_mtu.is_some() && peer.mtu < LEAST_MTU
}

fn result(result: &str, rtt: Option<String>) -> String {
    match (result, rtt) {
        ("answered", Some(rtt)) => format!("answered in {rtt}"),
        ("never", _) => "-".to_owned(),
        ("waiting", _) => "no answer yet".to_owned(),
        ("silent", _) => "no answer".to_owned(),
        ("swallows", _) => "answers probes, carries no packets".to_owned(),
        ("overruled", _) => "works; the peer prefers another".to_owned(),
        (other, _) => other.to_owned(),
    }
}
