//! Programs at devices of kernels without TCX (before 6.6): filters of the classifier `bpf` in the queueing
//! discipline `clsact`. They stay when the process ends, and are found again by handle and name.
//!
//! A folder in the bpffs for each device says where we have filters, and whether we made the discipline.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use netlink_requests::protocols::NETLINK_ROUTE;
use netlink_requests::{
    Attributes, Batch, Error, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Socket, Writer, native32, text,
};

use super::sys;

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
/// The program's answer is what becomes of the packet.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// All protocols, before everybody else's filters; filters of one kind may share a priority.
const PRIORITY_AND_PROTOCOL: u32 = 1 << 16 | (libc::ETH_P_ALL as u16).to_be() as u32;
/// `sh`: others number theirs from 1.
const HANDLE: u32 = 0x7368;
/// How the names of our filters begin.
const NAME: &str = "shunt_";

/// Where packets meet a filter, by the name of the program without regard to the device's kind.
pub(super) const HOOKS: [&str; 2] = ["ingress", "egress"];

fn parent(hook: &str) -> u32 {
    if hook == "ingress" { 0xffff_fff2 } else { 0xffff_fff3 }
}

fn header(writer: &mut Writer, index: u32, handle: u32, parent: u32, info: u32) {
    let mut bytes = [0; 20];
    for (at, word) in [(4, index), (8, handle), (12, parent), (16, info)] {
        bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    writer.header(&bytes);
}

/// The name by which a filter is known among the links.
pub(super) fn name(hook: &str, index: u32) -> String {
    format!("clsact-{hook}-{index}")
}

/// Filters of the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct Filters<'a> {
    /// Folder of notes, one a device.
    notes: &'a Path,
    socket: Socket,
}

fn failed(error: Error) -> io::Error {
    io::Error::other(error)
}

/// Whether a device has notes: as it was, or with a discipline of ours.
fn note_of(index: u32, made: bool) -> String {
    format!("{index}{}", if made { "-made" } else { "" })
}

impl<'a> Filters<'a> {
    pub(super) fn open(notes: &'a Path) -> io::Result<Self> {
        Ok(Self { notes, socket: Socket::open(NETLINK_ROUTE).map_err(failed)? })
    }

    /// Devices on which we may have filters, with whether the discipline is ours.
    fn noted(&self) -> io::Result<Vec<(u32, bool)>> {
        let entries = match std::fs::read_dir(self.notes) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut noted = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let (index, made) = name.strip_suffix("-made").map_or((&*name, false), |index| (index, true));
            noted.extend(index.parse().ok().map(|index| (index, made)));
        }
        Ok(noted)
    }

    /// Carries out one request; what the kernel answers if it refuses.
    fn request(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer)) -> io::Result<()> {
        let mut batch = Batch::default();
        batch.push(kind, flags, body);
        match self.socket.execute(&mut batch).map_err(failed)?.first() {
            Some(refusal) => Err(io::Error::from_raw_os_error(refusal.errno)),
            None => Ok(()),
        }
    }

    /// Filters at a hook: how many, and whether one is ours.
    fn look(&mut self, index: u32, hook: &str) -> io::Result<(usize, bool)> {
        let (mut all, mut ours) = (0, false);
        let dumped = self.socket.dump(
            RTM_GETTFILTER,
            |writer| header(writer, index, 0, parent(hook), 0),
            |payload| {
                let handle = payload.get(8..12).and_then(native32).unwrap_or(0);
                if handle == 0 {
                    return Ok(());
                }
                all += 1;
                let attributes = payload.get(20..).unwrap_or_default();
                let options = Attributes::find(attributes, TCA_OPTIONS).unwrap_or_default();
                let name = Attributes::find(options, TCA_BPF_NAME).and_then(text);
                ours |= handle == HANDLE && name.is_some_and(|name| name.starts_with(NAME));
                Ok(())
            },
        );
        match dumped {
            Ok(()) => Ok((all, ours)),
            // The device or its discipline is gone.
            Err(Error::Refused(_)) => Ok((0, false)),
            Err(error) => Err(failed(error)),
        }
    }

    /// Names of the filters that we have.
    pub(super) fn held(&mut self) -> io::Result<BTreeSet<String>> {
        let mut held = BTreeSet::new();
        for (index, _) in self.noted()? {
            for hook in HOOKS {
                if self.look(index, hook)?.1 {
                    held.insert(name(hook, index));
                }
            }
        }
        Ok(held)
    }

    /// Puts a pinned program at a device, in place of the one that is there: no packet meets neither.
    pub(super) fn attach(&mut self, index: u32, hook: &str, program: &Path) -> io::Result<()> {
        let program_fd = sys::open_pinned(program)?;
        let discipline = self.request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, |writer| {
            header(writer, index, CLSACT_HANDLE, CLSACT, 0);
            writer.string(TCA_KIND, "clsact");
        });
        let made = match discipline {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => false,
            Err(error) => return Err(error),
        };
        if made || !self.notes.join(note_of(index, true)).exists() {
            std::fs::create_dir_all(self.notes.join(note_of(index, made)))?;
        }
        let fd = program_fd.as_fd().as_raw_fd().to_ne_bytes();
        self.request(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, |writer| {
            header(writer, index, HANDLE, parent(hook), PRIORITY_AND_PROTOCOL);
            writer.string(TCA_KIND, "bpf");
            writer.nest(TCA_OPTIONS, |writer| {
                writer.attribute(TCA_BPF_FD, &fd);
                writer.string(TCA_BPF_NAME, &format!("{NAME}{hook}"));
                writer.attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
            });
        })
    }

    /// Removes our filters from devices other than `but`, the disciplines that we made if nobody else uses
    /// them, and the notes.
    pub(super) fn remove(&mut self, but: &BTreeSet<u32>) -> io::Result<()> {
        for (index, made) in self.noted()? {
            if but.contains(&index) {
                continue;
            }
            let mut others = 0;
            for hook in HOOKS {
                let (all, ours) = self.look(index, hook)?;
                others += all - usize::from(ours);
                if ours {
                    gone(self.request(RTM_DELTFILTER, 0, |writer| {
                        header(writer, index, HANDLE, parent(hook), PRIORITY_AND_PROTOCOL);
                        writer.string(TCA_KIND, "bpf");
                    }))?;
                }
            }
            if made && others == 0 {
                gone(self.request(RTM_DELQDISC, 0, |writer| {
                    header(writer, index, CLSACT_HANDLE, CLSACT, 0);
                    writer.string(TCA_KIND, "clsact");
                }))?;
            }
            std::fs::remove_dir(self.notes.join(note_of(index, made)))?;
        }
        Ok(())
    }
}

/// What is not there any more need not be removed.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)) => {
            Ok(())
        }
        result => result,
    }
}

/// The folder of notes.
pub(super) fn notes(root: &Path) -> PathBuf {
    root.join("clsact")
}
