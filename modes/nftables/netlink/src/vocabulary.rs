//! The words expressions are made of: registers, keys, operators and flags.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

/// A set of named bits.
macro_rules! flags {
    ($(#[$doc:meta])* pub struct $name:ident { $($(#[$bit_doc:meta])* $bit:ident = $value:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u32);

        impl $name {
            $($(#[$bit_doc])* pub const $bit: Self = Self($value);)*

            /// Whether all of `other`'s bits are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether no bit is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// The kernel's number.
            pub(crate) const fn bits(self) -> u32 {
                self.0
            }

            pub(crate) const fn from_bits(bits: u32) -> Self {
                Self(bits)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        /// The names of the bits, separated by commas.
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut rest = self.0;
                let mut comma = "";
                $(if self.contains(Self::$bit) {
                    write!(f, "{comma}{}", $text)?;
                    comma = ",";
                    rest &= !$value;
                })*
                if rest != 0 { write!(f, "{comma}{rest:#x}") } else { Ok(()) }
            }
        }
    };
}
pub(crate) use flags;

/// An enum whose variants are numbers to the kernel and words to people.
macro_rules! numbered {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $value:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),*];

            pub(crate) fn number(self) -> u32 {
                match self { $(Self::$variant => $value,)* }
            }

            pub(crate) fn from_number(number: u32) -> Option<Self> {
                match number { $($value => Some(Self::$variant),)* _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }
    };
}

macro_rules! registers {
    ($($name:ident $index:literal),*) => {
        $(#[doc = concat!("Register ", $index, ".")] pub const $name: Self = Self(8 + $index);)*
    };
}

/// One of the sixteen registers of 32 bits through which expressions pass values. Values longer than four bytes take
/// several, so neighbours form concatenations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Register(u8);

impl Register {
    registers! { R0 0, R1 1, R2 2, R3 3, R4 4, R5 5, R6 6, R7 7, R8 8, R9 9, R10 10, R11 11, R12 12, R13 13, R14 14, R15 15 }

    /// The register of this index, 0 to 15.
    pub const fn new(index: u8) -> Option<Self> {
        if index < 16 { Some(Self(8 + index)) } else { None }
    }

    /// Its index, 0 to 15.
    pub const fn index(self) -> u8 {
        self.0 - 8
    }

    /// The kernel's number: 8 to 23.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// The register of this number as the kernel dumps it: it names those that start one of the four old registers of
    /// 128 bits by the latter's numbers, 1 to 4.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1..=4 => Some(Self(4 + 4 * number as u8)),
            8..=23 => Some(Self(number as u8)),
            _ => None,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reg {}", self.0)
    }
}

numbered! {
    /// What a payload's offset counts from.
    pub enum PayloadBase {
        /// The link layer's header.
        Link = 0 "link header",
        /// The IP header.
        Network = 1 "network header",
        /// The TCP, UDP or other header.
        Transport = 2 "transport header",
    }
}

numbered! {
    /// Properties of a packet.
    pub enum MetaKey {
        /// Its length.
        Len = 0 "len",
        /// The link layer's protocol.
        Protocol = 1 "protocol",
        /// The priority, which is a class id of tc(8).
        Priority = 2 "priority",
        /// The firewall mark.
        Mark = 3 "mark",
        /// The index of the interface it came from.
        Iif = 4 "iif",
        /// The index of the interface it goes to.
        Oif = 5 "oif",
        /// The name of the interface it came from.
        IifName = 6 "iifname",
        /// The name of the interface it goes to.
        OifName = 7 "oifname",
        /// The user of the socket.
        SkUid = 10 "skuid",
        /// The group of the socket.
        SkGid = 11 "skgid",
        /// Whether it is traced.
        NfTrace = 12 "nftrace",
        /// The netfilter family.
        NfProto = 15 "nfproto",
        /// The transport protocol.
        L4Proto = 16 "l4proto",
        /// Whether it is unicast, broadcast or multicast.
        PktType = 19 "pkttype",
        /// The CPU that works on it.
        Cpu = 20 "cpu",
        /// A random number.
        PRandom = 24 "prandom",
    }
}

numbered! {
    /// Properties of a connection.
    pub enum CtKey {
        /// new, established, …
        State = 0 "state",
        /// original or reply.
        Direction = 1 "direction",
        /// A bit set: seen-reply, snat, dnat, …
        Status = 2 "status",
        /// The connection's mark.
        Mark = 3 "mark",
        /// How long it still has to live.
        Expiration = 5 "expiration",
        /// The network protocol.
        L3Protocol = 7 "l3proto",
        /// The transport protocol.
        Protocol = 10 "protocol",
        /// The source port, of a direction.
        ProtoSrc = 11 "proto-src",
        /// The destination port, of a direction.
        ProtoDst = 12 "proto-dst",
        /// The zone.
        Zone = 17 "zone",
        /// The source address, of a direction.
        SrcIp = 19 "saddr",
        /// The destination address, of a direction.
        DstIp = 20 "daddr",
        /// The source address, of a direction.
        SrcIp6 = 21 "saddr6",
        /// The destination address, of a direction.
        DstIp6 = 22 "daddr6",
    }
}

numbered! {
    /// A direction of a connection.
    pub enum CtDirection {
        /// As its first packet.
        Original = 0 "original",
        /// The answers.
        Reply = 1 "reply",
    }
}

numbered! {
    /// A comparison.
    pub enum CmpOp {
        /// Equal.
        Eq = 0 "eq",
        /// Not equal.
        Neq = 1 "neq",
        /// Less, as big-endian bytes.
        Lt = 2 "lt",
        /// Less or equal.
        Lte = 3 "lte",
        /// Greater.
        Gt = 4 "gt",
        /// Greater or equal.
        Gte = 5 "gte",
    }
}

numbered! {
    /// A change of byte order.
    pub enum ByteorderOp {
        /// From network to host.
        Ntoh = 0 "ntoh",
        /// From host to network.
        Hton = 1 "hton",
    }
}

numbered! {
    /// What is asked of the routing tables.
    pub enum FibResult {
        /// The index of the interface.
        Oif = 1 "oif",
        /// The name of the interface.
        OifName = 2 "oifname",
        /// Whose address it is: local, unicast, broadcast, …
        AddrType = 3 "type",
    }
}

flags! {
    /// What is looked up in the routing tables.
    pub struct FibFlags {
        /// The source address.
        SADDR = 0x1 "saddr",
        /// The destination address.
        DADDR = 0x2 "daddr",
        /// With the packet's mark.
        MARK = 0x4 "mark",
        /// On the interface it came from.
        IIF = 0x8 "iif",
        /// On the interface it goes to.
        OIF = 0x10 "oif",
        /// Only whether there is a route.
        PRESENT = 0x20 "present",
    }
}

numbered! {
    /// Which address is translated.
    pub enum NatKind {
        /// The source.
        Snat = 0 "snat",
        /// The destination.
        Dnat = 1 "dnat",
    }
}

flags! {
    /// How a translation chooses among several.
    pub struct NatFlags {
        /// Ports at random.
        RANDOM = 0x4 "random",
        /// The same address for the same client.
        PERSISTENT = 0x8 "persistent",
        /// Ports entirely at random.
        FULLY_RANDOM = 0x10 "fully-random",
    }
}

/// How a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RejectKind {
    /// With an ICMP destination unreachable, of the packet's IP version, of this code.
    IcmpUnreach(u8),
    /// With a TCP reset.
    TcpReset,
    /// With the code of the packet's family that this abstract one stands for (families `inet` and `bridge` only).
    IcmpxUnreach(u8),
}

numbered! {
    /// What a rule does to a set.
    pub enum DynsetOp {
        /// Adds an element unless there is one.
        Add = 0 "add",
        /// Adds an element or renews its timeout.
        Update = 1 "update",
        /// Deletes an element.
        Delete = 2 "delete",
    }
}

/// What a counter counted. All counters compare equal, so that two rules which differ only in traffic are equal.
#[derive(Clone, Copy, Debug, Default)]
pub struct CounterValue {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl PartialEq for CounterValue {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for CounterValue {}

impl PartialOrd for CounterValue {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for CounterValue {
    fn cmp(&self, _: &Self) -> Ordering {
        Ordering::Equal
    }
}

impl Hash for CounterValue {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}
