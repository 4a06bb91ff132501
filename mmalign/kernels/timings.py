"""Which screen of exact search is the fastest on this processor: measured once, then recorded.

The times differ by more than half between processors with the same name. All screens give the same
results, so the choice may depend on timing.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from mmalign.measured import Figures, measured

COUNTS = (1, 4, 16, 64, 256)
"""Numbers of queries to measure."""
LEAST, MOST = {"bfloat16": 16}, {"half": 4}
"""A screen is not measured below LEAST queries or above MOST, where it cannot be the fastest."""
# Few queries are memory-bound, so they are measured over more rows than caches hold.
ROWS, MORE_ROWS, MANY_QUERIES = 1 << 15, 1 << 16, 64
# Times are recorded once nearly all combinations have come close to their best time again. On a
# busy machine that does not happen, or takes too long: then nothing is recorded.
LEAST_ROUNDS, ROUNDS, SECONDS, REPEATED, NEARLY_ALL = 2, 6, 3.0, 1.15, 0.9
PROBES, PROBE_SIDE = 12, 768
# The usual screen is kept unless another takes less than this fraction of its time.
CLEARLY = 0.9

Search = Callable[[torch.Tensor, str], object]
Way = tuple[str, int]
Screen = TypeVar("Screen", bound=str)
_unsettled: set[str] = set()


class _BusyError(Exception):
    """The processor is busy with other work, so measurements would be unreliable."""


@dataclass(frozen=True)
class Timings:
    """Times of the screens; empty if they could not be measured."""

    ms: Mapping[str, float]
    """By name and number of queries, such as "half 16"."""

    def expected(self, screen: str, queries: int) -> float:
        """Return milliseconds for this many queries, for comparison; infinite if not known."""
        known = [c for c in COUNTS if f"{screen} {c}" in self.ms]
        if not known or queries < known[0]:
            return math.inf
        low = max(c for c in known if c <= queries)
        high = min((c for c in known if c >= queries), default=None)
        from_ms = self.ms[f"{screen} {low}"]
        if high is None:
            return from_ms * queries / low
        to_ms = self.ms[f"{screen} {high}"]
        return from_ms + (to_ms - from_ms) * (queries - low) / max(1, high - low)

    def fastest(self, usual: Screen, possible: Sequence[Screen], queries: int) -> Screen:
        """Return the fastest of the possible screens; the usual one unless another clearly is."""
        best = min(possible, key=lambda screen: self.expected(screen, queries))
        faster = self.expected(best, queries) < CLEARLY * self.expected(usual, queries)
        return best if faster else usual


def measure_screens(
    dtype: torch.dtype,
    width: int,
    screens: Sequence[str],
    prepare: Callable[[list[torch.Tensor]], Search],
) -> Timings:
    """Measure screens in turns, or read the recorded times; up to three seconds.

    Args:
        dtype: Of the vectors.
        width: Dimensions of a vector.
        screens: The screens to compare.
        prepare: Prepares shards of vectors, and returns a search function that takes queries and
            the name of a screen.
    """
    ways = [(s, c) for s in screens for c in COUNTS if LEAST.get(s, c) <= c <= MOST.get(s, c)]
    conditions: dict[str, str | int] = {
        "type": str(dtype), "dims": width, "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    key = f"{conditions} {ways}"
    if key in _unsettled:
        return Timings({})

    def measure() -> Figures:
        started = time.perf_counter()
        if not _quiet():
            raise _BusyError
        vectors_ND = _cloud(ROWS, width, seed=0).to(dtype)
        short, long = prepare([vectors_ND]), prepare(_copies(vectors_ND))
        queries_MD = _cloud(COUNTS[-1], width, seed=1)

        def search(screen: str, count: int) -> None:
            (short if count >= MANY_QUERIES else long)(queries_MD[:count], screen)

        return _in_turns(ways, search, until=started + SECONDS)

    try:
        return Timings(measured("exact-search", conditions, [_name(way) for way in ways], measure))
    except _BusyError:
        _unsettled.add(key)
        return Timings({})


def _quiet() -> bool:
    """Return whether one product repeatedly takes the same time; takes about 0.05 seconds."""
    ones = torch.ones(PROBE_SIDE, PROBE_SIDE)
    taken = []
    for _ in range(PROBES):
        started = time.perf_counter()
        ones @ ones
        taken.append(time.perf_counter() - started)
    return sorted(taken)[PROBES // 2] <= REPEATED * min(taken)


def _in_turns(ways: Sequence[Way], search: Callable[[str, int], None], until: float) -> Figures:
    """Time all combinations in turn, repeatedly, until the times are stable."""
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for done in range(ROUNDS + 1):
        for way in ways:
            if (started := time.perf_counter()) > until:
                raise _BusyError
            search(*way)
            times[way].append(1000 * (time.perf_counter() - started))
        if done >= LEAST_ROUNDS and _settled(times):
            return {_name(way): min(taken) for way, taken in times.items()}
    raise _BusyError


def _settled(times: Mapping[Way, list[float]]) -> bool:
    repeated = 0
    for taken in times.values():
        first, second = sorted(taken)[:2]
        repeated += second <= REPEATED * first
    return repeated >= NEARLY_ALL * len(times)


def _name(way: Way) -> str:
    return f"{way[0]} {way[1]}"


def _copies(vectors_ND: torch.Tensor) -> list[torch.Tensor]:
    return [vectors_ND.clone() for _ in range(MORE_ROWS // ROWS)]


def _cloud(rows: int, width: int, seed: int) -> torch.Tensor:
    """Make unit vectors around a centre of their own, like those of images and of texts.

    If vectors and queries shared one centre, all scores would be so similar that low-precision
    screens exclude few vectors, and these screens would look slower than they are.
    """
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.arange(1, width + 1).pow(-0.35)
    centre_D = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    noise_ND = torch.randn(rows, width, generator=generator)
    vectors_ND = 0.7 * spread_D.norm() * centre_D + spread_D * noise_ND
    return torch.nn.functional.normalize(vectors_ND, dim=1)
