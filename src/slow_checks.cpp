// What only device memory knows, checked on request: it costs a synchronisation.
#include "slow_checks.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "arch/host_device.h"
#include "cuda_status.h"
#include "prepare_plan.h"
#include "status.h"

namespace fa3 {
namespace {

fa3_status read_back(const int32_t* device, int count, cudaStream_t stream, std::vector<int32_t>& host) {
  host.resize(count);
  cudaError_t error = cudaMemcpyAsync(host.data(), device, count * sizeof(int32_t), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  return checked(error, "FA3_CHECK=1: reading lengths");
}

/// `shared`: the sequences lie in rows of one array; else each has `rows` of its own, and cu_seqlens only says how
/// many.
fa3_status check_lengths(const fa3_lengths& lengths, int batch, const char* which, cudaStream_t stream,
                         bool shared = true) {
  std::vector<int32_t> ends, used;
  if (lengths.cu_seqlens) {
    if (auto status = read_back(lengths.cu_seqlens, batch + 1, stream, ends)) return status;
    if (ends[0] != 0)
      return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: begins with %d, but must begin with 0", which, ends[0]);
    for (int b = 0; b < batch; ++b)
      if (ends[b + 1] < ends[b])
        return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: falls from %d to %d at %d, but must not fall", which, ends[b],
                    ends[b + 1], b + 1);
    for (int b = 0; b < batch && !shared; ++b)
      if (ends[b + 1] - ends[b] > lengths.rows)
        return fail(FA3_ERROR_CU_SEQLENS, "cu_seqlens_%s: %d rows at %d, but its pages have %d", which,
                    ends[b + 1] - ends[b], b, lengths.rows);
    if (shared && ends[batch] > lengths.rows)
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

/// A value of each sequence, if the array is there, within low and what `most` says.
template <class Most>
fa3_status check_values(const int32_t* device, int batch, const char* name, Most most, cudaStream_t stream) {
  if (!device) return FA3_OK;
  std::vector<int32_t> values;
  if (auto status = read_back(device, batch, stream, values)) return status;
  for (int b = 0; b < batch; ++b)
    if (values[b] < 0 || values[b] > most(b))
      return fail(FA3_ERROR_CU_SEQLENS, "%s: %d at %d, but it must be within 0 and %d", name, values[b], b, most(b));
  return FA3_OK;
}

/// The rows that each sequence has in use: `rows`, unless a device array says how many.
fa3_status read_lengths(const fa3_lengths& lengths, int rows, int batch, cudaStream_t stream,
                        std::vector<int32_t>& found) {
  found.assign(batch, rows);
  if (lengths.cu_seqlens) {
    std::vector<int32_t> ends;
    if (auto status = read_back(lengths.cu_seqlens, batch + 1, stream, ends)) return status;
    for (int b = 0; b < batch; ++b) found[b] = ends[b + 1] - ends[b];
  }
  return lengths.seqused ? read_back(lengths.seqused, batch, stream, found) : FA3_OK;
}

/// What each sequence of a call with a cache has: rows in use before the new ones, and these.
struct Cached {
  std::vector<int32_t> rows, rows_new;
};

/// The pages of all rows that are read or written: none before the left padding's end.
fa3_status check_pages(const fa3_cache& c, const Cached& cached, cudaStream_t stream) {
  if (!c.page_table) return FA3_OK;
  const int batch = static_cast<int>(cached.rows.size());
  std::vector<int32_t> pages, leftpad(batch, 0);
  if (c.cache_leftpad)
    if (auto status = read_back(c.cache_leftpad, batch, stream, leftpad)) return status;
  for (int b = 0; b < batch; ++b) {
    const int rows = cached.rows[b] + cached.rows_new[b], first = leftpad[b] / c.page_size;
    if (rows == leftpad[b]) continue;
    const int count = ceil_div(rows, c.page_size) - first;
    if (auto status = read_back(c.page_table + b * c.page_table_stride + first, count, stream, pages)) return status;
    for (int i = 0; i < count; ++i)
      if (pages[i] < 0 || pages[i] >= c.num_pages)
        return fail(FA3_ERROR_SHAPE, "page_table: page %d at [%d, %d], but there are %d pages", pages[i], b, first + i,
                    c.num_pages);
  }
  return FA3_OK;
}

/// Positions of queries and of new keys.
fa3_status check_rotary(const fa3_forward_params& p, const Cached& cached, cudaStream_t stream) {
  const fa3_cache& c = p.cache;
  if (!c.rotary_cos) return FA3_OK;
  std::vector<int32_t> first = cached.rows, rows;
  if (auto status = read_lengths(p.queries, p.queries.rows, p.batch, stream, rows)) return status;
  if (c.rotary_seqlens)
    if (auto status = read_back(c.rotary_seqlens, p.batch, stream, first)) return status;
  for (int b = 0; b < p.batch; ++b) {
    const int positions = std::max(turns_each_query(p.mask) ? rows[b] : std::min(rows[b], 1), cached.rows_new[b]);
    if (positions == 0) continue;
    if (first[b] < 0)
      return fail(FA3_ERROR_CU_SEQLENS, "rotary_seqlens: %d at %d, but a position must not be negative", first[b], b);
    const long long last = static_cast<long long>(first[b]) + positions;
    if (last > c.rotary_rows)
      return fail(FA3_ERROR_CU_SEQLENS, "rotary_cos: %d positions, but sequence %d needs %lld", c.rotary_rows, b, last);
  }
  return FA3_OK;
}

fa3_status check_cache(const fa3_forward_params& p, cudaStream_t stream) {
  const fa3_cache& c = p.cache;
  const fa3_lengths new_keys{c.rows_new, 0, c.cu_seqlens_k_new, nullptr};
  Cached cached;
  const int rows = c.k_new.data ? c.seqlen : p.keys.rows;
  if (auto status = read_lengths(p.keys, rows, p.batch, stream, cached.rows)) return status;
  if (auto status = check_lengths(new_keys, p.batch, "k_new", stream)) return status;
  if (auto status = read_lengths(new_keys, c.rows_new, p.batch, stream, cached.rows_new)) return status;
  for (int b = 0; b < p.batch && c.k_new.data; ++b)
    if (cached.rows[b] > p.keys.rows - cached.rows_new[b])
      return fail(FA3_ERROR_CU_SEQLENS, "cache_seqlens: sequence %d has %d keys and gets %d, but has room for %d", b,
                  cached.rows[b], cached.rows_new[b], p.keys.rows);
  auto entries = [&](int) { return c.batch_entries - 1; };
  if (auto status = check_values(c.cache_batch_idx, p.batch, "cache_batch_idx", entries, stream)) return status;
  auto length = [&](int b) { return cached.rows[b]; };
  if (auto status = check_values(c.cache_leftpad, p.batch, "cache_leftpad", length, stream)) return status;
  if (auto status = check_pages(c, cached, stream)) return status;
  return check_rotary(p, cached, stream);
}

bool wanted() {
  const char* value = std::getenv("FA3_CHECK");
  return value && !std::strcmp(value, "1");
}

}  // namespace

fa3_status slow_checks(const fa3_forward_params& params, cudaStream_t stream) {
  if (!wanted()) return FA3_OK;
  if (auto status = check_lengths(params.queries, params.batch, "q", stream)) return status;
  if (auto status = check_lengths(params.keys, params.batch, "k", stream, !params.cache.page_table)) return status;
  return check_cache(params, stream);
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
