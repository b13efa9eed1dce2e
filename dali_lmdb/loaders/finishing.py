"""What follows decoding on the CPU: resize, colour, erase, flip and normalise, image by image in threads.

DALI's ``fn.resize`` takes five times as long on a CPU as torch's antialiased resize of uint8, which is vectorised.
Every step here works on one image, which stays in the core's cache, and releases the GIL. No step uses torch's own
threads, of which the program around us decides: torch's resize of a single uint8 image never does (with AVX2),
``torch.flip`` only from 32,768 elements on, and numpy has none.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from dali_lmdb.images.opening import BadImageError
from dali_lmdb.images.scaling import resized_part, resized_rgb
from dali_lmdb.loaders.color import color_maps
from dali_lmdb.loaders.external_source import Reduced, fields_of
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.loaders.settings import Dtype, Layout
from dali_lmdb.plan.augment import EvalTransform, Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["TORCH_INTERPOLATIONS", "Finisher", "UndecodableError", "Unfinished"]

_RESIZE: dict[str, Callable[..., torch.Tensor]] = {
    "linear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "cubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}

TORCH_INTERPOLATIONS = tuple(_RESIZE)
"""The filters that torch has for uint8."""

_ELEMENTS_WITHOUT_THREADS = 32_767  # less than at::internal::GRAIN_SIZE (ATen/TensorIterator.h)

# A central crop of a long image is a small part of it: beyond this factor, Pillow resizes that part alone.
_MOST_RESIZED = 16

_FREE_BUFFERS = 4  # more are in use only while the consumer keeps batches

Pixels = npt.NDArray[np.uint8]


class _Row(NamedTuple):
    """How one image of a batch is finished."""

    resized: tuple[int, int]
    """Height and width to resize its window to, in pixels."""
    scales: Any
    """Output pixels per input pixel along (y, x), float; None for those that follow from the sizes."""
    corner: tuple[int, int]
    """(y, x) of the output in the resized window, in pixels."""
    flip: bool
    color: tuple[npt.NDArray[np.float32], float] | None
    """Matrix and offset of ``color_maps``."""
    erased: tuple[slice, slice] | None
    """Rows and columns of the rectangle."""
    reduced: Reduced | None
    """The image, if DALI has not decoded it."""


class UndecodableError(Exception):
    """Images of a batch that were to be decoded at a fraction of their size, and cannot be.

    Args:
        plan: the batch.
        reasons: why, by row of the batch.
    """

    def __init__(self, plan: BatchPlan, reasons: dict[int, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.plan, self.reasons = plan, reasons


class Unfinished:
    """A batch on which the threads work.

    Args:
        plan: the batch.
        rows: how each image is finished.
        windows: the decoded windows, each uint8 HWC; something with ``__dlpack__``.
        out: the batch's memory, (n, 3, size, size) or (n, size, size, 3).
    """

    def __init__(
        self, plan: BatchPlan, rows: Sequence[_Row], windows: Sequence[Any], out: npt.NDArray[Any]
    ) -> None:
        self.plan, self.rows, self.windows, self.out = plan, rows, windows, out
        self.left = iter(range(len(rows)))  # shared by the threads: taking the next number is atomic
        self.bad: dict[int, str] = {}  # causes by row
        self.done = SimpleQueue[BaseException | None]()  # one item from each thread
        self.num_threads = 0

    def result(self) -> torch.Tensor:
        """The finished batch; waits for it.

        Raises:
            UndecodableError: images cannot be decoded.
            Exception: what else a thread raised.
        """
        while self.num_threads:
            error = self.done.get()
            self.num_threads -= 1
            if error is not None:
                raise error
        if self.bad:
            raise UndecodableError(self.plan, dict(sorted(self.bad.items())))
        return torch.from_numpy(self.out)


class Finisher:
    """Finishes batches of decoded windows in threads.

    A batch's memory is used again once nobody holds the tensor, nor any view of it. The threads start with the
    first batch, and end with ``close``. Like ``Prefetcher``, they share nothing with the consumer but atomic
    queues, so an interrupt cannot leave a lock held.

    Args:
        planner: of the batches.
        dtype, layout: of the output.
        num_threads: number of threads.
    """

    def __init__(self, planner: Planner, *, dtype: Dtype, layout: Layout, num_threads: int) -> None:
        self._planner, self._layout = planner, layout
        self._names = [*(field.name for field in fields_of(planner.transform)), "reduced"]
        self._memory = _Memory(np.dtype(dtype))
        self._batches = SimpleQueue[Unfinished | None]()
        stop = _Stop()
        finish = _FinishImage(planner.transform, dtype=dtype, layout=layout)
        self._threads = [
            threading.Thread(
                target=_work, args=(self._batches, finish, stop), name=f"dali_lmdb finisher {number}", daemon=True
            )
            for number in range(num_threads)
        ]
        # Ends the threads of a finisher that is dropped without close(), to which they do not refer, and before
        # the interpreter ends, which in torch's code would be a std::terminate.
        self.close = weakref.finalize(self, _close, self._batches, self._threads, stop)

    def begin(self, plan: BatchPlan, feed: Feed, windows: Sequence[Any]) -> Unfinished:
        """Let the threads finish a batch.

        Args:
            feed: the batch's inputs, of ``feed_of``.
            windows: DALI's output for it: the decoded windows, uint8 HWC.
        """
        numbers = dict(zip(self._names, feed, strict=True))
        size = self._planner.transform.size
        if "size" in numbers:
            size = int(numbers["size"][0, 0])
        rows = self._rows(plan, numbers, size)
        shape = (size, size, 3) if self._layout == "NHWC" else (3, size, size)
        batch = Unfinished(plan, rows, windows, self._memory.take((len(rows), *shape)))
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
            batch.num_threads += 1
            self._batches.put(batch)
        return batch

    def _rows(self, plan: BatchPlan, numbers: dict[str, Any], size: int) -> list[_Row]:
        n, transform = len(numbers["labels"]), self._planner.transform
        resized, corners = [(size, size)] * n, [(0, 0)] * n
        scales: list[Any] = [(None, None)] * n
        if isinstance(transform, EvalTransform):
            sizes = [self._planner.store.gather(name, plan.records) for name in ("height", "width")]
            whole, crop = transform.central_crop(*sizes)
            scale = whole / np.maximum(np.stack(sizes, axis=1), 1)
            # Whatever the scale, torch only copies a side that keeps its length: one pixel more, which is cropped.
            copied = (crop + size == numbers["shapes"]) & (scale != 1)
            resized = list(map(tuple, (crop + size + copied).tolist()))
            corners = list(map(tuple, crop.tolist()))
            scales = list(map(tuple, scale.tolist()))
        colors: list[Any] = [None] * n
        if transform.changes_color:
            names = ("hue", "saturation", "brightness", "contrast")
            matrices, offsets = color_maps(**{name: numbers[name] for name in names})
            colors = list(zip(matrices, offsets.tolist(), strict=True))
        erased: list[Any] = [None] * n
        if transform.erases:
            begins = numbers["erase_anchor"].astype(int)
            ends = begins + numbers["erase_shape"].astype(int)
            erased = [
                tuple(map(slice, begin, end)) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
            ]
        flips = numbers["mirror"].astype(bool).tolist()
        reduced = map(numbers["reduced"].get, range(n))
        return list(map(_Row, resized, scales, corners, flips, colors, erased, reduced))


class _Stop:
    """Tells the threads to leave the rest."""

    is_set = False


def _close(batches: SimpleQueue[Unfinished | None], threads: Sequence[threading.Thread], stop: _Stop) -> None:
    """End the threads, after the images that they work on."""
    stop.is_set = True
    for _ in threads:
        batches.put(None)
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()


def _work(batches: SimpleQueue[Unfinished | None], finish: _FinishImage, stop: _Stop) -> None:
    """Runs in each thread."""
    scratch = _Scratch()
    while (batch := batches.get()) is not None:
        error: BaseException | None = None
        try:
            for number in batch.left:
                if stop.is_set:
                    break
                try:
                    finish(batch.rows[number], batch.windows[number], batch.out[number], scratch)
                except BadImageError as bad:
                    batch.bad[number] = str(bad)
        except BaseException as raised:  # handed to the consumer, whatever it is
            error = raised
        batch.done.put(error)
        del batch, error  # its memory, while this thread waits


class _Scratch:
    """A thread's memory for one image."""

    def __init__(self) -> None:
        self.resize_to(0)

    def resize_to(self, size: int) -> None:
        """Hold images of a size, in pixels."""
        self.size = size
        self._pixels = np.empty(0, np.uint8)
        self.cropped = np.empty((size, size, 3), np.uint8)
        self.flipped = np.empty_like(self.cropped)
        self.planes = np.empty((2, size, size), np.float32)

    def resized(self, height: int, width: int) -> Pixels:
        """Memory for a resized window."""
        num_bytes = height * width * 3
        if len(self._pixels) < num_bytes:
            self._pixels = np.empty(num_bytes, np.uint8)
        return self._pixels[:num_bytes].reshape(height, width, 3)


class _FinishImage:
    """Finishes one image; called in several threads."""

    def __init__(self, transform: Transform, *, dtype: Dtype, layout: Layout) -> None:
        self._interpolation: Any = transform.interpolation
        self._resize = _RESIZE[transform.interpolation]
        self._erased_color = transform.erased_color
        self._dtype, self._layout = dtype, layout
        mean, std = 255 * np.array(transform.mean), 255 * np.array(transform.std)
        self._factors = [np.float32(value) for value in 1 / std]
        self._shifts = [np.float32(value) for value in -mean / std]

    def __call__(self, row: _Row, window: Any, out: npt.NDArray[Any], scratch: _Scratch) -> None:
        """Finish one image.

        Args:
            window: of DALI's output.
            out: the image in the batch.
        """
        size = out.shape[1]
        if scratch.size != size:
            scratch.resize_to(size)
        image = self._resized(row, window, scratch)
        if row.color is not None:
            _twist(image, *row.color, scratch.planes)
        if row.erased is not None:
            image[row.erased] = self._erased_color
        if row.flip:
            _flip(image, scratch.flipped)
            image = scratch.flipped
        self._write(image, out, scratch.planes[0])

    def _resized(self, row: _Row, decoded: Any, scratch: _Scratch) -> Pixels:
        """The resized window, cropped; in the thread's memory."""
        if row.reduced is not None:
            encoded, denominator, box, max_pixels = row.reduced
            image = resized_rgb(
                encoded.data,
                denominator=denominator,
                box=box,
                size=scratch.size,
                interpolation=self._interpolation,
                max_pixels=max_pixels,
            )
            np.copyto(scratch.cropped, np.asarray(image))
            return scratch.cropped
        window, size = from_dlpack(decoded.__dlpack__()), scratch.size
        height, width = row.resized
        if height * width > _MOST_RESIZED * size * size:
            (top, left), (down, across) = row.corner, row.scales
            box = left / across, top / down, (left + size) / across, (top + size) / down
            np.copyto(scratch.cropped, resized_part(window.numpy(), box, size, self._interpolation))
            return scratch.cropped
        resized = scratch.resized(height, width)
        out = torch.from_numpy(resized).permute(2, 0, 1)[None]
        self._resize(window.permute(2, 0, 1)[None], row.resized, False, *row.scales, out=out)
        if row.resized == (size, size):
            return resized
        top, left = row.corner
        np.copyto(scratch.cropped, resized[top : top + size, left : left + size])
        return scratch.cropped

    def _write(self, image: Pixels, out: npt.NDArray[Any], plane: npt.NDArray[np.float32]) -> None:
        """Normalise an image into the batch."""
        if self._layout == "NHWC" and self._dtype == "uint8":
            np.copyto(out, image)
            return
        planes = out.transpose(2, 0, 1) if self._layout == "NHWC" else out
        for channel, (factor, shift) in enumerate(zip(self._factors, self._shifts, strict=True)):
            values, target = image[..., channel], planes[channel]
            if self._dtype == "uint8":
                np.copyto(target, values)
            elif self._dtype == "float32":
                np.multiply(values, factor, out=target, dtype=np.float32)
                np.add(target, shift, out=target)
            else:
                np.multiply(values, factor, out=plane, dtype=np.float32)
                np.add(plane, shift, out=target, casting="same_kind")


def _flip(image: Pixels, out: Pixels) -> None:
    """Flip an image horizontally, a few rows at a time so that torch uses no threads."""
    # Channels-last, for which torch.flip is vectorised; numpy takes ten times as long.
    source = torch.from_numpy(image).permute(2, 0, 1)[None]
    num_rows = max(1, _ELEMENTS_WITHOUT_THREADS // (3 * image.shape[1]))
    for start in range(0, len(image), num_rows):
        rows = slice(start, start + num_rows)
        np.copyto(out[rows], torch.flip(source[:, :, rows], (3,))[0].permute(1, 2, 0).numpy())


def _twist(image: Pixels, matrix: npt.NDArray[np.float32], offset: float, planes: npt.NDArray[np.float32]) -> None:
    """Map the colours of an image in place; without a matrix product, for which BLAS would start threads."""
    total, part = planes
    channels = [image[..., channel].astype(np.float32) for channel in range(3)]
    for channel, weights in enumerate(matrix):
        np.multiply(channels[0], weights[0], out=total)
        for values, weight in zip(channels[1:], weights[1:], strict=True):
            np.multiply(values, weight, out=part)
            np.add(total, part, out=total)
        np.add(total, np.float32(offset), out=total)
        np.rint(total, out=total)
        np.clip(total, 0, 255, out=total)
        np.copyto(image[..., channel], total, casting="unsafe")


class _Memory:
    """Memory of batches, which is used again when nobody holds it any more.

    Mapping it anew for each batch would cost as much as normalising.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._lent: dict[int, tuple[weakref.ref[Any], npt.NDArray[Any]]] = {}  # by id of the reference
        self._dropped = deque[weakref.ref[Any]]()
        self._free = deque[npt.NDArray[Any]](maxlen=_FREE_BUFFERS)

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """An array of a shape, uninitialised."""
        while self._dropped:
            _, whole = self._lent.pop(id(self._dropped.popleft()))
            self._free.append(whole)
        num_elements = int(np.prod(shape))
        whole = self._a_free_one(num_elements)
        # Tensors made of the view keep it alive; when it is gone, so are they. The callback is not Python code, in
        # which an interrupt would be lost.
        view = whole[:num_elements].reshape(shape)
        reference = weakref.ref(view, self._dropped.append)
        self._lent[id(reference)] = reference, whole
        return view

    def _a_free_one(self, num_elements: int) -> npt.NDArray[Any]:
        while self._free:
            whole = self._free.pop()
            if len(whole) >= num_elements:
                return whole
        return np.empty(num_elements, self._dtype)
