"""The same work in many threads at once."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
THREADS, ROUNDS = 8, 4


def together(work: Callable[[], T], rounds: int = ROUNDS) -> list[T]:
    """Do the same work in many threads that start at one moment."""
    barrier = threading.Barrier(THREADS)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        barrier.wait()
        try:
            for _ in range(rounds):
                results.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert len(results) == THREADS * rounds
    return results
