"""Stand-ins for the tests of the benchmark harness: a clock that needs no GPU, and made-up figures."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench is part of the checkout, not of the package; last, so that an installed fa3 is found

from bench import runner, shapes  # noqa: E402


class FakeClock:
    """A machine on which everything takes the time it says, and one launch in ten is disturbed."""

    clear_ms = 0.05

    def __init__(self):
        self.now = 0.0
        self.launches = 0

    def clear_cache(self):
        self.now += self.clear_ms

    def work(self, ms):
        self.launches += 1
        self.now += ms * (5 if self.launches % 10 == 0 else 1)

    def record(self):
        return self.now

    def elapsed_ms(self, start, end):
        return end - start

    def synchronize(self):
        pass

    def host_seconds(self):
        return self.now / 1e3

    def capture(self, work):
        """What `work` takes now is what each replay will take."""
        before = self.now
        work()
        cost, self.now = self.now - before, before

        def replay():
            self.now += cost

        return replay


def made_up_records(group, device="Imaginary GPU"):
    """A record of each row of a timed group; such figures live in a test's temporary folder only."""
    peers = {"cudnn": 2.0, "fa2": 10.0} if group != "backward" else {"cudnn": 2.0, "fa2": 10.0, "deterministic": 1.0}
    return [runner.record(row, {"fa3": 10.0 + at} if row.dtype == "fp8" else
                          {"fa3": 10.0 + at} | {name: 10.0 + at + more for name, more in peers.items()}, device,
                          "0123abcd")
            for at, row in enumerate(shapes.GROUPS[group])]
