// In which order a block of keys goes through the queries that see it.
#pragma once
#include "attention/block_range.h"

namespace fa3 {

/// Blocks of queries, for each head of a group.
struct QueryWalk {
  QueryBlockRange blocks;
  int start;       // the block of queries that comes first
  bool backwards;  // from the last block, which is then the start, to the first

  FA3_HOST_DEVICE int steps(int group) const { return group * blocks.count(); }
};

/// A step of it.
struct QueryStep {
  int m_block, head;  // head of the group

  FA3_HOST_DEVICE explicit QueryStep(const QueryWalk& walk) : m_block(walk.start), head(0) {}

  /// Backwards, where blocks of keys take turns, the heads alternate: then all blocks of keys come to the same queries
  /// after as many steps, however few of them they see, and none waits for a longer one between two heads.
  FA3_HOST_DEVICE void advance(const QueryWalk& walk, int group) {
    if (walk.backwards) {
      if (++head < group) return;
      head = 0;
      --m_block;
    } else {
      m_block = m_block == walk.blocks.end - 1 ? walk.blocks.begin : m_block + 1;
      if (m_block == walk.start) ++head;
    }
  }
};

}  // namespace fa3
