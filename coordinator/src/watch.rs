//! One live snapshot per network, and one stream of updates per polling node.
//!
//! A feed follows the database: a commit here, a message from another replica or a quiet moment
//! makes it read what changed since its snapshot and publish the next one. If the database does
//! not answer, or its policy cannot be read, the last good snapshot stays: a fault is never an
//! empty netmap. Feeds hold nothing that cannot be read again.

use crate::config::Relays;
use crate::snapshot::{Snapshot, delta, empty_delta};
use crate::store::{Changed, Store, StoreError};
use proto::control::{KEEP_ALIVE_SECONDS, PollMessage};
use proto::id::{Generation, NetworkId, NodeId};
use proto::netmap::Update;
use proto::policy::Diagnostics;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep_until, timeout};

/// Snapshots kept per network, so that a node that comes back gets a delta.
const MAX_PAST: usize = 64;
/// How often a feed looks at the database though nobody said that something changed.
const QUIET: Duration = Duration::from_secs(5);
/// Pause after the database failed.
const RETRY: Duration = Duration::from_secs(1);
/// Longest wait of a new stream for a snapshot that is new enough.
const FRESH: Duration = Duration::from_secs(10);

/// Why a feed has nothing new.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The database's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stored policy does not compile for the nodes as they are.
    #[error("the stored policy does not compile: {0}")]
    Policy(#[from] Diagnostics),
    /// The network is not there (any more).
    #[error("the network is gone")]
    Gone,
    /// No snapshot that is new enough came in time.
    #[error("the network's state could not be read in time")]
    Late,
    /// The thread that computes snapshots ended.
    #[error("the coordinator stops")]
    Stopping,
}

/// The feeds of all networks that somebody polls.
pub struct Watch {
    store: Store,
    relays: Arc<Relays>,
    // Guards the list of feeds for the moment of a look-up; a task per feed owns what is behind.
    feeds: Mutex<BTreeMap<NetworkId, Arc<Feed>>>,
}

/// The latest snapshot and the ones before it, oldest first.
#[derive(Clone)]
struct Published {
    current: Arc<Snapshot>,
    past: Arc<VecDeque<Arc<Snapshot>>>,
}

struct Feed {
    wake: Notify,
    published: watch::Sender<Option<Published>>,
}

impl Watch {
    /// Follows the store's changes until the process ends. `relays` are those that nodes
    /// are told of.
    #[must_use]
    pub fn start(store: Store, relays: Relays) -> Arc<Self> {
        let mut changes = store.changes();
        let this = Arc::new(Self {
            store,
            relays: Arc::new(relays),
            feeds: Mutex::new(BTreeMap::new()),
        });
        let feeds = Arc::downgrade(&this);
        tokio::spawn(async move {
            loop {
                let changed = match changes.recv().await {
                    Ok(changed) => changed,
                    Err(broadcast::error::RecvError::Lagged(_)) => Changed::Unknown,
                    Err(broadcast::error::RecvError::Closed) => break,
                };
                let Some(watch) = feeds.upgrade() else { break };
                watch.wake(changed);
            }
        });
        this
    }

    fn wake(&self, changed: Changed) {
        let feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        match changed {
            Changed::Network(id) => {
                if let Some(feed) = feeds.get(&id) {
                    feed.wake.notify_one();
                }
            }
            Changed::Unknown => feeds.values().for_each(|feed| feed.wake.notify_one()),
        }
    }

    /// A stream of updates for `node`, whose network is at least at generation `at_least`. `base`
    /// is what the node has.
    ///
    /// # Errors
    /// [`FeedError::Late`] if no snapshot as new as that can be had.
    pub async fn subscribe(
        &self,
        network: NetworkId,
        node: NodeId,
        at_least: Generation,
        base: Option<Generation>,
    ) -> Result<Updates, FeedError> {
        let (feed, _) = self.at_least(network, at_least).await?;
        Ok(Updates {
            feed,
            node,
            have: None,
            base,
            quiet_since: Instant::now(),
        })
    }

    /// Whether nodes of this network are told of any relay.
    ///
    /// # Errors
    /// [`FeedError::Late`] if the network cannot be read.
    pub async fn has_relays(&self, network: NetworkId) -> Result<bool, FeedError> {
        let (_, snapshot) = self.at_least(network, Generation(0)).await?;
        Ok(snapshot.has_relays())
    }

    /// A network's feed, once it has a snapshot of at least this generation.
    async fn at_least(
        &self,
        network: NetworkId,
        generation: Generation,
    ) -> Result<(watch::Receiver<Option<Published>>, Arc<Snapshot>), FeedError> {
        let mut feed = self.feed(network);
        let fresh = |published: &Option<Published>| {
            published
                .as_ref()
                .is_some_and(|it| it.current.generation() >= generation)
        };
        let snapshot = match timeout(FRESH, feed.wait_for(fresh)).await {
            Ok(Ok(published)) => published.as_ref().map(|it| Arc::clone(&it.current)),
            Ok(Err(_)) => return Err(FeedError::Stopping),
            Err(_) => None,
        };
        Ok((feed, snapshot.ok_or(FeedError::Late)?))
    }

    fn feed(&self, network: NetworkId) -> watch::Receiver<Option<Published>> {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        let feed = feeds.entry(network).or_insert_with(|| {
            let (published, _) = watch::channel(None);
            let feed = Arc::new(Feed {
                wake: Notify::new(),
                published,
            });
            let (store, relays) = (self.store.clone(), Arc::clone(&self.relays));
            tokio::spawn(follow(store, network, relays, Arc::clone(&feed)));
            feed
        });
        feed.wake.notify_one();
        feed.published.subscribe()
    }
}

async fn follow(store: Store, network: NetworkId, relays: Arc<Relays>, feed: Arc<Feed>) {
    loop {
        let current = feed
            .published
            .borrow()
            .as_ref()
            .map(|it| Arc::clone(&it.current));
        match refresh(&store, network, current).await {
            Ok(Some(next)) => publish(&feed, next.with_relays(&relays)),
            Ok(None) => {
                let _ = timeout(QUIET, feed.wake.notified()).await;
            }
            Err(FeedError::Stopping) => break,
            Err(error) => {
                tracing::error!(%network, %error, "the network's nodes keep the last netmap");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// The snapshot after `current`, or `None` if it is the latest.
async fn refresh(
    store: &Store,
    network: NetworkId,
    current: Option<Arc<Snapshot>>,
) -> Result<Option<Snapshot>, FeedError> {
    let mut tx = store.read().await?;
    let since = current.as_ref().map(|it| it.generation());
    let row = tx.network(network).await?.ok_or(FeedError::Gone)?;
    if since == Some(row.generation) {
        return Ok(None);
    }
    let rows = tx.load(network, since).await?.ok_or(FeedError::Gone)?;
    drop(tx);
    // Compiling a large policy takes long enough to hold up other tasks.
    let next = tokio::task::spawn_blocking(move || match current {
        Some(current) => current.advance(rows),
        None => Snapshot::build(rows),
    });
    Ok(Some(next.await.map_err(|_| FeedError::Stopping)??))
}

fn publish(feed: &Feed, next: Snapshot) {
    feed.published.send_modify(|published| {
        let mut past = VecDeque::new();
        if let Some(before) = published.take() {
            past.extend(before.past.iter().cloned());
            past.push_back(before.current);
            while past.len() > MAX_PAST {
                past.pop_front();
            }
        }
        *published = Some(Published {
            current: Arc::new(next),
            past: Arc::new(past),
        });
    });
}

/// The updates of one node, one after the other.
pub struct Updates {
    feed: watch::Receiver<Option<Published>>,
    node: NodeId,
    /// What the node has been told: the snapshot, and the generation that it knows of.
    have: Option<(Arc<Snapshot>, Generation)>,
    base: Option<Generation>,
    quiet_since: Instant,
}

impl Updates {
    /// The next message: an update as soon as there is one for this node, a sign of life when
    /// nothing happened for a while. `None`: the node is no longer in the network.
    pub async fn next(&mut self) -> Option<PollMessage> {
        let message = match &self.have {
            None => self.first()?,
            Some(_) => self.following().await?,
        };
        self.quiet_since = Instant::now();
        Some(message)
    }

    fn first(&mut self) -> Option<PollMessage> {
        let published = self.feed.borrow_and_update().clone()?;
        let current = published.current;
        // It may have been removed since it connected.
        if !current.contains(self.node) {
            return None;
        }
        let known = self.base.and_then(|base| {
            let mut candidates = published.past.iter().chain([&current]);
            candidates
                .find(|it| it.generation() == base && it.contains(self.node))
                .cloned()
        });
        let message = match known {
            Some(old) => match delta(&old, &current, self.node, old.generation()) {
                Some(delta) => PollMessage::Update(Update::Delta(Box::new(delta))),
                None => self.sign_of_life(&current, old.generation()),
            },
            None => PollMessage::Update(Update::Full(Box::new(current.view_for(self.node)?))),
        };
        let generation = current.generation();
        self.have = Some((current, generation));
        Some(message)
    }

    async fn following(&mut self) -> Option<PollMessage> {
        // Half the promised time, so that a late timer does not break the promise.
        let keep_alive = self.quiet_since + Duration::from_secs(KEEP_ALIVE_SECONDS) / 2;
        loop {
            let (have, base) = self.have.clone()?;
            tokio::select! {
                changed = self.feed.changed() => changed.ok()?,
                () = sleep_until(keep_alive) => {
                    let message = self.sign_of_life(&have, base);
                    self.have = Some((Arc::clone(&have), have.generation()));
                    return Some(message);
                }
            }
            let current = Arc::clone(&self.feed.borrow_and_update().as_ref()?.current);
            if !current.contains(self.node) {
                return None;
            }
            let delta = delta(&have, &current, self.node, base);
            let known = delta.as_ref().map_or(base, |delta| delta.next);
            self.have = Some((current, known));
            if let Some(delta) = delta {
                return Some(PollMessage::Update(Update::Delta(Box::new(delta))));
            }
        }
    }

    /// Says that nothing changed; if the network moved on without touching this node's view, says
    /// that too, so that the node can resume from a generation that is still remembered.
    fn sign_of_life(&self, current: &Snapshot, base: Generation) -> PollMessage {
        if current.generation() > base {
            let delta = empty_delta(current, self.node, base);
            PollMessage::Update(Update::Delta(Box::new(delta)))
        } else {
            PollMessage::KeepAlive
        }
    }
}
