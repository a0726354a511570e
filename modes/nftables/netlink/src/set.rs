//! Sets, maps and their elements.

use std::fmt;
use std::time::Duration;

use netlink_requests::{Attributes, Writer, be32, be64, text};

use crate::bytes::Bytes;
use crate::object::Verdict;
use crate::vocabulary::flags;
use crate::wire::{comment_data, find_user_data, push_user_data};

/// The type of one field of a key or of a map's data: the kernel cares for its length only, the rest is for nft(8),
/// which chooses from it how to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FieldType {
    /// `ipv4_addr`, 4 bytes.
    Ipv4Addr,
    /// `ipv6_addr`, 16 bytes.
    Ipv6Addr,
    /// `inet_proto`, 1 byte.
    InetProto,
    /// `inet_service`: a port, 2 bytes, big endian.
    InetService,
    /// `mark`, 4 bytes, in the machine's byte order.
    Mark,
    /// `classid`: what `meta priority` holds, 4 bytes, in the machine's byte order.
    ClassId,
    /// `ifname`, 16 bytes, filled up with zeroes.
    IfName,
    /// Any other type.
    Other {
        /// nft's number for it.
        id: u8,
        /// Its length in bytes; 0 if a dump does not tell.
        len: u8,
    },
}

const FIELD_TYPES: [FieldType; 7] = [
    FieldType::Ipv4Addr,
    FieldType::Ipv6Addr,
    FieldType::InetProto,
    FieldType::InetService,
    FieldType::Mark,
    FieldType::ClassId,
    FieldType::IfName,
];

/// How many bits one field takes in the type number of a concatenation.
const TYPE_BITS: u32 = 6;
const HOST_ENDIAN: u32 = 1;
const BIG_ENDIAN: u32 = 2;

impl FieldType {
    /// nft's number for the type (`enum datatypes`).
    fn id(self) -> u8 {
        match self {
            Self::Ipv4Addr => 7,
            Self::Ipv6Addr => 8,
            Self::InetProto => 12,
            Self::InetService => 13,
            Self::Mark => 19,
            Self::ClassId => 23,
            Self::IfName => 41,
            Self::Other { id, .. } => id,
        }
    }

    /// The length of a value in bytes, without padding.
    pub fn len(self) -> usize {
        match self {
            Self::InetProto => 1,
            Self::InetService => 2,
            Self::Ipv4Addr | Self::Mark | Self::ClassId => 4,
            Self::Ipv6Addr | Self::IfName => 16,
            Self::Other { len, .. } => usize::from(len),
        }
    }

    /// Whether values have no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    fn byteorder(self) -> u32 {
        match self {
            Self::Ipv4Addr | Self::Ipv6Addr | Self::InetProto | Self::InetService => BIG_ENDIAN,
            Self::Mark | Self::ClassId | Self::IfName | Self::Other { .. } => HOST_ENDIAN,
        }
    }

    fn from_id(id: u8) -> Self {
        FIELD_TYPES.into_iter().find(|t| t.id() == id).unwrap_or(Self::Other { id, len: 0 })
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4Addr => "ipv4_addr",
            Self::Ipv6Addr => "ipv6_addr",
            Self::InetProto => "inet_proto",
            Self::InetService => "inet_service",
            Self::Mark => "mark",
            Self::ClassId => "classid",
            Self::IfName => "ifname",
            Self::Other { id, .. } => return write!(f, "type{id}"),
        })
    }
}

/// A type number: one field's id, or those of a concatenation one after the other.
fn type_number(fields: &[FieldType]) -> u32 {
    fields.iter().fold(0, |number, field| number << TYPE_BITS | u32::from(field.id()))
}

/// The length of a value: a lone field as it is, the fields of a concatenation padded to four bytes each.
fn value_length(fields: &[FieldType]) -> usize {
    match fields {
        [field] => field.len(),
        fields => fields.iter().map(|field| field.len().next_multiple_of(4)).sum(),
    }
}

/// What nft(8) needs to know to print values. It takes the order of a concatenation from its fields.
fn byteorder(fields: &[FieldType]) -> Option<u32> {
    match fields {
        [field] => Some(field.byteorder()),
        _ => None,
    }
}

fn fields_of(mut number: u32, length: usize) -> Vec<FieldType> {
    let mut fields = Vec::new();
    while number != 0 {
        fields.push(FieldType::from_id((number & ((1 << TYPE_BITS) - 1)) as u8));
        number >>= TYPE_BITS;
    }
    fields.reverse();
    if let [FieldType::Other { len, .. }] = fields.as_mut_slice() {
        *len = u8::try_from(length).unwrap_or(u8::MAX);
    }
    fields
}

/// What a map maps to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapData {
    /// Verdicts.
    Verdict,
    /// Values: one field, or a concatenation of several.
    Fields(Vec<FieldType>),
}

flags! {
    /// The properties of a set. Being a map and being a concatenation of intervals follow from the rest of [`Set`].
    pub struct SetFlags {
        /// Written by the kernel's own users only: a rule's literal set.
        ANONYMOUS = 0x1 "anonymous",
        /// Never changes after its creation.
        CONSTANT = 0x2 "constant",
        /// Keys are ranges.
        INTERVAL = 0x4 "interval",
        /// Elements expire.
        TIMEOUT = 0x10 "timeout",
        /// Rules add elements.
        DYNAMIC = 0x20 "dynamic",
    }
}

const FLAG_MAP: u32 = 0x8;
const FLAG_CONCAT: u32 = 0x80;
const VERDICT_TYPE: u32 = 0xffff_ff00;

/// A set, or a map if it has data.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    /// Its name, unique within the table.
    pub name: String,
    /// The fields of a key.
    pub key: Vec<FieldType>,
    /// What a map maps to; `None` makes it a set.
    pub data: Option<MapData>,
    /// Its properties.
    pub flags: SetFlags,
    /// When elements expire that do not say so themselves.
    pub timeout: Option<Duration>,
    /// How many elements it may hold. Worth giving: the kernel allocates its hash table once, instead of growing it.
    /// A set that a rule adds elements to needs a size; the kernel makes it 65535 if there is none.
    pub size: Option<u32>,
    /// A comment of up to 127 bytes, listed by nft(8); what is longer is cut.
    pub comment: Option<String>,
}

pub(crate) const SET_TABLE: u16 = 1;
pub(crate) const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DATA_TYPE: u16 = 6;
const SET_DATA_LEN: u16 = 7;
const SET_DESC: u16 = 9;
const SET_ID: u16 = 10;
const SET_TIMEOUT: u16 = 11;
const SET_USERDATA: u16 = 13;
const DESC_SIZE: u16 = 1;
const DESC_CONCAT: u16 = 2;
const LIST_ELEM: u16 = 1;
const FIELD_LEN: u16 = 1;
const UDATA_KEY_BYTEORDER: u8 = 0;
const UDATA_DATA_BYTEORDER: u8 = 1;
const UDATA_COMMENT: u8 = 7;

impl Set {
    /// A set of these keys.
    pub fn new(name: impl Into<String>, key: Vec<FieldType>) -> Self {
        Self {
            name: name.into(),
            key,
            data: None,
            flags: SetFlags::default(),
            timeout: None,
            size: None,
            comment: None,
        }
    }

    /// A map from these keys to this data.
    pub fn map(name: impl Into<String>, key: Vec<FieldType>, data: MapData) -> Self {
        Self { data: Some(data), ..Self::new(name, key) }
    }

    /// How many bytes a key has.
    pub fn key_len(&self) -> usize {
        value_length(&self.key)
    }

    pub(crate) fn encode(&self, w: &mut Writer, table: &str, id: u32) {
        let ranges_of_several = self.flags.contains(SetFlags::INTERVAL) && self.key.len() > 1;
        let mut flags = self.flags.bits();
        if self.data.is_some() {
            flags |= FLAG_MAP;
        }
        if ranges_of_several {
            flags |= FLAG_CONCAT;
        }
        let mut user_data = Vec::new();
        if let Some(order) = byteorder(&self.key) {
            push_user_data(&mut user_data, UDATA_KEY_BYTEORDER, &order.to_ne_bytes());
        }
        w.string(SET_TABLE, table);
        w.string(SET_NAME, &self.name);
        w.u32(SET_FLAGS, flags);
        w.u32(SET_KEY_TYPE, type_number(&self.key));
        w.u32(SET_KEY_LEN, value_length(&self.key) as u32);
        match &self.data {
            None => {}
            Some(MapData::Verdict) => w.u32(SET_DATA_TYPE, VERDICT_TYPE),
            Some(MapData::Fields(fields)) => {
                w.u32(SET_DATA_TYPE, type_number(fields));
                w.u32(SET_DATA_LEN, value_length(fields) as u32);
                if let Some(order) = byteorder(fields) {
                    push_user_data(&mut user_data, UDATA_DATA_BYTEORDER, &order.to_ne_bytes());
                }
            }
        }
        w.u32(SET_ID, id);
        if self.size.is_some() || ranges_of_several {
            w.nest(SET_DESC, |w| {
                if let Some(size) = self.size {
                    w.u32(DESC_SIZE, size);
                }
                if ranges_of_several {
                    w.nest(DESC_CONCAT, |w| {
                        for field in &self.key {
                            w.nest(LIST_ELEM, |w| w.u32(FIELD_LEN, field.len() as u32));
                        }
                    });
                }
            });
        }
        if let Some(timeout) = self.timeout {
            w.u64(SET_TIMEOUT, milliseconds(timeout));
        }
        if let Some(comment) = &self.comment {
            user_data.extend(comment_data(UDATA_COMMENT, comment));
        }
        if !user_data.is_empty() {
            w.attribute(SET_USERDATA, &user_data);
        }
    }

    pub(crate) fn decode(attributes: &[u8]) -> Result<Self, &'static str> {
        let number = |kind| Attributes::find(attributes, kind).and_then(be32);
        let name = Attributes::find(attributes, SET_NAME).and_then(text).ok_or("set without a name")?;
        let flags = number(SET_FLAGS).unwrap_or(0);
        let data = (flags & FLAG_MAP != 0).then(|| match number(SET_DATA_TYPE) {
            Some(VERDICT_TYPE) => MapData::Verdict,
            number_ => {
                MapData::Fields(fields_of(number_.unwrap_or(0), number(SET_DATA_LEN).unwrap_or(0) as usize))
            }
        });
        let comment = Attributes::find(attributes, SET_USERDATA)
            .and_then(|data| find_user_data(data, UDATA_COMMENT))
            .and_then(text);
        Ok(Self {
            name: name.to_owned(),
            key: fields_of(number(SET_KEY_TYPE).unwrap_or(0), number(SET_KEY_LEN).unwrap_or(0) as usize),
            data,
            flags: SetFlags::from_bits(flags & !(FLAG_MAP | FLAG_CONCAT)),
            timeout: Attributes::find(attributes, SET_TIMEOUT).and_then(duration),
            size: Attributes::find(attributes, SET_DESC)
                .and_then(|desc| Attributes::find(desc, DESC_SIZE))
                .and_then(be32),
            comment: comment.map(str::to_owned),
        })
    }
}

/// What an element of a map maps to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ElementData {
    /// A value.
    Value(Bytes),
    /// A verdict.
    Verdict(Verdict),
}

/// An element of a set or a map.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// The key, fields padded to four bytes if there are several. Empty means the catch-all element (`*`).
    pub key: Bytes,
    /// The last key of a range, inclusive, in a set of concatenated intervals. (A set of plain intervals has two
    /// elements per range instead: the first key, and the key after the last with `interval_end`.)
    pub key_end: Option<Bytes>,
    /// What the key maps to, in a map.
    pub data: Option<ElementData>,
    /// Whether the key is the end of a range, which is not part of it any more, in a set of plain intervals.
    pub interval_end: bool,
    /// How long the element lives.
    pub timeout: Option<Duration>,
    /// How long it still has to live.
    pub expiration: Option<Duration>,
}

pub(crate) const ELEMENTS_TABLE: u16 = 1;
pub(crate) const ELEMENTS_SET: u16 = 2;
pub(crate) const ELEMENTS_LIST: u16 = 3;
const ELEM_KEY: u16 = 1;
const ELEM_DATA: u16 = 2;
const ELEM_FLAGS: u16 = 3;
const ELEM_TIMEOUT: u16 = 4;
const ELEM_EXPIRATION: u16 = 5;
const ELEM_KEY_END: u16 = 10;
const FLAG_INTERVAL_END: u32 = 1;
const FLAG_CATCH_ALL: u32 = 2;
pub(crate) const DATA_VALUE: u16 = 1;
pub(crate) const DATA_VERDICT: u16 = 2;

impl Element {
    /// An element of a set.
    pub fn new(key: impl Into<Bytes>) -> Self {
        Self { key: key.into(), ..Self::default() }
    }

    /// An element of a map.
    pub fn value(key: impl Into<Bytes>, data: impl Into<Bytes>) -> Self {
        Self { data: Some(ElementData::Value(data.into())), ..Self::new(key) }
    }

    /// An element of a verdict map.
    pub fn verdict(key: impl Into<Bytes>, verdict: Verdict) -> Self {
        Self { data: Some(ElementData::Verdict(verdict)), ..Self::new(key) }
    }

    /// Writes the element, or, to delete it, only what identifies it.
    pub(crate) fn encode(&self, w: &mut Writer, delete: bool) {
        w.nest(LIST_ELEM, |w| {
            let mut flags = 0;
            if self.key.is_empty() {
                flags |= FLAG_CATCH_ALL;
            } else {
                w.nest(ELEM_KEY, |w| w.attribute(DATA_VALUE, &self.key));
            }
            if let Some(end) = &self.key_end {
                w.nest(ELEM_KEY_END, |w| w.attribute(DATA_VALUE, end));
            }
            if self.interval_end {
                flags |= FLAG_INTERVAL_END;
            }
            if flags != 0 {
                w.u32(ELEM_FLAGS, flags);
            }
            if delete {
                return;
            }
            match &self.data {
                None => {}
                Some(ElementData::Value(value)) => w.nest(ELEM_DATA, |w| w.attribute(DATA_VALUE, value)),
                Some(ElementData::Verdict(verdict)) => {
                    w.nest(ELEM_DATA, |w| w.nest(DATA_VERDICT, |w| verdict.encode(w)));
                }
            }
            if let Some(timeout) = self.timeout {
                w.u64(ELEM_TIMEOUT, milliseconds(timeout));
            }
            if let Some(expiration) = self.expiration {
                w.u64(ELEM_EXPIRATION, milliseconds(expiration));
            }
        });
    }

    pub(crate) fn decode(attributes: &[u8]) -> Self {
        let mut element = Self::default();
        for (kind, value) in Attributes::new(attributes) {
            match kind {
                ELEM_KEY => element.key = data_value(value).unwrap_or_default(),
                ELEM_KEY_END => element.key_end = data_value(value),
                ELEM_DATA => {
                    element.data = match Attributes::new(value).next() {
                        Some((DATA_VALUE, value)) => Some(ElementData::Value(value.into())),
                        Some((DATA_VERDICT, verdict)) => Verdict::decode(verdict).map(ElementData::Verdict),
                        _ => None,
                    }
                }
                ELEM_FLAGS => element.interval_end = be32(value).unwrap_or(0) & FLAG_INTERVAL_END != 0,
                ELEM_TIMEOUT => element.timeout = duration(value),
                ELEM_EXPIRATION => element.expiration = duration(value),
                _ => {}
            }
        }
        element
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() {
            f.write_str("*")?;
        } else {
            write!(f, "{}", self.key)?;
        }
        if let Some(end) = &self.key_end {
            write!(f, " - {end}")?;
        }
        if self.interval_end {
            f.write_str(" (end)")?;
        }
        if let Some(timeout) = self.timeout {
            write!(f, " timeout {timeout:?}")?;
        }
        match &self.data {
            None => Ok(()),
            Some(ElementData::Value(value)) => write!(f, " : {value}"),
            Some(ElementData::Verdict(verdict)) => write!(f, " : {verdict}"),
        }
    }
}

fn data_value(data: &[u8]) -> Option<Bytes> {
    Attributes::find(data, DATA_VALUE).map(Bytes::from)
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds; none is no duration.
pub(crate) fn duration(value: &[u8]) -> Option<Duration> {
    be64(value).filter(|&ms| ms != 0).map(Duration::from_millis)
}
