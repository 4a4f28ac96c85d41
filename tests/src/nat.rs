//! Routers that translate addresses, and servers that tell what comes out of them.
//!
//! A router is a host of the topology with the world at `eth0` and a LAN at `eth1`; [`Nat::install`]
//! makes it one. A [`Reflector`] is a STUN server of the least kind.

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
    /// Nothing of it gets out.
    UdpBlocked,
}

impl Nat {
    /// Makes a router of this kind of `host`, whatever it was before, with no memory: for the LAN's
    /// IPv4 hosts, of which the one at `inside` is the node.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn install(self, host: &Host, inside: IpAddr) -> anyhow::Result<()> {
        host.run("sysctl -q -w net.ipv4.ip_forward=1")?;
        let outside = host.v4();
        // The node's mapping where the kind has one for all destinations.
        let one = format!(
            "ip saddr {inside} udp sport 51820 oifname eth0 snat ip to {outside}:{MAPPED_PORT}
  oifname eth0 masquerade"
        );
        let mine = format!("iifname eth0 udp dport {MAPPED_PORT}");
        let come_in = format!("dnat ip to {inside}:51820");
        let (translate, come_in, forward) = match self {
            Self::FullCone => (one, format!("{mine} {come_in}"), ""),
            Self::AddressRestricted => (
                one,
                format!("{mine} ip saddr @spoken {come_in}"),
                "iifname eth1 udp sport 51820 update @spoken { ip daddr timeout 2m }",
            ),
            Self::PortRestricted => (one, String::new(), ""),
            Self::Symmetric => (
                "meta l4proto udp oifname eth0 masquerade fully-random\n  oifname eth0 masquerade"
                    .to_owned(),
                String::new(),
                "",
            ),
            Self::UdpBlocked => (
                "oifname eth0 masquerade".to_owned(),
                String::new(),
                "meta l4proto udp drop",
            ),
        };
        // What nobody asked for is dropped before it is tracked: a flow that the router has seen
        // from outside would take the port from the one that comes out later.
        let rules = format!(
            "table ip router
delete table ip router
table ip router {{
 set spoken {{ type ipv4_addr; flags dynamic,timeout; size 1024; }}
 chain into {{ type nat hook prerouting priority dstnat; policy accept;
  {come_in}
 }}
 chain out {{ type nat hook postrouting priority srcnat; policy accept;
  {translate}
 }}
 chain through {{ type filter hook forward priority filter; policy accept;
  {forward}
  ct status dnat accept
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
