//! The expressions rules are made of.

use std::fmt;
use std::time::Duration;

use crate::bytes::Bytes;
use crate::object::{Family, Verdict};
use crate::vocabulary::{
    ByteorderOp, CmpOp, CounterValue, CtDirection, CtKey, DynsetOp, FibFlags, FibResult, MetaKey, NatFlags,
    NatKind, PayloadBase, Register, RejectKind,
};

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
