//! `weir netcheck`: how the world sees this machine.

use super::show::Table;
use super::{Agent, Console, Failure, PATIENCE, astray};
use crate::local::report::{Nat, Netcheck};
use crate::local::{Request, Response};

pub(super) fn netcheck(agent: &Agent, console: &Console) -> Result<(), Failure> {
    let Response::Netcheck(check) = agent.ask(Request::Netcheck, PATIENCE)? else {
        return Err(astray());
    };
    if console.json {
        console.document(&*check)
    } else {
        console.say(&text(&check))
    }
}

fn text(check: &Netcheck) -> String {
    let addrs: Vec<String> = check.addrs.iter().map(ToString::to_string).collect();
    let mut text = format!(
        "UDP port {} on {}.\n",
        check.listen_port,
        match addrs.is_empty() {
            true => "no address".to_owned(),
            false => addrs.join(", "),
        }
    );
    for (name, family) in [("IPv4", &check.v4), ("IPv6", &check.v6)] {
        text.push_str(&format!("{name}: {}.\n", family.words));
        let endpoints: Vec<String> = family.endpoints.iter().map(ToString::to_string).collect();
        if !endpoints.is_empty() {
            text.push_str(&format!("  peers are told: {}\n", endpoints.join(", ")));
        }
    }
    if let Some(opened) = &check.port_mapping {
        let (addr, protocol) = (opened.addr, &opened.protocol);
        text.push_str(&format!(
            "The router opened {addr} for it, asked by {protocol}.\n"
        ));
    }
    if check.servers.is_empty() {
        text.push_str(
            "The network has no STUN servers: name some in the coordinator's configuration \
             (`[relays]`, `stun`).\n",
        );
        return text + &regions(check) + &unreached(check);
    }
    let mut table = Table::headed(["SERVER", "ADDRESS", "SEES", "TIME"]);
    for server in &check.servers {
        let mapped = server.mapped.map(|addr| addr.to_string());
        let time = server.rtt_ms.map(|ms| format!("{ms} ms"));
        table.row([
            &server.name,
            &server.addr.to_string(),
            mapped.as_deref().unwrap_or("no answer"),
            time.as_deref().unwrap_or("-"),
        ]);
    }
    text + &table.print() + &regions(check) + &unreached(check)
}

/// The network's relays, and which of them is home.
fn regions(check: &Netcheck) -> String {
    if check.regions.is_empty() {
        return "The network has no relays: peers without a direct path cannot be reached.\n"
            .to_owned();
    }
    let mut table = Table::headed(["", "REGION", "NAME", "AWAY", "CONNECTION"]);
    for region in &check.regions {
        let away = region.latency_us.map(super::path::millis);
        let connection = match (&region.why, region.transport.as_deref()) {
            (Some(why), _) => format!("{}: {why}", region.connection),
            (None, through) => {
                let inside = (through == Some("websocket")).then(|| ", by WebSocket".to_owned());
                let proxy = region.proxy.as_ref().filter(|_| through.is_some());
                let proxy = proxy.map(|proxy| format!(", by proxy {proxy}"));
                let by: String = inside.into_iter().chain(proxy).collect();
                format!("{}{by}", region.connection)
            }
        };
        table.row([
            if region.home { "*" } else { "" },
            &region.id.to_string(),
            &region.name,
            away.as_deref().unwrap_or("-"),
            &connection,
        ]);
    }
    let home = match &check.home {
        Some(home) => format!("Peers find this machine at relay {home}.\n"),
        None => "No relay is this machine's home yet.\n".to_owned(),
    };
    table.print() + &home
}

/// Why some peers have no path, as far as this end can tell.
fn unreached(check: &Netcheck) -> String {
    if check.unreached.is_empty() {
        return String::new();
    }
    let why = match (check.v4.nat, check.v6.nat) {
        (Nat::Hard, _) | (_, Nat::Hard) => {
            "this machine's NAT shows each destination another port, so a peer behind a NAT does \
             not know where to send. Open the UDP port on one of the two routers."
        }
        (Nat::Silent, Nat::Silent | Nat::Unknown) | (Nat::Unknown, Nat::Silent) => {
            "UDP does not get out of here. Let the port above out, or ask who runs the network."
        }
        _ => {
            "the cause is at their end, or nobody has sent anything yet: run `weir netcheck` \
             there, and `weir ping` here."
        }
    };
    format!("No packets from {}: {why}\n", check.unreached.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::report::{Family, PortMapping, Region, StunServer};

    #[test]
    fn it_says_what_the_nat_is_like_and_why_there_is_no_path() {
        let family = |nat, words: &str| Family {
            nat,
            words: words.to_owned(),
            reflexive: None,
            endpoints: Vec::new(),
        };
        let mut check = Netcheck {
            listen_port: 51820,
            addrs: vec!["10.0.0.2".parse().unwrap()],
            v4: family(Nat::Hard, "hard"),
            v6: family(Nat::Silent, "silent"),
            servers: vec![StunServer {
                name: "stun.example.com:3478".to_owned(),
                addr: "192.0.2.1:3478".parse().unwrap(),
                mapped: None,
                rtt_ms: None,
            }],
            home: Some("near".to_owned()),
            regions: vec![
                Region {
                    id: proto::id::RegionId(7),
                    name: "near".to_owned(),
                    home: true,
                    connection: "down".to_owned(),
                    why: Some("it fell silent".to_owned()),
                    transport: None,
                    proxy: None,
                    latency_us: Some(1_240),
                },
                Region {
                    id: proto::id::RegionId(8),
                    name: "far".to_owned(),
                    home: false,
                    connection: "up".to_owned(),
                    why: None,
                    transport: Some("websocket".to_owned()),
                    proxy: Some("proxy.example.com:3128".to_owned()),
                    latency_us: None,
                },
            ],
            port_mapping: Some(PortMapping {
                addr: "192.0.2.9:51820".parse().unwrap(),
                protocol: "UPnP".to_owned(),
            }),
            unreached: vec!["web".to_owned()],
            discovery_dropped: 0,
        };
        let hard = text(&check);
        for part in [
            "UDP port 51820 on 10.0.0.2.",
            "IPv4: hard.",
            "no answer",
            "No packets from web: this",
            "1.24 ms",
            "down: it fell silent",
            "up, by WebSocket, by proxy proxy.example.com:3128",
            "at relay near",
            "opened 192.0.2.9:51820 for it, asked by UPnP",
        ] {
            assert!(hard.contains(part), "{part}: {hard}");
        }
        check.v4.nat = Nat::Silent;
        assert!(text(&check).contains("UDP does not get out"));
        check.servers.clear();
        check.unreached.clear();
        let none = text(&check);
        assert!(
            none.contains("no STUN servers") && !none.contains("No packets"),
            "{none}"
        );
    }
}
