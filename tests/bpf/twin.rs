//! The kernel's maps as plain ones, and the same changes to them.

use ebpf::abi::{
    Active, Addr, Direction, Flow, FlowKey, Fragment, FragmentKey, Identity, PageKey, PairKey,
    Ports, PortsKey, Quota, SetId,
};
use ebpf::packet::Packet;
use ebpf::verdict::{Branch, Store, Tables, Verdict, judge, take_quota};
use engine::acl::{self, Change};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// Which operation fails, as the kernel's may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// No flow table takes an entry.
    Full,
    /// A policy table is missing.
    NoTable,
    /// An entry of `Ports` is of a kind that nobody knows.
    OddPorts,
    /// A page is missing.
    NoPage,
}

/// Maps in memory, with the mutant `M` planted into the evaluator.
#[derive(Default)]
pub struct Twin<const M: u32> {
    pub active: Cell<u64>,
    pub tables: RefCell<acl::Tables>,
    pub flows: RefCell<BTreeMap<(Store, FlowKey), Flow>>,
    pub fragments: RefCell<BTreeMap<FragmentKey, Fragment>>,
    pub quota: Cell<Quota>,
    pub taken: RefCell<BTreeSet<Branch>>,
    pub fault: Cell<Fault>,
}

impl<const M: u32> Twin<M> {
    /// What the agent does with the real maps.
    pub fn set(&self, tables: &acl::Tables, change: &Change) {
        let active = Active::from_word(self.active.get());
        let epoch = match change {
            Change::None if active.epoch != 0 => return,
            Change::InPlace(patch) if active.epoch != 0 => {
                let mut own = self.tables.borrow_mut();
                own.pages.extend(patch.pages.iter().copied());
                own.ports.extend(patch.ports.iter().copied());
                own.pairs.extend(patch.pairs.iter().copied());
                own.prefixes.extend(patch.prefixes.iter().copied());
                own.identities.extend(patch.identities.iter().copied());
                assert_eq!(*own, *tables, "a patch leads to other tables");
                return;
            }
            Change::Swap { narrows: false } if active.epoch != 0 => active.epoch,
            Change::None | Change::InPlace(_) | Change::Swap { .. } => active.epoch + 1,
        };
        self.tables.replace(tables.clone());
        let slot = 1 - active.slot;
        self.active.set(Active { epoch, slot }.word());
    }

    pub fn send(&self, direction: Direction, bytes: &[u8], now_ns: u64) -> Verdict {
        let mut packet = Packet::NONE;
        judge(self, &bytes, &mut packet, direction, now_ns)
    }
}

impl<const M: u32> Tables for Twin<M> {
    type Entry = (Store, FlowKey);

    const MUTANT: u32 = M;

    fn active(&self) -> Active {
        Active::from_word(self.active.get())
    }

    fn complete(&self, _slot: u32) -> bool {
        self.fault.get() != Fault::NoTable
    }

    fn identity(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.tables.borrow().identities.get(addr).copied()
    }

    fn route(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.tables.borrow().route((*addr).into())
    }

    fn pair(&self, _slot: u32, key: &PairKey) -> Option<SetId> {
        self.tables.borrow().pairs.get(key).copied()
    }

    fn ports(&self, _slot: u32, key: &PortsKey) -> Option<Ports> {
        let mut ports = self.tables.borrow().ports.get(key).copied()?;
        if self.fault.get() == Fault::OddPorts {
            ports.kind = 77;
        }
        Some(ports)
    }

    fn page_word(&self, _slot: u32, key: &PageKey, word: u32) -> Option<u64> {
        if self.fault.get() == Fault::NoPage {
            return None;
        }
        let tables = self.tables.borrow();
        tables.pages.get(key)?.words.get(word as usize).copied()
    }

    fn find(&self, store: Store, key: &FlowKey) -> Option<Self::Entry> {
        let entry = (store, *key);
        self.flows.borrow().contains_key(&entry).then_some(entry)
    }

    fn load(&self, entry: Self::Entry) -> Flow {
        self.flows.borrow()[&entry]
    }

    fn save(&self, entry: Self::Entry, flow: Flow) {
        self.flows.borrow_mut().insert(entry, flow);
    }

    fn insert(&self, store: Store, key: &FlowKey, flow: &Flow) -> bool {
        if self.fault.get() == Fault::Full {
            return false;
        }
        self.flows.borrow_mut().insert((store, *key), *flow);
        true
    }

    fn remove(&self, store: Store, key: &FlowKey) {
        self.flows.borrow_mut().remove(&(store, *key));
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.borrow().get(key).copied()
    }

    fn keep_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *fragment);
    }

    fn take_picked_up(&self, now_ns: u64) -> bool {
        let mut quota = self.quota.get();
        let taken = take_quota(&mut quota, now_ns);
        self.quota.set(quota);
        taken
    }

    fn probe(&self, branch: Branch) {
        self.taken.borrow_mut().insert(branch);
    }
}
