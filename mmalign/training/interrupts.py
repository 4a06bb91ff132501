"""Handle Ctrl-C and SIGTERM between two training steps, so that no step is left half done."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping after this step; Ctrl-C again stops at once, without saving it\n"


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a stop was requested; a second signal stops at once.

    Outside the main thread no signal arrives, and the function always returns False.
    """
    signals: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        # Not through a Python stream: the signal may have arrived during a write to it.
        with contextlib.suppress(OSError):
            os.write(2, NOTICE)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous_handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
