//! Where the guard stands ([`super::bpf::guard`]): interfaces by name become links, and what the guard has to
//! know of this host is read where it can change without a word to the agent.

use super::bpf::guard::{Orders, Report, Underlay};
use super::{Kernel, StepError};
use engine::plan::PeerState;
use proto::key::NodeKey;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

/// Switches of the network namespace.
const SWITCHES: &str = "/proc/sys/net";

/// What is to be guarded, as the daemon knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guarding {
    /// WireGuard's UDP port.
    pub port: u16,
    /// Whether XDP may be used.
    pub xdp: bool,
    /// Interfaces of the underlay.
    pub interfaces: BTreeSet<String>,
    /// The host's addresses there.
    pub own: BTreeSet<IpAddr>,
}

impl Kernel {
    /// Puts the guard where it is wanted, or takes it away. Nothing depends on it: whatever fails
    /// here, packets pass.
    pub(super) async fn guard(&mut self, wanted: Option<&Guarding>) -> Result<Report, StepError> {
        self.orders = match wanted {
            Some(wanted) => Some(self.orders(wanted).await?),
            None => None,
        };
        let report = match &self.orders {
            Some(orders) => self.guard.set(orders)?,
            None => self.guard.remove()?,
        };
        for index in &report.left {
            self.routes.remove_clsact(*index).await?;
        }
        Ok(report)
    }

    async fn orders(&self, wanted: &Guarding) -> io::Result<Orders> {
        let mut underlays = Vec::new();
        for name in &wanted.interfaces {
            // One that just went will be heard of.
            if let Some(link) = self.routes.link(name).await?
                && !link.loopback
            {
                underlays.push(Underlay {
                    name: name.clone(),
                    index: link.index,
                    ethernet: link.ethernet,
                    card: link.card,
                });
            }
        }
        Ok(Orders {
            port: wanted.port,
            xdp: wanted.xdp,
            forwards: forwards(&underlays),
            underlays,
            own: wanted.own.clone(),
        })
    }

    /// Tells the guard what an observation showed: where peers are, whether this host began to
    /// forward, and that somebody took it away.
    pub(super) fn inform_guard(&mut self, peers: &BTreeMap<NodeKey, PeerState>) {
        let Some(orders) = &mut self.orders else {
            return;
        };
        let endpoints = peers.values().filter_map(|peer| peer.stats.endpoint);
        let mut told = self.guard.exempt(endpoints.map(|endpoint| endpoint.ip()));
        let forwards = forwards(&orders.underlays);
        if forwards != orders.forwards || !self.guard.is_whole() {
            orders.forwards = forwards;
            told = told.and_then(|()| self.guard.set(orders)).map(drop);
        }
        if let Err(error) = told {
            tracing::debug!(%error, "the guard knows less than it could");
        }
    }
}

/// Whether packets that come in by one of these may go on to another machine.
fn forwards(underlays: &[Underlay]) -> bool {
    let is_on = |path: &str| {
        let word = std::fs::read_to_string(format!("{SWITCHES}/{path}")).unwrap_or_default();
        !matches!(word.trim(), "" | "0")
    };
    let by = |name: &str| {
        let conf = |family: &str| is_on(&format!("{family}/conf/{name}/forwarding"));
        conf("ipv4") || conf("ipv6")
    };
    is_on("ipv6/conf/all/forwarding") || underlays.iter().any(|one| by(&one.name))
}
