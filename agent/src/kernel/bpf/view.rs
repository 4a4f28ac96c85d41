//! The loaded maps as [`decide`](ebpf::verdict::decide) sees them, through system calls.
//!
//! Reading changes nothing: flows that a packet would make or end are not written. What cannot be
//! read counts as absent, which is a drop.

use super::flows::FlowTable;
use super::policy::Slot;
use super::{Acl, First, now_ns};
use ebpf::abi::{
    Active, Addr, Direction, Flow, FlowKey, Fragment, FragmentKey, Grant, Identity, PageKey,
    PairKey, Ports, PortsKey, Share,
};
use ebpf::addresses::Owned;
use ebpf::packet::Packet;
use ebpf::verdict::{Store, Tables, Verdict, decide};

/// The maps of one device, at one active word. The table of flows stays mapped while it lives.
pub struct View<'a> {
    acl: &'a Acl,
    active: Active,
    flows: Option<FlowTable>,
}

impl<'a> View<'a> {
    /// As things are now.
    pub(super) fn new(acl: &'a Acl) -> Self {
        Self {
            acl,
            active: acl.active(),
            flows: acl.flows.table().ok(),
        }
    }

    /// What the programs would do with the first packet of a flow, by their own evaluator. Its
    /// source port is 0, which no live flow has.
    #[must_use]
    pub fn explain(&self, first: &First) -> Verdict {
        self.judge(&first.packet(), first.direction)
    }

    /// What the programs would do with this packet now. Leaves no state behind.
    #[must_use]
    pub fn judge(&self, packet: &Packet, direction: Direction) -> Verdict {
        decide(self, packet, direction, now_ns())
    }

    fn slot(&self, number: u32) -> Option<&Slot> {
        self.acl.slots.get(number as usize)?.as_ref()
    }
}

impl Tables for View<'_> {
    type Entry = Flow;
    type Line = Owned;

    fn active(&self) -> Active {
        self.active
    }

    fn complete(&self, slot: u32) -> bool {
        self.slot(slot).is_some()
    }

    fn line(&self, slot: u32, addr: &Addr) -> Option<Owned> {
        let book = self.slot(slot)?.book();
        self.acl.addresses.find(slot, &book, addr)
    }

    fn home(&self, slot: u32, addr: &Addr) -> Option<Identity> {
        let homes = self.slot(slot)?.homes();
        let home = homes.iter().find(|home| home.addr == *addr)?;
        Some(home.identity)
    }

    fn route(&self, slot: u32, addr: &Addr) -> Option<Identity> {
        self.slot(slot)?.route(addr)
    }

    fn pair(&self, slot: u32, key: &PairKey) -> Option<Grant> {
        self.slot(slot)?.grant(key)
    }

    fn ports(&self, slot: u32, key: &PortsKey) -> Option<Ports> {
        self.slot(slot)?.ports(key)
    }

    fn page_word(&self, slot: u32, key: &PageKey, word: u32) -> Option<u64> {
        let page = self.slot(slot)?.page(key)?;
        page.words.get(word as usize).copied()
    }

    fn is_new(&self, packet: &Packet, direction: Direction) -> bool {
        self.acl.tracks.is_new(packet, direction)
    }

    fn find(&self, store: Store, key: &FlowKey) -> Option<Flow> {
        self.flows.as_ref()?.find(store, key)
    }

    fn load(&self, entry: Flow) -> Flow {
        entry
    }

    fn save(&self, _entry: Flow, _flow: Flow) {}

    fn insert(&self, _store: Store, _key: &FlowKey, _flow: &Flow) -> bool {
        true
    }

    fn remove(&self, _store: Store, _key: &FlowKey) {}

    fn share(&self, number: u16) -> Option<Share> {
        self.acl.shares.get(&u32::from(number)).ok().flatten()
    }

    fn set_opened(&self, _number: u16, _since_ns: u64, _opened: u32) {}

    fn set_established(&self, _number: u16, _established: u32) {}

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.acl.fragments.get(key).ok().flatten()
    }

    fn keep_fragment(&self, _key: &FragmentKey, _fragment: &Fragment) {}

    fn take_picked_up(&self, _now_ns: u64) -> bool {
        true
    }
}
