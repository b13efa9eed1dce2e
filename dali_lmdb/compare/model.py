"""A model as consumer of batches: what training takes, with a loader or with one batch kept on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.train.models import build_model, training_loss

__all__ = ["Model"]


class Model:
    """Trains a torchvision model by plain SGD, on a GPU in bfloat16 or float16 as ``train`` does.

    Args:
        settings: with ``arch``, ``batch_size`` and ``device`` known.
        num_classes: the store's.
    """

    def __init__(self, settings: CompareSettings, *, num_classes: int) -> None:
        assert settings.arch is not None
        assert settings.batch_size is not None
        self._arch, self._on_gpu = settings.arch, settings.device == "cuda"
        self._device = torch.device(settings.device)
        torch.manual_seed(0)
        self._model = build_model(settings.arch, num_classes=num_classes, size=settings.size).to(self._device)
        if self._on_gpu:
            self._model = self._model.to(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = True
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        shape = (settings.batch_size, 3, settings.size, settings.size)
        images = torch.randn(shape, device=self._device, dtype=torch.float16 if self._on_gpu else torch.float32)
        if self._on_gpu:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(settings.batch_size, device=self._device) % num_classes
        self._batch = (images, labels)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield one batch without end: training on it waits for nothing."""
        while True:
            yield self._batch

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Take a training step."""
        images, labels = batch[:2]
        if self._on_gpu and images.shape[1] != 3:  # NHWC, as memory it is what channels_last is
            images = images.permute(0, 3, 1, 2)
        with torch.autocast(self._device.type, dtype=self._precision(), enabled=self._on_gpu):
            loss = training_loss(self._model(images), labels.long().flatten(), arch=self._arch)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _precision(self) -> torch.dtype:
        bfloat16 = self._on_gpu and torch.cuda.get_device_capability(self._device) >= (8, 0)
        return torch.bfloat16 if bfloat16 else torch.float16
