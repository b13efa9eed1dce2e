"""``DaliLoader``: batches from a store through a DALI pipeline, decoded on the GPU or the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import clear_frames

import numpy as np
import numpy.typing as npt
import torch

from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.bad import OnBad, nothing_decodes, substituted
from dali_lmdb.loaders.base import Batch, Loader
from dali_lmdb.loaders.dataset import ImageFolderLMDB, store_of
from dali_lmdb.loaders.external_source import InFlight, decoded_fields
from dali_lmdb.loaders.finishing import Finisher, UndecodableError
from dali_lmdb.loaders.gpu_memory import held_bytes
from dali_lmdb.loaders.graph_settings import graph_settings, log_decoding, usual_size
from dali_lmdb.loaders.in_flight import InFlightFile
from dali_lmdb.loaders.pipeline import (
    define_pipeline,
    feed_without_copy,
    release_unused_memory,
)
from dali_lmdb.loaders.prefetch import Feed, Prefetcher
from dali_lmdb.loaders.probe import may_be_a_record, raise_explained
from dali_lmdb.loaders.run import MAX_DECODED, Run
from dali_lmdb.loaders.settings import (
    DaliSettings,
    Decode,
    DecodeDevice,
    DecodeScale,
    Device,
    Dtype,
    Layout,
    LoaderSettings,
    Resize,
)
from dali_lmdb.loaders.tuned import with_tuned
from dali_lmdb.loaders.verdicts import Verdicts
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store, open_store

__all__ = ["DaliLoader"]


class DaliLoader(Loader):
    """One rank's batches of a store; ``for images, labels in loader`` is one epoch.

    The bytes go from the store's memory map to DALI without a copy. With ``device="cuda"`` nvJPEG decodes them
    (or CPU threads, see ``decode_device``), and everything after that runs on the GPU.

    Images are (n, 3, size, size) on the device, normalised, of ``dtype``; with ``layout="NHWC"`` the same
    shape on channels-last memory. ``dtype="uint8"`` gives pixels from 0 to 255, not normalised. Labels are
    int64 (n,) on the device. A batch uses the loader's memory until you drop it: ``clone()`` what you keep
    for long.

    Args:
        store: a store or its path, or an ``ImageFolderLMDB``, whose transform is not used.
        transform: ``TrainTransform`` or ``EvalTransform``.
        batch_size: images of one rank's step.
        device: ``"cuda"``: torch's current CUDA device; ``"cuda:1"``: that GPU; ``"cpu"``: no GPU needed; or a
            ``torch.device``.
        rank, world_size: by default those of the process group, if there is one when the first batch is made,
            else 0 and 1.
        seed: seed of order and augmentation, the same on every rank.
        shuffle: ``"full"`` or True (default with TrainTransform), ``"block"``, or ``"none"`` or False (default
            otherwise).
        sampler: the records of an epoch, by default every record once. Either record indices in the order to show
            them (a sequence, array or tensor; shuffled in every epoch if ``shuffle`` says so), or a PyTorch
            ``Sampler`` that gives the records of all ranks, the same on every rank (so not a
            ``DistributedSampler``). A ``Sampler`` is iterated in a thread, for the next epoch before the current
            one is over; when a state is loaded, only its class and its length are compared.
        weights: an alternative to ``sampler``: a weight for each of the N records; an epoch draws N records, with
            replacement.
        last_batch: what happens to records that do not fill a global step: ``"drop"`` (default with
            TrainTransform), ``"pad"`` from the epoch's beginning, or ``"short"`` (default otherwise): every
            record exactly once; ranks may then differ in their number of steps.
        dtype: ``"float32"``, ``"float16"`` or ``"uint8"``.
        layout: ``"NCHW"`` or ``"NHWC"``.
        on_bad: what to do when records of a batch cannot be decoded. ``"raise"``: ``RecordError`` with store,
            index, name and cause; iteration can continue with the next batch. ``"substitute"``: other records of
            the batch are shown instead, and a warning names the bad ones.
        quarantine: a file to which a JSON line is appended for each bad record.
        readahead_bytes: bytes requested from cold storage ahead of the batch that is needed next; 0 turns it off.
        num_threads: CPU threads of the pipeline, and as many again where torch resizes; by default this rank's
            share of the node's cores.
        prefetch_queue_depth: batches DALI works on ahead.
        hw_decoder_load: share of a batch offered to the GPU's hardware JPEG engine, where it has one.
        decode: ``"image"`` decodes whole images and cuts the crop windows out, which takes memory: 144 MB for a
            batch of 256 images of 500 x 375 pixels, 9 GB if they have 12 megapixels. ``"window"`` decodes inside
            the window only; on a GPU whose nvJPEG is older than 13.2 it does so without fancy upsampling of
            chroma, so that pixels differ, and with nvImageCodec 0.9 it is reported to fail or crash on some GPUs
            (nvImageCodec issue 55). ``"auto"`` is ``"window"`` where the CPU decodes and ``"image"`` on the GPU,
            unless the whole images of all batches that DALI works on would take more than a quarter of the GPU's
            memory: then it is ``"window"``, on the CPU if ``decode_device`` is not given. ``loader.graph`` says
            what was chosen.
        decode_device: ``"gpu"``, the default with ``device="cuda"``, or ``"cpu"``: CPU threads decode, and the
            windows are copied to ``device`` as uint8; for idle cores beside a busy GPU, and for images that nvJPEG
            does not decode.
        preallocation_bytes: limit of what nvJPEG's decoders preallocate, once on the GPU and once in pinned host
            memory. If images of the store's usual size would exceed it, they preallocate less and grow while they
            run.
        resize: ``"torch"``: DALI only decodes, and threads of this package do the rest with torch and numpy, which
            is faster; only with ``device="cpu"`` and the interpolations ``"linear"`` and ``"cubic"``. ``"dali"``:
            one DALI graph does everything, the same as on a GPU. ``"auto"`` is ``"torch"`` where it can be. Their
            pixels differ a little; those of ``"torch"`` are nearer to Pillow's.
        decode_scale: ``"fast"``: where a crop is at least twice as large as the output, its JPEG is decoded at
            1/2, 1/4 or 1/8 of its size by libjpeg-turbo (Pillow's ``draft``), which is much faster for photos of
            many megapixels; what it costs in pixels is in README. Only where ``resize`` is ``"torch"``.
            ``"exact"`` decodes every pixel.
        tuned: a file of ``dali-lmdb tune --save``, whose values replace those of ``num_threads``,
            ``prefetch_queue_depth``, ``readahead_bytes``, ``decode_device`` and ``hw_decoder_load`` that are left
            at their defaults.
        return_index: yield ``(images, labels, records)``, with record indices int64 (n,) on the CPU.
        in_flight_file: a file that tells, after a decoder has killed this process, which records it was decoding:
            for ``read_left_over`` and ``find_crashing``. Removed by ``close``.

    Raises:
        StoreError: the store cannot be opened.
        StateError: ``tuned`` is no such file.
        DeviceError: ``device="cuda"`` without a usable GPU; while iterating, DALI runs out of memory, or fails in
            another way that no record caused and that has a remedy.
        ValueError: an argument is out of range, or the store has too few records for one step.
    """

    def __init__(
        self,
        store: Store | ImageFolderLMDB | str | os.PathLike[str],
        *,
        transform: Transform,
        batch_size: int,
        device: Device | str | torch.device = "cuda",
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: Shuffle | bool | None = None,
        sampler: Iterable[int] | None = None,
        weights: Sequence[float] | npt.NDArray[np.float64] | None = None,
        last_batch: LastBatch | None = None,
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        on_bad: OnBad = "raise",
        quarantine: str | os.PathLike[str] | None = None,
        readahead_bytes: int = DaliSettings.readahead_bytes,
        num_threads: int | None = None,
        prefetch_queue_depth: int = DaliSettings.prefetch_queue_depth,
        hw_decoder_load: float = DaliSettings.hw_decoder_load,
        decode: Decode = "auto",
        decode_device: DecodeDevice | None = None,
        preallocation_bytes: int = DaliSettings.preallocation_bytes,
        resize: Resize = DaliSettings.resize,
        decode_scale: DecodeScale = DaliSettings.decode_scale,
        tuned: str | os.PathLike[str] | None = None,
        return_index: bool = False,
        in_flight_file: str | os.PathLike[str] | None = None,
    ) -> None:
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
        dali = DaliSettings(
            readahead_bytes=readahead_bytes,
            num_threads=num_threads,
            prefetch_queue_depth=prefetch_queue_depth,
            hw_decoder_load=hw_decoder_load,
            decode=decode,
            decode_device=decode_device,
            preallocation_bytes=preallocation_bytes,
            resize=resize,
            decode_scale=decode_scale,
        )
        if tuned is not None:
            dali = with_tuned(dali, tuned)
        if settings.device == "cpu" and dali.decode_device == "gpu":
            raise ValueError("decode_device is 'gpu' with device 'cpu', expected 'cpu' or None")
        store = store_of(store, open_path=open_store)
        super().__init__(store, settings)
        usual = usual_size(store)
        self.graph = graph_settings(settings, dali, usual)
        self.gpu_memory_bytes = held_bytes(self.graph, pixels=usual.pixels)
        if settings.device == "cuda" and self.planner.steps.rank == 0:
            log_decoding(store, dali, self.graph)
        self._verdicts = Verdicts(store, self.graph)
        # The prefetcher's thread must not keep the loader alive, so that one dropped without close() is freed.
        self._make_feed = partial(
            feed_without_copy,
            planner=self.planner,
            refused=self._verdicts.refused,
            resize=self.graph.resize,
            decode_scale=self.graph.decode_scale,
        )
        self._in_flight_path = None if in_flight_file is None else Path(in_flight_file)
        self._in_flight: InFlightFile | None = None  # made with the first batch: until then it tells of a dead one
        self._readahead_bytes = dali.readahead_bytes
        self._prefetcher: Prefetcher | None = None  # the newest one; its run closes it
        self._late_bytes_before = 0  # sum over earlier prefetchers
        self._run: Run | None = None
        self._run_begins_at: tuple[int, int] | None = None
        # nvImageCodec fixes the hardware engine's number of images at a pipeline's first batch: pad a short one.
        self._pad_first_batch = self.graph.decode_device == "gpu" and self.graph.hw_decoder_load > 0

    def _batch_at(self, epoch: int, position: int) -> Batch:
        self._verdicts.forget_before(epoch)
        # Taken out until the step is complete, so that an exception in the middle of it cannot leave a pipeline
        # whose place is unknown.
        run, self._run = self._run, None
        try:
            if run is not None and run.next_place != (epoch, position):
                run = run.continue_at(epoch, position, self._new_prefetcher(epoch, position))
            while True:
                if run is None:
                    run = self._new_run(epoch, position)
                try:
                    batch, (images, labels) = run.next(self._prepare)
                    break
                except UndecodableError as error:
                    run.stop()
                    self._report(error.plan, self._verdicts.note(error))
                    run = None
                except RuntimeError as error:
                    run.stop()
                    self._recover(error, run)
                    run = None
        except BaseException as error:
            if run is not None:
                run.stop()
            if isinstance(error, MemoryError):
                raise_explained(error)
            # A kept traceback would keep the pipeline alive, and collecting it in a forked worker, where the
            # threads that it waits for do not exist, hangs.
            clear_frames(error.__traceback__)
            raise
        assert (batch.plan.epoch, batch.plan.start) == (epoch, position)
        run.next_place = self.planner.place_after(batch.plan)
        self._run = run
        self.bad.num_substituted += batch.num_substituted
        unpadded = slice(len(batch.plan.records))  # a run's first batch may be padded, see _prepare
        images = images[unpadded]
        if self.settings.layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        records = torch.tensor(batch.plan.records)  # a copy: the user may change it
        num_bytes = int(self.store.gather("num_bytes", batch.plan.records).sum(dtype=np.int64))
        return Batch(images, labels[unpadded], records, batch.plan.end, num_bytes)

    def _new_run(self, epoch: int, position: int) -> Run:
        self._run_begins_at = epoch, position
        define = partial(define_pipeline, settings=self.graph)
        try:
            return Run(
                self._new_prefetcher(epoch, position),
                define,
                next_place=(epoch, position),
                num_inputs=len(decoded_fields(self.graph.transform, resize=self.graph.resize)),
                finisher=self._new_finisher(),
                on_change=None if self._in_flight is None else self._in_flight.set_given,
            )
        except RuntimeError as error:
            raise_explained(error)

    def _new_finisher(self) -> Finisher | None:
        if self.graph.resize == "dali":
            return None
        return Finisher(
            self.planner, dtype=self.graph.dtype, layout=self.graph.layout, num_threads=self.graph.num_threads
        )

    def _new_prefetcher(self, epoch: int, position: int) -> Prefetcher:
        self._late_bytes_before += _late_bytes(self._prefetcher)
        if self._in_flight is None and self._in_flight_path is not None:
            self._in_flight = InFlightFile(
                self._in_flight_path,
                fingerprint=self.store.fingerprint,
                batch_size=self.graph.batch_size,
                num_batches=self.graph.prefetch_queue_depth + MAX_DECODED,
            )
        make_feed = self._make_feed if self._in_flight is None else self._in_flight.noting(self._make_feed)
        self._prefetcher = Prefetcher(
            self.planner, make_feed, epoch=epoch, start=position, readahead_bytes=self._readahead_bytes
        )
        return self._prefetcher

    def _recover(self, error: RuntimeError, run: Run) -> None:
        """Find the bad records of a failed batch; return if it can be repeated with substitutes, else raise."""
        error.__traceback__ = None  # it holds the pipeline, and a kept RecordError holds this error
        if not run.in_flight or not may_be_a_record(error):  # empty if the prefetcher raised it
            raise_explained(error)
        batch = run.in_flight[0]
        plan = batch.plan
        try:
            failed = self._verdicts.causes(plan, batch.feed, plan.records.tolist(), failed_before=False)
        except RuntimeError as other:
            raise_explained(other)
        if not failed:
            raise error  # every record can be decoded outside the batch: the cause lies elsewhere
        self._report(plan, failed)

    def _report(self, plan: BatchPlan, failed: Mapping[int, str]) -> None:
        """Report bad records of a batch; return if it can be repeated with substitutes, else raise."""
        try:
            self.bad.report(failed)
            if (
                substituted(plan, self._verdicts.of_epoch(plan.epoch), following=self.planner.following(plan))
                is None
            ):
                raise nothing_decodes(self.store)
        except RecordError as bad:
            bad.end = plan.end
            raise

    def _prepare(self, plan: BatchPlan, feed: Feed) -> InFlight:
        """A batch as DALI gets it: with substitutes, and padded with its own records if it must be full."""
        batch, size = self._with_substitutes(plan, feed), self.graph.batch_size
        is_first = (plan.epoch, plan.start) == self._run_begins_at
        if not (self._pad_first_batch and is_first and len(plan.records) < size):
            return batch
        padded = replace(batch.plan, records=np.resize(batch.plan.records, size))
        return batch._replace(feed=self._make_feed(padded))

    def _with_substitutes(self, plan: BatchPlan, feed: Feed) -> InFlight:
        """Substitute records that are known to fail before DALI gets the batch, so that the pipeline survives."""
        planned = InFlight(plan, feed, num_substituted=0)
        if not (self.bad.met or self._verdicts.refused) or self.bad.on_bad == "raise":
            return planned
        shown, failed = planned, dict[int, str]()
        while True:
            records = shown.plan.records.tolist()
            suspects = [record for record in records if record in self.bad.met or record in self._verdicts.refused]
            try:
                found = self._verdicts.causes(shown.plan, shown.feed, suspects, failed_before=True)
            except RuntimeError:
                if shown is not planned:
                    raise
                # DALI lacks memory, say. If the batch fails, `_recover` probes its records without the pipeline.
                return planned
            if not found:
                return shown
            self.bad.report(found)  # refused ones may be new
            failed |= found
            replaced = substituted(plan, failed, following=self.planner.following(plan))
            if replaced is None:  # `_recover` raises that error when the batch is needed
                return planned
            shown = InFlight(replaced, self._make_feed(replaced), int((replaced.records != plan.records).sum()))

    def refuse(self, causes: Mapping[int, str]) -> None:
        """Treat records as bad from the next batch on, without ever decoding them.

        Args:
            causes: why, by record index; for ``bad_records`` and messages.
        """
        self._verdicts.refused.update(causes)

    def find_crashing(self, batches: Iterable[tuple[int, Sequence[int]]]) -> dict[int, str]:
        """Decode, in a process of its own, what an earlier process was decoding when a signal killed it.

        Args:
            batches: epoch, on which the crops depend, and record indices; as ``read_left_over`` gives them.

        Returns:
            The causes of records that crash the decoder, or keep it busy for too long, by index; for ``refuse``.

        Raises:
            DeviceError: not even a blank image can be decoded.
        """
        found: dict[int, str] = {}
        for epoch, wanted in batches:
            records = {record for record in wanted if 0 <= record < len(self.store)} - found.keys()
            if not records:
                continue
            try:
                found |= self._verdicts.crashing(sorted(records), epoch=epoch, planner=self.planner)
            except RuntimeError as error:
                raise_explained(error)
        return found

    def stats(self) -> dict[str, float]:
        return super().stats() | {"late_bytes": self._late_bytes_before + _late_bytes(self._prefetcher)}

    def _queue_fill(self) -> int:
        return self._run.fill if self._run is not None else 0

    def release_memory(self) -> None:
        """Release the threads and the pipeline with its GPU memory; the next batch creates new ones."""
        run, self._run = self._run, None
        if run is not None:
            run.close()
        self._verdicts.close()
        if self.graph.device == "cuda":
            release_unused_memory()

    def close(self) -> None:
        """Release the threads and the pipeline with its GPU memory, then the store's memory map."""
        super().close()
        self.release_memory()
        if self._in_flight is not None:
            self._in_flight.remove()


def _late_bytes(prefetcher: Prefetcher | None) -> int:
    return prefetcher.readahead.bytes_read if prefetcher is not None and prefetcher.readahead is not None else 0
