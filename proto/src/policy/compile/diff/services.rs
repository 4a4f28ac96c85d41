//! Sets of services, and how they are written for people.

use crate::filter::Service;
use crate::net::{PortRange, Protocol};
use std::collections::BTreeMap;
use std::fmt;

/// A set of services: by protocol, port ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Services(BTreeMap<Protocol, Ranges>);

/// First and last port of each range.
type Ranges = Vec<(u16, u16)>;

impl Services {
    pub(super) fn of<'s>(services: impl IntoIterator<Item = &'s Service>) -> Self {
        let mut out = Self::default();
        for service in services {
            let protocols = match service.protocol {
                Some(protocol) => protocol..=protocol,
                None => Protocol(0)..=Protocol(u8::MAX),
            };
            for number in protocols.start().0..=protocols.end().0 {
                let protocol = Protocol(number);
                let all = if protocol.has_ports() {
                    service.ports
                } else {
                    PortRange::ALL
                };
                let ports = out.0.entry(protocol).or_default();
                ports.push((all.first(), all.last()));
            }
        }
        out.tidy();
        out
    }

    pub(super) fn union<'s>(sets: impl Iterator<Item = &'s Self>) -> Self {
        let mut out = Self::default();
        for (protocol, ports) in sets.flat_map(|set| &set.0) {
            out.0.entry(*protocol).or_default().extend(ports);
        }
        out.tidy();
        out
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn tidy(&mut self) {
        for ports in self.0.values_mut() {
            ports.sort_unstable();
            let mut merged: Ranges = Vec::with_capacity(ports.len());
            for (first, last) in ports.drain(..) {
                match merged.last_mut() {
                    Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                    _ => merged.push((first, last)),
                }
            }
            *ports = merged;
        }
    }

    pub(super) fn without(&self, other: &Self) -> Self {
        let mut out = Self::default();
        for (protocol, ports) in &self.0 {
            let taken = other.0.get(protocol).map_or(&[][..], Ranges::as_slice);
            let mut left = Vec::new();
            for &(first, last) in ports {
                let mut start = Some(first);
                for &(low, high) in taken
                    .iter()
                    .filter(|(low, high)| *low <= last && *high >= first)
                {
                    if let Some(at) = start
                        && at < low
                    {
                        left.push((at, low - 1));
                    }
                    start = high.checked_add(1).filter(|next| *next <= last);
                }
                left.extend(start.map(|at| (at, last)));
            }
            if !left.is_empty() {
                out.0.insert(*protocol, left);
            }
        }
        out
    }

    pub(super) fn list(&self) -> Vec<Service> {
        let one = |protocol: &Protocol, (first, last): &(u16, u16)| {
            let ports = PortRange::new(*first, *last).ok()?;
            Some(Service {
                protocol: Some(*protocol),
                ports,
            })
        };
        let all = self.0.iter();
        all.flat_map(|(protocol, ports)| ports.iter().filter_map(|range| one(protocol, range)))
            .collect()
    }
}

/// `tcp+udp 22,80-90; icmp+ipv6-icmp; tcp on all ports`: protocols of the same ports together.
impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut by_ports: BTreeMap<(bool, &Ranges), Vec<String>> = BTreeMap::new();
        for (protocol, ports) in &self.0 {
            let key = (!protocol.has_ports(), ports);
            let name = match protocol.to_string() {
                number if number.starts_with(|c: char| c.is_ascii_digit()) => {
                    format!("protocol {number}")
                }
                name => name,
            };
            by_ports.entry(key).or_default().push(name);
        }
        let mut first = true;
        for ((portless, ports), protocols) in by_ports {
            f.write_str(if first { "" } else { "; " })?;
            first = false;
            f.write_str(&protocols.join("+"))?;
            if portless {
                continue;
            }
            if ports == &[(PortRange::ALL.first(), PortRange::ALL.last())] {
                f.write_str(" on all ports")?;
                continue;
            }
            let ranges = ports.iter().map(|(first, last)| {
                if first == last {
                    first.to_string()
                } else {
                    format!("{first}-{last}")
                }
            });
            write!(f, " {}", ranges.collect::<Vec<_>>().join(","))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_with_the_same_ports_are_written_together() {
        let service = |protocol, first, last| Service {
            protocol: Some(protocol),
            ports: PortRange::new(first, last).unwrap(),
        };
        let services = Services::of(&[
            service(Protocol::TCP, 80, 89),
            service(Protocol::TCP, 90, 90),
            service(Protocol::TCP, 22, 22),
            service(Protocol::UDP, 22, 22),
            service(Protocol::UDP, 80, 90),
            service(Protocol::ICMP, 0, 0),
            service(Protocol::SCTP, 0, 65535),
        ]);
        let text = services.to_string();
        assert_eq!(text, "sctp on all ports; tcp+udp 22,80-90; icmp");
    }
}
