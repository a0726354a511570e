//! Tables, and the chains of theirs that the kernel itself calls.

/// A table of iptables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Table {
    /// `filter`: accepts and refuses.
    Filter,
    /// `mangle`: changes packets.
    Mangle,
    /// `nat`: translates.
    Nat,
}

impl Table {
    /// All of them, in the order in which they are written: what only restricts comes first.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Mangle, Self::Nat];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }

    /// The one with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// Asks for masquerade: the chain that other programs lead to as well, for host ports (CRI-O, the CNI plug-in).
pub const MARK_MASQ: &str = "KUBE-MARK-MASQ";

/// Whether a rule is ours that leads to a chain of ours: one in a chain that the kernel calls, but for those that only
/// mark.
pub fn is_hook(chain: &str, to: &str) -> bool {
    Builtin::parse(chain).is_some() && to != MARK_MASQ
}

/// A chain that the kernel itself calls.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Builtin {
    /// Packets that come in.
    Prerouting,
    /// Packets for the node itself.
    Input,
    /// Packets that pass through.
    Forward,
    /// Packets of the node itself.
    Output,
    /// Packets that go out.
    Postrouting,
}

impl Builtin {
    const ALL: [Self; 5] = [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }

    /// The one with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|builtin| builtin.name() == name)
    }
}
