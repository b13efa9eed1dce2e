"""What the options of loading do to a training run."""

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image

from dali_lmdb.convert import convert
from dali_lmdb.errors import RecordError, StateError
from dali_lmdb.loaders.settings import DaliSettings
from dali_lmdb.threads import threads_per_rank
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train import TrainSettings, checkpoint, train
from dali_lmdb.train.__main__ import main
from dali_lmdb.train.distributed import launch
from dali_lmdb.train.trainer import _Training, fits_beside

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
    assert checkpoint.load(tmp_path / "last.pt")["loader"]["order"] == shuffle
    other = "block" if shuffle == "full" else "full"
    with pytest.raises(StateError, match=rf"order '{shuffle}' \(here '{other}'\)"):
        train(replace(asked, epochs=2, resume=True, shuffle=other))


def run(folder, *options):
    given = settings(folder)
    names = ("train", "val", "arch", "device", "size", "batch_size", "epochs", "lr", "workers")
    usual = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    return CliRunner().invoke(main, [*usual, *map(str, options)])


def test_the_command_has_both_options_and_names_the_bad_record_in_one_line(folder):
    result = run(folder, "--shuffle", "block", "--on-bad", "raise")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "record 10 (b/010.png)" in result.stderr
    assert result.stderr.count("\n") == 1
    for wrong in (("--shuffle", "none"), ("--on-bad", "skip")):
        assert run(folder, *wrong).exit_code == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"shuffle": "none"},
        {"on_bad": "skip"},
        {"workers": -1},
        {"decode": "region"},
        {"decode_device": "tpu"},
        {"hw_decoder_load": 1.5},
        {"prefetch_queue_depth": 0},
        {"readahead_bytes": -1},
    ],
    ids=str,
)
def test_other_values_are_refused_when_the_settings_are_made(folder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        settings(folder, **wrong)


def opened(asked, *, ranks=RankEnvironment()):  # noqa: B008
    """What a run on the CPU opens: (training loader, evaluation loader)."""
    with ExitStack() as stack:
        run = _Training(asked, ranks=ranks, device=torch.device("cpu"), stack=stack)
        return run.train_loader, run.val_loader


def test_both_loaders_are_opened_as_asked_for(folder):
    asked = settings(
        folder,
        workers=3,
        decode="image",
        decode_device="cpu",
        hw_decoder_load=0.25,
        prefetch_queue_depth=1,
        readahead_bytes=4096,
    )
    for loader in opened(asked):
        graph = loader.graph
        assert (graph.num_threads, graph.prefetch_queue_depth, graph.hw_decoder_load) == (3, 1, 0.25)
        assert (graph.decode, graph.decode_device) == ("image", "cpu")
        assert loader._readahead_bytes == 4096


def test_by_default_they_are_opened_as_a_loader_is(folder):
    assert settings(folder).dali == DaliSettings()


@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_by_default_the_ranks_of_a_node_share_its_cores(folder, backend, ranks_per_node):
    ranks = RankEnvironment(ranks_per_node=ranks_per_node)
    for loader in opened(settings(folder, backend=backend, workers=None), ranks=ranks):
        found = loader.graph.num_threads if backend == "dali" else loader.num_workers
        assert found == threads_per_rank(ranks_per_node)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_bad_records_of_both_stores_are_listed_in_the_quarantine(folder, tmp_path, backend):
    listed = tmp_path / "bad.jsonl"
    options = ["--decode", "image", "--decode-device", "cpu", "--hw-decoder-load", 0.1, "--readahead-bytes", 0]
    options += ["--prefetch-queue-depth", 1, "--on-bad", "substitute", "--quarantine", listed]
    result = run(folder, *options, "--backend", backend)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {(line["store"], line["name"]) for line in lines} == {
        (str(folder / f"{split}.lmdb"), name) for split, name in BAD.items()
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--decode-device", "gpu"), "--decode-device gpu: training is on the CPU; use --decode-device cpu"),
        (("--quarantine", "."), "--quarantine .: a folder, expected a file"),
        (("--quarantine", "missing/bad.jsonl"), "--quarantine missing/bad.jsonl: no folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(folder, wrong, message):
    result = run(folder, *wrong)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--decode", "region"),
        ("--decode-device", "tpu"),
        ("--hw-decoder-load", "1.5"),
        ("--prefetch-queue-depth", "0"),
        ("--readahead-bytes", "-1"),
        ("--workers", "-1"),
    ],
)
def test_options_out_of_range_are_wrong_usage(folder, wrong):
    result = run(folder, *wrong)
    assert result.exit_code == 2
    assert f"Invalid value for '{wrong[0]}'" in result.stderr


@pytest.mark.parametrize(
    ("train_bytes", "val_bytes", "fits"),
    [
        (0, 0, True),  # on the CPU, and with the torch backend
        (600, 400, True),
        (600, 401, False),
        (5000, 0, True),  # nothing would be gained
    ],
)
def test_evaluation_keeps_its_memory_if_both_loaders_are_within_the_budget(train_bytes, val_bytes, fits):
    assert fits_beside(train_bytes, val_bytes, budget_bytes=1000) == fits


def test_a_run_that_releases_memory_after_each_evaluation_has_the_same_results(folder, caplog):
    def results(*, keeps):
        with ExitStack() as stack:
            asked = settings(folder, on_bad="substitute")
            run = _Training(asked, ranks=RankEnvironment(), device=torch.device("cpu"), stack=stack)
            run._keeps_val_memory = keeps
            return [run.evaluate() for _ in range(2)]

    caplog.set_level(logging.WARNING, logger="dali_lmdb")
    kept, warned = results(keeps=True), len(caplog.messages)
    assert results(keeps=False) == kept
    assert len(caplog.messages) == 2 * warned == 2  # one for the bad record, not one for each evaluation


def test_what_is_trained_says_how_much_gpu_memory_dali_holds(folder):
    with ExitStack() as stack:
        run = _Training(settings(folder), ranks=RankEnvironment(), device=torch.device("cpu"), stack=stack)
        assert "GPU" not in str(run)
        run.train_loader.gpu_memory_bytes, run.val_loader.gpu_memory_bytes = 2_000_000_000, 500_000_000
        assert str(run).endswith("; DALI holds about 2.5 GB of GPU memory")
        run._keeps_val_memory = False
        assert str(run).endswith("; DALI holds about 2.0 GB of GPU memory, 2.5 GB in evaluation")


def test_the_best_checkpoint_is_that_of_the_best_averaged_weights_where_there_are_any(folder, tmp_path):
    asked = settings(folder, on_bad="substitute", model_ema_decay=0.9, epochs=3, output=str(tmp_path))
    best = []
    with ExitStack() as stack:
        run = _Training(asked, ranks=RankEnvironment(), device=torch.device("cpu"), stack=stack)
        for epoch, (plain, averaged) in enumerate([(60.0, 10.0), (40.0, 30.0), (50.0, 20.0)]):
            run.end_epoch({"epoch": epoch, "val_top1": plain, "ema_val_top1": averaged})
            best.append(checkpoint.load(tmp_path / "best.pt")["result"]["epoch"])
    assert best == [0, 1, 1]
    model = torchvision.models.resnet18(num_classes=2)
    torch.optim.swa_utils.AveragedModel(model).load_state_dict(torch.load(tmp_path / "best.pt")["ema"])


def test_an_evaluation_whose_checkpoint_could_not_be_written_is_not_the_best_one(folder, tmp_path):
    asked = settings(folder, on_bad="substitute", epochs=4, output=str(tmp_path))
    best = []
    with ExitStack() as stack:
        run = _Training(asked, ranks=RankEnvironment(), device=torch.device("cpu"), stack=stack)
        for epoch, top1 in enumerate([40.0, 60.0, 50.0, 45.0]):
            if epoch == 1:
                (tmp_path / "last.pt.partial").mkdir()  # where it would be written
            run.end_epoch({"epoch": epoch, "val_top1": top1})
            if epoch == 1:
                (tmp_path / "last.pt.partial").rmdir()
            best.append((run.best["epoch"], checkpoint.load(tmp_path / "best.pt")["result"]["epoch"]))
    assert best == [(0, 0), (0, 0), (2, 2), (2, 2)]
