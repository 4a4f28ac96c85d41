//! What one packet costs in the programs, by `BPF_PROG_TEST_RUN`: known flows and refusals, with
//! few peers and with many.
//!
//! The cases alternate within one run; a row shows the least and the median of the rounds. The same
//! packet is asked about again and again, so its map entries are in the processor's cache: the
//! figure is the programs' work, not memory's.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::process::Command;

use agent::kernel::bpf::{Acl, Options, detach_and_unpin};
use anyhow::{Context, ensure};
use ebpf::abi::Direction;
use engine::acl::Acl as Lowered;
use proto::filter::{Filter, Rule, Selector, Service};
use proto::id::NodeId;
use proto::net::{PortRange, Prefix, Protocol};
use proto::netmap::{Me, Peer};
use serde_json::{Value, json};

use crate::nodes;

const DEVICE: &str = "weirbench0";
const OUR_V4: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const OUR_V6: Ipv6Addr = Ipv6Addr::new(0xfd7a, 0, 0, 0, 0, 0, 0, 1);
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;

#[derive(clap::Args)]
pub struct Args {
    /// Rounds; the cases alternate
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Runs of one case in one round
    #[arg(long, default_value_t = 200_000)]
    repeat: u32,
}

struct Case {
    name: &'static str,
    direction: Direction,
    packet: Vec<u8>,
    passes: bool,
}

/// Measures, prints a table, and returns the document.
pub fn run(args: &Args) -> anyhow::Result<Value> {
    ensure!(args.rounds > 0, "at least one round");
    enter_new_network().context("cannot make a network namespace: run as root")?;
    let mut rows = Vec::new();
    println!(
        "{:>7}  {:<34} {:>8} {:>8}",
        "peers", "packet", "least ns", "median"
    );
    for peers in [10_u32, 10_000] {
        for (case, times) in measure(peers, args)? {
            let (least, median) = (times[0], times[times.len() / 2]);
            println!("{peers:>7}  {case:<34} {least:>8} {median:>8}");
            rows.push(json!({
                "peers": peers, "packet": case, "least_ns": least, "median_ns": median,
            }));
        }
    }
    Ok(json!({"bench": "verdict", "repeat": args.repeat, "rounds": args.rounds, "rows": rows}))
}

#[allow(
    deprecated,
    reason = "only descriptor tables make it unsafe to unshare, and none is unshared here"
)]
fn enter_new_network() -> std::io::Result<()> {
    Ok(rustix::thread::unshare(
        rustix::thread::UnshareFlags::NEWNET,
    )?)
}

/// A device with programs, gone when dropped.
struct Bed {
    folder: PathBuf,
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = ip(&["link", "del", DEVICE]);
        let _ = detach_and_unpin(DEVICE, &self.folder);
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ip").args(arguments).output()?;
    ensure!(
        output.status.success(),
        "ip {}: failed",
        arguments.join(" ")
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn measure(peers: u32, args: &Args) -> anyhow::Result<Vec<(&'static str, Vec<u32>)>> {
    ip(&["tuntap", "add", DEVICE, "mode", "tun"])?;
    let folder = format!("/sys/fs/bpf/weir-bench-{}", std::process::id());
    let bed = Bed {
        folder: PathBuf::from(folder),
    };
    let shown = ip(&["-o", "link", "show", DEVICE])?;
    let index = shown.split(':').next().unwrap_or_default().trim().parse()?;
    let mut acl = Acl::open(DEVICE, index, &bed.folder, Options::default())?;
    let mut lowered = Lowered::default();
    let change = lowered.lower(&filter(), &me(), &crowd(peers))?;
    acl.set(lowered.tables(), Some(&change))?;
    let cases = cases();
    for (direction, packet) in handshakes() {
        let run = acl.run(direction, &packet, 1)?;
        ensure!(run.passes, "a handshake did not pass");
    }
    let mut times = vec![Vec::new(); cases.len()];
    for _ in 0..args.rounds {
        for (case, times) in cases.iter().zip(&mut times) {
            let run = acl.run(case.direction, &case.packet, args.repeat)?;
            ensure!(
                run.passes == case.passes,
                "{}: the other verdict",
                case.name
            );
            times.push(run.mean_ns);
        }
    }
    let sorted = cases.iter().zip(times).map(|(case, mut times)| {
        times.sort_unstable();
        (case.name, times)
    });
    Ok(sorted.collect())
}

/// An address of peer 7.
fn peer_v4() -> Ipv4Addr {
    Ipv4Addr::from_bits(0x6441_0007)
}

fn peer_v6() -> Ipv6Addr {
    Ipv6Addr::new(0xfd7a, 0, 0, 0, 0, 0, 1, 7)
}

fn handshakes() -> Vec<(Direction, Vec<u8>)> {
    let (v4, v6) = (IpAddr::V4(peer_v4()), IpAddr::V6(peer_v6()));
    vec![
        (Direction::Ingress, tcp(v4, 1000, OUR_V4.into(), 443, SYN)),
        (
            Direction::Egress,
            tcp(OUR_V4.into(), 443, v4, 1000, SYN_ACK),
        ),
        (Direction::Ingress, tcp(v6, 1000, OUR_V6.into(), 443, SYN)),
        (
            Direction::Egress,
            tcp(OUR_V6.into(), 443, v6, 1000, SYN_ACK),
        ),
    ]
}

fn cases() -> Vec<Case> {
    let (v4, v6) = (IpAddr::V4(peer_v4()), IpAddr::V6(peer_v6()));
    let case = |name, direction, packet, passes| Case {
        name,
        direction,
        packet,
        passes,
    };
    let (us4, us6) = (IpAddr::V4(OUR_V4), IpAddr::V6(OUR_V6));
    vec![
        case(
            "known flow, IPv4, in",
            Direction::Ingress,
            tcp(v4, 1000, us4, 443, ACK),
            true,
        ),
        case(
            "known flow, IPv4, out",
            Direction::Egress,
            tcp(us4, 443, v4, 1000, ACK),
            true,
        ),
        case(
            "known flow, IPv6, in",
            Direction::Ingress,
            tcp(v6, 1000, us6, 443, ACK),
            true,
        ),
        case(
            "first packet, port not allowed",
            Direction::Ingress,
            tcp(v4, 1, us4, 444, SYN),
            false,
        ),
        case(
            "source that no peer has",
            Direction::Ingress,
            tcp(IpAddr::from([9, 9, 9, 9]), 1, us4, 443, SYN),
            false,
        ),
    ]
}

fn tcp(src: IpAddr, sport: u16, dst: IpAddr, dport: u16, flags: u8) -> Vec<u8> {
    let mut bytes = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let head = [0x45, 0, 0, 64, 0, 0, 0, 0, 64, 6, 0, 0];
            [&head[..], &src.octets(), &dst.octets()].concat()
        }
        (src, dst) => {
            let octets = |addr: IpAddr| match addr {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            [
                &[0x60, 0, 0, 0, 0, 44, 6, 64][..],
                &octets(src),
                &octets(dst),
            ]
            .concat()
        }
    };
    bytes.extend(sport.to_be_bytes());
    bytes.extend(dport.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 4, 0, 0, 0, 0, 0]);
    bytes.extend([0; 24]);
    bytes
}

fn filter() -> Filter {
    Filter {
        labels: Vec::new(),
        ingress: vec![Rule {
            index: 0,
            line: 1,
            srcs: vec![
                Selector::Prefix(Prefix::ALL_V4),
                Selector::Prefix(Prefix::ALL_V6),
            ],
            dsts: vec![
                Selector::Prefix(Prefix::ALL_V4),
                Selector::Prefix(Prefix::ALL_V6),
            ],
            services: vec![Service {
                protocol: Some(Protocol::TCP),
                ports: PortRange::single(443),
            }],
        }],
        egress: Vec::new(),
    }
}

fn me() -> Me {
    nodes::me(vec![OUR_V4.into(), OUR_V6.into()])
}

fn crowd(count: u32) -> BTreeMap<NodeId, Peer> {
    let peer = |number: u32| {
        let [_, _, high, low] = number.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd7a, 0, 0, 0, 0, 0, 1, u16::from_be_bytes([high, low]));
        let v4 = Ipv4Addr::from_bits(0x6441_0000 + number);
        nodes::peer(number, vec![v4.into(), v6.into()])
    };
    (0..count).map(peer).collect()
}
