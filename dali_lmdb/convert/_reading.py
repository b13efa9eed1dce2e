"""Read and validate a source's images in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple, NoReturn

from dali_lmdb.convert._journal import Row
from dali_lmdb.convert.settings import ConvertSettings
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.decoding.examiner import Examination, Examiner, Verdict
from dali_lmdb.images.header import Header, read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.images.reencoding import Change, needed_change
from dali_lmdb.store.checksum import crc32

__all__ = ["ReadImage", "examination", "read_images"]

_AHEAD_ITEMS, _AHEAD_BYTES = 2_048, 64 << 20  # read but not yet written, at most
# Limits per task; the last image may exceed the bytes. With one image a task, handing over takes longer than
# reading a warm file (10,000 of 105 kB, 2 cores: 1.7 s of CPU time, against 1.0 s in blocks).
_BLOCK_ITEMS = 31  # as many JPEGs as DALI gets at once when they are certified
_BLOCK_BYTES = 4 << 20
_SPARE_BLOCKS = 2  # ready for the writer, or for a thread that is done


class ReadImage(NamedTuple):
    """An image that was read and validated; ``row`` says whether it is stored."""

    data: bytes
    row: Row


def read_images(
    items: Iterable[Item], settings: ConvertSettings, examiner: Examiner, *, num_threads: int, in_order: bool
) -> Iterator[ReadImage]:
    """Yield images in order; threads read and validate a bounded number of them ahead.

    Args:
        examiner: of ``examination(settings)``; closed when this is left early, so that no thread waits for it.
        in_order: read in the calling thread, and only validate in the others.
    """
    items = map(_read_now, items) if in_order else iter(items)
    max_blocks = num_threads + _SPARE_BLOCKS
    max_items = max(1, min(_BLOCK_ITEMS, _AHEAD_ITEMS // max_blocks))
    max_bytes = min(_BLOCK_BYTES, _AHEAD_BYTES // max_blocks)
    queue: deque[tuple[Future[list[ReadImage]], list[Item]]] = deque()
    mean_bytes = 1 << 20  # of an image; a guess at first, then a running mean
    with ThreadPoolExecutor(num_threads) as pool:

        def start(block: list[Item]) -> tuple[Future[list[ReadImage]], list[Item]]:
            return pool.submit(_read_block, block, settings, examiner, max_bytes), block

        try:
            while True:
                length = max(1, min(max_items, max_bytes // mean_bytes))
                while len(queue) < max_blocks and (block := list(islice(items, length))):
                    queue.append(start(block))
                if not queue:
                    return
                future, block = queue.popleft()
                done = future.result()
                if len(done) < len(block):  # the task reached its byte limit
                    queue.appendleft(start(block[len(done) :]))
                for image in done:
                    mean_bytes = max(1, (15 * mean_bytes + len(image.data)) // 16)
                    yield image
        except BaseException:
            for future, _ in queue:
                future.cancel()
            examiner.close()
            raise


def _read_now(item: Item) -> Item:
    """Read an item in this thread; calling the result's ``read`` returns those bytes."""
    try:
        data = item.read()
    except BadImageError as error:
        return item._replace(read=partial(_raise, error))
    return item._replace(read=lambda: data)


def _raise(error: Exception) -> NoReturn:
    raise error


def examination(settings: ConvertSettings) -> Examination:
    """What a conversion does with each image."""
    return Examination(
        certify=settings.decodes_all,
        transcode=settings.transcode,
        resize=settings.resize,
        quality=settings.quality,
        max_pixels=settings.max_pixels,
    )


class _Original(NamedTuple):
    """An image as the source has it, and what is known of it from its header."""

    item: Item
    data: bytes
    stamp: int
    header: Header
    reason: str | None


def _read_block(
    items: list[Item], settings: ConvertSettings, examiner: Examiner, max_bytes: int
) -> list[ReadImage]:
    """Read and validate images until they total ``max_bytes``; runs in a thread."""
    originals: list[_Original] = []
    num_bytes = 0
    for item in items:
        originals.append(_read_original(item, settings))
        num_bytes += len(originals[-1].data)
        if num_bytes >= max_bytes:
            break
    decoded = [number for number, original in enumerate(originals) if _must_be_decoded(original, settings)]
    verdicts = examiner.examine([(originals[number].data, originals[number].header) for number in decoded])
    by_number = dict(zip(decoded, verdicts, strict=True))
    return [_read_image(original, by_number.get(number)) for number, original in enumerate(originals)]


def _read_original(item: Item, settings: ConvertSettings) -> _Original:
    data, header, reason = b"", Header(Kind.UNKNOWN, 0, 0), None
    try:
        data = item.read()
        if settings.check != "none":
            header = read_header(data, max_pixels=settings.max_pixels)
    except BadImageError as error:
        if settings.check == "none":  # then there are no bad images
            raise
        reason = str(error)
    return _Original(item, data, item.stamp(), header, reason)


def _must_be_decoded(original: _Original, settings: ConvertSettings) -> bool:
    change = needed_change(original.header, transcode=settings.transcode, resize=settings.resize)
    return original.reason is None and (settings.decodes_all or change != Change.NONE)


def _read_image(original: _Original, verdict: Verdict | None) -> ReadImage:
    item, data, stamp, header, reason = original
    change = Change.NONE
    if verdict is not None:
        reason, header, change, _ = verdict
        data = data if verdict.data is None else verdict.data
    row = Row(
        name=item.name,
        label=item.label,
        height=header.height,
        width=header.width,
        num_bytes=len(data),
        crc32=crc32(data),
        kind=int(header.kind),
        change=int(change),
        stamp=stamp,
        reason=reason,
    )
    return ReadImage(data, row)
