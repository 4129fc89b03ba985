// A GPU of threads on the CPU: a thread block is a thread of the system, its CUDA
// threads take turns on it, and a shuffle or a barrier is where they change. Asynchronous copies happen as early or as
// late as they may. Only what the tested kernels use is here.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "arch/elements.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulated {

struct Dim {
  unsigned x = 0;
};
inline thread_local Dim thread_index, block_index;
inline std::atomic<bool> late_copies{false};

/// One CUDA thread: its stack, and the asynchronous copies that it has begun.
struct Fiber {
  ucontext_t begin;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool begun = false, done = false;
  unsigned exchanges = 0;
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<std::vector<Copy>> groups{{}};  // the last is still open
};

/// The CUDA threads of a block, and the places where they wait for each other: one a warp, one for some, one for all.
struct Block {
  static constexpr size_t kStack = 128 << 10;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  struct Meeting {
    unsigned waiting = 0, generation = 0;
    bool any[2] = {};  // of those who came, by generation
  };
  static constexpr unsigned kNamed = 16;
  std::vector<Meeting> meetings;  // the warps', then the named barriers', of which the first is the whole block's
  unsigned exchanged[2][1024];    // by turns: who reads one turn has met all who write the turn after the next

  Fiber& current() { return fibers[thread_index.x]; }
  /// By jumps, which unlike changes of context ask nothing of the system.
  void resume() {
    if (_setjmp(scheduler)) return;
    if (current().begun) _longjmp(current().here, 1);
    current().begun = true;
    setcontext(&current().begin);
  }
  void yield() {
    if (!_setjmp(current().here)) _longjmp(scheduler, 1);
  }
  static void come(Meeting& meeting, unsigned members, bool mine) {
    meeting.any[meeting.generation % 2] |= mine;
    if (++meeting.waiting < members) return;
    meeting.waiting = 0;
    ++meeting.generation;
    meeting.any[meeting.generation % 2] = false;
  }
  bool meet(Meeting& meeting, unsigned members, bool mine = false) {
    const unsigned generation = meeting.generation;
    come(meeting, members, mine);
    while (meeting.generation == generation) yield();
    return meeting.any[generation % 2];
  }
  Meeting& named(int id) { return meetings[meetings.size() - kNamed + id]; }
  void meet_some(int id, unsigned members) { meet(named(id), members); }
  bool any_of_some(int id, unsigned members, bool mine) { return meet(named(id), members, mine); }
  void arrive(int id, unsigned members) { come(named(id), members, false); }
  void meet_block() { meet(named(0), static_cast<unsigned>(fibers.size())); }
  /// The values of the warp's lanes.
  const unsigned* gather(unsigned value) {
    unsigned* turn = exchanged[current().exchanges++ % 2];
    turn[thread_index.x] = value;
    meet(meetings[thread_index.x / 32], 32);
    return turn + thread_index.x / 32 * 32;
  }
};
inline thread_local Block* block;
/// The dynamic shared memory of kernels with tensor cores: whoever launches them says where it is.
inline uint8_t* (*dynamic_shared)() = nullptr;
inline thread_local const std::function<void()>* body;

inline void enter() {
  (*body)();
  block->current().done = true;
  block->yield();
}

inline void run_block(unsigned threads, const std::function<void()>& work) {
  Block here;
  here.fibers.resize(threads);
  here.meetings.resize(threads / 32 + Block::kNamed);
  block = &here;
  body = &work;
  for (Fiber& fiber : here.fibers) {
    getcontext(&fiber.begin);
    fiber.stack.reset(new char[Block::kStack]);
    fiber.begin.uc_stack = {fiber.stack.get(), 0, Block::kStack};
    fiber.begin.uc_link = nullptr;
    makecontext(&fiber.begin, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (thread_index.x = 0; thread_index.x < threads; ++thread_index.x) {
      if (here.current().done) continue;
      left = true;
      here.resume();
    }
  }
}

inline void copy(Fiber::Copy c) { std::memcpy(c.to, c.from, c.bytes); }

}  // namespace emulated

#define threadIdx (emulated::thread_index)
#define blockIdx (emulated::block_index)
inline thread_local emulated::Dim blockDim;

inline void __syncthreads() { emulated::block->meet_block(); }
inline void __syncwarp() { emulated::block->gather(0); }
inline float __shfl_sync(unsigned, float value, int lane) {
  return std::bit_cast<float>(emulated::block->gather(std::bit_cast<unsigned>(value))[lane]);
}
inline int __any_sync(unsigned, int predicate) {
  const unsigned* lanes = emulated::block->gather(predicate != 0);
  return std::any_of(lanes, lanes + 32, [](unsigned lane) { return lane; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const unsigned* lanes = emulated::block->gather(value);
  return *std::max_element(lanes, lanes + 32);
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const emulated::Fiber::Copy copy{to, from, bytes};
  if (emulated::late_copies) {
    emulated::block->current().groups.back().push_back(copy);
  } else {
    emulated::copy(copy);
  }
}
inline void __pipeline_commit() { emulated::block->current().groups.emplace_back(); }
inline void __pipeline_wait_prior(size_t newest) {
  auto& groups = emulated::block->current().groups;
  while (groups.size() > newest + 1) {
    for (const auto& copy : groups.front()) emulated::copy(copy);
    groups.erase(groups.begin());
  }
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __ldcg(const float* from) { return *from; }
inline void __stcs(uint2* to, uint2 value) { *to = value; }
inline void __stcs(unsigned* to, unsigned value) { *to = value; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
// For instructions that no emulated kernel reaches.
inline size_t __cvta_generic_to_global(const void* address) { return reinterpret_cast<size_t>(address); }
inline void __nanosleep(unsigned) {  // who is waited for may be of the same block
  std::this_thread::yield();
  emulated::block->yield();
}
inline unsigned atomicMax(unsigned* word, unsigned value) {  // of shared memory
  return std::exchange(*word, std::max(*word, value));
}
inline unsigned long long atomicAdd(unsigned long long* word, unsigned long long value) {
  return std::atomic_ref(*word).fetch_add(value);
}
inline unsigned long long atomicCAS(unsigned long long* word, unsigned long long expected, unsigned long long value) {
  std::atomic_ref(*word).compare_exchange_strong(expected, value);
  return expected;
}

inline float half_to_float(fa3::Float16 half) {
  const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction),
                                                 std::max(exponent, 1) - 25);
  return half.bits >> 15 ? -size : size;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  operator unsigned() const { return x; }
};
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaSharedmemCarveoutMaxShared = 100 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributePreferredSharedMemoryCarveout, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    unsigned sharedMemCarveout;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  unsigned gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

/// A cooperative grid runs at once; of others, a few blocks at a time.
template <class Kernel, class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Args& args) {
  constexpr unsigned kAtOnce = 4;
  const bool cooperative = config->numAttrs > 1;
  std::vector<std::thread> threads;
  for (unsigned index = 0; index < config->gridDim; ++index) {
    threads.emplace_back([&args, kernel, index, block_threads = config->blockDim] {
      emulated::block_index.x = index;
      blockDim.x = block_threads;
      emulated::run_block(block_threads, [&] { kernel(args); });
    });
    if (!cooperative && threads.size() == kAtOnce) {
      for (auto& thread : threads) thread.join();
      threads.clear();
    }
  }
  for (auto& thread : threads) thread.join();
  return cudaSuccess;
}
