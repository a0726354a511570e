//! Room among the slots: groups lie in extents whose size is a power of two, aligned to it.

use std::collections::BTreeMap;
use std::ops::Range;

use shunt_ebpf_abi::Group;

/// The extent that a group may fill.
pub fn extent(group: Group) -> Range<u32> {
    let size = if group.count == 0 { 0 } else { group.count.checked_next_power_of_two().unwrap_or(u32::MAX) };
    group.base..group.base.saturating_add(size)
}

/// Which slots are taken.
#[derive(Clone, Debug, Default)]
pub struct Room {
    range: Range<u32>,
    /// Ends of taken extents by their starts; none touches another.
    taken: BTreeMap<u32, u32>,
    /// For each size, where the search for room begins: nothing that large is free before.
    hints: [u32; 32],
}

impl Room {
    /// Room in a range, where some extents are taken.
    pub fn new(range: Range<u32>, taken: impl Iterator<Item = Range<u32>>) -> Self {
        let mut room = Self { hints: [range.start; 32], range, taken: BTreeMap::new() };
        taken.for_each(|extent| room.take(extent));
        room
    }

    /// Takes an extent, parts of which may be taken already.
    pub fn take(&mut self, extent: Range<u32>) {
        if extent.is_empty() {
            return;
        }
        let Range { mut start, mut end } = extent;
        if let Some((from, to)) = self.taken.range(..=start).next_back().map(|(from, to)| (*from, *to))
            && to >= start
        {
            start = from;
            end = end.max(to);
        }
        while let Some((from, to)) = self.taken.range(start..=end).next().map(|(from, to)| (*from, *to)) {
            self.taken.remove(&from);
            end = end.max(to);
        }
        self.taken.insert(start, end);
    }

    /// Whether an extent lies in the range and nothing of it is taken.
    pub fn is_free(&self, extent: &Range<u32>) -> bool {
        self.range.start <= extent.start
            && extent.end <= self.range.end
            && self.taken.range(..extent.end).next_back().is_none_or(|(_, end)| *end <= extent.start)
    }

    /// Takes an extent for so many slots; `None` when there is no room.
    pub fn allocate(&mut self, count: u32) -> Option<u32> {
        let size = count.checked_next_power_of_two()?;
        let hint = self.hints.get_mut(size.trailing_zeros() as usize)?;
        let mut start = hint.checked_next_multiple_of(size)?;
        loop {
            let end = start.checked_add(size)?;
            if end > self.range.end {
                return None;
            }
            match self.taken.range(..end).next_back() {
                Some((_, taken)) if *taken > start => start = taken.checked_next_multiple_of(size)?,
                _ => break,
            }
        }
        *hint = start + size;
        self.take(start..start + size);
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_aligned_and_never_overlap() {
        let mut room = Room::new(64..128, [64..68, 80..81].into_iter());
        assert_eq!(room.allocate(1), Some(68));
        assert_eq!(room.allocate(3), Some(72));
        assert_eq!(room.allocate(5), Some(88));
        assert_eq!(room.allocate(16), Some(96));
        assert_eq!(room.allocate(17), None);
        assert_eq!(room.allocate(9), Some(112));
        assert_eq!(room.allocate(4), Some(76));
        assert_eq!(room.allocate(4), Some(84));
        assert_eq!(room.allocate(2), Some(70));
        assert_eq!(room.allocate(8), None);
        assert!(!room.is_free(&(80..82)) && room.is_free(&(82..84)) && !room.is_free(&(126..130)));
    }

    #[test]
    fn groups_fill_powers_of_two() {
        assert_eq!(extent(Group { base: 8, count: 0 }), 8..8);
        assert_eq!(extent(Group { base: 8, count: 5 }), 8..16);
        assert_eq!(extent(Group { base: 8, count: 8 }), 8..16);
        assert_eq!(extent(Group { base: u32::MAX, count: u32::MAX }), u32::MAX..u32::MAX);
    }
}
