//! The packet filter, on the host and in the kernel.
//!
//! ```text
//!            random policy ── engine::acl::lower ──► tables ──► twin (plain maps) ──┐
//!  random packets ─┬─ bytes ──────────────────────────────────► decide() ───────────┤ equal?
//!                  ├─ bytes ──► the loaded program, by BPF_PROG_TEST_RUN ───────────┤
//!                  └─ as they are ─► model: what the words of the policy mean ──────┘
//! ```
//!
//! [`agreement`] asks `explain` about the first packets that it then runs, and [`events`] what the
//! programs tell of those that they drop. [`guard`] is about the other object, on the underlay.
//! [`property`] needs neither root nor kernel. The others
//! load the committed object, attach it to a TUN device in a network namespace of their own, and
//! run packets through it; those named `kernel_…` do so in the oldest stock kernel too, those named
//! `kernels_…` in each.
#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

mod agreement;
mod bed;
mod craft;
mod events;
mod flood;
mod fuzz;
mod generate;
mod guard;
mod kernel;
mod lifecycle;
mod model;
mod oracle;
mod property;
mod refuse;
mod semantics;
mod twin;
