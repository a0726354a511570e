//! The few rtnetlink requests a lab needs, on a blocking socket: every request waits for the kernel's answer.

use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

/// Every namespace's loopback device has this index.
pub(super) const LOOPBACK: u32 = 1;

/// A MAC address.
pub(super) type Mac = [u8; 6];

/// One end of a veth pair.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) mac: Mac,
}

impl End {
    fn message(&self) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes =
            vec![LinkAttribute::IfName(self.name.clone()), LinkAttribute::Address(self.mac.to_vec())];
        message
    }
}

/// Where a route leads.
#[derive(Clone, Copy, Debug)]
pub(super) enum Via {
    /// The destination itself is on the link.
    Link,
    /// Through a neighbour which need not be inside any prefix of the link.
    Gateway(IpAddr),
    /// To this namespace itself: all addresses of the prefix are its own (`AnyIP`).
    Local,
}

/// An rtnetlink socket of the namespace it was opened in.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace.
    pub(super) fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("netlink socket")?;
        socket.bind_auto().context("bind netlink socket")?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one request and gathers what comes back until the acknowledgement or the end of the dump.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let mut buffer = Vec::with_capacity(1 << 16);
            self.socket.recv(&mut buffer, 0)?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)?;
                // Messages in one datagram are aligned to four bytes.
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match answer.payload {
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => bail!(io::Error::from_raw_os_error(-error.raw_code())),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }

    fn create(&mut self, message: RouteNetlinkMessage) -> Result<()> {
        self.request(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// Creates a veth pair, one end here and up, the other in the namespace of descriptor `peer_namespace`.
    pub(super) fn add_veth(&mut self, here: &End, there: &End, peer_namespace: RawFd) -> Result<()> {
        let mut peer = there.message();
        peer.attributes.push(LinkAttribute::NetNsFd(peer_namespace));
        let mut message = here.message();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.create(RouteNetlinkMessage::NewLink(message))
            .with_context(|| format!("add veth {} to {}", here.name, there.name))
    }

    pub(super) fn set_up(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK)
            .map(drop)
            .with_context(|| format!("set link {index} up"))
    }

    /// Removes a link; a veth takes its other end along.
    pub(super) fn remove_link(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.request(RouteNetlinkMessage::DelLink(message), NLM_F_ACK)
            .map(drop)
            .with_context(|| format!("remove link {index}"))
    }

    /// Whether every veth here has a carrier and its queue is active: a packet sent earlier would be lost.
    pub(super) fn links_ready(&mut self) -> Result<bool> {
        let links = self.request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        Ok(links.iter().all(|link| {
            let RouteNetlinkMessage::NewLink(link) = link else { return true };
            let veth = link.attributes.iter().any(|attribute| {
                let LinkAttribute::LinkInfo(infos) = attribute else { return false };
                infos.contains(&LinkInfo::Kind(InfoKind::Veth))
            });
            !veth || link.attributes.contains(&LinkAttribute::OperState(State::Up))
        }))
    }

    /// Adds an address of its own (`/32`, `/128`), usable at once.
    pub(super) fn add_address(&mut self, index: u32, address: IpAddr) -> Result<()> {
        self.create(RouteNetlinkMessage::NewAddress(address_message(index, address)))
            .with_context(|| format!("add address {address}"))
    }

    pub(super) fn remove_address(&mut self, index: u32, address: IpAddr) -> Result<()> {
        self.request(RouteNetlinkMessage::DelAddress(address_message(index, address)), NLM_F_ACK)
            .map(drop)
            .with_context(|| format!("remove address {address}"))
    }

    /// Whether the kernel takes packets for `address` as its own. An IPv6 address becomes so a moment after it was
    /// added, from a work queue.
    pub(super) fn is_local(&mut self, address: IpAddr) -> Result<bool> {
        let mut query = RouteMessage::default();
        query.header.address_family = AddressFamily::from(address);
        query.header.destination_prefix_length = IpNet::from(address).prefix_len();
        query.attributes = vec![RouteAttribute::Destination(address.into())];
        let answers = self.request(RouteNetlinkMessage::GetRoute(query), NLM_F_ACK)?;
        Ok(answers.iter().any(|answer| {
            matches!(answer, RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local)
        }))
    }

    pub(super) fn add_route(&mut self, destination: IpNet, index: u32, via: Via) -> Result<()> {
        self.create(RouteNetlinkMessage::NewRoute(route_message(destination, index, via)))
            .with_context(|| format!("add route {destination}"))
    }

    pub(super) fn remove_route(&mut self, destination: IpNet, index: u32, via: Via) -> Result<()> {
        self.request(RouteNetlinkMessage::DelRoute(route_message(destination, index, via)), NLM_F_ACK)
            .map(drop)
            .with_context(|| format!("remove route {destination}"))
    }

    /// Says once and for all which MAC address a neighbour has, so that nobody needs to ask.
    pub(super) fn add_neighbour(&mut self, index: u32, address: IpAddr, mac: Mac) -> Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::from(address);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(address.into()),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        self.create(RouteNetlinkMessage::NewNeighbour(message))
            .with_context(|| format!("add neighbour {address}"))
    }
}

fn address_message(index: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::from(address);
    message.header.prefix_len = IpNet::from(address).prefix_len();
    message.header.index = index;
    if address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn route_message(destination: IpNet, index: u32, via: Via) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::from(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.kind = RouteType::Unicast;
    message.attributes =
        vec![RouteAttribute::Destination(destination.network().into()), RouteAttribute::Oif(index)];
    match via {
        Via::Link if destination.addr().is_ipv4() => message.header.scope = RouteScope::Link,
        Via::Link => {}
        Via::Gateway(gateway) => {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        Via::Local => {
            message.header.kind = RouteType::Local;
            message.header.scope = RouteScope::Host;
            message.header.table = RT_TABLE_LOCAL;
        }
    }
    message
}

const RT_TABLE_LOCAL: u8 = 255;
