//! The relay from outside: real servers, real sockets, real TLS, and the program itself.
//!
//! `client` speaks DERP as a node would, `place` starts a relay. The rest are tests by subject.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admission;
mod allocations;
mod client;
mod forwarding;
mod place;
mod program;
mod protocol;
mod region;
mod strangers;
mod websocket;
