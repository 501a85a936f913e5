//! In which order samples lie in memory, and which of them belong together. Uses nothing.

use std::ops::Range;

/// Samples per block: a panel of a block stays in the first-level cache, and the block of a maximum is soon searched.
pub const BLOCK: usize = 128;

/// Groups of samples, each with QPs of its own, cut into blocks: none crosses from one group to the next.
pub struct Layout {
    /// Sample by position.
    order: Vec<usize>,
    /// Positions by block.
    blocks: Vec<Range<usize>>,
    /// Blocks by group.
    groups: Vec<Range<usize>>,
}

impl Layout {
    /// All samples in one group.
    pub fn whole(samples: usize) -> Self {
        Layout::new((0..samples).collect(), &[samples])
    }

    /// A group for each label below `groups`; some may be empty.
    pub fn by_label(labels: &[usize], groups: usize) -> Self {
        let mut order: Vec<usize> = (0..labels.len()).collect();
        order.sort_by_key(|&i| labels[i]);
        let mut sizes = vec![0; groups];
        labels.iter().for_each(|&l| sizes[l] += 1);
        Layout::new(order, &sizes)
    }

    fn new(order: Vec<usize>, sizes: &[usize]) -> Self {
        let (mut blocks, mut groups, mut first) = (Vec::new(), Vec::new(), 0);
        for &size in sizes {
            let (start, end) = (blocks.len(), first + size);
            blocks.extend((first..end).step_by(BLOCK).map(|p| p..end.min(p + BLOCK)));
            groups.push(start..blocks.len());
            first = end;
        }
        Layout { order, blocks, groups }
    }

    pub fn samples(&self) -> usize {
        self.order.len()
    }

    pub fn sample(&self, position: usize) -> usize {
        self.order[position]
    }

    pub fn blocks(&self) -> &[Range<usize>] {
        &self.blocks
    }

    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The blocks of a group.
    pub fn blocks_of(&self, group: usize) -> Range<usize> {
        self.groups[group].clone()
    }

    pub fn size_of(&self, group: usize) -> usize {
        self.blocks[self.blocks_of(group)].iter().map(Range::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_each_group_and_stay_within_it() {
        let labels: Vec<usize> = (0..300).map(|i| if i % 3 == 0 { 2 } else { 0 }).collect();
        let layout = Layout::by_label(&labels, 4);
        assert_eq!((0..4).map(|g| layout.size_of(g)).collect::<Vec<_>>(), [200, 0, 100, 0]);
        for group in 0..4 {
            for block in &layout.blocks()[layout.blocks_of(group)] {
                assert!(block.len() <= BLOCK);
                assert!(block.clone().all(|p| labels[layout.sample(p)] == group));
            }
        }
    }
}
