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

/// WireGuard's port behind a router of the kind [`Nat::PortRestricted`], as the world sees it.
pub const MAPPED_PORT: u16 = 40_001;

/// What a router does with UDP from its LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    /// One mapping for all destinations, at another port than the host's; in comes only what
    /// answers (RFC 4787: endpoint-independent mapping, address and port-dependent filtering).
    PortRestricted,
    /// Another random port for each destination.
    Symmetric,
    /// Nothing of it gets out.
    UdpBlocked,
}

impl Nat {
    /// Makes a router of `host`: for the LAN's IPv4 hosts, of which the one at `inside` is the
    /// node.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn install(self, host: &Host, inside: IpAddr) -> anyhow::Result<()> {
        host.run("sysctl -q -w net.ipv4.ip_forward=1")?;
        let outside = host.v4();
        let (translate, forward) = match self {
            Self::PortRestricted => (
                format!(
                    "ip saddr {inside} udp sport 51820 oifname eth0 snat ip to \
                     {outside}:{MAPPED_PORT}\n  oifname eth0 masquerade"
                ),
                "",
            ),
            Self::Symmetric => (
                "meta l4proto udp oifname eth0 masquerade fully-random\n  oifname eth0 masquerade"
                    .to_owned(),
                "",
            ),
            Self::UdpBlocked => (
                "oifname eth0 masquerade".to_owned(),
                "meta l4proto udp drop",
            ),
        };
        // What nobody asked for is dropped before it is tracked: a flow that the router has seen
        // from outside would take the port from the one that comes out later.
        let rules = format!(
            "table ip router {{
 chain out {{ type nat hook postrouting priority srcnat; policy accept;
  {translate}
 }}
 chain through {{ type filter hook forward priority filter; policy accept;
  iifname eth0 ct state new drop
  {forward}
 }}
 chain mine {{ type filter hook input priority filter; policy accept;
  iifname eth0 ct state new drop
 }}
}}
"
        );
        host.run_with("nft -f -", &rules)
            .with_context(|| format!("{} does not become a router", host.name))?;
        Ok(())
    }
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
