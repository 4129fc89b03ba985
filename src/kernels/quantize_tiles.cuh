// A thread block's way through tiles, each of which is one warpgroup's, and how a unit's scale comes together
// meanwhile.
#pragma once
#include "arch/barrier.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/quantize_parts.cuh"

namespace fa3 {

/// A tile, and the place of shared memory that it comes to: each in its turn.
struct Tile {
  int batch, head, index;  // of its unit
  int place;
  uint32_t turn;
};

/// The tiles of all units of a group, one after the other; each of its thread blocks has every nth of them. A unit has
/// at least as many as the group has blocks.
template <int kPlaces>
struct TileCursor {
  const QuantizeArgs& args;
  Tile tile;
  int round = 0;

  /// At the block's tile number `first`.
  __device__ __forceinline__ TileCursor(const QuantizeArgs& args, int group, int rank, int first)
      : args(args), tile{0, group, rank, 0, 0} {
    settle();
    advance(first);
  }
  /// By so many of the block's tiles.
  __device__ __forceinline__ void advance(int tiles) {
    tile.place += tiles;
    if (tile.place >= kPlaces) tile.place -= kPlaces, tile.turn ^= 1;
    for (tile.index += tiles * args.blocks_per_group; tile.index >= args.unit_steps; tile.index -= args.unit_steps) {
      ++round;
      tile.head += args.groups;
      settle();
    }
  }

 private:
  __device__ __forceinline__ void settle() {
    for (; tile.head >= args.unit_heads; tile.head -= args.unit_heads) ++tile.batch;
  }
};

/// Warps leave what they have found in a unit, and go on. One warp tells it to other thread blocks, and others gather
/// what these have told, each a unit at a time. A block that has a unit alone needs no parts.
template <class Scale, int kWarps, int kSlots>
class TileGathering {
 public:
  static constexpr int kGatherers = 2;

  __device__ __forceinline__ TileGathering(const QuantizeArgs& args, int group, int rank)
      : args_(args), parts_(args, group, rank), group_(group), rank_(rank) {}

  /// In the beginning, by one warp.
  __device__ __forceinline__ void init() const {
    const int lane = threadIdx.x % 32;
    if (lane >= kSlots) return;
    Slot& slot = slot_of(lane);
    slot.amax = 0;
    slot.left.init(kWarps);
    slot.known.init(1);
  }

  /// Whether this block has its units alone.
  __device__ __forceinline__ bool alone() const { return args_.blocks_per_group == 1; }

  /// What a warp has found in unit number `round` of the group. Each leaves all of them, in their order.
  __device__ __forceinline__ void leave(int round, float amax) const {
    amax = warp_amax(amax);
    if (!arch::leads()) return;
    Slot& slot = slot_of(round);
    atomicMax(&slot.amax, __float_as_uint(amax));
    slot.left.arrive();
  }

  /// A unit's scale, once it is known.
  __device__ __forceinline__ Scale take(int round) const {
    Slot& slot = slot_of(round);
    slot.known.wait(turn_of(round));
    return slot.scale;
  }

  __device__ __forceinline__ bool is_known(int round) const { return slot_of(round).known.is_over(turn_of(round)); }

  /// The warp that tells.
  __device__ __forceinline__ void tell() const {
    if (alone() && args_.unit_steps == 1) return;  // nobody leaves anything
    const int rounds = rounds_of(args_, group_);
    for (int round = 0; round < rounds; ++round) {
      Slot& slot = slot_of(round);
      slot.left.wait(turn_of(round));
      if (!arch::leads()) continue;
      const float amax = __uint_as_float(slot.amax);
      slot.amax = 0;
      alone() ? publish(round, amax) : parts_.leave(unit_of(round), amax);
    }
  }

  /// One of the warps that gather.
  __device__ __forceinline__ void gather(int index) const {
    if (alone()) return;
    const int rounds = rounds_of(args_, group_);
    if (index == 0) parts_.prepare_to_depart();
    for (int round = index; round < rounds; round += kGatherers) {
      slot_of(round).left.wait(turn_of(round));  // none is complete without this block's part
      const float amax = parts_.gather(unit_of(round));
      if (arch::leads()) publish(round, amax);
    }
    if (index > 0) return;
    for (int round = max(rounds - kGatherers, 0); round < rounds; ++round) slot_of(round).known.wait(turn_of(round));
    parts_.depart();
  }

 private:
  struct Slot {
    unsigned amax;  // of the warps that have left
    Scale scale;
    arch::Barrier left, known;
  };
  static __device__ __forceinline__ Slot& slot_of(int round) {
    __shared__ Slot slots[kSlots];
    return slots[round % kSlots];
  }
  static __device__ __forceinline__ uint32_t turn_of(int round) { return round / kSlots % 2; }

  __device__ __forceinline__ int unit_of(int round) const { return group_ + round * args_.groups; }

  __device__ __forceinline__ void publish(int round, float amax) const {
    Slot& slot = slot_of(round);
    const float descale = descale_of(amax);
    slot.scale = Scale(descale);
    slot.known.arrive();
    const int unit = unit_of(round);
    if (rank_ == 0) keep_descale(args_, unit / args_.unit_heads, unit % args_.unit_heads, descale);
  }

  const QuantizeArgs& args_;
  Parts parts_;
  int group_, rank_;
};

}  // namespace fa3
