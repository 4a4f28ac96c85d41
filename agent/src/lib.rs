//! See ARCHITECTURE.md.

pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod identity;
pub mod kernel;
pub mod local;
pub mod port;
pub mod portmap;
pub mod proxy;
pub mod relay;
pub mod shim;
pub mod state;
