//! A port of the router: asked for by PCP (RFC 6887) or NAT-PMP (RFC 6886), kept, and given back.
//!
//! Home and office routers that speak one of them open a port to us on request, so that peers reach
//! this node although it is behind a NAT, even a hard one. One task asks the router that the engine
//! names, renews at half of the lifetime that it was given, and says under which address the world
//! finds WireGuard's port now. Most routers of servers speak neither: then it asks rarely.
//!
//! The port is given back when the router changes, the node goes down or the agent ends: a router
//! lets nobody else have it, not even the next agent (RFC 6887, 11.3: the nonce). If the agent dies,
//! it runs out by itself.

use crab_nat::{
    GatewayAddress, InternetProtocol, PortMapping, PortMappingOptions, PortMappingType,
    TimeoutConfig, natpmp,
};
use engine::{Input, Router};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

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

/// Keeps WireGuard's port open at the router that `routers` names, and tells of each change of the
/// address outside. Ends when nobody names routers any more.
#[must_use]
pub fn spawn(
    listen_port: u16,
    routers: watch::Receiver<Option<Router>>,
    mapped: mpsc::Sender<Input>,
) -> JoinHandle<()> {
    tokio::spawn(run(listen_port, routers, mapped))
}

async fn run(
    listen_port: u16,
    mut routers: watch::Receiver<Option<Router>>,
    mapped: mpsc::Sender<Input>,
) {
    let Some(port) = NonZeroU16::new(listen_port) else {
        return;
    };
    let mut told = None;
    let mut held: Option<PortMapping> = None;
    loop {
        let router = *routers.borrow_and_update();
        if let Some(mapping) = held.take_if(|it| {
            Some(IpAddr::from(it.gateway())) != router.map(|router| router.gateway.into())
        }) {
            give_back(mapping).await;
        }
        let mut pause = REFUSED;
        if let Some(router) = router {
            match ask(port, router, held.take()).await {
                Ok((mapping, outside)) => {
                    pause = (mapping_lifetime(&mapping) / 2).max(SHORTEST);
                    held = Some(mapping);
                    tell(&mapped, &mut told, Some(outside)).await;
                }
                Err(error) => {
                    tracing::debug!(gateway = %router.gateway, %error, "the router opens no port");
                    tell(&mapped, &mut told, None).await;
                }
            }
        } else {
            tell(&mapped, &mut told, None).await;
        }
        // Sleeps until the port must be renewed, or the router is another.
        if let Ok(Err(_)) = timeout(pause, routers.changed()).await {
            break;
        }
    }
    if let Some(mapping) = held {
        give_back(mapping).await;
    }
}

fn mapping_lifetime(mapping: &PortMapping) -> Duration {
    Duration::from_secs(mapping.lifetime().into())
}

/// Opens or renews the port. Returns the address outside.
async fn ask(
    port: NonZeroU16,
    router: Router,
    held: Option<PortMapping>,
) -> Result<(PortMapping, SocketAddr), crab_nat::MappingFailure> {
    let gateway = GatewayAddress::from(router.gateway);
    let mapping = match held {
        Some(mut mapping) => {
            mapping.renew().await?;
            mapping
        }
        None => {
            let options = PortMappingOptions {
                external_port: Some(port),
                lifetime_seconds: u32::try_from(LIFETIME.as_secs()).ok(),
                timeout_config: Some(PATIENCE),
            };
            let own = IpAddr::V4(router.own);
            PortMapping::new(gateway, own, InternetProtocol::Udp, port, options).await?
        }
    };
    let outside = match mapping.mapping_type() {
        PortMappingType::Pcp { external_ip, .. } => external_ip,
        PortMappingType::NatPmp => {
            IpAddr::V4(natpmp::external_address(gateway, Some(PATIENCE)).await?)
        }
    };
    let outside = SocketAddr::new(outside.to_canonical(), mapping.external_port().get());
    Ok((mapping, outside))
}

async fn give_back(mapping: PortMapping) {
    if let Ok(Err((error, _))) = timeout(FAREWELL, mapping.try_drop()).await {
        tracing::debug!(%error, "the router was not told that its port is free again");
    }
}

async fn tell(
    mapped: &mpsc::Sender<Input>,
    told: &mut Option<SocketAddr>,
    news: Option<SocketAddr>,
) {
    if *told != news {
        *told = news;
        // Nobody listens any more: then nobody needs to know.
        let _ = mapped.send(Input::PortMapped(news)).await;
    }
}
