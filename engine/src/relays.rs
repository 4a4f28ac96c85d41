//! Which relays to be connected to, and how relayed packets find their way.
//!
//! Relayed packets never meet the engine. It publishes a [`RelayTable`], by which the hand's shim
//! and its connections carry them: the kernel sends what is for a relayed peer to that peer's own
//! address on `lo`, and what comes for us by a relay is given to the kernel as if it came from
//! there, or from the direct endpoint that is wanted, so that it moves nothing.

use proto::id::RegionId;
use proto::key::NodeKey;
use proto::netmap::Region;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How packets go by relays, from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayTable {
    /// The region where others find this node.
    pub home: Option<RegionId>,
    /// Regions to be connected to.
    pub regions: BTreeMap<RegionId, Region>,
    /// Every peer that can be reached by a relay, whether it is now or not.
    pub peers: BTreeMap<NodeKey, RelayedPeer>,
}

/// How packets go to and from one peer by relays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayedPeer {
    /// Where it is found.
    pub region: RegionId,
    /// Its address on `lo`: what the kernel sends there is for it.
    pub loopback: SocketAddr,
    /// Where packets that it sent by relay seem to come from; `None`: from its address on `lo`.
    pub appear_as: Option<SocketAddr>,
}
