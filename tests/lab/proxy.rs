//! A node whose only way out is an HTTP proxy, a real tinyproxy, that wants a password.
//!
//! ```text
//!  a ── lan ── router (tinyproxy)      hub   near   b
//!              │   forwards nothing     │     │     │
//!             ─┴────────────────────────┴─────┴─────┴── internet
//! ```

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::ensure;
use serde_json::Value;
use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Join, Mesh, Node, SPREAD_BOUND};
use tests::process::Process;
use tests::topology::Topology;
use tests::wait_until;

const POLICY: &str = r#"{"acls": [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]}"#;
/// Where a's side of the router is a proxy.
const PROXY: &str = "10.1.0.1:3128";
const PASSWORD: &str = "sesame";
/// `ana:sesame`, as it travels.
const LOGIN: &str = "YW5hOnNlc2FtZQ==";

/// A proxy on the router that wants this password of ana. When this returns, it listens.
fn start_proxy(router: &Host, folder: &Path, password: &str) -> anyhow::Result<Arc<Process>> {
    let config = folder.join("tinyproxy.conf");
    let text = format!(
        "Port 3128\nListen 10.1.0.1\nTimeout 600\nMaxClients 20\nBasicAuth ana {password}\n\
         ConnectPort 443\nConnectPort 8443\n"
    );
    std::fs::write(&config, text)?;
    let line = format!("tinyproxy -d -c {}", config.display());
    let process = router.start("tinyproxy", &line)?;
    let proxy: SocketAddr = PROXY.parse()?;
    let listens = || router.enter(|| TcpStream::connect(proxy).is_ok());
    wait_until("the proxy listens", SPREAD_BOUND, || {
        !process.runs() || listens()
    })?;
    ensure!(process.runs(), "tinyproxy ended: {}", process.said());
    Ok(process)
}

/// Joined through the proxy, reached through it by relay; and when it wants another password, the
/// agent says so, and is back when it does not.
#[test]
fn a_node_whose_only_way_out_is_a_proxy_is_in_the_network() -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|dir| dir.join("tinyproxy").exists()) {
        tests::skip("proxy", "no tinyproxy (an HTTP proxy)");
        return Ok(());
    }
    let topology = Topology::star(&["near", "b"]).behind_a_router("a");
    let lab = Lab::new("proxy", &topology)?;
    let (router, host) = (lab.host("router"), lab.host("a"));
    router.run("sysctl -q -w net.ipv4.ip_forward=0")?;
    let folder = tempfile::tempdir()?;
    let first = start_proxy(&router, folder.path(), PASSWORD)?;
    let join = Join {
        host: "b",
        owner: "--user ana@example.com",
        routes: "",
    };
    let mesh = Mesh::with_relays(&lab, POLICY, &["near"], &[join])?;

    std::fs::write(folder.path().join("proxy"), format!("ana:{PASSWORD}\n"))?;
    let credentials = folder.path().to_string_lossy().into_owned();
    let url = format!("http://{PROXY}");
    let environment = [
        ("HTTPS_PROXY", url.as_str()),
        ("CREDENTIALS_DIRECTORY", &credentials),
    ];
    let a = Node::start_in(&host, &environment)?;
    let token = mesh
        .coordinator
        .token("--network home --user ana@example.com")?;
    a.join(&token, "")?;
    let status = a.status()?;
    ensure!(status["coordinator"]["proxy"] == PROXY, "{status:#}");
    let pings = || a.weir_with("ping --count 1 b").is_ok_and(|it| it.code == 0);
    wait_until("b answers a", SPREAD_BOUND, pings)?;
    let ping = a.weir("ping --count 2 --json b")?.json()?;
    ensure!(ping["received"] == 2, "{ping:#}");
    let ways = ping["ways"].as_array();
    let relayed = ways.is_some_and(|ways| ways.iter().all(|way| *way == "relayed"));
    ensure!(relayed, "{ping:#}");
    let netcheck = a.weir("netcheck")?.stdout;
    ensure!(
        netcheck.contains("up, by proxy 10.1.0.1:3128"),
        "{netcheck}"
    );

    first.kill();
    let second = start_proxy(&router, folder.path(), "another")?;
    let refused = |status: &Value| {
        let why = status["coordinator"]["why"].as_str().unwrap_or_default();
        why.ends_with("does not take the user and password of the service's credential `proxy`")
    };
    a.until("a says why", refused)?;
    let doctor = a.weir_with("doctor")?.stdout;
    ensure!(doctor.contains("by proxy 10.1.0.1:3128"), "{doctor}");
    ensure!(
        doctor.contains("The proxy takes TCP connections"),
        "{doctor}"
    );
    second.kill();
    let _third = start_proxy(&router, folder.path(), PASSWORD)?;
    a.until("a is back", |status| {
        status["coordinator"]["connected"] == true
    })?;
    wait_until("b answers a again", SPREAD_BOUND, pings)?;

    let said = a.process().said();
    ensure!(!said.contains(PASSWORD) && !said.contains(LOGIN), "{said}");
    lab.passed();
    Ok(())
}
