"""What a checkpoint's model predicts for two versions of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dali_lmdb.evaluate.rank import build_models
from dali_lmdb.evaluate.settings import EvaluateSettings, label_map, load, settings_of
from dali_lmdb.loaders.normalize import Normalize
from dali_lmdb.store import Store
from dali_lmdb.train.distributed import find_device
from dali_lmdb.train.precision import arrange, autocast, choose_precision
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.view.delivery import Pixels

__all__ = ["Predictor", "Top1"]

_BATCH_SIZE = 32


class Top1(NamedTuple):
    """The figures of a ``Predictor``."""

    left: float
    """top-1 of the one version of the images, in percent."""
    right: float
    num_different: int
    """Records for which the predictions differ."""


class Predictor:
    """A checkpoint's model, with averaged weights if it has them.

    Args:
        given: fields of ``EvaluateSettings`` that are not as in the checkpoint's run.

    Attributes:
        settings: those of the model and its images.

    Raises:
        StateError: the checkpoint cannot be read, or the model does not take images of this size.
        ValueError: the store has classes that the checkpoint does not know.
    """

    def __init__(self, checkpoint: str, store: Store, **given: Any) -> None:
        evaluate = EvaluateSettings(checkpoint=checkpoint, val=str(store.path), **given)
        content = load(checkpoint)
        self.settings: TrainSettings = settings_of(content, evaluate)
        mapping = label_map(content["classes"], store.classes, path=str(store.path), allow_subset=True)
        self._device = find_device("auto", local_rank=0, ranks_per_node=1)
        self._precision = choose_precision(self.settings.precision, device=self._device)
        self._labels = torch.tensor(mapping)[torch.from_numpy(store.labels.astype("int64"))]
        self._model: nn.Module = list(build_models(content, evaluate, self.settings).values())[-1]
        self._model.to(self._device).eval()
        transform = self.settings.val_transform
        self._normalize = Normalize(transform.mean, transform.std, device=self._device)
        self._waiting: list[tuple[int, Pixels, Pixels]] = []
        self._num = self._right_left = self._right_right = self._num_different = 0

    def add(self, record: int, left: Pixels, right: Pixels) -> None:
        """Predict a record's class from both versions of its image."""
        self._waiting.append((record, left, right))
        if len(self._waiting) == _BATCH_SIZE:
            self._predict()

    def top1(self) -> Top1:
        """The figures of all that was added."""
        self._predict()
        num = max(1, self._num)
        return Top1(100 * self._right_left / num, 100 * self._right_right / num, self._num_different)

    def _predict(self) -> None:
        if not self._waiting:
            return
        records, lefts, rights = zip(*self._waiting, strict=True)
        self._waiting = []
        labels = self._labels[list(records)]
        left, right = self._classes(lefts), self._classes(rights)
        self._num += len(records)
        self._right_left += int((left == labels).sum())
        self._right_right += int((right == labels).sum())
        self._num_different += int((left != right).sum())

    @torch.inference_mode()
    def _classes(self, images: Sequence[Pixels]) -> Tensor:
        batch = torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2)
        batch = self._normalize(batch.to(self._device))
        with autocast(self._device, self._precision):
            predicted: Tensor = self._model(arrange(batch)).argmax(dim=1).cpu()
        return predicted
