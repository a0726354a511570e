//! Follows a file or folder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::folder::Folder;
use super::unreadable;
use crate::Update;
use crate::error::WatchError;

/// Quiet time after a change before files are read, so that one write is one reading.
const SETTLE: Duration = Duration::from_millis(10);
/// Files that never rest are read all the same.
const LONGEST_SETTLE: Duration = Duration::from_millis(100);
/// Times and sizes are looked at this often without being told: notifications stop at symbolic
/// links that lead out of the folder, at network file systems and at the limit of watches.
const POLL: Duration = Duration::from_secs(2);

pub(super) async fn follow(
    path: PathBuf,
    node_name: &str,
    tx: mpsc::Sender<Update>,
) -> Result<(), WatchError> {
    let (signal, mut changed) = mpsc::channel(1);
    let mut folder = Folder::new(path.clone(), Some(node_name));
    let mut notifier: Option<Notifier> = None;
    let mut synced = false;
    let mut told = true;
    loop {
        // Set up before reading, so that no change falls in between. Anew when the path itself
        // has become another: notifications are about the old one for ever.
        if let Ok(real) = std::fs::canonicalize(&path)
            && notifier.as_ref().is_none_or(|n| n.real != real)
        {
            notifier = Some(Notifier::new(&path, real, signal.clone()));
            told = true;
        }
        // Large files take a while to parse; the runtime has other things to do.
        let scanning = tokio::task::spawn_blocking(move || {
            let updates = folder.scan(told);
            (folder, updates)
        });
        let (back, updates) = match scanning.await {
            Ok(scanned) => scanned,
            Err(error) => return Err(unreadable(&path, std::io::Error::other(error))),
        };
        folder = back;
        for update in updates.map_err(|source| unreadable(&path, source))? {
            if tx.send(update).await.is_err() {
                return Ok(());
            }
        }
        if !synced {
            synced = true;
            if tx.send(Update::Synced).await.is_err() {
                return Ok(());
            }
        }
        told = tokio::select! {
            _ = changed.recv() => {
                settle(&mut changed).await;
                true
            }
            () = tokio::time::sleep(POLL) => false,
            () = tx.closed() => return Ok(()),
        };
    }
}

/// Tells when files may have changed. They are watched in their folders, so that it does not matter
/// how they are replaced.
#[derive(Debug)]
pub struct FileWatcher {
    files: Vec<PathBuf>,
    notifiers: Vec<Option<Notifier>>,
    signal: mpsc::Sender<()>,
    changes: mpsc::Receiver<()>,
}

impl FileWatcher {
    /// Watches these files, whether they exist or not.
    pub fn new(files: Vec<PathBuf>) -> Self {
        let (signal, changes) = mpsc::channel(1);
        let notifiers = files.iter().map(|_| None).collect();
        let mut watcher = Self { files, notifiers, signal, changes };
        watcher.renew();
        watcher
    }

    /// Returns when a file may have changed, and every two seconds in case nobody told.
    pub async fn changed(&mut self) {
        self.renew();
        // Whether it was told or time, the files are to be looked at.
        let _ = timeout(POLL, self.changes.recv()).await;
    }

    /// Notifications are about what a path led to when they were asked for.
    fn renew(&mut self) {
        for (path, notifier) in self.files.iter().zip(&mut self.notifiers) {
            if let Ok(real) = std::fs::canonicalize(path)
                && notifier.as_ref().is_none_or(|n| n.real != real)
            {
                *notifier = Some(Notifier::new(path, real, self.signal.clone()));
            }
        }
    }
}

/// Waits until nothing changes any more, within reason.
async fn settle(changed: &mut mpsc::Receiver<()>) {
    let longest = Instant::now() + LONGEST_SETTLE;
    while let Ok(Ok(Some(()))) = timeout_at(longest, timeout(SETTLE, changed.recv())).await {}
}

/// Notifications about one path.
#[derive(Debug)]
struct Notifier {
    /// Where the path led when this was set up.
    real: PathBuf,
    _watcher: Option<RecommendedWatcher>,
}

impl Notifier {
    fn new(path: &Path, real: PathBuf, signal: mpsc::Sender<()>) -> Self {
        let watcher = watch(path, &real, signal).inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "no notifications of changes: looking every {POLL:?}");
        });
        Self { real, _watcher: watcher.ok() }
    }
}

fn watch(path: &Path, real: &Path, signal: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the files is an event, too; only a write that ends is news.
        let reading = event.is_ok_and(|event| match event.kind {
            EventKind::Access(access) => access != AccessKind::Close(AccessMode::Write),
            _ => false,
        });
        if !reading {
            // Full means that a change is waiting to be looked at already.
            let _ = signal.try_send(());
        }
    })?;
    if real.is_dir() {
        watcher.watch(path, RecursiveMode::Recursive)?;
        return Ok(watcher);
    }
    // A file is replaced in its folder: what is watched is the folder. Behind a symbolic link
    // there are two.
    for file in [path, real] {
        let folder = match file.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        watcher.watch(folder, RecursiveMode::NonRecursive)?;
    }
    Ok(watcher)
}
