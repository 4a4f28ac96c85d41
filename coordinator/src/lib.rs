//! The coordinator: it knows who is in a network, who may talk with whom and where everyone was
//! last seen, and tells each node its part of that. It never sees a packet of theirs, and never a
//! private key.
//!
//! ```text
//!  weir-coordinator VERB ─► http::admin ─┐                       ┌─► store (SQLite | Postgres)
//!                    (local socket)      ├─► network (commands) ─┘        │ commit
//!  node ─ TLS, own key ─► http::node ────┤                                ▼
//!                                        └─► watch ◄── snapshot ◄── rows that changed
//!                         poll stream ◄──────┘   (pure: rows → netmaps, deltas)
//! ```
//!
//! | module | what it decides |
//! |---|---|
//! | [`config`] | what `serve` is told |
//! | [`tls`] | who is at either end of a control connection |
//! | [`http`] | how calls are decoded and answers encoded; limits of connections |
//! | [`network`] | the commands: check, one transaction, generation + 1, audit note |
//! | [`store`] | what is remembered, and how, on two databases; the only SQL |
//! | [`snapshot`] | what each node may know of a network at one generation |
//! | [`watch`] | one live snapshot a network, one stream of updates a node |
//! | [`presence`] | who is connected; what happens to those who stay away |
//! | [`server`] | puts the above together |
//! | [`cli`] | the command line |
#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod http;
pub mod network;
pub mod presence;
pub mod server;
pub mod snapshot;
pub mod store;
pub mod tls;
pub mod watch;
