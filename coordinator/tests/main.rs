//! The coordinator from outside: real servers, real TLS, real SQLite and real Postgres.
//!
//! `client` is a node as the coordinator sees it, `postgres` a database server of a test's own,
//! `place` a coordinator in this process or in one of its own. The rest are tests by subject.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod channel;
mod client;
mod command_line;
mod cost;
mod join;
mod model;
mod outage;
mod place;
mod postgres;
mod relays;
mod replicas;
mod schema;
mod store;
mod tenants;
