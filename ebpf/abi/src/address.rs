//! An address of either family in 16 bytes.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`, as four words in network byte order (the
/// form of `bpf_sock_addr::user_ip6`).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address(pub [u32; 4]);

/// The third word of an IPv4 address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    /// The unspecified address. As a frontend's address it stands for all on which node ports answer.
    pub const ANY: Self = Self([0; 4]);

    /// An IPv4 address given as one word in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, MAPPED, word])
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The IPv4 address as one word in network byte order; the last word of any other.
    #[inline(always)]
    pub const fn word4(&self) -> u32 {
        self.0[3]
    }

    /// Whether this is 0.0.0.0 or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[0] | self.0[1] | self.0[3] == 0 && (self.0[2] == 0 || self.0[2] == MAPPED)
    }

    /// Whether this is 127.0.0.0/8 or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.0[3].to_be() >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
        }
    }

    /// Whether this is multicast, or the broadcast address of IPv4.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        if self.is_v4() {
            self.0[3].to_be() >> 28 == 0xe || self.0[3] == u32::MAX
        } else {
            self.0[0].to_be() >> 24 == 0xff
        }
    }

    /// The same, word by word: `==` on arrays calls `bcmp`, which eBPF does not have.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        (self.0[0] ^ other.0[0])
            | (self.0[1] ^ other.0[1])
            | (self.0[2] ^ other.0[2])
            | (self.0[3] ^ other.0[3])
            == 0
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => Self::v4(u32::from_ne_bytes(a.octets())),
            IpAddr::V6(a) => {
                let o = a.octets();
                let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
                Self([word(0), word(4), word(8), word(12)])
            }
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() {
            return Self::V4(Ipv4Addr::from(u32::from_be(address.0[3])));
        }
        let mut bits = 0_u128;
        for word in address.0 {
            bits = bits << 32 | u128::from(u32::from_be(word));
        }
        Self::V6(Ipv6Addr::from(bits))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn both_families_survive_the_way_there_and_back() {
        for text in ["10.1.2.3", "0.0.0.0", "255.255.255.255", "::", "::1", "2001:db8::1:ff", "ff02::1"] {
            let address: IpAddr = text.parse().unwrap_or_else(|_| unreachable!());
            assert_eq!(Address::from(address).to_string(), text);
        }
    }

    #[test]
    fn kinds() {
        let of = |text: &str| Address::from(text.parse::<IpAddr>().unwrap_or_else(|_| unreachable!()));
        assert!(of("127.3.2.1").is_loopback() && of("::1").is_loopback() && of("127.3.2.1").is_v4());
        assert!(!of("128.0.0.1").is_loopback() && !of("::2").is_loopback() && !of("::1").is_v4());
        assert!(
            of("224.0.0.1").is_multicast()
                && of("255.255.255.255").is_multicast()
                && of("ff02::1").is_multicast()
        );
        assert!(
            !of("240.0.0.1").is_multicast()
                && !of("10.0.0.1").is_multicast()
                && !of("fe80::1").is_multicast()
        );
    }
}
