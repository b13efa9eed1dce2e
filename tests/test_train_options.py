"""What ``--on-bad`` and ``--shuffle`` do to a training run."""

import json
import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dali_lmdb.convert import convert
from dali_lmdb.errors import RecordError, StateError
from dali_lmdb.train import TrainSettings, checkpoint, train
from dali_lmdb.train.__main__ import main
from dali_lmdb.train.distributed import launch

NUM_TRAIN, NUM_VAL = 24, 7
BAD = {"train": "b/010.png", "val": "a/002.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``train.lmdb`` and ``val.lmdb``, each with one record that does not decode."""
    root = tmp_path_factory.mktemp("options")
    random = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(count):
            path = root / split / "ab"[number % 2 if split == "val" else number >= 10] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
        bad = root / split / BAD[split]
        raw = bytearray(bad.read_bytes())
        raw[1000:3000] = bytes(2000)  # the header stays whole: the conversion does not find it
        bad.write_bytes(raw)
        convert(root / split, root / f"{split}.lmdb")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(folder, **overrides):
    values = {
        "train": str(folder / "train.lmdb"),
        "val": str(folder / "val.lmdb"),
        "arch": "resnet18",
        "device": "cpu",
        "size": 32,
        "batch_size": 6,
        "epochs": 1,
        "lr": 0.01,
        "workers": 1,
        "backend": "dali",
    }
    return TrainSettings(**values | overrides)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_bad_record_stops_a_run_that_was_not_told_otherwise(folder, backend):
    with pytest.raises(RecordError, match=r"train\.lmdb: record 10 \(b/010\.png\)"):
        train(settings(folder, backend=backend))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_run_with_substitutes_warns_and_counts_every_record(folder, backend, caplog):
    with caplog.at_level(logging.WARNING, logger="dali_lmdb"):
        (result,) = train(settings(folder, backend=backend, on_bad="substitute"))
    assert result["val_records"] == NUM_VAL
    for split, name in BAD.items():
        assert len([message for message in caplog.messages if f"{split}.lmdb" in message and name in message]) == 1


def test_ranks_stay_in_step_when_one_of_them_meets_a_bad_record(folder, tmp_path):
    log = tmp_path / "log"
    values = asdict(settings(folder, on_bad="substitute", log_json=str(log), log_every=1))
    launch(["-m", "dali_lmdb.train.rank", json.dumps(values)], world_size=2)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2]
    assert [line["val_records"] for line in lines if "val_records" in line] == [NUM_VAL]


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_the_shuffle_is_the_one_asked_for_and_another_does_not_go_on_from_it(folder, tmp_path, shuffle):
    asked = settings(folder, shuffle=shuffle, on_bad="substitute", output=str(tmp_path))
    train(asked)
    assert checkpoint.load(tmp_path / "checkpoint.pt")["loader"]["order"] == shuffle
    other = "block" if shuffle == "full" else "full"
    with pytest.raises(StateError, match=rf"order '{shuffle}' \(here '{other}'\)"):
        train(replace(asked, epochs=2, resume=True, shuffle=other))


def test_the_command_has_both_options_and_names_the_bad_record_in_one_line(folder):
    given = settings(folder)
    options = [
        part
        for name in ("train", "val", "arch", "device", "size", "batch_size", "epochs", "lr", "workers")
        for part in (f"--{name.replace('_', '-')}", str(getattr(given, name)))
    ]
    result = CliRunner().invoke(main, [*options, "--shuffle", "block", "--on-bad", "raise"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "record 10 (b/010.png)" in result.stderr
    assert result.stderr.count("\n") == 1
    for wrong in (("--shuffle", "none"), ("--on-bad", "skip")):
        assert CliRunner().invoke(main, [*options, *wrong]).exit_code == 2


@pytest.mark.parametrize("wrong", [{"shuffle": "none"}, {"on_bad": "skip"}], ids=str)
def test_other_values_are_refused_when_the_settings_are_made(folder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        settings(folder, **wrong)
