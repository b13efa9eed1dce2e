"""Handlers of a probe's process that note what they do, or fail or crash; ``PLANTED`` names a file of theirs."""

import os
import signal
from pathlib import Path

import numpy as np

from dali_lmdb.loaders import probe

CRASHING = 5
"""The label of records that crash the planted decoder."""

build_pipeline, pillow_cause = probe.build_pipeline, probe._pillow_cause

NO_MEMORY = RuntimeError(
    "Error in MIXED operator `nvidia.dali.fn.decoders.image`,\nencountered:\n\nCan't allocate 1073741824 bytes on "
    "device 0.\nCurrent pipeline object is no longer valid."
)


def _note(line):
    with Path(os.environ["PLANTED"]).open("a") as file:
        file.write(f"{line}\n")


def noting(ways):
    """Notes the batch size of each pipeline."""

    def build(source, settings):
        _note(settings.batch_size)
        return build_pipeline(source, settings)

    probe.build_pipeline = build
    return probe.decoder(ways)


def once_without_memory(ways):
    """Has no memory for its first pipeline."""

    def build(source, settings):
        if not Path(os.environ["PLANTED"]).exists():
            _note("failed")
            raise NO_MEMORY
        return build_pipeline(source, settings)

    probe.build_pipeline = build
    return probe.decoder(ways)


def without_memory(ways):
    """Never has memory."""

    def build(source, settings):
        raise NO_MEMORY

    probe.build_pipeline = build
    return probe.decoder(ways)


def crashing(ways):
    """Crashes when it gets the record with the label ``CRASHING``; notes the labels that it gets."""

    def build(source, settings):
        def crash(info):
            encoded, labels, *_ = feed = source(info)
            _note(labels.tolist())
            if any(label == CRASHING and len(data) for label, data in zip(labels, encoded, strict=True)):
                os.kill(os.getpid(), signal.SIGSEGV)
            return feed

        return build_pipeline(crash, settings)

    probe.build_pipeline = build
    return probe.decoder(ways)


def killed(ways):
    """Is killed as by the kernel where memory is short."""

    def build(source, settings):
        os.kill(os.getpid(), signal.SIGKILL)

    probe.build_pipeline = build
    return probe.decoder(ways)


def crashing_together(ways):
    """Crashes on any batch of 32 records or more that holds a file of fewer than 60 bytes."""

    def build(source, settings):
        def crash(info):
            encoded, *_ = feed = source(info)
            if len(encoded) >= 32 and any(len(data) < 60 for data in encoded):
                os.kill(os.getpid(), signal.SIGSEGV)
            return feed

        return build_pipeline(crash, settings)

    probe.build_pipeline = build
    return probe.decoder(ways)


def crashing_in_pillow(ways):
    """Crashes when Pillow gets text."""

    def cause(item, begin, row):
        begin(row)
        if np.frombuffer(item.data, np.uint8)[:3].tobytes() == b"Not":
            os.kill(os.getpid(), signal.SIGABRT)
        return pillow_cause(item, begin, row)

    probe._pillow_cause = cause
    return probe.decoder(ways)
