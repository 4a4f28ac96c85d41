//! The relay: carries sealed packets between two nodes that have no direct path.
//!
//! Nothing is here yet. The relay and the path selection that uses it are built together (see
//! ARCHITECTURE.md, "What is planned"); this version of weir connects peers directly, at the
//! endpoints that they report, and says so when none of them works.
#![forbid(unsafe_code)]
