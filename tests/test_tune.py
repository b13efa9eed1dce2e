import json
import logging
import os

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform
from dali_lmdb.compare.commands import _verdict, tune_command
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.tuning import Tuning, _candidates, tune
from dali_lmdb.compare.window import Window
from dali_lmdb.convert import convert
from dali_lmdb.errors import StateError
from dali_lmdb.loaders.tuned import read_tuned, write_tuned
from dali_lmdb.train.__main__ import main as train

CORES = len(os.sched_getaffinity(0))
QUICK = CompareSettings(batch_size=4, size=16, device="cpu", workers=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for label in range(2):
        (folder / f"class{label}").mkdir()
        for number in range(4):
            Image.new("RGB", (40, 30), (20 * number,) * 3).save(folder / f"class{label}" / f"{number}.jpg")
    target = tmp_path_factory.mktemp("stores") / "train.lmdb"
    convert(folder, target)
    return target


@pytest.fixture(scope="module")
def found(store):
    lines = []
    result = tune(store, minutes=0.01, settings=QUICK, progress=lines.append)
    return result, lines


def test_candidates_are_halved_and_the_best_takes_turns_with_the_defaults(found):
    result, lines = found
    assert [line.split()[0] for line in lines] == ["4", "2", "2"]
    assert len(result.tried) == 4
    speeds = [speed for _, speed in result.tried]
    assert speeds == sorted(speeds, reverse=True)
    assert result.best in [values for values, _ in result.tried if values]  # not the defaults with themselves
    assert len(result.best_windows) == len(result.default_windows) == 5
    assert result.chosen in ({}, result.best)
    figures = result.to_dict()["figures"]
    for row in figures.values():
        assert 0 < row["batch_ms_mean"] < row["batch_ms_p99"]
        assert row["images_per_s"] > 0
    for window in result.best_windows:
        assert 4 * len(window.batch_s) / sum(window.batch_s) == pytest.approx(window.images_per_s, rel=0.1)


@pytest.mark.parametrize("window_s", [1, 15])
def test_the_time_is_kept_even_if_batches_are_slow(store, monkeypatch, window_s):
    now = [0.0]

    def measure(data, settings, values, *, seconds):
        now[0] += max(window_s, 1.5 * seconds)
        return Window(100 + len(values), 0.001, 1.0, 0, (0.01,))

    monkeypatch.setattr("dali_lmdb.compare.tuning.time.monotonic", lambda: now[0])
    monkeypatch.setattr("dali_lmdb.compare.tuning._window", measure)
    found = tune(store, minutes=3, settings=QUICK)
    assert now[0] < 1.5 * 180
    assert (len(found.tried) == 4) == (window_s == 15)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_candidates_begin_with_the_defaults_and_each_change_of_them_alone(device):
    used = CompareSettings(workers=4, batch_size=4, device=device)
    candidates = _candidates(used, limit=1000)
    assert candidates[0] == {}
    single = [values for values in candidates if len(values) == 1]
    assert candidates[1 : 1 + len(single)] == single
    changed = {name for values in single for name in values}
    on_gpu = {"decode_device", "hw_decoder_load"}
    assert changed == {"num_threads", "prefetch_queue_depth", "readahead_bytes"} | (
        on_gpu if device == "cuda" else set()
    )
    assert len({json.dumps(values, sort_keys=True) for values in candidates}) == len(candidates) > 40
    assert not any(on_gpu <= set(values) for values in candidates)
    assert _candidates(used, limit=1000) == candidates
    assert _candidates(used, limit=6) == candidates[:6]


def tuning_of(ratios):
    def windows(speeds):
        return [Window(speed, 0.001, 1.0, 0, (0.01,)) for speed in speeds]

    return Tuning(
        store="x",
        num_records=1,
        image_bytes=1,
        settings=QUICK,
        versions={},
        machine={},
        tried=[],
        best={"num_threads": 9},
        default_windows=windows([100] * len(ratios)),
        best_windows=windows(100 * np.array(ratios)),
    )


def test_what_is_not_surely_faster_is_not_chosen():
    assert tuning_of([1.1, 1.12, 1.09, 1.1, 1.11]).chosen == {"num_threads": 9}
    assert tuning_of([1.1, 0.98, 1.05, 1.0, 1.2]).chosen == {}
    assert tuning_of([0.9, 0.91, 0.9, 0.92, 0.9]).chosen == {}


def test_options_are_said_not_to_matter_only_if_a_gain_is_excluded():
    for ratios in ([1.0, 1.01, 0.99, 1.0, 1.0], [0.9, 0.91, 0.9, 0.92, 0.9]):
        assert _verdict(tuning_of(ratios)).endswith("these options do not matter here; keep the defaults")
    unsure = _verdict(tuning_of([1.1, 0.98, 1.05, 1.0, 1.2]))
    assert unsure.endswith("no gain is certain; keep the defaults, or search longer with --minutes")


def write(path, **values):
    write_tuned(path, values, machine={"cores": CORES})
    return path


def test_a_loader_takes_what_was_found_for_arguments_at_their_defaults(store, tmp_path):
    tuned = write(tmp_path / "t.json", num_threads=3, prefetch_queue_depth=4, readahead_bytes=5)
    common = {"transform": EvalTransform(size=16, resize=16), "batch_size": 4, "device": "cpu", "tuned": tuned}
    with DaliLoader(store, **common) as loader:
        assert (loader.graph.num_threads, loader.graph.prefetch_queue_depth) == (3, 4)
        assert loader._readahead_bytes == 5
        assert sum(len(labels) for _, labels in loader) == 8
    with DaliLoader(store, num_threads=1, **common) as loader:
        assert (loader.graph.num_threads, loader.graph.prefetch_queue_depth) == (1, 4)


@pytest.mark.parametrize(
    ("began_with", "ranks", "num_threads"),
    [
        (CORES, 1, 12 * CORES),
        (CORES, 2 * CORES, 12),  # a rank has a core at least
        (4 * CORES, 1, 3 * CORES),  # a search on a larger machine
        (1, 1, 12 * CORES),  # a search that was given few
    ],
)
def test_each_rank_takes_its_share_of_the_threads(store, tmp_path, monkeypatch, began_with, ranks, num_threads):
    path = tmp_path / "t.json"
    write_tuned(path, {"num_threads": 12 * CORES}, machine={"cores": CORES, "workers": began_with})
    assert read_tuned(path, ranks_per_node=ranks) == {"num_threads": num_threads}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    transform = EvalTransform(size=16, resize=16)
    with DaliLoader(store, transform=transform, batch_size=4, device="cpu", tuned=path) as loader:
        assert loader.graph.num_threads == num_threads


def test_another_number_of_cores_is_said(tmp_path, caplog):
    write_tuned(tmp_path / "t.json", {"num_threads": 3}, machine={"cores": CORES + 1})
    with caplog.at_level(logging.WARNING, logger="dali_lmdb"):
        assert read_tuned(tmp_path / "t.json") == {"num_threads": 3}
    assert f"found with {CORES + 1} cores, this process may use {CORES}" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": "dali_lmdb tuned 2", "values": {}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"seed": 1}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"num_threads": 0}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"num_threads": 100000}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"num_threads": "2"}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"num_threads": 2.5}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"prefetch_queue_depth": null}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {"readahead_bytes": NaN}, "machine": {"cores": 1}}',
        '{"format": "dali_lmdb tuned 1", "values": {}, "machine": {"cores": Infinity}}',
        '{"format": "dali_lmdb tuned 1", "values": {}, "machine": {"cores": 1, "workers": 0}}',
        "\udcff",
    ],
    ids=range(15),
)
def test_another_file_is_refused_in_one_line(store, tmp_path, text):
    path = tmp_path / "t.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StateError, match="not a file of dali-lmdb tune --save"):
        read_tuned(path)
    result = CliRunner().invoke(train, ["--train", str(store), "--val", str(store), "--tuned", str(path)])
    assert result.exit_code == 2
    assert "not a file of dali-lmdb tune --save" in result.stderr.splitlines()[-1]
    result = CliRunner().invoke(tune_command, [str(store), "--save", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


def test_the_classic_backend_takes_no_options_of_dali(store, tmp_path):
    tuned = write(tmp_path / "t.json", num_threads=3)
    options = ["--train", str(store), "--val", str(store), "--backend", "torch", "--tuned", str(tuned)]
    result = CliRunner().invoke(train, options)
    assert (result.exit_code, "--tuned holds options of DALI" in result.stderr) == (2, True)


def test_training_takes_what_was_found(store, tmp_path):
    tuned = write(tmp_path / "t.json", num_threads=3, prefetch_queue_depth=1)
    arguments = ["--train", store, "--val", store, "--tuned", tuned, "--arch", "resnet18", "--size", 32]
    arguments += [
        "--device",
        "cpu",
        "--epochs",
        1,
        "--batch-size",
        4,
        "--log-json",
        tmp_path / "log",
        "--lr",
        0.01,
    ]
    result = CliRunner().invoke(train, [str(argument) for argument in (*arguments, "--prefetch-queue-depth", 3)])
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "log").read_text().splitlines()[0])["settings"]
    assert (settings["workers"], settings["prefetch_queue_depth"]) == (3, 3)


def test_the_command_says_what_to_use_and_saves_it(store, tmp_path):
    saved = tmp_path / "t.json"
    options = ["--minutes", "0.01", "--batch-size", "4", "--size", "16", "--device", "cpu", "--workers", "1"]
    result = CliRunner().invoke(tune_command, [str(store), *options, "--save", str(saved)])
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    chosen = read_tuned(saved)
    assert "times the defaults' speed, with 99 % confidence" in last
    assert ("use: --" in last) == bool(chosen)
    assert ("keep the defaults" in last) == (not chosen)
    assert os.listdir(tmp_path) == ["t.json"]


def test_wrong_input_is_one_line(store, tmp_path):
    for arguments in ([str(tmp_path / "none.lmdb")], [str(store), "--save", str(tmp_path / "none" / "t.json")]):
        result = CliRunner().invoke(tune_command, arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for minutes in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"minutes is {minutes}"):
            tune(store, minutes=minutes)
