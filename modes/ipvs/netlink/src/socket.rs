//! The conversation with the kernel.

use netlink_requests::protocols::NETLINK_GENERIC;
use netlink_requests::{Attributes, Batch, Error as NetlinkError, Refusal, Socket, native16, native32};

use crate::commands::{
    Commands, DESTINATION, GET_CONFIG, GET_DESTINATION, GET_INFO, GET_SERVICE, SERVICE, SET_CONFIG, header,
};
use crate::destination::{self, DestinationEntry};
use crate::service::{self, ServiceEntry, ServiceKey};

const FAMILY_NAME: &str = "IPVS";
/// `GENL_ID_CTRL`, which knows the other families.
const CONTROLLER: u16 = 16;
const CTRL_GET_FAMILY: u8 = 3;
const CTRL_FAMILY_ID: u16 = 1;
const CTRL_FAMILY_NAME: u16 = 2;
/// Size of the generic netlink header.
const HEADER: usize = 4;

const TIMEOUT_TCP: u16 = 4;
const TIMEOUT_TCP_FIN: u16 = 5;
const TIMEOUT_UDP: u16 = 6;
const INFO_VERSION: u16 = 1;
const INFO_TABLE_SIZE: u16 = 2;

const ENOENT: i32 = 2;
/// How often a dump is started that others disturb.
const DUMP_ATTEMPTS: u32 = 8;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel has no IPVS, and did not load it when asked for it.
    #[error("the kernel has no IPVS: it needs CONFIG_IP_VS (module ip_vs)")]
    NoIpvs,
    /// The conversation failed.
    #[error("{what}: {source}")]
    Netlink {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: NetlinkError,
    },
}

fn failed(what: &'static str) -> impl FnOnce(NetlinkError) -> Error {
    move |source| Error::Netlink { what, source }
}

/// Seconds after which connections without packets are forgotten (`ipvsadm --set`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Config {
    /// Established TCP connections.
    pub tcp: u32,
    /// TCP connections after a FIN.
    pub tcp_fin: u32,
    /// UDP flows.
    pub udp: u32,
}

/// What the kernel says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Info {
    /// Version of IPVS: major, minor, patch.
    pub version: (u8, u8, u8),
    /// Size of the table of connections.
    pub connection_table: u32,
}

/// IPVS of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Ipvs {
    socket: Socket,
    family: u16,
}

impl Ipvs {
    /// Opens IPVS. The kernel loads the module if it can.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(NETLINK_GENERIC).map_err(failed("open generic netlink"))?;
        let mut family = None;
        let asked = socket.request(
            CONTROLLER,
            |w| {
                w.header(&[CTRL_GET_FAMILY, 1, 0, 0]);
                w.string(CTRL_FAMILY_NAME, FAMILY_NAME);
            },
            |payload| {
                family = family_id(payload);
                Ok(())
            },
        );
        match asked {
            Err(NetlinkError::Refused(Refusal { errno: ENOENT, .. })) => Err(Error::NoIpvs),
            Err(source) => Err(Error::Netlink { what: "look for IPVS", source }),
            Ok(()) => Ok(Self { socket, family: family.ok_or(Error::NoIpvs)? }),
        }
    }

    /// An empty batch of commands.
    pub fn commands(&self) -> Commands {
        Commands::new(self.family)
    }

    /// Carries out commands one after the other and answers which the kernel refused. Those after a
    /// refused one are carried out all the same.
    pub fn execute(&mut self, commands: &mut Commands) -> Result<Vec<Refusal>, Error> {
        self.socket.execute(&mut commands.batch).map_err(failed("change services"))
    }

    /// All services, of both families, each once, in order of their keys.
    ///
    /// From one message of a dump to the next the kernel remembers a position, in tables that all network
    /// namespaces may share (`ip_vs_genl_dump_services`). What is changed meanwhile, there too, has it name services
    /// twice or leave some out, and nothing says so. Hence two listings in a row have to name the same; that both leave out
    /// the same is improbable, not impossible.
    pub fn services(&mut self) -> Result<Vec<ServiceEntry>, Error> {
        let mut before = None;
        for _ in 0..DUMP_ATTEMPTS {
            let mut services: Vec<ServiceEntry> = Vec::new();
            self.dump("list services", GET_SERVICE, None, SERVICE, &mut services, |attributes| {
                service::decode(attributes)
            })?;
            services.sort_unstable_by_key(|entry| entry.service.key);
            services.dedup_by_key(|entry| entry.service.key);
            let keys: Vec<ServiceKey> = services.iter().map(|entry| entry.service.key).collect();
            if before.as_ref() == Some(&keys) {
                return Ok(services);
            }
            before = Some(keys);
        }
        Err(failed("list services")(NetlinkError::Interrupted))
    }

    /// The destinations of a service; none if there is no such service.
    pub fn destinations(&mut self, key: &ServiceKey) -> Result<Vec<DestinationEntry>, Error> {
        let mut destinations = Vec::new();
        let family = key.family();
        let dumped = self.dump(
            "list destinations",
            GET_DESTINATION,
            Some(key),
            DESTINATION,
            &mut destinations,
            |attributes| destination::decode(attributes, family),
        );
        match dumped {
            Err(Error::Netlink { source: NetlinkError::Refused(Refusal { errno: ENOENT, .. }), .. }) => {
                Ok(Vec::new())
            }
            Err(error) => Err(error),
            Ok(()) => Ok(destinations),
        }
    }

    /// The timeouts.
    pub fn config(&mut self) -> Result<Config, Error> {
        let mut config = None;
        self.get(GET_CONFIG, |attributes| config = Some(decode_config(attributes)))
            .map_err(failed("read timeouts"))?;
        config.ok_or(Error::Netlink { what: "read timeouts", source: NetlinkError::Malformed("timeouts") })
    }

    /// Sets the timeouts; 0 leaves one as it is.
    pub fn set_config(&mut self, config: &Config) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(self.family, 0, |w| {
            w.header(&header(SET_CONFIG));
            for (kind, seconds) in
                [(TIMEOUT_TCP, config.tcp), (TIMEOUT_TCP_FIN, config.tcp_fin), (TIMEOUT_UDP, config.udp)]
            {
                w.attribute(kind, &seconds.to_ne_bytes());
            }
        });
        match self.socket.execute(&mut batch).map_err(failed("set timeouts"))?.pop() {
            Some(refusal) => Err(failed("set timeouts")(NetlinkError::Refused(refusal))),
            None => Ok(()),
        }
    }

    /// Version and size.
    pub fn info(&mut self) -> Result<Info, Error> {
        let mut info = None;
        self.get(GET_INFO, |attributes| info = decode_info(attributes)).map_err(failed("read info"))?;
        info.ok_or(Error::Netlink { what: "read info", source: NetlinkError::Malformed("a version") })
    }

    fn get(&mut self, command: u8, mut each: impl FnMut(&[u8])) -> Result<(), NetlinkError> {
        self.socket.request(
            self.family,
            |w| w.header(&header(command)),
            |payload| {
                each(payload.get(HEADER..).unwrap_or_default());
                Ok(())
            },
        )
    }

    fn dump<T>(
        &mut self,
        what: &'static str,
        command: u8,
        key: Option<&ServiceKey>,
        nest: u16,
        into: &mut Vec<T>,
        decode: impl Fn(&[u8]) -> Result<Option<T>, &'static str>,
    ) -> Result<(), Error> {
        for _ in 0..DUMP_ATTEMPTS {
            into.clear();
            let dumped = self.socket.dump(
                self.family,
                |w| {
                    w.header(&header(command));
                    if let Some(key) = key {
                        w.nest(SERVICE, |w| key.write(w));
                    }
                },
                |payload| {
                    let attributes = payload.get(HEADER..).unwrap_or_default();
                    if let Some(object) = Attributes::find(attributes, nest) {
                        into.extend(decode(object).map_err(NetlinkError::Malformed)?);
                    }
                    Ok(())
                },
            );
            match dumped {
                Err(NetlinkError::Interrupted) => {}
                dumped => return dumped.map_err(failed(what)),
            }
        }
        Err(failed(what)(NetlinkError::Interrupted))
    }
}

pub(crate) fn family_id(payload: &[u8]) -> Option<u16> {
    Attributes::find(payload.get(HEADER..)?, CTRL_FAMILY_ID).and_then(native16)
}

pub(crate) fn decode_config(attributes: &[u8]) -> Config {
    let number = |kind| Attributes::find(attributes, kind).and_then(native32).unwrap_or_default();
    Config { tcp: number(TIMEOUT_TCP), tcp_fin: number(TIMEOUT_TCP_FIN), udp: number(TIMEOUT_UDP) }
}

pub(crate) fn decode_info(attributes: &[u8]) -> Option<Info> {
    let number = |kind| Attributes::find(attributes, kind).and_then(native32);
    let [_, major, minor, patch] = number(INFO_VERSION)?.to_be_bytes();
    Some(Info { version: (major, minor, patch), connection_table: number(INFO_TABLE_SIZE)? })
}
