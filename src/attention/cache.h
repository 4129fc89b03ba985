// Which rows of a key-value cache a sequence has.
#pragma once
#include <cstdint>

#include "attention/divisor.h"
#include "attention/seqlen.h"

namespace fa3 {

/// Where attention finds a sequence's keys: its lengths, less what is left padding, in a batch entry of their own.
struct KeyRows : Lengths {
  const int* leftpad;  // (batch), or null
  const int* entries;  // cache_batch_idx (batch), or null: sequence b has batch entry b
  bool paged;          // each sequence has rows from 0 on: cu_seqlens only says how many

  FA3_HOST_DEVICE Span span(int batch) const {
    return cu_seqlens ? between(cu_seqlens[batch], cu_seqlens[batch + 1], batch) : dense_span(batch);
  }
  FA3_HOST_DEVICE Span dense_span(int batch) const { return behind_padding(Lengths::dense_span(batch), batch); }
  FA3_HOST_DEVICE Span dense_span_of(int used, int batch) const {
    return behind_padding(Lengths::dense_span_of(used), batch);
  }
  FA3_HOST_DEVICE Span between(int first, int end, int batch) const {
    return behind_padding(paged ? of_length(int64_t{end} - first, batch) : Lengths::between(first, end, batch), batch);
  }
  FA3_HOST_DEVICE int entry(int batch) const { return entries ? entries[batch] : batch; }

 private:
  FA3_HOST_DEVICE Span behind_padding(const Span& all, int batch) const {
    const int hidden = leftpad ? clamped(leftpad[batch], 0, all.length) : 0;
    return {all.begin + hidden, all.length - hidden};
  }
  FA3_HOST_DEVICE Span of_length(int64_t length, int batch) const {
    const int most = length < 0 ? 0 : length > rows ? rows : static_cast<int>(length);
    return {0, seqused ? clamped(seqused[batch], 0, most) : most};
  }
};

/// A row of a cache: of a batch entry or of a page. What the cache does not have has entry kNone.
struct CacheRow {
  int entry, row;
  static constexpr int kNone = -1;
  FA3_HOST_DEVICE bool exists() const { return entry != kNone; }
};

/// Where the rows of sequences lie in a cache, dense or paged. Whatever the device arrays say, a row that exists is the
/// cache's.
struct CacheRows {
  int rows;                   // that a sequence has room for
  int entries;                // of the array: batch entries, or pages
  const int* batch_idx;       // (batch), or null
  const int* page_table;      // (batch, max_pages), or null: dense
  int64_t page_table_stride;  // elements between sequences
  int max_pages;
  Divisor page_size;

  FA3_HOST_DEVICE CacheRow at(int batch, int row) const {
    const int found = entry(batch, row);
    if (found < 0 || found >= entries) return {CacheRow::kNone, 0};
    return {found, page_table ? row - page_size.quotient(row) * page_size.divisor : row};
  }

 private:
  FA3_HOST_DEVICE int entry(int batch, int row) const {
    if (row < 0 || row >= rows) return CacheRow::kNone;
    if (page_table) {
      const int page = page_size.quotient(row);
      return page < max_pages ? page_table[batch * page_table_stride + page] : CacheRow::kNone;
    }
    return batch_idx ? batch_idx[batch] : batch;
  }
};

/// How much of each sequence's cache is in use.
struct CachedLengths {
  int rows;            // room of a sequence
  int length;          // of all sequences, where there is no
  const int* seqlens;  // (batch)

  FA3_HOST_DEVICE int at(int batch) const { return clamped(seqlens ? seqlens[batch] : length, 0, rows); }
  FA3_HOST_DEVICE int with(int new_rows, int batch) const {
    const int cached = at(batch);
    return cached + smaller(new_rows, rows - cached);
  }
};

}  // namespace fa3
