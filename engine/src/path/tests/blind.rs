//! A peer that does not probe: the kernel's word is all there is.

use super::*;

fn stats(endpoint: &str, tx_bytes: u64, rx_bytes: u64) -> Stats {
    Stats {
        endpoint: Some(at(endpoint)),
        last_handshake: (rx_bytes > 0).then_some(seconds(rx_bytes)),
        tx_bytes,
        rx_bytes,
    }
}

fn trying() -> (Path, Instant) {
    let mut path = Path::new(false, false, &named(&[WAN, SIX]), None);
    let start = Instant::now();
    assert_eq!(path.wanted(), Some(at(WAN)));
    path.observe(start, &stats(WAN, 0, 0), Some(Tier::Public));
    assert_eq!(
        path.wanted(),
        None,
        "once the kernel has it, nothing is left to say"
    );
    (path, start)
}

#[test]
fn unanswered_handshakes_rotate_through_the_candidates() {
    let (mut path, start) = trying();
    let mut see = |second, stats: &Stats| {
        path.observe(start + seconds(second), stats, Some(Tier::Public));
        path.wanted()
    };
    assert_eq!(see(1, &stats(WAN, 148, 0)), None);
    assert_eq!(
        see(5, &stats(WAN, 148, 0)),
        None,
        "not before its patience ends"
    );
    assert_eq!(see(6, &stats(WAN, 296, 0)), Some(at(SIX)));
    assert_eq!(see(7, &stats(SIX, 444, 0)), None);
    assert_eq!(
        see(12, &stats(SIX, 592, 0)),
        Some(at(WAN)),
        "round and round"
    );
}

#[test]
fn roaming_is_followed_and_a_dead_session_is_given_longer() {
    let (mut path, start) = trying();
    let third = "203.0.113.3:1";
    let see = |path: &mut Path, second, stats: &Stats| {
        path.observe(start + seconds(second), stats, Some(Tier::Public));
        path.wanted()
    };
    see(&mut path, 1, &stats(third, 148, 92));
    assert!(path.is_live());
    path.set_candidates(&named(&[SIX, WAN]));
    assert_eq!(see(&mut path, 2, &stats(third, 9_000, 92)), None);
    assert_eq!(see(&mut path, 21, &stats(third, 9_148, 92)), None);
    assert_eq!(see(&mut path, 22, &stats(third, 9_296, 92)), Some(at(SIX)));
}

#[test]
fn an_idle_peer_and_keepalives_alone_are_left_alone_for_ever() {
    let (mut path, start) = trying();
    for hour in 1..100 {
        path.observe(
            start + seconds(3600 * hour),
            &stats(WAN, 0, 0),
            Some(Tier::Public),
        );
        assert_eq!(path.wanted(), None);
    }
    path.observe(
        start + seconds(400_000),
        &stats(WAN, 148, 92),
        Some(Tier::Public),
    );
    for n in 1..20 {
        let now = start + seconds(400_000 + 25 * n);
        path.observe(now, &stats(WAN, 148 + 32 * n, 92), Some(Tier::Public));
        assert_eq!((path.is_live(), path.wanted()), (true, None));
    }
}
