//! Port sets: what one class may initiate to another, in the form that the programs test.
//!
//! A [`PortSet`] is canonical (ranges sorted, merged, apart), so that equal sets are equal values
//! and share one id whatever rules they came from. The ranges of one protocol, if they are few, go
//! with every pair that has the set ([`Grant`]). Of other protocols, up to [`INLINE_RANGES`] ranges
//! sit in the entry itself; more become pages of 512 bits, so that the cost of a test is the same
//! for one port and for a thousand ranges.

use ebpf::abi::{
    ANY_PROTOCOL, GRANT_RANGES, Grant, INLINE_RANGES, NO_PROTOCOL, NO_RANGE, PAGE_PORTS, Page,
    PageKey, Ports, PortsKey, SetId, ports_kind,
};
use proto::filter::Service;
use proto::net::{PortRange, Protocol};
use std::collections::BTreeMap;

/// Every protocol that carries ports.
const PORTED: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
/// Words of one page.
const WORD_BITS: u16 = 64;

/// What goes into the tables for one set.
#[derive(Debug)]
pub(super) struct Entries {
    /// With every pair that has the set.
    pub(super) grant: Grant,
    /// For protocols that the grant has not.
    pub(super) ports: Vec<(PortsKey, Ports)>,
    /// For protocols of many ranges.
    pub(super) pages: Vec<(PageKey, Page)>,
}

/// Protocols and ports, canonical.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PortSet {
    /// Protocols without ports, where none is named, are allowed.
    any: bool,
    /// Ranges by protocol; `ALL` alone for a protocol without ports.
    by_protocol: BTreeMap<u8, Vec<PortRange>>,
}

impl PortSet {
    /// The union of `services`.
    pub(super) fn of<'a>(services: impl IntoIterator<Item = &'a Service>) -> Self {
        let mut set = Self::default();
        for service in services {
            match service.protocol {
                Some(protocol) if protocol.has_ports() => set.add(protocol, service.ports),
                Some(protocol) => set.add(protocol, PortRange::ALL),
                None => {
                    set.any = true;
                    for protocol in PORTED {
                        set.add(protocol, service.ports);
                    }
                }
            }
        }
        for ranges in set.by_protocol.values_mut() {
            merge(ranges);
        }
        if set.any {
            // What the entry for "any other protocol" says already need not be said again.
            set.by_protocol
                .retain(|protocol, _| Protocol(*protocol).has_ports());
        }
        set
    }

    /// Whether it holds every protocol and port.
    pub(super) fn is_everything(&self) -> bool {
        let full = |protocol: &Protocol| {
            self.by_protocol
                .get(&protocol.0)
                .is_some_and(|ranges| ranges == &[PortRange::ALL])
        };
        self.any && PORTED.iter().all(full)
    }

    /// The protocols that have an entry of their own.
    pub(super) fn protocols(&self) -> impl Iterator<Item = Protocol> {
        self.by_protocol.keys().map(|protocol| Protocol(*protocol))
    }

    /// Whether the ports of a protocol are too scattered for its entry.
    pub(super) fn is_paged(&self, protocol: Protocol) -> bool {
        let ranges = self.by_protocol.get(&protocol.0);
        ranges.is_some_and(|ranges| ranges.len() > INLINE_RANGES)
    }

    /// Its entries under the id `set`.
    pub(super) fn entries(&self, set: SetId) -> Entries {
        let (mut ports, mut pages) = (Vec::new(), Vec::new());
        let mut grant = self.grant(set);
        if self.any {
            ports.push((
                PortsKey {
                    set,
                    protocol: ANY_PROTOCOL,
                },
                whole(ports_kind::ALL),
            ));
        }
        for (&protocol, ranges) in &self.by_protocol {
            if grant.protocol == u16::from(protocol) {
                continue;
            }
            let key = PortsKey {
                set,
                protocol: u32::from(protocol),
            };
            if ranges == &[PortRange::ALL] {
                ports.push((key, whole(ports_kind::ALL)));
            } else if ranges.len() <= INLINE_RANGES {
                ports.push((key, inline(ranges)));
            } else {
                ports.push((key, whole(ports_kind::PAGED)));
                pages.extend(paged(set, protocol, ranges));
            }
        }
        grant.more = u16::from(!ports.is_empty());
        Entries {
            grant,
            ports,
            pages,
        }
    }

    /// What goes with every pair: the first protocol whose ranges there is room for, those with
    /// ports before others.
    fn grant(&self, set: SetId) -> Grant {
        let mut grant = Grant {
            set,
            protocol: NO_PROTOCOL,
            more: 0,
            ranges: [NO_RANGE; GRANT_RANGES],
        };
        let fitting = self.by_protocol.iter();
        let fitting = fitting.filter(|(_, ranges)| ranges.len() <= GRANT_RANGES);
        let first = fitting.min_by_key(|(protocol, _)| !Protocol(**protocol).has_ports());
        if let Some((protocol, ranges)) = first {
            grant.protocol = u16::from(*protocol);
            for (to, range) in grant.ranges.iter_mut().zip(ranges) {
                *to = [range.first(), range.last()];
            }
        }
        grant
    }

    fn add(&mut self, protocol: Protocol, ports: PortRange) {
        self.by_protocol.entry(protocol.0).or_default().push(ports);
    }
}

/// Sorts `ranges` and joins those that touch.
fn merge(ranges: &mut Vec<PortRange>) {
    ranges.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges.drain(..) {
        match merged.last_mut() {
            Some(last) if range.first() <= last.last().saturating_add(1) => {
                let end = last.last().max(range.last());
                *last = PortRange::new(last.first(), end).unwrap_or(*last);
            }
            Some(_) | None => merged.push(range),
        }
    }
    *ranges = merged;
}

fn whole(kind: u16) -> Ports {
    Ports {
        kind,
        count: 0,
        ranges: [NO_RANGE; INLINE_RANGES],
    }
}

fn inline(ranges: &[PortRange]) -> Ports {
    let mut ports = whole(ports_kind::INLINE);
    for (to, range) in ports.ranges.iter_mut().zip(ranges) {
        *to = [range.first(), range.last()];
        ports.count += 1;
    }
    ports
}

fn paged(set: SetId, protocol: u8, ranges: &[PortRange]) -> BTreeMap<PageKey, Page> {
    let mut pages: BTreeMap<PageKey, Page> = BTreeMap::new();
    for port in ranges.iter().flat_map(|range| range.first()..=range.last()) {
        let key = PageKey {
            set,
            protocol: u16::from(protocol),
            page: port / PAGE_PORTS,
        };
        let bit = port % PAGE_PORTS;
        let page = pages.entry(key).or_insert(Page { words: [0; 8] });
        if let Some(word) = page.words.get_mut(usize::from(bit / WORD_BITS)) {
            *word |= 1 << (bit % WORD_BITS);
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(protocol: Option<Protocol>, first: u16, last: u16) -> Service {
        Service {
            protocol,
            ports: PortRange::new(first, last).unwrap(),
        }
    }

    #[test]
    fn equal_sets_are_equal_values_whatever_they_came_from() {
        let tcp = Some(Protocol::TCP);
        let one = PortSet::of(&[service(tcp, 1, 5), service(tcp, 6, 9), service(tcp, 3, 7)]);
        let two = PortSet::of(&[service(tcp, 1, 9)]);
        assert_eq!(one, two);
        assert_ne!(one, PortSet::of(&[service(Some(Protocol::UDP), 1, 9)]));
    }

    #[test]
    fn everything_is_known_as_such_and_a_port_range_of_any_protocol_is_not() {
        assert!(PortSet::of(&[service(None, 0, 65535)]).is_everything());
        assert!(!PortSet::of(&[service(None, 0, 65534)]).is_everything());
        let pieces = [service(None, 0, 9), service(None, 10, 65535)];
        assert!(PortSet::of(&pieces).is_everything());
    }

    #[test]
    fn many_ranges_become_pages_with_exactly_their_bits() {
        let wanted: Vec<u16> = (0..40).map(|i| i * 1000 + 7).collect();
        let services: Vec<_> = wanted
            .iter()
            .map(|port| service(Some(Protocol::UDP), *port, *port))
            .collect();
        let entries = PortSet::of(&services).entries(3);
        assert_eq!(entries.ports.len(), 1);
        assert_eq!(entries.ports[0].1.kind, ports_kind::PAGED);
        assert_eq!(
            (entries.grant.protocol, entries.grant.more),
            (NO_PROTOCOL, 1)
        );
        let bits: u32 = entries
            .pages
            .iter()
            .flat_map(|(_, page)| page.words)
            .map(u64::count_ones)
            .sum();
        assert_eq!(bits as usize, wanted.len());
    }

    #[test]
    fn the_top_port_neither_wraps_nor_is_lost() {
        let entries = PortSet::of(&[service(Some(Protocol::TCP), 65535, 65535)]).entries(1);
        assert_eq!(entries.grant.ranges[0], [65535, 65535]);
        assert_eq!((entries.grant.more, entries.ports.len()), (0, 0));
    }
}
