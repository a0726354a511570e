//! Netlink messages of nf_tables.
