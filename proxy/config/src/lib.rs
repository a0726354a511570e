//! The configuration of the agent as it stands in files: kube-proxy's `KubeProxyConfiguration`
//! (`kubeproxy.config.k8s.io/v1alpha1`) and our own `ShuntConfiguration` (`shunt/v1alpha1`).
//!
//! ```text
//!   text ──decode──> Document ──defaults──> Document ──validate──> problems, all of them
//!             └─ unknown and repeated fields become warnings
//!   Document ──write──> text, that reads back equal
//! ```
//!
//! Everything is pure: nothing in here reads a file, the environment or the kernel. What a field
//! means to the node is decided by whoever uses it. Start reading at [`types`], then [`decode`].

#![forbid(unsafe_code)]

pub mod decode;
mod defaults;
pub mod duration;
pub mod shunt;
pub mod types;
mod validate;

pub use decode::{ConfigError, Loaded, decode, from_value, write};
pub use duration::Duration;
pub use shunt::ShuntConfiguration;
pub use types::KubeProxyConfiguration;
pub use validate::Invalid;

/// `apiVersion` of [`KubeProxyConfiguration`].
pub const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
/// `kind` of [`KubeProxyConfiguration`].
pub const KIND: &str = "KubeProxyConfiguration";
/// `apiVersion` of [`ShuntConfiguration`].
pub const SHUNT_API_VERSION: &str = "shunt/v1alpha1";
/// `kind` of [`ShuntConfiguration`].
pub const SHUNT_KIND: &str = "ShuntConfiguration";
