//! Messages between a node and the coordinator: JSON bodies over HTTP/1.1 over TLS 1.3.
//!
//! The channel is mutually authenticated: the node pins the coordinator's certificate by
//! [`Fingerprint`]; the coordinator takes a self-signed P-256 certificate and knows the node by
//! [`MachineId`], the hash of its public key. Every call acts for the channel's machine; no request
//! names another.
//!
//! | call | request | answer |
//! |---|---|---|
//! | `POST /v1/hello` | [`HelloRequest`] | [`Hello`] |
//! | `POST /v1/register` | [`RegisterRequest`] | [`Registered`] |
//! | `POST /v1/poll` | [`PollRequest`] | a stream of [`PollMessage`], one JSON value a line |
//! | `POST /v1/report` | [`Report`] | `{}` |
//! | `POST /v1/permit` | `{}` | [`Permit`](crate::permit::Permit) |
//! | `POST /v1/logout` | `{}` | `{}` |
//!
//! A refusal is a non-2xx status with a [`Refusal`] as its body.

use crate::id::{Generation, NetworkId, NodeId, RegionId};
use crate::key::{ChallengeKey, DiscoKey, Fingerprint, MachineId, NodeKey, NodeSecret};
use crate::net::Prefix;
use crate::netmap::Update;
use data_encoding::{BASE32_NOPAD, HEXLOWER};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use zeroize::Zeroizing;

/// The version of these messages. A coordinator refuses a version it does not know.
pub const VERSION: u32 = 1;
/// A poll stream carries at least one message in this time, in seconds.
pub const KEEP_ALIVE_SECONDS: u64 = 30;
/// A node takes the stream for dead after this time without a message, in seconds.
pub const STREAM_DEAD_SECONDS: u64 = 75;
/// Longest line of a poll stream, in bytes: a full netmap of the largest network.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Longest request body, in bytes.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Longest host name, in bytes (RFC 1035 2.3.4).
pub const MAX_HOSTNAME_BYTES: usize = 63;
/// Label of the TLS exporter (RFC 5705) that binds a key proof to its connection.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-weir-node-key-v1";
/// Bytes taken from the exporter.
pub const EXPORTER_BYTES: usize = 32;

/// Opens a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HelloRequest {
    /// The version that the node speaks.
    pub version: u32,
}

/// What a node needs before it can register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The version that the coordinator speaks.
    pub version: u32,
    /// Prove the node key against this.
    pub challenge: ChallengeKey,
    /// The node that this channel's machine key already is, if any: no token is then needed.
    pub known: Option<NodeId>,
}

/// Asks to become a node, or to be taken for the node that it already is.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    /// The secret of a join token; not needed by a machine that is already a node.
    pub token: Option<TokenSecret>,
    /// The node's WireGuard public key.
    pub key: NodeKey,
    /// Proof that the node holds the private key: see [`prove_node_key`].
    pub proof: KeyProof,
    /// What the node would like to be called.
    pub hostname: String,
    /// Subnets that it offers to route.
    pub routes: BTreeSet<Prefix>,
    /// Where it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Its UDP port of WireGuard: with the address that the coordinator sees, one more endpoint.
    pub listen_port: u16,
    /// What probes of paths to it are sealed for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disco: Option<DiscoKey>,
}

/// The node is part of the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registered {
    /// The network joined.
    pub network: NetworkId,
    /// The node's id in it.
    pub node: NodeId,
    /// The node's name in it.
    pub name: String,
    /// The node's addresses in it.
    pub addrs: Vec<IpAddr>,
}

/// Asks for the netmap and all its changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PollRequest {
    /// The generation that the node has, to get only what changed since; `None` for all of it.
    pub base: Option<Generation>,
}

/// One message of a poll stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PollMessage {
    /// The netmap, or a change of it.
    Update(Update),
    /// Nothing changed; the coordinator lives.
    KeepAlive,
}

/// What a node says of itself after a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// Subnets that it offers to route.
    pub routes: BTreeSet<Prefix>,
    /// Where it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Its UDP port of WireGuard.
    pub listen_port: u16,
    /// What probes of paths to it are sealed for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disco: Option<DiscoKey>,
    /// The region whose relay it is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<RegionId>,
}

/// Why the coordinator does not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    /// What a program branches on.
    pub code: RefusalCode,
    /// What a person reads: what is wrong and what to do.
    pub message: String,
}

/// Kinds of refusal. Stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The message cannot be read, or a field of it is not legal.
    BadRequest,
    /// The two sides share no version.
    Version,
    /// The token is unknown, used up, expired or revoked.
    Token,
    /// The key proof does not hold for this channel.
    Proof,
    /// The channel's machine key is not a node (any more).
    UnknownNode,
    /// The node key belongs to another node.
    KeyTaken,
    /// A limit is reached: addresses, nodes, routes.
    Limit,
    /// The network has no relays that a permit would be for.
    NoRelays,
    /// The coordinator cannot answer now; try again.
    Unavailable,
}

/// The secret part of a join token, as text. Does not print.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenSecret(Zeroizing<String>);

impl TokenSecret {
    /// The secret made of these random bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; TOKEN_SECRET_BYTES]) -> Self {
        Self(Zeroizing::new(BASE32_NOPAD.encode(&bytes).to_lowercase()))
    }

    /// The text, for the wire, for its hash in the store and for the one print at creation.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Random bytes in a token's secret: 160 bits.
pub const TOKEN_SECRET_BYTES: usize = 20;

/// All that a machine needs to join: where the coordinator is, which certificate to expect there,
/// and the secret that admits it. Text form: `weir1.HOST:PORT.FINGERPRINT-HEX.SECRET`.
#[derive(Clone)]
pub struct JoinToken {
    /// `HOST:PORT` of the coordinator; an IPv6 address stands in brackets.
    pub address: String,
    /// SHA-256 of its certificate.
    pub fingerprint: Fingerprint,
    /// What admits the machine.
    pub secret: TokenSecret,
}

/// Why a text is not a join token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is not a join token: it has the form `weir1.HOST:PORT.FINGERPRINT.SECRET`; \
     `weir-coordinator token create` prints one"
)]
pub struct ParseTokenError;

impl JoinToken {
    /// The whole token as text. It admits whoever holds it: print it once, to the operator.
    #[must_use]
    pub fn expose(&self) -> String {
        let Self {
            address,
            fingerprint,
            secret,
        } = self;
        format!(
            "weir1.{address}.{}.{}",
            HEXLOWER.encode(&fingerprint.0),
            secret.expose()
        )
    }
}

impl FromStr for JoinToken {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        let rest = text.trim().strip_prefix("weir1.").ok_or(ParseTokenError)?;
        let (rest, secret) = rest.rsplit_once('.').ok_or(ParseTokenError)?;
        let (address, hex) = rest.rsplit_once('.').ok_or(ParseTokenError)?;
        let bytes = HEXLOWER
            .decode(hex.as_bytes())
            .map_err(|_| ParseTokenError)?;
        let fingerprint = Fingerprint(bytes.try_into().map_err(|_| ParseTokenError)?);
        let (host, port) = address.rsplit_once(':').ok_or(ParseTokenError)?;
        let secret_bytes = BASE32_NOPAD.decode(secret.to_uppercase().as_bytes());
        let secret_fits = secret_bytes.is_ok_and(|bytes| bytes.len() == TOKEN_SECRET_BYTES);
        if host.is_empty() || port.parse::<u16>().is_err() || !secret_fits {
            return Err(ParseTokenError);
        }
        let secret = TokenSecret(Zeroizing::new(secret.to_lowercase()));
        Ok(Self {
            address: address.to_owned(),
            fingerprint,
            secret,
        })
    }
}

/// Proof of a node key: HMAC-SHA-256, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyProof(String);

/// What a proof is bound to: one TLS connection of one machine.
#[derive(Clone, Copy)]
pub struct ProofContext<'a> {
    /// Exporter of the TLS connection ([`EXPORTER_LABEL`], no context).
    pub exporter: &'a [u8; EXPORTER_BYTES],
    /// The machine at the node's end.
    pub machine: MachineId,
}

/// Proves, on one connection, that the holder of `secret` is at its end: an HMAC keyed by the
/// X25519 agreement between the node key and the coordinator's challenge key.
///
/// `None` if the challenge is a low-order point.
#[must_use]
pub fn prove_node_key(
    secret: &NodeSecret,
    challenge: ChallengeKey,
    context: ProofContext<'_>,
) -> Option<KeyProof> {
    let shared = secret.agree(challenge.0)?;
    let tag = proof_mac(&shared, challenge, secret.public(), context)
        .finalize()
        .into_bytes();
    Some(KeyProof(HEXLOWER.encode(&tag)))
}

/// Checks a proof, in constant time. `challenge` is the secret half of the challenge key.
#[must_use]
pub fn check_node_key(
    challenge: &NodeSecret,
    key: NodeKey,
    context: ProofContext<'_>,
    proof: &KeyProof,
) -> bool {
    let Some(shared) = challenge.agree(key.0) else {
        return false;
    };
    let Ok(tag) = HEXLOWER.decode(proof.0.as_bytes()) else {
        return false;
    };
    let public = ChallengeKey(challenge.public().0);
    proof_mac(&shared, public, key, context)
        .verify_slice(&tag)
        .is_ok()
}

fn proof_mac(
    shared: &[u8; 32],
    challenge: ChallengeKey,
    key: NodeKey,
    context: ProofContext<'_>,
) -> Hmac<Sha256> {
    // HMAC takes a key of any length, so this cannot fail; `Mac` has no infallible constructor for
    // slices, the fixed-size one wants a whole block.
    let mut block = Zeroizing::new([0; 64]);
    block[..32].copy_from_slice(shared);
    let mut mac = <Hmac<Sha256> as Mac>::new((&*block).into());
    mac.update(b"weir node key proof v1");
    for part in [&challenge.0, &key.0, context.exporter, &context.machine.0] {
        mac.update(part);
    }
    mac
}

impl fmt::Debug for RegisterRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegisterRequest")
            .field("key", &self.key)
            .field("hostname", &self.hostname)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_round_trips_with_any_host() {
        for address in [
            "192.0.2.1:8443",
            "[2001:db8::1]:8443",
            "weir.example.com:443",
        ] {
            let token = JoinToken {
                address: address.to_owned(),
                fingerprint: Fingerprint([7; 32]),
                secret: TokenSecret::from_bytes([9; TOKEN_SECRET_BYTES]),
            };
            let back: JoinToken = token.expose().parse().unwrap();
            assert_eq!(back.address, address);
            assert_eq!(back.fingerprint, token.fingerprint);
            assert_eq!(back.secret.expose(), token.secret.expose());
        }
        for bad in ["", "weir1", "weir1.a:1.00.x", "weir1.a.b.c.d"] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_proof_holds_only_for_its_key_its_channel_and_its_machine() {
        let (node, other) = (
            NodeSecret::from_bytes([1; 32]),
            NodeSecret::from_bytes([2; 32]),
        );
        let challenge = NodeSecret::from_bytes([3; 32]);
        let public = ChallengeKey(challenge.public().0);
        let here = ProofContext {
            exporter: &[4; 32],
            machine: MachineId([5; 32]),
        };
        let proof = prove_node_key(&node, public, here).unwrap();
        assert!(check_node_key(&challenge, node.public(), here, &proof));

        let elsewhere = ProofContext {
            exporter: &[6; 32],
            ..here
        };
        let impostor = ProofContext {
            machine: MachineId([6; 32]),
            ..here
        };
        assert!(!check_node_key(&challenge, other.public(), here, &proof));
        assert!(!check_node_key(
            &challenge,
            node.public(),
            elsewhere,
            &proof
        ));
        assert!(!check_node_key(&challenge, node.public(), impostor, &proof));
        assert!(!check_node_key(&other, node.public(), here, &proof));
        assert!(!check_node_key(
            &challenge,
            node.public(),
            here,
            &KeyProof("zz".to_owned())
        ));
    }
}
