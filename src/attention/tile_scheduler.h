// Where a sequence's tiles begin, and the order in which tiles are handed out.
#pragma once
#include "arch/host_device.h"

namespace fa3 {

/// Rows of a sequence's first tile of `tile_m` queries that lie ahead of its first query, under a causal mask: the
/// whole groups of `group` that its last tile would have idle, of up to three in a tile. A warpgroup that is alone in a
/// tile takes some 60% of the time that three take together, and there the last tile has the most keys, the first the
/// fewest.
FA3_HOST_DEVICE int rows_ahead(int queries, int tiles, int tile_m, int group) {
  const int idle = tiles * tile_m - queries;
  return idle >= 2 * group ? 2 * group : idle >= group ? group : 0;
}

/// Tiles of `heads` heads with num_m_blocks each. Under a causal mask later m_blocks are longer, so they come first,
/// but only inside a section of heads whose keys and values stay in L2 together; the shortest m_blocks of all heads
/// come at the very end, where they fill the gaps that long tiles leave. Sections of one head are plain order.
struct TileOrder {
  int heads_per_section;
  int short_m_blocks;  // how many m_blocks of each head wait for the end

  struct Tile {
    int m_block, head;
  };

  FA3_HOST_DEVICE Tile at(int index, int heads, int num_m_blocks) const {
    if (num_m_blocks == 1) return {0, index};  // short calls should not wait for divisions
    const int tail = smaller(short_m_blocks, num_m_blocks), body = num_m_blocks - tail;
    if (index >= heads * body) {
      const int rest = index - heads * body, step = rest / heads;
      return {tail - 1 - step, rest - step * heads};
    }
    const int section = index / (heads_per_section * body), first_head = section * heads_per_section;
    const int rest = index - first_head * body;
    const int width = smaller(heads_per_section, heads - first_head);
    const int step = rest / width;
    return {num_m_blocks - 1 - step, first_head + rest - step * width};
  }
};

}  // namespace fa3
