//! Laying out the table of addresses ([`ebpf::addresses`]): a line for each, and pilots that lead
//! there.
//!
//! Addresses are put into buckets by their hash, a few in each. The fullest bucket comes first: its
//! pilot is the first number with which all its addresses hash to lines that are free. As a third of
//! the lines stays free, a few numbers do, even for the last; if none does, all begin again under
//! another seed.

use super::Tables;
use ebpf::abi::{Addr, Direction, Identity, PairKey, side};
use ebpf::addresses::{
    BUCKET, Book, Home, LINE_BYTES, Near, Owned, PILOTS, Place, SLAB_LINES, SLAB_PILOTS, SLABS,
    Slab,
};
use ebpf::verdict::is_routable;
use std::cmp::Reverse;

/// Lines that stay free beside one for each two addresses.
const SPARE_LINES: usize = 64;
/// Seeds that are tried.
const ATTEMPTS: u64 = 16;
/// What seeds are multiples of (Steele, Lea, Flood 2014).
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
/// More than the lines of a slab, to number lines by.
const LINES_BOUND: usize = 512;

/// The table laid out.
#[derive(Clone)]
pub struct Laid {
    /// How it is looked into.
    pub book: Book,
    /// All its slabs: of pilots, of lines, of newcomers.
    pub slabs: Vec<Slab>,
}

/// The node's first routable address of each family, IPv6 first.
#[must_use]
pub fn homes(tables: &Tables) -> [Home; 2] {
    [false, true].map(|v4| {
        let own = |(addr, identity): &(&Addr, &Identity)| {
            identity.side == side::OWN && addr.is_v4() == v4 && is_routable(addr)
        };
        let first = tables.identities.iter().find(own);
        first.map_or(Home::NONE, |(addr, identity)| Home {
            addr: *addr,
            identity: *identity,
        })
    })
}

/// The line of an address: if that is a peer's and routable, the grants between it and the node's
/// own first address of its family go with it.
#[must_use]
pub fn line(tables: &Tables, homes: &[Home; 2], addr: Addr, identity: Identity) -> Owned {
    let home = homes[usize::from(addr.is_v4())];
    if identity.side != side::PEER || home == Home::NONE || !is_routable(&addr) {
        return Owned::new(addr, identity, [Near::ASK; 2]);
    }
    let near = Direction::ALL.map(|direction| {
        let (from, to) = match direction {
            Direction::Ingress => (identity, home.identity),
            Direction::Egress => (home.identity, identity),
        };
        let key = PairKey {
            source: from.as_source,
            destination: to.as_destination,
            direction: direction as u32,
        };
        Near::of(tables.pairs.get(&key))
    });
    Owned::new(addr, identity, near)
}

/// Slabs that so many addresses need, with room for what joins before the next swap.
#[must_use]
pub fn slabs_for(addresses: usize) -> usize {
    let [pilots, lines, newcomers] = sizes(addresses);
    pilots + lines + newcomers
}

/// Slabs of each kind.
const fn sizes(addresses: usize) -> [usize; 3] {
    let lines = addresses + addresses / 2 + SPARE_LINES;
    let newcomers = addresses / 4 + SPARE_LINES;
    [
        buckets(addresses).div_ceil(SLAB_PILOTS as usize),
        lines.div_ceil(SLAB_LINES as usize),
        newcomers.div_ceil(SLAB_LINES as usize),
    ]
}

const fn buckets(addresses: usize) -> usize {
    addresses / BUCKET + 1
}

/// Lays out all addresses, the lines of a slab beginning at `shift`; `None` if that fails under many
/// seeds, which chance does not bring about.
#[must_use]
pub fn lay(tables: &Tables, shift: u32) -> Option<Laid> {
    let homes = homes(tables);
    let entries = tables.identities.iter();
    let lines: Vec<Owned> = entries
        .map(|(addr, identity)| line(tables, &homes, *addr, *identity))
        .collect();
    (0..ATTEMPTS).find_map(|attempt| lay_under(&lines, SEED.wrapping_mul(2 * attempt + 1), shift))
}

fn lay_under(lines: &[Owned], seed: u64, shift: u32) -> Option<Laid> {
    let [pilot_slabs, line_slabs, newcomer_slabs] = sizes(lines.len());
    let count = pilot_slabs + line_slabs + newcomer_slabs;
    let small = |number: usize| u32::try_from(number).ok();
    let book = Book {
        seed,
        buckets: small(buckets(lines.len()))?,
        pilot_slabs: small(pilot_slabs)?,
        line_slabs: small(line_slabs)?,
        newcomer_slabs: small(newcomer_slabs)?,
        shift,
        lines: SLAB_LINES,
    };
    if book.slabs() > SLABS {
        return None;
    }
    let mut slabs = vec![Slab::EMPTY; count];
    let mut hashed: Vec<(u32, u64, &Owned)> = lines
        .iter()
        .map(|line| {
            let hash = book.hash(&line.addr);
            (book.bucket(hash), hash, line)
        })
        .collect();
    hashed.sort_unstable_by_key(|(bucket, hash, _)| (*bucket, *hash));
    let mut groups: Vec<_> = hashed.chunk_by(|one, two| one.0 == two.0).collect();
    groups.sort_by_key(|group| Reverse(group.len()));
    let mut taken = vec![false; count * LINES_BOUND];
    let mut places = Vec::new();
    for group in groups {
        let pilot = (0..PILOTS).find_map(|pilot| {
            let pilot = u8::try_from(pilot).ok()?;
            free(&book, group, pilot, &mut taken, &mut places).then_some(pilot)
        })?;
        let (bucket, ..) = group.first()?;
        let Place { slab, at } = Book::pilot(*bucket);
        let mut written = slabs.get_mut(slab as usize)?.put_pilot(at, pilot);
        for (place, (.., line)) in places.iter().zip(group) {
            written &= slabs.get_mut(place.slab as usize)?.put_line(place.at, line);
        }
        if !written {
            return None;
        }
    }
    Some(Laid { book, slabs })
}

/// Takes the lines of a bucket under a pilot, if all of them are free.
fn free(
    book: &Book,
    group: &[(u32, u64, &Owned)],
    pilot: u8,
    taken: &mut [bool],
    places: &mut Vec<Place>,
) -> bool {
    let number = |place: &Place| place.slab as usize * LINES_BOUND + place.at as usize / LINE_BYTES;
    places.clear();
    for (_, hash, _) in group {
        let place = book.line(*hash, pilot);
        let is_taken = taken.get(number(&place)).is_none_or(|taken| *taken);
        if is_taken || places.contains(&place) {
            return false;
        }
        places.push(place);
    }
    for place in &*places {
        taken[number(place)] = true;
    }
    true
}

/// The line of an address, in slabs that `slab` gives by their number.
#[must_use]
pub fn find<S: std::borrow::Borrow<Slab>>(
    book: &Book,
    addr: &Addr,
    slab: impl Fn(u32) -> Option<S>,
) -> Option<Owned> {
    let hash = book.hash(addr);
    let at = Book::pilot(book.bucket(hash));
    let pilot = slab(at.slab)?.borrow().pilot(at.at)?;
    [book.line(hash, pilot), book.newcomer(hash)]
        .into_iter()
        .filter_map(|place| slab(place.slab)?.borrow().line(place.at))
        .find(|line| line.addr == *addr)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf::abi::{Grant, NO_PROTOCOL, NO_RANGE};
    use ebpf::addresses::{SLAB_BYTES, near};
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    const SHIFT: u32 = 8;

    fn identity(number: u32) -> Identity {
        Identity {
            as_source: number,
            as_destination: number + 1,
            side: side::PEER,
            share: number % 4_000,
        }
    }

    fn addresses(from: u32, to: u32) -> impl Iterator<Item = (Addr, Identity)> {
        (from..to).flat_map(|number| {
            let v4 = Ipv4Addr::from_bits(0x6440_0001 + number);
            let v6 = Ipv6Addr::from_bits(0xfd7a << 112 | u128::from(number));
            [IpAddr::V4(v4), IpAddr::V6(v6)].map(|addr| (Addr::from(addr), identity(number)))
        })
    }

    fn tables(addresses: impl Iterator<Item = (Addr, Identity)>) -> Tables {
        Tables {
            identities: addresses.collect(),
            ..Tables::default()
        }
    }

    #[test]
    fn every_address_is_found_in_one_line_and_no_other_is() {
        for count in [0, 1, 7, 160, 1_000, 50_000] {
            let tables = tables(addresses(0, count));
            let laid = lay(&tables, SHIFT).unwrap();
            assert_eq!(laid.slabs.len(), slabs_for(tables.identities.len()));
            let slab = |number: u32| laid.slabs.get(number as usize);
            for (addr, identity) in &tables.identities {
                let line = find(&laid.book, addr, slab).unwrap();
                assert_eq!(line.identity(), *identity);
                // By its pilot: nobody is a newcomer yet.
                let newcomer = laid.book.newcomer(laid.book.hash(addr));
                let there = slab(newcomer.slab).unwrap().line(newcomer.at);
                assert_eq!(there, Some(Owned::NONE));
            }
            let strangers = addresses(count, count + 1_000);
            assert_eq!(
                strangers
                    .filter(|(addr, _)| find(&laid.book, addr, slab).is_some())
                    .count(),
                0
            );
        }
    }

    #[test]
    fn the_largest_table_fits_its_slabs() {
        assert!(slabs_for(super::super::MAX_IDENTITIES) <= SLABS as usize);
        assert!(LINES_BOUND > SLAB_LINES as usize);
    }

    #[test]
    fn places_stay_within_their_slabs_whatever_the_hash() {
        let book = Book {
            seed: 1,
            buckets: u32::MAX,
            pilot_slabs: 3,
            line_slabs: 900,
            newcomer_slabs: 121,
            shift: u32::MAX,
            lines: SLAB_LINES,
        };
        for hash in (0..64)
            .map(|bit| u64::MAX << bit)
            .chain([0, 1, u64::MAX >> 1])
        {
            for place in [
                book.line(hash, 0),
                book.line(hash, 255),
                book.newcomer(hash),
            ] {
                assert!((3..SLABS).contains(&place.slab), "{place:?}");
                assert!(place.at as usize + LINE_BYTES <= SLAB_BYTES, "{place:?}");
                assert_eq!(place.at % 8, 0, "{place:?}");
            }
        }
    }

    #[test]
    fn a_line_says_what_its_pairs_with_the_node_say() {
        let own: Addr = IpAddr::from([100, 64, 0, 1]).into();
        let peer: Addr = IpAddr::from([100, 64, 0, 2]).into();
        let sixth: Addr = Addr::from(IpAddr::V6(Ipv6Addr::from_bits(0xfd7a << 112)));
        let ours = Identity {
            side: side::OWN,
            share: 0,
            ..identity(10)
        };
        let grant = Grant {
            set: 4,
            protocol: 6,
            more: 0,
            ranges: [[22, 22], [80, 90], NO_RANGE, NO_RANGE],
        };
        let lowered = |grant: Option<Grant>| {
            let mut tables =
                tables([(own, ours), (peer, identity(20)), (sixth, identity(30))].into_iter());
            let pair = PairKey {
                source: 20,
                destination: 11,
                direction: 0,
            };
            tables.pairs.extend(grant.map(|grant| (pair, grant)));
            let homes = homes(&tables);
            [peer, sixth, own].map(|addr| line(&tables, &homes, addr, tables.identities[&addr]))
        };
        let kinds = |grant| lowered(grant).map(|line| line.heads.map(|head| head.kind));
        let [near_peer, ..] = lowered(Some(grant));
        assert_eq!(near_peer.near(Direction::Ingress).ranges, grant.ranges);
        assert_eq!(near_peer.near(Direction::Ingress).protocol, 6);
        let ask = [near::ASK; 2];
        // No address of ours is of the other family; and we are no peer of ours.
        let want = |ingress| [[ingress, near::NOTHING], ask, ask];
        assert_eq!(kinds(Some(grant)), want(near::RANGES));
        assert_eq!(kinds(None), want(near::NOTHING));
        let more = Grant { more: 1, ..grant };
        assert_eq!(kinds(Some(more)), want(near::RANGES_AND_MORE));
        let elsewhere = Grant {
            protocol: NO_PROTOCOL,
            ..more
        };
        assert_eq!(kinds(Some(elsewhere)), want(near::ASK));
        assert_eq!(kinds(Some(Grant::EVERYTHING)), want(near::EVERYTHING));
    }
}
