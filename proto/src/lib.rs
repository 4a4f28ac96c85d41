//! What weir's programs say to each other: keys, addresses, netmaps, policy, messages.
//!
//! Pure data and pure functions. No I/O, no clock, no async, no randomness; nothing of ours is
//! imported. Everything here may be fed bytes from the network, so decoders return errors and
//! never panic.
//!
//! | module | what it holds |
//! |---|---|
//! | [`key`] | keys with prefixes; secrets that do not print |
//! | [`id`] | typed ids and the network's generation |
//! | [`net`] | prefixes, port ranges, protocols |
//! | [`filter`] | policy compiled for one node, and its reference semantics |
//! | [`netmap`] | all that one node may know, and deltas of it |
//! | [`policy`] | the document people write, and its compiler |
//! | [`control`] | messages between a node and the coordinator |
//! | [`derp`] | frames between a node and a relay, and the login of one at the other |
//! | [`disco`] | the probes by which two nodes find a path |
//! | [`nacl`] | the boxes of logins and probes |
//! | [`permit`] | the coordinator's word that a node may use a relay |
//! | [`stun`] | the question "what address do you see?" and its answer |
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod control;
pub mod derp;
pub mod disco;
pub mod filter;
pub mod id;
pub mod key;
pub mod nacl;
pub mod net;
pub mod netmap;
pub mod permit;
pub mod policy;
pub mod stun;
