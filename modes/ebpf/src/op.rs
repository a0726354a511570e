//! Operations on the maps, as values. Each alone is carried out by the kernel all at once.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use shunt_ebpf_abi::maglev::Member;
use shunt_ebpf_abi::{Address, Endpoint, Frontend, FrontendKey};

use crate::state::text::{
    address_text, endpoint_text, frontend_text, key_text, maglev_text as group_text, owner_text,
};
use crate::state::{State, ids_from};

/// One operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Make the maps and load the programs, or adopt those that are there.
    Install,
    /// Lead traffic to the programs.
    Attach,
    /// The family is used no more. Programs and maps stay, for the next Service and the other family.
    Detach,
    /// Set the family's bits in the settings.
    SetFlags {
        /// The bits that the operation is about.
        mask: u32,
        /// Those that are set.
        to: u32,
    },
    /// Say by which interface local pods are known.
    SetPods(Option<Arc<str>>),
    /// Name a service id, or remove its name.
    SetName(u32, Option<Arc<str>>),
    /// Set or remove a frontend.
    SetFrontend(FrontendKey, Option<Frontend>),
    /// Fill slots that lie side by side, from a first one on. 0 empties.
    SetSlots(u32, Vec<u32>),
    /// Fill entries of the endpoints: the ids of the family that follow each other, from a first one on.
    SetEndpoints(u32, Vec<Endpoint>),
    /// Put a group's Maglev table in place, made of these endpoints ([`Group::id`](shunt_ebpf_abi::Group::id)), or remove it.
    SetMaglev(u32, Option<Arc<[Member]>>),
    /// Set what is known of an address; 0 removes it.
    SetAddress(Address, u32),
    /// Add a range of an owner.
    AddRange(u32, IpNet),
    /// Remove a range of an owner.
    DeleteRange(u32, IpNet),
}

impl Op {
    /// Entries of the endpoints that it fills, by id.
    pub fn endpoints(&self) -> impl Iterator<Item = (u32, Endpoint)> {
        let (first, endpoints) = match self {
            Self::SetEndpoints(first, endpoints) => (*first, &endpoints[..]),
            _ => (0, &[][..]),
        };
        ids_from(first).zip(endpoints.iter().copied())
    }

    /// What the state is afterwards.
    pub fn carry_out(&self, state: &mut State) {
        match self {
            Self::Install => {}
            Self::Attach => state.installed = true,
            Self::Detach => state.installed = false,
            Self::SetFlags { mask, to } => state.flags = state.flags & !mask | to & mask,
            Self::SetPods(pods) => state.pods.clone_from(pods),
            Self::SetName(id, name) => state.set_name(*id, name.clone()),
            Self::SetFrontend(key, to) => state.set_frontend(*key, *to),
            Self::SetSlots(first, ids) => {
                for (number, id) in (*first..).zip(ids) {
                    state.set_slot(number, *id);
                }
            }
            Self::SetEndpoints(..) => self.endpoints().for_each(|(id, to)| state.set_endpoint(id, to)),
            Self::SetMaglev(group, members) => {
                let ids = members.iter().flat_map(|m| m.iter()).map(Member::id);
                state.set_maglev(*group, ids.collect());
            }
            Self::SetAddress(address, flags) => state.set_address(*address, *flags),
            Self::AddRange(owner, range) => state.add_range(*owner, *range),
            Self::DeleteRange(owner, range) => state.remove_range(*owner, range),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Install => f.write_str("install"),
            Self::Attach => f.write_str("attach"),
            Self::Detach => f.write_str("detach"),
            Self::SetFlags { mask, to } => write!(f, "config flags &{mask:#x} = {to:#x}"),
            Self::SetPods(Some(pods)) => write!(f, "config pods = {pods}"),
            Self::SetPods(None) => f.write_str("config pods: delete"),
            Self::SetName(id, Some(name)) => write!(f, "names {id} = {name}"),
            Self::SetName(id, None) => write!(f, "names {id}: delete"),
            Self::SetFrontend(key, Some(to)) => {
                write!(f, "frontends {} = {}", key_text(key), frontend_text(to))
            }
            Self::SetFrontend(key, None) => write!(f, "frontends {}: delete", key_text(key)),
            Self::SetSlots(first, ids) => {
                write!(f, "slots {first} =")?;
                ids.iter().try_for_each(|id| write!(f, " {id}"))
            }
            Self::SetEndpoints(first, endpoints) => {
                write!(f, "endpoints {first} =")?;
                let mut between = " ";
                endpoints.iter().try_for_each(|endpoint| {
                    write!(f, "{}{}", std::mem::replace(&mut between, ", "), endpoint_text(endpoint))
                })
            }
            Self::SetMaglev(group, Some(members)) => {
                write!(f, "maglev {} =", group_text(*group))?;
                members.iter().try_for_each(|member| write!(f, " {}", member.id()))
            }
            Self::SetMaglev(group, None) => write!(f, "maglev {}: delete", group_text(*group)),
            Self::SetAddress(address, 0) => write!(f, "addresses {address}: delete"),
            Self::SetAddress(address, flags) => write!(f, "addresses {address} = {}", address_text(*flags)),
            Self::AddRange(owner, range) => write!(f, "ranges {} {range} = 1", owner_text(*owner)),
            Self::DeleteRange(owner, range) => write!(f, "ranges {} {range}: delete", owner_text(*owner)),
        }
    }
}
