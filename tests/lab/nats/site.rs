//! Networks of a grid: nodes, each in a place of its own, and all the routers between them.
//!
//! ```text
//!  hub  relay   open             p 10.20.0.2                  d 10.31.0.2
//!   │     │      │               │                            │
//!   │     │      │              ─┴─ lan ─ router-p           ─┴─ lan ─ router-d
//!   │     │      │                        │ 192.0.2.120            │ 10.30.0.11
//!   │     │      │                        │                       ─┴─ lan ─ carrier-30
//!   │     │      │                        │                              │ 192.0.2.130
//!  ─┴─────┴──────┴────────────────────────┴──────────────────────────────┴── internet
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tests::lab::Lab;
use tests::nat::{Firewall, MAPPED_PORT, Mapping, Nat};
use tests::topology::Topology;

/// WireGuard's port.
const PORT: u16 = 51820;

/// Where a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the world, with both families.
    Open,
    /// In a LAN behind a router of this kind.
    Behind(Nat),
    /// In the LAN of the node before it.
    Beside,
    /// In a LAN behind a home's router, which is in the LAN of a carrier's router. Homes with the
    /// same carrier follow each other; `hairpin` says whether it joins them.
    Twice {
        home: Nat,
        carrier: Nat,
        hairpin: bool,
        /// Whether the carrier is that of the node before.
        same: bool,
    },
    /// In a LAN whose router lets no IPv4 UDP out, and treats IPv6 so.
    Six(Firewall),
}

/// A router to be made of a host.
struct Router {
    nat: Nat,
    mappings: Vec<Mapping>,
    hairpin: bool,
    firewall: Option<Firewall>,
}

/// A topology with the routers in it.
pub struct Site {
    topology: Topology,
    routers: BTreeMap<String, Router>,
    /// IPv6 prefixes of LANs, and their routers.
    prefixes: Vec<(String, String)>,
    /// The LAN that was made last, and hosts in it.
    lan: (String, u8, u8),
    /// The carrier that was made last, its number, and homes behind it.
    carrier: (String, u8, u8),
}

impl Site {
    /// Nodes at these places, numbered from 20 on.
    pub fn new(nodes: &[(&'static str, Place)]) -> Self {
        let mut site = Self {
            topology: Topology::star(&["near"]),
            routers: BTreeMap::new(),
            prefixes: Vec::new(),
            lan: Default::default(),
            carrier: Default::default(),
        };
        let mut number = 20;
        for (name, place) in nodes {
            site.add(name, *place, number);
            // A carrier takes one more.
            number += 2;
        }
        // Whoever has IPv6 on the internet knows every LAN's router.
        for host in &mut site.topology.hosts {
            let Some((switch, addrs)) = host.links.first() else {
                continue;
            };
            let mine = |gateway: &str| {
                addrs
                    .iter()
                    .any(|addr| addr.split('/').next() == Some(gateway))
            };
            if switch == "internet" && addrs.iter().any(|addr| addr.contains(':')) {
                let others = site.prefixes.iter().filter(|(_, gateway)| !mine(gateway));
                host.routes.extend(others.cloned());
            }
        }
        site
    }

    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Makes routers of those hosts that are some.
    pub fn install(&self, lab: &Lab) -> anyhow::Result<()> {
        for (name, router) in &self.routers {
            let host = lab.host(name);
            router
                .nat
                .install_for(&host, &router.mappings, router.hairpin)?;
            if let Some(firewall) = router.firewall {
                firewall.install(&host)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &'static str, place: Place, number: u8) {
        match place {
            Place::Open => {
                let addrs = format!("192.0.2.{number}/24 2001:db8::{number}/64");
                self.edit(|topology| topology.host(name, &[("internet", &addrs)]));
            }
            Place::Behind(nat) => {
                let outside = format!("192.0.2.{}/24", 100 + number);
                self.router(
                    &format!("router-{name}"),
                    ("internet", &outside),
                    number,
                    nat,
                );
                self.inside(name);
            }
            Place::Beside => self.inside(name),
            Place::Twice {
                home,
                carrier,
                hairpin,
                same,
            } => {
                if !same {
                    let (router, outside) = (
                        format!("carrier-{number}"),
                        format!("192.0.2.{}/24", 100 + number),
                    );
                    self.router(&router, ("internet", &outside), number, carrier);
                    if let Some(router) = self.routers.get_mut(&router) {
                        router.hairpin = hairpin;
                    }
                    self.carrier = (router, number, 0);
                }
                let (carrier, lan, homes) = &mut self.carrier;
                let outside = Ipv4Addr::new(10, *lan, 0, 11 + *homes);
                if let Some(carrier) = self.routers.get_mut(carrier) {
                    carrier.mappings.push(Mapping {
                        inside: SocketAddr::new(outside.into(), MAPPED_PORT),
                        port: MAPPED_PORT + 10 + u16::from(*homes),
                    });
                }
                *homes += 1;
                let (switch, gateway) = (format!("lan-{lan}"), format!("10.{lan}.0.1"));
                let outside = format!("{outside}/24");
                let router = format!("router-{name}");
                self.router(&router, (&switch, &outside), number + 1, home);
                if let Some(plan) = self.topology.hosts.last_mut() {
                    plan.routes.push(("default".to_owned(), gateway));
                }
                self.inside(name);
            }
            Place::Six(firewall) => self.six(name, number, firewall),
        }
    }

    fn six(&mut self, name: &str, number: u8, firewall: Firewall) {
        let outer = 100 + number;
        let outside = format!("192.0.2.{outer}/24 2001:db8::{outer}/64");
        let (switch, router) = (format!("lan-{number}"), format!("router-{name}"));
        let inside = format!("10.{number}.0.1/24 2001:db8:{number}::1/64");
        let own = format!("10.{number}.0.2/24 2001:db8:{number}::2/64");
        self.edit(|topology| {
            topology
                .switch(&switch)
                .host(&router, &[("internet", &outside), (&switch, &inside)])
                .host(name, &[(&switch, &own)])
                .route("default", &format!("10.{number}.0.1"))
                .route("default", &format!("2001:db8:{number}::1"))
        });
        let prefix = format!("2001:db8:{number}::/64");
        self.prefixes.push((prefix, format!("2001:db8::{outer}")));
        self.routers.insert(
            router,
            Router {
                nat: Nat::UdpBlocked,
                mappings: Vec::new(),
                hairpin: false,
                firewall: Some(firewall),
            },
        );
    }

    /// A router, and a LAN behind it.
    fn router(&mut self, name: &str, (switch, outside): (&str, &str), number: u8, nat: Nat) {
        let lan = format!("lan-{number}");
        let inside = format!("10.{number}.0.1/24");
        self.edit(|topology| {
            topology
                .switch(&lan)
                .host(name, &[(switch, outside), (&lan, &inside)])
        });
        let router = Router {
            nat,
            mappings: Vec::new(),
            hairpin: false,
            firewall: None,
        };
        self.routers.insert(name.to_owned(), router);
        self.lan = (name.to_owned(), number, 0);
    }

    /// A node in the LAN that was made last.
    fn inside(&mut self, name: &str) {
        let (router, number, hosts) = &mut self.lan;
        let addr = Ipv4Addr::new(10, *number, 0, 2 + *hosts);
        if let Some(router) = self.routers.get_mut(router) {
            router.mappings.push(Mapping {
                inside: SocketAddr::new(IpAddr::V4(addr), PORT),
                port: MAPPED_PORT + u16::from(*hosts),
            });
        }
        *hosts += 1;
        let (switch, gateway) = (format!("lan-{number}"), format!("10.{number}.0.1"));
        self.edit(|topology| {
            topology
                .host(name, &[(&switch, &format!("{addr}/24"))])
                .route("default", &gateway)
        });
    }

    fn edit(&mut self, change: impl FnOnce(Topology) -> Topology) {
        self.topology = change(std::mem::take(&mut self.topology));
    }
}
