"""Who is served when in the server's day: arrivals, shared pages, chunks of prompts, rejected tokens, evictions.

Decisions on the host alone, all from one generator: none depends on what a call computes.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    """What one user waits for."""

    number: int
    prompt: int  # rows still to prefill
    output: int  # tokens still to generate
    length: int = 0  # rows in the cache
    pages: list = field(default_factory=list)


@dataclass
class Batch:
    """One call: sequences with as many new tokens each."""

    kind: str  # "decode", "draft" or "mix"
    sequences: list
    counts: list
    written_first: bool = False  # by the engine, before a call that only reads

    @property
    def starts(self):
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)

    @property
    def total(self):
        return sum(self.counts)

    @property
    def lengths(self):
        """Before the call's own rows."""
        return np.array([sequence.length for sequence in self.sequences], np.int32)

    @property
    def lengths_after(self):
        return self.lengths + np.array(self.counts, np.int32)


@dataclass
class Tally:
    """What a day has seen so far."""

    steps: int = 0
    arrived: int = 0
    served: int = 0
    evicted: int = 0
    tokens: int = 0
    calls: int = 0
    graph_calls: int = 0
    waited: int = 0  # calls that went without a sequence, for want of pages
    checked: int = 0
    worst: float = 0.0
    worst_lse: float = 0.0


class Schedule:
    """The live sequences of one pool, and what becomes of them."""

    def __init__(self, pool, load, random, tally):
        self.pool, self.load, self.random, self.tally = pool, load, random, tally
        self.live = []

    def batches(self):
        """The calls of a step, with pages for all their new rows; some may be empty."""
        self._arrive()
        wanted = self._wanted()
        batches = [self._with_pages(batch) for batch in wanted]
        if any(batch.sequences for batch in wanted) and not any(batch.sequences for batch in batches):
            self.tally.evicted += 1  # all wait for pages: the one that has most gives up
            self.end(max(self.live, key=lambda sequence: len(sequence.pages)))
        return batches

    def advance(self, batch):
        """What a call has done to its sequences: tokens taken or rejected, and those that end."""
        for sequence, count in zip(batch.sequences, batch.counts, strict=True):
            sequence.length += count
            self.tally.tokens += count
            if sequence.prompt:
                sequence.prompt -= count
                continue
            if batch.kind == "draft":
                rejected = int(self.random.integers(0, count))
                self._take_back(sequence, rejected)
                count -= rejected
            sequence.output -= count
            if sequence.output <= 0:
                self.tally.served += 1
                self.end(sequence)

    def end(self, sequence):
        """Give a sequence's pages back."""
        for page in sequence.pages:
            self.pool.drop(page)
        self.live.remove(sequence)

    def _arrive(self):
        """New sequences: alone, behind a live one's first pages, or as its fork."""
        load, size = self.load, self.pool.page_size
        while len(self.live) < load.live and self.random.random() < 0.8:
            prompt = int(min(load.prompt, np.exp(self.random.uniform(0, np.log(load.prompt + 1)))))
            if self.random.random() < 0.3:  # about the end of a page
                prompt = int(np.clip(-(-prompt // size) * size + self.random.integers(-1, 2), 1, load.prompt))
            if prompt > len(self.pool.free) * size:
                return
            sequence = Sequence(self.tally.arrived, prompt, int(self.random.integers(1, load.output + 1)))
            self.tally.arrived += 1
            parent = self.live[self.random.integers(len(self.live))] if self.live else None
            how = self.random.random()
            if parent is not None and how < 0.35:
                shared = min(parent.length, prompt - 1) // size
                self._share(sequence, parent, shared, shared * size)
                sequence.prompt -= sequence.length
            elif parent is not None and how < 0.5 and parent.prompt == 0 and parent.length <= load.prompt:
                self._share(sequence, parent, len(parent.pages), parent.length)
                sequence.prompt = 0
            self.live.append(sequence)

    def _share(self, sequence, parent, count, length):
        sequence.pages, sequence.length = parent.pages[:count], length
        for page in sequence.pages:
            self.pool.share(page)

    def _wanted(self):
        """Every live sequence in at most one call; those that are not in any rest for a step."""
        ready = [sequence for sequence in self.live if sequence.prompt == 0]
        starting = [sequence for sequence in self.live if sequence.prompt]
        self.random.shuffle(ready)
        cut = sorted(self.random.integers(0, len(ready) + 1, 3))
        drafted = int(self.random.integers(2, 9))
        mix = starting[:int(self.random.integers(1, 5))] + ready[cut[1]:cut[2]][:6]
        counts = [min(sequence.prompt, int(self.random.integers(1, self.load.chunk + 1))) or 1  # one to decode
                  for sequence in mix]
        batches = [Batch("decode", ready[:cut[0]], [1] * cut[0]),
                   Batch("draft", ready[cut[0]:cut[1]], [drafted] * (cut[1] - cut[0])), Batch("mix", mix, counts)]
        for batch in batches:
            batch.written_first = self.random.random() < 0.25
        return batches

    def _with_pages(self, batch):
        """The batch without those sequences that the pool has no pages for; the others have theirs."""
        kept = [place for place in range(len(batch.sequences))
                if self._make_room(batch.sequences[place], batch.counts[place])]
        self.tally.waited += len(kept) < len(batch.sequences)
        return Batch(batch.kind, [batch.sequences[i] for i in kept], [batch.counts[i] for i in kept],
                     batch.written_first)

    def _make_room(self, sequence, count):
        """Pages for so many new rows; one that is shared and not full is copied before it is written to."""
        pool, size = self.pool, self.pool.page_size
        last, filled = divmod(sequence.length, size)
        copied = filled > 0 and pool.users[sequence.pages[last]] > 1
        needed = -(-(sequence.length + count) // size) - len(sequence.pages)
        if needed + copied > len(pool.free):
            return False
        if copied:
            page = pool.take()
            pool.copy(sequence.pages[last], page, filled)
            pool.drop(sequence.pages[last])
            sequence.pages[last] = page
        sequence.pages += [pool.take() for _ in range(needed)]
        return True

    def _take_back(self, sequence, count):
        """Drop a sequence's last rows, and the pages that then hold none."""
        size, length = self.pool.page_size, sequence.length - count
        kept = -(-length // size)
        self.pool.forget(sequence.pages, np.arange(length, sequence.length))
        for page in sequence.pages[kept:]:
            self.pool.drop(page)
        del sequence.pages[kept:]
        sequence.length = length
