//! Tables of consistent hashing. Each is pinned beside the map that holds it: the kernel shows what is
//! inside a map of maps to nobody who has less than `CAP_SYS_ADMIN`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData};
use shunt_ebpf_abi::{MAGLEV_SIZE, MaglevTable, maglev, map};

use super::maps::{MapError, Maps, at};
use super::sys::{self, Table};
use crate::op::Op;
use crate::state::State;

/// Tables that are made at a time: each takes a file descriptor, and a change of the map of maps waits until
/// no program uses what was there.
const TABLES: usize = 128;

/// The pin of a group's table.
fn pin(folder: &Path, group: u32) -> PathBuf {
    folder.join(group.to_string())
}

fn table_of(members: &[maglev::Member]) -> io::Result<Box<MaglevTable>> {
    let zeroes = vec![0; MAGLEV_SIZE].into_boxed_slice();
    let mut table: Box<MaglevTable> = zeroes.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    maglev::fill(&mut members.to_vec(), &mut table);
    Ok(table)
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

/// Puts the tables of one map into another one too; one that is not pinned is made anew by the next plan.
pub(super) fn put_pinned(folder: &Path, from: &Table<u32, u32>, to: &Table<u32, u32>) -> io::Result<()> {
    let mut groups = Vec::new();
    from.read(|group, _| groups.push(group))?;
    for group in groups {
        match sys::open_pinned(&pin(folder, group)) {
            Ok(table) => to.set(&group, &table.as_raw_fd().cast_unsigned())?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Maps {
    /// Reads the tables of a family.
    pub(super) fn observe_maglev(&self, state: &mut State) -> Result<(), MapError> {
        let at = at(map::MAGLEV);
        let (mut groups, mut others) = (Vec::new(), 0);
        self.maglev
            .read(|group, _| {
                if state.owns_id(group >> 1) {
                    groups.push(group);
                } else {
                    others += 1;
                }
            })
            .map_err(&at)?;
        state.sizes.maglev = self.maglev.size().map_err(&at)?.saturating_sub(others);
        for group in groups {
            // One that is not pinned was written half-way: it is made anew.
            let ids = match sys::open_pinned(&pin(&self.tables, group)) {
                Ok(fd) => {
                    let data = MapData::from_fd(fd).map_err(|e| at(other(e)))?;
                    let table = Array::<MapData, MaglevTable>::try_from(Map::Array(data));
                    let table = table.map_err(|e| at(other(e)))?;
                    table.get(&0, 0).map_err(|e| at(other(e)))?.to_vec()
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => vec![0],
                Err(error) => return Err(at(error)),
            };
            state.set_maglev(group, ids);
        }
        Ok(())
    }

    fn beside(&self, group: u32) -> PathBuf {
        self.tables.join(format!("{group}-new"))
    }

    /// Puts tables in place and removes others, in order.
    pub(super) fn set_maglev(&self, ops: &[Op]) -> Result<(), MapError> {
        let at = at(map::MAGLEV);
        // Of two for one group the last counts.
        let mut wanted: BTreeMap<u32, Option<&[maglev::Member]>> = BTreeMap::new();
        for op in ops {
            if let Op::SetMaglev(group, members) = op {
                wanted.insert(*group, members.as_deref());
            }
        }
        let gone: Vec<u32> = wanted.iter().filter(|(_, to)| to.is_none()).map(|(group, _)| *group).collect();
        self.maglev.delete(&gone).map_err(&at)?;
        for group in gone {
            match std::fs::remove_file(pin(&self.tables, group)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
                _ => {}
            }
        }
        let come: Vec<(u32, &[maglev::Member])> =
            wanted.into_iter().filter_map(|(group, to)| Some((group, to?))).collect();
        for some in come.chunks(TABLES) {
            let mut groups = Vec::with_capacity(some.len());
            let mut tables = Vec::with_capacity(some.len());
            for (group, members) in some {
                let mut table: Array<MapData, MaglevTable> = Array::create(1, 0).map_err(|e| at(other(e)))?;
                table.set(0, *table_of(members).map_err(&at)?, 0).map_err(|e| at(other(e)))?;
                let beside = self.beside(*group);
                let _ = std::fs::remove_file(&beside);
                table.pin(&beside).map_err(|e| at(other(e)))?;
                groups.push(*group);
                tables.push(sys::open_pinned(&beside).map_err(&at)?);
            }
            let files: Vec<u32> = tables.iter().map(|fd| fd.as_raw_fd().cast_unsigned()).collect();
            self.maglev.update(&groups, &files).map_err(&at)?;
            // Last: a pin says what the map holds.
            for group in groups {
                std::fs::rename(self.beside(group), pin(&self.tables, group)).map_err(&at)?;
            }
        }
        Ok(())
    }
}
