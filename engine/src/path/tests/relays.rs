//! Relays that are not there, are lost, and come back.

use super::*;

#[test]
fn without_a_relay_the_best_candidate_is_tried_while_probes_look() {
    let mut rig = Rig::new(&[WAN, SIX], false).works(SIX, 30);
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
    assert!(!rig.path.wants_keepalive() || rig.path.is_live());
    rig.path.seek(rig.now, true);
    assert!(
        rig.path.is_mute(),
        "no greeting to an endpoint that may be the wrong one"
    );
    rig.path.owe_greeting();
    rig.pass(seconds(1));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    assert!(rig.path.take_greeting());
    assert!(!rig.path.take_greeting(), "once");
}

#[test]
fn without_a_relay_a_path_in_distress_is_looked_for_again() {
    let mut rig = Rig::new(&[WAN, SIX], false).works(WAN, 30);
    rig.path.seek(rig.now, true);
    rig.sending = true;
    rig.pass(seconds(10));
    rig.shut(WAN);
    rig.pass(seconds(5));
    rig.open(SIX, 30);
    rig.pass(seconds(15));
    assert_eq!(rig.path.way(), Way::Direct(at(SIX)));
    rig.shut(SIX);
    rig.pass(seconds(4));
    rig.open(WAN, 30);
    rig.pass(seconds(15));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn a_relay_that_is_lost_leaves_the_kernel_its_candidates() {
    let mut rig = Rig::new(&[WAN], true);
    rig.pass(seconds(1));
    rig.path.set_relay(rig.now, None);
    assert_eq!(
        (rig.path.way(), rig.path.wanted()),
        (Way::Blind, Some(at(WAN)))
    );
    rig.path.set_relay(rig.now, Some((at(LOOPBACK), true)));
    assert_eq!(rig.path.wanted(), Some(at(LOOPBACK)));
}

#[test]
fn a_relay_that_comes_back_is_taken_by_whoever_has_no_way() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.path.set_relay(rig.now, None);
    rig.shut(WAN);
    rig.pass(seconds(4));
    assert_eq!(rig.path.way(), Way::Blind);
    rig.path.set_relay(rig.now, Some((at(LOOPBACK), true)));
    assert_eq!(rig.path.wanted(), Some(at(LOOPBACK)));
}

#[test]
fn a_peer_that_no_relay_has_is_tried_where_it_was_last() {
    let mut rig = Rig::new(&[LAN, WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(30));
    rig.answers.clear();
    rig.carries.clear();
    rig.pass(seconds(10));
    assert_eq!(rig.path.way(), Way::Relay);
    rig.path.set_relay(rig.now, None);
    assert_eq!(rig.path.wanted(), Some(at(WAN)));
}
