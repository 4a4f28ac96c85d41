//! Calls by relay, of either side.

use super::*;

#[test]
fn a_call_is_followed_by_pings_and_not_more_often_than_it_may() {
    let mut rig = Rig::new(&[], true);
    for _ in 0..100 {
        rig.path.called(rig.now, &named(&[WAN]));
        rig.pass(Duration::from_millis(100));
    }
    let pings = rig.pings_since(rig.start);
    assert!((6..=60).contains(&pings), "{pings} in ten seconds");
    let calls = rig.calls();
    assert!((1..=6).contains(&calls), "{calls} calls in ten seconds");
}

#[test]
fn a_call_that_comes_late_in_a_burst_is_followed_at_once() {
    let mut rig = Rig::new(&[WAN], true);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(1_700));
    let before = rig.now;
    rig.path.called(before, &named(&[WAN]));
    rig.pass(Duration::from_millis(10));
    assert_eq!(rig.pings_since(before), 1, "the next round was 1.5 s away");
}

#[test]
fn whoever_is_called_hears_of_new_endpoints_at_once() {
    let mut rig = Rig::new(&[WAN], true);
    rig.path.seek(rig.now, true);
    rig.pass(Duration::from_millis(500));
    assert_eq!(rig.calls(), 1);
    rig.path.recall(rig.now);
    rig.pass(Duration::from_millis(10));
    assert_eq!(rig.calls(), 2);
    rig.pass(seconds(2));
    assert_eq!(rig.calls(), 2);
}
