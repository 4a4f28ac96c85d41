//! Lab tests: whole networks of the real binaries, on real kernel WireGuard.
//!
//! Each test draws its topology at its head. All of them need root and a kernel with WireGuard:
//! `cargo xtask test --tier lab` finds one. Nothing is shared between tests, so they may run in
//! any number of guests at once.

mod bare;
