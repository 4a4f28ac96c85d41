//! Cables and addresses of either end: what was held against a way counts no longer.

use super::*;

#[test]
fn whose_links_changed_says_where_it_is_in_one_packet_as_soon_as_there_is_a_way() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 20);
    rig.sending = true;
    rig.pass(seconds(10));
    while rig.path.take_greeting() {}
    rig.shut(WAN);
    rig.pass(Duration::from_millis(300));
    rig.path.shaken(rig.now);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(300));
    assert!(!rig.path.take_greeting(), "no way was found yet");
    rig.open(WAN, 20);
    rig.pass(seconds(1));
    assert!(rig.path.take_greeting());
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "once");
}

/// Direct for longer than a hold, then given up for its silence.
fn given_up() -> Rig {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 20);
    rig.sending = true;
    rig.pass(HOLD + seconds(5));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    rig.shut(WAN);
    rig.pass(seconds(6));
    assert_eq!(rig.path.way(), Way::Relay);
    rig.open(WAN, 20);
    rig
}

#[test]
fn who_fell_silent_and_asks_us_is_asked_at_once() {
    let mut rig = given_up();
    rig.pass(Duration::from_millis(500));
    assert_eq!(rig.path.way(), Way::Relay, "it is given time");
    rig.path.pinged_by(rig.now, tier(at(WAN)), at(WAN));
    rig.pass(Duration::from_millis(50));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn new_links_end_every_pause() {
    let mut rig = given_up();
    rig.path.shaken(rig.now);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(50));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    // Given up again, a moment after it was taken.
    rig.shut(WAN);
    rig.pass(seconds(6));
    assert_eq!(rig.path.way(), Way::Relay);
    rig.open(WAN, 20);
    assert!(rig.path.held_until().is_some_and(|until| until > rig.now));
    rig.path.shaken(rig.now);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(50));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
}

#[test]
fn who_is_suddenly_seen_elsewhere_says_so_in_a_packet() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    rig.sending = true;
    rig.pass(seconds(10));
    while rig.path.take_greeting() {}
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "nothing changed");
    rig.appears = at("198.51.100.1:20001");
    rig.pass(seconds(3));
    assert!(rig.path.take_greeting());
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "once");
}

#[test]
fn who_is_seen_elsewhere_before_the_session_is_known_says_so_when_it_is() {
    let mut rig = Rig::new(&[WAN], false).works(WAN, 20);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(50));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    while rig.path.take_greeting() {}
    rig.appears = at("198.51.100.1:20001");
    rig.path.heart.check(rig.now);
    rig.pass(Duration::from_millis(50));
    assert!(!rig.path.is_live() && !rig.path.take_greeting());
    rig.sending = true;
    rig.pass(seconds(5));
    assert!(rig.path.is_live() && rig.path.take_greeting());
    rig.pass(seconds(10));
    assert!(!rig.path.take_greeting(), "once");
}
