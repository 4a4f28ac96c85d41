//! How the world sees this node: asking on the engine's behalf, and telling people.

use super::Daemon;
use crate::local::report::{Family, Nat, Netcheck, PortMapping, Problem, StunServer};
use crate::port::Word;
use crate::portmap::{Opened, Protocol};
use engine::{Input, netcheck};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use tokio::net::lookup_host;

impl Daemon {
    /// Looks names up, all at once; those that have no address now are left out.
    pub(super) fn resolve(&self, names: Vec<String>) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            let mut found = BTreeMap::new();
            for name in names {
                match lookup_host(&name).await {
                    Ok(addrs) => found.extend(addrs.map(|addr| (addr, name.clone()))),
                    Err(error) => tracing::debug!(name, %error, "a STUN server has no address"),
                }
            }
            // The loop may have ended; then nobody waits.
            let _ = inputs.send(Input::Resolved(found)).await;
        });
    }

    /// Asks servers. What cannot be sent now is asked again in a moment.
    pub(super) fn ask_servers(&self, servers: &BTreeSet<SocketAddr>) {
        if let Ok(port) = &self.port {
            for server in servers {
                let _ = port.try_send(Word::Ask(*server));
            }
        }
    }

    /// What is wrong with sharing WireGuard's port, where somebody wants that.
    pub(super) fn port_problem(&self) -> Option<Problem> {
        let why = self.port.as_ref().err()?;
        self.engine.netcheck().is_on().then(|| Problem {
            code: "port_not_shared".to_owned(),
            message: format!("STUN servers cannot be asked from the WireGuard port: {why}"),
            next: "The agent needs CAP_NET_RAW for that: run it as the unit does.".to_owned(),
        })
    }

    /// What is known of this node's NAT.
    pub(super) fn netcheck(&self) -> Netcheck {
        let check = self.engine.netcheck();
        let own = self.engine.own_addrs();
        let about = self.engine.about();
        let family = |v4: bool| {
            let nat = nat(check.nat(v4, &own));
            let is = |addr: &SocketAddr| addr.is_ipv4() == v4;
            Family {
                nat,
                words: words(nat).to_owned(),
                endpoints: about.endpoints.iter().copied().filter(is).collect(),
                reflexive: check.reflexive().into_iter().find(is),
            }
        };
        let servers = check.servers().iter().map(|(addr, server)| StunServer {
            name: server.name.clone(),
            addr: *addr,
            mapped: server.mapped,
            rtt_ms: server
                .rtt
                .map(|rtt| rtt.as_millis().try_into().unwrap_or(u64::MAX)),
        });
        let regions = self.regions();
        let engine = self.engine.status();
        let peers = engine
            .netmap
            .iter()
            .flat_map(|netmap| netmap.peers.values());
        let unreached = peers.filter(|peer| peer.online && !self.engine.is_reached(&peer.key));
        let mut unreached: Vec<String> = unreached.map(|peer| peer.name.clone()).collect();
        unreached.sort();
        Netcheck {
            listen_port: self.config.listen_port,
            addrs: own.iter().copied().collect(),
            v4: family(true),
            v6: family(false),
            servers: servers.collect(),
            home: regions
                .iter()
                .find(|region| region.home)
                .map(|region| region.name.clone()),
            regions,
            port_mapping: self.opened.borrow().map(port_mapping),
            unreached,
            discovery_dropped: self.seals.dropped(),
        }
    }
}

fn port_mapping(opened: Opened) -> PortMapping {
    let protocol = match opened.protocol {
        Protocol::Pcp => "PCP",
        Protocol::NatPmp => "NAT-PMP",
        Protocol::Upnp => "UPnP",
    };
    PortMapping {
        addr: opened.outside,
        protocol: protocol.to_owned(),
    }
}

fn nat(nat: netcheck::Nat) -> Nat {
    match nat {
        netcheck::Nat::Unknown => Nat::Unknown,
        netcheck::Nat::Silent => Nat::Silent,
        netcheck::Nat::None => Nat::None,
        netcheck::Nat::Easy => Nat::Easy,
        netcheck::Nat::OneServer => Nat::OneServer,
        netcheck::Nat::Hard => Nat::Hard,
    }
}

fn words(nat: Nat) -> &'static str {
    match nat {
        Nat::Unknown => "not known: no STUN server was asked",
        Nat::Silent => {
            "no STUN server answers: UDP is blocked, or there is no way out in this family"
        }
        Nat::None => "no address translation: the world sees an address of this machine",
        Nat::Easy => {
            "behind a NAT that shows everybody the same address and port: peers can be told it, \
             and direct paths can be made"
        }
        Nat::OneServer => {
            "behind a NAT; a second STUN server is needed to tell whether direct paths can be made"
        }
        Nat::Hard => {
            "behind a NAT that shows each destination another port: a direct path can be made only \
             with peers that have no NAT, or a port opened for them, or where ports come in turn"
        }
    }
}
