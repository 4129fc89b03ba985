"""A pool of pages as a serving engine keeps it: shared, counted, and NaN wherever no sequence has a row.

Beside the pool that the library sees lies a second one that says what it should hold, bit for bit.
"""

import numpy as np
from server_arrays import poison_of


class Pool:
    """Pages of keys and values, and who has them."""

    def __init__(self, arrays, model, random):
        self.arrays, self.dtype, self.page_size = arrays, model.dtype, model.page_size
        self.users = np.zeros(model.num_pages, int)  # sequences that have each page
        self.free = random.permutation(model.num_pages).tolist()
        self.most_used = 0
        self._stale = []  # rows to poison
        # A page on either side belongs to nobody: what is written outside the pool shows there.
        self._actual, self._expected = (
            [arrays.poison((model.num_pages + 2, model.page_size, model.heads_kv, dim), model.dtype)
             for dim in (model.head_dim, model.head_dim_v)] for _ in range(2))
        self.k, self.v = (arrays.typed(bits[1:-1], model.dtype) for bits in self._actual)
        self._rows = [bits.reshape(-1, *bits.shape[2:]) for bits in self._actual + self._expected]

    @property
    def pages_used(self):
        return len(self.users) - len(self.free)

    def row(self, pages, positions):
        """Where in the guarded pool a sequence's rows at `positions`, an array, lie."""
        return (np.asarray(pages)[positions // self.page_size] + 1) * self.page_size + positions % self.page_size

    def take(self):
        """A page for one sequence: all NaN."""
        page = self.free.pop()
        self.users[page] = 1
        self.most_used = max(self.most_used, self.pages_used)
        return page

    def share(self, page):
        self.users[page] += 1

    def drop(self, page):
        """One sequence less has the page; the last leaves it poisoned."""
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.insert(0, page)  # the page that was free longest comes next
            self._stale.append((page + 1) * self.page_size + np.arange(self.page_size))

    def forget(self, pages, positions):
        """Poison rows of a sequence that it no longer has."""
        self._stale.append(self.row(pages, positions))

    def copy(self, page, other, count):
        """The first rows of a page into another, in both pools."""
        for bits in self._actual + self._expected:
            bits[other + 1, :count] = bits[page + 1, :count]

    def expect(self, rows, k, v, in_place_too=False):
        """New rows: in the second pool, and in that of the library where a caller writes them before its call."""
        actual_k, actual_v, expected_k, expected_v = self._rows
        targets = [(expected_k, k), (expected_v, v)]
        if in_place_too:
            targets += [(actual_k, k), (actual_v, v)]
        for bits, new in targets:
            bits[rows] = self.arrays.bits(new)

    def read(self, rows):
        """A sequence's keys and values as they should be."""
        return [self.arrays.typed(bits[rows], self.dtype) for bits in self._rows[2:]]

    def strays(self):
        """How many elements are not as they should be: a scalar of the framework."""
        different = [self.arrays.total(actual != expected)
                     for actual, expected in zip(self._actual, self._expected, strict=True)]
        return different[0] + different[1]

    def poison(self):
        """Put NaN where no sequence has a row any more."""
        if self._stale:
            rows = self.arrays.put(np.concatenate(self._stale))
            for bits in self._rows:
                bits[rows] = poison_of(self.dtype)
            self._stale = []
