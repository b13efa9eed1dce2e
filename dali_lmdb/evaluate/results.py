"""What a model predicts for the records of a store, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from dali_lmdb.errors import one_line
from dali_lmdb.train.metrics import EvaluationSums, loss_text

__all__ = ["Collector", "Predictions", "describe"]


class Predictions(NamedTuple):
    """Predictions, one row a record, in the order of records."""

    records: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]
    """The most probable labels, five or as many as there are classes; the most probable first."""
    probabilities: npt.NDArray[np.float32]

    def per_class(self, num_classes: int) -> tuple[list[int], list[int], list[int]]:
        """Number of records of each class, and of those right in the first place and in the first five."""
        hits = self.top == self.labels[:, None]
        every, first, five = (
            np.bincount(labels, minlength=num_classes).tolist()
            for labels in (self.labels, self.labels[hits[:, 0]], self.labels[hits.any(axis=1)])
        )
        return every, first, five

    def confusions(self, classes: Sequence[str], *, limit: int) -> list[dict[str, Any]]:
        """The most frequent mistakes: class, the class taken for it, and how often."""
        wrong = self.top[:, 0] != self.labels
        pairs, counts = np.unique(self.labels[wrong] * len(classes) + self.top[wrong, 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        return [
            {"label": classes[pair // len(classes)], "predicted": classes[pair % len(classes)], "count": count}
            for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
        ]

    def worst(self, *, limit: int) -> npt.NDArray[np.int64]:
        """Rows of the most confident mistakes."""
        wrong = np.flatnonzero(self.top[:, 0] != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong, 0], kind="stable")[:limit]]


class Collector:
    """One rank's predictions, batch by batch.

    Args:
        labels: the model's label for each of the loader's; int64, on the model's device.

    Attributes:
        sums: the figures of the same batches.
    """

    def __init__(self, *, labels: Tensor, num_classes: int) -> None:
        self.sums = EvaluationSums(num_classes=num_classes, device=labels.device)
        self._labels = labels
        self._k = min(5, num_classes)
        self._batches: list[list[Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor, records: Tensor) -> None:
        """Add a batch: logits of shape (batch, classes), labels and records of shape (batch,)."""
        labels = self._labels[labels]
        self.sums.add(logits, labels)
        logits = logits.float()
        # Of the logits, as the sums do it: different ones may have the same probability.
        top = logits.topk(self._k, dim=1).indices
        probabilities = logits.softmax(dim=1).gather(1, top)
        self._batches.append([part.cpu() for part in (records, labels, top, probabilities)])

    def gather(self, *, rank: int, world_size: int) -> Predictions | None:
        """The predictions of all ranks on rank 0, None on the others; a collective."""
        empty = [torch.empty(0, dtype=torch.long)] * 2
        empty += [torch.empty(0, self._k, dtype=torch.long), torch.empty(0, self._k)]
        own = [torch.cat(parts).numpy() for parts in zip(empty, *self._batches, strict=True)]
        every: list[Any] = [own]
        if world_size > 1:
            every = [None] * world_size
            dist.gather_object(own, every if rank == 0 else None)
        if rank != 0:
            return None
        columns = [np.concatenate(parts) for parts in zip(*every, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return Predictions(*(column[order] for column in columns))


def describe(result: Mapping[str, Any]) -> str:
    """The result of an evaluation as lines for people."""
    lines = []
    for prefix, name in (("", "plain"), ("ema_", "averaged")):
        if f"{prefix}val_top1" in result:
            top1, top5, loss = (result[f"{prefix}val_{kind}"] for kind in ("top1", "top5", "loss"))
            lines.append(
                f"{name} weights: top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss_text(loss)}  "
                f"{result['val_records']} records"
            )
    if result["confusions"]:
        lines.append(f"most frequent confusions of the {result['weights']} weights:")
    for confusion in result["confusions"]:
        lines.append(
            one_line(f"  {confusion['count']} of {confusion['label']} taken for {confusion['predicted']}")
        )
    return "\n".join(lines)
