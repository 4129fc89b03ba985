// Asynchronous copies of a thread: made at once, or when it waits for them.
#pragma once
#include "emulated.h"

namespace emulated {
inline void copy_later(Fiber::Copy copy) {
  if (block->is_late)
    block->current().groups.back().push_back(std::move(copy));
  else
    copy();
}
inline void close_copies() { block->current().groups.emplace_back(); }
inline void wait_for_copies(size_t newest) {
  auto& groups = block->current().groups;
  while (groups.size() > newest + 1) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}
}  // namespace emulated

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulated::copy_later([=] { std::memcpy(to, from, bytes); });
}
inline void __pipeline_commit() { emulated::close_copies(); }
inline void __pipeline_wait_prior(size_t newest) { emulated::wait_for_copies(newest); }
