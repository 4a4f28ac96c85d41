//! Heartbeats by themselves: of a peer that has nothing to say, packets prove nothing.

use super::*;
use crate::path::probe::{DISTRESS, HEARTBEAT, MOST_PATIENCE};

#[test]
fn heartbeats_that_fall_silent_end_a_path_that_nothing_else_speaks_against() {
    let mut rig = Rig::new(&[WAN], true).works(WAN, 30);
    rig.sending = true;
    rig.pass(seconds(20));
    // Neither by relay nor directly: so it is the peer that is silent, and the path is forgiven.
    rig.carries.clear();
    rig.pass(seconds(40));
    assert_eq!(rig.path.way(), Way::Direct(at(WAN)));
    let cut = rig.now - rig.start;
    rig.shut(WAN);
    rig.pass(seconds(10));
    assert_eq!(rig.path.way(), Way::Relay);
    let taken = rig.changed() - cut;
    let bound = HEARTBEAT + MOST_PATIENCE * (DISTRESS + WITNESS);
    assert!(taken <= bound, "{taken:?}");
}
