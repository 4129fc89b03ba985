// The rotation as a product of tensor cores: rows as TMA brings them, times a matrix of ±1.
#pragma once
#include "arch/barrier.cuh"
#include "arch/convert.cuh"
#include "arch/warpgroup.cuh"
#include "kernels/quantize_lane.cuh"
#include "kernels/rotation_args.h"
#include "tile/shared_tile.cuh"

namespace fa3 {

template <class Element, int kHeadDim_>
struct RotationTraits {
  using Type = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr RotationTile kTile{kHeadDim};
  static constexpr int kBlock = kTile.block(), kRest = kTile.rest(), kChunks = kTile.chunks();
  static constexpr int kRows = kTile.kRows, kChunkDims = kTile.kChunkDims;
  static constexpr int kTileBytes = kTile.tile_bytes(), kMatrixBytes = kTile.matrix_bytes();
  static constexpr int kWarpgroups = kTile.warpgroups(), kPlaces = kTile.places(), kUnitPlaces = kTile.unit_places();
  static constexpr int kUnitRing = kTile.unit_ring();
  static constexpr int kUnderWay = kTile.under_way();
  static_assert(kPlaces <= 32, "a lane and a bit each");
  static_assert((kRest & (kRest - 1)) == 0, "a head dim of more than two blocks");

  using Chunk = SharedTile<kRows, kChunkDims, 128>;  // of rows, and of a matrix' columns
  using Rest = SharedTile<kRows, larger(kRest, 16), 2 * larger(kRest, 16)>;
  using RestMatrix = SharedTile<larger(kRest, 16), larger(kRest, 16), 2 * larger(kRest, 16)>;
  static_assert(kTileBytes == kChunks * Chunk::kBytes + (kRest ? Rest::kBytes : 0));

  // Entries are ±1 / the block's size, so that no sum of finite numbers is infinite. This makes the sums norm again.
  static constexpr float kNorm = hadamard_norm(kBlock) * kBlock, kRestNorm = hadamard_norm(kRest) * kRest;
};

/// What a thread has of a tile's result, as products leave it: a quarter of two rows.
template <class T>
struct RotatedValues {
  float block[T::kChunks][T::kChunkDims / 2];
  float rest[T::kRest ? T::kRest / 2 : 1];
};

/// The scale of a unit with this amax, and what sums are multiplied with.
template <class T>
struct RotationScale {
  float factor, factor_rest;

  RotationScale() = default;
  __device__ __forceinline__ explicit RotationScale(float descale)
      : factor(__fdiv_rn(T::kNorm, descale)), factor_rest(__fdiv_rn(T::kRestNorm, descale)) {}
};

/// Shared memory of a thread block: the matrices, and then places for tiles.
template <class T>
struct RotationMemory {
  uint8_t* bytes;

  __device__ __forceinline__ uint8_t* matrix(int chunk) const { return bytes + chunk * T::Chunk::kBytes; }
  __device__ __forceinline__ uint8_t* tile(int place) const { return bytes + T::kMatrixBytes + place * T::kTileBytes; }
};

/// Where a product of so many columns leaves each: a thread has pairs of columns 8 apart, and they are to be side by
/// side in the result.
__device__ __forceinline__ int column_of(int place, int columns) {
  return place % 8 / 2 * (columns / 4) + place / 8 * 2 + place % 2;
}

/// Of which dims of a block of at most 64, that begins at `first`, the rotation turns the sign.
FA3_HOST_DEVICE constexpr uint64_t signs_of(int first) {
  uint64_t signs = 0;
  for (int dim = 0; dim < 64; ++dim) signs |= uint64_t{hadamard_negates(first + dim)} << dim;
  return signs;
}

/// The rows of H·diag(signs) / size for 8 dims from `dim` on, in column `column`.
template <class Element>
__device__ __forceinline__ uint4 matrix_entries(uint64_t signs, int dim, int column, int size) {
  const int bits = 31 - __clz(size);
  const uint32_t entry = (std::is_same_v<Element, Float16> ? (15 - bits) << 10 : (127 - bits) << 7) * 0x10001u;
  // Of 8 dims the parities of dim & column differ by those of the low three bits.
  uint32_t negative = static_cast<uint32_t>(signs >> dim) ^ (__popc(dim & column) & 1 ? 0xff : 0);
  negative ^= (column & 1 ? 0xaa : 0) ^ (column & 2 ? 0xcc : 0) ^ (column & 4 ? 0xf0 : 0);
  const auto word = [&](int i) { return entry | (negative >> i & 1) << 15 | (negative >> i & 2) << 30; };
  return make_uint4(word(0), word(2), word(4), word(6));
}

/// Write the matrices: all threads that will read them. Of a block of several chunks each one's is that of its 64 dims;
/// sums and differences of chunks are left to the registers.
template <class T>
__device__ __forceinline__ void write_matrices(const RotationMemory<T>& memory) {
  using Element = typename T::Type;
  const auto write = [&]<class Layout>(uint8_t* matrix, uint64_t signs, int columns, int size) {
    const int vectors = columns / kGroup;
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * vectors; i += T::kWarpgroups * 128) {
      const int place = i / vectors, dim = i % vectors * kGroup;
      *reinterpret_cast<uint4*>(matrix + Layout::offset(place, dim)) =
          matrix_entries<Element>(signs, dim, column_of(place, columns), size);
    }
  };
  constexpr uint64_t kSigns[] = {signs_of(0), signs_of(64), signs_of(128), signs_of(192)};
#pragma unroll
  for (int chunk = 0; chunk < T::kChunks; ++chunk)
    write.template operator()<typename T::Chunk>(memory.matrix(chunk), kSigns[chunk], T::kChunkDims, T::kBlock);
  if constexpr (T::kRest > 0) {
    constexpr uint64_t kRestSigns = signs_of(T::kBlock);
    write.template operator()<typename T::RestMatrix>(memory.matrix(T::kChunks), kRestSigns, T::kRest, T::kRest);
  }
  arch::fence_async_proxy();
}

/// A tile's rows of the result.
struct RotatedRows {
  uint8_t* out;  // of the first one
  int rows;      // that there are
};

/// What a thread does with a tile of its warpgroup's.
template <class T>
class Rotation {
 public:
  using Element = typename T::Type;
  using Values = RotatedValues<T>;

  __device__ __forceinline__ Rotation(const QuantizeArgs& args, uint8_t* memory)
      : args_(args), memory_{memory}, row_(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {}

  /// Amax of what rotate() has left.
  __device__ __forceinline__ float amax() {
    float largest = largest_of(v_.block[0]);
#pragma unroll
    for (int chunk = 1; chunk < T::kChunks; ++chunk) largest = arch::max_or_nan(largest, largest_of(v_.block[chunk]));
    largest *= T::kNorm;
    if constexpr (T::kRest > 0) largest = arch::max_or_nan(largest, largest_of(v_.rest) * T::kRestNorm);
    return largest <= args_.limit ? largest : largest_finite();
  }

  /// Round what rotate() has left of the tile there.
  __device__ __forceinline__ void write(int place, const RotatedRows& to, const RotationScale<T>& scale) {
    if (wild_) repair(place);
    uint8_t* row = to.out + row_ * args_.rows.out[0];
#pragma unroll
    for (int half = 0; half < 2; ++half, row += 8 * args_.rows.out[0]) {
      if (row_ + 8 * half >= to.rows) break;
#pragma unroll
      for (int chunk = 0; chunk < T::kChunks; ++chunk)
        store<T::kChunkDims>(row + chunk * T::kChunkDims, v_.block[chunk], half, scale.factor);
      if constexpr (T::kRest > 0) store<T::kRest>(row + T::kBlock, v_.rest, half, scale.factor_rest);
    }
  }

  /// Products with the chunks' matrices, and the butterflies that pair chunks.
  __device__ __forceinline__ void rotate(int place) {
    using arch::descriptor;
    const uint32_t rows = arch::descriptor_address(memory_.tile(place));
    const uint32_t columns = arch::descriptor_address(memory_.matrix(0));
    constexpr int kChunkStep = T::Chunk::kBytes >> 4;
    arch::wgmma_fence();
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk)
#pragma unroll
      for (int step = 0; step < T::Chunk::kColumnSteps; ++step) {
        const uint32_t at = chunk * kChunkStep + T::Chunk::column_step(step);
        arch::WgmmaSS<Element, T::kChunkDims>::mma(v_.block[chunk], descriptor(T::Chunk::kMajorColumns, rows + at),
                                                   descriptor(T::Chunk::kMajorColumns, columns + at), step > 0);
      }
    if constexpr (T::kRest > 0) {
#pragma unroll
      for (int step = 0; step < T::Rest::kColumnSteps; ++step) {
        const uint32_t at = T::kChunks * kChunkStep + T::Rest::column_step(step);
        arch::WgmmaSS<Element, T::kRest>::mma(v_.rest, descriptor(T::Rest::kMajorColumns, rows + at),
                                              descriptor(T::RestMatrix::kMajorColumns, columns + at), step > 0);
      }
    }
    arch::wgmma_commit();
    arch::wgmma_wait<0>();
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk) arch::wgmma_wrote(v_.block[chunk]);
    if constexpr (T::kRest > 0) arch::wgmma_wrote(v_.rest);
#pragma unroll
    for (int step = 1; step < T::kChunks; step *= 2)
#pragma unroll
      for (int chunk = 0; chunk < T::kChunks; ++chunk) {
        if (chunk & step) continue;
#pragma unroll
        for (int i = 0; i < T::kChunkDims / 2; ++i) {
          const float a = v_.block[chunk][i], b = v_.block[chunk + step][i];
          v_.block[chunk][i] = a + b;
          v_.block[chunk + step][i] = a - b;
        }
      }
  }

 private:
  /// The largest magnitude; NaN where one is. By fours, which do not wait for each other.
  template <int kCount>
  static __device__ __forceinline__ float largest_of(const float (&v)[kCount]) {
    float largest[4] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest[i % 4] = arch::max_or_nan(largest[i % 4], fabsf(v[i]));
    return arch::max_or_nan(arch::max_or_nan(largest[0], largest[1]), arch::max_or_nan(largest[2], largest[3]));
  }

  /// amax of what is neither NaN nor infinite.
  __device__ __forceinline__ float largest_finite() {
    float largest = 0;
    const auto look = [&](float value, float norm) {
      const float size = fabsf(value) * norm;
      if (size <= args_.limit) largest = fmaxf(largest, size);
    };
#pragma unroll
    for (int chunk = 0; chunk < T::kChunks; ++chunk)
#pragma unroll
      for (float value : v_.block[chunk]) look(value, T::kNorm);
    if constexpr (T::kRest > 0) {
#pragma unroll
      for (float value : v_.rest) look(value, T::kRestNorm);
    }
    wild_ = true;
    return largest;
  }

  /// Where infinities cancel there is a NaN, though none was put in: that is to be infinite.
  __device__ __forceinline__ void repair(int place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!has_nan<typename T::Chunk>(memory_.tile(place), row_ + 8 * half, T::kBlock)) {
#pragma unroll
        for (int chunk = 0; chunk < T::kChunks; ++chunk) without_nan(v_.block[chunk], half);
      }
      if constexpr (T::kRest > 0) {
        if (!has_nan<typename T::Rest>(memory_.tile(place) + T::kChunks * T::Chunk::kBytes, row_ + 8 * half, T::kRest))
          without_nan(v_.rest, half);
      }
    }
  }

  /// Whether a block of a loaded row has one.
  template <class Layout>
  static __device__ __forceinline__ bool has_nan(const uint8_t* tile, int row, int dims) {
    constexpr uint32_t kInfinity = std::is_same_v<Element, Float16> ? 0x7c00 : 0x7f80;
    bool found = false;
#pragma unroll 1
    for (int dim = 0; dim < dims; ++dim) {
      const int chunk = dim / Layout::kChunkColumns, column = dim % Layout::kChunkColumns;
      const uint16_t* at =
          reinterpret_cast<const uint16_t*>(tile + chunk * Layout::kChunkBytes + Layout::offset(row, column));
      found |= (*at & 0x7fffu) > kInfinity;
    }
    return found;
  }

  template <int kCount>
  static __device__ __forceinline__ void without_nan(float (&v)[kCount], int half) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i / 2 % 2 == half && v[i] != v[i]) v[i] = __uint_as_float(0x7f800000);
  }

  /// This thread's quarter of a row's so many columns.
  template <int kDims>
  static __device__ __forceinline__ void store(uint8_t* row, const float (&v)[kDims / 2], int half, float factor) {
    constexpr int kCodes = kDims / 4;
    uint8_t* to = row + threadIdx.x % 4 * kCodes;
    uint32_t codes[kCodes / 4];
#pragma unroll
    for (int i = 0; i < kCodes / 4; ++i) {
      const int at = 8 * i + 2 * half;
      codes[i] = arch::pack_e4m3(v[at] * factor, v[at + 1] * factor, v[at + 4] * factor, v[at + 5] * factor);
    }
    if constexpr (kCodes == 16) {
      __stcs(reinterpret_cast<uint4*>(to), make_uint4(codes[0], codes[1], codes[2], codes[3]));
    } else if constexpr (kCodes == 8) {
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(codes[0], codes[1]));
    } else {
      static_assert(kCodes == 4);
      __stcs(reinterpret_cast<uint32_t*>(to), codes[0]);
    }
  }

  const QuantizeArgs& args_;
  RotationMemory<T> memory_;
  Values v_;
  int row_;            // of a tile: this thread has values of this one and the eighth after it
  bool wild_ = false;  // of what this thread has seen some is infinite, or counts as that
};

}  // namespace fa3
