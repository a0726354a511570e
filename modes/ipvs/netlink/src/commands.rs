//! Changes, gathered into one batch.

use std::net::SocketAddr;

use netlink_requests::{Batch, Writer};

use crate::destination::{self, Destination};
use crate::service::{Service, ServiceKey};

pub(crate) const VERSION: u8 = 1;

const NEW_SERVICE: u8 = 1;
const SET_SERVICE: u8 = 2;
const DELETE_SERVICE: u8 = 3;
pub(crate) const GET_SERVICE: u8 = 4;
const NEW_DESTINATION: u8 = 5;
const SET_DESTINATION: u8 = 6;
const DELETE_DESTINATION: u8 = 7;
pub(crate) const GET_DESTINATION: u8 = 8;
pub(crate) const SET_CONFIG: u8 = 12;
pub(crate) const GET_CONFIG: u8 = 13;
pub(crate) const GET_INFO: u8 = 15;
const ZERO: u8 = 16;
const FLUSH: u8 = 17;

pub(crate) const SERVICE: u16 = 1;
pub(crate) const DESTINATION: u16 = 2;

/// The generic netlink header of a command.
pub(crate) const fn header(command: u8) -> [u8; 4] {
    [command, VERSION, 0, 0]
}

/// Commands that are sent together and carried out one after the other.
#[derive(Clone, Debug)]
pub struct Commands {
    family: u16,
    pub(crate) batch: Batch,
}

impl Commands {
    pub(crate) fn new(family: u16) -> Self {
        Self { family, batch: Batch::default() }
    }

    fn push(&mut self, command: u8, body: impl FnOnce(&mut Writer)) {
        self.batch.push(self.family, 0, |w| {
            w.header(&header(command));
            body(w);
        });
    }

    /// Number of commands.
    pub const fn len(&self) -> usize {
        self.batch.len()
    }

    /// True without commands.
    pub const fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Size in bytes; the kernel takes some megabytes at once.
    pub const fn bytes(&self) -> usize {
        self.batch.bytes()
    }

    /// Makes a service; refused (`EEXIST`) if there is one with its key.
    pub fn add_service(&mut self, service: &Service) {
        self.push(NEW_SERVICE, |w| w.nest(SERVICE, |w| service.write(w)));
    }

    /// Gives a service another scheduler, flags or persistence; its destinations and connections stay.
    pub fn set_service(&mut self, service: &Service) {
        self.push(SET_SERVICE, |w| w.nest(SERVICE, |w| service.write(w)));
    }

    /// Deletes a service with its destinations.
    pub fn delete_service(&mut self, key: &ServiceKey) {
        self.push(DELETE_SERVICE, |w| w.nest(SERVICE, |w| key.write(w)));
    }

    /// Gives a service a destination; refused (`EEXIST`) if it has it.
    pub fn add_destination(&mut self, key: &ServiceKey, destination: &Destination) {
        self.destination(NEW_DESTINATION, key, |w| destination.write(w));
    }

    /// Gives a destination another weight, method or thresholds; its connections stay.
    pub fn set_destination(&mut self, key: &ServiceKey, destination: &Destination) {
        self.destination(SET_DESTINATION, key, |w| destination.write(w));
    }

    /// Takes a destination from a service. What becomes of its connections is a matter of
    /// `net.ipv4.vs.expire_nodest_conn`.
    pub fn delete_destination(&mut self, key: &ServiceKey, address: SocketAddr) {
        self.destination(DELETE_DESTINATION, key, |w| destination::write_key(w, address));
    }

    /// Zeroes the counters of a service, or of all.
    pub fn zero(&mut self, key: Option<&ServiceKey>) {
        self.push(ZERO, |w| {
            if let Some(key) = key {
                w.nest(SERVICE, |w| key.write(w));
            }
        });
    }

    /// Deletes all services of the network namespace.
    pub fn flush(&mut self) {
        self.push(FLUSH, |_| {});
    }

    fn destination(&mut self, command: u8, key: &ServiceKey, body: impl FnOnce(&mut Writer)) {
        self.push(command, |w| {
            w.nest(SERVICE, |w| key.write(w));
            w.nest(DESTINATION, body);
        });
    }
}
