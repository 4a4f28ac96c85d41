//! A permit: the coordinator's word that a node of its network may use a relay for a while.
//!
//! ```text
//! signature = Ed25519("weir relay permit 1\0" ‖ network 8 ‖ node key 32 ‖ expiry 8)
//! ```
//!
//! Integers are big-endian, the expiry in seconds since 1970. A relay needs the network's
//! [`PermitKey`] and nothing else: no database, and no coordinator that answers. The network stands
//! in what is signed, so a relay that serves many keeps them apart by it.

use crate::id::NetworkId;
use crate::key::{KEY_BYTES, NodeKey, PermitKey};
use data_encoding::HEXLOWER;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::time::Duration;

/// What is signed begins with this, so that the signature means nothing elsewhere.
const CONTEXT: &[u8] = b"weir relay permit 1\0";
/// How long a permit is good for. A node asks for the next one after half of it, and so goes on
/// using relays for at least half a week without its coordinator.
pub const VALIDITY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Length of an Ed25519 signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Why a permit does not admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum PermitError {
    /// It names another node's key.
    #[error("the permit is another node's")]
    Node,
    /// Its time is over.
    #[error("the permit has expired; ask the coordinator for a new one")]
    Expired,
    /// None of the network's keys made the signature.
    #[error("the permit is not signed by a coordinator of its network")]
    Signature,
}

/// A signed permit, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// The node's network.
    pub network: NetworkId,
    /// The node.
    pub node: NodeKey,
    /// Seconds since 1970; from then on it admits no more.
    pub expires: u64,
    /// See the module.
    pub signature: Signature,
}

/// An Ed25519 signature, in JSON as hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature(pub [u8; SIGNATURE_BYTES]);

/// What signs permits. Never leaves its coordinators.
pub struct PermitSecret(Ed25519KeyPair);

impl PermitSecret {
    /// The secret of 32 random bytes.
    ///
    /// # Errors
    /// Never for 32 bytes; the signature is ring's.
    pub fn from_seed(seed: &[u8; KEY_BYTES]) -> Result<Self, ring::error::KeyRejected> {
        Ed25519KeyPair::from_seed_unchecked(seed).map(Self)
    }

    /// What checks its permits.
    #[must_use]
    pub fn public(&self) -> PermitKey {
        let mut key = [0; KEY_BYTES];
        // Ed25519 public keys have 32 bytes; a shorter one would check nothing.
        for (to, from) in key.iter_mut().zip(self.0.public_key().as_ref()) {
            *to = *from;
        }
        PermitKey(key)
    }

    /// A permit for `node` of `network` until `expires` (seconds since 1970).
    #[must_use]
    pub fn permit(&self, network: NetworkId, node: NodeKey, expires: u64) -> Permit {
        let signed = self.0.sign(&message(network, node, expires));
        let mut signature = Signature([0; SIGNATURE_BYTES]);
        for (to, from) in signature.0.iter_mut().zip(signed.as_ref()) {
            *to = *from;
        }
        Permit {
            network,
            node,
            expires,
            signature,
        }
    }
}

impl Permit {
    /// Whether it admits `node` at `now` (seconds since 1970), by one of its network's `keys`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, node: NodeKey, now: u64, keys: &[PermitKey]) -> Result<(), PermitError> {
        if self.node != node {
            return Err(PermitError::Node);
        }
        let message = message(self.network, self.node, self.expires);
        let signed_by = |key: &PermitKey| {
            UnparsedPublicKey::new(&ED25519, &key.0)
                .verify(&message, &self.signature.0)
                .is_ok()
        };
        if !keys.iter().any(signed_by) {
            return Err(PermitError::Signature);
        }
        if self.expires <= now {
            return Err(PermitError::Expired);
        }
        Ok(())
    }
}

fn message(network: NetworkId, node: NodeKey, expires: u64) -> Vec<u8> {
    let mut message = CONTEXT.to_vec();
    message.extend_from_slice(&network.0.to_be_bytes());
    message.extend_from_slice(&node.0);
    message.extend_from_slice(&expires.to_be_bytes());
    message
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        HEXLOWER
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom("expected a signature of 128 hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeKey = NodeKey([7; 32]);
    const NOW: u64 = 1_000;

    fn secret(seed: u8) -> PermitSecret {
        PermitSecret::from_seed(&[seed; 32]).unwrap()
    }

    #[test]
    fn a_permit_admits_its_node_until_it_expires() {
        let permit = secret(1).permit(NetworkId(3), NODE, NOW + 1);
        let keys = [secret(2).public(), secret(1).public()];
        assert_eq!(permit.check(NODE, NOW, &keys), Ok(()));
        assert_eq!(
            permit.check(NODE, NOW + 1, &keys),
            Err(PermitError::Expired)
        );
        let other = NodeKey([8; 32]);
        assert_eq!(permit.check(other, NOW, &keys), Err(PermitError::Node));
        assert_eq!(
            permit.check(NODE, NOW, &keys[..1]),
            Err(PermitError::Signature)
        );
        assert_eq!(permit.check(NODE, NOW, &[]), Err(PermitError::Signature));
    }

    #[test]
    fn no_field_can_be_altered() {
        let permit = secret(1).permit(NetworkId(3), NODE, NOW + 1);
        let keys = [secret(1).public()];
        let other = NodeKey([8; 32]);
        let longer = Permit {
            expires: u64::MAX,
            ..permit
        };
        let elsewhere = Permit {
            network: NetworkId(4),
            ..permit
        };
        let renamed = Permit {
            node: other,
            ..permit
        };
        let refused = Err(PermitError::Signature);
        assert_eq!(longer.check(NODE, NOW, &keys), refused);
        assert_eq!(elsewhere.check(NODE, NOW, &keys), refused);
        assert_eq!(renamed.check(other, NOW, &keys), refused);
    }

    #[test]
    fn it_travels_as_json() {
        let permit = secret(1).permit(NetworkId(3), NODE, NOW);
        let text = serde_json::to_string(&permit).unwrap();
        assert_eq!(serde_json::from_str::<Permit>(&text).unwrap(), permit);
        let cut = text.replace(&HEXLOWER.encode(&permit.signature.0), "00");
        assert!(serde_json::from_str::<Permit>(&cut).is_err());
    }
}
