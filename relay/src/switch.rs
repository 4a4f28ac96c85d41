//! Who is here, and where a packet goes. No socket, no await, no clock.
//!
//! A client's address is its key *within its tenant*: a packet for a node of another network finds
//! nobody, as if that node were not connected. There is no other way to look anybody up.
//!
//! A region may have several relays. What the others say of who is connected to them is kept here
//! too, and a packet for one of those goes into the queue of the [`Link`] to its relay; a packet that
//! comes from another relay is for nodes that are here, or for nobody.
//!
//! Two connections with one key are a node that reconnects before its old connection is known dead,
//! or a cloned machine. The newest is sent to, until another one speaks: then that one is. All of
//! them are told of each other in a Health frame, and the last that stays that it is alone again.

use crate::metrics::{DropReason, Metrics};
use crate::queue::{Pushed, Queue};
use bytes::Bytes;
use proto::derp::{Frame, GoneReason, HEADER_BYTES};
use proto::id::NetworkId;
use proto::key::{KEY_BYTES, NodeKey};
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

/// What clients with the same key are told.
pub const DUPLICATE_TEXT: &str = "another connection with the same node key is open: if this machine is a \
     clone, give it a key of its own";
/// Most connections of one key; one more ends the oldest. So nobody multiplies its rate.
pub const MAX_SAME_KEY: usize = 4;
/// A stopping relay's clients wait so long before they connect again: its successor needs a moment.
pub const RECONNECT_IN: Duration = Duration::from_millis(250);
/// And try so long before they look for another relay.
pub const TRY_FOR: Duration = Duration::from_secs(10);

/// Whose nodes see each other; `None` on a relay that is open to everybody.
pub type Tenant = Option<NetworkId>;

/// A connected client, as others see it.
pub struct Client {
    /// Its key.
    pub key: NodeKey,
    /// Its network.
    pub tenant: Tenant,
    /// What waits for it.
    pub queue: Queue,
    number: u64,
    duplicate: AtomicBool,
    watches: AtomicBool,
}

/// The way to another relay of the region.
#[derive(Default)]
pub struct Link {
    /// What waits for that relay.
    pub queue: Queue,
}

/// What became of a packet that was to be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// It waits for its destination.
    Queued,
    /// Nobody of that key is here.
    NotHere,
}

/// Everybody who is connected.
pub struct Switch {
    /// Read for each packet, written when somebody comes, goes or takes over.
    places: RwLock<Places>,
    metrics: Arc<Metrics>,
    numbers: AtomicU64,
    stopping: AtomicBool,
}

/// The order of neither map is ever seen.
#[derive(Default)]
struct Places {
    here: HashMap<(Tenant, NodeKey), Place>,
    /// Who is connected to other relays of the region, in which tenants, where: the newest last.
    there: HashMap<NodeKey, Vec<(Tenant, Arc<Link>)>>,
    /// The other relays that are connected to this one.
    relays: Vec<Arc<Client>>,
}

/// The connections of one key, oldest first; `active` is sent to.
struct Place {
    active: Arc<Client>,
    all: Vec<Arc<Client>>,
}

impl Switch {
    /// One that counts into `metrics`.
    #[must_use]
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            places: RwLock::default(),
            metrics,
            numbers: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        }
    }

    /// A client has proven its key and may use the relay.
    pub fn enter(&self, tenant: Tenant, key: NodeKey) -> Arc<Client> {
        let client = self.client(tenant, key);
        let mut places = self.write();
        let place = places.here.entry((tenant, key));
        let place = place.or_insert_with(|| Place {
            active: Arc::clone(&client),
            all: Vec::with_capacity(1),
        });
        place.active = Arc::clone(&client);
        place.all.push(Arc::clone(&client));
        if place.all.len() > MAX_SAME_KEY {
            // Without a word that would bring it back.
            place.all.remove(0).queue.close(None);
        }
        if place.all.len() > 1 {
            let told = frame(&Frame::Health(DUPLICATE_TEXT));
            for member in &place.all {
                member.duplicate.store(true, Ordering::Relaxed);
                member.queue.push_control(told.clone());
            }
            Metrics::add(&self.metrics.duplicates, 1);
        } else {
            places.tell_watchers(tenant, &present(key));
        }
        self.close_if_stopping(&client);
        client
    }

    /// Another relay of the region has proven its key.
    pub fn enter_relay(&self, key: NodeKey) -> Arc<Client> {
        let client = self.client(None, key);
        let mut places = self.write();
        places.relays.push(Arc::clone(&client));
        self.close_if_stopping(&client);
        client
    }

    fn client(&self, tenant: Tenant, key: NodeKey) -> Arc<Client> {
        Arc::new(Client {
            key,
            tenant,
            queue: Queue::default(),
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            duplicate: AtomicBool::new(false),
            watches: AtomicBool::new(false),
        })
    }

    /// Under the lock, so that nobody slips in between the announcement and the end.
    fn close_if_stopping(&self, client: &Client) {
        if self.stopping.load(Ordering::Relaxed) {
            client.queue.close(Some(come_back(RECONNECT_IN)));
        }
    }

    /// A client's connection ended. Those whom it wrote to hear that it is gone.
    pub fn leave(&self, client: &Client, sent_to: &BTreeSet<NodeKey>) {
        let address = (client.tenant, client.key);
        {
            let mut places = self.write();
            let Some(place) = places.here.get_mut(&address) else {
                return;
            };
            place.all.retain(|member| member.number != client.number);
            let Some(newest) = place.all.last() else {
                places.here.remove(&address);
                places.tell_watchers(client.tenant, &gone(client.key));
                drop(places);
                self.tell_gone(client, sent_to);
                return;
            };
            if place.active.number == client.number {
                place.active = Arc::clone(newest);
            }
            if let [alone] = place.all.as_slice() {
                alone.duplicate.store(false, Ordering::Relaxed);
                alone.queue.push_control(frame(&Frame::Health("")));
            }
        }
    }

    /// Another relay's connection to this one ended.
    pub fn leave_relay(&self, client: &Client) {
        let relays = &mut self.write().relays;
        relays.retain(|relay| relay.number != client.number);
    }

    /// Another relay wants to know who is here, and from now on who comes and goes.
    pub fn watch(&self, relay: &Client) {
        // No one comes or goes meanwhile.
        let places = self.write();
        if relay.watches.swap(true, Ordering::Relaxed) {
            return;
        }
        for (tenant, key) in places.here.keys() {
            relay.queue.push_news(within(*tenant, &present(*key)));
        }
    }

    /// Ends a node's connections, wherever it belongs; it may come back at once.
    pub fn close_peer(&self, key: NodeKey) {
        let places = self.read();
        let its = |(address, _): &(&(Tenant, NodeKey), _)| address.1 == key;
        for (_, place) in places.here.iter().filter(its) {
            for client in &place.all {
                client.queue.close(Some(come_back(Duration::ZERO)));
            }
        }
    }

    /// The relay behind `link` says that a node is connected there.
    pub fn present(&self, link: &Arc<Link>, tenant: Tenant, key: NodeKey) {
        let mut places = self.write();
        let ways = places.there.entry(key).or_default();
        ways.retain(|way| !(way.0 == tenant && Arc::ptr_eq(&way.1, link)));
        ways.push((tenant, Arc::clone(link)));
    }

    /// The relay behind `link` says that a node has left it.
    pub fn gone(&self, link: &Arc<Link>, tenant: Tenant, key: NodeKey) {
        let mut places = self.write();
        if let Some(ways) = places.there.get_mut(&key) {
            ways.retain(|way| !(way.0 == tenant && Arc::ptr_eq(&way.1, link)));
            if ways.is_empty() {
                places.there.remove(&key);
            }
        }
    }

    /// The relay behind `link` is not connected any more.
    pub fn forget(&self, link: &Arc<Link>) {
        self.write().there.retain(|_, ways| {
            ways.retain(|way| !Arc::ptr_eq(&way.1, link));
            !ways.is_empty()
        });
    }

    fn tell_gone(&self, client: &Client, sent_to: &BTreeSet<NodeKey>) {
        let told = frame(&gone(client.key));
        let places = self.read();
        for peer in sent_to {
            if let Some(place) = places.here.get(&(client.tenant, *peer)) {
                place.active.queue.push_control(told.clone());
            }
        }
    }

    /// Hands a RecvPacket frame to `dst`'s queue.
    pub fn forward(&self, from: &Client, dst: NodeKey, frame: Bytes, disco: bool) -> Forwarded {
        if from.duplicate.load(Ordering::Relaxed) {
            self.take_over(from);
        }
        let places = self.read();
        if let Some(place) = places.here.get(&(from.tenant, dst)) {
            return self.put(&place.active.queue, frame, disco);
        }
        let ways = places.there.get(&dst).into_iter().flatten();
        let Some((_, link)) = ways.rev().find(|way| way.0 == from.tenant) else {
            self.metrics.dropped(DropReason::NotHere);
            return Forwarded::NotHere;
        };
        let packet = frame.get(HEADER_BYTES + KEY_BYTES..).unwrap_or_default();
        let src = from.key;
        let onward = within(from.tenant, &Frame::ForwardPacket { src, dst, packet });
        Metrics::add(&self.metrics.handed_on, 1);
        self.put(&link.queue, onward, disco)
    }

    /// Hands a RecvPacket frame that came from another relay to `dst`'s queue, if it is here.
    pub fn deliver(&self, tenant: Tenant, dst: NodeKey, frame: Bytes, disco: bool) {
        match self.read().here.get(&(tenant, dst)) {
            Some(place) => drop(self.put(&place.active.queue, frame, disco)),
            None => self.metrics.dropped(DropReason::NotHere),
        }
    }

    fn put(&self, queue: &Queue, frame: Bytes, disco: bool) -> Forwarded {
        let bytes = frame.len() as u64;
        match queue.push_packet(frame, disco) {
            Pushed::Queued => {}
            Pushed::Displaced if disco => self.metrics.dropped(DropReason::DiscoQueue),
            Pushed::Displaced => self.metrics.dropped(DropReason::DataQueue),
            Pushed::Closed => {
                self.metrics.dropped(DropReason::Leaving);
                return Forwarded::Queued;
            }
        }
        Metrics::add(&self.metrics.packets, 1);
        Metrics::add(&self.metrics.bytes, bytes);
        Forwarded::Queued
    }

    /// Of several connections with one key, the one that speaks is sent to.
    fn take_over(&self, speaker: &Client) {
        let address = (speaker.tenant, speaker.key);
        let active = |places: &Places| {
            let place = places.here.get(&address)?;
            Some(place.active.number == speaker.number)
        };
        if active(&self.read()) == Some(true) {
            return;
        }
        if let Some(place) = self.write().here.get_mut(&address) {
            let member = |member: &&Arc<Client>| member.number == speaker.number;
            if let Some(member) = place.all.iter().find(member) {
                place.active = Arc::clone(member);
            }
        }
    }

    /// Tells everybody that the relay ends, and lets nobody stay.
    pub fn stop(&self) {
        let places = self.write();
        self.stopping.store(true, Ordering::Relaxed);
        let last = come_back(RECONNECT_IN);
        let nodes = places.here.values().flat_map(|place| &place.all);
        for client in nodes.chain(&places.relays) {
            client.queue.close(Some(last.clone()));
        }
    }

    /// How many keys are here.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read().here.len()
    }

    /// Whether nobody is here.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(&self) -> RwLockReadGuard<'_, Places> {
        self.places.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Places> {
        self.places.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    fn tell_watchers(&self, tenant: Tenant, news: &Frame<'_>) {
        let watching = |relay: &&Arc<Client>| relay.watches.load(Ordering::Relaxed);
        for relay in self.relays.iter().filter(watching) {
            relay.queue.push_news(within(tenant, news));
        }
    }
}

/// Where a node connects from is nobody else's business.
fn present(peer: NodeKey) -> Frame<'static> {
    Frame::PeerPresent {
        peer,
        addr: None,
        flags: None,
    }
}

fn gone(peer: NodeKey) -> Frame<'static> {
    let reason = GoneReason::Disconnected;
    Frame::PeerGone { peer, reason }
}

/// A frame to another relay about nodes of this tenant.
fn within(tenant: Tenant, inner: &Frame<'_>) -> Bytes {
    let Some(network) = tenant else {
        return frame(inner);
    };
    let bytes = inner.to_vec();
    frame(&Frame::Within {
        network,
        kind: inner.kind(),
        body: bytes.get(HEADER_BYTES..).unwrap_or_default(),
    })
}

/// A frame of the relay's own.
#[must_use]
pub fn frame(frame: &Frame<'_>) -> Bytes {
    Bytes::from(frame.to_vec())
}

/// The last word to a client that is wanted back after a while.
#[must_use]
pub fn come_back(reconnect_in: Duration) -> Bytes {
    frame(&Frame::Restarting {
        reconnect_in,
        try_for: TRY_FOR,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    const A: NodeKey = NodeKey([0xaa; 32]);
    const B: NodeKey = NodeKey([0xbb; 32]);
    const ONE: Tenant = Some(NetworkId(1));
    const TWO: Tenant = Some(NetworkId(2));

    fn switch() -> Switch {
        Switch::new(Arc::new(Metrics::default()))
    }

    /// What waits for a client, as text.
    async fn waiting(client: &Client) -> Vec<String> {
        client.queue.push_control(frame(&Frame::KeepAlive));
        let mut batch = VecDeque::new();
        client.queue.take(&mut batch).await;
        let text = |bytes: &Bytes| match Frame::split(bytes).unwrap().unwrap().0 {
            Frame::KeepAlive => None,
            Frame::Health(text) => Some(format!("health {}", text.len())),
            Frame::PeerGone { reason, .. } => Some(format!("{reason:?}")),
            Frame::RecvPacket { packet, .. } => Some(String::from_utf8(packet.to_vec()).unwrap()),
            other => Some(format!("{other:?}")),
        };
        batch.iter().filter_map(text).collect()
    }

    fn send(switch: &Switch, from: &Client, dst: NodeKey, packet: &str) -> Forwarded {
        let packet = packet.as_bytes();
        let bytes = frame(&Frame::RecvPacket {
            src: from.key,
            packet,
        });
        switch.forward(from, dst, bytes, false)
    }

    #[tokio::test]
    async fn tenants_do_not_see_each_other() {
        let switch = switch();
        let (a, b) = (switch.enter(ONE, A), switch.enter(ONE, B));
        let stranger = switch.enter(TWO, B);
        assert_eq!(send(&switch, &a, B, "hello"), Forwarded::Queued);
        assert_eq!(send(&switch, &stranger, A, "evil"), Forwarded::NotHere);
        assert_eq!(waiting(&b).await, ["hello"]);
        assert!(waiting(&stranger).await.is_empty());
        assert!(waiting(&a).await.is_empty());
        // Nor does an open relay's nobody-in-particular see a network's nodes.
        let open = switch.enter(None, B);
        assert_eq!(send(&switch, &open, A, "evil"), Forwarded::NotHere);
    }

    #[tokio::test]
    async fn who_was_written_to_hears_that_the_writer_is_gone() {
        let switch = switch();
        let (a, b) = (switch.enter(ONE, A), switch.enter(ONE, B));
        let stranger = switch.enter(TWO, B);
        switch.leave(&a, &BTreeSet::from([B]));
        assert_eq!(waiting(&b).await, ["Disconnected"]);
        assert!(waiting(&stranger).await.is_empty());
        assert_eq!(send(&switch, &b, A, "late"), Forwarded::NotHere);
        switch.leave(&b, &BTreeSet::new());
        switch.leave(&stranger, &BTreeSet::new());
        assert!(switch.is_empty());
    }

    #[tokio::test]
    async fn of_two_with_one_key_the_last_that_spoke_is_sent_to() {
        let switch = switch();
        let (old, peer) = (switch.enter(ONE, A), switch.enter(ONE, B));
        let new = switch.enter(ONE, A);
        let told = format!("health {}", DUPLICATE_TEXT.len());
        assert_eq!(waiting(&old).await, std::slice::from_ref(&told));
        send(&switch, &peer, A, "to the newest");
        assert_eq!(waiting(&new).await, [told, "to the newest".to_owned()]);
        send(&switch, &old, B, "I speak");
        send(&switch, &peer, A, "to the speaker");
        assert_eq!(waiting(&old).await, ["to the speaker"]);
        // One leaves; nobody hears "gone", for the key is still here.
        switch.leave(&old, &BTreeSet::from([B]));
        assert_eq!(waiting(&peer).await, ["I speak"]);
        send(&switch, &peer, A, "to the rest");
        assert_eq!(waiting(&new).await, ["health 0", "to the rest"]);
    }

    #[tokio::test]
    async fn one_key_has_so_many_connections_and_no_more() {
        let switch = switch();
        let clients: Vec<_> = (0..=MAX_SAME_KEY).map(|_| switch.enter(ONE, A)).collect();
        let (oldest, others) = clients.split_first().unwrap();
        assert_eq!(oldest.queue.push_packet(Bytes::new(), true), Pushed::Closed);
        for client in others {
            assert_eq!(client.queue.push_packet(Bytes::new(), true), Pushed::Queued);
        }
        // It takes nobody with it when its session ends.
        switch.leave(oldest, &BTreeSet::new());
        let peer = switch.enter(ONE, B);
        assert_eq!(send(&switch, &peer, A, "to the newest"), Forwarded::Queued);
        for client in others {
            switch.leave(client, &BTreeSet::new());
        }
        assert_eq!(send(&switch, &peer, A, "to nobody"), Forwarded::NotHere);
    }

    #[tokio::test]
    async fn what_other_relays_say_is_believed_of_their_own_nodes_and_networks() {
        let switch = switch();
        let a = switch.enter(ONE, A);
        let (near, far) = (Arc::new(Link::default()), Arc::new(Link::default()));
        switch.present(&near, ONE, B);
        switch.present(&far, ONE, B);
        switch.present(&far, TWO, B);
        let waits = async |link: &Link| {
            link.queue.push_control(frame(&Frame::KeepAlive));
            let mut batch = VecDeque::new();
            link.queue.take(&mut batch).await;
            batch.len() - 1
        };
        assert_eq!(send(&switch, &a, B, "by the newest"), Forwarded::Queued);
        assert_eq!((waits(&near).await, waits(&far).await), (0, 1));
        // It left the one and is still at the other.
        switch.gone(&far, ONE, B);
        assert_eq!(send(&switch, &a, B, "by the other"), Forwarded::Queued);
        assert_eq!((waits(&near).await, waits(&far).await), (1, 0));
        // Who is here is not looked for elsewhere.
        let b = switch.enter(ONE, B);
        send(&switch, &a, B, "here");
        assert_eq!(waiting(&b).await, ["here"]);
        switch.leave(&b, &BTreeSet::new());
        // The relay is lost, and B is known of the other network alone.
        switch.forget(&near);
        assert_eq!(send(&switch, &a, B, "to nobody"), Forwarded::NotHere);
        switch.forget(&far);
        assert!(switch.read().there.is_empty());
    }

    #[tokio::test]
    async fn a_relay_that_watches_hears_who_is_here_who_comes_and_who_goes() {
        let switch = switch();
        let early = switch.enter(ONE, A);
        let relay = switch.enter_relay(NodeKey([9; 32]));
        let idle = switch.enter_relay(NodeKey([8; 32]));
        switch.watch(&relay);
        let twin = switch.enter(ONE, A);
        let late = switch.enter(None, B);
        switch.leave(&early, &BTreeSet::new());
        switch.leave(&twin, &BTreeSet::new());
        switch.leave(&late, &BTreeSet::new());
        let news = [
            within(ONE, &present(A)),
            frame(&present(B)),
            within(ONE, &gone(A)),
            frame(&gone(B)),
        ];
        relay.queue.push_control(frame(&Frame::KeepAlive));
        let mut batch = VecDeque::new();
        relay.queue.take(&mut batch).await;
        assert_eq!(batch.split_off(1), news);
        assert!(waiting(&idle).await.is_empty(), "it did not ask");
        switch.leave_relay(&relay);
        switch.leave_relay(&idle);
        assert!(switch.read().relays.is_empty());
    }

    #[tokio::test]
    async fn a_stop_reaches_all_and_whoever_comes_late() {
        let switch = switch();
        let early = switch.enter(ONE, A);
        switch.stop();
        let late = switch.enter(ONE, B);
        for client in [early, late] {
            let said = waiting(&client).await;
            assert!(
                said.len() == 1 && said[0].starts_with("Restarting"),
                "{said:?}"
            );
        }
    }
}
