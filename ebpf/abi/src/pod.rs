//! Lets aya copy the types into and out of maps.

use crate::{
    Address, Affinity, AffinityKey, Config, Endpoint, Flow, FlowFilter, FlowKey, Fragment, FragmentKey,
    Frontend, FrontendKey, Interface, Name, Peer, RangeKey, ServiceBytes, ServiceCounters, SocketKey,
    SocketRecord,
};

macro_rules! pod {
    ($($t:ty),+) => { $(
        // SAFETY: repr(C), Copy, 'static, of integers only, without padding (sizes are asserted where
        // the types are defined), and every bit pattern is a value.
        #[allow(unsafe_code)]
        unsafe impl aya::Pod for $t {}
    )+ };
}

pod!(
    Address,
    Affinity,
    AffinityKey,
    Config,
    Endpoint,
    Flow,
    FlowFilter,
    FlowKey,
    Fragment,
    FragmentKey,
    Frontend,
    FrontendKey,
    Interface,
    Name,
    Peer,
    RangeKey,
    ServiceBytes,
    ServiceCounters,
    SocketKey,
    SocketRecord
);
