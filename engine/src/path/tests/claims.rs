//! Peers that say what they took, whether they answer or not.

use super::*;

#[test]
fn a_peer_that_only_listens_and_says_what_it_takes_keeps_its_direct_path() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    (rig.sending, rig.tells) = (true, true);
    rig.pass(seconds(20));
    rig.listens = true;
    let before = rig.ways.len();
    rig.pass(seconds(600));
    assert_eq!(rig.ways.len(), before, "{:?}", rig.ways);
}

#[test]
fn a_path_that_swallows_packets_is_given_up_whoever_was_heard() {
    for by_relay in [false, true] {
        let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
        (rig.sending, rig.tells) = (true, true);
        rig.pass(seconds(20));
        rig.carries.remove(&at(WAN));
        // Found by an agent that just started; or the peer comes by relay all the while.
        let (since, fresh) = (rig.now, Rig::new(&[WAN], true));
        if !by_relay {
            rig.path = fresh.path;
            rig.look();
            assert_eq!(rig.path.way(), Way::Direct(at(WAN)), "adopted");
        }
        while rig.path.way() != Way::Relay {
            rig.pass(Duration::from_millis(100));
            assert!(rig.now - since <= seconds(6), "by relay: {by_relay}");
            if by_relay {
                rig.stats.rx_bytes += 1_000;
                rig.path.relayed(rig.now);
            }
        }
        assert!(!rig.path.pinged_by(rig.now, Tier::OnLink, at(LAN)), "mute");
    }
}

/// A relay at which only the peer is at home is not connected to while nobody needs it.
#[test]
fn a_relay_is_asked_for_as_soon_as_a_path_is_doubted() {
    for listens in [false, true] {
        let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
        (rig.sending, rig.tells) = (true, true);
        rig.pass(seconds(20));
        let relay = |rig: &mut Rig, up| rig.path.set_relay(rig.now, Some((at(LOOPBACK), up)));
        relay(&mut rig, false);
        rig.listens = listens;
        rig.pass(seconds(60));
        assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
        assert!(listens || !rig.path.needs_relay());
        rig.carries.remove(&at(WAN));
        let since = rig.now;
        while !rig.path.needs_relay() {
            rig.pass(Duration::from_millis(100));
            assert!(rig.now - since <= seconds(5), "only listens: {listens}");
        }
        rig.pass(Duration::from_millis(300));
        relay(&mut rig, true);
        while rig.path.way() != Way::Relay {
            rig.pass(Duration::from_millis(100));
            assert!(rig.now - since <= seconds(6), "only listens: {listens}");
        }
        assert!(rig.path.needs_relay());
    }
}
