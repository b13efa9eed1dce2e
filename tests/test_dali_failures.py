"""What DALI fails at besides records that cannot be decoded, and what it costs to find those among many."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from damage import DAMAGE, grey_image, noise_image, store_with, write_store
from image_sets import size_of

from dali_lmdb.errors import DeviceError, RecordError
from dali_lmdb.loaders import probe
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.probe import may_be_a_record, raise_explained
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

ROOT = Path(__file__).resolve().parents[1]
EVAL = EvalTransform(size=16, resize=18)
NUM_RECORDS = 256
ON_BAD = pytest.mark.parametrize("on_bad", ["raise", "substitute"])


def dali(path, **arguments):
    defaults = {"transform": EVAL, "batch_size": 4, "device": "cpu", "num_threads": 1, "return_index": True}
    return DaliLoader(path, **defaults | arguments)


@pytest.fixture(scope="module")
def good_path(tmp_path_factory):
    """A store of 256 good records."""
    values = [noise_image(record % 24) for record in range(NUM_RECORDS)]
    sizes = [size_of(record % 24) for record in range(NUM_RECORDS)]
    return write_store(tmp_path_factory.mktemp("good") / "x.lmdb", values, sizes=sizes)


def child(code, *arguments, **environment):
    """What a process prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- lack of memory

SHORT_OF_MEMORY = """
import json, resource, sys
from dali_lmdb.errors import DeviceError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.plan.augment import EvalTransform

path, on_bad, quarantine, resize = sys.argv[1:]
arguments = {"batch_size": 256, "device": "cpu", "num_threads": 2, "prefetch_queue_depth": 1, "return_index": True}
arguments["resize"] = resize
loader = DaliLoader(
    path, transform=EvalTransform(size=400, resize=400), on_bad=on_bad, quarantine=quarantine, **arguments
)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (in_use + (400 << 20), hard))  # a batch of 256 needs 491 MB, in one piece
try:
    next(iter(loader))
except DeviceError as error:
    message, cause = str(error), str(error.__cause__)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
bad = len(loader.bad_records)
((_, _, records),) = loader
print(json.dumps([message, cause, bad, records.tolist()]))
"""


OUT_OF_MEMORY = {
    "dali": (
        "DALI is out of host memory: std::bad_alloc; use a smaller batch_size (--batch-size) or "
        "prefetch_queue_depth=1",
        "Error in CPU operator",
    ),
    "torch": (
        "out of host memory: Unable to allocate 469. MiB for an array with shape (122880000,) and data type "
        "float32; use a smaller batch_size (--batch-size)",
        "Unable to allocate",
    ),
}


@pytest.mark.parametrize("resize", OUT_OF_MEMORY)
@ON_BAD
def test_a_lack_of_memory_is_not_blamed_on_any_record(good_path, tmp_path, on_bad, resize):
    # One arena, since each thread's own would count as 64 MB and more.
    printed = child(SHORT_OF_MEMORY, good_path, on_bad, tmp_path / "bad.jsonl", resize, MALLOC_ARENA_MAX="1")
    message, cause, bad, records = printed
    assert message == OUT_OF_MEMORY[resize][0]
    assert OUT_OF_MEMORY[resize][1] in cause
    assert bad == 0
    assert (tmp_path / "bad.jsonl").read_text() == ""
    assert records == list(range(NUM_RECORDS)), "with more memory, it continues with the same batch"


# --- other causes


@ON_BAD
def test_a_failure_of_unknown_kind_is_raised_as_it_is(good_path, tmp_path, on_bad):
    with dali(good_path, on_bad=on_bad, quarantine=tmp_path / "bad.jsonl") as loader:
        loader.graph = replace(loader.graph, batch_size=2)  # a bug: DALI refuses the planned batches of four
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"unexpected batch size. Expected batch_size <= 2, actual: 4"):
                next(iter(loader))
        assert loader.bad_records == []
    assert (tmp_path / "bad.jsonl").read_text() == ""


WITHOUT_DECODERS = """
import json, sys
from dali_lmdb.errors import DeviceError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.plan.augment import EvalTransform

path, on_bad, batch_size = sys.argv[1:]
arguments = {"device": "cpu", "num_threads": 1, "batch_size": int(batch_size), "on_bad": on_bad}
loader = DaliLoader(path, transform=EvalTransform(size=16, resize=18), **arguments)
messages = []
for _ in range(2):
    try:
        next(iter(loader))
    except DeviceError as error:
        messages.append(str(error))
print(json.dumps([messages, len(loader.bad_records)]))
"""


@ON_BAD
@pytest.mark.parametrize("batch_size", [1, 256])
def test_decoders_that_decode_nothing_are_not_blamed_on_any_record(good_path, tmp_path, on_bad, batch_size):
    """nvImageCodec finds no decoders, so DALI says of good records that they cannot be decoded."""
    messages, bad = child(
        WITHOUT_DECODERS, good_path, on_bad, batch_size, NVIMGCODEC_EXTENSIONS_PATH=str(tmp_path)
    )
    assert bad == 0
    assert len(messages) == 2
    for message in messages:
        assert re.match(
            r"DALI fails to decode a batch, and even a blank JPEG of \d+ x \d+ pixels: decoding failed; ",
            message,
        )


# --- what DALI says


def failure(cause, *, operator="MIXED operator `nvidia.dali.fn.decoders.image`"):
    """DALI's error with a cause, as DALI 2.4.0 words it."""
    return RuntimeError(
        f"Critical error in pipeline:\nCritical error in pipeline:\nError in {operator},\nwhich was used in the "
        "pipeline definition with the following traceback:\n\n"
        '  File "/x/pipeline.py", line 1, in define_pipeline\n    images = fn.decoders.image(\n\n'
        f"encountered:\n\n{cause}\nCurrent pipeline object is no longer valid.\n"
        "Current pipeline object is no longer valid."
    )


OF_A_RECORD = [
    "Failed to decode sample #2 : ",
    *(f"nvImageCodec failure: '#{status}'" for status in (3, 4, 9, 13, 14, 17, 18, 19)),
    "The cropping window [0..500, 26..546] is not valid for image dimensions [55 x 75]\nC++ context: [x.h:91] ",
]


@pytest.mark.parametrize("cause", OF_A_RECORD)
def test_a_failure_to_decode_may_be_about_a_record(cause):
    assert may_be_a_record(failure(cause))


# Read in the sources and binaries of DALI 2.4.0 and nvImageCodec 0.9, except for the last.
OTHERS = {
    "Can't allocate 4096 bytes on device 0.": "out of GPU memory: Can't allocate 4096 bytes on device 0.;",
    "Can't allocate 4096 bytes on host.": "out of host memory: Can't allocate 4096 bytes on host.;",
    "CUDA allocation failed": "out of GPU memory: CUDA allocation failed;",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory": "out of GPU memory: CUDA runtime API",
    "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory": "out of GPU memory: CUDA driver API",
    "nvImageCodec failure: '#5'": "out of GPU memory: nvImageCodec failure: '#5';",
    "nvImageCodec failure: '#15'": "out of GPU memory: nvImageCodec failure: '#15';",
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access": (
        r"cannot use the GPU: CUDA runtime API error cudaErrorIllegalAddress \(700\): an illegal memory access; st"
    ),
    "nvImageCodec failure: '#21'": "cannot use the GPU: nvImageCodec failure: '#21'; start",
    "Multiple exceptions:\nFailed to decode sample #3 : \nCUDA allocation failed": "out of GPU memory: Multiple",
    "std::bad_alloc": "out of host memory: std::bad_alloc;",
}


@pytest.mark.parametrize(("cause", "told"), OTHERS.items(), ids=[cause[:40] for cause in OTHERS])
def test_a_failure_of_memory_or_cuda_is_told_in_one_line_with_its_remedy(cause, told):
    error = failure(cause)
    assert not may_be_a_record(error)
    with pytest.raises(DeviceError, match=told) as info:
        raise_explained(error)
    assert "\n" not in str(info.value)
    assert "pipeline.py" not in str(info.value)
    assert info.value.__cause__ is error


@pytest.mark.parametrize(
    "cause", [*(f"nvImageCodec failure: '#{status}'" for status in (2, 6, 7, 8, 10, 16, 20)), "?"]
)
def test_a_failure_of_another_kind_stays_what_it_is(cause):
    error = failure(cause)
    assert not may_be_a_record(error)
    with pytest.raises(RuntimeError) as info:
        raise_explained(error)
    assert info.value is error


# --- finding the records that fail


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Gives probes a handler of ``planted_probes``, and returns a function for the lines that it notes."""
    noted = tmp_path / "planted"
    monkeypatch.setenv("PLANTED", str(noted))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))

    def plant_handler(name):
        monkeypatch.setattr(probe, "_HANDLER", f"planted_probes:{name}")
        return lambda: noted.read_text().splitlines() if noted.exists() else []

    return plant_handler


@pytest.mark.parametrize("bad", [(0,), (77,), (255,), (3, 200), (100, 101, 102)], ids=str)
def test_bad_records_of_a_large_batch_are_found_by_halving(tmp_path, plant, bad):
    noted = plant("noting")
    values = [noise_image(record % 24) for record in range(NUM_RECORDS)]
    sizes = [size_of(record % 24) for record in range(NUM_RECORDS)]
    for record in bad:
        values[record], sizes[record] = DAMAGE["scan cut off"], size_of(9)
    path = write_store(tmp_path / "x.lmdb", values, sizes=sizes)
    with dali(path, batch_size=NUM_RECORDS) as loader:
        with pytest.raises(RecordError):
            next(iter(loader))
        assert [record.index for record in loader.bad_records] == list(bad)
    builds = [int(line) for line in noted()]
    # One for a blank image, then one after each failure: of a group of 31 and its parts of 16, 8, 4, 2 and 1.
    assert len(builds) <= 2 + 6 * len(bad)
    assert max(builds) <= 31


def test_a_batch_of_bad_records_only_is_named_however_dali_sees_them(tmp_path):
    """A window outside of the image is DALI's verdict alone, and nothing of the batch passes."""
    values = [grey_image(0), grey_image(1), b"<html>", b""]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[(500, 600), (500, 600), size_of(2), size_of(3)])
    with dali(path) as loader:
        with pytest.raises(RecordError, match=r"record 0 \(c00/000.jpg\) \(and 3 more in its batch\)"):
            next(iter(loader))
        causes = [record.cause for record in loader.bad_records]
    assert all("window is outside of the image" in cause and "Pillow decodes it" in cause for cause in causes[:2])
    assert all("not a JPEG, PNG" in cause for cause in causes[2:])


def test_records_too_large_for_a_blank_of_their_size_are_named_all_the_same(tmp_path):
    sizes = [(70_000, 1_000), (30_000, 30_000)]  # no JPEG, and 2.7 GB
    path = write_store(tmp_path / "x.lmdb", [grey_image(0), grey_image(1)], sizes=sizes)
    with dali(path) as loader, pytest.raises(RecordError, match=r"record 0 .*\(and 1 more in its batch\)"):
        next(iter(loader))


def test_a_probe_that_fails_beside_the_pipeline_is_repeated_without_it(tmp_path, plant):
    """As on a GPU whose memory the pipeline and the model fill."""
    with dali(
        store_with(tmp_path / "x.lmdb", (5,)), on_bad="substitute", transform=TrainTransform(size=16)
    ) as loader:
        list(loader)
        loader._verdicts.close()
        noted = plant("once_without_memory")
        steps = [records.tolist() for _ in range(3) for _, _, records in loader]
        assert noted() == ["failed"]
        assert [len(step) for step in steps] == [4] * 9
        assert 5 not in {record for step in steps for record in step}
        assert [record.index for record in loader.bad_records] == [5]


def test_a_probe_without_memory_is_no_verdict(tmp_path, plant):
    with dali(store_with(tmp_path / "x.lmdb", (1,))) as loader:
        plant("without_memory")
        with pytest.raises(DeviceError, match="out of GPU memory"):
            next(iter(loader))
        assert loader.bad_records == []
        loader._verdicts.close()
        plant("noting")
        with pytest.raises(RecordError, match="record 1 "):
            next(iter(loader))


@ON_BAD
def test_a_probe_that_is_killed_is_no_verdict(tmp_path, plant, on_bad):
    with dali(store_with(tmp_path / "x.lmdb", (1,)), on_bad=on_bad) as loader:
        plant("killed")
        with pytest.raises(DeviceError, match="was killed: SIGKILL, perhaps for lack of memory; free some memory"):
            next(iter(loader))
        assert loader.bad_records == []


def test_a_record_that_crashes_the_probe_is_bad_and_never_decoded_again(tmp_path, plant):
    noted = plant("crashing")
    path = store_with(tmp_path / "x.lmdb", (6,))  # 6 makes the batch fail; 5, its neighbour, crashes the probe
    with dali(path, on_bad="substitute") as loader:
        steps = [records.tolist() for _, _, records in loader]
        assert steps == [[0, 1, 2, 3], [4, 4, 7, 7], [8, 9, 10, 11]]
        causes = {record.index: record.cause for record in loader.bad_records}
        assert causes[5] == "DALI: the decoder crashed: SIGSEGV; Pillow decodes it"
        assert causes.keys() == {5, 6}
        before = len(noted())
        assert [records.tolist() for _, _, records in loader] == steps
        assert not any("5" in line for line in noted()[before:])


def test_a_record_that_crashes_pillow_is_named_with_that_cause(tmp_path, plant):
    plant("crashing_in_pillow")
    with dali(store_with(tmp_path / "x.lmdb", {5: "text"})) as loader, pytest.raises(RecordError) as info:
        list(loader)
    assert "record 5 (c05/005.jpg): not a decodable image: the decoder crashed: SIGABRT; " in str(info.value)


@ON_BAD
def test_refused_records_are_bad_without_being_decoded(tmp_path, plant, on_bad):
    noted = plant("crashing")
    with dali(store_with(tmp_path / "x.lmdb", ()), on_bad=on_bad, quarantine=tmp_path / "bad.jsonl") as loader:
        loader.refuse({5: "it crashes"})
        if on_bad == "raise":
            with pytest.raises(
                RecordError, match=r"record 5 \(c05/005.jpg\): not a decodable image: it crashes; "
            ):
                list(loader)
        else:
            assert [records.tolist() for _, _, records in loader] == [[0, 1, 2, 3], [4, 4, 6, 7], [8, 9, 10, 11]]
            assert loader.stats()["substituted"] == 1
            assert noted() == [], "nothing has to be probed"
        assert [(record.index, record.cause) for record in loader.bad_records] == [(5, "it crashes")]
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 5


def test_a_closed_loader_leaves_no_probe_behind(tmp_path):
    with dali(store_with(tmp_path / "x.lmdb", (1,))) as loader:
        with pytest.raises(RecordError):
            next(iter(loader))
        process = loader._verdicts._probe._isolated._process
        assert process.poll() is None, "kept for the next bad record"
    assert process.wait(10) == -signal.SIGKILL


# --- large batches

LARGE_BATCH = """
import json, sys
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.plan.augment import EvalTransform

(path,) = sys.argv[1:]
arguments = {"batch_size": 256, "device": "cpu", "num_threads": 2, "on_bad": "substitute"}
with DaliLoader(path, transform=EvalTransform(size=16, resize=18), **arguments) as loader:
    list(loader)
    print(json.dumps([record.index for record in loader.bad_records]))
"""


@pytest.mark.parametrize("damage", ["text", "nothing", "header cut off", "frame header zeroed"])
def test_a_header_that_dali_cannot_parse_does_not_crash_a_large_batch(tmp_path, damage):
    values = [noise_image(record % 24) for record in range(NUM_RECORDS)]
    values[3] = values[200] = DAMAGE[damage]
    sizes = [size_of(record % 24) for record in range(NUM_RECORDS)]
    path = write_store(tmp_path / "x.lmdb", values, sizes=sizes)
    assert child(LARGE_BATCH, path) == [3, 200]


def test_windows_outside_of_images_do_not_crash_a_large_batch(tmp_path):
    """The index has other sizes than the images: many, since a few crash DALI's own check less often."""
    bad = list(range(100, 130))
    sizes = [size_of(record % 24) for record in range(NUM_RECORDS)]
    for record in bad:
        sizes[record] = (500, 600)
    path = write_store(
        tmp_path / "x.lmdb", [noise_image(record % 24) for record in range(NUM_RECORDS)], sizes=sizes
    )
    assert child(LARGE_BATCH, path) == bad
