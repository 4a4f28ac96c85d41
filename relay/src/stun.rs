//! The STUN responder: tells whoever asks which address it comes from. It remembers nothing.
//!
//! An answer leaves from the address that was asked: a NAT or firewall on the way lets in no other,
//! and the kernel alone would take the address that its routes prefer.

use crate::metrics::Metrics;
use nix::cmsg_space;
use nix::libc::{in_pktinfo, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use proto::stun::{self, MAX_BYTES};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Where a question went.
#[derive(Clone, Copy)]
enum Asked {
    V4(in_pktinfo),
    V6(in6_pktinfo),
}

/// Makes the kernel tell which address was asked.
///
/// # Errors
/// The kernel's.
pub fn prepare(socket: &UdpSocket) -> io::Result<()> {
    match socket.local_addr()?.ip() {
        IpAddr::V4(_) => setsockopt(socket, sockopt::Ipv4PacketInfo, &true)?,
        // Of a socket of both families this tells IPv4 addresses too, mapped.
        IpAddr::V6(_) => setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?,
    }
    Ok(())
}

/// Answers until it is dropped.
pub async fn serve(socket: UdpSocket, metrics: Arc<Metrics>) {
    // One byte more than the longest, so that a longer one is seen to be longer.
    let mut datagram = vec![0; MAX_BYTES + 1];
    loop {
        let received = socket.async_io(Interest::READABLE, || receive(&socket, &mut datagram));
        // What fails is an answer to somebody who is gone already: not our business.
        let Ok((length, from, asked)) = received.await else {
            tokio::task::yield_now().await;
            continue;
        };
        let question = datagram.get(..length).unwrap_or_default();
        let Ok(transaction) = stun::parse_request(question) else {
            Metrics::add(&metrics.stun_ignored, 1);
            continue;
        };
        let answer = stun::response(transaction, from);
        let sent = socket.async_io(Interest::WRITABLE, || send(&socket, &answer, from, asked));
        if sent.await.is_ok() {
            Metrics::add(&metrics.stun, 1);
        }
    }
}

fn receive(
    socket: &UdpSocket,
    datagram: &mut [u8],
) -> io::Result<(usize, SocketAddr, Option<Asked>)> {
    let mut control = cmsg_space!(in6_pktinfo);
    let mut parts = [IoSliceMut::new(datagram)];
    let fd = socket.as_raw_fd();
    let message =
        recvmsg::<SockaddrStorage>(fd, &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    let asked = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Asked::V4(info)),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Asked::V6(info)),
        _ => None,
    });
    let from = message.address.and_then(|addr| plain(&addr));
    let from = from.ok_or(io::ErrorKind::InvalidData)?;
    Ok((message.bytes, from, asked))
}

fn plain(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr
        .as_sockaddr_in()
        .map(|v4| SocketAddrV4::from(*v4).into());
    v4.or_else(|| {
        addr.as_sockaddr_in6()
            .map(|v6| SocketAddrV6::from(*v6).into())
    })
}

fn send(
    socket: &UdpSocket,
    answer: &[u8],
    to: SocketAddr,
    asked: Option<Asked>,
) -> io::Result<usize> {
    let parts = [IoSlice::new(answer)];
    let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
    let to = SockaddrStorage::from(to);
    let sent = match asked {
        Some(Asked::V4(info)) => {
            // The routes say by which interface.
            let info = in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: info.ipi_addr,
                ..info
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &parts, &control, flags, Some(&to))
        }
        Some(Asked::V6(info)) => {
            let info = in6_pktinfo {
                ipi6_ifindex: 0,
                ..info
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &parts, &control, flags, Some(&to))
        }
        None => sendmsg(fd, &parts, &[], flags, Some(&to)),
    };
    Ok(sent?)
}
