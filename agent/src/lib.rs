//! See ARCHITECTURE.md.

pub mod cli;
pub mod config;
pub mod control;
pub mod identity;
pub mod local;
