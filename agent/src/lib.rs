//! See ARCHITECTURE.md.

pub mod config;
pub mod identity;
pub mod local;
