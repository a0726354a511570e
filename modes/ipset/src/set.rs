//! Declarations of sets.

use std::fmt;

use netlink_requests::{Attributes, Writer, be16, be32, text};

/// Attributes of a set at the top of a message.
pub(crate) const NAME: u16 = 2;
pub(crate) const TYPE: u16 = 3;
const REVISION: u16 = 4;
const FAMILY: u16 = 5;
pub(crate) const DATA: u16 = 7;

/// Attributes within `DATA` at creation.
const PORT_FROM: u16 = 4;
const PORT_TO: u16 = 5;
const TIMEOUT: u16 = 6;
const CADT_FLAGS: u16 = 8;
const HASH_SIZE: u16 = 18;
const MAX_ELEMENTS: u16 = 19;
const REFERENCES: u16 = 25;

const WITH_SKBINFO: u32 = 1 << 6;
/// Marks a number as big endian; ipset insists on it.
pub(crate) const BIG_ENDIAN: u16 = 0x4000;

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Types of sets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Addresses.
    HashIp,
    /// Address, protocol and port.
    HashIpPort,
    /// Address, protocol, port and another address.
    HashIpPortIp,
    /// Address, protocol, port and a network.
    HashIpPortNet,
    /// Networks; prefixes of length 0 are not allowed.
    HashNet,
    /// Ports, whatever the protocol.
    BitmapPort,
}

impl Kind {
    /// All types.
    pub const ALL: [Self; 6] = [
        Self::HashIp,
        Self::HashIpPort,
        Self::HashIpPortIp,
        Self::HashIpPortNet,
        Self::HashNet,
        Self::BitmapPort,
    ];

    /// The kernel's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HashIp => "hash:ip",
            Self::HashIpPort => "hash:ip,port",
            Self::HashIpPortIp => "hash:ip,port,ip",
            Self::HashIpPortNet => "hash:ip,port,net",
            Self::HashNet => "hash:net",
            Self::BitmapPort => "bitmap:port",
        }
    }

    /// The revision that brought `skbinfo` (Linux 3.18): later ones change nothing that is used here.
    const fn revision(self) -> u8 {
        match self {
            Self::BitmapPort => 3,
            Self::HashIp => 4,
            Self::HashIpPort | Self::HashIpPortIp => 5,
            Self::HashNet => 6,
            Self::HashIpPortNet => 7,
        }
    }
}

/// Families of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    Inet,
    /// IPv6.
    Inet6,
}

/// The declaration of a set.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Set {
    /// Name, at most 31 bytes.
    pub name: String,
    /// Type.
    pub kind: Kind,
    /// Family of the addresses; `None` for [`Kind::BitmapPort`], which has none.
    pub family: Option<Family>,
    /// Most elements; 0 for [`Kind::BitmapPort`], which holds every port.
    pub max_elements: u32,
    /// Seconds after which an element is forgotten that says nothing else; `None` where elements stay.
    pub timeout: Option<u32>,
    /// Whether elements may have a mark for packets.
    pub marks: bool,
}

impl Set {
    /// Writes what `create` needs.
    pub(crate) fn write(&self, w: &mut Writer) {
        w.string(NAME, &self.name);
        w.string(TYPE, self.kind.name());
        w.attribute(REVISION, &[self.kind.revision()]);
        let family = match self.family {
            None => AF_UNSPEC,
            Some(Family::Inet) => AF_INET,
            Some(Family::Inet6) => AF_INET6,
        };
        w.attribute(FAMILY, &[family]);
        w.nest(DATA, |w| {
            if self.kind == Kind::BitmapPort {
                w.attribute(PORT_FROM | BIG_ENDIAN, &0_u16.to_be_bytes());
                w.attribute(PORT_TO | BIG_ENDIAN, &u16::MAX.to_be_bytes());
            } else {
                w.attribute(HASH_SIZE | BIG_ENDIAN, &1024_u32.to_be_bytes());
                w.attribute(MAX_ELEMENTS | BIG_ENDIAN, &self.max_elements.to_be_bytes());
            }
            if let Some(seconds) = self.timeout {
                w.attribute(TIMEOUT | BIG_ENDIAN, &seconds.to_be_bytes());
            }
            if self.marks {
                w.attribute(CADT_FLAGS | BIG_ENDIAN, &WITH_SKBINFO.to_be_bytes());
            }
        });
    }
}

/// As `ipset save` prints it, but for what the kernel chooses.
impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "create {} {}", self.name, self.kind.name())?;
        match self.family {
            _ if self.kind == Kind::BitmapPort => f.write_str(" range 0-65535")?,
            Some(Family::Inet) => f.write_str(" family inet")?,
            Some(Family::Inet6) => f.write_str(" family inet6")?,
            None => {}
        }
        if self.kind != Kind::BitmapPort {
            write!(f, " hashsize 1024 maxelem {}", self.max_elements)?;
        }
        if let Some(seconds) = self.timeout {
            write!(f, " timeout {seconds}")?;
        }
        if self.marks { f.write_str(" skbinfo") } else { Ok(()) }
    }
}

/// How a set is declared in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Declared {
    /// The declaration; `None` for types and options that are not known.
    pub(crate) set: Option<Set>,
    /// Family of the addresses, whatever the type.
    pub(crate) family: Option<Family>,
    /// Rules and sets that refer to it.
    pub(crate) references: u32,
}

/// Reads a declaration from the attributes of a message; `None` if it has none.
pub(crate) fn decode(name: &str, attributes: &[u8]) -> Option<Declared> {
    let find = |kind| Attributes::find(attributes, kind);
    let kind_name = find(TYPE).and_then(text)?;
    let data = find(DATA).unwrap_or_default();
    let number = |kind| Attributes::find(data, kind).and_then(be32);
    let family = match find(FAMILY).and_then(|v| v.first().copied()) {
        Some(AF_INET) => Some(Family::Inet),
        Some(AF_INET6) => Some(Family::Inet6),
        _ => None,
    };
    let flags = number(CADT_FLAGS).unwrap_or_default();
    let port = |kind| Attributes::find(data, kind).and_then(be16);
    let known = |kind: &Kind| {
        kind.name() == kind_name
            && flags & !WITH_SKBINFO == 0
            && (*kind != Kind::BitmapPort || (port(PORT_FROM), port(PORT_TO)) == (Some(0), Some(u16::MAX)))
    };
    let set = Kind::ALL.into_iter().find(known).map(|kind| Set {
        name: name.to_owned(),
        kind,
        family: family.filter(|_| kind != Kind::BitmapPort),
        max_elements: number(MAX_ELEMENTS).unwrap_or_default(),
        timeout: number(TIMEOUT),
        marks: flags & WITH_SKBINFO != 0,
    });
    Some(Declared { set, family, references: number(REFERENCES).unwrap_or_default() })
}
