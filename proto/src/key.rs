//! Keys, one type per use, with a prefix in text form so that one is never taken for another.
//!
//! Public keys are plain values: they copy, compare, print and serialize as `prefix:hex`.
//! Secrets do none of that: no `Debug`, no `Clone`, no serde, and they are wiped on drop. The only
//! way to a secret's bytes is [`NodeSecret::expose`], which one caller has (see the agent's
//! `identity` module).

use data_encoding::{BASE64, HEXLOWER};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{ZeroizeOnDrop, Zeroizing};

/// Length of every key, in bytes.
pub const KEY_BYTES: usize = 32;

/// Why a text is not the key that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseKeyError {
    /// The text does not start with the prefix of this kind of key.
    #[error("expected a key that starts with `{0}:`")]
    Prefix(&'static str),
    /// What follows the prefix is not 64 hexadecimal digits.
    #[error("expected 64 hexadecimal digits after `{0}:`")]
    Hex(&'static str),
}

macro_rules! public_key {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; KEY_BYTES]);

        impl $name {
            /// The prefix of the text form.
            pub const PREFIX: &'static str = $prefix;

            /// Whether all bytes are zero, which is never a valid key.
            #[must_use]
            pub fn is_zero(&self) -> bool {
                self.0 == [0; KEY_BYTES]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}:{}", $prefix, HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseKeyError;

            fn from_str(text: &str) -> Result<Self, ParseKeyError> {
                let hex = text
                    .strip_prefix($prefix)
                    .and_then(|rest| rest.strip_prefix(':'))
                    .ok_or(ParseKeyError::Prefix($prefix))?;
                let bytes = HEXLOWER
                    .decode(hex.as_bytes())
                    .map_err(|_| ParseKeyError::Hex($prefix))?;
                bytes.try_into().map(Self).map_err(|_| ParseKeyError::Hex($prefix))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

public_key!(
    /// A node's WireGuard public key (X25519).
    NodeKey,
    "nodekey"
);
public_key!(
    /// SHA-256 of a machine key's SubjectPublicKeyInfo (P-256): who is at the other end of a
    /// control connection.
    MachineId,
    "machine"
);
public_key!(
    /// SHA-256 of a coordinator's certificate in DER: what a join token pins.
    Fingerprint,
    "sha256"
);
public_key!(
    /// The coordinator's X25519 key that a node key is proven against; new with each process.
    ChallengeKey,
    "challenge"
);

public_key!(
    /// A node's X25519 key for discovery: probes of its paths are sealed with it.
    DiscoKey,
    "discokey"
);
public_key!(
    /// A relay's X25519 key, which its clients' logins are sealed for.
    RelayKey,
    "relaykey"
);
public_key!(
    /// The Ed25519 key that checks the relay permits of one network's coordinator.
    PermitKey,
    "permitkey"
);

impl NodeKey {
    /// The form that `wg` prints and reads.
    #[must_use]
    pub fn base64(&self) -> String {
        BASE64.encode(&self.0)
    }
}

macro_rules! secret_key {
    ($(#[$doc:meta])* $name:ident, $public:ident) => {
        $(#[$doc])*
        #[derive(ZeroizeOnDrop)]
        pub struct $name(StaticSecret);

        impl $name {
            /// A secret from 32 random bytes, clamped by X25519 on use.
            #[must_use]
            pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
                Self(StaticSecret::from(bytes))
            }

            /// The public key that belongs to it.
            #[must_use]
            pub fn public(&self) -> $public {
                $public(PublicKey::from(&self.0).to_bytes())
            }

            /// The X25519 shared secret with `other`, or `None` if `other` is a low-order point.
            #[must_use]
            pub fn agree(&self, other: [u8; KEY_BYTES]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
                let shared = self.0.diffie_hellman(&PublicKey::from(other));
                shared
                    .was_contributory()
                    .then(|| Zeroizing::new(shared.to_bytes()))
            }
        }
    };
}

secret_key!(
    /// A node's WireGuard private key. Never leaves the node.
    NodeSecret,
    NodeKey
);
secret_key!(
    /// A node's private key for discovery. Never leaves the node, and there is no way to its bytes.
    DiscoSecret,
    DiscoKey
);

impl NodeSecret {
    /// The raw bytes, for the kernel and for the state file, and for nobody else.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        self.0.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_is_checked() {
        let key = NodeSecret::from_bytes([7; 32]).public();
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(
            "nodekey:00".parse::<NodeKey>(),
            Err(ParseKeyError::Hex("nodekey"))
        );
        let other = format!("machine:{}", HEXLOWER.encode(&key.0));
        assert_eq!(
            other.parse::<NodeKey>(),
            Err(ParseKeyError::Prefix("nodekey"))
        );
    }

    #[test]
    fn both_sides_agree_and_low_order_points_are_refused() {
        let (a, b) = (
            NodeSecret::from_bytes([1; 32]),
            NodeSecret::from_bytes([2; 32]),
        );
        let (ab, ba) = (
            a.agree(b.public().0).unwrap(),
            b.agree(a.public().0).unwrap(),
        );
        assert_eq!(*ab, *ba);
        assert!(a.agree([0; 32]).is_none());
    }
}
