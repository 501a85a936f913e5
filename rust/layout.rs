//! In which order samples lie in memory, and which of them belong together. Uses nothing.

use std::ops::Range;

/// Samples per block: a panel of a block stays in the first-level cache, and the block of a maximum is soon searched.
const BLOCK: usize = 128;
/// Where a maximum a block and class would take more bytes a target than this, blocks are longer, up to the second-level cache.
const PEAK_BYTES: usize = 2 << 20;
const LONGEST: usize = 8 * BLOCK;

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
    pub fn whole(samples: usize, classes: usize) -> Self {
        let mut block = BLOCK;
        while block < LONGEST && samples / block * classes * size_of::<f32>() > PEAK_BYTES {
            block *= 2;
        }
        Layout::new((0..samples).collect(), &[samples], block)
    }

    /// A group for each label below `groups`; some may be empty.
    pub fn by_label(labels: &[usize], groups: usize) -> Self {
        let mut order: Vec<usize> = (0..labels.len()).collect();
        order.sort_by_key(|&i| labels[i]);
        let mut sizes = vec![0; groups];
        labels.iter().for_each(|&l| sizes[l] += 1);
        Layout::new(order, &sizes, BLOCK)
    }

    fn new(order: Vec<usize>, sizes: &[usize], block: usize) -> Self {
        let (mut blocks, mut groups, mut first) = (Vec::new(), Vec::new(), 0);
        for &size in sizes {
            let (start, end) = (blocks.len(), first + size);
            blocks.extend((first..end).step_by(block).map(|p| p..end.min(p + block)));
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
    fn blocks_grow_with_the_number_of_classes() {
        assert_eq!(Layout::whole(5000, 1000).blocks()[0], 0..BLOCK);
        assert_eq!(Layout::whole(10_000, 21_841).blocks()[0], 0..4 * BLOCK);
        assert_eq!(Layout::whole(10, 1_000_000).blocks()[0], 0..10);
    }

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
