// The loader, which keeps Q and dO coming by TMA, and the adders, which take dQ away.
#pragma once
#include "arch/bulk.cuh"
#include "arch/dependents.cuh"
#include "kernels/backward_traits.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// A warp, of which one thread loads: with all of it on the way, ptxas keeps in uniform registers what it needs. It
/// takes the next piece of work when it has asked for all that the one before needs, and loads what it can of it while
/// the consumers are still busy with that one's end.
template <class Traits>
class BackwardLoader {
  using Shared = BackwardShared<Traits>;

 public:
  __device__ __forceinline__ BackwardLoader(const BackwardArgs& args, Shared& shared) : args_(args), shared_(shared) {}

  __device__ __forceinline__ void run() {
    if constexpr (Traits::kPairs)
      if (pair_rank<Traits>() == 1) return hear();
    search();
  }

 private:
  __device__ __forceinline__ void search() {
    KeyTile work;
#pragma unroll 1
    for (uint32_t index = blockIdx.x / Traits::kBlocks; index < args_.key_tiles; index = next_index()) {
      if (!find_work<Traits>(args_, index, work)) continue;
      work.last = index + gridDim.x / Traits::kBlocks >= args_.key_tiles;
      work = work.uniform();
      put(work);
      load(work);
    }
    work.n_block = -1;
    put(work);
  }

  __device__ __forceinline__ uint32_t next_index() const {
    uint32_t taken = 0;
    if (arch::leads()) taken = atomicAdd(args_.scratch.taken, 1u);
    return gridDim.x / Traits::kBlocks + arch::uniform(taken);
  }

  __device__ __forceinline__ void put(const KeyTile& work) {
    if (Traits::kRoundsEarly && work.last) arch::launch_dependents();
    const uint32_t place = works_.stage();
    shared_.works.put(work, works_);
    if constexpr (Traits::kPairs)
      if (pair_rank<Traits>() == 0) tell(shared_.works.place[place]);
  }

  /// The second thread block of a pair, word by word, when it has taken what came before.
  __device__ __forceinline__ void tell(const KeyTile& work) {
    constexpr int kWords = sizeof(KeyTile) / sizeof(int);
    static_assert(kWords <= 32, "a lane sends a word");
    const Ring<1> told{works_.count - 1};
    shared_.work_known.wait(told.parity() ^ 1);
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane < kWords)
      arch::send(reinterpret_cast<int*>(&shared_.told_work) + lane, reinterpret_cast<const int*>(&work)[lane],
                 shared_.work_told, 1);
  }

  /// What the first thread block of a pair works on, of which this one has the keys that follow.
  __device__ __forceinline__ void hear() {
    KeyTile work;
#pragma unroll 1
    do {
      const Ring<1> told{works_.count};
      if (arch::leads()) shared_.work_told.arrive_expecting(sizeof(KeyTile));
      shared_.work_told.wait(told.parity());
      work = shared_.told_work.uniform();
      __syncwarp();
      if (arch::leads()) shared_.work_known.arrive_at(0);
      if (work.exists()) ++work.n_block;
      put(work);
      if (work.exists()) load(work);
    } while (work.exists());
  }

  /// K and V come behind the first queries: the consumers need them for longer. A piece of work without steps has them
  /// all the same, so that all are alike.
  __device__ __forceinline__ void load(const KeyTile& work) {
    int steps = work.steps(args_.group);
    bool begun = false;
    QueryStep at(work);
#pragma unroll 1
    do {
      if (steps > 0) load_queries(work, at);
      if (!begun) load_keys(work);
      begun = true;
      at.advance(work, args_.group);
    } while (--steps > 0);
  }

  __device__ __forceinline__ void load_queries(const KeyTile& work, const QueryStep& at) {
    constexpr uint32_t kStatBytes = Traits::kTileM * sizeof(float);
    const uint32_t stage = ring_.stage();
    const Ring<Traits::kDoutStages> dout{ring_.count};
    const int head = work.head_kv * args_.group + at.head, row = work.q.begin + at.m_block * Traits::kTileM;
    const int batch = work.batch;
    const float* stats =
        args_.scratch.stats + (head * args_.scratch.query_tiles + work.first_tile + at.m_block) * (2 * Traits::kTileM);
    shared_.q_empty[stage].wait(ring_.parity() ^ 1);
    load<typename Traits::TileQ>(args_.q, shared_.q[stage], row, head, batch, shared_.q_full[stage], kStatBytes);
    if (arch::leads()) arch::load_bytes(shared_.lse[stage], stats, kStatBytes, shared_.q_full[stage]);
    arch::Barrier& dout_full = shared_.dout_full[dout.stage()];
    shared_.dout_empty[dout.stage()].wait(dout.parity() ^ 1);
    load<typename Traits::TileDo>(args_.dout, shared_.dout[dout.stage()], row, head, batch, dout_full, kStatBytes);
    if (arch::leads()) arch::load_bytes(shared_.delta[dout.stage()], stats + Traits::kTileM, kStatBytes, dout_full);
    ring_.advance();
  }

  __device__ __forceinline__ void load_keys(const KeyTile& work) {
    const int key = work.k.begin + work.n_block * Traits::kTileN, head = work.head_kv, batch = work.batch;
    const Ring<1> keys{works_.count - 1};  // told of already
    shared_.v_empty.wait(keys.parity() ^ 1);
    load<typename Traits::TileV>(args_.v, shared_.v, key, head, batch, shared_.v_full, 0);
    shared_.k_empty.wait(keys.parity() ^ 1);
    load<typename Traits::TileK>(args_.k, shared_.k, key, head, batch, shared_.k_full,
                                 Traits::kPairs ? Traits::TileOtherK::kBytes : 0);
    if constexpr (Traits::kPairs) load_other_keys(work);
  }

  /// Of the other thread block's keys this one's columns of dQ. They were announced with its own.
  __device__ __forceinline__ void load_other_keys(const KeyTile& work) const {
    using Tile = typename Traits::TileOtherK;
    const int key = work.k.begin + (work.n_block ^ 1) * Traits::kTileN;
    if (arch::leads())
      load_chunks<Tile>(args_.k, shared_.other_k, Tile::kChunks * pair_rank<Traits>(), key, work.head_kv, work.batch,
                        shared_.k_full);
  }

  /// A tile that begins at `row`, and announce `more` bytes beside it.
  template <class Tile>
  __device__ __forceinline__ void load(const TmaOperand& from, uint8_t* to, int row, int head, int batch,
                                       arch::Barrier& full, uint32_t more) const {
    if (!arch::leads()) return;
    full.arrive_expecting(Tile::kBytes + more);
    load_chunks<Tile>(from, to, 0, row, head, batch, full);
  }

  template <class Tile>
  __device__ __forceinline__ static void load_chunks(const TmaOperand& from, uint8_t* to, int first, int row, int head,
                                                     int batch, arch::Barrier& full) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      arch::load_box(to + chunk * Tile::kChunkBytes, &from.map,
                     {(first + chunk) * Tile::kChunkColumns, row, head * from.head_step, batch * from.batch_step},
                     full);
  }

  const BackwardArgs& args_;
  Shared& shared_;
  Ring<Traits::kStages> ring_;  // of Q
  Ring<WorkRing::kPlaces> works_;
};

/// A warp for each consumer: adds its share of each query tile's dQ to that in device memory. The first to come stores
/// it, which spares clearing the memory. In one order, blocks of keys take turns: they are begun in that order too, so
/// whoever waits waits for one that is under way. In any order, the first is who claims the share, with its sums at
/// hand: those who come while it stores them wait for the copy engine alone.
template <class Traits>
class DqAdder {
  static constexpr int kPartFloats = Traits::kDqFloats / Traits::kDqParts;
  // In one order, and in so many steps of two parts, a turn is passed when the next step's first part is on its way:
  // what the step added has arrived by then, and nobody waits for that. In few steps it costs more that the next block
  // begins later; of one part there is time to wait.
  static constexpr int kManySteps = 24;

 public:
  __device__ __forceinline__ DqAdder(const BackwardArgs& args, BackwardShared<Traits>& shared, int consumer)
      : args_(args), shared_(shared), consumer_(consumer), given_(&shared.dq[consumer][0][0].x) {}

  __device__ __forceinline__ void run() {
    Ring<WorkRing::kPlaces> at;
    while (true) {
      const KeyTile work = shared_.works.take(at).uniform();
      if (!work.exists()) break;
      shared_.works.give_back(at);
      add(work);
    }
  }

 private:
  __device__ __forceinline__ void add(const KeyTile& work) {
    for (int part = 0; part < Traits::kDqParts; ++part) {  // in the first step there is none yet
      wait_for_part();
      give_back_part();
    }
    const int steps = work.steps(args_.group);
    QueryStep at(work);
    const bool passes_late = Traits::kDqParts > 1 && args_.scratch.in_order && steps >= kManySteps;
    uint32_t* late = nullptr;  // turns that are to be passed
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance(work, args_.group)) {
      const int64_t head = work.head_kv * args_.group + at.head;
      const int64_t share = (head * args_.scratch.query_tiles + work.first_tile + at.m_block) * Traits::kDqShares +
                            Traits::kConsumers * pair_rank<Traits>() + consumer_;
      float* const sums = args_.scratch.dq + share * Traits::kDqFloats;
      uint32_t* const turns = args_.scratch.dq_turns + share;
      // Before there is anything to add: both come when they come.
      uint32_t state;
      if (args_.scratch.in_order) {
        const int first = first_key_block<Traits::kTileN * Traits::kBlocks>(
            args_.visibility, at.m_block * Traits::kTileM, work.q.length, work.k.length);
        state = work.n_block / Traits::kBlocks - first;
        arch::wait_for_turn(turns, state);
      } else {  // most often there is something to add to, and nothing to be claimed
        state = arch::uniform(arch::peek(turns));
        arch::fence_async_proxy_global();
      }
#pragma unroll
      for (int part = 0; part < Traits::kDqParts; ++part) {
        wait_for_part();
        if (part == 0 && !args_.scratch.in_order && state != BackwardScratch::kBegun) state = claim(turns);
        if (arch::leads()) {
          if (state == 0)
            arch::store_floats(sums + part * kPartFloats, given_, kPartFloats * sizeof(float));
          else
            arch::add_floats(sums + part * kPartFloats, given_, kPartFloats * sizeof(float));
          arch::wait_until_read();
        }
        give_back_part();
        if (Traits::kDqParts > 1 && part == 0 && late && arch::leads()) {
          arch::wait_until_added<1>();
          arch::pass_turn(late);
        }
      }
      if (passes_late) {
        late = turns;
      } else if ((args_.scratch.in_order || state == 0) && arch::leads()) {
        arch::wait_until_added();
        arch::pass_turn(turns);
      }
    }
    if (late && arch::leads()) {
      arch::wait_until_added();
      arch::pass_turn(late);
    }
    if (Traits::kRoundsEarly && arch::leads()) {  // for whoever rounds dQ
      arch::wait_until_added();
      arch::pass_turn(args_.scratch.added + work.batch * args_.num_heads_kv + work.head_kv);
    }
  }

  /// 0: this warp is the first. Otherwise what the first one stored is there.
  __device__ __forceinline__ static uint32_t claim(uint32_t* turns) {
    const uint32_t state = arch::uniform(arch::leads() ? arch::claim(turns) : 0);
    if (state == BackwardScratch::kClaimed) arch::wait_for_turn(turns, BackwardScratch::kBegun);
    arch::fence_async_proxy_global();
    return state;
  }

  __device__ __forceinline__ void wait_for_part() const { shared_.dq_full[consumer_].wait(ring_.parity()); }
  __device__ __forceinline__ void give_back_part() {
    if (arch::leads()) shared_.dq_empty[consumer_].arrive();
    ring_.advance();
  }

  const BackwardArgs& args_;
  BackwardShared<Traits>& shared_;
  const int consumer_;
  const float* const given_;
  Ring<1> ring_;  // parts of dQ handed over
};

}  // namespace fa3
