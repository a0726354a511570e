//! The rules of Service ports with session affinity.

use std::time::Duration;

use nft_netlink::{Bytes, CmpOp, DynsetOp, Expr, MetaKey, NatFlags, NatKind, Verdict};
use shunt_core::id::Protocol;

use crate::affinity::{self, ID_MASK, NUMBER_MAX, SECOND_LIST_BIT, classid};
use crate::layout::{Leg, List, SetKey};

use super::builder::Builder;
use super::{Rule, Skeleton, class, reg};

/// The rules of the chain of a class with affinity, where it is not that of the Service port itself.
pub fn affinity_class(skeleton: &Skeleton, id: u32, port: &str, legs: [Leg; 3]) -> Vec<Rule> {
    class(skeleton, legs, |list| affinity::chain_name(id, list, port))
}

/// What the rules of a Service port with affinity depend on, besides the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AffinityRules {
    /// The Service port.
    pub id: u32,
    /// Its protocol.
    pub protocol: Protocol,
    /// How long a client is remembered after its last new connection.
    pub timeout: Duration,
}

/// The rules of a Service port with affinity for one list of `count` endpoints.
///
/// The token is in `meta priority`, as the class was before. Updating an element gives it new life but
/// not new data: so a record that leads nowhere is deleted before another one is written. Two lookups of
/// which the second follows from the first are separate rules, as everywhere.
pub fn affinity(skeleton: &Skeleton, of: AffinityRules, list: List, count: u32) -> Vec<Rule> {
    let mut rules = affinity_recall(skeleton, of.id).to_vec();
    rules.push(affinity_go(skeleton, of, list, true));

    // What was recalled leads nowhere any more.
    let mut rule = Builder::new(skeleton);
    rule.load_meta(MetaKey::Priority, 0);
    rule.bitwise(0, NUMBER_MAX, 0);
    rule.compare(CmpOp::Neq, 0, &[0; 4]);
    rule.say(format!("meta priority & {} != none", classid(NUMBER_MAX)));
    rule.dynset(DynsetOp::Delete, None);
    rules.push(rule.done());

    if count > 0 {
        rules.push(affinity_choose(skeleton, list, count));
        // Another connection of the client may be here at the same time: what one of them has recorded
        // counts for both.
        let mut rule = Builder::new(skeleton);
        rule.dynset(DynsetOp::Update, Some(of.timeout));
        rules.push(rule.done());
        rules.extend(affinity_recall(skeleton, of.id));
        rules.push(affinity_go(skeleton, of, list, false));
        // No more clients can be remembered, or a commit took the chosen endpoint away: see `pick`.
        rules.push(affinity_choose(skeleton, list, 1));
        rules.push(affinity_go(skeleton, of, list, false));
    }
    rules.push(Builder::new(skeleton).verdict(Verdict::Drop));
    rules
}

/// Takes the token from the record of the packet's source. Without one, the id is left, and no endpoint.
fn affinity_recall(skeleton: &Skeleton, id: u32) -> [Rule; 2] {
    let mut start = Builder::new(skeleton);
    let none = affinity::id_part(id);
    start.exprs.push(Expr::Immediate { dreg: reg(0), data: Bytes::from(&none.to_ne_bytes()[..]) });
    start.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    start.say(format!("meta priority set {}", classid(none)));

    let mut recall = Builder::new(skeleton);
    let at = recall.load_meta(MetaKey::Priority, 0);
    recall.load_address(true, at);
    recall.lookup(SetKey::Affinity, Some(0), false);
    recall.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    let ip = recall.ip();
    recall.say(format!("meta priority set meta priority . {ip} saddr map @{}", SetKey::Affinity));
    [start.done(), recall.done()]
}

/// Translates to the endpoint that the token stands for, if it stands for one, and renews the record.
fn affinity_go(skeleton: &Skeleton, of: AffinityRules, list: List, record: bool) -> Rule {
    let mut rule = Builder::new(skeleton);
    // Always so: nft wants to see the protocol before a port.
    rule.load_meta(MetaKey::L4Proto, 0);
    rule.compare(CmpOp::Eq, 0, &[of.protocol.number()]);
    rule.say(format!("meta l4proto {}", of.protocol));
    // The lookup comes first, so that only what leads somewhere is recorded; its registers are those
    // behind key and data of the record.
    let at = if record { rule.words() + 2 } else { 0 };
    rule.load_meta(MetaKey::Priority, at);
    let mut token = "meta priority".to_owned();
    if list == List::Second {
        rule.bitwise(at, !SECOND_LIST_BIT, SECOND_LIST_BIT);
        token = format!("{token} | {}", classid(SECOND_LIST_BIT));
    }
    rule.exprs.push(Expr::Lookup {
        set: SetKey::AffinityEndpoints.to_string(),
        sreg: reg(at),
        dreg: Some(reg(at)),
        invert: false,
    });
    if record {
        rule.dynset(DynsetOp::Update, Some(of.timeout));
    }
    let zero = at + rule.words() + 1;
    rule.exprs.push(Expr::Immediate { dreg: reg(zero), data: Bytes::from(&[0_u8; 4][..]) });
    rule.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(zero) });
    rule.exprs.push(Expr::Nat {
        kind: NatKind::Dnat,
        family: crate::family(skeleton.family),
        addr: reg(at),
        port: Some(reg(at + rule.words())),
        flags: NatFlags::default(),
    });
    let ip = rule.ip();
    rule.say(format!("meta priority set none dnat {ip} to {token} map @{}", SetKey::AffinityEndpoints));
    rule.done()
}

/// Chooses one of `count` endpoints: its token takes the place of the one that there was.
fn affinity_choose(skeleton: &Skeleton, list: List, count: u32) -> Rule {
    let mut rule = Builder::new(skeleton);
    rule.load_meta(MetaKey::Priority, 0);
    rule.bitwise(0, ID_MASK, 0);
    let offset = list.base();
    rule.exprs.push(Expr::Numgen { dreg: reg(1), modulus: count, offset, random: true });
    rule.lookup(SetKey::AffinitySlots, Some(0), false);
    rule.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    let offset = if offset == 0 { String::new() } else { format!(" offset {offset}") };
    rule.say(format!(
        "meta priority set meta priority & {} . numgen random mod {count}{offset} map @{}",
        classid(ID_MASK),
        SetKey::AffinitySlots
    ));
    rule.done()
}
