//! `weir monitor`: dropped packets as they are dropped, a line each, until Ctrl-C.

use super::arguments::Monitor as Arguments;
use super::{Agent, Console, Failure, PATIENCE, astray, unanswered};
use crate::local::report::{Drop, LeftOut, Lost, NearMiss, Party, Seen};
use crate::local::{AskError, Monitor, Request, Response, follow};
use proto::filter::Direction;
use proto::net::Protocol;
use std::future::Future;
use std::net::IpAddr;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

pub(super) fn monitor(
    agent: &Agent,
    console: &Console,
    arguments: Arguments,
) -> Result<(), Failure> {
    let Arguments { reason, peer } = arguments;
    let request = Request::Monitor(Monitor { reason, peer });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Failure::new("failed", error.to_string(), ""))?;
    runtime.block_on(watch(agent, console, request))
}

async fn watch(agent: &Agent, console: &Console, request: Request) -> Result<(), Failure> {
    let stop = |_| Failure::new("failed", "the system gives no signals", "");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(stop)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(stop)?;
    let unanswered = |error: AskError| unanswered(&error, &agent.socket);
    let mut stream = follow(&agent.socket, request).await.map_err(unanswered)?;
    let first = in_time(stream.next()).await.map_err(unanswered)?;
    tell(console, first)?;
    loop {
        let next = tokio::select! {
            next = stream.next() => next,
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
        };
        tell(console, next.map_err(unanswered)?)?;
    }
}

async fn in_time<T>(answer: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
    match timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(AskError::Late(PATIENCE)),
    }
}

fn tell(console: &Console, response: Response) -> Result<(), Failure> {
    let seen = match response {
        Response::Seen(seen) => seen,
        Response::Refused(refused) => return Err(refused.into()),
        _ => return Err(astray()),
    };
    if console.json {
        return console.line(seen);
    }
    console.say(&match &seen {
        Seen::Begun => "Dropped packets, as they are dropped. Ctrl-C ends this.\n".to_owned(),
        Seen::Drop(drop) => drop_text(drop),
        Seen::LeftOut(left_out) => left_out_text(left_out),
        Seen::Lost(lost) => lost_text(lost),
    })
}

fn drop_text(drop: &Drop) -> String {
    let Drop {
        time_ms,
        direction,
        reason,
        src,
        dst,
        protocol,
        tcp_flags,
        icmp_type,
        later_fragment,
        length_bytes,
        near,
        why,
    } = drop;
    let mut text = format!("{} {}", time(*time_ms), way(*direction));
    if let Some(protocol) = protocol {
        text.push_str(&format!(" {}", named(*protocol)));
    }
    match (src, dst) {
        (Some(src), Some(dst)) => {
            text.push_str(&format!(" {} -> {}", party(src), party(dst)));
        }
        (None, _) | (_, None) => text.push_str(" a packet without readable addresses"),
    }
    if let Some(flags) = tcp_flags {
        text.push_str(&format!(" [{flags}]"));
    }
    if let Some(kind) = icmp_type {
        text.push_str(&format!(" type {kind}"));
    }
    if *later_fragment {
        text.push_str(" later fragment");
    }
    text.push_str(&format!(" {length_bytes} B: {reason}. {why}"));
    if let Some(NearMiss { rule, why }) = near {
        text.push_str(&format!(" Closest is line {}: {why}.", rule.line));
    }
    text.push('\n');
    text
}

fn left_out_text(left_out: &LeftOut) -> String {
    let LeftOut {
        direction,
        reason,
        packets,
    } = left_out;
    format!(
        "{:12} {} {packets} more dropped for {reason}, not shown\n",
        "",
        way(*direction)
    )
}

fn lost_text(Lost { events }: &Lost) -> String {
    let were = if *events == 1 {
        "event was"
    } else {
        "events were"
    };
    format!(
        "{:12} {events} {were} lost: too many kinds of packets were dropped at once\n",
        ""
    )
}

fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "in ",
        Direction::Egress => "out",
    }
}

/// Echo has two numbers and one name.
fn named(protocol: Protocol) -> String {
    if protocol == Protocol::ICMPV6 {
        "icmp".to_owned()
    } else {
        protocol.to_string()
    }
}

fn party(party: &Party) -> String {
    let addr = match (party.addr, party.port) {
        (IpAddr::V6(addr), Some(port)) => format!("[{addr}]:{port}"),
        (IpAddr::V4(addr), Some(port)) => format!("{addr}:{port}"),
        (addr, None) => addr.to_string(),
    };
    match &party.node {
        Some(node) => format!("{addr} ({node})"),
        None => addr,
    }
}

/// The time of day, UTC.
fn time(ms: u64) -> String {
    let (seconds, ms) = (ms / 1000, ms % 1000);
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{ms:03}", seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::report::{RuleRef, Side};

    #[test]
    fn a_drop_reads_like_this() {
        let party = |addr: &str, port, node: Option<&str>| {
            Some(Party {
                addr: addr.parse().unwrap(),
                port: Some(port),
                node: node.map(str::to_owned),
                side: Side::Peer,
                class: 2,
            })
        };
        let drop = Drop {
            time_ms: 1_795_312_805_042,
            direction: Direction::Ingress,
            reason: "policy".to_owned(),
            src: party("fd7a::3", 40000, Some("web-1")),
            dst: party("fd7a::4", 22, None),
            protocol: Some(Protocol::TCP),
            tcp_flags: Some("S".to_owned()),
            icmp_type: None,
            later_fragment: false,
            length_bytes: 60,
            near: Some(NearMiss {
                rule: RuleRef { index: 2, line: 17 },
                why: "it allows tcp port 80, not 22".to_owned(),
            }),
            why: "No rule of the policy allows it.".to_owned(),
        };
        let want = "\
02:00:05.042 in  tcp [fd7a::3]:40000 (web-1) -> [fd7a::4]:22 [S] 60 B: policy. \
No rule of the policy allows it. Closest is line 17: it allows tcp port 80, not 22.
";
        assert_eq!(drop_text(&drop), want);
        let unreadable = Drop {
            src: None,
            dst: None,
            protocol: None,
            tcp_flags: None,
            near: None,
            reason: "ip_version".to_owned(),
            why: "Neither IPv4 nor IPv6.".to_owned(),
            ..drop
        };
        assert_eq!(
            drop_text(&unreadable),
            "02:00:05.042 in  a packet without readable addresses 60 B: ip_version. \
             Neither IPv4 nor IPv6.\n"
        );
        let left_out = LeftOut {
            direction: Direction::Egress,
            reason: "policy".to_owned(),
            packets: 412,
        };
        assert_eq!(
            left_out_text(&left_out),
            "             out 412 more dropped for policy, not shown\n"
        );
        let want =
            "             2 events were lost: too many kinds of packets were dropped at once\n";
        assert_eq!(lost_text(&Lost { events: 2 }), want);
    }
}
