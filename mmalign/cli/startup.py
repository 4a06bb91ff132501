"""Commands start sooner: the garbage collector has nothing to do while modules are imported."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collections, and leave what was imported out of later ones.

    torch makes hundreds of thousands of objects that live as long as the process. Looking through
    them, over and over while it is imported and once more at exit, takes a third of the processor
    time of `import torch`. Only the first import of torch in a process is treated so.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
