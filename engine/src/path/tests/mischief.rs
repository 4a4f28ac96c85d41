//! Whatever an adversary on the way, or chance, may do to one path.

use super::*;
use proptest::prelude::*;

/// What an adversary on the way, or chance, may do.
#[derive(Clone, Debug)]
enum Mischief {
    /// A ping of the peer, replayed from anywhere.
    Ping(usize),
    /// A call, replayed.
    Call(usize),
    Relayed,
    /// An endpoint begins or ceases to answer, or to carry.
    Answer(usize, bool),
    Carry(usize, bool),
    /// A packet of the peer by the other way.
    Roam(usize),
    Traffic(bool),
    News,
}

fn mischief() -> impl Strategy<Value = Mischief> {
    let which = 0usize..4;
    prop_oneof![
        which.clone().prop_map(Mischief::Ping),
        which.clone().prop_map(Mischief::Call),
        Just(Mischief::Relayed),
        (which.clone(), any::<bool>()).prop_map(|(it, on)| Mischief::Answer(it, on)),
        (which.clone(), any::<bool>()).prop_map(|(it, on)| Mischief::Carry(it, on)),
        which.prop_map(Mischief::Roam),
        any::<bool>().prop_map(Mischief::Traffic),
        Just(Mischief::News),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is replayed and whatever breaks: what is wanted is the relay or a candidate, a way
    /// back to a direct path is not taken twice in ten seconds, and no storm of probes goes out.
    #[test]
    fn nothing_makes_it_flap_or_storm(
        steps in prop::collection::vec((0u64..3_000, mischief()), 1..80),
    ) {
        let pool = [LAN, WAN, SIX, "203.0.113.77:7"];
        let mut rig = Rig::new(&[LAN, WAN], true);
        for (millis, step) in steps {
            rig.pass(Duration::from_millis(millis));
            let now = rig.now;
            match step {
                Mischief::Ping(which) => {
                    let from = at(pool[which]);
                    rig.path.pinged_by(now, tier(from), from);
                }
                Mischief::Call(which) => rig.path.called(now, &named(&[pool[which]])),
                Mischief::Relayed => rig.path.relayed(now),
                Mischief::Answer(which, true) => {
                    rig.answers.insert(at(pool[which]), Duration::from_millis(20));
                }
                Mischief::Answer(which, false) => {
                    rig.answers.remove(&at(pool[which]));
                }
                Mischief::Carry(which, true) => {
                    rig.carries.insert(at(pool[which]));
                }
                Mischief::Carry(which, false) => {
                    rig.carries.remove(&at(pool[which]));
                }
                // The kernel moves for authenticated packets alone, which only the peer can send.
                Mischief::Roam(which) if matches!(rig.path.way(), Way::Direct(_)) => {
                    rig.stats.endpoint = Some(at(pool[which]));
                    rig.stats.rx_bytes += 100;
                    rig.look();
                }
                Mischief::Roam(_) => {}
                Mischief::Traffic(on) => rig.sending = on,
                Mischief::News => rig.path.seek(now, true),
            }
            rig.settle();
            if let Some(wanted) = rig.path.wanted() {
                let known = rig.path.candidates().contains_key(&wanted);
                prop_assert!(known || wanted == at(LOOPBACK));
            }
        }
        rig.pass(seconds(5));
        let turns = rig.ways.windows(2);
        let returns = turns.filter(|pair| pair[0].1 == Way::Relay).map(|pair| pair[1].0);
        let returns: Vec<Instant> = returns.collect();
        for pair in returns.windows(2) {
            prop_assert!(pair[1] - pair[0] >= HOLD, "{:?}", rig.ways);
        }
        for (from, _) in &rig.sent {
            let within = rig.sent.iter().filter(|(at, _)| *at >= *from && *at - *from < seconds(1));
            prop_assert!(within.count() <= 60);
        }
    }
}

/// Both routers map each packet anew and let in whom they sent to: each ping of one side would call
/// for one of the other, to an endpoint that nobody ever heard of.
#[test]
fn a_peer_that_comes_from_ever_new_ports_makes_no_storm() {
    let mut rig = Rig::new(&[WAN], true);
    rig.pass(seconds(20));
    let before = rig.sent.len();
    for port in 20_000..22_000 {
        rig.pass(Duration::from_millis(1));
        let from = SocketAddr::new(at(WAN).ip(), port);
        assert!(rig.path.pinged_by(rig.now, Tier::Public, from), "answered");
    }
    let pings = rig.sent[before..].iter();
    let pings = pings.filter(|(_, errand)| matches!(errand, Errand::Ping(_)));
    // In two seconds: each newcomer at once, and the best of them in the rounds of a burst.
    let most = 3 * disco::NEWCOMERS as usize + 12 * probe::BURST_CANDIDATES;
    assert!(
        (16..=most).contains(&pings.clone().count()),
        "{}",
        pings.count()
    );
}
