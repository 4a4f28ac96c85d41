//! Laying out the tables of lines ([`ebpf::lines`]): a place for every entry in one of its two lines.
//!
//! There are as many lines as there may be entries before the next swap, so each line has room for
//! two and holds less than one. Whoever finds both of his lines full moves another entry to its
//! second line. If that goes on for too long, all begin again under another seed and with more lines.

use ebpf::abi::{Addr, Grant, Identity, PairKey};
use ebpf::lines::{
    ENTRIES, Granted, GrantedLine, Owned, OwnedLine, Plan, hash_of_addr, hash_of_pair, pair_of,
    places,
};
use std::collections::BTreeMap;

/// Room for what joins before the next swap: a quarter, and this many lines.
const SPARE_LINES: usize = 128;
/// Entries that may be moved for one.
const MOVES: usize = 128;
/// Seeds that are tried.
const ATTEMPTS: u64 = 16;
/// What seeds are multiples of (Steele, Lea, Flood 2014).
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// An entry of a line.
pub trait Entry: Copy + PartialEq {
    /// A line of them.
    type Line: Copy;
    /// No entry.
    const NONE: Self;
    /// A line without any.
    const EMPTY: Self::Line;

    /// The hash of its key.
    fn hash(&self, seed: u64) -> u64;
    /// The same entry without its key, which nobody can find.
    #[must_use]
    fn nameless(self) -> Self;
    /// A line's entries.
    fn entries(line: &Self::Line) -> &[Self; ENTRIES];
    /// The same, to be written.
    fn entries_mut(line: &mut Self::Line) -> &mut [Self; ENTRIES];
}

impl Entry for Owned {
    type Line = OwnedLine;
    const NONE: Self = Self::NONE;
    const EMPTY: OwnedLine = OwnedLine {
        entries: [Self::NONE; ENTRIES],
    };

    fn hash(&self, seed: u64) -> u64 {
        hash_of_addr(&self.addr, seed)
    }

    fn nameless(self) -> Self {
        Self {
            addr: Self::NONE.addr,
            ..self
        }
    }

    fn entries(line: &OwnedLine) -> &[Self; ENTRIES] {
        &line.entries
    }

    fn entries_mut(line: &mut OwnedLine) -> &mut [Self; ENTRIES] {
        &mut line.entries
    }
}

impl Entry for Granted {
    type Line = GrantedLine;
    const NONE: Self = Self {
        pair: 0,
        grant: Grant {
            set: 0,
            protocol: 0,
            more: 0,
            ranges: [[0; 2]; 4],
        },
    };
    const EMPTY: GrantedLine = GrantedLine {
        entries: [Self::NONE; ENTRIES],
    };

    fn hash(&self, seed: u64) -> u64 {
        hash_of_pair(self.pair, seed)
    }

    fn nameless(self) -> Self {
        Self { pair: 0, ..self }
    }

    fn entries(line: &GrantedLine) -> &[Self; ENTRIES] {
        &line.entries
    }

    fn entries_mut(line: &mut GrantedLine) -> &mut [Self; ENTRIES] {
        &mut line.entries
    }
}

/// The pair and what is granted to it, of an entry that is one.
#[must_use]
pub fn granted(entry: &Granted) -> Option<(PairKey, Grant)> {
    (entry.pair != 0).then(|| (pair_of(entry.pair), entry.grant))
}

/// The address and who has it, of an entry that is one.
#[must_use]
pub fn owned(entry: &Owned) -> Option<(Addr, Identity)> {
    (entry.addr != Owned::NONE.addr).then_some((entry.addr, entry.identity))
}

/// Lines that so many entries need, with room for what joins.
#[must_use]
pub const fn lines_for(entries: usize) -> usize {
    entries + entries / 4 + SPARE_LINES
}

/// A table laid out.
#[derive(Clone, Debug)]
pub struct Laid<E: Entry> {
    /// How it is looked into.
    pub plan: Plan,
    /// All its lines.
    pub lines: Vec<E::Line>,
}

/// Lays out `table` in `lines` lines or, if it must be, in more; `None` if that fails under many
/// seeds, which chance does not bring about.
#[must_use]
pub fn lay<K: Copy, V: Copy, E: Entry + From<(K, V)>>(
    table: &BTreeMap<K, V>,
    lines: usize,
) -> Option<Laid<E>> {
    let entries: Vec<E> = table
        .iter()
        .map(|(key, value)| E::from((*key, *value)))
        .collect();
    (0..ATTEMPTS).find_map(|attempt| {
        let more = lines / 8 * usize::try_from(attempt).ok()?;
        lay_under(&entries, SEED.wrapping_mul(2 * attempt + 1), lines + more)
    })
}

fn lay_under<E: Entry>(entries: &[E], seed: u64, count: usize) -> Option<Laid<E>> {
    let plan = Plan {
        seed,
        lines: u32::try_from(count).ok()?,
        zero: 0,
    };
    let mut lines = vec![E::EMPTY; count];
    for entry in entries {
        settle(&mut lines, &plan, *entry)?;
    }
    Some(Laid { plan, lines })
}

/// Finds a place for an entry, and for those that have to move for it.
fn settle<E: Entry>(lines: &mut [E::Line], plan: &Plan, entry: E) -> Option<()> {
    let (mut homeless, mut left) = (entry, None);
    for moves in 0..MOVES {
        let both = places(homeless.hash(plan.seed), plan.lines).map(|place| place as usize);
        for place in both {
            let line = E::entries_mut(lines.get_mut(place)?);
            if let Some(free) = line.iter_mut().find(|entry| **entry == E::NONE) {
                *free = homeless;
                return Some(());
            }
        }
        // Not where it was just thrown out.
        let place = if left == Some(both[0]) {
            both[1]
        } else {
            both[0]
        };
        let line = E::entries_mut(lines.get_mut(place)?);
        std::mem::swap(&mut line[moves / 2 % ENTRIES], &mut homeless);
        left = Some(place);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf::lines::pair_word;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    fn identity(number: u32) -> Identity {
        Identity {
            as_source: number,
            as_destination: number + 1,
            side: 1,
            share: 3,
        }
    }

    fn look(laid: &Laid<Owned>, addr: &Addr) -> (usize, Option<Identity>) {
        let both = places(hash_of_addr(addr, laid.plan.seed), laid.plan.lines);
        let found = both.map(|place| laid.lines[place as usize].find(addr));
        match found {
            [Some(identity), _] => (1, Some(identity)),
            [None, second] => (2, second),
        }
    }

    #[test]
    fn every_address_is_found_and_most_of_them_at_once() {
        let addresses = |from: u32, to: u32| {
            (from..to).flat_map(|number| {
                let v4 = Ipv4Addr::from_bits(0x6440_0001 + number);
                let v6 = Ipv6Addr::from_bits(0xfd7a << 112 | u128::from(number));
                [IpAddr::V4(v4), IpAddr::V6(v6)].map(|addr| (Addr::from(addr), identity(number)))
            })
        };
        let table: BTreeMap<Addr, Identity> = addresses(0, 50_000).collect();
        let laid: Laid<Owned> = lay(&table, lines_for(table.len())).unwrap();
        let mut lines = 0;
        for (addr, identity) in &table {
            let (looked, found) = look(&laid, addr);
            assert_eq!(found, Some(*identity));
            lines += looked;
        }
        assert!(
            lines < table.len() * 11 / 10,
            "{lines} lines of {}",
            table.len()
        );
        assert!(addresses(50_000, 60_000).all(|(addr, _)| look(&laid, &addr).1.is_none()));
    }

    #[test]
    fn pairs_are_found_by_all_three_numbers() {
        let key = |number: u32, direction: u32| PairKey {
            source: number / 300 + 1,
            destination: number % 300 + 1,
            direction,
        };
        let grant = |number| Grant {
            set: number,
            ..Grant::EVERYTHING
        };
        let keys =
            (0..60_000).flat_map(|number| [(number, key(number, 0)), (number + 1, key(number, 1))]);
        let table: BTreeMap<PairKey, Grant> =
            keys.map(|(number, key)| (key, grant(number))).collect();
        let laid: Laid<Granted> = lay(&table, lines_for(table.len())).unwrap();
        for (key, grant) in &table {
            let word = pair_word(key);
            assert_eq!(pair_of(word), *key);
            let both = places(hash_of_pair(word, laid.plan.seed), laid.plan.lines);
            let found = both.map(|place| laid.lines[place as usize].find(word).copied());
            assert!(found.contains(&Some(*grant)), "{key:?}");
        }
    }

    #[test]
    fn a_table_that_is_nearly_full_is_laid_out_by_moving() {
        let table: BTreeMap<Addr, Identity> = (0..1_500)
            .map(|number| (Addr::from_v4_word(number), identity(number)))
            .collect();
        let laid: Laid<Owned> = lay(&table, 1_000).unwrap();
        assert_eq!(laid.lines.len(), 1_000, "three quarters of the places");
        assert!(table.keys().all(|addr| look(&laid, addr).1.is_some()));
        // And one that cannot fit ends.
        let too_many = (0..u32::try_from(ATTEMPTS).unwrap() * 2_000)
            .map(|number| (Addr::from_v4_word(number), identity(number)))
            .collect();
        assert!(lay::<_, _, Owned>(&too_many, 10).is_none());
    }
}
