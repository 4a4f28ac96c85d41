//! The relay from outside: real servers, real sockets, real TLS, and the program itself.
//!
//! `client` speaks DERP as a node would, `place` starts a relay, `pebble` a certificate authority. The rest are tests by subject.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod acme;
mod admission;
mod allocations;
mod client;
mod forwarding;
mod pebble;
mod place;
mod program;
mod protocol;
mod region;
mod strangers;
mod websocket;
