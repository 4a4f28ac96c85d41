//! A port of the router: asked for by PCP (RFC 6887), NAT-PMP (RFC 6886) or UPnP ([`upnp`]), in
//! this order; what opens it is kept, and asked to give it back.
//!
//! Home and office routers that speak one of them open a port to us on request, so that peers reach
//! this node although it is behind a NAT, even a hard one. One task asks the router that the engine
//! names, renews at half of the lifetime that it was given, and says under which address the world
//! finds WireGuard's port now. Most routers of servers speak none: then it asks rarely.
//!
//! The port is given back when the router changes, the node goes down or the agent ends: a router
//! lets nobody else have it, not even the next agent (RFC 6887, 11.3: the nonce). If the agent dies,
//! it runs out by itself; but a few routers know no time in UPnP, and keep it until the next agent
//! gives it back.

mod upnp;

use crab_nat::{
    GatewayAddress, InternetProtocol, MappingFailure, PortMapping, PortMappingOptions,
    PortMappingType, TimeoutConfig, natpmp,
};
use engine::{Input, Router};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use upnp::UpnpError;

/// What is asked for. After a crash an unused port stays open for so long.
const LIFETIME: Duration = Duration::from_secs(1200);
/// A router that gives less is asked no more often than this.
const SHORTEST: Duration = Duration::from_secs(60);
/// Between two attempts at a router that does not answer, or refuses.
const REFUSED: Duration = Duration::from_secs(600);
/// Giving a port back must not hold up whoever goes.
const FAREWELL: Duration = Duration::from_secs(1);
/// A router is one hop away: questions at 0, 0.25, 0.75 and 1.75 s.
const PATIENCE: TimeoutConfig = TimeoutConfig {
    initial_timeout: Duration::from_millis(250),
    max_retries: 3,
    max_retry_timeout: None,
};

/// By what a router was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP IGD.
    Upnp,
}

/// A port that the router opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Where the world finds it.
    pub outside: SocketAddr,
    /// By what it was asked for.
    pub protocol: Protocol,
}

/// The task that asks.
pub struct Asking {
    /// What the router opened, now.
    pub opened: watch::Receiver<Option<Opened>>,
    /// Ends when nobody names routers any more.
    pub task: JoinHandle<()>,
}

/// Keeps WireGuard's port open at the router that `routers` names, and tells of each change of the
/// address outside.
#[must_use]
pub fn spawn(
    listen_port: u16,
    routers: watch::Receiver<Option<Router>>,
    mapped: mpsc::Sender<Input>,
) -> Asking {
    let (tell, opened) = watch::channel(None);
    let task = tokio::spawn(run(listen_port, routers, mapped, tell));
    Asking { opened, task }
}

async fn run(
    listen_port: u16,
    mut routers: watch::Receiver<Option<Router>>,
    mapped: mpsc::Sender<Input>,
    opened: watch::Sender<Option<Opened>>,
) {
    let Some(port) = NonZeroU16::new(listen_port) else {
        return;
    };
    let mut held: Option<Held> = None;
    loop {
        let router = *routers.borrow_and_update();
        let gateway = router.map(|router| router.gateway);
        if let Some(other) = held.take_if(|it| Some(it.gateway()) != gateway.map(IpAddr::from)) {
            other.give_back().await;
        }
        let mut pause = REFUSED;
        let mut news = None;
        if let Some(router) = router {
            match ask(port, router, held.take()).await {
                Ok((mapping, outside)) => {
                    pause = (mapping.lifetime() / 2).max(SHORTEST);
                    news = Some(Opened {
                        outside,
                        protocol: mapping.protocol(),
                    });
                    held = Some(mapping);
                }
                Err(error) => {
                    tracing::debug!(gateway = %router.gateway, %error, "the router opens no port");
                }
            }
        }
        let before = opened.send_replace(news).map(|it| it.outside);
        let outside = news.map(|it| it.outside);
        if before != outside {
            // Nobody listens any more: then nobody needs to know.
            let _ = mapped.send(Input::PortMapped(outside)).await;
        }
        // Sleeps until the port must be renewed, or the router is another.
        if let Ok(Err(_)) = timeout(pause, routers.changed()).await {
            break;
        }
    }
    if let Some(mapping) = held {
        mapping.give_back().await;
    }
}

/// A port that is open for us.
enum Held {
    Asked(Box<PortMapping>),
    Upnp(Box<upnp::Mapping>),
}

/// Why there is none. What the last protocol said: it is the one that most routers have.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Asked(#[from] MappingFailure),
    #[error(transparent)]
    Upnp(#[from] UpnpError),
}

impl Held {
    fn gateway(&self) -> IpAddr {
        match self {
            Self::Asked(mapping) => mapping.gateway().into(),
            Self::Upnp(mapping) => mapping.gateway().into(),
        }
    }

    fn protocol(&self) -> Protocol {
        match self {
            Self::Asked(mapping) => match mapping.mapping_type() {
                PortMappingType::Pcp { .. } => Protocol::Pcp,
                PortMappingType::NatPmp => Protocol::NatPmp,
            },
            Self::Upnp(_) => Protocol::Upnp,
        }
    }

    fn lifetime(&self) -> Duration {
        match self {
            Self::Asked(mapping) => Duration::from_secs(mapping.lifetime().into()),
            // Routers forget on a restart, whatever they promised.
            Self::Upnp(_) => LIFETIME,
        }
    }

    async fn renew(&mut self) -> Result<SocketAddr, Refusal> {
        match self {
            Self::Asked(mapping) => {
                mapping.renew().await?;
                outside(mapping).await
            }
            Self::Upnp(mapping) => Ok(mapping.renew().await?),
        }
    }

    async fn give_back(self) {
        let given = async {
            match self {
                Self::Asked(mapping) => mapping.try_drop().await.map_err(|(error, _)| error.into()),
                Self::Upnp(mapping) => mapping.close().await.map_err(Refusal::from),
            }
        };
        if let Ok(Err(error)) = timeout(FAREWELL, given).await {
            tracing::debug!(%error, "the router was not told that its port is free again");
        }
    }
}

/// Opens or renews the port. Returns the address outside.
async fn ask(
    port: NonZeroU16,
    router: Router,
    held: Option<Held>,
) -> Result<(Held, SocketAddr), Refusal> {
    if let Some(mut mapping) = held {
        match mapping.renew().await {
            Ok(outside) => return Ok((mapping, outside)),
            // It may have started anew, and speak something else.
            Err(error) => tracing::debug!(%error, "the router renews no port"),
        }
    }
    match by_number(port, router).await {
        Ok(mapping) => {
            let outside = outside(&mapping).await?;
            Ok((Held::Asked(Box::new(mapping)), outside))
        }
        Err(error) => {
            tracing::debug!(%error, "neither PCP nor NAT-PMP");
            let (mapping, outside) = upnp::Mapping::new(router, port, LIFETIME).await?;
            Ok((Held::Upnp(Box::new(mapping)), outside))
        }
    }
}

/// By PCP, or by NAT-PMP: also where PCP's packets are just swallowed.
async fn by_number(port: NonZeroU16, router: Router) -> Result<PortMapping, MappingFailure> {
    let gateway = GatewayAddress::from(router.gateway);
    let options = PortMappingOptions {
        external_port: Some(port),
        lifetime_seconds: u32::try_from(LIFETIME.as_secs()).ok(),
        timeout_config: Some(PATIENCE),
    };
    let own = IpAddr::V4(router.own);
    match PortMapping::new(gateway, own, InternetProtocol::Udp, port, options).await {
        Err(MappingFailure::Pcp(_)) => {
            Ok(natpmp::port_mapping(gateway, InternetProtocol::Udp, port, options).await?)
        }
        done => done,
    }
}

async fn outside(mapping: &PortMapping) -> Result<SocketAddr, Refusal> {
    let ip = match mapping.mapping_type() {
        PortMappingType::Pcp { external_ip, .. } => external_ip,
        PortMappingType::NatPmp => {
            let asked = natpmp::external_address(mapping.gateway(), Some(PATIENCE)).await;
            IpAddr::from(asked.map_err(MappingFailure::from)? as Ipv4Addr)
        }
    };
    let port = mapping.external_port().get();
    Ok(SocketAddr::new(ip.to_canonical(), port))
}
