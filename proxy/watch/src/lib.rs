//! Where objects come from: a Kubernetes API server, or a folder of manifests.
//!
//! ```text
//!  API server ── list+watch ──> api::Reflector (one a kind) ──┐            ┌─> Update::Event
//!                                                             ├─ convert ──┼─> Update::Problem
//!  *.yaml *.json ── notify ──> manifests::Folder ─────────────┘            └─> Update::Synced, once
//! ```
//!
//! Both sources say the same things in the same order: the objects of the first lists, then
//! [`Update::Synced`], then one [`Event`] for every change. After a broken connection or a broken
//! file they send the difference between what they said last and what is true now.
//!
//! This crate never decides what a Service means; it only turns API objects into the types of
//! `shunt-core`. What an object says wrongly becomes a [`Problem`] that names the field, and the
//! rest of the object goes on. A source never forgets objects because it cannot reach or read
//! their origin.
//!
//! Start reading at `convert.rs` (what is taken from an object), then `api/reflector.rs` (how a
//! list and a watch become events) and `manifests/folder.rs` (the same for files).

mod address;
mod api;
mod convert;
mod error;
mod events;
mod intern;
mod kind;
mod manifests;
mod problem;
mod wire;

pub use api::{Answered, KubeOptions, Observer, watch_kube};
pub use convert::{Converted, Converter};
pub use error::WatchError;
pub use events::{EventType, Notice, Regarding, send_events};
pub use kind::Kind;
pub use manifests::{ConfigDocument, FileWatcher, Manifests, Pods, read_manifests, watch_manifests};
pub use problem::{Contact, Problem};

use shunt_core::store::Event;

/// What a source of objects says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Update {
    /// One object changed.
    Event(Event),
    /// The first list of every kind is complete. Sent once; nothing may be programmed before,
    /// or a restart would take away what is still wanted.
    Synced,
    /// An object (or a file) says something that cannot be used.
    Problem(Problem),
    /// The source heard from the API server, or lost it. Objects stay as they are meanwhile; this
    /// is how old they may be. Not sent for manifests.
    Contact(Contact),
}
