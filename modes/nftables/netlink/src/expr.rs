//! The expressions rules are made of.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use crate::bytes::Bytes;
use crate::object::{Family, Verdict};

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

/// One step of a rule.
///
/// A decoded expression equals the one that was sent, although the kernel dumps more than it was given: register
/// numbers in their old form, a numgen's offset, a lookup's flags, the upper end of a translation's range, the nat
/// flags that only say which registers are used, a dynset's zero timeout. Whatever says more than a variant can hold
/// is [`Expr::Unknown`], so that equal never means only alike.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expr {
    /// Loads bytes of the packet.
    Payload {
        /// What `offset` counts from.
        base: PayloadBase,
        /// Where the bytes start.
        offset: u32,
        /// How many.
        len: u32,
        /// Where they go.
        dreg: Register,
    },
    /// Loads a property of the packet.
    Meta {
        /// Which.
        key: MetaKey,
        /// Where it goes.
        dreg: Register,
    },
    /// Sets a property of the packet.
    MetaSet {
        /// Which.
        key: MetaKey,
        /// Where the value is.
        sreg: Register,
    },
    /// Loads a property of the connection.
    Ct {
        /// Which.
        key: CtKey,
        /// Of which direction, for keys that have one.
        direction: Option<CtDirection>,
        /// Where it goes.
        dreg: Register,
    },
    /// Sets a property of the connection.
    CtSet {
        /// Which.
        key: CtKey,
        /// Where the value is.
        sreg: Register,
    },
    /// Ends the rule unless the comparison holds.
    Cmp {
        /// The comparison.
        op: CmpOp,
        /// The left side.
        sreg: Register,
        /// The right side.
        data: Bytes,
    },
    /// `dreg = (sreg & mask) ^ xor`.
    Bitwise {
        /// Where the value is.
        sreg: Register,
        /// Where it goes.
        dreg: Register,
        /// The bits kept.
        mask: Bytes,
        /// The bits flipped; as long as `mask`.
        xor: Bytes,
    },
    /// Changes the byte order of numbers.
    Byteorder {
        /// Where the value is.
        sreg: Register,
        /// Where it goes.
        dreg: Register,
        /// From and to.
        op: ByteorderOp,
        /// How many bytes.
        len: u32,
        /// How many bytes each number has.
        size: u32,
    },
    /// Loads a constant.
    Immediate {
        /// Where it goes.
        dreg: Register,
        /// The constant.
        data: Bytes,
    },
    /// Ends the rule with a verdict.
    ImmediateVerdict(Verdict),
    /// Looks a key up; ends the rule if it is not there, or, inverted, if it is.
    Lookup {
        /// The set or map.
        set: String,
        /// Where the key is.
        sreg: Register,
        /// Where a map's value goes.
        dreg: Option<Register>,
        /// Whether to go on only without the key.
        invert: bool,
    },
    /// Looks a key up in a map of verdicts and obeys.
    VerdictMap {
        /// The map.
        set: String,
        /// Where the key is.
        sreg: Register,
    },
    /// Makes a number below `modulus`, plus `offset`.
    Numgen {
        /// Where it goes.
        dreg: Register,
        /// How many numbers.
        modulus: u32,
        /// The smallest.
        offset: u32,
        /// At random, or one after the other.
        random: bool,
    },
    /// Asks the routing tables.
    Fib {
        /// For what.
        result: FibResult,
        /// About what.
        flags: FibFlags,
        /// Where the answer goes.
        dreg: Register,
    },
    /// Translates an address, and a port.
    Nat {
        /// Which.
        kind: NatKind,
        /// The address's family.
        family: Family,
        /// Where the new address is.
        addr: Register,
        /// Where the new port is.
        port: Option<Register>,
        /// How.
        flags: NatFlags,
    },
    /// Translates the source address to that of the interface the packet leaves by.
    Masquerade {
        /// How.
        flags: NatFlags,
    },
    /// Refuses the packet.
    Reject(RejectKind),
    /// Counts packets.
    Counter(CounterValue),
    /// Adds an element to a set, or deletes one.
    Dynset {
        /// The set.
        set: String,
        /// What to do.
        op: DynsetOp,
        /// Where the key is.
        key: Register,
        /// Where a map's value is.
        data: Option<Register>,
        /// How long the element lives, if not as long as the set says.
        timeout: Option<Duration>,
    },
    /// Anything else: its name and its attributes as they are.
    Unknown {
        /// The expression's name.
        name: String,
        /// Its encoded attributes.
        raw: Vec<u8>,
    },
}

/// As `nft --debug=netlink` prints it, with registers numbered in the 32-bit form.
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Payload { base, offset, len, dreg } => {
                write!(f, "[ payload load {len}b @ {base} + {offset} => {dreg} ]")
            }
            Self::Meta { key, dreg } => write!(f, "[ meta load {key} => {dreg} ]"),
            Self::MetaSet { key, sreg } => write!(f, "[ meta set {key} with {sreg} ]"),
            Self::Ct { key, direction: None, dreg } => write!(f, "[ ct load {key} => {dreg} ]"),
            Self::Ct { key, direction: Some(direction), dreg } => {
                write!(f, "[ ct load {key} => {dreg} , dir {direction} ]")
            }
            Self::CtSet { key, sreg } => write!(f, "[ ct set {key} with {sreg} ]"),
            Self::Cmp { op, sreg, data } => write!(f, "[ cmp {op} {sreg} {data} ]"),
            Self::Bitwise { sreg, dreg, mask, xor } => {
                write!(f, "[ bitwise {dreg} = ( {sreg} & {mask} ) ^ {xor} ]")
            }
            Self::Byteorder { sreg, dreg, op, len, size } => {
                write!(f, "[ byteorder {dreg} = {op}({sreg}, {size}, {len}) ]")
            }
            Self::Immediate { dreg, data } => write!(f, "[ immediate {dreg} {data} ]"),
            Self::ImmediateVerdict(verdict) => write!(f, "[ immediate reg 0 {verdict} ]"),
            Self::Lookup { set, sreg, dreg, invert } => {
                write!(f, "[ lookup {sreg} set {set}")?;
                if let Some(dreg) = dreg {
                    write!(f, " => {dreg}")?;
                }
                f.write_str(if *invert { " inverted ]" } else { " ]" })
            }
            Self::VerdictMap { set, sreg } => write!(f, "[ lookup {sreg} set {set} => reg 0 ]"),
            Self::Numgen { dreg, modulus, offset, random } => {
                let how = if *random { "random" } else { "inc" };
                write!(f, "[ numgen {dreg} = {how} mod {modulus}")?;
                if *offset != 0 {
                    write!(f, " offset {offset}")?;
                }
                f.write_str(" ]")
            }
            Self::Fib { result, flags, dreg } => write!(f, "[ fib {flags} {result} => {dreg} ]"),
            Self::Nat { kind, family, addr, port, flags } => {
                write!(f, "[ nat {kind} {family} addr {addr}")?;
                if let Some(port) = port {
                    write!(f, " proto {port}")?;
                }
                if !flags.is_empty() {
                    write!(f, " flags {flags}")?;
                }
                f.write_str(" ]")
            }
            Self::Masquerade { flags } if flags.is_empty() => f.write_str("[ masq ]"),
            Self::Masquerade { flags } => write!(f, "[ masq flags {flags} ]"),
            Self::Reject(RejectKind::IcmpUnreach(code)) => write!(f, "[ reject icmp code {code} ]"),
            Self::Reject(RejectKind::TcpReset) => f.write_str("[ reject tcp reset ]"),
            Self::Reject(RejectKind::IcmpxUnreach(code)) => write!(f, "[ reject icmpx code {code} ]"),
            Self::Counter(_) => f.write_str("[ counter ]"),
            Self::Dynset { set, op, key, data, timeout } => {
                write!(f, "[ dynset {op} {key} set {set}")?;
                if let Some(data) = data {
                    write!(f, " sreg_data {data}")?;
                }
                if let Some(timeout) = timeout {
                    write!(f, " timeout {}ms", timeout.as_millis())?;
                }
                f.write_str(" ]")
            }
            Self::Unknown { name, raw } => write!(f, "[ {name} {} ]", Bytes::from(raw.as_slice())),
        }
    }
}
