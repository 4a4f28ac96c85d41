//! Routers that translate addresses, and servers that tell what comes out of them.
//!
//! A router is a host of the topology with the world at `eth0` and a LAN at `eth1`; [`Nat::install`]
//! makes it one, and [`Firewall::install`] says what it does with IPv6. A [`Reflector`] is a STUN server of the least kind.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

use crate::host::Host;
use crate::topology::Topology;

/// WireGuard's port behind a router that shows all the world one, as the world sees it.
pub const MAPPED_PORT: u16 = 40_001;

/// What a router does with UDP from its LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Nat {
    /// One mapping for all destinations, and whoever knows it may use it (RFC 4787:
    /// endpoint-independent mapping and filtering; "full cone").
    FullCone,
    /// One mapping for all destinations; in comes what hosts send that were spoken to, from any
    /// port of theirs (address-dependent filtering; "restricted").
    AddressRestricted,
    /// One mapping for all destinations, at another port than the host's; in comes only what
    /// answers (RFC 4787: endpoint-independent mapping, address and port-dependent filtering).
    PortRestricted,
    /// Another random port for each destination.
    Symmetric,
    /// Another port for each destination, always the next one.
    SymmetricInTurn,
    /// Nothing of it gets out.
    UdpBlocked,
}

/// The first port of a router that gives out one after the other, and how many it has.
const TURNS: (u16, u16) = (42_000, 512);

/// A node's WireGuard behind a router, and the router's port that the world sees it at, if the kind
/// has one for all destinations.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// The node, or the next router before it.
    pub inside: SocketAddr,
    /// The router's port.
    pub port: u16,
}

impl Nat {
    /// Makes a router of this kind of `host`, whatever it was before, with no memory: for the LAN's
    /// IPv4 hosts, of which the one at `inside` is the node.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn install(self, host: &Host, inside: IpAddr) -> anyhow::Result<()> {
        let inside = SocketAddr::new(inside, 51820);
        let port = MAPPED_PORT;
        self.install_for(host, &[Mapping { inside, port }], false)
    }

    /// The same for several in the LAN. With `hairpin`, they reach each other by the router's own
    /// address: whoever knows a mapping may use it from the LAN.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn install_for(
        self,
        host: &Host,
        mappings: &[Mapping],
        hairpin: bool,
    ) -> anyhow::Result<()> {
        host.run("sysctl -q -w net.ipv4.ip_forward=1")?;
        // A packet that turns back into the LAN is no reason to tell of a shorter way.
        for device in ["all", "default", "eth1"] {
            host.run(&format!(
                "sysctl -q -w net.ipv4.conf.{device}.send_redirects=0"
            ))?;
        }
        let (mut translate, mut come_in, mut forward) = Default::default();
        for mapping in mappings {
            self.rules(
                host.v4(),
                *mapping,
                &mut translate,
                &mut come_in,
                &mut forward,
            );
            if hairpin {
                let Mapping { inside, port } = mapping;
                let (outside, ip, own) = (host.v4(), inside.ip(), inside.port());
                come_in += &format!(
                    "  iifname eth1 ip daddr {outside} udp dport {port} dnat ip to {inside}\n"
                );
                translate += &format!(
                    "  ip saddr {ip} udp sport {own} oifname eth1 ct status dnat \
                     snat ip to {outside}:{port}\n"
                );
            }
        }
        match self {
            Self::Symmetric => {
                translate += "  meta l4proto udp oifname eth0 masquerade fully-random\n";
            }
            Self::SymmetricInTurn => translate += &in_turn(host.v4()),
            Self::UdpBlocked => forward += "  meta l4proto udp drop\n",
            Self::FullCone | Self::AddressRestricted | Self::PortRestricted => {}
        }
        // What nobody asked for is dropped before it is tracked: a flow that the router has seen
        // from outside would take the port from the one that comes out later.
        let rules = format!(
            "table ip router
delete table ip router
table ip router {{
 set spoken {{ type ipv4_addr; flags dynamic,timeout; size 1024; }}
 chain into {{ type nat hook prerouting priority dstnat; policy accept;
{come_in} }}
 chain out {{ type nat hook postrouting priority srcnat; policy accept;
{translate}  oifname eth0 masquerade
 }}
 chain through {{ type filter hook forward priority filter; policy accept;
{forward}  ct status dnat accept
  iifname eth0 ct state new drop
 }}
 chain mine {{ type filter hook input priority filter; policy accept;
  iifname eth0 ct state new drop
 }}
}}
"
        );
        host.run_with("nft -f -", &rules)
            .with_context(|| format!("{} does not become a router", host.name))?;
        host.run("conntrack -F")?;
        Ok(())
    }

    /// The rules that one mapping needs: to translate what leaves, to let in what comes, and to
    /// remember what was spoken to.
    fn rules(
        self,
        outside: IpAddr,
        Mapping { inside, port }: Mapping,
        translate: &mut String,
        come_in: &mut String,
        forward: &mut String,
    ) {
        let (ip, own) = (inside.ip(), inside.port());
        if matches!(
            self,
            Self::Symmetric | Self::SymmetricInTurn | Self::UdpBlocked
        ) {
            return;
        }
        *translate +=
            &format!("  ip saddr {ip} udp sport {own} oifname eth0 snat ip to {outside}:{port}\n");
        let mine = format!("  iifname eth0 udp dport {port}");
        match self {
            Self::FullCone => *come_in += &format!("{mine} dnat ip to {inside}\n"),
            Self::AddressRestricted => {
                *come_in += &format!("{mine} ip saddr @spoken dnat ip to {inside}\n");
                *forward += &format!(
                    "  iifname eth1 udp sport {own} update @spoken {{ ip daddr timeout 2m }}\n"
                );
            }
            Self::PortRestricted | Self::Symmetric | Self::SymmetricInTurn | Self::UdpBlocked => {}
        }
    }
}

/// The rule of a router that gives out one port after the other.
fn in_turn(outside: IpAddr) -> String {
    let (first, count) = TURNS;
    let turn = |number: u16| format!("{number} : {}", first + number);
    let turns: Vec<String> = (0..count).map(turn).collect();
    format!(
        "  meta l4proto udp oifname eth0 \
         snat ip to {outside} : numgen inc mod {count} map {{ {} }}\n",
        turns.join(", ")
    )
}

/// What a router does with IPv6 from its LAN: it translates nothing, it only lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Firewall {
    /// Everything, in both directions.
    Open,
    /// Out everything, in only what answers (RFC 6092).
    Answers,
    /// No UDP.
    UdpBlocked,
}

impl Firewall {
    /// Makes `host` such a router for IPv6.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn install(self, host: &Host) -> anyhow::Result<()> {
        host.run("sysctl -q -w net.ipv6.conf.all.forwarding=1")?;
        let rule = match self {
            Self::Open => "accept",
            Self::Answers => "iifname eth0 meta l4proto udp ct state new drop",
            Self::UdpBlocked => "meta l4proto udp drop",
        };
        let rules = format!(
            "table ip6 firewall
delete table ip6 firewall
table ip6 firewall {{
 chain through {{ type filter hook forward priority filter; policy accept;
  {rule}
 }}
}}
"
        );
        host.run_with("nft -f -", &rules)
            .with_context(|| format!("{} does not become a firewall", host.name))?;
        Ok(())
    }
}

/// Two LANs behind a router each, and hosts without a router.
///
/// ```text
///  hub      public…                a 10.1.0.2              b 10.2.0.2
///   │          │                   │                       │
///   │ .1       │ .11 …            ─┴─ lan-a ─ .1          ─┴─ lan-b ─ .1
///   │          │                         router-a                router-b
///   │          │                          │ 192.0.2.21            │ 192.0.2.22
///  ─┴──────────┴──────────────────────────┴───────────────────────┴── internet
/// ```
#[must_use]
pub fn two_lans(public: &[&str]) -> Topology {
    let lan = |topology: Topology, letter: &str, number: u8| {
        let (router, lan) = (format!("router-{letter}"), format!("lan-{letter}"));
        let (outside, inside) = (
            format!("192.0.2.2{number}/24"),
            format!("10.{number}.0.1/24"),
        );
        topology
            .switch(&lan)
            .host(&router, &[("internet", &outside), (&lan, &inside)])
            .host(letter, &[(&lan, &format!("10.{number}.0.2/24"))])
            .route("default", &format!("10.{number}.0.1"))
    };
    lan(lan(Topology::star(public), "a", 1), "b", 2)
}

/// Answers binding requests on one port of a host until it is dropped.
pub struct Reflector {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Reflector {
    /// Starts to answer.
    ///
    /// # Errors
    /// If the address is taken or not the host's.
    pub fn start(host: &Host, at: SocketAddr) -> anyhow::Result<Self> {
        /// How long a stop may go unnoticed.
        const GLANCE: Duration = Duration::from_millis(100);
        let socket = host.udp(at.ip(), at.port())?;
        socket.set_read_timeout(Some(GLANCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; proto::stun::MAX_BYTES];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                if let Ok(transaction) = proto::stun::parse_request(&buffer[..length]) {
                    // A lost answer is asked for again.
                    let _ = socket.send_to(&proto::stun::response(transaction, from), from);
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Reflector {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and there is nobody to tell.
            let _ = thread.join();
        }
    }
}
