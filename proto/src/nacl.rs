//! NaCl's `crypto_box`, with which a node logs in to a relay and seals the probes of its paths.
//!
//! ```text
//! nonce 24 ‖ crypto_box      crypto_box = X25519, HSalsa20, XSalsa20-Poly1305: tag 16 ‖ ciphertext
//! ```
//!
//! That a box opens proves that the holder of the other key sealed it, or we ourselves did: both
//! directions have the same key. There is no signature.

use crypto_secretbox::aead::Aead;
use crypto_secretbox::{KeyInit, XSalsa20Poly1305};

/// Length of a box's nonce.
pub const NONCE_BYTES: usize = 24;
/// What a box is longer than its contents.
pub const BOX_OVERHEAD: usize = 16;

/// A box and its nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed<'a> {
    /// Never used twice under one pair of keys.
    pub nonce: [u8; NONCE_BYTES],
    /// Tag and ciphertext.
    pub bytes: &'a [u8],
}

/// Seals and opens between two keys.
pub struct NaclBox(XSalsa20Poly1305);

impl<'a> Sealed<'a> {
    /// Reads nonce and box; `None` if these bytes are too short for both.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (nonce, bytes) = bytes.split_first_chunk()?;
        let nonce = *nonce;
        (bytes.len() >= BOX_OVERHEAD).then_some(Self { nonce, bytes })
    }

    /// Appends nonce and box to `out`.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(self.bytes);
    }
}

impl NaclBox {
    /// The box of the two keys that agreed on this secret (see
    /// [`NodeSecret::agree`](crate::key::NodeSecret::agree)).
    #[must_use]
    pub fn new(agreed: &[u8; 32]) -> Self {
        // NaCl's crypto_box_beforenm: HSalsa20 of the agreement, with a nonce of zeros.
        let zeros = [0; 16].into();
        let key = salsa20::hsalsa::<salsa20::cipher::consts::U10>(&(*agreed).into(), &zeros);
        Self(XSalsa20Poly1305::new(&key))
    }

    /// Seals `plain`; the nonce must be fresh.
    #[must_use]
    pub fn seal(&self, nonce: [u8; NONCE_BYTES], plain: &[u8]) -> Vec<u8> {
        // The cipher fails on messages of 256 GiB alone.
        self.0.encrypt(&nonce.into(), plain).unwrap_or_default()
    }

    /// Opens a box; `None` if it was not sealed by the other key for ours.
    #[must_use]
    pub fn open(&self, sealed: Sealed<'_>) -> Option<Vec<u8>> {
        self.0.decrypt(&sealed.nonce.into(), sealed.bytes).ok()
    }
}
