//! A host's policy: the real evaluator on the tables that the engine lowered, kept in plain maps.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ebpf::abi::{
    Active, Addr, Direction, Flow, FlowKey, Fragment, FragmentKey, Grant, Identity, PageKey,
    PairKey, Ports, PortsKey, Quota, Share,
};
use ebpf::addresses::{Near, Owned};
use ebpf::packet::Packet;
use ebpf::verdict::{Store, judge, take_quota};
use engine::plan::{Policy, Step};

use super::wireguard::Inner;
use crate::packet;

/// Ports of a question; an answer has them the other way round.
const PORTS: (u16, u16) = (40_000, 7);

/// What stands between applications and the WireGuard device. Empty, it lets nothing through.
#[derive(Default)]
pub struct Acl {
    policy: Option<Arc<Policy>>,
    epoch: Cell<u32>,
    flows: RefCell<BTreeMap<(Store, FlowKey), Flow>>,
    shares: RefCell<BTreeMap<u16, Share>>,
    quota: Cell<Quota>,
}

impl Acl {
    /// Carries out a step that concerns policy.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::SetAcl(policy) => {
                self.policy = Some(Arc::clone(policy));
                self.epoch.set(self.epoch.get() + 1);
            }
            Step::DetachAcl => *self = Acl::default(),
            _ => {}
        }
    }

    /// Whether a packet passes.
    pub fn passes(&self, now: Duration, direction: Direction, inner: Inner) -> bool {
        let (asker, asked) = ((inner.src, PORTS.0), (inner.dst, PORTS.1));
        let bytes = if inner.answer {
            packet::udp(asked, asker, b"answer")
        } else {
            packet::udp(asker, asked, b"question")
        };
        let mut read = Packet::NONE;
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        judge(self, &bytes.as_slice(), &mut read, direction, now_ns).passes()
    }
}

impl ebpf::verdict::Tables for Acl {
    type Entry = (Store, FlowKey);
    type Line = Owned;

    fn active(&self) -> Active {
        Active {
            epoch: self.epoch.get(),
            slot: 0,
        }
    }

    fn complete(&self, _slot: u32) -> bool {
        self.policy.is_some()
    }

    fn line(&self, _slot: u32, addr: &Addr) -> Option<Owned> {
        let identity = *self.policy.as_ref()?.tables.identities.get(addr)?;
        Some(Owned::new(*addr, identity, [Near::ASK; 2]))
    }

    fn home(&self, _slot: u32, _addr: &Addr) -> Option<Identity> {
        None
    }

    fn route(&self, _slot: u32, addr: &Addr) -> Option<Identity> {
        self.policy.as_ref()?.tables.route((*addr).into())
    }

    fn pair(&self, _slot: u32, key: &PairKey) -> Option<Grant> {
        self.policy.as_ref()?.tables.pairs.get(key).copied()
    }

    fn ports(&self, _slot: u32, key: &PortsKey) -> Option<Ports> {
        self.policy.as_ref()?.tables.ports.get(key).copied()
    }

    fn page_word(&self, _slot: u32, key: &PageKey, word: u32) -> Option<u64> {
        let page = self.policy.as_ref()?.tables.pages.get(key)?;
        page.words.get(word as usize).copied()
    }

    fn is_new(&self, _packet: &Packet, _direction: Direction) -> bool {
        false
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
        self.flows.borrow_mut().insert((store, *key), *flow);
        true
    }

    fn remove(&self, store: Store, key: &FlowKey) {
        self.flows.borrow_mut().remove(&(store, *key));
    }

    fn share(&self, number: u16) -> Option<Share> {
        let shares = self.shares.borrow();
        Some(shares.get(&number).copied().unwrap_or_default())
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

    fn fragment(&self, _key: &FragmentKey) -> Option<Fragment> {
        None
    }

    fn keep_fragment(&self, _key: &FragmentKey, _fragment: &Fragment) {}

    fn take_picked_up(&self, now_ns: u64) -> bool {
        let mut quota = self.quota.get();
        let taken = take_quota(&mut quota, now_ns);
        self.quota.set(quota);
        taken
    }
}
