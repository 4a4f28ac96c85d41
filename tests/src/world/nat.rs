//! Routers that translate addresses, of every kind that RFC 4787 tells apart.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::mix;

/// What of the other end's address counts (RFC 4787, 4.1 and 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depends {
    /// Nothing: "endpoint-independent".
    Nothing,
    /// The address.
    Address,
    /// Address and port.
    AddressAndPort,
}

/// Which port a new mapping gets (RFC 4787, 4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Any, by chance.
    Chance,
    /// One so much further than the last, whoever had that.
    Steps(u16),
    /// Any of so many, by chance.
    Block(u16),
}

/// The kind of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// When a flow from the same inner address and port gets another outer port.
    pub mapping: Depends,
    /// Which port it gets.
    pub ports: Ports,
    /// Who may send to a mapping.
    pub filtering: Depends,
    /// Whether inner hosts reach each other by their outer addresses (RFC 4787, 6).
    pub hairpin: bool,
    /// How long a mapping lives after the last packet out (RFC 4787, 4.3: 2 minutes, in practice 30 s).
    pub expiry: Duration,
    /// Whether UDP passes at all.
    pub udp: bool,
}

impl Kind {
    const fn new(mapping: Depends, filtering: Depends) -> Kind {
        Kind {
            mapping,
            ports: Ports::Chance,
            filtering,
            hairpin: false,
            expiry: Duration::from_secs(30),
            udp: true,
        }
    }

    /// Everybody may send to a mapping.
    pub const FULL_CONE: Kind = Kind::new(Depends::Nothing, Depends::Nothing);
    /// Addresses that were sent to may.
    pub const RESTRICTED: Kind = Kind::new(Depends::Nothing, Depends::Address);
    /// Addresses and ports that were sent to may.
    pub const PORT_RESTRICTED: Kind = Kind::new(Depends::Nothing, Depends::AddressAndPort);
    /// Each destination gets a mapping of its own.
    pub const SYMMETRIC: Kind = Kind::new(Depends::AddressAndPort, Depends::AddressAndPort);
    /// Likewise, and the next port always, so that it can be foreseen.
    pub const SYMMETRIC_IN_TURN: Kind = Kind {
        ports: Ports::Steps(1),
        ..Kind::SYMMETRIC
    };
    /// Likewise, and one of few ports.
    pub const SYMMETRIC_OF_FEW: Kind = Kind {
        ports: Ports::Block(16),
        ..Kind::SYMMETRIC
    };
    /// No UDP.
    pub const BLOCKED: Kind = Kind {
        udp: false,
        ..Kind::PORT_RESTRICTED
    };

    /// Whether two nodes behind routers of these kinds can meet without guessing of ports: a hole
    /// must be where the other one's packets come from.
    #[must_use]
    pub fn can_meet(self, other: Kind) -> bool {
        if !self.udp || !other.udp {
            return false;
        }
        let meets = |hard: Kind, easy: Kind| {
            hard.mapping == Depends::Nothing || easy.filtering != Depends::AddressAndPort
        };
        let both_hard = self.mapping != Depends::Nothing && other.mapping != Depends::Nothing;
        !both_hard && meets(self, other) && meets(other, self)
    }
}

/// A mapping's key: the inner end, and as much of the other as counts.
type Key = (SocketAddr, Option<IpAddr>, Option<u16>);

struct Mapping {
    inner: SocketAddr,
    /// Who was sent to, and when last.
    sent: BTreeMap<SocketAddr, Duration>,
    last: Duration,
}

/// A router.
pub struct Nat {
    /// Its kind; may change while it runs.
    pub kind: Kind,
    /// Its address outside.
    pub outside: IpAddr,
    ports: BTreeMap<Key, u16>,
    mappings: BTreeMap<u16, Mapping>,
    last: u16,
    drawn: u64,
}

/// Where ports begin, and how many there are.
const FIRST: u16 = 20_000;
const COUNT: u16 = 40_000;
/// How long a free port is looked for.
const MOST_DRAWS: usize = 1_000;

impl Nat {
    /// A router that has translated nothing yet.
    #[must_use]
    pub fn new(kind: Kind, outside: IpAddr) -> Nat {
        Nat {
            kind,
            outside,
            ports: BTreeMap::new(),
            mappings: BTreeMap::new(),
            last: FIRST,
            drawn: 0,
        }
    }

    /// Forgets all mappings, as on a restart.
    pub fn forget(&mut self) {
        self.ports.clear();
        self.mappings.clear();
    }

    /// Other hosts behind it speak to so many others, who were not spoken to before.
    pub fn busy(&mut self, flows: u16) {
        for _ in 0..flows {
            self.draw();
        }
    }

    /// The port of a new mapping, unless none is free.
    fn draw(&mut self) -> Option<u16> {
        (0..MOST_DRAWS).find_map(|_| {
            self.drawn += 1;
            let chance = mix(self.drawn ^ u64::from(self.last) << 32);
            let chance = |count: u16| FIRST + (chance % u64::from(count)) as u16;
            self.last = match self.kind.ports {
                Ports::Chance => chance(COUNT),
                Ports::Block(size) => chance(size),
                Ports::Steps(step) => FIRST + (self.last - FIRST + step) % COUNT,
            };
            (!self.mappings.contains_key(&self.last)).then_some(self.last)
        })
    }

    /// The outer source of a packet from inside, or `None` if it is dropped.
    pub fn out(&mut self, now: Duration, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        if !self.kind.udp {
            return None;
        }
        self.expire(now);
        let key: Key = match self.kind.mapping {
            Depends::Nothing => (from, None, None),
            Depends::Address => (from, Some(to.ip()), None),
            Depends::AddressAndPort => (from, Some(to.ip()), Some(to.port())),
        };
        let port = match self.ports.get(&key) {
            Some(port) => *port,
            None => {
                let port = self.draw()?;
                self.ports.insert(key, port);
                let mapping = Mapping {
                    inner: from,
                    sent: BTreeMap::new(),
                    last: now,
                };
                self.mappings.insert(port, mapping);
                port
            }
        };
        let mapping = self.mappings.get_mut(&port)?;
        mapping.last = now;
        mapping.sent.insert(to, now);
        Some(SocketAddr::new(self.outside, port))
    }

    /// The inner destination of a packet from outside, or `None` if it is dropped.
    pub fn back(&mut self, now: Duration, from: SocketAddr, port: u16) -> Option<SocketAddr> {
        if !self.kind.udp {
            return None;
        }
        self.expire(now);
        let mapping = self.mappings.get(&port)?;
        let admitted = match self.kind.filtering {
            Depends::Nothing => true,
            Depends::Address => mapping.sent.keys().any(|to| to.ip() == from.ip()),
            Depends::AddressAndPort => mapping.sent.contains_key(&from),
        };
        admitted.then_some(mapping.inner)
    }

    fn expire(&mut self, now: Duration) {
        let expiry = self.kind.expiry;
        self.mappings.retain(|_, mapping| {
            mapping.sent.retain(|_, last| now - *last < expiry);
            now - mapping.last < expiry
        });
        let alive = &self.mappings;
        self.ports.retain(|_, port| alive.contains_key(port));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn nat(kind: Kind) -> Nat {
        Nat::new(kind, at("192.0.2.1:0").ip())
    }

    #[test]
    fn a_cone_keeps_its_mapping_and_lets_everybody_in() {
        let mut nat = nat(Kind::FULL_CONE);
        let inner = at("10.0.0.2:51820");
        let outer = nat.out(SECOND, inner, at("198.51.100.1:1")).unwrap();
        assert_eq!(nat.out(SECOND, inner, at("198.51.100.2:2")), Some(outer));
        assert_eq!(
            nat.back(SECOND, at("203.0.113.9:9"), outer.port()),
            Some(inner)
        );
        assert_eq!(
            nat.back(SECOND * 32, at("203.0.113.9:9"), outer.port()),
            None
        );
    }

    #[test]
    fn a_restricted_one_asks_who_was_sent_to() {
        let mut nat = nat(Kind::RESTRICTED);
        let outer = nat
            .out(SECOND, at("10.0.0.2:5"), at("198.51.100.1:1"))
            .unwrap();
        assert!(
            nat.back(SECOND, at("198.51.100.1:7"), outer.port())
                .is_some()
        );
        assert!(
            nat.back(SECOND, at("198.51.100.2:1"), outer.port())
                .is_none()
        );
        nat.kind = Kind::PORT_RESTRICTED;
        assert!(
            nat.back(SECOND, at("198.51.100.1:7"), outer.port())
                .is_none()
        );
        assert!(
            nat.back(SECOND, at("198.51.100.1:1"), outer.port())
                .is_some()
        );
    }

    #[test]
    fn a_symmetric_one_maps_each_destination_anew() {
        let mut nat = nat(Kind::SYMMETRIC);
        let one = nat
            .out(SECOND, at("10.0.0.2:5"), at("198.51.100.1:1"))
            .unwrap();
        let two = nat
            .out(SECOND, at("10.0.0.2:5"), at("198.51.100.1:2"))
            .unwrap();
        assert_ne!(one, two);
        assert!(nat.back(SECOND, at("198.51.100.1:2"), one.port()).is_none());
    }

    #[test]
    fn ports_come_in_turn_by_chance_or_of_few() {
        let ports = |kind: Kind| {
            let mut nat = nat(kind);
            let to = |port: u16| SocketAddr::from(([198, 51, 100, 1], port));
            let mut out = |port| nat.out(SECOND, at("10.0.0.2:5"), to(port)).unwrap().port();
            (1..=8).map(&mut out).collect::<Vec<u16>>()
        };
        let steps = ports(Kind::SYMMETRIC_IN_TURN);
        assert!(
            steps.windows(2).all(|two| two[1] == two[0] + 1),
            "{steps:?}"
        );
        let few = ports(Kind::SYMMETRIC_OF_FEW);
        assert!(
            few.iter().max().unwrap() - few.iter().min().unwrap() < 16,
            "{few:?}"
        );
        let chance = ports(Kind::SYMMETRIC);
        assert!(chance.iter().max().unwrap() - chance.iter().min().unwrap() > 1_000);
    }

    #[test]
    fn who_can_meet() {
        let all = [
            Kind::FULL_CONE,
            Kind::RESTRICTED,
            Kind::PORT_RESTRICTED,
            Kind::SYMMETRIC,
        ];
        for a in all {
            for b in all {
                let hard = [a, b].contains(&Kind::SYMMETRIC)
                    && (a == b || [a, b].contains(&Kind::PORT_RESTRICTED));
                assert_eq!(a.can_meet(b), !hard, "{a:?} {b:?}");
            }
            assert!(!a.can_meet(Kind::BLOCKED));
        }
    }
}
