//! What the kernel did by itself: sessions that it has, and endpoints that it roamed to.

use super::*;

#[test]
fn roaming_is_followed_and_a_choice_that_the_peer_overrules_is_not_repeated() {
    let mut rig = Rig::new(&[WAN, SIX], true).works(WAN, 30).works(SIX, 30);
    rig.sending = true;
    rig.pass(seconds(5));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    for _ in 0..20 {
        // The peer sends from its IPv4 address.
        rig.stats.endpoint = Some(at(WAN));
        rig.stats.rx_bytes += 100;
        rig.look();
        rig.pass(seconds(10));
    }
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
    assert_eq!(rig.ways.len(), 3, "{:?}", rig.ways);
}

#[test]
fn the_kernel_is_not_left_at_the_relay_by_a_late_packet() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(5));
    rig.stats.endpoint = Some(at(LOOPBACK));
    rig.stats.rx_bytes += 100;
    rig.look();
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
}

#[test]
fn a_session_found_at_start_keeps_its_endpoint_and_is_asked() {
    let mut rig = Rig::new(&[WAN], true).works(SIX, 30);
    rig.stats = Stats {
        endpoint: Some(at(SIX)),
        last_handshake: Some(seconds(1)),
        tx_bytes: 5,
        rx_bytes: 5,
    };
    rig.look();
    rig.observe_at = rig.now + OBSERVED;
    rig.pass(seconds(30));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    rig.shut(SIX);
    rig.sending = true;
    rig.pass(seconds(8));
    assert_eq!(rig.path.way(), Way::Relay);
}

#[test]
fn the_first_look_at_a_peer_that_was_just_made_sees_that_it_is_in_use() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    // As the plan leaves it that makes the peer.
    rig.look();
    rig.path.seek(rig.now, true);
    rig.sending = true;
    rig.pass(OBSERVED + Duration::from_millis(100));
    assert!(rig.path.is_active(rig.now));
    assert!(rig.path.heart.next.is_some(), "and is asked");
}
