"""Choose the rows of the next batch, and prefetch in threads.

Shapes: B rows of a batch.

The order of an epoch is a function of (seed, epoch) alone, so that training resumes at any step
with the same batches as without interruption.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from mmalign.arrays import Ints

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Draw:
    """One batch as indices: the rows, and the captions drawn for each of them in this epoch."""

    step: int
    rows_B: Ints
    captions_BC: Ints


@dataclass(frozen=True)
class Sampler:
    """Shuffled batches over N rows, without replacement; the last incomplete batch is dropped.

    Row i owns the captions numbered `starts[i]` to `starts[i + 1]`; each batch draws
    `captions_per_image` of them (with repeats only if a row has fewer).
    """

    starts: Ints
    batch_size: int
    seed: int
    captions_per_image: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return (len(self.starts) - 1) // self.batch_size

    def draws(self, first_step: int = 0) -> Iterator[Draw]:
        """Yield batches forever, from any step on."""
        step = first_step
        while True:
            epoch = step // self.steps_per_epoch
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.starts) - 1)
            for batch_index in range(step % self.steps_per_epoch, self.steps_per_epoch):
                rows_B = order[batch_index * self.batch_size : (batch_index + 1) * self.batch_size]
                yield Draw(step, rows_B, self._captions(rows_B, step))
                step += 1

    def _captions(self, rows_B: Ints, step: int) -> Ints:
        # One start for the whole batch: if all samples list their languages in the same order, the
        # captions of a column share one language, and so do the negatives.
        start = np.random.default_rng((self.seed, step, 1)).integers(1 << 32)
        counts_B = self.starts[rows_B + 1] - self.starts[rows_B]
        offsets_BC = (start + np.arange(self.captions_per_image)) % counts_B[:, None]
        return self.starts[rows_B][:, None] + offsets_BC


def read_ahead(make: Callable[[A], B], items: Iterator[A], depth: int = 3) -> Iterator[B]:
    """Run `make` over items in a thread, `depth` results ahead; its errors are raised here."""
    done = object()
    results: queue.Queue[B | BaseException | object] = queue.Queue(depth)
    stop = threading.Event()

    def put(result: B | BaseException | object) -> None:
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put(make(item))
            put(done)
        except BaseException as error:  # passed to the consumer, whatever it is
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="read_ahead")
    thread.start()
    try:
        while (result := results.get()) is not done:
            if isinstance(result, BaseException):
                raise result
            yield result  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def in_batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """Yield the items in lists of a given size; the last one may be shorter.

    >>> list(in_batches(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def in_threads(
    run: Callable[[A], B],
    items: Iterable[A],
    workers: int,
    *,
    ahead: int,
    prepare: Callable[[], None] | None = None,
) -> Iterator[B]:
    """Run a function over items in threads; yield results in order, with at most `ahead` waiting.

    Args:
        run: The function to apply to an item; its error is raised when its result is due.
        items: They are consumed one by one as results are, so a stream stays a stream.
        workers: The number of threads.
        ahead: The number of items started before their result is requested.
        prepare: Called once in each thread before its first item.
    """
    with ThreadPoolExecutor(workers, initializer=prepare) as pool:
        todo = iter(items)
        waiting: deque[Future[B]] = deque(pool.submit(run, item) for item in islice(todo, ahead))
        try:
            while waiting:
                result = waiting.popleft()
                waiting.extend(pool.submit(run, item) for item in islice(todo, 1))
                yield result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
