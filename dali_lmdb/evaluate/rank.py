"""The evaluation on one rank; rank 0 reports. Started by the command, not meant to be run by hand.

``python -m dali_lmdb.evaluate.rank '{"checkpoint": …}'`` reads its settings as JSON; they are already validated.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import DivergedError, StateError
from dali_lmdb.evaluate.outputs import write_outputs
from dali_lmdb.evaluate.results import Collector, describe
from dali_lmdb.evaluate.settings import EvaluateSettings, label_map, load, settings_of
from dali_lmdb.loaders.base import Loader
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.averaging import average_of
from dali_lmdb.train.data import open_data
from dali_lmdb.train.distributed import find_device, memory_errors, process_group
from dali_lmdb.train.evaluation import evaluate
from dali_lmdb.train.models import build_model
from dali_lmdb.train.precision import choose_precision
from dali_lmdb.train.rank import run_started, show_progress
from dali_lmdb.train.settings import TrainSettings

__all__ = ["build_models", "evaluate_checkpoint", "print_plainly"]

_log = logging.getLogger(__name__)

_NUM_CONFUSIONS = 10
_PROGRESS_INTERVAL_S = 10


def evaluate_checkpoint(settings: EvaluateSettings, *, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Evaluate as this process's rank, as given by torchrun's environment; alone without it.

    Args:
        say: called on rank 0 with the result as text, before files are written.

    Returns:
        On rank 0 what the trainer logs: ``val_top1``, ``val_top5`` and ``val_loss`` of the plain weights,
        ``ema_val_top1`` and so on of the averaged ones, ``val_records``; and the ``confusions`` of the
        ``weights`` named.

    Raises:
        StoreError, SourceError, RecordError, DeviceError: data or GPUs are missing or bad.
        StateError: the checkpoint cannot be read, or a file cannot be written.
        DivergedError: the loss is not finite.
    """
    ranks = RankEnvironment.from_environment() or RankEnvironment()
    content = load(settings.checkpoint)
    training, classes = settings_of(content, settings), content["classes"]
    device = find_device(training.device, local_rank=ranks.local_rank, ranks_per_node=ranks.ranks_per_node)
    precision = choose_precision(training.precision, device=device)
    models = build_models(content, settings, training)
    loader = open_data(
        training, training=False, ranks=ranks, device=device, precision=precision, return_index=True
    )
    with memory_errors(batch_size=training.batch_size, then=""), process_group(ranks, device=device), loader:
        mapping = label_map(classes, loader.classes, path=training.val, allow_subset=settings.allow_subset)
        labels = torch.tensor(mapping, device=device)
        result: dict[str, Any] = {}
        for prefix, model in models.items():
            collector = Collector(labels=labels, num_classes=len(classes))
            _to_device(model, device)
            evaluate(model, _watched(loader, ranks), add=collector.add, precision=precision)
            model.cpu()
            report = collector.sums.report(num_records=loader.num_records, all_sum=_all_sum)
            if not math.isfinite(report["val_loss"]):
                raise DivergedError(
                    f"{settings.checkpoint}: the loss is {report['val_loss']}; try --precision float32"
                )
            result |= {name if name == "val_records" else f"{prefix}{name}": report[name] for name in report}
        predictions = collector.gather(rank=ranks.rank, world_size=ranks.world_size)
        if predictions is None:
            return None
        result["weights"] = "averaged" if prefix else "plain"
        result["confusions"] = predictions.confusions(classes, limit=_NUM_CONFUSIONS)
        say(json.dumps(result) if settings.json else describe(result))
        write_outputs(settings, predictions, classes=classes, store=loader.store)
        return result


def build_models(
    content: dict[str, Any], settings: EvaluateSettings, training: TrainSettings
) -> dict[str, nn.Module]:
    """The models to evaluate, by the prefix of their figures; the averaged one is the last.

    Raises:
        StateError: the weights are not this model's, or it does not take images of this size.
    """
    model = build_model(training.arch, num_classes=len(content["classes"]), size=training.size)
    models = {} if settings.ema else {"": model}
    size = training.val_transform.size
    try:
        if settings.ema is not False and content.get("ema") is not None:
            average = average_of(model, decay=0.0)  # not updated any more
            average.load_state_dict(content["ema"])
            models["ema_"] = average.module
        model.load_state_dict(content["model"])
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, AssertionError) as cause:  # torch's and torchvision's, of several lines
        reason = " ".join(str(cause).split())[:300]
        raise StateError(
            f"{settings.checkpoint}: its {training.arch} cannot be evaluated on images of {size}x{size} pixels: "
            f"{reason}"
        ) from cause
    return models


def _to_device(model: nn.Module, device: torch.device) -> None:
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)


def _all_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, in place; a collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def _watched(loader: Loader, ranks: RankEnvironment) -> Iterator[tuple[Tensor, ...]]:
    """The loader's batches; rank 0 says from time to time how far it is."""
    begin = last = time.monotonic()
    done = 0
    for batch in loader:
        yield batch
        done += len(batch[1]) * ranks.world_size
        now = time.monotonic()
        if ranks.rank == 0 and now - last >= _PROGRESS_INTERVAL_S:
            last = now
            done = min(done, loader.num_records)
            rate = done / (now - begin)
            left_s = (loader.num_records - done) / rate
            _log.info("%d of %d records, %.0f images/s, %.0f s left", done, loader.num_records, rate, left_s)


def print_plainly(text: str) -> None:
    """Print a rank's result to stdout."""
    with os_errors("standard output", "cannot be written", StateError):
        print(text, flush=True)


def _evaluate() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no half-written file is left
    show_progress(rank=int(os.environ["RANK"]), stream=sys.stderr)
    evaluate_checkpoint(EvaluateSettings(**json.loads(sys.argv[1])), say=print_plainly)


if __name__ == "__main__":
    run_started(_evaluate)
