"""The classic CPU path: ``ImageFolderLMDB`` for a ``DataLoader``, and ``TorchLoader`` over it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Listener
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from dali_lmdb.errors import DaliLmdbError, RecordError
from dali_lmdb.loaders.bad import OnBad, nothing_decodes, substituted
from dali_lmdb.loaders.base import Batch, Loader
from dali_lmdb.loaders.folder import FolderStore, is_image_folder
from dali_lmdb.loaders.pillow import pixel_limits
from dali_lmdb.loaders.settings import Device, Dtype, Layout, LoaderSettings, default_num_threads
from dali_lmdb.plan.augment import Augmentation, TrainTransform, Transform
from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store, open_store
from dali_lmdb.store.images import BadImageError, crop, open_image, to_rgb

__all__ = ["ImageFolderLMDB", "TorchLoader"]


class ImageFolderLMDB(Dataset[tuple[Any, Any]]):
    """A map-style data set over a store; takes the place of torchvision's ``ImageFolder``.

    Items are ``(image, label)``: a Pillow RGB image and an int, each after its transform; pixel for pixel
    what ``ImageFolder`` gives for the same files. Any process may use it, forked or spawned, before or
    after its parent has; it pickles as a path.

    Args:
        path: a store.
        transform: called with the Pillow image.
        target_transform: called with the label.

    Attributes:
        classes: class names, sorted.
        class_to_idx: class name to label.
        targets: label of every record, a list of ints.
        samples, imgs: (name, label) of every record, as a list.

    Raises:
        StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.store = open_store(path)
        self.transform = transform
        self.target_transform = target_transform
        self.classes = list(self.store.classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}

    @property
    def targets(self) -> list[int]:
        return [int(label) for label in self.store.labels]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(name, label) of every record; ``ImageFolder`` has paths instead of names. Read again each time."""
        return [(self.store.name(index), label) for index, label in enumerate(self.targets)]

    imgs = samples

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """``(image, label)`` of a record; negative indices count from the end.

        Raises:
            IndexError: no such record.
            RecordError: its bytes are not an image that Pillow decodes.
        """
        if index < 0:
            index += len(self)
        raw, (limit,) = self.store.read(index), pixel_limits(self.store, np.array([index]))
        try:
            image: Any = to_rgb(open_image(raw, max_pixels=limit))
        except BadImageError as error:
            raise RecordError(
                f"{self.store.where(index)}: not an image that Pillow decodes: {error}; convert again without it "
                "(--on-bad skip --check decode)"
            ) from error
        label: Any = int(self.store.gather("label", np.array([index]))[0])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.store.path)!r}, {len(self)} records)"


_INTERPOLATIONS = {
    "nearest": F.InterpolationMode.NEAREST,
    "linear": F.InterpolationMode.BILINEAR,
    "cubic": F.InterpolationMode.BICUBIC,
    "lanczos": F.InterpolationMode.LANCZOS,
}


class _Decoded(NamedTuple):
    """A planned batch, decoded by a worker."""

    images: torch.Tensor | None
    """None if the batch failed."""
    labels: torch.Tensor
    """Empty if ``error`` is set."""
    records: torch.Tensor
    failed: dict[int, str]
    """Causes by record index, in the batch's order."""
    num_bytes: int
    """Size of the files that were read."""
    error: DaliLmdbError | None
    """Why the batch failed, if not for ``failed`` alone. A value, since a ``DataLoader`` replaces the message of
    what a worker raises by a traceback."""


class _PlannedImages(Dataset[_Decoded]):
    """Runs in the workers: a planned batch in, images and labels out.

    It is pickled for each worker (with the start methods ``spawn`` and ``forkserver``), so it holds nothing of the
    sampler, which belongs to the parent process.
    """

    def __init__(self, planner: Planner, dtype: Dtype, layout: Layout, on_bad: OnBad) -> None:
        self.store, self.transform, self.seed = planner.store, planner.transform, planner.seed
        self.dtype, self.layout, self.on_bad = dtype, layout, on_bad

    def __getitem__(self, plan: BatchPlan) -> _Decoded:
        return self.decode(plan, following=())

    def decode(self, plan: BatchPlan, *, following: Iterable[int]) -> _Decoded:
        """Decode a batch; ``following`` are records to substitute if all of its own fail."""
        images, failed = dict[int, torch.Tensor](), dict[int, str]()
        shown, error, num_bytes = plan, None, 0
        try:
            while True:
                found, causes, read_bytes = self._images(
                    plan.epoch, [r for r in shown.records.tolist() if r not in images]
                )
                images |= found
                failed |= causes
                num_bytes += read_bytes
                if not causes or self.on_bad == "raise":
                    break
                replaced = substituted(plan, failed, following=following)
                if replaced is None:
                    break
                shown = replaced
            labels = torch.from_numpy(self.store.gather("label", shown.records).astype(np.int64))
        except DaliLmdbError as raised:
            error, labels = raised, torch.empty(0, dtype=torch.int64)
        records = torch.from_numpy(shown.records)
        if error is not None or not images.keys() >= set(shown.records.tolist()):
            return _Decoded(None, labels, records, failed, num_bytes, error)
        stacked = torch.stack([images[record] for record in shown.records.tolist()])
        if self.layout == "NHWC":
            stacked = stacked.contiguous(memory_format=torch.channels_last)
        return _Decoded(stacked, labels, records, failed, num_bytes, error)

    def _images(self, epoch: int, wanted: list[int]) -> tuple[dict[int, torch.Tensor], dict[int, str], int]:
        """Decode records: (images by record index, causes of failures in the order requested, bytes read)."""
        store, transform = self.store, self.transform
        images, failed, files = dict[int, torch.Tensor](), dict[int, str](), dict[int, Image.Image]()
        num_bytes = 0
        for record, limit in zip(wanted, pixel_limits(store, np.array(wanted, dtype=np.int64)), strict=True):
            try:
                raw = store.read(record)
                num_bytes += len(raw)
                files[record] = open_image(raw, max_pixels=limit)
            except (BadImageError, RecordError) as error:
                failed[record] = str(error)
        # Opening reads the header only: the sizes, which an image folder has no index of.
        records = np.array(list(files), dtype=np.int64)
        widths, heights = np.array([file.size for file in files.values()], dtype=np.int32).reshape(-1, 2).T
        augmentation = transform.augment(records, heights, widths, seed=self.seed, epoch=epoch)
        for position, (record, file) in enumerate(files.items()):
            try:
                image = to_rgb(file)
            except BadImageError as error:
                failed[record] = str(error)
            else:
                cropped = _crop(image, transform, augmentation, position)
                images[record] = self._to_tensor(cropped, augmentation, position)
        return images, {record: failed[record] for record in wanted if record in failed}, num_bytes

    def _to_tensor(self, image: Image.Image, augmentation: Augmentation, position: int) -> torch.Tensor:
        transform = self.transform
        if self.dtype == "uint8":
            tensor = F.pil_to_tensor(image)
            erased = (255 * torch.tensor(transform.mean)).round().to(torch.uint8)
        else:
            tensor = F.normalize(F.to_tensor(image), list(transform.mean), list(transform.std))
            erased = torch.zeros(3)
        if transform.erases:
            top, left = augmentation.erase_anchor[position].astype(int).tolist()
            height, width = augmentation.erase_shape[position].astype(int).tolist()
            tensor[:, top : top + height, left : left + width] = erased[:, None, None]
        return tensor.half() if self.dtype == "float16" else tensor


def _crop(image: Any, transform: Transform, augmentation: Augmentation, position: int) -> Image.Image:
    """Apply one image's crop, flip and colour, with torchvision's functions where it has them."""
    size = augmentation.size[position].astype(int).tolist()
    interpolation = _INTERPOLATIONS[transform.interpolation]
    if not isinstance(transform, TrainTransform):
        return F.center_crop(F.resize(image, transform.resize, interpolation), size)
    top, left = augmentation.anchors[position].tolist()
    height, width = augmentation.shapes[position].tolist()
    image = F.resize(crop(image, top=top, left=left, height=height, width=width), size, interpolation)
    if transform.changes_color:
        image = _twist_color(image, augmentation, position)
    return F.hflip(image) if augmentation.mirror[position] else image


# From RGB to YIQ, NTSC 1953, rounded as in DALI's color_twist (color_twist.h, Rgb2Yiq).
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def _twist_color(image: Image.Image, augmentation: Augmentation, position: int) -> Image.Image:
    """DALI's color_twist: saturation and hue in YIQ, contrast about 128, then brightness."""
    angle = np.deg2rad(augmentation.hue[position])
    saturation, contrast = augmentation.saturation[position], augmentation.contrast[position]
    brightness = augmentation.brightness[position]
    cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    matrix = brightness * contrast * (_YIQ_TO_RGB @ turn @ _RGB_TO_YIQ)
    pixels = np.asarray(image, dtype=np.float32) @ matrix.T.astype(np.float32)
    pixels += brightness * 128 * (1 - contrast)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


class _Steps:
    """The sampler of a ``DataLoader``: planned batches, remembered until they come back decoded.

    Attributes:
        in_flight: plans of batches that have not come back yet, in order.
        error: an error in planning, to be raised after the last good batch.
    """

    def __init__(self) -> None:
        self.begin(iter(()))

    def begin(self, plans: Iterator[BatchPlan]) -> None:
        """Give these plans next."""
        self._plans = plans
        self.in_flight: deque[BatchPlan] = deque()
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[BatchPlan]:
        try:
            for plan in self._plans:
                self.in_flight.append(plan)
                yield plan
        except Exception as error:
            self.error = error


class _Run:
    """Workers, and the planned batches that they decode ahead, within one epoch."""

    def __init__(self, images: _PlannedImages, *, num_workers: int, pin_memory: bool) -> None:
        self.steps = _Steps()
        self._loader: DataLoader[_Decoded] = DataLoader(
            images,
            batch_size=None,
            sampler=self.steps,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
        )
        self._decoded: Iterator[Any] = iter(())
        self._next_place: tuple[int, int] | None = None

    def seek(self, planner: Planner, epoch: int, position: int) -> None:
        """Make the step at a place the next one."""
        if self._next_place != (epoch, position):
            self.steps.begin(planner.plans(epoch, position))
            self._decoded = iter(self._loader)

    def next(self) -> tuple[BatchPlan, _Decoded]:
        """The next planned batch, decoded."""
        try:
            decoded = next(self._decoded)
        except StopIteration:  # an iterator may not raise it in the middle of an epoch
            raise self.steps.error or RuntimeError("the DataLoader ended, though the epoch did not") from None
        plan = self.steps.in_flight.popleft()
        self._next_place = (plan.epoch, plan.end)
        return plan, decoded

    def close(self) -> None:
        """Stop the workers. Dropping the iterator would do, if nothing else held it; a traceback, for one, may."""
        stop = getattr(self._decoded, "_shutdown_workers", None)
        if stop is not None:
            stop()


class TorchLoader(Loader):
    """The interface, order, crops and flips of ``DaliLoader``, decoded by Pillow in ``DataLoader`` workers.

    Args:
        data: a store, its path, or an image folder with one folder for each class.
        num_workers: worker processes; 0 decodes in the calling process; by default the cores shared by the
            node's ranks.
        device: where images and labels are moved to, ``"cpu"`` or ``"cuda"``.
        transform, batch_size, rank, world_size, seed, shuffle, sampler, weights, last_batch, dtype, layout,
            on_bad, quarantine, return_index: as ``DaliLoader``.

    Raises:
        StoreError, SourceError: the data cannot be opened.
        DeviceError: ``device="cuda"`` without a usable GPU.
        ValueError: an argument is out of range, there are too few records for one step, or worker processes cannot
            make sockets in ``TMPDIR``.
    """

    def __init__(
        self,
        data: Store | str | os.PathLike[str],
        *,
        transform: Transform,
        batch_size: int,
        device: Device = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: Shuffle | None = None,
        sampler: Iterable[int] | None = None,
        weights: Sequence[float] | npt.NDArray[np.float64] | None = None,
        last_batch: LastBatch | None = None,
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        on_bad: OnBad = "raise",
        quarantine: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
        return_index: bool = False,
    ) -> None:
        store = data if isinstance(data, Store) else open_data(data)
        settings = LoaderSettings(
            transform=transform,
            batch_size=batch_size,
            device=device,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            sampler=sampler,
            weights=weights,
            last_batch=last_batch,
            dtype=dtype,
            layout=layout,
            on_bad=on_bad,
            quarantine=quarantine,
            return_index=return_index,
        )
        super().__init__(store, settings)
        self.device = torch.device(device)
        self._num_workers = default_num_threads() if num_workers is None else num_workers
        if self._num_workers:
            _check_temporary_folder()
        self._planned_images = _PlannedImages(self.planner, dtype, layout, on_bad)
        self._run: _Run | None = None

    def _batch_at(self, epoch: int, position: int) -> Batch:
        # Put back when the step is complete: after an exception in the middle of it there are no workers whose
        # place is unknown.
        run, self._run = self._run, None
        if run is None:
            run = _Run(self._planned_images, num_workers=self._num_workers, pin_memory=self.device.type == "cuda")
        try:
            run.seek(self.planner, epoch, position)
            plan, decoded = run.next()
        except BaseException:
            run.close()
            raise
        assert (plan.epoch, plan.start) == (epoch, position)
        self._run = run
        if decoded.images is None and self.bad.on_bad == "substitute":  # only the parent knows what follows
            decoded = self._planned_images.decode(plan, following=self.planner.following(plan))
        try:
            self.bad.report(decoded.failed)
            if decoded.images is None:
                raise decoded.error or nothing_decodes(self.store)
        except RecordError as error:
            error.end = plan.end
            raise
        self.bad.num_substituted += int((decoded.records.numpy() != plan.records).sum())
        images = decoded.images.to(self.device, non_blocking=True)
        labels = decoded.labels.to(self.device, non_blocking=True)
        return Batch(images, labels, decoded.records, plan.end, decoded.num_bytes)

    def _queue_fill(self) -> int:
        return len(self._run.steps.in_flight) if self._run is not None else 0

    def close(self) -> None:
        """Stop the workers."""
        super().close()
        run, self._run = self._run, None
        if run is not None:
            run.close()


def open_data(path: str | os.PathLike[str]) -> Store:
    """A store, or an image folder read as one.

    Raises:
        StoreError, SourceError: neither can be opened.
    """
    return FolderStore(path) if is_image_folder(path) else open_store(path)


def _check_temporary_folder() -> None:
    """Make a socket as the workers do to hand over their batches; if they cannot, the parent waits forever.

    The path of a Unix socket has at most 107 bytes, and some network file systems have no sockets.
    """
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise ValueError(
            f"TMPDIR is {tempfile.gettempdir()}, where worker processes cannot make their sockets "
            f"({error.strerror or error}); set TMPDIR to a short path on a local disk, such as /tmp"
        ) from error


def _start_worker(_: int) -> None:
    """Runs in each worker."""
    sys.excepthook = _show_unless_parent_is_gone


def _show_unless_parent_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """If the parent is interrupted while it takes a batch, show no error of the thread that hands it over."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
