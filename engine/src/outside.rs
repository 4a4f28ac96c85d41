//! [`Outside`]: whom the tunnel itself needs, and who therefore must never be reached through it.
//!
//! The coordinator, the relays and the proxy that leads to them may stand in a LAN that a peer offers as a subnet route. Were all
//! of that route to lead into the tunnel, the node would send into the tunnel what carries the
//! tunnel, and be cut off. So their addresses are left out of every subnet route
//! ([`crate::plan::Routing`]).
//!
//! Addresses that are written as such are known at once; names are looked up by the hand. Until that
//! has been tried ([`PATIENCE`]), subnet routes stay as they are in the kernel. A name keeps the
//! addresses that it had: a connection may still be at one of them.

use crate::netcheck::RESOLVE;
use proto::netmap::Network;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// How long subnet routes wait for names.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Names without an address are looked up this often.
const AGAIN: Duration = Duration::from_secs(5);
/// Most servers that are kept outside: the coordinator, the proxy, and the first of the relays.
pub const MAX_HOSTS: usize = 64;
/// Most addresses of one of them.
pub const MAX_ADDRS: usize = 8;

/// Servers that must be reached outside the tunnel.
#[derive(Clone, Debug, Default)]
pub struct Outside {
    /// `HOST:PORT`
    coordinator: Option<String>,
    /// `HOST:PORT`
    proxy: Option<String>,
    /// `HOST:PORT` of each.
    relays: Vec<String>,
    /// The addresses of each, by what stands before its port.
    hosts: BTreeMap<String, BTreeSet<IpAddr>>,
    /// When names are to be looked up.
    resolve_at: Option<Instant>,
    /// Until when subnet routes wait.
    wait_until: Option<Instant>,
}

impl Outside {
    /// The coordinator is spoken to at this `HOST:PORT`.
    pub fn set_coordinator(&mut self, now: Instant, name: String) {
        self.coordinator = Some(name);
        self.gather(now);
    }

    /// Servers are reached through the proxy at this `HOST:PORT`.
    pub fn set_proxy(&mut self, now: Instant, name: String) {
        self.proxy = Some(name);
        self.gather(now);
    }

    /// These are the network's servers.
    pub fn set_relays(&mut self, now: Instant, network: &Network) {
        let relays = network.relays.values().flat_map(|region| &region.hosts);
        let relays = relays.map(|host| host.addr.clone());
        self.relays = relays.chain(network.stun.iter().cloned()).collect();
        self.gather(now);
    }

    fn gather(&mut self, now: Instant) {
        let mut before = std::mem::take(&mut self.hosts);
        let mut fresh = false;
        let first = self.coordinator.iter().chain(&self.proxy);
        for name in first.chain(&self.relays) {
            let host = host_of(name);
            if self.hosts.len() == MAX_HOSTS || self.hosts.contains_key(host) {
                continue;
            }
            let known = before.remove(host);
            let addrs = known.unwrap_or_else(|| {
                let literal = literal(host);
                fresh |= literal.is_none();
                literal.into_iter().collect()
            });
            self.hosts.insert(host.to_owned(), addrs);
        }
        if fresh {
            self.resolve_at = Some(now);
            self.wait_until = Some(now + PATIENCE);
        }
    }

    /// Names were looked up. Returns whether that changed what is known.
    pub fn resolved(&mut self, found: &BTreeMap<SocketAddr, String>) -> bool {
        let waited = self.wait_until.is_some();
        let mut news = false;
        for (addr, name) in found {
            if let Some(addrs) = self.hosts.get_mut(host_of(name))
                && addrs.len() < MAX_ADDRS
            {
                news |= addrs.insert(addr.ip().to_canonical());
            }
        }
        if self.hosts.values().all(|addrs| !addrs.is_empty()) {
            self.wait_until = None;
        }
        news || waited != self.wait_until.is_some()
    }

    /// The host's links changed: so may have the resolver.
    pub fn hurry(&mut self, now: Instant) {
        self.resolve_at = self.resolve_at.map(|_| now);
    }

    /// Names to look up now, if any.
    pub fn poll(&mut self, now: Instant) -> Option<Vec<String>> {
        self.resolve_at.filter(|at| now >= *at)?;
        let first = self.coordinator.iter().chain(&self.proxy);
        let all = first.chain(&self.relays);
        let names: BTreeMap<&str, &String> = all
            .map(|name| (host_of(name), name))
            .filter(|(host, _)| literal(host).is_none() && self.hosts.contains_key(*host))
            .collect();
        let unknown = self.hosts.values().any(BTreeSet::is_empty);
        let pause = if unknown { AGAIN } else { RESOLVE };
        self.resolve_at = (!names.is_empty()).then_some(now + pause);
        (!names.is_empty()).then(|| names.into_values().cloned().collect())
    }

    /// Whether subnet routes need wait no longer, and did until now.
    pub fn take_waited(&mut self, now: Instant) -> bool {
        self.wait_until.take_if(|until| now >= *until).is_some()
    }

    /// When there is something to do at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.resolve_at.into_iter().chain(self.wait_until).min()
    }

    /// The addresses to be left out; `None` as long as names are being looked up.
    #[must_use]
    pub fn addrs(&self) -> Option<BTreeSet<IpAddr>> {
        let all = self.hosts.values().flatten().copied();
        self.wait_until.is_none().then(|| all.collect())
    }
}

/// What stands before the port.
fn host_of(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(host, _)| host)
}

fn literal(host: &str) -> Option<IpAddr> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let addr: IpAddr = host.parse().ok()?;
    Some(addr.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pairs: &[(&str, &str)]) -> BTreeMap<SocketAddr, String> {
        let pair = |(addr, name): &(&str, &str)| (addr.parse().unwrap(), (*name).to_owned());
        pairs.iter().map(pair).collect()
    }

    fn addrs(texts: &[&str]) -> Option<BTreeSet<IpAddr>> {
        Some(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn an_address_is_known_at_once_and_never_looked_up() {
        let now = Instant::now();
        let mut outside = Outside::default();
        outside.set_coordinator(now, "[2001:db8::1]:8443".to_owned());
        assert_eq!(outside.addrs(), addrs(&["2001:db8::1"]));
        assert_eq!(outside.poll(now), None);
        assert_eq!(outside.deadline(), None);
    }

    #[test]
    fn the_proxy_is_kept_outside_beside_the_coordinator() {
        let now = Instant::now();
        let mut outside = Outside::default();
        outside.set_proxy(now, "proxy.example:3128".to_owned());
        outside.set_coordinator(now, "192.0.2.1:8443".to_owned());
        assert_eq!(outside.addrs(), None);
        let asked = outside.poll(now);
        assert_eq!(asked, Some(vec!["proxy.example:3128".to_owned()]));
        outside.resolved(&found(&[("10.0.0.8:3128", "proxy.example:3128")]));
        assert_eq!(outside.addrs(), addrs(&["10.0.0.8", "192.0.2.1"]));
    }

    #[test]
    fn routes_wait_for_names_but_not_for_long() {
        let now = Instant::now();
        let mut outside = Outside::default();
        outside.set_coordinator(now, "hub.example:8443".to_owned());
        assert_eq!(outside.addrs(), None);
        assert_eq!(outside.poll(now), Some(vec!["hub.example:8443".to_owned()]));
        assert_eq!(outside.poll(now), None);
        assert!(!outside.take_waited(now));
        let mut patient = outside.clone();
        assert!(outside.resolved(&found(&[("192.0.2.1:8443", "hub.example:8443")])));
        assert_eq!(outside.addrs(), addrs(&["192.0.2.1"]));

        let later = now + PATIENCE;
        assert!(patient.take_waited(later));
        assert_eq!(patient.addrs(), addrs(&[]));
        let again = patient.deadline().expect("another look-up");
        assert!(patient.poll(again).is_some());
        assert!(patient.resolved(&found(&[("192.0.2.1:8443", "hub.example:8443")])));
        assert_eq!(patient.addrs(), addrs(&["192.0.2.1"]));
    }

    #[test]
    fn a_name_keeps_the_addresses_that_it_had_up_to_a_limit() {
        let now = Instant::now();
        let mut outside = Outside::default();
        outside.set_coordinator(now, "hub.example:8443".to_owned());
        for last in 1..=MAX_ADDRS + 3 {
            let at = format!("192.0.2.{last}:8443");
            outside.resolved(&found(&[
                (&at, "hub.example:8443"),
                ("192.0.2.99:1", "x:1"),
            ]));
        }
        let known = outside.addrs().expect("nothing is waited for");
        assert_eq!(known.len(), MAX_ADDRS);
        assert!(known.contains(&IpAddr::from([192, 0, 2, 1])));
    }
}
