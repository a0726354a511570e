//! One allocation for strings that many objects share: nodes, zones, namespaces, port names.

use std::collections::HashSet;
use std::sync::Arc;

use shunt_core::endpoint::Hints;

/// Shared strings and hints. What nobody else holds any more is let go of now and then.
#[derive(Default, Debug)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    hints: HashSet<SharedHints>,
    sweep_at: usize,
}

/// `Hints` are ordered, not hashed: hash what they hold.
#[derive(PartialEq, Eq, Debug)]
struct SharedHints(Arc<Hints>);

impl std::hash::Hash for SharedHints {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.zones.hash(state);
        self.0.nodes.hash(state);
    }
}

/// Below this number of strings a sweep is not worth its time.
const SMALLEST_SWEEP: usize = 1024;

impl Interner {
    /// The shared copy of a string.
    pub(crate) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(shared) = self.texts.get(text) {
            return shared.clone();
        }
        self.sweep();
        let shared: Arc<str> = text.into();
        self.texts.insert(shared.clone());
        shared
    }

    /// The shared copy of a set of hints.
    pub(crate) fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        let hints = SharedHints(Arc::new(hints));
        if let Some(shared) = self.hints.get(&hints) {
            return shared.0.clone();
        }
        self.sweep();
        let shared = hints.0.clone();
        self.hints.insert(hints);
        shared
    }

    /// Drops what nobody else holds, each time the sets have doubled: constant cost a string.
    fn sweep(&mut self) {
        if self.texts.len() + self.hints.len() < self.sweep_at.max(SMALLEST_SWEEP) {
            return;
        }
        self.hints.retain(|h| Arc::strong_count(&h.0) > 1);
        self.texts.retain(|t| Arc::strong_count(t) > 1);
        self.sweep_at = 2 * (self.texts.len() + self.hints.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_memory_and_unused_ones_are_let_go() {
        let mut interner = Interner::default();
        let kept = interner.text("node-1");
        assert!(Arc::ptr_eq(&kept, &interner.text("node-1")));
        for i in 0..10 * SMALLEST_SWEEP {
            interner.text(&format!("gone-{i}"));
        }
        assert!(interner.texts.len() <= 2 * SMALLEST_SWEEP, "{}", interner.texts.len());
        assert!(Arc::ptr_eq(&kept, &interner.text("node-1")));
    }
}
