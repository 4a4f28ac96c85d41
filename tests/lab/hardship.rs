//! What is wrong with a machine for long: the node does all that can be done there, says what
//! cannot, and does that too as soon as it can. Full disks of running agents and damaged caches are
//! in `state.rs`, agents that die in `lifetime.rs`.
//!
//! ```text
//!  hub   a   b
//!   │    │   │
//!  ─┴────┴───┴── internet
//! ```

use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use serde_json::{Value, json};
use tests::lab::Lab;
use tests::mesh::{Mesh, Node, SPREAD_BOUND};
use tests::probe::{Expectation, Talk};
use tests::topology::Topology;
use tests::wait_until;

use crate::state::{fill, power_cut};
use crate::{POLICY, TRIO, assert_answers, expect};

/// a may ask b at port 80.
fn pair(lab: &Lab) -> anyhow::Result<(Mesh, Vec<Expectation>)> {
    let mesh = Mesh::start(lab, POLICY, &TRIO[..2])?;
    mesh.settled(&[("a", 1), ("b", 1)])?;
    let asked = expect(&mesh, "a", "b", &[(Talk::Tcp(80), true)])?;
    assert_answers(&asked);
    Ok((mesh, asked))
}

fn is_well(status: &Value) -> bool {
    status["phase"] == "up" && status["problems"] == json!([])
}

/// The codes of what is wrong.
fn codes(status: &Value) -> Vec<&str> {
    let problems = status["problems"].as_array().into_iter().flatten();
    problems.filter_map(|it| it["code"].as_str()).collect()
}

#[test]
fn a_node_without_ipv6_serves_ipv4_and_is_whole_again_with_it() -> anyhow::Result<()> {
    let lab = Lab::new("without_v6", &Topology::star(&["a", "b"]))?;
    let (mesh, asked) = pair(&lab)?;
    let b = mesh.node("b");
    let (four, six) = asked.split_at(1);
    let whole = |status: &Value| {
        let addrs = status["interface"]["addrs"].as_array();
        is_well(status) && addrs.is_some_and(|addrs| addrs.len() == 2)
    };

    // The kernel has no IPv6 on a device that takes less than 1,280 bytes.
    b.host.run("ip link set weir0 mtu 1200")?;
    let bare = || b.host.run("ip -6 addr show dev weir0");
    wait_until("its address is back", SPREAD_BOUND, || {
        bare().is_ok_and(|shown| shown.stdout.contains("inet6"))
    })?;
    b.until("all is well", whole)?;
    assert_answers(six);

    let switch = |off: u8| {
        let line = format!("sysctl -q -w net.ipv6.conf.all.disable_ipv6={off}");
        b.host.run(&line)
    };
    switch(1)?;
    let only = |status: &Value| status["phase"] == "up" && codes(status) == ["ipv6_off"];
    b.until("it says so, and nothing else", only)?;
    assert_answers(four);
    power_cut(&b)?;
    b.restart()?;
    b.until("it is up without", only)?;
    assert_answers(four);
    switch(0)?;
    b.until("all is well", whole)?;
    assert_answers(six);
    lab.passed();
    Ok(())
}

#[test]
fn a_machine_that_boots_with_a_full_or_locked_disk_is_up() -> anyhow::Result<()> {
    let lab = Lab::new("boots_full", &Topology::star(&["a", "b"]))?;
    let disk = lab.host("b").folder.join("state/agent");
    std::fs::create_dir_all(&disk)?;
    let small = Some(c"size=256k,mode=0700");
    mount("tmpfs", &disk, "tmpfs", MountFlags::empty(), small)?;
    let ended = hardly_any_disk(&lab, &disk);
    if ended.is_ok() {
        lab.passed();
    } else {
        drop(lab);
    }
    // The lab has ended all that ran there.
    unmount(&disk, UnmountFlags::DETACH).ok();
    ended
}

fn hardly_any_disk(lab: &Lab, disk: &Path) -> anyhow::Result<()> {
    let (mesh, asked) = pair(lab)?;
    let b = mesh.node("b");
    let notes = disk.join("switches");
    let boots = || -> anyhow::Result<Value> {
        // What the kernel switches off with the device, and weir is to put back.
        let redirects = "net.ipv4.conf.all.send_redirects=1";
        b.host.run(&format!("sysctl -q -w {redirects}"))?;
        b.restart()?;
        let status = b.until("it is up", |status| status["phase"] == "up")?;
        assert_answers(&asked[..1]);
        Ok(status)
    };

    power_cut(&b)?;
    // As far as a file system knows a file that was being written.
    std::fs::write(&notes, "")?;
    fill(&disk.join("ballast"))?;
    // Another netmap may come meanwhile, for which there is no room.
    let status = boots()?;
    let mut said = codes(&status);
    said.retain(|code| *code != "netmap_not_kept");
    assert_eq!(said, Vec::<&str>::new());
    b.weir("up")?;
    b.until("it says that settings are not kept", |status| {
        codes(status).contains(&"settings_not_kept")
    })?;
    std::fs::remove_file(disk.join("ballast"))?;
    b.until("it has written them", is_well)?;

    power_cut(&b)?;
    mount_remount(disk, MountFlags::RDONLY, "")?;
    boots()?;
    mount_remount(disk, MountFlags::empty(), "")?;
    Ok(())
}

/// Somebody removes pins: what is withdrawn afterwards is withdrawn, and the guard stands again.
#[test]
fn removed_pins_come_back_and_a_revocation_counts() -> anyhow::Result<()> {
    let lab = Lab::new("pins", &Topology::star(&["a", "b"]))?;
    let (mesh, asked) = pair(&lab)?;
    let b = mesh.node("b");
    remove(&b, |name| name.starts_with("layout-"), "weir/weir0")?;
    mesh.coordinator
        .set_policy(&POLICY.replace("tag:server:80,81", "tag:server:81"))?;
    let refused: Vec<_> = asked.iter().map(|(it, _)| (it.clone(), false)).collect();
    let deny = || tests::probe::disagreements(&refused).is_ok_and(|wrong| wrong.is_empty());
    wait_until("port 80 is closed", SPREAD_BOUND, deny)?;
    mesh.coordinator.set_policy(POLICY)?;
    b.until("all is well", is_well)?;

    remove(&b, |_| true, "weir")?;
    let guard = b.host.folder.join("bpf/weir/weir0:guard");
    wait_until("the guard is back", SPREAD_BOUND, || guard.exists())?;
    let status = b.until("all is well", is_well)?;
    assert_eq!(status["acl"]["attached"], true, "{status:#}");
    wait_until("port 80 is open", SPREAD_BOUND, || {
        tests::probe::disagreements(&asked).is_ok_and(|wrong| wrong.is_empty())
    })?;
    lab.passed();
    Ok(())
}

/// Removes folders of the node's bpffs by name.
fn remove(node: &Node, is_meant: impl Fn(&str) -> bool, folder: &str) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(node.host.folder.join("bpf").join(folder))? {
        let entry = entry?;
        if is_meant(&entry.file_name().to_string_lossy()) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
