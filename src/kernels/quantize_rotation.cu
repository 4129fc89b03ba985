// Quantisation to e4m3 with the rotation, for head dims and layouts that models have.
//
// Floor: as quantize.cu, 3 bytes an element. The rotation of 64 dims is a product with a matrix of ±1, for which tensor
// cores take a tenth of that time; larger blocks take a sum more an element for each factor of two. So x stays in
// shared memory as it was loaded, and is rotated twice: for amax, and for the codes. One warp brings tiles of rows by
// TMA, three more let a unit's amax come together, and warpgroups rotate, each its own tiles.
#include "kernels/quantize_rotation.cuh"

#include "kernels/quantize.h"
#include "kernels/quantize_launch.cuh"
#include "kernels/quantize_tiles.cuh"

namespace fa3 {
namespace {

/// How places pass between the warp that fills them and the warpgroups that read them.
template <class T>
struct Handover {
  arch::Barrier filled[T::kPlaces], free[T::kPlaces];

  /// One warp.
  __device__ __forceinline__ void init() {
    const int place = threadIdx.x % 32;
    if (place < T::kPlaces) {
      filled[place].init(1);
      free[place].init(4);  // warps of a warpgroup
    }
    arch::publish_barriers();
    __syncwarp();
  }
  /// Until a tile is there.
  __device__ __forceinline__ void wait_for(const Tile& tile) { filled[tile.place].wait(tile.turn); }
  /// A warp has done with what it read.
  __device__ __forceinline__ void give_back(int place) {
    __syncwarp();
    if (arch::leads()) free[place].arrive();
  }
};

/// The loading warp's work.
template <class T>
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const RotationArgs& args, uint8_t* memory, Handover<T>& handover)
      : args_(args), memory_{memory}, handover_(handover) {}

  __device__ __forceinline__ void load(const Tile& tile) const {
    handover_.free[tile.place].wait(tile.turn ^ 1);  // at first all are
    if (!arch::elected()) return;
    arch::Barrier& filled = handover_.filled[tile.place];
    filled.arrive_expecting(T::kTileBytes);
    uint8_t* to = memory_.tile(tile.place);
    const int row = tile.index * T::kRows;
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk)
      arch::load_box(to + chunk * T::Chunk::kBytes, &args_.x.map,
                     {chunk * T::kChunkDims, row, tile.head * args_.x.head_step, tile.batch * args_.x.batch_step},
                     filled);
    if constexpr (T::kRest > 0)
      arch::load_box(to + T::kChunks * T::Chunk::kBytes, &args_.rest.map,
                     {T::kBlock, row, tile.head * args_.rest.head_step, tile.batch * args_.rest.batch_step}, filled);
  }

 private:
  const RotationArgs& args_;
  RotationMemory<T> memory_;
  Handover<T>& handover_;
};

/// The tiles of a unit that are a thread block's where units go one by one: a stretch of them, to the last one and
/// back, so that the way back begins with what is in L2. What has lost its place meanwhile is loaded again.
template <class T>
class Stretch {
 public:
  int tiles;

  __device__ __forceinline__ Stretch(const QuantizeArgs& args, int rank) : args_(args), places_(0, 0, 1) {
    const int all = static_cast<int>((args.unit_rows + T::kRows - 1) / T::kRows);
    const int each = (all + args.blocks_per_group - 1) / args.blocks_per_group;
    first_ = rank * each;
    tiles = max(min(each, all - first_), 0);
    places_ = Places(T::kUnitPlaces, tiles, T::kUnitRing);
  }
  __device__ __forceinline__ bool lost(int i) const { return places_.lost(i); }
  /// Of a load if `loads`: each place's turn changes by it.
  __device__ __forceinline__ Tile tile(int unit, int i, bool loads) {
    const int place = places_.of(i);
    const uint32_t turn = turns_ >> place & 1;
    if (loads) turns_ ^= 1u << place;
    return {unit / args_.unit_heads, unit % args_.unit_heads, first_ + i, place, turn};
  }

 private:
  const QuantizeArgs& args_;
  int first_;
  Places places_;
  uint32_t turns_ = 0;
};

template <class T>
__device__ __forceinline__ RotatedRows rows_of(const QuantizeArgs& args, const Tile& tile) {
  const int64_t row = int64_t{tile.index} * T::kRows;
  return {args.out + tile.batch * args.out_unit[0] + tile.head * args.out_unit[1] + row * args.rows.out[0],
          static_cast<int>(min(int64_t{args.unit_rows} - row, int64_t{T::kRows}))};
}

template <class T>
__device__ __forceinline__ void load_tiles(const RotationArgs& all, uint8_t* memory, Handover<T>& handover, int group,
                                           int rank) {
  const QuantizeArgs& args = all.common;
  const TileLoader<T> loader(all, memory, handover);
  if (args.unit_steps) {
    const int rounds = rounds_of(args, group);
    // With more on their way than memory needs to be busy, what comes first comes later, and so does all that waits.
    TileCursor<T::kPlaces> at(args, group, rank, 0), behind = at;
    for (int under_way = 0; rounds > at.round; at.advance(1)) {
      if (under_way < T::kUnderWay) {
        ++under_way;
      } else {
        handover.wait_for(behind.tile);
        behind.advance(1);
      }
      loader.load(at.tile);
    }
    return;
  }
  Stretch<T> stretch(args, rank);
  for (int unit = group; unit < args.units; unit += args.groups) {
    for (int i = 0; i < stretch.tiles; ++i) loader.load(stretch.tile(unit, i, true));
    for (int i = stretch.tiles - 1; i >= 0; --i)
      if (stretch.lost(i)) loader.load(stretch.tile(unit, i, true));
  }
}

/// Units of which a block can hold its part and as much of others are one stream of tiles. A warpgroup looks for amax
/// in the next as soon as it is there, for which others wait, and else writes one whose unit's scale is known: reading,
/// writing and waiting go on beside each other.
template <class T, class Gathering>
__device__ __forceinline__ void rotate_stream(const QuantizeArgs& args, Rotation<T>& rotation, Handover<T>& handover,
                                              const Gathering& gathering, int group, int rank, int warpgroup) {
  const int rounds = rounds_of(args, group);
  TileCursor<T::kPlaces> scans(args, group, rank, warpgroup), writes = scans;
  int left = 0, taken = -1, held = 0;  // units, and tiles
  float amax = 0;
  const auto leave = [&] {
    for (; left < min(scans.round, rounds); ++left, amax = 0) gathering.leave(left, amax);
  };
  // What one warp has seen all will see.
  const auto any = [&](bool over) { return arch::barrier_any(2 + warpgroup, 128, over); };
  RotationScale<T> scale(1);
  leave();
  while (rounds > writes.round) {
    if (rounds > scans.round && any(handover.filled[scans.tile.place].is_over(scans.tile.turn))) {
      handover.wait_for(scans.tile);
      rotation.rotate(scans.tile.place);
      amax = fmaxf(amax, rotation.amax());
      scans.advance(T::kWarpgroups);
      ++held;
      leave();
    } else if (held > 0 && (writes.round == taken || any(gathering.is_known(writes.round)))) {
      if (writes.round != taken) scale = gathering.take(taken = writes.round);
      rotation.rotate(writes.tile.place);
      rotation.write(writes.tile.place, rows_of<T>(args, writes.tile), scale);
      handover.give_back(writes.tile.place);
      writes.advance(T::kWarpgroups);
      --held;
    }
  }
}

/// Units of a tile each, which are a warpgroup's own: what it has rotated waits in registers.
template <class T>
__device__ __forceinline__ void rotate_alone(const QuantizeArgs& args, Rotation<T>& rotation, Handover<T>& handover,
                                             int group, int warpgroup) {
  __shared__ float warps[2][T::kWarpgroups][4];  // by turns: who is ahead writes where nobody reads any more
  const int rounds = rounds_of(args, group);
  TileCursor<T::kPlaces> at(args, group, 0, warpgroup);
  for (int turn = 0; rounds > at.round; at.advance(T::kWarpgroups), turn ^= 1) {
    handover.wait_for(at.tile);
    rotation.rotate(at.tile.place);
    const float amax = warp_amax(rotation.amax());
    float (&own)[4] = warps[turn][warpgroup];
    if (arch::leads()) own[threadIdx.x / 32 % 4] = amax;
    arch::barrier_sync(2 + warpgroup, 128);
    const float descale = descale_of(fmaxf(fmaxf(own[0], own[1]), fmaxf(own[2], own[3])));
    if (threadIdx.x % 128 == 0) keep_descale(args, at.tile.batch, at.tile.head, descale);
    rotation.write(at.tile.place, rows_of<T>(args, at.tile), RotationScale<T>(descale));
    handover.give_back(at.tile.place);
  }
}

/// Units of any size, one after the other.
template <class T, class Gathering>
__device__ __forceinline__ void rotate_units(const QuantizeArgs& args, Rotation<T>& rotation, Handover<T>& handover,
                                             const Gathering& gathering, int group, int rank, int warpgroup) {
  Stretch<T> stretch(args, rank);
  for (int unit = group, round = 0; unit < args.units; unit += args.groups, ++round) {
    float amax = 0;
    int i = warpgroup;
    for (; i < stretch.tiles; i += T::kWarpgroups) {
      const Tile tile = stretch.tile(unit, i, true);
      handover.wait_for(tile);
      rotation.rotate(tile.place);
      amax = fmaxf(amax, rotation.amax());
      if (stretch.lost(i)) handover.give_back(tile.place);
    }
    gathering.leave(round, amax);
    const RotationScale<T> scale = gathering.take(round);
    for (i -= T::kWarpgroups; i >= 0; i -= T::kWarpgroups) {
      const Tile tile = stretch.tile(unit, i, stretch.lost(i));
      if (stretch.lost(i)) handover.wait_for(tile);
      rotation.rotate(tile.place);
      rotation.write(tile.place, rows_of<T>(args, tile), scale);
      handover.give_back(tile.place);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kTile.threads(), 1)
    quantize_rotation_kernel(const __grid_constant__ RotationArgs all) {
  extern __shared__ __align__(1024) uint8_t rotation_memory[];
  __shared__ Handover<T> handover;
  constexpr int kWarps = 4 * T::kWarpgroups, kUnits = T::kPlaces + T::kWarpgroups;  // that are between leave and take
  using Gathering = TileGathering<RotationScale<T>, kWarps, kUnits <= 16 ? 16 : 32>;
  static_assert(kUnits <= 32 && RotationTile::kServants == 2 + Gathering::kGatherers);
  const QuantizeArgs& args = all.common;
  const int group = blockIdx.x % args.groups, rank = blockIdx.x / args.groups;
  const int warp = arch::uniform(static_cast<int>(threadIdx.x) / 32), servant = warp - kWarps;
  const Gathering gathering(args, group, rank);
  // Nobody waits for all: loads for none, and servants not for the matrices.
  constexpr int kReady = 1, kReadyThreads = 32 * (kWarps + 2), kServantsReady = 2 + T::kWarpgroups;
  if (servant >= 0) {
    if constexpr (T::kHeadDim > 128) arch::shrink_registers<56>();
    if (servant == 0) {
      handover.init();
      arch::barrier_arrive(kReady, kReadyThreads);
      load_tiles(all, rotation_memory, handover, group, rank);
    } else if (servant == 1) {
      gathering.init();
      arch::barrier_arrive(kReady, kReadyThreads);
      arch::barrier_arrive(kServantsReady, 32 * (1 + Gathering::kGatherers));
      gathering.tell();
    } else {
      arch::barrier_sync(kServantsReady, 32 * (1 + Gathering::kGatherers));
      gathering.gather(servant - 2);
    }
  } else {
    if constexpr (T::kHeadDim > 128) arch::grow_registers<224>();
    if (args.unit_steps) prefetch_steps(args, sizeof(typename T::Type), group, rank, T::kUnderWay);
    write_matrices(RotationMemory<T>{rotation_memory});
    arch::barrier_sync(kReady, kReadyThreads);
    Rotation<T> rotation(args, rotation_memory);
    if (!args.unit_steps) return rotate_units(args, rotation, handover, gathering, group, rank, warp / 4);
    if (gathering.alone() && args.unit_steps == 1) return rotate_alone(args, rotation, handover, group, warp / 4);
    rotate_stream(args, rotation, handover, gathering, group, rank, warp / 4);
  }
}

template <class Element>
cudaError_t launch_head_dim(const QuantizePlan& plan, const RotationArgs& args, int device, cudaStream_t stream) {
  const auto launch = [&]<int kHeadDim>() {
    using T = RotationTraits<Element, kHeadDim>;
    constexpr int kBytes = T::kTile.bytes();
    return launch_quantize_kernel<quantize_rotation_kernel<T>, kBytes>(args, args.common, T::kTile.threads(), kBytes,
                                                                       device, stream);
  };
  switch (plan.tile_dim) {
    case 64:
      return launch.template operator()<64>();
    case 80:
      return launch.template operator()<80>();
    case 96:
      return launch.template operator()<96>();
    case 128:
      return launch.template operator()<128>();
    case 192:
      return launch.template operator()<192>();
    default:
      return launch.template operator()<256>();
  }
}

}  // namespace

cudaError_t launch_rotation(const QuantizePlan& plan, const RotationArgs& args, int device, cudaStream_t stream) {
  return plan.kind.dtype == FA3_FLOAT16 ? launch_head_dim<Float16>(plan, args, device, stream)
                                        : launch_head_dim<BFloat16>(plan, args, device, stream);
}

}  // namespace fa3
