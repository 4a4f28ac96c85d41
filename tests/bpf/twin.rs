//! The kernel's maps as plain ones, and the same changes to them.

use super::model;
use ebpf::abi::{
    Active, Addr, Direction, ECHO_FROM_LOCAL, Flow, FlowKey, Fragment, FragmentKey, Grant,
    Identity, PageKey, PairKey, Ports, PortsKey, Quota, Share,
};
use ebpf::addresses::Owned;
use ebpf::packet::Packet;
use ebpf::tracks;
use ebpf::verdict::{Branch, Limits, Store, Tables, Verdict, judge, key_of, take_quota};
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
    pub shares: RefCell<BTreeMap<u16, Share>>,
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
        let next = Active { epoch, slot };
        self.active.set(next.word());
    }

    /// Every flow, dead or alive, and where it is kept. In two tables at once is none.
    pub fn places(&self) -> BTreeMap<model::Key, model::Place> {
        let mut places = BTreeMap::new();
        for (store, key) in self.flows.borrow().keys() {
            let echo = matches!(key.protocol, 1 | 58) && key.remote_port != 0;
            let (remote_port, asked_by_us) = if echo {
                let asked_by_us = key.remote_port == ECHO_FROM_LOCAL;
                (key.local_port, Some(asked_by_us))
            } else {
                (key.remote_port, None)
            };
            let key = model::Key {
                local: key.local.into(),
                remote: key.remote.into(),
                local_port: key.local_port,
                remote_port,
                protocol: key.protocol,
                asked_by_us,
            };
            let place = match store {
                Store::Opening => model::Place::Opening,
                Store::Established => model::Place::Lasting,
                Store::Surplus => model::Place::Surplus,
            };
            assert_eq!(places.insert(key, place), None, "in two tables");
        }
        places
    }

    pub fn send(&self, direction: Direction, bytes: &[u8], now_ns: u64) -> Verdict {
        let mut packet = Packet::NONE;
        judge(self, &bytes, &mut packet, direction, now_ns)
    }
}

impl<const M: u32> Tables for Twin<M> {
    type Entry = (Store, FlowKey);
    type Line = Owned;

    const MUTANT: u32 = M;

    // So few that a story meets them.
    const LIMITS: Limits = Limits {
        opened: model::OPENED as u32,
        established: model::LASTING as u32,
    };

    fn active(&self) -> Active {
        Active::from_word(self.active.get())
    }

    fn complete(&self, _slot: u32) -> bool {
        self.fault.get() != Fault::NoTable
    }

    fn line(&self, _slot: u32, addr: &Addr) -> Option<Owned> {
        let tables = self.tables.borrow();
        let identity = tables.identities.get(addr)?;
        let homes = acl::addresses::homes(&tables);
        Some(acl::addresses::line(&tables, &homes, *addr, *identity))
    }

    fn home(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        let homes = acl::addresses::homes(&self.tables.borrow());
        let home = homes.into_iter().find(|home| home.addr == *addr)?;
        Some(home.identity)
    }

    fn route(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.tables.borrow().route((*addr).into())
    }

    fn pair(&self, _slot: u32, key: &PairKey) -> Option<Grant> {
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

    fn is_new(&self, packet: &Packet, direction: Direction) -> bool {
        let key = key_of(packet, direction);
        let stores = [Store::Established, Store::Opening, Store::Surplus];
        let flows = self.flows.borrow();
        tracks::is_for(packet)
            && !stores
                .iter()
                .any(|store| flows.contains_key(&(*store, key)))
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

    fn share(&self, number: u16) -> Option<Share> {
        Some(
            self.shares
                .borrow()
                .get(&number)
                .copied()
                .unwrap_or_default(),
        )
    }

    fn set_opened(&self, number: u16, since_ns: u64, opened: u32) {
        let mut shares = self.shares.borrow_mut();
        let share = shares.entry(number).or_default();
        (share.since_ns, share.opened) = (since_ns, opened);
    }

    fn set_established(&self, number: u16, established: u32) {
        let mut shares = self.shares.borrow_mut();
        shares.entry(number).or_default().established = established;
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
