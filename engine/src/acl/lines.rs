//! Laying out the table of pairs ([`ebpf::lines`]): a place for every entry in one of its two lines.
//!
//! There are as many lines as there may be entries before the next swap, so each line has room for
//! two and holds less than one. Whoever finds both of his lines full moves another entry to its
//! second line. If that goes on for too long, all begin again under another seed and with more lines.

use ebpf::abi::{Grant, PairKey};
use ebpf::lines::{ENTRIES, Granted, GrantedLine, Plan, hash_of_pair, pair_of, places};
use std::collections::BTreeMap;

/// Room for what joins before the next swap: a quarter, and this many lines.
const SPARE_LINES: usize = 128;
/// Entries that may be moved for one.
const MOVES: usize = 128;
/// Seeds that are tried.
const ATTEMPTS: u64 = 16;
/// What seeds are multiples of (Steele, Lea, Flood 2014).
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A line without entries.
const EMPTY: GrantedLine = GrantedLine {
    entries: [Granted::NONE; ENTRIES],
};

/// The pair and what is granted to it, of an entry that is one.
#[must_use]
pub fn granted(entry: &Granted) -> Option<(PairKey, Grant)> {
    (entry.pair != 0).then(|| (pair_of(entry.pair), entry.grant))
}

/// Lines that so many entries need, with room for what joins.
#[must_use]
pub const fn lines_for(entries: usize) -> usize {
    entries + entries / 4 + SPARE_LINES
}

/// A table laid out.
#[derive(Clone, Debug)]
pub struct Laid {
    /// How it is looked into.
    pub plan: Plan,
    /// All its lines.
    pub lines: Vec<GrantedLine>,
}

/// Lays out `table` in `lines` lines or, if it must be, in more; `None` if that fails under many
/// seeds, which chance does not bring about.
#[must_use]
pub fn lay(table: &BTreeMap<PairKey, Grant>, lines: usize) -> Option<Laid> {
    let entries: Vec<Granted> = table
        .iter()
        .map(|(key, grant)| Granted::from((*key, *grant)))
        .collect();
    (0..ATTEMPTS).find_map(|attempt| {
        let more = lines / 8 * usize::try_from(attempt).ok()?;
        lay_under(&entries, SEED.wrapping_mul(2 * attempt + 1), lines + more)
    })
}

fn lay_under(entries: &[Granted], seed: u64, count: usize) -> Option<Laid> {
    let plan = Plan {
        seed,
        lines: u32::try_from(count).ok()?,
        zero: 0,
    };
    let mut lines = vec![EMPTY; count];
    for entry in entries {
        settle(&mut lines, &plan, *entry)?;
    }
    Some(Laid { plan, lines })
}

/// Finds a place for an entry, and for those that have to move for it.
fn settle(lines: &mut [GrantedLine], plan: &Plan, entry: Granted) -> Option<()> {
    let (mut homeless, mut left) = (entry, None);
    for moves in 0..MOVES {
        let both = places(hash_of_pair(homeless.pair, plan.seed), plan.lines);
        let both = both.map(|place| place as usize);
        for place in both {
            let entries = &mut lines.get_mut(place)?.entries;
            if let Some(free) = entries.iter_mut().find(|entry| **entry == Granted::NONE) {
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
        let entries = &mut lines.get_mut(place)?.entries;
        std::mem::swap(&mut entries[moves / 2 % ENTRIES], &mut homeless);
        left = Some(place);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf::lines::pair_word;

    fn key(number: u32, direction: u32) -> PairKey {
        PairKey {
            source: number / 300 + 1,
            destination: number % 300 + 1,
            direction,
        }
    }

    fn grant(number: u32) -> Grant {
        Grant {
            set: number,
            ..Grant::EVERYTHING
        }
    }

    /// In how many of its lines a pair had to be looked for.
    fn look(laid: &Laid, key: &PairKey) -> (usize, Option<Grant>) {
        let word = pair_word(key);
        let both = places(hash_of_pair(word, laid.plan.seed), laid.plan.lines);
        let found = both.map(|place| laid.lines[place as usize].find(word).copied());
        match found {
            [Some(grant), _] => (1, Some(grant)),
            [None, second] => (2, second),
        }
    }

    #[test]
    fn pairs_are_found_by_all_three_numbers_and_most_of_them_at_once() {
        let keys =
            (0..60_000).flat_map(|number| [(number, key(number, 0)), (number + 1, key(number, 1))]);
        let table: BTreeMap<PairKey, Grant> =
            keys.map(|(number, key)| (key, grant(number))).collect();
        let laid = lay(&table, lines_for(table.len())).unwrap();
        let mut lines = 0;
        for (key, grant) in &table {
            assert_eq!(pair_of(pair_word(key)), *key);
            let (looked, found) = look(&laid, key);
            assert_eq!(found, Some(*grant), "{key:?}");
            lines += looked;
        }
        assert!(
            lines < table.len() * 11 / 10,
            "{lines} lines of {}",
            table.len()
        );
        assert_eq!(look(&laid, &key(60_000, 0)).1, None);
    }

    #[test]
    fn a_table_that_is_nearly_full_is_laid_out_by_moving() {
        let pairs = |count| {
            (0..count)
                .map(|number| (key(number, 1), grant(number)))
                .collect::<BTreeMap<_, _>>()
        };
        let table = pairs(1_500);
        let laid = lay(&table, 1_000).unwrap();
        assert_eq!(laid.lines.len(), 1_000, "three quarters of the places");
        assert!(table.keys().all(|key| look(&laid, key).1.is_some()));
        // And one that cannot fit ends.
        assert!(lay(&pairs(u32::try_from(ATTEMPTS).unwrap() * 2_000), 10).is_none());
    }
}
