//! What a folder of manifests holds, and what has changed since the last look.
//!
//! Files are read again as a whole, compared by digest, and only those that changed are parsed.
//! What all files together say is then compared with what was sent last, so that a file that was
//! replaced, moved or reformatted sends nothing that is the same.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use shunt_core::id::NamespacedName;
use shunt_core::store::Event;

use super::{ConfigDocument, Pods, parse, pods};
use crate::Update;
use crate::convert::Converter;
use crate::kind::{Kind, is_gone};
use crate::problem::Problem;

/// Folders deeper than this are taken for a loop of symbolic links.
const DEEPEST: usize = 16;
/// How long a file may be absent or empty while an editor replaces it.
const REPLACING: Duration = Duration::from_millis(60);
const CONFIG_KINDS: [&str; 2] = ["KubeProxyConfiguration", "ShuntConfiguration"];

type Key = (Kind, NamespacedName);
/// Path, time of change and size of each file: unchanged means nothing to read.
type Signature = Vec<(PathBuf, Option<SystemTime>, u64)>;

/// A file or folder that is looked at again and again. Blocks: it reads files.
pub(super) struct Folder {
    path: PathBuf,
    node_name: Option<String>,
    converter: Converter,
    files: BTreeMap<PathBuf, File>,
    given: BTreeMap<Key, Event>,
    /// Conflicts that were reported and still exist.
    conflicts: BTreeSet<Problem>,
    signature: Signature,
    /// Why the path (not a single file in it) could not be read last time.
    unreadable: Option<String>,
    /// Pods that were named, for who wants to know: those that are followed want no memory for it.
    pods: Option<Pods>,
}

/// One file as it was when it could last be read.
#[derive(Default)]
struct File {
    digest: u64,
    objects: BTreeMap<Key, Event>,
    config: Vec<Value>,
}

impl Folder {
    pub(super) fn new(path: PathBuf, node_name: Option<&str>) -> Self {
        Self {
            path,
            node_name: node_name.map(str::to_owned),
            converter: Converter::for_manifests(node_name),
            files: BTreeMap::new(),
            given: BTreeMap::new(),
            conflicts: BTreeSet::new(),
            signature: Signature::new(),
            unreadable: None,
            pods: None,
        }
    }

    /// The same, noting the pods that are named.
    pub(super) fn noting_pods(mut self) -> Self {
        self.pods = Some(Pods::new());
        self
    }

    /// Pods that were named, if they were noted.
    pub(super) fn pods(self) -> Pods {
        self.pods.unwrap_or_default()
    }

    /// Looks, and answers what is new. Only the first look can fail.
    ///
    /// Without `thorough`, files are only read if their time or size tells that it is worth it.
    pub(super) fn scan(&mut self, thorough: bool) -> io::Result<Vec<Update>> {
        let mut updates = Vec::new();
        let (signature, mut contents) = match self.look(thorough) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(updates),
            Err(error) if self.files.is_empty() && self.unreadable.is_none() => return Err(error),
            Err(error) => {
                // Nothing is forgotten because it cannot be read.
                let message = format!("{error}; its objects stay as they were");
                if self.unreadable.as_ref() != Some(&message) {
                    updates.push(Update::Problem(problem(&self.path, String::new(), message.clone())));
                    self.unreadable = Some(message);
                }
                return Ok(updates);
            }
        };
        self.signature = signature;
        if self.is_being_replaced(&contents) {
            std::thread::sleep(REPLACING);
            if let Ok(Some((signature, now))) = self.look(true) {
                self.signature = signature;
                contents = now;
            }
        }
        self.unreadable = None;
        self.files.retain(|path, _| contents.contains_key(path));
        for (path, content) in contents {
            match content {
                Ok(content) => self.read(path, &content, &mut updates),
                Err(error) => {
                    let message = format!("{error}; its objects stay as they were");
                    let digest = digest(message.as_bytes());
                    let file = self.files.entry(path.clone()).or_default();
                    if std::mem::replace(&mut file.digest, digest) != digest {
                        updates.push(Update::Problem(problem(&path, String::new(), message)));
                    }
                }
            }
        }
        self.send_difference(&mut updates);
        Ok(updates)
    }

    /// Configuration documents, in the order of the files.
    pub(super) fn config(&self) -> Vec<ConfigDocument> {
        let of_file = |(path, file): (&PathBuf, &File)| {
            let path = path.clone();
            let documents = file.config.iter().cloned();
            documents.map(move |value| ConfigDocument { path: path.clone(), value }).collect::<Vec<_>>()
        };
        self.files.iter().flat_map(of_file).collect()
    }

    /// Reads all files, unless their times and sizes are those of last time.
    #[allow(clippy::type_complexity)]
    fn look(
        &self,
        thorough: bool,
    ) -> io::Result<Option<(Signature, BTreeMap<PathBuf, io::Result<Vec<u8>>>)>> {
        let mut signature = Signature::new();
        let metadata = std::fs::metadata(&self.path)?;
        if metadata.is_dir() {
            list(&self.path, 0, &mut signature)?;
            signature.sort_unstable();
        } else {
            signature.push((self.path.clone(), metadata.modified().ok(), metadata.len()));
        }
        if !thorough && signature == self.signature && self.unreadable.is_none() {
            return Ok(None);
        }
        let mut contents = BTreeMap::new();
        for (path, ..) in &signature {
            match std::fs::read(path) {
                // Gone between listing and reading.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                content => {
                    contents.insert(path.clone(), content);
                }
            }
        }
        Ok(Some((signature, contents)))
    }

    /// A file with objects that is absent or empty may be about to be written.
    fn is_being_replaced(&self, contents: &BTreeMap<PathBuf, io::Result<Vec<u8>>>) -> bool {
        self.files.iter().any(|(path, file)| {
            let empty = match contents.get(path) {
                Some(Ok(content)) => content.trim_ascii().is_empty(),
                Some(Err(_)) => false,
                None => true,
            };
            empty && !file.objects.is_empty()
        })
    }

    /// Takes in the content of one file.
    fn read(&mut self, path: PathBuf, content: &[u8], updates: &mut Vec<Update>) {
        let digest = digest(content);
        let old = self.files.get_mut(&path);
        if old.as_ref().is_some_and(|old| old.digest == digest) {
            return;
        }
        let report = |field: String, message: String| Update::Problem(problem(&path, field, message));
        let parsed = std::str::from_utf8(content)
            .map_err(|e| parse::ParseError { line: None, message: e.to_string() })
            .and_then(|text| parse::objects(&path, text));
        let parsed = match parsed {
            Ok(parsed) => parsed,
            Err(error) => {
                let line = error.line.map(|line| format!("line {line}")).unwrap_or_default();
                updates.push(report(line, format!("{}; its objects stay as they were", error.message)));
                self.files.entry(path).or_default().digest = digest;
                return;
            }
        };
        let mut file = File { digest, ..File::default() };
        let none = BTreeMap::new();
        let before = old.map_or(&none, |old| &old.objects);
        for object in parsed {
            let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
            let kind = text("kind");
            if CONFIG_KINDS.contains(&kind) {
                file.config.push(object);
                continue;
            }
            if !object.is_object() || kind.is_empty() {
                let message = "holds a document that is no object with a kind: ignored";
                updates.push(report(String::new(), message.to_owned()));
                continue;
            }
            if let Some(noted) = &mut self.pods {
                pods::note(noted, kind, &object);
            }
            let Some(kind) = Kind::of(text("apiVersion"), kind) else {
                tracing::debug!(path = %path.display(), kind, "not a kind that is looked at");
                continue;
            };
            let converted = self.converter.value(kind, object);
            for mut problem in converted.problems {
                problem.message = format!("{} (in {})", problem.message, path.display());
                updates.push(Update::Problem(problem));
            }
            let Some(name) = converted.name else { continue };
            let key = (kind, name);
            let event = match converted.event {
                Some(event) if is_gone(&event) => continue,
                Some(event) => event,
                // It cannot be told what it says: it stays as it was.
                None => match before.get(&key) {
                    Some(event) => event.clone(),
                    None => continue,
                },
            };
            if file.objects.contains_key(&key) {
                updates.push(Update::Problem(Problem {
                    kind: kind.name(),
                    name: key.1.to_string(),
                    field: String::new(),
                    message: format!("is twice in {}: the later one counts", path.display()),
                }));
            }
            file.objects.insert(key, event);
        }
        self.files.insert(path, file);
    }

    /// Puts the files together and answers how that differs from what was sent.
    fn send_difference(&mut self, updates: &mut Vec<Update>) {
        let mut now: BTreeMap<&Key, (&Event, &Path)> = BTreeMap::new();
        let mut conflicts = BTreeSet::new();
        for (path, file) in &self.files {
            for (key, event) in &file.objects {
                if let Some((_, other)) = now.insert(key, (event, path)) {
                    conflicts.insert(Problem {
                        kind: key.0.name(),
                        name: key.1.to_string(),
                        field: String::new(),
                        message: format!(
                            "is in {} and in {}: the latter counts",
                            other.display(),
                            path.display()
                        ),
                    });
                }
            }
        }
        if self.node_name.is_none() {
            let nodes: Vec<_> = now.keys().filter(|key| key.0 == Kind::Node).copied().collect();
            if nodes.len() > 1 {
                conflicts.insert(Problem {
                    kind: Kind::Node.name(),
                    name: nodes.iter().map(|key| &*key.1.name).collect::<Vec<_>>().join(", "),
                    field: String::new(),
                    message: "which of them is this node? Its name is needed: all ignored".to_owned(),
                });
                now.retain(|key, _| key.0 != Kind::Node);
            }
        }
        let new = conflicts.difference(&self.conflicts).cloned();
        updates.extend(new.map(Update::Problem));

        let changed = now.iter().filter(|(key, (event, _))| self.given.get(**key) != Some(*event));
        let changed: Vec<(Key, Event)> =
            changed.map(|(key, (event, _))| ((*key).clone(), (*event).clone())).collect();
        let gone: Vec<Key> = self.given.keys().filter(|key| !now.contains_key(key)).cloned().collect();
        self.conflicts = conflicts;
        // What comes before what goes: a renamed Service does not leave a gap.
        for (key, event) in changed {
            updates.push(Update::Event(event.clone()));
            self.given.insert(key, event);
        }
        for key in gone {
            updates.push(Update::Event(key.0.gone(&key.1)));
            self.given.remove(&key);
        }
    }
}

/// Manifests below a folder. Hidden files are editors' and the inner works of `ConfigMap` volumes,
/// whose visible names are symbolic links.
fn list(folder: &Path, depth: usize, found: &mut Signature) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // Follows symbolic links; one that leads nowhere is not there (yet).
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        if metadata.is_dir() {
            if depth < DEEPEST {
                match list(&path, depth + 1, found) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
        } else if is_manifest(&path) {
            found.push((path, metadata.modified().ok(), metadata.len()));
        }
    }
    Ok(())
}

fn is_manifest(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["yaml", "yml", "json"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

fn digest(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    hasher.finish()
}

fn problem(path: &Path, field: String, message: String) -> Problem {
    Problem { kind: "file", name: path.display().to_string(), field, message }
}
