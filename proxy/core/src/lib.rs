//! The heart of Shunt: what Services mean on this node, decided once, as pure functions over
//! plain data.

pub mod endpoint;
pub mod id;
pub mod node;
pub mod service;
pub mod store;
