//! The login: what node and relay say of themselves, each in a box that only the other can open.
//!
//! ```text
//! nonce 24 ‖ crypto_box(JSON)      crypto_box = X25519, HSalsa20, XSalsa20-Poly1305 (NaCl)
//! ```
//!
//! That the box opens proves the sender's key, and nothing else does: there is no signature. Both
//! JSON objects may grow; what is not known in them is ignored.

use crate::permit::Permit;
use crypto_secretbox::aead::Aead;
use crypto_secretbox::{KeyInit, XSalsa20Poly1305};
use serde::{Deserialize, Serialize};

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

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientInfo {
    /// The version of DERP that it speaks.
    pub version: u32,
    /// Whether it answers pings.
    #[serde(rename = "CanAckPings")]
    pub can_ack_pings: bool,
    /// Whether it only measures.
    #[serde(rename = "IsProber", skip_serializing_if = "std::ops::Not::not")]
    pub is_prober: bool,
    /// Why it may use the relay; other clients and relays do not know the field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weir_permit: Option<Permit>,
}

/// What a relay says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerInfo {
    /// The version of DERP that it speaks.
    pub version: u32,
    /// How much it takes from this node in a second; 0: no limit.
    #[serde(rename = "TokenBucketBytesPerSecond", skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    /// How much at once.
    #[serde(rename = "TokenBucketBytesBurst", skip_serializing_if = "is_zero")]
    pub bytes_burst: u64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's skip_serializing_if passes a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Seals and opens between one node and one relay. Both directions have the same key.
pub struct LoginBox(XSalsa20Poly1305);

impl<'a> Sealed<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (nonce, bytes) = bytes.split_first_chunk()?;
        let nonce = *nonce;
        (bytes.len() >= BOX_OVERHEAD).then_some(Self { nonce, bytes })
    }

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.nonce);
        out.extend_from_slice(self.bytes);
    }
}

impl LoginBox {
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
