"""Where a step's time goes: traces of PyTorch's profiler, and ranges for NVIDIA's."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

__all__ = ["Profiler"]

_log = logging.getLogger(__name__)

_SKIPPED, _WARM_UP = 3, 2  # first steps, in which libraries choose algorithms; steps in which the profiler starts


class Profiler:
    """Records some steps of this rank to ``trace-RANK.json.gz``, after the first five; while entered.

    On a GPU its ranges are NVTX ranges, too, always: they cost 0.2 us if no tool asks for them.

    Args:
        steps: number of steps recorded; 0 for none.
        folder: where the trace is written.
    """

    def __init__(self, steps: int, *, folder: str | None, rank: int, device: torch.device) -> None:
        self._nvtx = device.type == "cuda"
        self._profile: profile | None = None
        self._is_written = False
        if not steps or folder is None:
            return
        self._path = Path(folder) / f"trace-{rank}.json.gz"
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._nvtx else [])],
            schedule=schedule(wait=_SKIPPED, warmup=_WARM_UP, active=steps, repeat=1),
            on_trace_ready=self._write,
        )

    def range(self, name: str) -> contextlib.AbstractContextManager[object]:
        """Name the work inside of a ``with`` block."""
        if self._profile is None and not self._nvtx:
            return contextlib.nullcontext()
        ranges = contextlib.ExitStack()
        if self._nvtx:
            ranges.enter_context(torch.cuda.nvtx.range(name))
        if self._profile is not None:
            ranges.enter_context(record_function(name))
        return ranges

    def step(self) -> None:
        """Call after each step."""
        if self._profile is not None:
            self._profile.step()
            if self._is_written:
                self._stop()

    def _stop(self) -> None:
        if self._profile is not None:
            done, self._profile = self._profile, None
            done.stop()

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._stop()
            if not self._is_written:
                _log.warning("--profile: no trace, since the run had no more than %d steps", _SKIPPED + _WARM_UP)

    def _write(self, done: profile) -> None:
        self._is_written = True
        # torch compresses only to a name that ends with .gz.
        partial = self._path.with_name(f"partial-{self._path.name}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # another machine's
            done.export_chrome_trace(str(partial))
            os.replace(partial, self._path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            _log.warning("%s: cannot be written: %s; training goes on", self._path, error.strerror)
        else:
            _log.info("%s: a trace; open it in https://ui.perfetto.dev", self._path)
