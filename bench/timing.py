"""How long a call takes: medians of CUDA events, sustained and interleaved, as Triton's ``do_bench`` takes them.

- `measure_launches`, for calls of 100 µs and more: each candidate in turn is warmed up for 25 ms and launched for
  100 ms, several rounds over, so that all meet the same machine at the clock that each one's power allows. The L2
  cache is cleared before every launch, outside its pair of events. The host never waits within a block.
- `measure_graphs`, for shorter calls: a CUDA graph holds a few times (clear the L2, call); a second one holds the
  clearings alone. Their difference is the device's part of the call on a cold cache, with no event and no launch in it.
- `measure_host`: the wall time of enqueuing a call.

A clock is anything with the methods of `CudaClock`; tests bring one that does not need a GPU.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# More than twice the L2 of any Hopper GPU.
CLEAR_BYTES = 128 << 20
GRAPH_CALLS = 10
SHORT_CALL_US = 100.0


@dataclass(frozen=True)
class Candidate:
    """A call to be timed, and the context that it needs around it (a choice of backend, for instance)."""

    name: str
    call: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Budget:
    """Time for each candidate in each round, in ms."""

    warmup_ms: float = 25.0
    launch_ms: float = 100.0
    rounds: int = 3


# Two rounds are enough for a curve, and keep 84 rows of three candidates at a minute of launches.
SWEEP = Budget(rounds=2)
# Variants of one kernel differ by more than a short burst does from a long one, and 140 rows are many.
TILES = Budget(warmup_ms=5.0, launch_ms=20.0, rounds=2)
QUICK = Budget(warmup_ms=5.0, launch_ms=20.0, rounds=1)


class CudaClock:
    """Events, cache clearing and graph capture on PyTorch's current device and stream."""

    def __init__(self, torch):
        self._torch = torch
        self._cache = torch.empty(CLEAR_BYTES, dtype=torch.uint8, device="cuda")

    def clear_cache(self):
        self._cache.zero_()

    def record(self):
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start, end):
        return start.elapsed_time(end)

    def synchronize(self):
        self._torch.cuda.synchronize()

    def host_seconds(self):
        return time.perf_counter()

    def capture(self, work):
        """Record `work` into a graph; the result replays it."""
        torch = self._torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a first run outside the capture: modules load and workspaces are made here
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def estimate_us(candidate: Candidate, clock, launches: int = 5) -> float:
    """Time of a call within a few launches, clearing left out; enough to choose how to measure it."""
    with candidate.context():
        candidate.call()
        pairs = [_launch(candidate.call, clock) for _ in range(launches)]
        clock.synchronize()
    return 1e3 * statistics.median(clock.elapsed_ms(*pair) for pair in pairs)


def measure(candidates, clock, budget: Budget = Budget()) -> dict[str, float]:
    """Median µs of each candidate's device part, by name: as graphs where the first candidate's call is short."""
    if estimate_us(candidates[0], clock) < SHORT_CALL_US:
        return measure_graphs(candidates, clock, budget)
    return measure_launches(candidates, clock, budget)


def measure_launches(candidates, clock, budget: Budget = Budget(), progress=None) -> dict[str, float]:
    """Median µs of each candidate, by name, over rounds of sustained launches."""
    samples = {candidate.name: [] for candidate in candidates}
    for turn in range(budget.rounds):
        for position, candidate in enumerate(candidates):
            with candidate.context():
                samples[candidate.name] += _block(candidate.call, clock, budget)
            if progress is not None:
                progress(turn * len(candidates) + position + 1, budget.rounds * len(candidates))
    return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def measure_graphs(candidates, clock, budget: Budget = Budget(), progress=None) -> dict[str, float]:
    """Median µs of each candidate's device part, by name, from graph replays on a cold L2."""
    def clearings():
        for _ in range(GRAPH_CALLS):
            clock.clear_cache()

    replay_clearings = clock.capture(clearings)
    replays = {}
    for candidate in candidates:
        def clearings_and_calls(call=candidate.call):
            for _ in range(GRAPH_CALLS):
                clock.clear_cache()
                call()

        with candidate.context():
            replays[candidate.name] = clock.capture(clearings_and_calls)
    samples = {candidate.name: [] for candidate in candidates}
    for turn in range(budget.rounds):
        for position, (name, replay) in enumerate(replays.items()):
            samples[name] += _graph_block(replay, replay_clearings, clock, budget)
            if progress is not None:
                progress(turn * len(replays) + position + 1, budget.rounds * len(replays))
    return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def measure_host(candidates, clock, calls: int = 200, rounds: int = 20) -> dict[str, float]:
    """Median µs that the host spends in one call, by name, while nothing makes it wait for the GPU."""
    samples = {candidate.name: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate in candidates:
            with candidate.context():
                for _ in range(10):
                    candidate.call()
                clock.synchronize()
                start = clock.host_seconds()
                for _ in range(calls):
                    candidate.call()
                samples[candidate.name].append((clock.host_seconds() - start) / calls)
                clock.synchronize()
    return {name: 1e6 * statistics.median(times) for name, times in samples.items()}


def _launch(call, clock):
    clock.clear_cache()
    start = clock.record()
    call()
    return start, clock.record()


def _block(call, clock, budget):
    """One candidate's part of a round: ms of each launch."""
    begin = clock.record()
    for _ in range(5):
        _launch(call, clock)
    end = clock.record()
    clock.synchronize()
    per_launch = clock.elapsed_ms(begin, end) / 5
    for _ in range(_runs(budget.warmup_ms, per_launch)):
        _launch(call, clock)
    pairs = [_launch(call, clock) for _ in range(_runs(budget.launch_ms, per_launch))]
    clock.synchronize()
    return [clock.elapsed_ms(*pair) for pair in pairs]


def _graph_block(replay, replay_clearings, clock, budget):
    """One candidate's part of a round: ms of a call, from pairs of replays."""
    def pair():
        marks = [clock.record()]
        replay_clearings()
        marks.append(clock.record())
        replay()
        marks.append(clock.record())
        return marks

    marks = pair()
    clock.synchronize()
    per_pair = clock.elapsed_ms(marks[0], marks[2])
    for _ in range(_runs(budget.warmup_ms, per_pair)):
        pair()
    taken = [pair() for _ in range(_runs(budget.launch_ms, per_pair))]
    clock.synchronize()
    return [(clock.elapsed_ms(b, c) - clock.elapsed_ms(a, b)) / GRAPH_CALLS for a, b, c in taken]


def _runs(wanted_ms, each_ms):
    return max(1, int(wanted_ms / max(each_ms, 1e-3)))
