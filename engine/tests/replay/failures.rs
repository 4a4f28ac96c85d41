//! What the engine does while a step of its plans fails.

use super::driver::{Driver, HOME, full, links, netmap, prefix};
use super::open_netmap;
use engine::plan::{Acl, Device, Family, Forwarding, Observed, Present, Step};
use engine::status::FailureKind;
use engine::{Input, LONGEST_PAUSE, TICK};
use proto::netmap::{Netmap, Update};
use std::time::Duration;

#[test]
fn a_failure_is_told_and_tried_again_ever_more_rarely() {
    let mut driver = Driver::new();
    driver.failing = |_| Some(FailureKind::Programs);
    driver.input(full(1, &[2]));
    let status = driver.engine.status();
    assert_eq!(status.problems[0].code(), "acl_not_attached");
    driver.pass(Duration::from_secs(300));
    let tries = driver.plans.len();
    let most = 300 / LONGEST_PAUSE.as_secs() as usize + 6;
    assert!((8..=most).contains(&tries), "{tries}");
    driver.failing = |_| None;
    driver.pass(LONGEST_PAUSE * 2);
    assert!(driver.kernel.present().unwrap().up);
    assert!(driver.engine.status().problems.is_empty());
}

/// A network in which this node serves two subnets, one of each family.
fn routed(generation: u64, peers: &[u8]) -> Netmap {
    let mut map = netmap(generation, peers);
    map.me.routes = [prefix("10.1.0.0/24"), prefix("fd01::/64")].into();
    map
}

/// A driver of such a node, whose kernel has no IPv6 forwarding of one interface.
fn router() -> Driver {
    let mut driver = Driver::new();
    driver.failing = |step| match step {
        Step::Forward(Forwarding { family, .. }) if *family == Family::V6 => {
            Some(FailureKind::ForwardingV6)
        }
        _ => None,
    };
    let lan = [("10.1.0.0/24", "eth1"), ("fd01::/64", "eth1")];
    driver.input(Input::Links(links(&[HOME, &lan].concat())));
    driver.input(Input::Netmap(Update::Full(Box::new(routed(1, &[2])))));
    driver
}

#[test]
fn a_step_that_fails_for_ever_holds_nothing_else_up() {
    let mut driver = router();
    let forwards = |driver: &Driver, version| {
        let all = driver.kernel.forwarding.iter();
        all.filter(|it| it.family == version).count()
    };
    assert_eq!(forwards(&driver, Family::V4), 2);
    assert_eq!(forwards(&driver, Family::V6), 0);
    let status = driver.engine.status();
    let codes: Vec<_> = status.problems.iter().map(|it| it.code()).collect();
    assert_eq!(codes, ["forwarding_v6", "forwarding_v6"], "of both sides");
    assert!(status.observed.and_then(Observed::present).unwrap().up);
    assert!(!status.converged);

    driver.pass(LONGEST_PAUSE * 4);
    let tries = driver.plans.iter().flatten();
    let tries = tries
        .filter(|step| matches!(step, Step::Forward(_)))
        .count();
    assert!((2..40).contains(&tries), "{tries}");
    let looks = driver.observed;
    driver.pass(TICK * 10);
    assert!(driver.observed >= looks + 9, "the kernel is read as ever");

    // Deep in a pause: a peer that goes is gone at once, one that comes is there, policy too.
    let Acl::Attached(Some(before)) = driver.kernel.acl else {
        panic!("no policy");
    };
    let mut map = routed(2, &[3, 4]);
    map.filter = open_netmap(2, &[3]).filter;
    let (at, plans) = (driver.now, driver.plans.len());
    driver.input(Input::Netmap(Update::Full(Box::new(map))));
    assert_eq!(driver.now, at);
    let peers = &driver.kernel.present().unwrap().peers;
    let ids: Vec<u8> = peers.keys().map(|key| key.0[0]).collect();
    assert_eq!(ids, [3, 4]);
    assert!(matches!(driver.kernel.acl, Acl::Attached(Some(now)) if now > before));
    let after = driver.plans.len() - plans;
    assert!(after <= 3, "and what fails is tried once more: {after}");

    driver.failing = |_| None;
    driver.pass(LONGEST_PAUSE * 2);
    assert_eq!(forwards(&driver, Family::V6), 2);
    let status = driver.engine.status();
    assert!(status.converged && status.problems.is_empty());
}

#[test]
fn a_problem_goes_when_its_step_is_not_wanted_any_more() {
    let mut driver = router();
    assert!(!driver.engine.status().problems.is_empty());
    driver.input(full(2, &[2]));
    let status = driver.engine.status();
    assert!(status.converged && status.problems.is_empty());
}

#[test]
fn what_a_failed_step_is_the_foundation_of_waits_for_it() {
    let mut driver = Driver::new();
    driver.failing = |step| (*step == Step::AttachAcl).then_some(FailureKind::Programs);
    driver.input(full(1, &[2]));
    for peers in [&[2, 3][..], &[3], &[2, 3, 4]] {
        driver.pass(Duration::from_secs(20));
        driver.input(full(u64::from(peers[0]) + 10, peers));
        let device = driver.kernel.present().unwrap();
        assert!(!device.up && device.peers.is_empty() && device.key.is_none());
        assert!(device.addrs.is_empty() && device.routes.is_empty());
    }
    driver.failing = |_| None;
    driver.pass(LONGEST_PAUSE * 2);
    assert!(driver.kernel.present().unwrap().up);
    assert!(driver.engine.status().converged);
}

#[test]
fn who_was_to_be_greeted_after_a_step_that_failed_is_greeted_yet() {
    let driver = router();
    let is_greeting = |step: &Step| matches!(step, Step::Greet(_));
    let plans = driver.plans.iter();
    let with: Vec<_> = plans.filter(|plan| plan.iter().any(is_greeting)).collect();
    // One plan ended before the first switch, one before the second.
    assert_eq!(with.len(), 3);
    assert!(matches!(with[2][..], [Step::Greet(_)]));
}

/// What somebody does to the device.
fn meddle(driver: &mut Driver, how: impl FnOnce(&mut Present)) {
    let Device::Present(device) = &mut driver.kernel.device else {
        panic!("there is no device");
    };
    how(device);
    driver.pass(TICK * 2);
}

fn codes(driver: &Driver) -> Vec<&'static str> {
    let status = driver.engine.status();
    status.problems.iter().map(|it| it.code()).collect()
}

/// Our route is gone and another is in its place: no reason to let anybody in who may not.
#[test]
fn an_overlap_holds_up_no_withdrawal_where_the_device_is_up() {
    let network = prefix("100.64.0.0/10");
    let beside = prefix("100.64.0.2/32");
    let mut driver = Driver::new();
    driver.input(full(1, &[2, 3]));
    let foreign = [("100.64.0.0/16", "eth1")];
    driver.input(Input::Links(links(&[HOME, &foreign].concat())));
    meddle(&mut driver, |device| {
        let mtu = device.routes.remove(&network).unwrap();
        device.routes.insert(beside, mtu);
    });
    assert_eq!(codes(&driver), ["network_overlap"]);
    driver.input(full(2, &[3]));
    let device = driver.kernel.present().unwrap();
    assert!(device.up && device.peers.len() == 1);
    assert!(!device.routes.contains_key(&network));
    assert!(device.routes.contains_key(&beside), "what works is not cut");
    driver.input(Input::Links(links(HOME)));
    let routes = &driver.kernel.present().unwrap().routes;
    assert!(routes.contains_key(&network) && !routes.contains_key(&beside));
    assert!(codes(&driver).is_empty());

    // One that is down stays down.
    driver.input(Input::Links(links(&[HOME, &foreign].concat())));
    meddle(&mut driver, |device| {
        (device.up, device.routes) = (false, Default::default());
    });
    assert!(!driver.kernel.present().unwrap().up);
    assert_eq!(codes(&driver), ["network_overlap"]);
}

#[test]
fn a_device_without_ipv6_is_all_that_is_wrong() {
    let mut driver = Driver::new();
    driver.input(full(1, &[2]));
    meddle(&mut driver, |device| {
        device.without_v6 = true;
        device.addrs.retain(|(addr, _)| addr.is_ipv4());
        device.routes.retain(|route, _| route.is_v4());
    });
    assert_eq!(codes(&driver), ["ipv6_off"]);
    assert!(driver.engine.status().converged);
    meddle(&mut driver, |device| device.without_v6 = false);
    assert!(codes(&driver).is_empty());
    let device = driver.kernel.present().unwrap();
    assert_eq!((device.addrs.len(), device.routes.len()), (2, 2));
}
