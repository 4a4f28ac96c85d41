//! What an agent has on disk: enough to serve without anybody's help, whatever happens to it.

use std::path::PathBuf;

use tests::lab::Lab;
use tests::mesh::{Mesh, Node, SPREAD_BOUND};
use tests::probe::Talk;
use tests::topology::Topology;
use tests::wait_until;

use crate::{POLICY, TRIO, assert_answers, expect};

/// As after a power cut: no agent, no device, no pins; only the disk is left.
pub fn power_cut(node: &Node) -> anyhow::Result<()> {
    node.kill();
    node.host.run("ip link del weir0")?;
    let bpf = node.host.folder.join("bpf");
    rustix::mount::unmount(&bpf, rustix::mount::UnmountFlags::DETACH)?;
    rustix::mount::mount("bpf", &bpf, "bpf", rustix::mount::MountFlags::empty(), None)?;
    Ok(())
}

fn cache(node: &Node) -> PathBuf {
    node.host.folder.join("state/agent/netmap")
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn rebooted_nodes_serve_from_their_cache_with_the_coordinator_gone() -> anyhow::Result<()> {
    let lab = Lab::new("reboot", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let answers = expect(
        &mesh,
        "a",
        "b",
        &[
            (Talk::Tcp(80), true),
            (Talk::Ping, true),
            (Talk::Tcp(22), false),
        ],
    )?;
    mesh.coordinator.kill();
    for name in ["a", "b"] {
        let node = mesh.node(name);
        power_cut(&node)?;
        node.restart()?;
    }
    for name in ["a", "b"] {
        let status = mesh
            .node(name)
            .until("it is up", |status| status["phase"] == "up")?;
        assert_eq!(status["coordinator"]["connected"], false, "{status:#}");
        assert_eq!(status["acl"]["attached"], true, "{status:#}");
    }
    assert_answers(&answers);
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_corrupt_cache_is_told_and_the_last_good_one_serves() -> anyhow::Result<()> {
    let lab = Lab::new("corrupt_cache", &Topology::star(&["a", "b", "c"]))?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let answers = expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(80), true), (Talk::Tcp(22), false)],
    )?;
    let b = mesh.node("b");
    mesh.coordinator.kill();
    power_cut(&b)?;
    let mut bytes = std::fs::read(cache(&b))?;
    let middle = bytes.len() / 2;
    bytes[middle..].fill(b'\0');
    std::fs::write(cache(&b), bytes)?;
    b.restart()?;
    let status = b.until("it is up", |status| status["phase"] == "up")?;
    let problems = status["problems"].to_string();
    assert!(problems.contains("netmap_damaged"), "{status:#}");
    assert_answers(&answers);

    // With the coordinator back the cache is written anew, and the complaint goes.
    mesh.coordinator.restart()?;
    b.until("all is well", |status| {
        status["problems"] == serde_json::json!([])
    })?;
    lab.passed();
    Ok(())
}

/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn a_full_disk_is_told_and_policy_still_changes() -> anyhow::Result<()> {
    let lab = Lab::new("full_disk", &Topology::star(&["a", "b", "c"]))?;
    let disk = lab.host("b").folder.join("state/agent");
    std::fs::create_dir_all(&disk)?;
    let small = Some(c"size=256k,mode=0700");
    rustix::mount::mount(
        "tmpfs",
        &disk,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        small,
    )?;
    let mesh = Mesh::start(&lab, POLICY, TRIO)?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    let b = mesh.node("b");
    let good = std::fs::read(cache(&b))?;
    fill(&disk.join("ballast"))?;

    mesh.coordinator
        .set_policy(&POLICY.replace("80,81", "80,81,82"))?;
    let status = b.until("the full disk is told", |status| {
        status["problems"]
            .as_array()
            .is_some_and(|problems| !problems.is_empty())
    })?;
    let problem = &status["problems"][0];
    assert!(
        problem["next"]
            .as_str()
            .is_some_and(|next| !next.is_empty()),
        "{status:#}"
    );
    assert_eq!(
        std::fs::read(cache(&b))?,
        good,
        "the last good map is still on the disk"
    );
    assert_answers(&expect(
        &mesh,
        "a",
        "b",
        &[(Talk::Tcp(82), true), (Talk::Tcp(22), false)],
    )?);

    // It starts from that one; and when there is room again, all is well.
    b.kill();
    b.restart()?;
    b.until("it is up", |status| status["phase"] == "up")?;
    std::fs::remove_file(disk.join("ballast"))?;
    mesh.coordinator.set_policy(POLICY)?;
    b.until("all is well", |status| {
        status["problems"] == serde_json::json!([])
    })?;
    wait_until("the new map is on the disk", SPREAD_BOUND, || {
        std::fs::read(cache(&b)).is_ok_and(|bytes| bytes != good)
    })?;
    drop(mesh);
    lab.passed();
    // The lab has ended all that ran there.
    rustix::mount::unmount(&disk, rustix::mount::UnmountFlags::DETACH).ok();
    Ok(())
}

/// Writes until there is no room.
pub fn fill(path: &std::path::Path) -> anyhow::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(path)?;
    while file.write_all(&[0; 4096]).is_ok() {}
    while file.write_all(&[0; 1]).is_ok() {}
    Ok(())
}

/// The kernel decrypts the packets of a few peers on all processors (`threaded`), from the first
/// peer on; an agent that finds it otherwise puts it right when peers change.
///
/// ```text
///  hub   a   b   c
///   │    │   │   │
///  ─┴────┴───┴───┴── internet
/// ```
#[test]
fn packets_of_a_few_peers_are_spread_over_the_processors() -> anyhow::Result<()> {
    let lab = Lab::new("threaded", &Topology::star(&["a", "b", "c"]))?;
    let mut mesh = Mesh::start(&lab, POLICY, &TRIO[..1])?;
    let a = mesh.node("a");
    a.until("a is up", |status| status["phase"] == "up")?;
    let file = "/sys/class/net/weir0/threaded";
    let threaded = || -> anyhow::Result<String> {
        let mut cat = a.host.whole(&format!("cat {file}"))?;
        Ok(tests::process::run(&mut cat, "", SPREAD_BOUND)?.stdout)
    };
    let is = |wanted: &str| threaded().is_ok_and(|now| now.trim() == wanted);
    assert!(is("0"), "nobody sends yet");
    mesh.join(&lab, &TRIO[1..2])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    wait_until("b's packets are spread", SPREAD_BOUND, || is("1"))?;

    a.kill();
    let mut off = a.host.whole(&format!("dd of={file}"))?;
    tests::process::run(&mut off, "0", SPREAD_BOUND)?;
    assert!(is("0"), "switched off by hand");
    a.restart()?;
    mesh.join(&lab, &TRIO[2..])?;
    mesh.settled(&[("a", 2), ("b", 2), ("c", 2)])?;
    wait_until("packets are spread again", SPREAD_BOUND, || is("1"))?;
    lab.passed();
    Ok(())
}
