//! The addresses of the node's interfaces, IPv6 link-local ones and those of VIPs excepted, by rtnetlink,
//! live.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;

/// Why addresses cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// The netlink socket could not be opened.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[from] std::io::Error),
    /// The kernel refused to list addresses.
    #[error("cannot list addresses: {0}")]
    List(#[from] rtnetlink::Error),
    /// The kernel stopped answering.
    #[error("the netlink socket was closed")]
    Closed,
}

/// Several addresses come and go together: what follows within this time is read once.
const SETTLE: Duration = Duration::from_millis(20);

/// The link on which ipvs mode (ours, or kube-proxy's) puts the VIPs: they are not the node's own.
const VIP_LINK: &str = "kube-ipvs0";

/// Sends the node's addresses at once, and again whenever they or the node's devices change, until the
/// receiver goes away.
pub async fn watch(tx: mpsc::Sender<BTreeSet<IpAddr>>) -> Result<(), AddressError> {
    let (connection, handle, mut messages) = new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
    ])?;
    let connection = tokio::spawn(connection);
    let result = watch_with(&handle, &mut messages, &tx).await;
    connection.abort();
    result
}

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>;

async fn watch_with(
    handle: &Handle,
    messages: &mut Messages,
    tx: &mpsc::Sender<BTreeSet<IpAddr>>,
) -> Result<(), AddressError> {
    loop {
        let now = list(handle).await?;
        tracing::debug!(addresses = ?now, "addresses of the node");
        if tx.send(now).await.is_err() {
            return Ok(());
        }
        let vips = vip_link(handle).await;
        // Thousands of VIPs may come and go; none of them is a reason to list all addresses.
        loop {
            let (message, _) = messages.next().await.ok_or(AddressError::Closed)?;
            if vips.is_none() || link_of(&message) != vips {
                break;
            }
        }
        tokio::time::sleep(SETTLE).await;
        while messages.try_recv().is_ok() {}
    }
}

/// The number of the link with the VIPs; `None` if there is none.
async fn vip_link(handle: &Handle) -> Option<u32> {
    let mut links = handle.link().get().match_name(VIP_LINK.to_owned()).execute();
    // The kernel refuses to list a link that is not there.
    links.try_next().await.ok().flatten().map(|link| link.header.index)
}

/// The link whose addresses changed.
fn link_of(message: &NetlinkMessage<RouteNetlinkMessage>) -> Option<u32> {
    match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address),
        ) => Some(address.header.index),
        _ => None,
    }
}

async fn list(handle: &Handle) -> Result<BTreeSet<IpAddr>, AddressError> {
    let vips = vip_link(handle).await;
    let mut addresses = BTreeSet::new();
    let mut messages = handle.address().get().execute();
    while let Some(message) = messages.try_next().await? {
        if vips == Some(message.header.index) {
            continue;
        }
        // Nothing is served on these, and every pod's interface has one.
        addresses.extend(address_of(&message).filter(|a| !is_link_local(*a)));
    }
    Ok(addresses)
}

const fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if a.is_unicast_link_local())
}

/// The interface's own address. On a point-to-point link `Address` is the peer's and `Local` ours.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => found = Some(*address),
            _ => {}
        }
    }
    found
}
