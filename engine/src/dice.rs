//! [`Dice`]: transaction ids out of the seed that the engine was given.

use sha2::{Digest, Sha256};

/// Draws that nobody guesses and that never repeat: the hash of the seed and a count.
pub(crate) struct Dice {
    seed: [u8; 32],
    drawn: u64,
}

impl Dice {
    pub(crate) fn new(seed: [u8; 32]) -> Self {
        Self { seed, drawn: 0 }
    }

    /// `N` bytes, 32 at most.
    pub(crate) fn draw<const N: usize>(&mut self) -> [u8; N] {
        const { assert!(N <= 32) };
        self.drawn += 1;
        let hash = Sha256::new()
            .chain_update(self.seed)
            .chain_update(self.drawn.to_be_bytes())
            .finalize();
        std::array::from_fn(|index| hash[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_differ_and_another_seed_draws_others() {
        let (mut one, mut two) = (Dice::new([1; 32]), Dice::new([2; 32]));
        let drawn: std::collections::BTreeSet<[u8; 24]> =
            (0..100).flat_map(|_| [one.draw(), two.draw()]).collect();
        assert_eq!(drawn.len(), 200);
    }
}
