//! Objects, versions and the history of changes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::Resource;

/// An object as it is sent, and what selectors look at.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) key: (String, String),
    pub(crate) json: Bytes,
    labels: HashMap<String, String>,
    cluster_ip: String,
}

/// One change. `old` and `new` say what selectors saw before and see now.
pub(crate) struct Change {
    pub(crate) version: u64,
    pub(crate) resource: Resource,
    pub(crate) old: Option<Arc<Stored>>,
    /// For a deletion, the object with the version of its deletion.
    pub(crate) new: Arc<Stored>,
    pub(crate) deleted: bool,
}

#[derive(Default)]
pub(crate) struct Store {
    version: u64,
    objects: BTreeMap<Resource, BTreeMap<(String, String), Arc<Stored>>>,
    history: Vec<Arc<Change>>,
    /// Versions below this one are forgotten.
    oldest: u64,
}

impl Store {
    pub(crate) fn version(&self) -> u64 {
        // Nothing has version 0; a client would take it for "any".
        self.version.max(1)
    }

    pub(crate) fn oldest(&self) -> u64 {
        self.oldest
    }

    pub(crate) fn put(&mut self, mut object: Value) {
        let kind = object["kind"].as_str().unwrap_or_default();
        let Some(resource) = Resource::ALL.into_iter().find(|r| r.kind() == kind) else {
            panic!("fake API server: unknown kind {kind:?}")
        };
        let Some(name) = object["metadata"]["name"].as_str().map(str::to_owned) else {
            panic!("fake API server: {kind} without a name")
        };
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.insert(resource, (namespace, name), object.to_string(), &object);
    }

    pub(crate) fn put_raw(&mut self, resource: Resource, namespace: &str, name: &str, json: &str) {
        self.version += 1;
        let json = json.replace("{rv}", &self.version.to_string());
        let object = serde_json::from_str(&json).unwrap_or_default();
        self.insert(resource, (namespace.to_owned(), name.to_owned()), json, &object);
    }

    fn insert(&mut self, resource: Resource, key: (String, String), json: String, object: &Value) {
        let labels = object["metadata"]["labels"].as_object();
        let labels = labels.into_iter().flatten();
        let new = Arc::new(Stored {
            key: key.clone(),
            labels: labels.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())).collect(),
            cluster_ip: object["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned(),
            json: json.into(),
        });
        let old = self.objects.entry(resource).or_default().insert(key, new.clone());
        self.history.push(Arc::new(Change { version: self.version, resource, old, new, deleted: false }));
    }

    pub(crate) fn delete(&mut self, resource: Resource, namespace: &str, name: &str) -> bool {
        let key = (namespace.to_owned(), name.to_owned());
        let Some(old) = self.objects.get_mut(&resource).and_then(|all| all.remove(&key)) else {
            return false;
        };
        self.version += 1;
        let mut json = serde_json::from_slice::<Value>(&old.json).unwrap_or_default();
        if json["metadata"].is_object() {
            json["metadata"]["resourceVersion"] = self.version.to_string().into();
        }
        let new = Arc::new(Stored {
            key,
            json: json.to_string().into(),
            labels: old.labels.clone(),
            cluster_ip: old.cluster_ip.clone(),
        });
        let change = Change { version: self.version, resource, old: Some(old), new, deleted: true };
        self.history.push(Arc::new(change));
        true
    }

    pub(crate) fn expire(&mut self) {
        // A version of its own, so that whoever is at the newest one is behind, too.
        self.version += 1;
        self.oldest = self.version;
        self.history.clear();
    }

    pub(crate) fn all(&self, resource: Resource) -> impl Iterator<Item = Arc<Stored>> {
        self.objects.get(&resource).into_iter().flat_map(BTreeMap::values).cloned()
    }

    pub(crate) fn get(&self, resource: Resource, key: &(String, String)) -> Option<Arc<Stored>> {
        self.objects.get(&resource)?.get(key).cloned()
    }

    /// Changes after a version.
    pub(crate) fn since(&self, version: u64) -> &[Arc<Change>] {
        let start = self.history.partition_point(|change| change.version <= version);
        &self.history[start..]
    }
}

/// Label and field selectors of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector {
    labels: Vec<Term>,
    fields: Vec<Term>,
}

#[derive(Clone, Debug)]
enum Term {
    Exists(String),
    Absent(String),
    Equal(String, String),
    NotEqual(String, String),
}

impl Selector {
    pub(crate) fn parse(resource: Resource, labels: &str, fields: &str) -> Result<Self, String> {
        let selector = Self { labels: terms(labels), fields: terms(fields) };
        for term in &selector.fields {
            let (Term::Equal(key, _) | Term::NotEqual(key, _)) = term else {
                return Err("invalid field selector".to_owned());
            };
            let known = matches!(key.as_str(), "metadata.name" | "metadata.namespace")
                || (key == "spec.clusterIP" && resource == Resource::Services);
            if !known {
                return Err(format!("field label not supported: {key}"));
            }
        }
        Ok(selector)
    }

    pub(crate) fn selects(&self, object: &Stored) -> bool {
        let label = |key: &str| object.labels.get(key).map(String::as_str);
        let field = |key: &str| {
            Some(match key {
                "metadata.name" => object.key.1.as_str(),
                "metadata.namespace" => object.key.0.as_str(),
                _ => object.cluster_ip.as_str(),
            })
        };
        self.labels.iter().all(|t| t.holds(label)) && self.fields.iter().all(|t| t.holds(field))
    }
}

impl Term {
    fn holds<'o>(&self, value: impl Fn(&str) -> Option<&'o str>) -> bool {
        match self {
            Self::Exists(key) => value(key).is_some(),
            Self::Absent(key) => value(key).is_none(),
            Self::Equal(key, want) => value(key) == Some(want),
            Self::NotEqual(key, want) => value(key) != Some(want),
        }
    }
}

fn terms(text: &str) -> Vec<Term> {
    let terms = text.split(',').map(str::trim).filter(|term| !term.is_empty());
    terms
        .map(|term| {
            if let Some((key, value)) = term.split_once("!=") {
                Term::NotEqual(key.to_owned(), value.to_owned())
            } else if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
                Term::Equal(key.to_owned(), value.to_owned())
            } else if let Some(key) = term.strip_prefix('!') {
                Term::Absent(key.to_owned())
            } else {
                Term::Exists(term.to_owned())
            }
        })
        .collect()
}
