//! The packet filter, on the host and in the kernel.
//!
//! ```text
//!            random policy ── engine::acl::lower ──► tables ──► twin (plain maps) ──┐
//!  random packets ─┬─ bytes ──────────────────────────────────► decide() ───────────┤ equal?
//!                  ├─ bytes ──► the loaded program, by BPF_PROG_TEST_RUN ───────────┤
//!                  └─ as they are ─► model: what the words of the policy mean ──────┘
//! ```
//!
//! [`property`] needs neither root nor kernel. Tests named `kernel_…` load the committed object,
//! attach it to a TUN device in a network namespace of their own, and run packets through it.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

mod bed;
mod craft;
mod generate;
mod kernel;
mod lifecycle;
mod model;
mod property;
mod semantics;
mod twin;
