//! The office that the demo plays in.

use std::net::IpAddr;
use std::sync::Arc;

use tests::host::Host;
use tests::lab::Lab;
use tests::mesh::{Coordinator, Join, Mesh, Node};
use tests::topology::Topology;

/// Who joins the network, in the order of the picture.
pub const JOINS: &[Join<'static>] = &[
    Join {
        host: "web",
        owner: "--tag tag:web",
        routes: "",
    },
    Join {
        host: "db",
        owner: "--tag tag:db",
        routes: "",
    },
    Join {
        host: "build",
        owner: "--tag tag:build",
        routes: "",
    },
    Join {
        host: "laptop",
        owner: "--user ana@example.com",
        routes: "",
    },
    Join {
        host: "paris",
        owner: "--tag tag:site",
        routes: "10.1.0.0/24",
    },
    Join {
        host: "oslo",
        owner: "--tag tag:site",
        routes: "10.2.0.0/24",
    },
];

/// The lab, and what runs in it.
pub struct Office {
    /// The namespaces.
    pub lab: Lab,
    /// The policy's text, as the example file has it.
    pub policy: String,
    /// The network, from the first scene on.
    mesh: Option<Mesh>,
}

impl Office {
    /// Makes the namespaces; nothing runs in them yet.
    pub fn build(policy: String) -> anyhow::Result<Self> {
        let lab = Lab::without_captures("demo", &Topology::office())?;
        Ok(Self {
            lab,
            policy,
            mesh: None,
        })
    }

    /// Starts the coordinator; the network is then there, without nodes.
    pub fn open(&mut self) -> anyhow::Result<&mut Mesh> {
        let coordinator = Coordinator::start(&self.lab.host("hub"))?;
        Ok(self.mesh.insert(Mesh::new(coordinator)))
    }

    /// Joins everybody. Returns what each `weir up` said.
    pub fn join(&mut self) -> anyhow::Result<Vec<tests::process::Output>> {
        let mesh = self.mesh.as_mut().ok_or_else(closed)?;
        mesh.join(&self.lab, JOINS)
    }

    /// The network.
    pub fn mesh(&self) -> anyhow::Result<&Mesh> {
        self.mesh.as_ref().ok_or_else(closed)
    }

    /// A node.
    pub fn node(&self, name: &str) -> anyhow::Result<Arc<Node>> {
        let found = self.mesh()?.nodes().get(name).cloned();
        found.ok_or_else(|| anyhow::anyhow!("{name} has not joined"))
    }

    /// A machine, joined or not.
    pub fn host(&self, name: &str) -> Arc<Host> {
        self.lab.host(name)
    }

    /// The IPv4 address of a node in the network, or of a machine that is none on its LAN.
    pub fn v4(&self, name: &str) -> anyhow::Result<IpAddr> {
        if JOINS.iter().any(|join| join.host == name) {
            self.node(name)?.v4()
        } else {
            Ok(self.host(name).v4())
        }
    }

    /// The IPv6 address of a node in the network.
    pub fn v6(&self, name: &str) -> anyhow::Result<IpAddr> {
        self.node(name)?.v6()
    }
}

fn closed() -> anyhow::Error {
    anyhow::anyhow!("the network did not come up in the first scene")
}
