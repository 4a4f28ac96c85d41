//! weir's packet filter: one evaluator, for kernel, `weir explain` and tests.
//!
//! | module | what it holds |
//! |---|---|
//! | [`abi`] | layouts of all maps, their names, [`abi::ABI_VERSION`] |
//! | [`addresses`] | the table of addresses, of one line each |
//! | [`flows`] | the table of flows |
//! | [`lines`] | tables that a look-up touches one line of |
//! | [`tracks`] | which flows cannot be there |
//! | [`event`] | what is told of dropped packets, and how often |
//! | [`packet`] | bytes to [`packet::Packet`]; what cannot be read is a reason to drop |
//! | [`verdict`] | [`verdict::decide`]: flow state and policy to a verdict |
//! | [`refuse`] | what is answered to a packet that is refused on its way out |
//! | [`reason`] | why a packet passed or not, with stable names |
//! | [`classify`] | what a datagram on WireGuard's UDP port is |
//! | [`guard`] | which of them pass the underlay's guard; its map layouts |
//! | `src/bin/acl.rs` | the two classifiers on the WireGuard device (built for BPF alone) |
//! | `src/bin/steer.rs` | the guard on the underlay's interfaces (likewise) |
//!
//! The ACL's programs know no default but drop: no active word, no table, no entry, no state, or bytes
//! that cannot be read, and the packet is gone, with a counter that says why. User space fills the
//! policy tables of the idle slot and then stores one word; a packet reads that word once and looks
//! only into the slot that it names, so it meets the old policy or the new one and never a mixture.
//!
//! The guard fails open and says why ([`guard`]).
//!
//! The objects that agents embed are `ebpf/acl.bpf.o` and `ebpf/steer.bpf.o`, built by `cargo xtask
//! ebpf`, which also proves (`--check`) that they come from this source, bit for bit.
#![no_std]
#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod abi;
pub mod addresses;
pub mod classify;
pub mod event;
pub mod flows;
pub mod guard;
pub mod lines;
pub mod packet;
pub mod reason;
pub mod refuse;
pub mod tracks;
pub mod verdict;
