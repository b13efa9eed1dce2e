"""Limits on what a parser may take for one input."""

import contextlib
import time
from pathlib import Path

MAX_BYTES = 200 << 20
MAX_SECONDS = 10


@contextlib.contextmanager
def bounded():
    """Fail if the block takes more than ``MAX_SECONDS`` of CPU, or ``MAX_BYTES`` more memory at any moment."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before, begin = _status("VmRSS"), time.process_time()
    yield
    seconds, grown = time.process_time() - begin, _status("VmHWM") - before
    assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
    assert grown < MAX_BYTES, f"took {grown >> 20} MiB"


def _status(name):
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(name)
