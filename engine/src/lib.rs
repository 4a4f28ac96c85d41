//! See ARCHITECTURE.md.
pub mod acl;
