//! The login: what node and relay say of themselves, each in a box that only the other can open.
//!
//! ```text
//! nonce 24 ‖ crypto_box(JSON)      see the module nacl
//! ```
//!
//! Both JSON objects may grow; what is not known in them is ignored.

pub use crate::nacl::NONCE_BYTES;
use crate::permit::Permit;
use serde::{Deserialize, Serialize};

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
