//! Sets of addresses as sorted ranges: union, difference, and the ways to write them.
//!
//! Used where prefixes alone do not do: ipsets that remove, the internet, and the hosted control
//! plane's ranges. A set costs what its ranges cost, never what its addresses would.

use super::selector::range_to_prefixes;
use crate::net::Prefix;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A set of addresses of both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AddrSet {
    v4: Ranges,
    v6: Ranges,
}

/// Sorted, disjoint, not touching; both ends included.
type Ranges = Vec<(u128, u128)>;

impl AddrSet {
    /// The union of prefixes.
    pub(super) fn of<'a>(prefixes: impl IntoIterator<Item = &'a Prefix>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for prefix in prefixes {
            if prefix.is_v4() {
                v4.push(bounds(prefix));
            } else {
                v6.push(bounds(prefix));
            }
        }
        Self {
            v4: merged(v4),
            v6: merged(v6),
        }
    }

    /// What is in either.
    pub(super) fn union(&self, other: &Self) -> Self {
        Self {
            v4: merged([&self.v4[..], &other.v4].concat()),
            v6: merged([&self.v6[..], &other.v6].concat()),
        }
    }

    /// What is in `self` and not in `other`.
    pub(super) fn without(&self, other: &Self) -> Self {
        Self {
            v4: subtract(&self.v4, &other.v4),
            v6: subtract(&self.v6, &other.v6),
        }
    }

    /// What is in both.
    pub(super) fn intersection(&self, other: &Self) -> Self {
        self.without(&self.without(other))
    }

    /// Whether `addr` is in the set.
    pub(super) fn contains(&self, addr: IpAddr) -> bool {
        self.overlaps(&Prefix::host(addr))
    }

    /// Whether the set and the prefix share an address.
    pub(super) fn overlaps(&self, prefix: &Prefix) -> bool {
        let (first, last) = bounds(prefix);
        let ranges = if prefix.is_v4() { &self.v4 } else { &self.v6 };
        let at = ranges.partition_point(|(_, end)| *end < first);
        ranges.get(at).is_some_and(|(start, _)| *start <= last)
    }

    /// First and last address of every range, IPv4 first.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        let v4 = |n: u128| IpAddr::V4(Ipv4Addr::from_bits(n as u32));
        let v6 = |n: u128| IpAddr::V6(Ipv6Addr::from_bits(n));
        let low = self.v4.iter().map(move |(a, b)| (v4(*a), v4(*b)));
        low.chain(self.v6.iter().map(move |(a, b)| (v6(*a), v6(*b))))
    }

    /// The fewest prefixes that hold exactly the set.
    pub(super) fn prefixes(&self) -> Vec<Prefix> {
        let pieces = self.ranges().filter_map(|(a, b)| range_to_prefixes(a, b));
        pieces.flatten().collect()
    }
}

/// First and last address of a prefix, as numbers.
fn bounds(prefix: &Prefix) -> (u128, u128) {
    let (first, bits) = match prefix.addr() {
        IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
        IpAddr::V6(v6) => (v6.to_bits(), 128),
    };
    let free = bits - u32::from(prefix.len());
    let host = 1u128.checked_shl(free).map_or(u128::MAX, |size| size - 1);
    (first, first | host)
}

fn merged(mut ranges: Ranges) -> Ranges {
    ranges.sort_unstable();
    let mut out: Ranges = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match out.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => out.push((first, last)),
        }
    }
    out
}

fn subtract(from: &Ranges, take: &Ranges) -> Ranges {
    let mut out = Vec::new();
    for &(first, last) in from {
        let mut start = Some(first);
        for &(low, high) in take
            .iter()
            .filter(|(low, high)| *low <= last && *high >= first)
        {
            if let Some(at) = start
                && at < low
            {
                out.push((at, low - 1));
            }
            start = high.checked_add(1).filter(|next| *next <= last);
        }
        out.extend(start.map(|at| (at, last)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(texts: &[&str]) -> AddrSet {
        let list: Vec<Prefix> = texts.iter().map(|text| text.parse().unwrap()).collect();
        AddrSet::of(&list)
    }

    #[test]
    fn neighbours_merge_and_holes_split() {
        assert_eq!(set(&["10.0.0.0/9", "10.128.0.0/9"]), set(&["10.0.0.0/8"]));
        let rest =
            set(&["10.0.0.0/8"]).without(&set(&["10.0.0.0/24", "10.1.0.0/16", "11.0.0.0/8"]));
        let ranges: Vec<String> = rest.ranges().map(|(a, b)| format!("{a}-{b}")).collect();
        assert_eq!(ranges, ["10.0.1.0-10.0.255.255", "10.2.0.0-10.255.255.255"]);
        assert_eq!(set(&["::/0"]).without(&set(&["::/0"])), AddrSet::default());
        assert_eq!(set(&["0.0.0.0/0", "::/0"]).prefixes().len(), 2);
    }
}
