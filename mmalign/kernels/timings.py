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

QUERY_COUNTS = (1, 4, 16, 64, 256)
"""Numbers of queries to measure."""
MIN_QUERIES, MAX_QUERIES = {"bfloat16": 16}, {"half": 4}
"""A screen is not measured below MIN_QUERIES or above MAX_QUERIES, where it cannot be the
fastest."""
# Few queries are memory-bound, so they are measured over more rows than caches hold.
ROWS, MORE_ROWS, MANY_QUERIES = 1 << 15, 1 << 16, 64
# Times are recorded once nearly all combinations have come close to their best time again. On a
# busy machine that does not happen, or takes too long: then nothing is recorded.
LEAST_ROUNDS, ROUNDS, SECONDS, REPEATED, NEARLY_ALL = 2, 6, 3.0, 1.15, 0.9
PROBES, PROBE_SIDE = 12, 768
# The usual screen is kept unless another takes less than this fraction of its time.
CLEARLY = 0.9

Search = Callable[[torch.Tensor, str], object]
Case = tuple[str, int]
Screen = TypeVar("Screen", bound=str)
_busy_keys: set[str] = set()


class _BusyError(Exception):
    """The processor is busy with other work, so measurements would be unreliable."""


@dataclass(frozen=True)
class Timings:
    """Times of the screens; empty if they could not be measured."""

    ms: Mapping[str, float]
    """By name and number of queries, such as "half 16"."""

    def expected(self, screen: str, queries: int) -> float:
        """Return milliseconds for this many queries, for comparison; infinite if not known."""
        measured_counts = [c for c in QUERY_COUNTS if f"{screen} {c}" in self.ms]
        if not measured_counts or queries < measured_counts[0]:
            return math.inf
        low = max(c for c in measured_counts if c <= queries)
        high = min((c for c in measured_counts if c >= queries), default=None)
        from_ms = self.ms[f"{screen} {low}"]
        if high is None:
            return from_ms * queries / low
        to_ms = self.ms[f"{screen} {high}"]
        return from_ms + (to_ms - from_ms) * (queries - low) / max(1, high - low)

    def fastest(self, default: Screen, possible: Sequence[Screen], queries: int) -> Screen:
        """Return the fastest of the possible screens; the usual one unless another clearly is."""
        best = min(possible, key=lambda screen: self.expected(screen, queries))
        faster = self.expected(best, queries) < CLEARLY * self.expected(default, queries)
        return best if faster else default


def measure_screens(
    dtype: torch.dtype,
    dim: int,
    screens: Sequence[str],
    prepare: Callable[[list[torch.Tensor]], Search],
) -> Timings:
    """Measure screens in turns, or read the recorded times; up to three seconds.

    Args:
        dtype: Of the vectors.
        dim: Dimensions of a vector.
        screens: The screens to compare.
        prepare: Prepares shards of vectors, and returns a search function that takes queries and
            the name of a screen.
    """
    cases = [
        (s, c)
        for s in screens
        for c in QUERY_COUNTS
        if MIN_QUERIES.get(s, c) <= c <= MAX_QUERIES.get(s, c)
    ]
    conditions: dict[str, str | int] = {
        "type": str(dtype), "dims": dim, "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    key = f"{conditions} {cases}"
    if key in _busy_keys:
        return Timings({})

    def measure() -> Figures:
        started = time.perf_counter()
        if not _is_quiet():
            raise _BusyError
        vectors_ND = _unit_vectors(ROWS, dim, seed=0).to(dtype)
        short, long = prepare([vectors_ND]), prepare(_copies(vectors_ND))
        queries_MD = _unit_vectors(QUERY_COUNTS[-1], dim, seed=1)

        def search(screen: str, count: int) -> None:
            (short if count >= MANY_QUERIES else long)(queries_MD[:count], screen)

        return _in_turns(cases, search, until=started + SECONDS)

    try:
        return Timings(
            measured("exact-search", conditions, [_name(case) for case in cases], measure)
        )
    except _BusyError:
        _busy_keys.add(key)
        return Timings({})


def _is_quiet() -> bool:
    """Return whether one product repeatedly takes the same time; takes about 0.05 seconds."""
    ones = torch.ones(PROBE_SIDE, PROBE_SIDE)
    seconds = []
    for _ in range(PROBES):
        started = time.perf_counter()
        ones @ ones
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[PROBES // 2] <= REPEATED * min(seconds)


def _in_turns(cases: Sequence[Case], search: Callable[[str, int], None], until: float) -> Figures:
    """Time all combinations in turn, repeatedly, until the times are stable."""
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for done in range(ROUNDS + 1):
        for case in cases:
            if (started := time.perf_counter()) > until:
                raise _BusyError
            search(*case)
            times[case].append(1000 * (time.perf_counter() - started))
        if done >= LEAST_ROUNDS and _are_stable(times):
            return {_name(case): min(seconds) for case, seconds in times.items()}
    raise _BusyError


def _are_stable(times: Mapping[Case, list[float]]) -> bool:
    repeated = 0
    for seconds in times.values():
        first, second = sorted(seconds)[:2]
        repeated += second <= REPEATED * first
    return repeated >= NEARLY_ALL * len(times)


def _name(case: Case) -> str:
    return f"{case[0]} {case[1]}"


def _copies(vectors_ND: torch.Tensor) -> list[torch.Tensor]:
    return [vectors_ND.clone() for _ in range(MORE_ROWS // ROWS)]


def _unit_vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Make unit vectors around a centre of their own, like those of images and of texts.

    If vectors and queries shared one centre, all scores would be so similar that low-precision
    screens exclude few vectors, and these screens would look slower than they are.
    """
    generator = torch.Generator().manual_seed(seed)
    spread_D = torch.arange(1, dim + 1).pow(-0.35)
    centre_D = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    noise_ND = torch.randn(rows, dim, generator=generator)
    vectors_ND = 0.7 * spread_D.norm() * centre_D + spread_D * noise_ND
    return torch.nn.functional.normalize(vectors_ND, dim=1)
