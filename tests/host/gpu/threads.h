// The threads of an emulated GPU. A thread block is a thread of the system, of which one runs at a time; its CUDA
// threads take turns on it, and change where one has to wait. Who goes on first, and when what was asked of the copy
// engine arrives, is drawn from a seed: what is right must be so whatever is drawn, and what fails fails again.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// The launch's, of which there is one at a time.
inline dim3 blockDim, gridDim;
inline thread_local dim3 blockIdx;

namespace emulated {

/// What a test chooses. Asynchronous work is done as early or as late as it may be, or drawn: each block draws for
/// itself. What is late reads what has been written too early, and what is early what has not been written yet.
struct Choices {
  enum When { kEarly, kLate, kDrawn };
  When when = kDrawn;
  uint64_t seed = 0;
  int num_sms = 4;
};
inline Choices choices;
inline uint64_t launches = 0;  // so far: each draws for itself

/// Where the threads of the running block have their shared memory: see shared_address() in arch/wgmma.cuh.
constexpr size_t kMostShared = 227 << 10;

/// What went wrong in the last launch, which ends with it, or "".
inline std::string failure;
inline void complain(const std::string& what) {
  if (failure.empty()) failure = what;
}

struct Block;

/// What a thread has issued of its warpgroup's products, and where its groups of them end.
struct Issued {
  unsigned products = 0;
  std::vector<unsigned> groups;
};

/// A product that a warpgroup has issued, or is about to: each of its 128 threads brings its part.
struct Product {
  using Compute = void (*)(const Product&);
  Product(Compute compute, uint64_t a, uint64_t b, bool accumulate)
      : compute(compute), a(a), b(b), accumulate(accumulate) {}

  Compute compute;
  uint64_t a, b;  // descriptors; a is 0 where registers have it
  bool accumulate;
  unsigned came = 0;
  float* sums[128];
  uint32_t words[128][4];
};

/// One CUDA thread: its stack, what it waits for, and what it has begun.
struct Fiber {
  ucontext_t begin;
  jmp_buf here;
  bool begun = false, done = false;
  // It goes on when ready(on, what); null: at once. Who polls memory goes on once a turn.
  bool (*ready)(const void* on, uint64_t what) = nullptr;
  const void* on = nullptr;
  uint64_t what = 0;
  const char* waits_for = "";
  bool polls = false;
  unsigned exchanges = 0, cluster_phase = 0;
  using Copy = std::function<void()>;
  std::vector<std::vector<Copy>> groups{{}};  // of asynchronous copies; the last is still open
  std::vector<Copy> writes;                   // bulk groups on their way to device memory
  Issued issued;
};

/// A place where threads wait for each other.
struct Meeting {
  unsigned waiting = 0, generation = 0;
  bool any[2] = {};  // of those who came, by generation

  void come(unsigned members, bool mine) {
    any[generation % 2] |= mine;
    if (++waiting < members) return;
    waiting = 0;
    ++generation;
    any[generation % 2] = false;
  }
};

/// A warpgroup's products. They are computed when all its threads have issued them, or when all wait for them.
struct Products {
  std::vector<Product> queue;
  unsigned done = 0;  // of all that were issued; the queue's first follows them
  Meeting meeting;

  void compute_until(unsigned end) {
    for (; done < end; ++done) {
      queue.front().compute(queue.front());
      queue.erase(queue.begin());
    }
  }
};

/// Thread blocks that run at the same time, and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned threads = 0, arrived = 0, phase = 1;  // of its barrier; threads that have ended count no more
  unsigned ended = 0;                            // of those that have arrived

  void settle() {
    if (arrived < threads) return;
    threads -= ended;
    arrived = ended = 0;
    ++phase;
  }
  void lose(unsigned phase_arrived_at) {
    if (phase_arrived_at == phase)
      ++ended;
    else
      --threads, settle();
  }
};

inline constexpr size_t kStack = 128 << 10;
inline thread_local unsigned thread_number;
inline thread_local Block* block = nullptr;
inline thread_local uint8_t* shared_memory = nullptr;  // the block's, which lies at a multiple of 1,024 bytes

/// The CUDA threads of a block. A meeting for each warp, sixteen by number, of which the first is the whole block's.
struct Block {
  static constexpr unsigned kNamed = 16;
  static constexpr int kMostPasses = 200;
  Block(unsigned number, unsigned rank, unsigned threads, Cluster& cluster, const std::function<void()>& body)
      : number(number),
        rank(rank),
        cluster(cluster),
        body(body),
        random((choices.seed + launches) * 1'000'003 + number),
        fibers(threads),
        meetings((threads + 31) / 32 + kNamed),
        products((threads + 127) / 128) {
    is_late = choices.when == Choices::kDrawn ? random() % 2 : choices.when == Choices::kLate;
    // Copies arrive in any order: at once, now and then, or when nobody can go on without them.
    const int kind = choices.when == Choices::kDrawn ? random() % 3 : choices.when == Choices::kLate ? 2 : 0;
    arrives_in_256 = kind == 0 ? 256 : kind == 1 ? 24 : 0;
    sluggish_in_256 = choices.when == Choices::kDrawn ? (random() % 3) * 96 : 0;
  }

  const unsigned number, rank;  // in the grid, in the cluster
  Cluster& cluster;
  const std::function<void()>& body;
  std::mt19937_64 random;
  std::vector<Fiber> fibers;
  std::vector<Meeting> meetings;
  std::vector<Products> products;
  uint64_t exchanged[2][1024];  // by turns: who reads one turn has met all who write the turn after the next
  std::vector<std::function<void()>> arriving;  // what the copy engine is to bring here
  jmp_buf scheduler;
  // Of its place:
  uint8_t* shared = nullptr;
  char* stacks = nullptr;
  bool is_late;
  unsigned arrives_in_256, sluggish_in_256;
  bool ended = false;

  Fiber& current() { return fibers[thread_number]; }
  Meeting& named(int id) { return meetings[meetings.size() - kNamed + id]; }

  static void enter() {
    block->body();
    block->current().done = true;
    block->leave();
  }

  /// By jumps, which unlike changes of context ask nothing of the system.
  __attribute__((noinline)) void resume() {
    if (_setjmp(scheduler)) return;
    Fiber& fiber = current();
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.begin);
    fiber.begin.uc_stack = {&stacks[thread_number * kStack], 0, kStack};
    fiber.begin.uc_link = nullptr;
    makecontext(&fiber.begin, enter, 0);
    setcontext(&fiber.begin);
  }
  __attribute__((noinline)) void leave() {
    if (!_setjmp(current().here)) _longjmp(scheduler, 1);
  }

  /// Wait until ready(on, what).
  void wait(bool (*ready)(const void*, uint64_t), const void* on, uint64_t what, const char* waits_for) {
    if (ready(on, what)) return;
    Fiber& fiber = current();
    fiber.ready = ready, fiber.on = on, fiber.what = what, fiber.waits_for = waits_for;
    leave();
    fiber.ready = nullptr;
  }
  /// Where it matters who goes on, it may be another thread.
  void pause() {
    if (choices.when == Choices::kDrawn && random() % 4 == 0) leave();
  }
  /// Let the others go on, of all blocks: memory is not yet as this thread wants it.
  void poll() {
    current().polls = true;
    leave();
    current().polls = false;
  }

  bool meet(Meeting& meeting, unsigned members, const char* name, bool mine = false) {
    const unsigned generation = meeting.generation;
    meeting.come(members, mine);
    wait([](const void* on, uint64_t what) { return static_cast<const Meeting*>(on)->generation != what; }, &meeting,
         generation, name);
    return meeting.any[generation % 2];
  }
  void meet_some(int id, unsigned members) { meet(named(id), members, "a named barrier"); }
  bool any_of_some(int id, unsigned members, bool mine) { return meet(named(id), members, "a named barrier", mine); }
  void arrive(int id, unsigned members) { named(id).come(members, false); }
  void meet_block() { meet(named(0), static_cast<unsigned>(fibers.size()), "its block"); }

  /// The values of the warp's lanes.
  const uint64_t* gather(uint64_t value) {
    uint64_t* turn = exchanged[current().exchanges++ % 2];
    turn[thread_number] = value;
    meet(meetings[thread_number / 32], 32, "its warp");
    return turn + thread_number / 32 * 32;
  }

  void cluster_arrive() {
    current().cluster_phase = cluster.phase;
    ++cluster.arrived;
    cluster.settle();
  }
  void cluster_wait() {
    wait([](const void* on, uint64_t what) { return static_cast<const Cluster*>(on)->phase != what; }, &cluster,
         current().cluster_phase, "its cluster");
  }

  /// Have the copy engine do something here.
  void bring(std::function<void()> what) {
    if (ended) return complain("a copy to the shared memory of a thread block that has ended");
    if (arrives_in_256 == 256)
      what();
    else
      arriving.push_back(std::move(what));
  }
  void bring_one() {
    const size_t which = random() % arriving.size();
    const auto bring = std::move(arriving[which]);
    arriving.erase(arriving.begin() + which);
    bring();
  }

  /// A bulk copy to device memory, by this thread; the last ones may still be on their way.
  void write_later(Fiber::Copy copy) {
    if (is_late)
      current().writes.push_back(std::move(copy));
    else
      copy();
  }
  void write_all_but(size_t newest) {
    auto& writes = current().writes;
    for (; writes.size() > newest; writes.erase(writes.begin())) writes.front()();
  }

  /// Go on while any thread can, but not for ever: what they do over and over may be to look whether another block has
  /// come so far. Whether one could. Threads that poll memory go on once.
  bool turn() {
    block = this;
    blockIdx = {number % gridDim.x, number / gridDim.x};
    shared_memory = shared;
    bool went_on = false, first = true;
    const unsigned warps = (fibers.size() + 31) / 32;
    int passes = 1 + static_cast<int>(random() % kMostPasses);
    for (bool moved = true; moved && passes > 0; first = false, --passes) {
      moved = false;
      const unsigned begin = random() % warps;
      for (unsigned i = 0; i < warps; ++i) {
        const unsigned warp = (begin + i) % warps;
        if (random() % 256 < sluggish_in_256) {
          moved |= std::any_of(fibers.begin() + 32 * warp, fibers.begin() + 32 * warp + 32, can_go_on);
          continue;
        }
        for (thread_number = 32 * warp; thread_number < 32 * warp + 32; ++thread_number) {
          Fiber& fiber = current();
          if (fiber.polls ? !first || fiber.done : !can_go_on(fiber)) continue;
          moved |= !fiber.polls;
          resume();
          if (!fiber.done) continue;
          cluster.lose(fiber.cluster_phase);
        }
      }
      for (size_t left = arriving.size(); left > 0 && !arriving.empty(); --left)
        if (random() % 256 < arrives_in_256) bring_one(), moved = true;
      if (!moved && !arriving.empty()) bring_one(), moved = true;
      if (!failure.empty()) break;
      went_on |= moved;
    }
    ended = std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; });
    return went_on;
  }

  /// For whoever has to find out why nobody goes on.
  std::string report() const {
    std::string text;
    for (size_t first = 0; first < fibers.size(); first += 32) {
      const Fiber& fiber = *std::find_if(fibers.begin() + first, fibers.begin() + first + 31,
                                         [](const Fiber& fiber) { return !fiber.done; });
      if (fiber.done) continue;
      char line[160];
      std::snprintf(line, sizeof line, "\n  block %u warp %zu waits for %s", number, first / 32,
                    fiber.polls ? "memory" : fiber.waits_for);
      text += line;
      if (fiber.on >= shared && fiber.on < shared + kMostShared) {
        std::snprintf(line, sizeof line, " at %td of shared memory", static_cast<const uint8_t*>(fiber.on) - shared);
        text += line;
      }
    }
    return text;
  }

 private:
  static bool can_go_on(const Fiber& fiber) {
    return !fiber.done && !fiber.polls && (!fiber.ready || fiber.ready(fiber.on, fiber.what));
  }
};

/// A thread has done what it must not. Behind the jumps between stacks there are no exceptions: it stops where it is.
[[noreturn]] inline void fail(const std::string& what) {
  complain(what + " (block " + std::to_string(block->number) + ", thread " + std::to_string(thread_number) + ")");
  for (;;) block->poll();
}

/// Where most kernels have a block's dynamic shared memory, in the calling thread of the system: see dynamic_shared.h.
uint8_t* own_shared_memory();

/// A place for a thread block on a multiprocessor: a thread of the system, whose shared memory the kernels take for
/// theirs.
class Place {
 public:
  explicit Place(uint8_t* (*shared)())
      : thread_([this, shared] {
          shared_ = shared();
          done_.release();
          for (turn_.acquire(); !over_; turn_.acquire()) {
            went_on_ = block_->turn();
            done_.release();
          }
        }) {
    done_.acquire();
  }
  Place(const Place&) = delete;
  ~Place() {
    over_ = true;
    turn_.release();
    thread_.join();
  }

  void take(Block* block) {
    block_ = block;
    if (block->fibers.size() > room_) {
      room_ = block->fibers.size();
      stacks_.reset(new char[room_ * kStack]);  // whose memory the system gives as it is touched
    }
    block->stacks = stacks_.get();
    block->shared = shared_;
    std::memset(shared_, 0xff, kMostShared);  // NaN, of any type
  }
  bool turn() {
    turn_.release();
    done_.acquire();
    return went_on_;
  }

 private:
  uint8_t* shared_ = nullptr;
  size_t room_ = 0;  // threads that have stacks
  std::unique_ptr<char[]> stacks_;
  Block* block_ = nullptr;
  bool over_ = false, went_on_ = false;
  std::binary_semaphore turn_{0}, done_{0};
  std::thread thread_;
};

/// Run a grid with as many blocks at a time as there is room for; whether it came to its end. Clusters go together.
inline bool run_grid(dim3 grid, unsigned threads, unsigned cluster_size, unsigned places, uint8_t* (*shared)(),
                     const std::function<void()>& body) {
  static std::mutex one_launch;
  const std::lock_guard lock(one_launch);
  blockDim = threads;
  gridDim = grid;
  static std::map<uint8_t* (*)(), std::vector<std::unique_ptr<Place>>> all_places;  // of earlier launches too
  auto& of_memory = all_places[shared];
  struct Room {
    std::vector<Place*> places;
    std::vector<std::unique_ptr<Block>> blocks;
    Cluster cluster;
  };
  failure.clear();
  const unsigned clusters = grid.x * grid.y / cluster_size;
  std::vector<std::unique_ptr<Room>> rooms(std::min(std::max(places / cluster_size, 1u), clusters));
  size_t taken = 0;
  for (auto& room : rooms) {
    room = std::make_unique<Room>();
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      if (taken == of_memory.size()) of_memory.push_back(std::make_unique<Place>(shared));
      room->places.push_back(of_memory[taken++].get());
    }
  }
  std::mt19937_64 random(choices.seed + launches++);
  unsigned next = 0, ended = 0;
  const auto fill = [&](Room& room) {
    room.blocks.clear();
    room.cluster = {};
    if (next == clusters) return;
    room.cluster.threads = cluster_size * threads;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      room.blocks.push_back(std::make_unique<Block>(next * cluster_size + rank, rank, threads, room.cluster, body));
      room.cluster.blocks.push_back(room.blocks.back().get());
      room.places[rank]->take(room.blocks.back().get());
    }
    ++next;
  };
  for (auto& room : rooms) fill(*room);
  constexpr int kPatience = 2000;  // rounds of all blocks in which nobody went on, but some looked at memory
  for (int idle = 0; ended < clusters && failure.empty();) {
    bool went_on = false;
    const size_t begin = random() % rooms.size();
    for (size_t i = 0; i < rooms.size() && failure.empty(); ++i) {
      Room& room = *rooms[(begin + i) % rooms.size()];
      for (size_t rank = 0; rank < room.blocks.size(); ++rank)
        if (!room.blocks[rank]->ended) went_on |= room.places[rank]->turn();
      if (room.blocks.empty() ||
          !std::all_of(room.blocks.begin(), room.blocks.end(), [](const auto& block) { return block->ended; }))
        continue;
      ++ended;
      fill(room);
      went_on = true;
    }
    idle = went_on ? 0 : idle + 1;
    if (idle < kPatience || !failure.empty()) continue;
    failure = "nobody goes on";
    for (const auto& room : rooms)
      for (const auto& block : room->blocks)
        if (!block->ended) failure += block->report();
  }
  if (!failure.empty())
    std::fprintf(stderr, "emulated GPU, launch %llu: %s\n", static_cast<unsigned long long>(launches), failure.c_str());
  return failure.empty();
}

}  // namespace emulated
