//! What a lab is made of: switches, and hosts that are plugged into them.
//!
//! A topology is plain data. Addresses come from the ranges set aside for documentation
//! (RFC 5737, RFC 3849) and from private ones for LANs, so that nothing outside is ever meant.

use std::collections::BTreeMap;

/// Switches and hosts.
#[derive(Clone, Debug, Default)]
pub struct Topology {
    /// Segments: whoever is plugged into one hears everybody else in it.
    pub switches: Vec<String>,
    /// Machines.
    pub hosts: Vec<HostPlan>,
    /// The longest packet that each of these switches and its cables take, in bytes; 1,500 where
    /// nothing is said.
    pub mtus: BTreeMap<String, u32>,
}

/// One machine of a topology.
#[derive(Clone, Debug)]
pub struct HostPlan {
    /// Its name, short: it is part of interface names.
    pub name: String,
    /// Its interfaces in order, `eth0` first: which switch, and the addresses with their length.
    pub links: Vec<(String, Vec<String>)>,
    /// Static routes: to which prefix, over which gateway.
    pub routes: Vec<(String, String)>,
}

impl Topology {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a switch.
    #[must_use]
    pub fn switch(mut self, name: &str) -> Self {
        self.switches.push(name.to_owned());
        self
    }

    /// Lets the switch that was added last take packets of this many bytes.
    ///
    /// # Panics
    /// If no switch was added yet.
    #[must_use]
    pub fn mtu(mut self, bytes: u32) -> Self {
        let switch = self.switches.last().expect("an MTU belongs to a switch");
        self.mtus.insert(switch.clone(), bytes);
        self
    }

    /// Adds a host; each link is a switch and the host's addresses there, separated by spaces.
    #[must_use]
    pub fn host(mut self, name: &str, links: &[(&str, &str)]) -> Self {
        let link = |(switch, addrs): &(&str, &str)| {
            let addrs = addrs.split_whitespace().map(str::to_owned).collect();
            ((*switch).to_owned(), addrs)
        };
        self.hosts.push(HostPlan {
            name: name.to_owned(),
            links: links.iter().map(link).collect(),
            routes: Vec::new(),
        });
        self
    }

    /// Adds a route to the host added last.
    ///
    /// # Panics
    /// If no host was added yet.
    #[must_use]
    pub fn route(mut self, prefix: &str, gateway: &str) -> Self {
        let host = self.hosts.last_mut().expect("a route belongs to a host");
        host.routes.push((prefix.to_owned(), gateway.to_owned()));
        self
    }

    /// A coordinator `hub` and these hosts, all on one switch, v4 and v6:
    /// the hub has 192.0.2.1, the others follow from 192.0.2.11 on.
    #[must_use]
    pub fn star(names: &[&str]) -> Self {
        let mut topology = Self::new()
            .switch("internet")
            .host("hub", &[("internet", "192.0.2.1/24 2001:db8::1/64")]);
        for (number, name) in (11..).zip(names) {
            let addrs = format!("192.0.2.{number}/24 2001:db8::{number}/64");
            topology = topology.host(name, &[("internet", &addrs)]);
        }
        topology
    }

    /// Adds a host, 10.1.0.2, that is alone on a LAN behind `router`, which is 192.0.2.21 on the
    /// internet. IPv4 alone.
    #[must_use]
    pub fn behind_a_router(self, name: &str) -> Self {
        self.switch("lan")
            .host(
                "router",
                &[("internet", "192.0.2.21/24"), ("lan", "10.1.0.1/24")],
            )
            .host(name, &[("lan", "10.1.0.2/24")])
            .route("default", "10.1.0.1")
    }

    /// The small office of the demo: a coordinator, three servers, a client, and two sites whose
    /// routers join their LANs.
    ///
    /// ```text
    ///  hub  web  db  build  laptop            paris-desk            oslo-desk
    ///   │    │    │    │      │               10.1.0.2              10.2.0.2
    ///  ─┴────┴────┴────┴──────┴── internet        │                     │
    ///   192.0.2.0/24  │       │               ────┴── paris-lan     ────┴── oslo-lan
    ///               paris   oslo                  │ 10.1.0.1            │ 10.2.0.1
    ///               .21     .22                 paris                 oslo
    /// ```
    #[must_use]
    pub fn office() -> Self {
        Self::star(&["web", "db", "build", "laptop"])
            .switch("paris-lan")
            .switch("oslo-lan")
            .host(
                "paris",
                &[
                    ("internet", "192.0.2.21/24 2001:db8::21/64"),
                    ("paris-lan", "10.1.0.1/24 fd01::1/64"),
                ],
            )
            .host("paris-desk", &[("paris-lan", "10.1.0.2/24 fd01::2/64")])
            .route("default", "10.1.0.1")
            .route("default", "fd01::1")
            .host(
                "oslo",
                &[
                    ("internet", "192.0.2.22/24 2001:db8::22/64"),
                    ("oslo-lan", "10.2.0.1/24 fd02::1/64"),
                ],
            )
            .host("oslo-desk", &[("oslo-lan", "10.2.0.2/24 fd02::2/64")])
            .route("default", "10.2.0.1")
            .route("default", "fd02::1")
    }

    /// The named topologies that `cargo xtask lab` offers, each with a line about it.
    #[must_use]
    pub fn named() -> Vec<(&'static str, &'static str, Self)> {
        vec![
            (
                "pair",
                "a hub and two hosts on one switch",
                Self::star(&["a", "b"]),
            ),
            (
                "trio",
                "a hub and three hosts on one switch",
                Self::star(&["a", "b", "c"]),
            ),
            (
                "office",
                "a hub, three servers, a client, two sites with a LAN each",
                Self::office(),
            ),
        ]
    }
}
