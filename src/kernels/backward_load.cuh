// The loader, which keeps Q and dO coming by TMA, and the adders, which take dQ away.
#pragma once
#include "arch/bulk.cuh"
#include "kernels/backward_traits.cuh"
#include "tile/ring.cuh"

namespace fa3 {

/// One thread.
template <class Traits>
class BackwardLoader {
  using Shared = BackwardShared<Traits>;

 public:
  __device__ __forceinline__ BackwardLoader(const BackwardArgs& args, Shared& shared, const KeyTile& work)
      : args_(args), shared_(shared), work_(work) {}

  __device__ __forceinline__ void run() {
    constexpr uint32_t kStatBytes = Traits::kTileM * sizeof(float);
    const int steps = work_.steps(args_.group);
    if (steps == 0) return;
    const int key = work_.k.begin + work_.n_block * Traits::kTileN;
    load<typename Traits::TileK>(args_.k, shared_.k, key, work_.head_kv, shared_.k_full, 0);
    QueryStep at(work_);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, ring_.advance(), at.advance(work_)) {
      const uint32_t stage = ring_.stage();
      const Ring<Traits::kDoutStages> dout{ring_.count};
      const int head = work_.head_kv * args_.group + at.head, row = work_.q.begin + at.m_block * Traits::kTileM;
      const float* stats = args_.scratch.stats +
                           (head * args_.scratch.query_tiles + work_.first_tile + at.m_block) * (2 * Traits::kTileM);
      shared_.q_empty[stage].wait(ring_.parity() ^ 1);
      load<typename Traits::TileQ>(args_.q, shared_.q[stage], row, head, shared_.q_full[stage], kStatBytes);
      arch::load_bytes(shared_.lse[stage], stats, kStatBytes, shared_.q_full[stage]);
      if (step == 0) load<typename Traits::TileV>(args_.v, shared_.v, key, work_.head_kv, shared_.v_full, 0);
      arch::Barrier& dout_full = shared_.dout_full[dout.stage()];
      shared_.dout_empty[dout.stage()].wait(dout.parity() ^ 1);
      load<typename Traits::TileDo>(args_.dout, shared_.dout[dout.stage()], row, head, dout_full, kStatBytes);
      arch::load_bytes(shared_.delta[dout.stage()], stats + Traits::kTileM, kStatBytes, dout_full);
    }
  }

 private:
  /// A tile that begins at `row`, and announce `more` bytes beside it.
  template <class Tile>
  __device__ __forceinline__ void load(const TmaOperand& from, uint8_t* to, int row, int head, arch::Barrier& full,
                                       uint32_t more) {
    full.arrive_expecting(Tile::kBytes + more);
    const int batch = work_.batch * from.batch_step;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      arch::load_box(to + chunk * Tile::kChunkBytes, &from.map,
                     {chunk * Tile::kChunkColumns, row, head * from.head_step, batch}, full);
  }

  const BackwardArgs& args_;
  Shared& shared_;
  const KeyTile& work_;
  Ring<Traits::kStages> ring_;
};

/// One thread for each consumer: adds its share of each query tile's dQ to that in device memory. With turns, blocks of
/// keys add in their order: thread blocks start in that order too, so whoever waits waits for one that is running.
template <class Traits>
__device__ __forceinline__ void add_dq(const BackwardArgs& args, BackwardShared<Traits>& shared, const KeyTile& work,
                                       int consumer) {
  const int steps = work.steps(args.group);
  if (steps == 0) return;
  constexpr int kPartFloats = Traits::kDqFloats / Traits::kDqParts;
  const float* const given = &shared.dq[consumer][0][0].x;
  Ring<1> ring;
  if (Traits::lags(consumer)) {  // in the first step it has none yet
    for (int part = 0; part < Traits::kDqParts; ++part, ring.advance()) {
      shared.dq_full[consumer].wait(ring.parity());
      shared.dq_empty[consumer].arrive();
    }
  }
  QueryStep at(work);
#pragma unroll 1
  for (int step = 0; step < steps; ++step, at.advance(work)) {
    const int64_t head = work.head_kv * args.group + at.head;
    const int64_t tile =
        (head * args.scratch.query_tiles + work.first_tile + at.m_block) * Traits::kConsumers + consumer;
    float* const sum = args.scratch.dq + tile * Traits::kDqFloats;
    if (args.scratch.dq_turns) {  // before there is anything to add: both come when they come
      const int first =
          first_key_block<Traits::kTileN>(args.visibility, at.m_block * Traits::kTileM, work.q.length, work.k.length);
      arch::wait_for_turn(args.scratch.dq_turns + tile, work.n_block - first);
    }
#pragma unroll
    for (int part = 0; part < Traits::kDqParts; ++part, ring.advance()) {
      shared.dq_full[consumer].wait(ring.parity());
      arch::add_floats(sum + part * kPartFloats, given, kPartFloats * sizeof(float));
      arch::wait_until_read();
      shared.dq_empty[consumer].arrive();
    }
    if (args.scratch.dq_turns) {
      arch::wait_until_added();
      arch::pass_turn(args.scratch.dq_turns + tile);
    }
  }
  arch::wait_until_added();  // shared memory must outlive the copy engine's reads
}

}  // namespace fa3
