//! `weir ping`: echo requests through the tunnel.
//!
//! The agent names the peer and says what policy lets out; the echoes are sent from here, so that
//! the agent needs no right to raw sockets. A datagram socket for ICMP is tried first (Linux gives
//! it to the groups in `net.ipv4.ping_group_range`), a raw one, for root, second.

use super::{Agent, Console, Failure, PATIENCE, astray, path, show};
use crate::local::report::{PeerStatus, PingTarget, Verdict, Way};
use crate::local::{Request, Response};
use rustix::net::{AddressFamily, SocketType, ipproto, socket};
use serde::Serialize;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// How long one echo may take. The first may have to wait for a WireGuard handshake, which is
/// tried again after five seconds (`REKEY_TIMEOUT` in the kernel's messages.h).
const ECHO: Duration = Duration::from_secs(2);
const FIRST_ECHO: Duration = Duration::from_secs(6);
/// The pause between an answer and the next echo.
const PAUSE: Duration = Duration::from_millis(250);
/// Bytes after the ICMP header, as other pings send.
const PAYLOAD_BYTES: usize = 56;
const HEADER_BYTES: usize = 8;

/// How often, unless it is said.
const COUNT: u16 = 4;
const COUNT_UNTIL_DIRECT: u16 = 60;

/// What came of it.
#[derive(Serialize)]
struct Summary {
    target: PingTarget,
    sent: u16,
    received: u16,
    /// Of each answer, in milliseconds.
    rtt_ms: Vec<f64>,
    /// The way of each answer, as `weir path` has it right after.
    ways: Vec<Way>,
    /// How long it took from the first echo to the first one with a direct path; `null` if there
    /// was none.
    direct_after_ms: Option<f64>,
}

pub(super) fn ping(
    agent: &Agent,
    console: &Console,
    peer: &str,
    count: Option<u16>,
    until_direct: bool,
) -> Result<(), Failure> {
    let usual = if until_direct {
        COUNT_UNTIL_DIRECT
    } else {
        COUNT
    };
    let plan = Plan {
        count: count.unwrap_or(usual),
        until_direct,
    };
    let request = Request::Ping {
        peer: peer.to_owned(),
    };
    let Response::Ping(target) = agent.ask(request, PATIENCE)? else {
        return Err(astray());
    };
    if target.policy.verdict == Verdict::Deny {
        let said = show::explanation_text(&target.policy);
        return Err(Failure::new(
            "denied",
            format!(
                "policy does not let this node ping {}\n{}",
                target.peer.name,
                said.trim_end()
            ),
            "Nothing was sent. Change the policy at the coordinator, or ask for another service \
             with `weir explain`.",
        ));
    }
    if !console.json {
        console.say(&opening(&target))?;
    }
    let summary = echo(agent, console, *target, &plan)?;
    if console.json {
        console.document(&summary)?;
    } else {
        let lost = || now(agent, &summary.target).is_ok_and(|peer| peer.way == Way::None);
        let lost = summary.received == 0 && lost();
        console.say(&closing(&summary, lost))?;
    }
    if summary.received == 0 || until_direct && summary.direct_after_ms.is_none() {
        return Err(Failure::Told);
    }
    Ok(())
}

/// How many echoes there are to be.
struct Plan {
    count: u16,
    until_direct: bool,
}

fn opening(target: &PingTarget) -> String {
    let PingTarget { peer, addr, .. } = target;
    let by = path::by(peer);
    let handshake = peer.handshake_seconds.map_or_else(
        || "no handshake yet".to_owned(),
        |seconds| format!("last handshake {seconds} s ago"),
    );
    format!("ping {} ({addr}), {by}, {handshake}\n", peer.name)
}

/// `lost`: nothing is known to come back from the peer by any way now.
fn closing(summary: &Summary, lost: bool) -> String {
    let Summary {
        target,
        sent,
        received,
        rtt_ms,
        ways: _,
        direct_after_ms,
    } = summary;
    if rtt_ms.is_empty() {
        let hint = match target.peer.handshake_seconds {
            Some(_) if lost => {
                "The tunnel has stood, and nothing comes back by it now: look whether UDP passes \
                 both ways, in this machine's own firewall too (`weir path` tells what is tried)."
            }
            Some(_) => "The tunnel has stood: the peer's own policy or firewall may drop echoes.",
            None => {
                "There was no WireGuard handshake: look whether UDP passes between the machines \
                 (`weir peers` has the endpoint)."
            }
        };
        return format!("{sent} sent, no answer\n{hint}\n");
    }
    let least = rtt_ms.iter().copied().fold(f64::INFINITY, f64::min);
    let most = rtt_ms.iter().copied().fold(0.0, f64::max);
    let mean = rtt_ms.iter().sum::<f64>() / f64::from(*received);
    let direct = match direct_after_ms {
        Some(ms) => format!("direct after {ms:.0} ms\n"),
        None => format!("not direct: `weir path {}` tells why\n", target.peer.name),
    };
    format!(
        "{sent} sent, {received} answered; least {least:.2} ms, mean {mean:.2} ms, \
         most {most:.2} ms\n{direct}"
    )
}

/// How the peer is reached now.
fn now(agent: &Agent, target: &PingTarget) -> Result<PeerStatus, Failure> {
    Ok(path::ask(agent, &target.peer.name)?.peer)
}

fn echo(
    agent: &Agent,
    console: &Console,
    target: PingTarget,
    plan: &Plan,
) -> Result<Summary, Failure> {
    let addr = target.addr;
    let pinger = Pinger::open(addr).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Failure::new(
            "not_permitted",
            "this user may not send echo requests",
            "Run the same command with sudo.",
        ),
        _ => Failure::new(
            "failed",
            format!("no echo request can be sent to {addr}: {error}"),
            "",
        ),
    })?;
    let mut summary = Summary {
        target,
        sent: 0,
        received: 0,
        rtt_ms: Vec::new(),
        ways: Vec::new(),
        direct_after_ms: None,
    };
    let begin = Instant::now();
    for sequence in 1..=plan.count {
        let patience = if sequence == 1 { FIRST_ECHO } else { ECHO };
        summary.sent += 1;
        let line = match pinger.echo(sequence, patience) {
            Ok(rtt) => {
                let ms = rtt.as_secs_f64() * 1000.0;
                summary.received += 1;
                summary.rtt_ms.push(ms);
                let peer = now(agent, &summary.target)?;
                summary.ways.push(peer.way);
                if peer.way == Way::Direct && summary.direct_after_ms.is_none() {
                    summary.direct_after_ms = Some(begin.elapsed().as_secs_f64() * 1000.0);
                }
                let by = path::by(&peer);
                format!("answer {sequence} from {addr} in {ms:.2} ms, {by}\n")
            }
            Err(error) => format!("no answer {sequence} from {addr}: {}\n", why(&error)),
        };
        if !console.json {
            console.say(&line)?;
        }
        if plan.until_direct && summary.direct_after_ms.is_some() {
            break;
        }
        if sequence < plan.count {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(summary)
}

fn why(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => "too late".to_owned(),
        // WireGuard answers so to packets that it cannot send (drivers/net/wireguard/device.c).
        Some(libc::EDESTADDRREQ) => "no endpoint is known for this peer yet".to_owned(),
        Some(libc::ENOKEY) => "no peer has this address yet".to_owned(),
        _ => error.to_string(),
    }
}

/// A socket for echoes with one address.
struct Pinger {
    socket: UdpSocket,
    /// Whether we must find our answers among everyone's, and behind an IPv4 header.
    raw: bool,
    v6: bool,
    /// Tells our echoes from other programs'. The kernel puts its own in on a datagram socket.
    id: u16,
}

impl Pinger {
    fn open(addr: IpAddr) -> io::Result<Self> {
        let v6 = addr.is_ipv6();
        let (family, protocol) = if v6 {
            (AddressFamily::INET6, ipproto::ICMPV6)
        } else {
            (AddressFamily::INET, ipproto::ICMP)
        };
        let (descriptor, raw) = match socket(family, SocketType::DGRAM, Some(protocol)) {
            Ok(descriptor) => (descriptor, false),
            Err(_) => (socket(family, SocketType::RAW, Some(protocol))?, true),
        };
        // Only `connect`, `send`, `recv` and timeouts are used, which know no UDP.
        let socket = UdpSocket::from(descriptor);
        socket.connect(SocketAddr::new(addr, 0))?;
        Ok(Self {
            socket,
            raw,
            v6,
            id: (std::process::id() & 0xffff) as u16,
        })
    }

    /// Sends one echo request and waits for its answer.
    fn echo(&self, sequence: u16, patience: Duration) -> io::Result<Duration> {
        let begin = Instant::now();
        self.socket.send(&request(self.v6, self.id, sequence))?;
        let mut buffer = [0; 512];
        loop {
            let left = patience.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            self.socket.set_read_timeout(Some(left))?;
            let length = self.socket.recv(&mut buffer)?;
            let packet = buffer.get(..length).unwrap_or_default();
            if self.answers(packet, sequence) {
                return Ok(begin.elapsed());
            }
        }
    }

    fn answers(&self, packet: &[u8], sequence: u16) -> bool {
        let skip = match packet.first() {
            // The IPv4 header's length is in its first byte, in words (RFC 791 3.1).
            Some(first) if self.raw && !self.v6 => usize::from(first & 15) * 4,
            _ => 0,
        };
        let Some([kind, _, _, _, id_high, id_low, seq_high, seq_low]) = packet
            .get(skip..)
            .and_then(|icmp| icmp.first_chunk().copied())
        else {
            return false;
        };
        // Echo reply: RFC 792, RFC 4443 4.2.
        let reply = if self.v6 { 129 } else { 0 };
        let ours = !self.raw || u16::from_be_bytes([id_high, id_low]) == self.id;
        kind == reply && ours && u16::from_be_bytes([seq_high, seq_low]) == sequence
    }
}

/// An echo request (RFC 792; RFC 4443 4.1, whose checksum the kernel fills in).
fn request(v6: bool, id: u16, sequence: u16) -> [u8; HEADER_BYTES + PAYLOAD_BYTES] {
    let mut packet = [0; HEADER_BYTES + PAYLOAD_BYTES];
    packet[0] = if v6 { 128 } else { 8 };
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The internet checksum of whole words (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_checks_out_and_loopback_answers_it() {
        let packet = request(false, 7, 9);
        assert_eq!(checksum(&packet), 0);
        for addr in ["127.0.0.1", "::1"] {
            let pinger = match Pinger::open(addr.parse().unwrap()) {
                Ok(pinger) => pinger,
                // An ordinary user outside `ping_group_range`, or a machine without IPv6: the
                // command says the same, and the lab runs it as root.
                Err(error) => {
                    assert_ne!(error.kind(), io::ErrorKind::InvalidInput);
                    continue;
                }
            };
            assert!(pinger.echo(3, ECHO).unwrap() < ECHO);
        }
    }

    #[test]
    fn only_our_own_answer_counts() {
        let socket = || UdpSocket::bind("127.0.0.1:0").unwrap();
        let raw4 = Pinger {
            socket: socket(),
            raw: true,
            v6: false,
            id: 7,
        };
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[20..28].copy_from_slice(&[0, 0, 0, 0, 0, 7, 0, 9]);
        assert!(raw4.answers(&packet, 9));
        assert!(!raw4.answers(&packet, 8));
        packet[25] = 8;
        assert!(!raw4.answers(&packet, 9));
        for length in 0..packet.len() {
            assert!(!raw4.answers(&packet[..length], 9));
        }
        let six = Pinger {
            raw: false,
            v6: true,
            ..raw4
        };
        assert!(six.answers(&[129, 0, 0, 0, 1, 1, 0, 9], 9));
        assert!(!six.answers(&[128, 0, 0, 0, 1, 1, 0, 9], 9));
    }
}
