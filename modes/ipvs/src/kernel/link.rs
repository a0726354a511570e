//! The dummy link and its addresses, by rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_requests::protocols::NETLINK_ROUTE;
use netlink_requests::{Attributes, Batch, Error, NLM_F_CREATE, NLM_F_EXCL, Refusal, Socket, Writer, text};

use crate::layout::LINK;

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;

/// Sizes of `struct ifinfomsg` and `struct ifaddrmsg`.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

const LINK_NAME: u16 = 3;
const LINK_INFO: u16 = 18;
const LINK_KIND: u16 = 1;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
/// `struct ifa_cacheinfo`: preferred and valid lifetime, two times of change.
const CACHE_INFO: u16 = 6;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `IFA_F_NODAD`: nobody else can have an address of a dummy link.
const NO_DAD: u8 = 2;
const EEXIST: i32 = 17;

/// The links of a network namespace.
#[derive(Debug)]
pub(super) struct Links {
    socket: Socket,
    /// The number of our link, once it is known.
    index: Option<u32>,
}

fn link_header(index: u32) -> [u8; LINK_HEADER] {
    let mut header = [0; LINK_HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

impl Links {
    pub(super) fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(NETLINK_ROUTE)?, index: None })
    }

    /// The number of our link; `None` if there is none.
    fn find(&mut self) -> Result<Option<u32>, Error> {
        let mut found = None;
        self.socket.dump(
            GET_LINK,
            |w| w.header(&[0; LINK_HEADER]),
            |payload| {
                let attributes = payload.get(LINK_HEADER..).unwrap_or_default();
                if Attributes::find(attributes, LINK_NAME).and_then(text) == Some(LINK) {
                    found = payload.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
                }
                Ok(())
            },
        )?;
        Ok(found)
    }

    /// Whether our link is there: looks anew.
    pub(super) fn exists(&mut self) -> Result<bool, Error> {
        self.index = self.find()?;
        Ok(self.index.is_some())
    }

    /// The number of our link, as last seen.
    pub(super) fn index(&mut self) -> Result<Option<u32>, Error> {
        if self.index.is_none() {
            self.index = self.find()?;
        }
        Ok(self.index)
    }

    /// Makes our link, unless it is there: the other family may have made it.
    pub(super) fn add(&mut self) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(NEW_LINK, NLM_F_CREATE | NLM_F_EXCL, |w| {
            w.header(&link_header(0));
            w.string(LINK_NAME, LINK);
            w.nest(LINK_INFO, |w| w.string(LINK_KIND, "dummy"));
        });
        self.index = None;
        refused(self.socket.execute(&mut batch)?, |errno| errno == EEXIST)
    }

    /// Deletes our link if it has no addresses left.
    pub(super) fn delete_if_empty(&mut self) -> Result<(), Error> {
        self.index = None;
        let Some(index) = self.index()? else { return Ok(()) };
        if !self.addresses()?.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.push(DELETE_LINK, 0, |w| w.header(&link_header(index)));
        self.index = None;
        refused(self.socket.execute(&mut batch)?, |_| false)
    }

    /// The addresses of our link, link-local ones excepted: those are the kernel's.
    pub(super) fn addresses(&mut self) -> Result<Vec<IpAddr>, Error> {
        const TRIES: usize = 8;
        self.index = None;
        let Some(index) = self.index()? else { return Ok(Vec::new()) };
        for _ in 0..TRIES {
            let mut addresses = Vec::new();
            let dumped = self.socket.dump(
                GET_ADDRESS,
                |w| w.header(&[0; ADDRESS_HEADER]),
                |payload| {
                    addresses.extend(decode(payload, index));
                    Ok(())
                },
            );
            match dumped {
                Err(Error::Interrupted) => {}
                dumped => return dumped.map(|()| addresses),
            }
        }
        Err(Error::Interrupted)
    }

    pub(super) fn execute(&mut self, batch: &mut Batch) -> Result<Vec<Refusal>, Error> {
        self.socket.execute(batch)
    }
}

fn refused(refusals: Vec<Refusal>, harmless: impl Fn(i32) -> bool) -> Result<(), Error> {
    match refusals.into_iter().find(|refusal| !harmless(refusal.errno)) {
        Some(refusal) => Err(Error::Refused(refusal)),
        None => Ok(()),
    }
}

/// The address of a message, if it is on link `index`.
fn decode(payload: &[u8], index: u32) -> Option<IpAddr> {
    let of = u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?);
    let attributes = payload.get(ADDRESS_HEADER..)?;
    let value = Attributes::find(attributes, LOCAL).or_else(|| Attributes::find(attributes, ADDRESS))?;
    let address = match *payload.first()? {
        AF_INET => IpAddr::V4(Ipv4Addr::from(*value.first_chunk::<4>()?)),
        AF_INET6 => IpAddr::V6(Ipv6Addr::from(*value.first_chunk::<16>()?)),
        _ => return None,
    };
    let link_local = matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
    (of == index && !link_local).then_some(address)
}

/// Appends the message that adds or deletes an address of link `index`.
pub(super) fn address(batch: &mut Batch, index: u32, address: IpAddr, add: bool) {
    let (kind, flags) = if add { (NEW_ADDRESS, NLM_F_CREATE | NLM_F_EXCL) } else { (DELETE_ADDRESS, 0) };
    batch.push(kind, flags, |w| {
        let (family, prefix, no_dad) =
            if address.is_ipv4() { (AF_INET, 32, 0) } else { (AF_INET6, 128, NO_DAD) };
        let mut header = [family, prefix, no_dad, 0, 0, 0, 0, 0];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        w.header(&header);
        let put = |w: &mut Writer, kind| match address {
            IpAddr::V4(a) => w.attribute(kind, &a.octets()),
            IpAddr::V6(a) => w.attribute(kind, &a.octets()),
        };
        put(w, LOCAL);
        put(w, ADDRESS);
        if address.is_ipv6() {
            // Deprecated for as long as it lives: the kernel must not choose it as the source of other
            // connections, nor when it masquerades.
            let lifetimes = [[0; 4], u32::MAX.to_ne_bytes(), [0; 4], [0; 4]].concat();
            w.attribute(CACHE_INFO, &lifetimes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_written() {
        for text in ["10.96.0.1", "fd00::1"] {
            let wanted: IpAddr = text.parse().unwrap();
            let mut batch = Batch::default();
            address(&mut batch, 7, wanted, true);
            let payload = &batch.as_bytes()[16..];
            assert_eq!(decode(payload, 7), Some(wanted));
            assert_eq!(decode(payload, 8), None);
        }
        for bytes in [&[][..], &[2, 0, 0, 0, 7, 0, 0, 0], &[2, 0, 0, 0, 7, 0, 0, 0, 6, 0, 2, 0, 1, 2]] {
            assert_eq!(decode(bytes, 7), None);
        }
    }
}
