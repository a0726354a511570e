//! Expressions to attributes and back.

use netlink_requests::{Attributes, Writer, be32, be64, text};

use crate::bytes::Bytes;
use crate::expr::Expr;
use crate::object::{Family, Verdict};
use crate::set::{DATA_VALUE, DATA_VERDICT, duration, milliseconds};
use crate::vocabulary::{
    ByteorderOp, CmpOp, CounterValue, CtDirection, CtKey, DynsetOp, FibFlags, FibResult, MetaKey, NatFlags,
    NatKind, PayloadBase, Register, RejectKind,
};

const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;

/// The verdict register's number.
const VERDICT: u32 = 0;

// Attribute numbers, from linux/netfilter/nf_tables.h.
const PAYLOAD_DREG: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LEN: u16 = 4;
const META_DREG: u16 = 1;
const META_KEY: u16 = 2;
const META_SREG: u16 = 3;
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_DIRECTION: u16 = 3;
const CT_SREG: u16 = 4;
const CMP_SREG: u16 = 1;
const CMP_OP: u16 = 2;
const CMP_DATA: u16 = 3;
const BITWISE_SREG: u16 = 1;
const BITWISE_DREG: u16 = 2;
const BITWISE_LEN: u16 = 3;
const BITWISE_MASK: u16 = 4;
const BITWISE_XOR: u16 = 5;
const BITWISE_OP: u16 = 6;
const BYTEORDER_SREG: u16 = 1;
const BYTEORDER_DREG: u16 = 2;
const BYTEORDER_OP: u16 = 3;
const BYTEORDER_LEN: u16 = 4;
const BYTEORDER_SIZE: u16 = 5;
const IMMEDIATE_DREG: u16 = 1;
const IMMEDIATE_DATA: u16 = 2;
const LOOKUP_SET: u16 = 1;
const LOOKUP_SREG: u16 = 2;
const LOOKUP_DREG: u16 = 3;
const LOOKUP_FLAGS: u16 = 5;
const LOOKUP_INVERT: u32 = 1;
const NUMGEN_DREG: u16 = 1;
const NUMGEN_MODULUS: u16 = 2;
const NUMGEN_TYPE: u16 = 3;
const NUMGEN_OFFSET: u16 = 4;
const FIB_DREG: u16 = 1;
const FIB_RESULT: u16 = 2;
const FIB_FLAGS: u16 = 3;
const NAT_TYPE: u16 = 1;
const NAT_FAMILY: u16 = 2;
const NAT_ADDR_MIN: u16 = 3;
const NAT_ADDR_MAX: u16 = 4;
const NAT_PORT_MIN: u16 = 5;
const NAT_PORT_MAX: u16 = 6;
const NAT_FLAGS: u16 = 7;
/// Bits that say which of the registers above are used; the kernel sets them itself.
const NAT_FLAGS_IMPLIED: u32 = 0x3;
const MASQ_FLAGS: u16 = 1;
const REJECT_TYPE: u16 = 1;
const REJECT_CODE: u16 = 2;
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;
const COUNTER_PAD: u16 = 3;
const DYNSET_SET: u16 = 1;
const DYNSET_OP: u16 = 3;
const DYNSET_KEY: u16 = 4;
const DYNSET_DATA: u16 = 5;
const DYNSET_TIMEOUT: u16 = 6;
const DYNSET_PAD: u16 = 8;
const DYNSET_FLAGS: u16 = 9;

/// Attributes that many expressions have.
trait Operands {
    fn register(&mut self, kind: u16, register: Register);
    fn data(&mut self, kind: u16, value: &[u8]);
}

impl Operands for Writer {
    fn register(&mut self, kind: u16, register: Register) {
        self.u32(kind, u32::from(register.number()));
    }

    fn data(&mut self, kind: u16, value: &[u8]) {
        self.nest(kind, |w| w.attribute(DATA_VALUE, value));
    }
}

impl Expr {
    fn name(&self) -> &str {
        match self {
            Self::Payload { .. } => "payload",
            Self::Meta { .. } | Self::MetaSet { .. } => "meta",
            Self::Ct { .. } | Self::CtSet { .. } => "ct",
            Self::Cmp { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Byteorder { .. } => "byteorder",
            Self::Immediate { .. } | Self::ImmediateVerdict(_) => "immediate",
            Self::Lookup { .. } | Self::VerdictMap { .. } => "lookup",
            Self::Numgen { .. } => "numgen",
            Self::Fib { .. } => "fib",
            Self::Nat { .. } => "nat",
            Self::Masquerade { .. } => "masq",
            Self::Reject(_) => "reject",
            Self::Counter(_) => "counter",
            Self::Dynset { .. } => "dynset",
            Self::Unknown { name, .. } => name,
        }
    }

    /// Writes the expression as an element of a rule's list.
    pub(crate) fn encode(&self, w: &mut Writer) {
        w.nest(LIST_ELEM, |w| {
            w.string(EXPR_NAME, self.name());
            w.nest(EXPR_DATA, |w| self.encode_data(w));
        });
    }

    fn encode_data(&self, w: &mut Writer) {
        match self {
            Self::Payload { base, offset, len, dreg } => {
                w.register(PAYLOAD_DREG, *dreg);
                w.u32(PAYLOAD_BASE, base.number());
                w.u32(PAYLOAD_OFFSET, *offset);
                w.u32(PAYLOAD_LEN, *len);
            }
            Self::Meta { key, dreg } => {
                w.register(META_DREG, *dreg);
                w.u32(META_KEY, key.number());
            }
            Self::MetaSet { key, sreg } => {
                w.u32(META_KEY, key.number());
                w.register(META_SREG, *sreg);
            }
            Self::Ct { key, direction, dreg } => {
                w.register(CT_DREG, *dreg);
                w.u32(CT_KEY, key.number());
                if let Some(direction) = direction {
                    w.attribute(CT_DIRECTION, &[direction.number() as u8]);
                }
            }
            Self::CtSet { key, sreg } => {
                w.u32(CT_KEY, key.number());
                w.register(CT_SREG, *sreg);
            }
            Self::Cmp { op, sreg, data } => {
                w.register(CMP_SREG, *sreg);
                w.u32(CMP_OP, op.number());
                w.data(CMP_DATA, data);
            }
            Self::Bitwise { sreg, dreg, mask, xor } => {
                w.register(BITWISE_SREG, *sreg);
                w.register(BITWISE_DREG, *dreg);
                w.u32(BITWISE_LEN, mask.len() as u32);
                w.data(BITWISE_MASK, mask);
                w.data(BITWISE_XOR, xor);
            }
            Self::Byteorder { sreg, dreg, op, len, size } => {
                w.register(BYTEORDER_SREG, *sreg);
                w.register(BYTEORDER_DREG, *dreg);
                w.u32(BYTEORDER_OP, op.number());
                w.u32(BYTEORDER_LEN, *len);
                w.u32(BYTEORDER_SIZE, *size);
            }
            Self::Immediate { dreg, data } => {
                w.register(IMMEDIATE_DREG, *dreg);
                w.data(IMMEDIATE_DATA, data);
            }
            Self::ImmediateVerdict(verdict) => {
                w.u32(IMMEDIATE_DREG, VERDICT);
                w.nest(IMMEDIATE_DATA, |w| w.nest(DATA_VERDICT, |w| verdict.encode(w)));
            }
            Self::Lookup { set, sreg, dreg, invert } => {
                w.string(LOOKUP_SET, set);
                w.register(LOOKUP_SREG, *sreg);
                if let Some(dreg) = dreg {
                    w.register(LOOKUP_DREG, *dreg);
                }
                if *invert {
                    w.u32(LOOKUP_FLAGS, LOOKUP_INVERT);
                }
            }
            Self::VerdictMap { set, sreg } => {
                w.string(LOOKUP_SET, set);
                w.register(LOOKUP_SREG, *sreg);
                w.u32(LOOKUP_DREG, VERDICT);
            }
            Self::Numgen { dreg, modulus, offset, random } => {
                w.register(NUMGEN_DREG, *dreg);
                w.u32(NUMGEN_MODULUS, *modulus);
                w.u32(NUMGEN_TYPE, u32::from(*random));
                w.u32(NUMGEN_OFFSET, *offset);
            }
            Self::Fib { result, flags, dreg } => {
                w.register(FIB_DREG, *dreg);
                w.u32(FIB_RESULT, result.number());
                w.u32(FIB_FLAGS, flags.bits());
            }
            Self::Nat { kind, family, addr, port, flags } => {
                w.u32(NAT_TYPE, kind.number());
                w.u32(NAT_FAMILY, u32::from(u8::from(family.netfilter())));
                w.register(NAT_ADDR_MIN, *addr);
                if let Some(port) = port {
                    w.register(NAT_PORT_MIN, *port);
                }
                if !flags.is_empty() {
                    w.u32(NAT_FLAGS, flags.bits());
                }
            }
            Self::Masquerade { flags } => {
                if !flags.is_empty() {
                    w.u32(MASQ_FLAGS, flags.bits());
                }
            }
            Self::Reject(kind) => {
                let (number, code) = match *kind {
                    RejectKind::IcmpUnreach(code) => (0, Some(code)),
                    RejectKind::TcpReset => (1, None),
                    RejectKind::IcmpxUnreach(code) => (2, Some(code)),
                };
                w.u32(REJECT_TYPE, number);
                if let Some(code) = code {
                    w.attribute(REJECT_CODE, &[code]);
                }
            }
            Self::Counter(CounterValue { packets, bytes }) => {
                w.u64(COUNTER_BYTES, *bytes);
                w.u64(COUNTER_PACKETS, *packets);
            }
            Self::Dynset { set, op, key, data, timeout } => {
                w.string(DYNSET_SET, set);
                w.u32(DYNSET_OP, op.number());
                w.register(DYNSET_KEY, *key);
                if let Some(data) = data {
                    w.register(DYNSET_DATA, *data);
                }
                if let Some(timeout) = timeout {
                    w.u64(DYNSET_TIMEOUT, milliseconds(*timeout));
                }
            }
            Self::Unknown { raw, .. } => w.header(raw),
        }
    }

    /// Reads an element of a rule's list.
    pub(crate) fn decode(element: &[u8]) -> Self {
        let name = Attributes::find(element, EXPR_NAME).and_then(text).unwrap_or_default();
        let raw = Attributes::find(element, EXPR_DATA).unwrap_or_default();
        Self::decode_data(name, raw)
            .unwrap_or_else(|| Self::Unknown { name: name.to_owned(), raw: raw.to_owned() })
    }

    /// `None` if there is anything this crate does not know how to say.
    fn decode_data(name: &str, raw: &[u8]) -> Option<Self> {
        let mut a = Slots::read(raw)?;
        let expr = match name {
            "payload" => Self::Payload {
                dreg: a.register(PAYLOAD_DREG)?,
                base: PayloadBase::from_number(a.u32(PAYLOAD_BASE)?)?,
                offset: a.u32(PAYLOAD_OFFSET)?,
                len: a.u32(PAYLOAD_LEN)?,
            },
            "meta" => {
                let key = MetaKey::from_number(a.u32(META_KEY)?)?;
                match a.register(META_DREG) {
                    Some(dreg) => Self::Meta { key, dreg },
                    None => Self::MetaSet { key, sreg: a.register(META_SREG)? },
                }
            }
            "ct" => {
                let key = CtKey::from_number(a.u32(CT_KEY)?)?;
                match a.register(CT_DREG) {
                    Some(dreg) => {
                        let direction = match a.take(CT_DIRECTION) {
                            None => None,
                            Some(&[direction]) => Some(CtDirection::from_number(direction.into())?),
                            Some(_) => return None,
                        };
                        Self::Ct { key, direction, dreg }
                    }
                    None => Self::CtSet { key, sreg: a.register(CT_SREG)? },
                }
            }
            "cmp" => Self::Cmp {
                sreg: a.register(CMP_SREG)?,
                op: CmpOp::from_number(a.u32(CMP_OP)?)?,
                data: a.data(CMP_DATA)?,
            },
            "bitwise" => {
                let (mask, xor) = (a.data(BITWISE_MASK)?, a.data(BITWISE_XOR)?);
                let len = a.u32(BITWISE_LEN)? as usize;
                if a.u32(BITWISE_OP).unwrap_or(0) != 0 || mask.len() != len {
                    return None;
                }
                Self::Bitwise { sreg: a.register(BITWISE_SREG)?, dreg: a.register(BITWISE_DREG)?, mask, xor }
            }
            "byteorder" => Self::Byteorder {
                sreg: a.register(BYTEORDER_SREG)?,
                dreg: a.register(BYTEORDER_DREG)?,
                op: ByteorderOp::from_number(a.u32(BYTEORDER_OP)?)?,
                len: a.u32(BYTEORDER_LEN)?,
                size: a.u32(BYTEORDER_SIZE)?,
            },
            "immediate" => match a.u32(IMMEDIATE_DREG)? {
                VERDICT => {
                    let verdict = Attributes::find(a.take(IMMEDIATE_DATA)?, DATA_VERDICT)?;
                    Self::ImmediateVerdict(Verdict::decode(verdict)?)
                }
                dreg => Self::Immediate { dreg: Register::from_number(dreg)?, data: a.data(IMMEDIATE_DATA)? },
            },
            "lookup" => {
                let set = a.text(LOOKUP_SET)?;
                let sreg = a.register(LOOKUP_SREG)?;
                let invert = match a.u32(LOOKUP_FLAGS).unwrap_or(0) {
                    0 => false,
                    LOOKUP_INVERT => true,
                    _ => return None,
                };
                match a.u32(LOOKUP_DREG) {
                    Some(VERDICT) if !invert => Self::VerdictMap { set, sreg },
                    None => Self::Lookup { set, sreg, dreg: None, invert },
                    Some(dreg) => {
                        Self::Lookup { set, sreg, dreg: Some(Register::from_number(dreg)?), invert }
                    }
                }
            }
            "numgen" => Self::Numgen {
                dreg: a.register(NUMGEN_DREG)?,
                modulus: a.u32(NUMGEN_MODULUS)?,
                offset: a.u32(NUMGEN_OFFSET).unwrap_or(0),
                random: match a.u32(NUMGEN_TYPE)? {
                    0 => false,
                    1 => true,
                    _ => return None,
                },
            },
            "fib" => Self::Fib {
                result: FibResult::from_number(a.u32(FIB_RESULT)?)?,
                flags: FibFlags::from_bits(a.u32(FIB_FLAGS)?),
                dreg: a.register(FIB_DREG)?,
            },
            "nat" => {
                let addr = a.register(NAT_ADDR_MIN)?;
                let port = a.register(NAT_PORT_MIN);
                let addr_max = a.register(NAT_ADDR_MAX).unwrap_or(addr);
                let port_max = a.register(NAT_PORT_MAX).or(port);
                if addr_max != addr || port_max != port {
                    return None;
                }
                Self::Nat {
                    kind: NatKind::from_number(a.u32(NAT_TYPE)?)?,
                    family: Family::from_number(a.u32(NAT_FAMILY)?)?,
                    addr,
                    port,
                    flags: nat_flags(a.u32(NAT_FLAGS).unwrap_or(0) & !NAT_FLAGS_IMPLIED)?,
                }
            }
            "masq" => Self::Masquerade { flags: nat_flags(a.u32(MASQ_FLAGS).unwrap_or(0))? },
            "reject" => {
                let kind = a.u32(REJECT_TYPE)?;
                Self::Reject(match (kind, a.take(REJECT_CODE)) {
                    (0, Some(&[code])) => RejectKind::IcmpUnreach(code),
                    (1, None) => RejectKind::TcpReset,
                    (2, Some(&[code])) => RejectKind::IcmpxUnreach(code),
                    _ => return None,
                })
            }
            "counter" => {
                a.take(COUNTER_PAD);
                Self::Counter(CounterValue {
                    packets: a.take(COUNTER_PACKETS).and_then(be64)?,
                    bytes: a.take(COUNTER_BYTES).and_then(be64)?,
                })
            }
            "dynset" => {
                a.take(DYNSET_PAD);
                if a.u32(DYNSET_FLAGS).unwrap_or(0) != 0 {
                    return None;
                }
                Self::Dynset {
                    set: a.text(DYNSET_SET)?,
                    op: DynsetOp::from_number(a.u32(DYNSET_OP)?)?,
                    key: a.register(DYNSET_KEY)?,
                    data: a.register(DYNSET_DATA),
                    timeout: a.take(DYNSET_TIMEOUT).and_then(duration),
                }
            }
            _ => return None,
        };
        a.is_empty().then_some(expr)
    }
}

fn nat_flags(bits: u32) -> Option<NatFlags> {
    let known = NatFlags::RANDOM | NatFlags::PERSISTENT | NatFlags::FULLY_RANDOM;
    (bits & !known.bits() == 0).then(|| NatFlags::from_bits(bits))
}

/// The attributes of an expression by number, each to be taken once: what is left over was not understood.
struct Slots<'a>([Option<&'a [u8]>; 16]);

impl<'a> Slots<'a> {
    fn read(raw: &'a [u8]) -> Option<Self> {
        let mut slots = [None; 16];
        let mut attributes = Attributes::new(raw);
        for (kind, value) in attributes.by_ref() {
            // The last of a kind counts for the kernel, but it never sends two.
            if slots.get_mut(usize::from(kind))?.replace(value).is_some() {
                return None;
            }
        }
        attributes.rest().is_empty().then_some(Self(slots))
    }

    fn take(&mut self, kind: u16) -> Option<&'a [u8]> {
        self.0.get_mut(usize::from(kind))?.take()
    }

    fn u32(&mut self, kind: u16) -> Option<u32> {
        // A number of the wrong length stays where it is, so that the expression counts as not understood.
        let number = be32((*self.0.get(usize::from(kind))?)?)?;
        self.take(kind);
        Some(number)
    }

    fn register(&mut self, kind: u16) -> Option<Register> {
        let register = Register::from_number(be32((*self.0.get(usize::from(kind))?)?)?)?;
        self.take(kind);
        Some(register)
    }

    fn text(&mut self, kind: u16) -> Option<String> {
        text(self.take(kind)?).map(str::to_owned)
    }

    fn data(&mut self, kind: u16) -> Option<Bytes> {
        Attributes::find(self.take(kind)?, DATA_VALUE).map(Bytes::from)
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn register() -> impl Strategy<Value = Register> {
        (0..16_u8).prop_map(|i| Register::new(i).unwrap())
    }

    fn bytes(len: impl Strategy<Value = usize>) -> impl Strategy<Value = Bytes> {
        len.prop_flat_map(|len| prop::collection::vec(any::<u8>(), len)).prop_map(Bytes::from)
    }

    fn nat_flags() -> impl Strategy<Value = NatFlags> {
        (0..8_u32).prop_map(|bits| NatFlags::from_bits(bits << 2))
    }

    fn timeout() -> impl Strategy<Value = Option<Duration>> {
        prop::option::of((1..1_u64 << 40).prop_map(Duration::from_millis))
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            prop::sample::select(vec![Verdict::Accept, Verdict::Drop, Verdict::Continue, Verdict::Return]),
            "[a-z0-9-]{1,40}".prop_map(Verdict::Jump),
            "[a-z0-9-]{1,40}".prop_map(Verdict::Goto),
            (2..100_i32).prop_map(Verdict::Other),
        ]
    }

    fn expr() -> impl Strategy<Value = Expr> {
        let r = register;
        prop_oneof![
            (prop::sample::select(PayloadBase::ALL), any::<u32>(), any::<u32>(), r())
                .prop_map(|(base, offset, len, dreg)| Expr::Payload { base, offset, len, dreg }),
            (prop::sample::select(MetaKey::ALL), r()).prop_map(|(key, dreg)| Expr::Meta { key, dreg }),
            (prop::sample::select(MetaKey::ALL), r()).prop_map(|(key, sreg)| Expr::MetaSet { key, sreg }),
            (prop::sample::select(CtKey::ALL), prop::option::of(prop::sample::select(CtDirection::ALL)), r())
                .prop_map(|(key, direction, dreg)| Expr::Ct { key, direction, dreg }),
            (prop::sample::select(CtKey::ALL), r()).prop_map(|(key, sreg)| Expr::CtSet { key, sreg }),
            (prop::sample::select(CmpOp::ALL), r(), bytes(1..65_usize))
                .prop_map(|(op, sreg, data)| Expr::Cmp { op, sreg, data }),
            (r(), r(), bytes(Just(16)), bytes(Just(16))).prop_map(|(sreg, dreg, mask, xor)| Expr::Bitwise {
                sreg,
                dreg,
                mask,
                xor
            }),
            (r(), r(), prop::sample::select(ByteorderOp::ALL), any::<u32>(), any::<u32>())
                .prop_map(|(sreg, dreg, op, len, size)| Expr::Byteorder { sreg, dreg, op, len, size }),
            (r(), bytes(1..65_usize)).prop_map(|(dreg, data)| Expr::Immediate { dreg, data }),
            verdict().prop_map(Expr::ImmediateVerdict),
            ("[a-z-]{1,40}", r(), prop::option::of(r()), any::<bool>())
                .prop_map(|(set, sreg, dreg, invert)| Expr::Lookup { set, sreg, dreg, invert }),
            ("[a-z-]{1,40}", r()).prop_map(|(set, sreg)| Expr::VerdictMap { set, sreg }),
            (r(), any::<u32>(), any::<u32>(), any::<bool>())
                .prop_map(|(dreg, modulus, offset, random)| Expr::Numgen { dreg, modulus, offset, random }),
            (prop::sample::select(FibResult::ALL), 0..64_u32, r()).prop_map(|(result, bits, dreg)| {
                Expr::Fib { result, flags: FibFlags::from_bits(bits), dreg }
            }),
            (
                prop::sample::select(NatKind::ALL),
                prop::sample::select(vec![Family::Ip, Family::Ip6]),
                r(),
                prop::option::of(r()),
                nat_flags()
            )
                .prop_map(|(kind, family, addr, port, flags)| Expr::Nat {
                    kind,
                    family,
                    addr,
                    port,
                    flags
                }),
            nat_flags().prop_map(|flags| Expr::Masquerade { flags }),
            any::<u8>().prop_map(|code| Expr::Reject(RejectKind::IcmpUnreach(code))),
            any::<u8>().prop_map(|code| Expr::Reject(RejectKind::IcmpxUnreach(code))),
            Just(Expr::Reject(RejectKind::TcpReset)),
            (any::<u64>(), any::<u64>())
                .prop_map(|(packets, bytes)| Expr::Counter(CounterValue { packets, bytes })),
            ("[a-z-]{1,40}", prop::sample::select(DynsetOp::ALL), r(), prop::option::of(r()), timeout())
                .prop_map(|(set, op, key, data, timeout)| Expr::Dynset { set, op, key, data, timeout }),
        ]
    }

    fn round_trip(expr: &Expr) -> Expr {
        let mut w = Writer::default();
        expr.encode(&mut w);
        assert!(!w.oversized());
        let (kind, element) = Attributes::new(w.as_bytes()).next().unwrap();
        assert_eq!(kind, LIST_ELEM);
        Expr::decode(element)
    }

    proptest! {
        #[test]
        fn every_expression_survives(expr in expr()) {
            prop_assert_eq!(round_trip(&expr), expr.clone());
            prop_assert!(expr.to_string().starts_with("[ "));
        }

        #[test]
        fn foreign_expressions_survive(
            name in prop::sample::select(vec!["payload", "meta", "ct", "nat", "lookup", "dynset", "limit"]),
            values in prop::collection::vec((0..20_u16, prop::collection::vec(any::<u8>(), 0..9)), 0..6),
        ) {
            let mut w = Writer::default();
            for (kind, value) in values {
                w.attribute(kind, &value);
            }
            // Whatever it decodes to, encoding that and decoding again must not change it.
            let once = round_trip(&Expr::Unknown { name: name.to_owned(), raw: w.as_bytes().to_vec() });
            prop_assert_eq!(round_trip(&once), once);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(name in "[a-z]{0,9}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Expr::decode(&bytes);
            for name in [name.as_str(), "nat", "lookup", "immediate", "cmp", "bitwise"] {
                let _ = Expr::decode_data(name, &bytes);
            }
        }
    }

    #[test]
    fn counters_are_equal_but_keep_their_values() {
        let busy = Expr::Counter(CounterValue { packets: 3, bytes: 180 });
        assert_eq!(busy, Expr::Counter(CounterValue::default()));
        let Expr::Counter(value) = round_trip(&busy) else { panic!() };
        assert_eq!((value.packets, value.bytes), (3, 180));
    }

    #[test]
    fn old_register_numbers() {
        let numbers: Vec<_> = (0..26).map(|n| Register::from_number(n).map(Register::number)).collect();
        assert_eq!(numbers[..9], [None, Some(8), Some(12), Some(16), Some(20), None, None, None, Some(8)]);
        assert_eq!(numbers[23..], [Some(23), None, None]);
    }
}
