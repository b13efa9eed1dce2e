"""``DaliLoader``: batches from a store through a DALI pipeline, decoded on the GPU or the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_lmdb.errors import DeviceError, RecordError
from dali_lmdb.loaders.base import Batch, Dtype, Layout, Loader, default_num_threads
from dali_lmdb.loaders.pipeline import OUTPUTS, GraphSettings, build_pipeline
from dali_lmdb.loaders.source import Source
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store, open_store

__all__ = ["DaliLoader"]

# DALI's own default. Other good values were found between 0.12 and 0.75, depending on GPU and CPU threads.
_HW_DECODER_LOAD = 0.65


class DaliLoader(Loader):
    """One rank's batches of a store; ``for images, labels in loader`` is one epoch.

    The bytes go from the store's map to DALI without a copy. With ``device="cuda"`` nvJPEG decodes them
    (inside the crop's window only) and everything after runs on the GPU too.

    Images are (n, 3, size, size) on the device, normalised, of ``dtype``; with ``layout="NHWC"`` the same
    shape on channels-last memory. ``dtype="uint8"`` gives pixels from 0 to 255, not normalised. Labels are
    int64 (n,) on the device. A batch is DALI's memory until you drop it: copy what you keep.

    Args:
        store: a store or its path.
        transform: ``TrainTransform`` or ``EvalTransform``.
        batch_size: images of one rank's step.
        device: ``"cuda"``: torch's current CUDA device; ``"cpu"``: no GPU needed.
        rank, world_size: by default the process group's, if there is one, else 0 and 1.
        seed: of order and augmentation, the same on every rank.
        shuffle: ``"full"`` (default with TrainTransform), ``"block"`` or ``"none"`` (default otherwise).
        last_batch: what becomes of records that do not fill a global step: ``"drop"`` (default with
            TrainTransform), ``"pad"`` from the epoch's beginning, or ``"short"`` (default otherwise): every
            record exactly once; ranks may then differ in their number of steps.
        dtype: ``"float32"``, ``"float16"`` or ``"uint8"``.
        layout: ``"NCHW"`` or ``"NHWC"``.
        num_threads: CPU threads of the pipeline; by default the cores shared by the node's ranks.
        prefetch_queue_depth: batches DALI works on ahead.
        hw_decoder_load: share of a batch offered to the GPU's hardware JPEG engine, where it has one.
        return_index: yield ``(images, labels, records)``, with record indices int64 (n,) on the CPU.

    Raises:
        StoreError: the store cannot be opened.
        DeviceError: ``device="cuda"`` without a usable GPU.
        ValueError: an argument is out of range, or the store has too few records for one step.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        transform: Transform,
        batch_size: int,
        device: Literal["cuda", "cpu"] = "cuda",
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: Shuffle | None = None,
        last_batch: LastBatch | None = None,
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        num_threads: int | None = None,
        prefetch_queue_depth: int = 2,
        hw_decoder_load: float = _HW_DECODER_LOAD,
        return_index: bool = False,
    ) -> None:
        super().__init__(
            store if isinstance(store, Store) else open_store(store),
            transform=transform,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            last_batch=last_batch,
            dtype=dtype,
            layout=layout,
            return_index=return_index,
        )
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device is {device!r}, expected 'cuda' or 'cpu'")
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError("device 'cuda': no usable GPU found; install its driver or use device 'cpu'")
        self.settings = GraphSettings(
            transform=transform,
            batch_size=batch_size,
            device=device,
            device_id=torch.cuda.current_device() if device == "cuda" else None,
            num_threads=num_threads or default_num_threads(),
            prefetch_queue_depth=prefetch_queue_depth,
            dtype=dtype,
            layout=layout,
            hw_decoder_load=hw_decoder_load,
            height_hint=int(self.store.column("height").max(initial=0)) if device == "cuda" else 0,
            width_hint=int(self.store.column("width").max(initial=0)) if device == "cuda" else 0,
        )
        self._source = Source(self.planner)
        self._iterator: DALIGenericIterator | None = None

    def _batches(self, epoch: int, position: int) -> Iterator[Batch]:
        steps = self.planner.steps.num_steps(position)
        if steps:
            self._aim(epoch, position)
        for _ in range(steps):
            yield self._next()

    def _aim(self, epoch: int, position: int) -> None:
        """Make the step that begins at ``position`` of ``epoch`` the next one to come out."""
        in_flight = self._source.in_flight
        if in_flight and (in_flight[0][0].epoch, in_flight[0][0].start) == (epoch, position):
            return
        stale = len(in_flight)
        self._source.seek(epoch, position)
        if self._iterator is None:
            self._iterator = DALIGenericIterator(
                build_pipeline(self._source, self.settings),
                list(OUTPUTS),
                size=-1,  # short batches pass, and the source never ends
                prepare_first_batch=False,
            )
        for _ in range(stale):
            self._next()

    def _next(self) -> Batch:
        assert self._iterator is not None
        try:
            outputs = next(self._iterator)[0]
        except RuntimeError as error:
            # The pipeline has lost its place; the next epoch builds another one.
            plan, _ = self._source.in_flight[0]
            self._stop()
            first_line = str(error).strip().splitlines()[-2:]
            raise RecordError(
                f"{self.store.path}: a record of the batch {plan.records.tolist()} cannot be decoded: "
                f"{' '.join(first_line)}; find it with: dali-lmdb verify --decode {self.store.path}"
            ) from error
        plan, _ = self._source.in_flight.popleft()
        images = outputs["images"]
        if self.layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        return Batch(images, outputs["labels"], outputs["records"], plan.end)

    def _stop(self) -> None:
        self._iterator = None
        self._source.in_flight.clear()

    def close(self) -> None:
        """Free the pipeline: its threads, its GPU memory, then its hold on the store's map."""
        super().close()
        self._stop()
