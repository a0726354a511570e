//! The folders in which everything is pinned: what is in use, and what is about to be.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use super::attach::{AttachError, io_at};
use super::{clsact, sys};

/// The folders in which everything is pinned.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    /// Notes of filters.
    pub(super) notes: PathBuf,
    /// Folder of the programs.
    programs: &'static str,
    /// Folder of the links.
    links: &'static str,
    /// Maps that are pinned apart from all others, and where.
    fresh: BTreeSet<&'static str>,
    fresh_maps: &'static str,
}

/// Folders of what is in use.
const PROGRAMS: &str = "programs";
const LINKS: &str = "links";
/// Folder of the tables of `maglev`.
pub(super) const TABLES: &str = "maglev";
/// Folder of maps that are being made.
const FRESH_MAPS: &str = "maps-new";
/// Folder of maps that are filled and taken into use.
const NEXT_MAPS: &str = "maps-next";
/// Folders of the programs that come.
const NEXT_PROGRAMS: &str = "programs-new";
const BACK_PROGRAMS: &str = "programs-back";
/// Folders of links before and behind those of the programs that go.
const FRONT_LINKS: &str = "links-front";
const BACK_LINKS: &str = "links-back";

impl Pins {
    pub(super) fn new(bpf_root: &Path) -> Self {
        let root = bpf_root.join("shunt");
        Self {
            notes: clsact::notes(&root),
            root,
            programs: PROGRAMS,
            links: LINKS,
            fresh: BTreeSet::new(),
            fresh_maps: FRESH_MAPS,
        }
    }

    /// The same with programs that come, over such maps that are made anew.
    pub(super) fn coming(&self, fresh: &BTreeSet<&'static str>) -> Self {
        Self { programs: NEXT_PROGRAMS, fresh: fresh.clone(), ..self.clone() }
    }

    /// The same once these maps are filled.
    pub(super) fn resuming(&self, fresh: &BTreeSet<&'static str>) -> Self {
        Self { fresh_maps: NEXT_MAPS, ..self.coming(fresh) }
    }

    /// Links before all others.
    pub(super) fn front(&self) -> Self {
        Self { links: FRONT_LINKS, ..self.clone() }
    }

    /// The same programs once more, and links behind all others.
    pub(super) fn back(&self) -> Self {
        Self { programs: BACK_PROGRAMS, ..self.behind() }
    }

    /// Links behind all others.
    pub(super) fn behind(&self) -> Self {
        Self { links: BACK_LINKS, ..self.clone() }
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// Folder of maps that are being made.
    pub(super) fn fresh_maps(&self) -> PathBuf {
        self.root.join(FRESH_MAPS)
    }

    /// Folder of maps that are filled and taken into use, while that takes.
    pub(super) fn next_maps(&self) -> PathBuf {
        self.root.join(NEXT_MAPS)
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        let folder = if self.fresh.contains(name) { self.root.join(self.fresh_maps) } else { self.maps() };
        folder.join(name)
    }

    pub(super) fn programs(&self) -> PathBuf {
        self.root.join(self.programs)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join(self.links)
    }

    pub(super) fn tables(&self) -> PathBuf {
        self.root.join(TABLES)
    }

    pub(super) fn make(&self) -> Result<(), AttachError> {
        let mut folders = vec![self.maps(), self.tables(), self.programs(), self.links()];
        folders.extend((!self.fresh.is_empty()).then(|| self.root.join(self.fresh_maps)));
        for folder in folders {
            std::fs::create_dir_all(&folder).map_err(io_at(folder.display().to_string()))?;
        }
        Ok(())
    }

    /// Whether maps are being taken into use: a process ended before it was done.
    pub(super) fn is_changing(&self) -> bool {
        [NEXT_MAPS, FRONT_LINKS, BACK_LINKS].iter().any(|folder| self.root.join(folder).exists())
    }

    /// Forgets maps and programs that nothing uses yet.
    pub(super) fn discard(&self) -> io::Result<()> {
        [FRESH_MAPS, NEXT_PROGRAMS, BACK_PROGRAMS]
            .iter()
            .try_for_each(|folder| remove_with(&self.root.join(folder), |path| std::fs::remove_file(path)))
    }

    /// The new maps are filled: from now on a start goes on with them.
    pub(super) fn begin(&self) -> io::Result<()> {
        std::fs::rename(self.fresh_maps(), self.next_maps())
    }

    /// Puts what comes in the place of what goes: maps, programs, links.
    pub(super) fn finish(&self) -> io::Result<()> {
        let move_to = |folder: PathBuf| {
            move |path: &Path| std::fs::rename(path, folder.join(path.file_name().unwrap_or_default()))
        };
        remove_with(&self.next_maps(), move_to(self.maps()))?;
        remove_with(&self.root.join(NEXT_PROGRAMS), move_to(self.root.join(PROGRAMS)))?;
        let links = self.root.join(LINKS);
        remove_with(&self.root.join(FRONT_LINKS), |path| {
            let old = links.join(path.file_name().unwrap_or_default());
            if old.exists() {
                sys::detach_link(sys::open_pinned(&old)?.as_fd())?;
            }
            std::fs::rename(path, old)
        })?;
        remove_with(&self.root.join(BACK_LINKS), unlink)?;
        self.discard()
    }

    /// Removes everything; links first, so that no program runs without its maps.
    pub(super) fn remove(&self) -> io::Result<()> {
        for folder in [FRONT_LINKS, LINKS, BACK_LINKS] {
            remove_with(&self.root.join(folder), unlink)?;
        }
        self.discard()?;
        for folder in [self.root.join(PROGRAMS), self.next_maps(), self.maps(), self.tables()] {
            remove_with(&folder, |path| std::fs::remove_file(path))?;
        }
        remove_folder(&self.root)
    }

    /// Names of the links that are pinned.
    pub(super) fn link_names(&self) -> io::Result<BTreeSet<String>> {
        names(&self.links())
    }
}

/// Takes a link off at once; without its file alone it ends some time later.
fn unlink(path: &Path) -> io::Result<()> {
    sys::detach_link(sys::open_pinned(path)?.as_fd())?;
    std::fs::remove_file(path)
}

/// Does something with all that is pinned in a folder, which takes it out of there, and removes the folder.
fn remove_with(folder: &Path, each: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    for name in names(folder)? {
        each(&folder.join(name))?;
    }
    remove_folder(folder)
}

pub(super) fn names(folder: &Path) -> io::Result<BTreeSet<String>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    match std::fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
