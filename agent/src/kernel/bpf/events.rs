//! What the programs tell of dropped packets, read from their ring buffer.
//!
//! The buffer has one reader's place for all, in memory that it shares with the kernel; so one
//! [`Events`] reads it, which belongs to the [`Acl`](super::Acl). Nothing wakes the reader: it looks
//! when somebody asks.

use super::{AclError, failed};
use aya::maps::{Map, MapData, MapError, RingBuf};
use ebpf::abi::{Dropped, maps};
use std::io;
use std::path::Path;
use zerocopy::FromBytes as _;

/// The buffer's reader.
pub(super) struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    /// Opens the buffer that is pinned with the other maps.
    pub(super) fn open(layout: &Path) -> Result<Self, AclError> {
        let refused = |error: &dyn std::error::Error| {
            let text = super::attach::chain(error);
            failed("open", maps::EVENTS, io::Error::other(text))
        };
        let data = MapData::from_pin(layout.join(maps::EVENTS)).map_err(|error| refused(&error))?;
        let ring = RingBuf::try_from(Map::RingBuf(data));
        let ring = ring.map_err(|error: MapError| refused(&error))?;
        Ok(Self { ring })
    }

    /// What has come since the last call, oldest first.
    pub(super) fn take(&mut self) -> Vec<Dropped> {
        let mut events = Vec::new();
        // No more than the buffer holds, however fast it is filled meanwhile.
        let most = ebpf::abi::EVENT_BYTES as usize / size_of::<Dropped>();
        while events.len() < most {
            let Some(item) = self.ring.next() else {
                break;
            };
            events.extend(Dropped::read_from_bytes(&item));
        }
        events
    }
}
