// A packed copy of an operand whose address or strides TMA cannot take.
#include "kernels/copy_rows.h"

#include "kernels/launch.h"

namespace fa3 {
namespace {

constexpr int kThreads = 256;

/// Each thread copies 16 bytes of a head's row: the source may be aligned to its elements only, the copy is to 16.
template <class Element>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(RowsToCopy source, uint4* packed, int64_t count) {
  constexpr int kVector = 16 / sizeof(Element), kPerWord = 4 / sizeof(Element), kBits = 8 * sizeof(Element);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= count) return;
  const int groups = source.head_dim / kVector;
  int64_t rest = index;
  const int group = static_cast<int>(rest % groups);
  rest /= groups;
  const int head = static_cast<int>(rest % source.heads);
  rest /= source.heads;
  const int row = static_cast<int>(rest % source.rows);
  const int64_t batch = rest / source.rows;
  const auto* from = static_cast<const Element*>(source.data) + batch * source.stride[0] + row * source.stride[1] +
                     head * source.stride[2] + group * kVector;
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kVector; ++i) words[i / kPerWord] |= uint32_t{from[i]} << i % kPerWord * kBits;
  packed[index] = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace

cudaError_t copy_rows(const RowsToCopy& source, void* packed, cudaStream_t stream) {
  const int64_t count =
      int64_t{source.batch} * source.rows * source.heads * (source.head_dim * source.element_bytes / 16);
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  const auto kernel = source.element_bytes == 1 ? copy_rows_kernel<uint8_t> : copy_rows_kernel<uint16_t>;
  return launch_plainly(kernel, blocks, kThreads, stream, source, static_cast<uint4*>(packed), count);
}

}  // namespace fa3
