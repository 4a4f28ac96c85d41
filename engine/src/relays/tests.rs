#![allow(clippy::disallowed_methods, reason = "a test brings the time")]

use super::*;
use proptest::prelude::*;

const ONE: RegionId = RegionId(1);
const TWO: RegionId = RegionId(2);
const THREE: RegionId = RegionId(3);
const PEER: NodeKey = NodeKey([9; 32]);

fn map(ids: &[RegionId]) -> BTreeMap<RegionId, Region> {
    let region = |id: &RegionId| {
        let name = format!("r{id}");
        (
            *id,
            Region {
                name,
                hosts: Vec::new(),
            },
        )
    };
    ids.iter().map(region).collect()
}

fn relays(homes: &[(NodeKey, RegionId)]) -> Relays {
    let mut relays = Relays::new(51821);
    let homes = homes.iter().map(|(key, home)| (*key, Some(*home)));
    relays.set(&map(&[ONE, TWO, THREE]), homes);
    relays
}

/// What is published, with the peers whose path is the relay.
fn publish(relays: &mut Relays, now: Instant, relayed: &[NodeKey]) -> Arc<RelayTable> {
    let keys: Vec<NodeKey> = relays.places.keys().copied().collect();
    let ways = keys.iter().map(|key| (key, relayed.contains(key), None));
    relays.publish(now, ways);
    Arc::clone(&relays.table)
}

fn ids(table: &RelayTable) -> Vec<RegionId> {
    table.regions.keys().copied().collect()
}

fn down(why: &str) -> RelayEvent {
    RelayEvent::Down(why.to_owned())
}

#[test]
fn connected_is_the_own_home_and_those_of_relayed_peers() {
    let (mut relays, now) = (relays(&[(PEER, TWO)]), Instant::now());
    relays.choose_home(now, &BTreeMap::new(), false);
    assert_eq!(relays.home(), Some(ONE));
    let table = publish(&mut relays, now, &[PEER]);
    assert_eq!(ids(&table), [ONE, TWO]);
    assert_eq!(table.peers[&PEER].region, TWO);
    // It goes direct: the region lingers, and then is closed.
    let later = now + Duration::from_secs(100);
    assert_eq!(ids(&publish(&mut relays, later, &[])), [ONE, TWO]);
    assert_eq!(relays.deadline(later), Some(later + LINGER));
    let table = publish(&mut relays, later + LINGER, &[]);
    assert_eq!(ids(&table), [ONE]);
    assert!(
        table.peers.contains_key(&PEER),
        "its packets still find their way in"
    );
}

#[test]
fn the_nearest_region_becomes_home_once_it_is_known() {
    let (mut relays, now) = (relays(&[]), Instant::now());
    let near = BTreeMap::from([
        (ONE, Duration::from_millis(80)),
        (THREE, Duration::from_millis(20)),
    ]);
    assert!(!relays.choose_home(now, &BTreeMap::new(), true));
    assert!(relays.is_undecided());
    assert_eq!(
        ids(&publish(&mut relays, now, &[])),
        [ONE, TWO, THREE],
        "it may be anywhere"
    );
    assert!(relays.choose_home(now, &near, false));
    assert_eq!(relays.home(), Some(THREE));
    assert!(
        !relays.choose_home(now, &BTreeMap::new(), false),
        "silence moves nobody"
    );
}

#[test]
fn a_lost_region_moves_its_node_and_its_senders_to_the_same_next_one() {
    let now = Instant::now();
    let mut node = relays(&[]);
    node.choose_home(now, &BTreeMap::from([(TWO, Duration::ZERO)]), false);
    let mut sender = relays(&[(PEER, TWO)]);
    sender.choose_home(now, &BTreeMap::from([(ONE, Duration::ZERO)]), false);
    for relays in [&mut node, &mut sender] {
        publish(relays, now, &[PEER]);
        relays.handle(now, TWO, &RelayEvent::Up);
        relays.handle(now, TWO, &down("killed"));
        assert_eq!(relays.deadline(now), Some(now + GRACE), "it may come back");
        let later = now + GRACE;
        relays.choose_home(later, &BTreeMap::new(), false);
        publish(relays, later, &[PEER]);
    }
    assert_eq!(
        node.home(),
        Some(TWO),
        "it may be our own way out that is gone"
    );
    assert_eq!(ids(&node.table), [TWO, THREE]);
    node.handle(now + GRACE, THREE, &RelayEvent::Up);
    assert!(node.choose_home(now + GRACE, &BTreeMap::new(), false));
    assert_eq!(node.home(), Some(THREE));
    assert_eq!(sender.home(), Some(ONE));
    assert_eq!(sender.region_of(&PEER), Some(THREE));
    assert_eq!(
        ids(&sender.table),
        [ONE, TWO, THREE],
        "the lost one is tried on"
    );
    let later = now + GRACE * 2;
    sender.handle(later, TWO, &RelayEvent::Up);
    publish(&mut sender, later, &[PEER]);
    assert_eq!(sender.region_of(&PEER), Some(TWO), "it is back");
}

#[test]
fn a_short_loss_moves_nobody() {
    let (mut relays, now) = (relays(&[(PEER, TWO)]), Instant::now());
    publish(&mut relays, now, &[PEER]);
    relays.handle(now, TWO, &RelayEvent::Up);
    relays.handle(now, TWO, &down("restarting"));
    let soon = now + GRACE / 2;
    relays.handle(soon, TWO, &RelayEvent::Up);
    publish(&mut relays, now + GRACE * 2, &[PEER]);
    assert_eq!(relays.region_of(&PEER), Some(TWO));
}

#[test]
fn a_peer_that_its_home_does_not_have_is_looked_for_everywhere() {
    let (mut relays, mut now) = (relays(&[(PEER, TWO)]), Instant::now());
    publish(&mut relays, now, &[PEER]);
    for region in [ONE, TWO, THREE] {
        relays.handle(now, region, &RelayEvent::Up);
    }
    let mut places = Vec::new();
    for _ in 0..4 {
        let region = relays.region_of(&PEER).unwrap();
        places.push(region);
        relays.handle(now, region, &RelayEvent::PeerGone(PEER));
        relays.handle(now, region, &RelayEvent::PeerGone(PEER));
        publish(&mut relays, now, &[PEER]);
        now += SEARCH_PAUSE;
    }
    assert_eq!(places, [TWO, THREE, ONE, TWO]);
    let begun = now - 4 * SEARCH_PAUSE;
    while now < begun + SEARCH + SEARCH_PAUSE {
        let region = relays.region_of(&PEER).unwrap();
        assert!(relays.way_to(now, &PEER).is_some(), "{:?}", now - begun);
        relays.handle(now, region, &RelayEvent::PeerGone(PEER));
        publish(&mut relays, now, &[PEER]);
        now += SEARCH_PAUSE;
    }
    assert!(relays.way_to(now, &PEER).is_none(), "nobody has it");
    assert!(relays.way_to(now + ABSENT, &PEER).is_some());
    relays.handle(now, ONE, &RelayEvent::Data { from: PEER });
    assert!(relays.way_to(now, &PEER).is_some());
    let homes = [(PEER, Some(ONE))].into_iter();
    relays.set(&map(&[ONE, TWO, THREE]), homes);
    publish(&mut relays, now, &[PEER]);
    assert_eq!(
        relays.region_of(&PEER),
        Some(ONE),
        "news of its home end the search"
    );
}

#[test]
fn a_peer_that_its_home_does_not_have_is_answered_where_it_came_from() {
    let (mut relays, now) = (relays(&[(PEER, TWO)]), Instant::now());
    publish(&mut relays, now, &[PEER]);
    relays.handle(now, ONE, &RelayEvent::Data { from: PEER });
    publish(&mut relays, now, &[PEER]);
    assert_eq!(relays.region_of(&PEER), Some(TWO), "its home is its home");
    relays.handle(now, TWO, &RelayEvent::PeerGone(PEER));
    publish(&mut relays, now, &[PEER]);
    assert_eq!(relays.region_of(&PEER), Some(ONE));
    for (turn, (gone, next)) in [(ONE, TWO), (TWO, THREE)].into_iter().enumerate() {
        let later = now + SEARCH_PAUSE * (1 + turn as u32);
        relays.handle(later, gone, &RelayEvent::PeerGone(PEER));
        publish(&mut relays, later, &[PEER]);
        assert_eq!(
            relays.region_of(&PEER),
            Some(next),
            "not in {gone} any more"
        );
    }
}

#[test]
fn a_relay_that_never_comes_up_is_no_way() {
    let (mut relays, now) = (relays(&[(PEER, TWO)]), Instant::now());
    publish(&mut relays, now, &[PEER]);
    assert_eq!(relays.way_to(now, &PEER).map(|(_, up)| up), Some(false));
    assert!(relays.way_to(now + CONNECTING, &PEER).is_none());
    assert_eq!(relays.deadline(now), Some(now + CONNECTING));
    relays.handle(now + CONNECTING, TWO, &RelayEvent::Up);
    let way = relays.way_to(now + CONNECTING, &PEER);
    assert_eq!(way.map(|(_, up)| up), Some(true));
}

#[test]
fn news_of_data_are_asked_for_again_and_not_at_once() {
    let (mut relays, now) = (relays(&[(PEER, TWO)]), Instant::now());
    publish(&mut relays, now, &[]);
    relays.handle(now, ONE, &RelayEvent::Data { from: PEER });
    let again = |relays: &mut Relays, now| {
        relays
            .publish(now, [(&PEER, false, None)].into_iter())
            .is_some()
    };
    assert!(!again(&mut relays, now));
    assert_eq!(relays.deadline(now), Some(now + NEWS_PAUSE));
    assert!(again(&mut relays, now + NEWS_PAUSE));
    assert!(!again(&mut relays, now + NEWS_PAUSE));
}

proptest! {
    /// However peers come and go, each has its own address in 127.64.0.0/10, and keeps it.
    #[test]
    fn addresses_on_lo_are_apart_and_stay(
        rounds in prop::collection::vec(prop::collection::btree_set(0u8..40, 0..20), 1..10),
    ) {
        let mut relays = Relays::new(51821);
        let mut before = BTreeMap::new();
        for round in rounds {
            // Keys that begin alike, so that they want the same address.
            let key = |n: &u8| NodeKey(std::array::from_fn(|i| if i == 31 { *n } else { 7 }));
            let homes = round.iter().map(|n| (key(n), Some(ONE)));
            relays.set(&map(&[ONE]), homes);
            let now: BTreeMap<NodeKey, SocketAddr> =
                relays.places.iter().map(|(key, place)| (*key, place.loopback)).collect();
            let apart: BTreeSet<SocketAddr> = now.values().copied().collect();
            prop_assert_eq!(apart.len(), round.len());
            for (key, loopback) in &now {
                let IpAddr::V4(addr) = loopback.ip() else { panic!("v4") };
                prop_assert_eq!(addr.to_bits() >> 22, LOOPBACK >> 22);
                prop_assert!(before.get(key).is_none_or(|before| before == loopback));
            }
            before = now;
        }
    }
}
