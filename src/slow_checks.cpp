// What only device memory knows, checked on request: it costs a synchronisation.
#include "slow_checks.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "status.h"

namespace fa3 {
namespace {

fa3_status read_back(const int32_t* device, int count, cudaStream_t stream, std::vector<int32_t>& host) {
  host.resize(count);
  cudaError_t error = cudaMemcpyAsync(host.data(), device, count * sizeof(int32_t), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  return check_cuda(error, "FA3_CHECK=1: reading lengths", cudaGetErrorString(error));
}

fa3_status check_lengths(const fa3_lengths& lengths, int batch, const char* which, cudaStream_t stream) {
  std::vector<int32_t> ends, used;
  if (lengths.cu_seqlens) {
    if (auto status = read_back(lengths.cu_seqlens, batch + 1, stream, ends)) return status;
    if (ends[0] != 0)
      return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: begins with %d, but must begin with 0", which, ends[0]);
    for (int b = 0; b < batch; ++b)
      if (ends[b + 1] < ends[b])
        return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: falls from %d to %d at %d, but must not fall", which, ends[b],
                    ends[b + 1], b + 1);
    if (ends[batch] > lengths.rows)
      return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: ends with %d, but %s has %d rows", which, ends[batch], which,
                  lengths.rows);
  }
  if (lengths.seqused) {
    if (auto status = read_back(lengths.seqused, batch, stream, used)) return status;
    for (int b = 0; b < batch; ++b) {
      const int length = lengths.cu_seqlens ? ends[b + 1] - ends[b] : lengths.rows;
      if (used[b] < 0 || used[b] > length)
        return fail(FA3_ERROR_CU_SEQLENS, "seqused_%s: %d at %d, but the sequence has %d rows", which, used[b], b,
                    length);
    }
  }
  return FA3_OK;
}

bool wanted() {
  const char* value = std::getenv("FA3_CHECK");
  return value && !std::strcmp(value, "1");
}

}  // namespace

fa3_status slow_checks(const fa3_forward_params& params, cudaStream_t stream) {
  if (!wanted()) return FA3_OK;
  if (auto status = check_lengths(params.queries, params.batch, "q", stream)) return status;
  return check_lengths(params.keys, params.batch, "k", stream);
}

fa3_status slow_checks(const fa3_backward_params& params, cudaStream_t stream) {
  if (!wanted()) return FA3_OK;
  if (auto status = check_lengths(params.queries, params.batch, "q", stream)) return status;
  return check_lengths(params.keys, params.batch, "k", stream);
}

fa3_status slow_checks(const fa3_quantize_params& params, cudaStream_t stream) {
  if (!wanted()) return FA3_OK;
  return check_lengths({params.rows, 0, params.cu_seqlens, nullptr}, params.batch, "x", stream);
}

}  // namespace fa3
