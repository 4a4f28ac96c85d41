//! Which nodes hold a stream here, and telling the network about it.
//!
//! [`Presence`] lists the streams of this process. Once a second a task compares the list with
//! what it wrote down last and writes the difference, one change a network however many nodes
//! came or went, so a thousand nodes that reconnect are not a thousand changes. A node that comes
//! back within [`GRACE`] never went away. The same task keeps this replica's lease, unmarks the
//! nodes of replicas that died, and removes ephemeral nodes that stayed away.

use crate::network::{self, CommandError};
use crate::store::{Store, StoreError, Timestamp};
use proto::id::{NetworkId, NodeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often what changed is written down.
const TICK: Duration = Duration::from_secs(1);
/// How long a node may be without a stream before it counts as offline.
const GRACE: Duration = Duration::from_secs(10);
/// How long a replica counts as alive after it last said so.
const LEASE: Duration = Duration::from_secs(45);
/// Ticks between two renewals of the lease and looks for what others left behind.
const TICKS_PER_SWEEP: u32 = 5;

type Key = (NetworkId, NodeId);

/// The streams that this process holds; at most one a node.
#[derive(Default)]
pub struct Presence {
    // Guards the list for the moment of one look-up; streams come and go in their own tasks.
    streams: Mutex<Streams>,
}

#[derive(Default)]
struct Streams {
    held: BTreeMap<Key, Slot>,
    last_serial: u64,
}

struct Slot {
    serial: u64,
    stop: oneshot::Sender<()>,
}

/// A stream's place in the list, given back when it is dropped.
pub struct Held {
    presence: Arc<Presence>,
    key: Key,
    serial: u64,
}

impl Presence {
    /// Enters a stream. The node's older one, if any, is told to end by its receiver.
    #[must_use]
    pub fn enter(
        self: &Arc<Self>,
        network: NetworkId,
        node: NodeId,
    ) -> (Held, oneshot::Receiver<()>) {
        let (stop, stopped) = oneshot::channel();
        let mut streams = self.lock();
        streams.last_serial += 1;
        let serial = streams.last_serial;
        if let Some(older) = streams.held.insert((network, node), Slot { serial, stop }) {
            // An error means that it ended by itself.
            let _ = older.stop.send(());
        }
        (
            Held {
                presence: Arc::clone(self),
                key: (network, node),
                serial,
            },
            stopped,
        )
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut streams = self.presence.lock();
        if streams
            .held
            .get(&self.key)
            .is_some_and(|slot| slot.serial == self.serial)
        {
            streams.held.remove(&self.key);
        }
    }
}

/// Keeps the database true to the list, until the process ends.
pub struct Keeper {
    /// Where.
    pub store: Store,
    /// The name of this process among the replicas.
    pub replica: String,
    /// The list.
    pub presence: Arc<Presence>,
    /// How long an ephemeral node may be offline before it is removed.
    pub ephemeral_offline: Duration,
}

impl Keeper {
    /// Makes this replica known. Before the first stream, so that nobody takes its nodes for left.
    ///
    /// # Errors
    /// The database's.
    pub async fn announce(&self) -> Result<(), StoreError> {
        let mut tx = self.store.write().await?;
        tx.renew_lease(&self.replica, Timestamp::now().after(LEASE))
            .await?;
        tx.commit().await
    }

    /// Runs until it is dropped.
    pub async fn run(self) {
        let mut written: BTreeMap<Key, Option<Instant>> = BTreeMap::new();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 0_u32.. {
            ticks.tick().await;
            for (network, nodes) in self.differences(&mut written, Instant::now()) {
                let now = Timestamp::now();
                let done =
                    network::node::set_presence(&self.store, now, &self.replica, network, &nodes);
                match done.await {
                    Ok(()) => note(&mut written, network, &nodes),
                    Err(error) => tracing::warn!(%error, "cannot write down who is online"),
                }
            }
            if tick.is_multiple_of(TICKS_PER_SWEEP)
                && let Err(error) = self.sweep(Timestamp::now()).await
            {
                tracing::warn!(%error, "cannot look after what others left behind");
            }
        }
    }

    /// Who came since the last writing, and who has been away for longer than the grace.
    fn differences(
        &self,
        written: &mut BTreeMap<Key, Option<Instant>>,
        now: Instant,
    ) -> BTreeMap<NetworkId, Vec<(NodeId, bool)>> {
        let streams = self.presence.lock();
        let mut out: BTreeMap<NetworkId, Vec<(NodeId, bool)>> = BTreeMap::new();
        for (network, node) in streams.held.keys().filter(|key| !written.contains_key(key)) {
            out.entry(*network).or_default().push((*node, true));
        }
        for (key, away_since) in written.iter_mut() {
            if streams.held.contains_key(key) {
                *away_since = None;
            } else if now.duration_since(*away_since.get_or_insert(now)) >= GRACE {
                out.entry(key.0).or_default().push((key.1, false));
            }
        }
        out
    }

    async fn sweep(&self, now: Timestamp) -> Result<(), CommandError> {
        self.announce().await?;
        let mut tx = self.store.read().await?;
        let orphans = tx.orphans(now).await?;
        let expired = tx
            .expired_ephemerals(now.before(self.ephemeral_offline))
            .await?;
        drop(tx);
        let mut left: BTreeMap<(NetworkId, String), Vec<(NodeId, bool)>> = BTreeMap::new();
        for (network, node, replica) in orphans {
            left.entry((network, replica))
                .or_default()
                .push((node, false));
        }
        for ((network, replica), nodes) in left {
            network::node::set_presence(&self.store, now, &replica, network, &nodes).await?;
        }
        for node in expired {
            match network::node::expire(&self.store, now, node).await {
                // Another replica was faster, or the node left.
                Ok(()) | Err(CommandError::NotANode) => {}
                Err(error) => return Err(error),
            }
        }
        let mut tx = self.store.write().await?;
        tx.forget_replicas(now).await?;
        Ok(tx.commit().await?)
    }
}

fn note(
    written: &mut BTreeMap<Key, Option<Instant>>,
    network: NetworkId,
    nodes: &[(NodeId, bool)],
) {
    for (node, online) in nodes {
        if *online {
            written.insert((network, *node), None);
        } else {
            written.remove(&(network, *node));
        }
    }
}
