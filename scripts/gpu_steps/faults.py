"""Steps about faults: bad records in a batch, a GPU without memory, and the GPU tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dali_lmdb.convert import convert
from dali_lmdb.errors import RecordError
from dali_lmdb.images.kinds import Kind
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.settings import Device
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.store import open_store
from gpu_steps.isolated import Row

__all__ = ["bad_records", "out_of_memory", "tests"]

_ROOT = Path(__file__).resolve().parents[2]
_NUM_IMAGES = 64  # in the store with bad records
_LEFT_BYTES = 256 << 20  # free GPU memory in ``out_of_memory``: less than a decoded batch of 256 needs
_VERDICT = re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def bad_records(store: str, *, device: Device, **arguments: Any) -> Iterator[Row]:
    """Whether exactly the bad records of a batch are found, and how long that takes.

    Three of 64 of the store's JPEGs are cut off just after their headers.

    Args:
        arguments: more arguments of ``DaliLoader``.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as folder:
        path, bad = _store_with_bad_records(store, Path(folder))
        ways: tuple[OnBad, OnBad] = ("substitute", "raise")
        for on_bad in ways:
            begin = time.perf_counter()
            errors, num_images = [], 0
            with DaliLoader(
                path,
                transform=TrainTransform(),
                batch_size=_NUM_IMAGES // 4,
                device=device,
                on_bad=on_bad,
                last_batch="short",
                **arguments,
            ) as loader:
                batches = iter(loader)
                while True:
                    try:
                        num_images += len(next(batches)[1])
                    except StopIteration:
                        break
                    except RecordError as error:
                        errors.append(str(error))
                found = sorted(record.index for record in loader.bad_records)
                causes = [record.cause for record in loader.bad_records]
            yield {
                "on_bad": on_bad,
                "bad": str(bad),
                "found": str(found),
                "images": num_images,
                "errors": len(errors),
                "seconds": round(time.perf_counter() - begin, 2),
                "cause": causes[0] if causes else "",
                "wrong": "" if found == bad else f"bad records {found}, expected {bad}",
            }


def _store_with_bad_records(store: str, folder: Path) -> tuple[Path, list[int]]:
    """A store of some JPEGs of another, and which of its records were cut off."""
    with open_store(store) as opened:
        jpegs = np.flatnonzero(opened.column("kind") == Kind.JPEG_BASELINE)[:_NUM_IMAGES].tolist()
        values = [bytes(opened.read(record)) for record in jpegs]
    if len(values) < 8:
        raise ValueError(f"{store}: {len(values)} baseline JPEGs, expected at least 8")
    bad = [len(values) // 4, len(values) // 4 + 1, len(values) // 2]
    (folder / "images" / "all").mkdir(parents=True)
    for number, value in enumerate(values):
        # The last start of a scan: a thumbnail in the header has one, too.
        kept = value[: value.rindex(b"\xff\xda") + 50] if number in bad else value
        (folder / "images" / "all" / f"{number:03}.jpg").write_bytes(kept)
    convert(folder / "images", folder / "bad.lmdb")
    return folder / "bad.lmdb", bad


def out_of_memory(store: str, *, batch_size: int, left_bytes: int = _LEFT_BYTES) -> Iterator[Row]:
    """What happens if the GPU has too little memory for a batch: an error about that, and no bad records.

    Args:
        left_bytes: GPU memory that is left free for the loader.
    """
    with DaliLoader(
        store, transform=TrainTransform(), batch_size=batch_size, device="cuda", on_bad="substitute"
    ) as loader:
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(max(0, free - left_bytes), dtype=torch.uint8, device="cuda")
        try:
            next(iter(loader))
            error = "none: the batch fitted"
        except Exception as raised:
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
        row: Row = {"error": error, "bad records": len(loader.bad_records)}
        if loader.bad_records or error.startswith("RecordError"):
            row["wrong"] = "records were blamed for a lack of memory"
        yield row
        del held
        torch.cuda.empty_cache()
        yield {"error": "after memory was freed", "images": len(next(iter(loader))[1])}


def tests(*, paths: list[str], ignored: list[str]) -> Iterator[Row]:
    """Results of the tests that need a GPU.

    Args:
        paths: files or folders, relative to the checkout.
        ignored: patterns of files that are left out.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "--durations=5", "--tb=short"]
    command += [f"--ignore-glob={pattern}" for pattern in ignored] + paths
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)  # the report shows its end if the step runs out of time
            found = _VERDICT.search(line)
            if found is None:
                continue
            counts[found[2]] += 1
            if found[2] in ("FAILED", "ERROR"):
                yield {"test": found[1], "result": found[2].lower(), "wrong": f"{found[1]} {found[2].lower()}"}
    code = process.returncode
    row: Row = {"test": "all", "result": ", ".join(f"{number} {name.lower()}" for name, number in counts.items())}
    if code not in (0, 5):  # 5: no tests were collected
        row["wrong"] = f"pytest ended with exit code {code}"
    yield row
