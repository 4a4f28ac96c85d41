//! Ids by kind, so that two of them cannot be swapped by accident.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $number:ty) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $number);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// One administrative overlay: its nodes, policy and lock.
    NetworkId,
    u64
);
id!(
    /// A machine that joined a network. Stable while keys and addresses may change.
    NodeId,
    u64
);
id!(
    /// The network's version. Every change raises it by at least one; it never falls.
    Generation,
    u64
);
id!(
    /// A place with one or more relays. Given by whoever runs them, and the same in all networks
    /// that they serve.
    RegionId,
    u16
);
