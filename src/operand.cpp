// What TMA loads from: the caller's arrays, or copies of those that it cannot address.
#include "operand.h"

#include "cuda_status.h"
#include "kernels/copy_rows.h"
#include "plan.h"

namespace fa3 {

fa3_status prepare_operand(fa3_array array, const fa3_lengths& lengths, int entries, OperandShape shape, bool copy,
                           void* spare, Workspace& workspace, cudaStream_t stream, TmaOperand& operand) {
  if (lengths.rows == 0 || entries == 0 || !array.data) {  // a map must have an address, and an entry on each axis
    const auto address = reinterpret_cast<uintptr_t>(spare) / kTmaAlignment * kTmaAlignment;
    shape.batch = shape.rows = shape.heads = 1;
    return encode_operand({reinterpret_cast<void*>(address), {0, 0, 0, 1}}, shape, operand);
  }
  shape.batch = lengths.cu_seqlens ? 1 : entries;
  shape.rows = lengths.rows;
  if (copy) {
    const RowsToCopy rows{array.data,
                          {array.stride[0], array.stride[1], array.stride[2]},
                          shape.batch,
                          shape.rows,
                          shape.heads,
                          shape.head_dim,
                          element_bytes(shape.dtype)};
    void* packed = workspace.take(copy_bytes(lengths, entries, shape.heads, shape.head_dim, shape.dtype));
    if (auto status = checked(copy_rows(rows, packed, stream), "copy_rows")) return status;
    array = contiguous(packed, shape.rows, shape.heads, shape.head_dim);
  }
  return encode_operand(array, shape, operand);
}

}  // namespace fa3
