"""What torch, DALI, the GPU and a store say of themselves; runs in a process of its own, see ``processes.py``."""

from __future__ import annotations

import ctypes
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["PROBES", "main"]


def main(name: str, answer: str, store: str) -> None:
    """Run a probe, or a check of a store, and write what it returns, as JSON, to the file ``answer``."""
    value = PROBES[name]() if name in PROBES else _findings(name, Path(store))
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(value, file)


def _torch() -> dict[str, Any]:
    import torch

    cause, gpus = "", []
    try:
        if torch.version.cuda is not None:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            gpus.append({"name": card.name, "memory": card.total_memory, "capability": [card.major, card.minor]})
    except Exception as error:
        cause = str(error)
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cause": cause,
        "architectures": torch.cuda.get_arch_list() if gpus else [],
        "nccl": list(torch.cuda.nccl.version()) if has_nccl else None,  # type: ignore[no-untyped-call]
    }


def _dali() -> dict[str, Any]:
    from nvidia import dali

    from dali_lmdb.decoding.dali import DaliDecoder
    from dali_lmdb.images.blank import blank_jpeg
    from dali_lmdb.loaders.versions import nvimagecodec_version, nvjpeg_version

    DaliDecoder().sizes([blank_jpeg(8, 8)])
    return {
        "version": str(dali.__version__),
        "nvimagecodec": list(nvimagecodec_version()),
        "nvjpeg": nvjpeg_version(),
    }


def _gpu() -> dict[str, Any]:
    """Decode an image on the first GPU, and ask nvJPEG about its engine."""
    import numpy as np
    from nvidia.dali import Pipeline, fn

    from dali_lmdb.images.blank import blank_jpeg
    from dali_lmdb.loaders.versions import load_nvjpeg

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(source=lambda: [np.frombuffer(blank_jpeg(64, 64), np.uint8)])
        pipeline.set_outputs(fn.decoders.image(encoded, device="mixed"))
    pipeline.build()
    (images,) = pipeline.run()
    assert list(images.shape()[0]) == [64, 64, 3]
    library, handle = load_nvjpeg(), ctypes.c_void_p()
    engines, cores = ctypes.c_uint(), ctypes.c_uint()
    known = (
        library is not None
        and library.nvjpegCreateSimple(ctypes.byref(handle)) == 0
        and library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores)) == 0
    )
    return {"engines": engines.value if known else 0, "cores_per_engine": cores.value if known else 0}


def _findings(name: str, store: Path) -> list[dict[str, Any]]:
    from dali_lmdb.doctor.findings import found
    from dali_lmdb.doctor.storage import CHECKS

    return [asdict(finding) for finding in found(name, lambda: CHECKS[name](store, Path("/")))]


PROBES = {"torch": _torch, "dali": _dali, "gpu": _gpu}
"""The probes, by name."""
