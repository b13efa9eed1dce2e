import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform
from dali_lmdb.convert import convert
from dali_lmdb.errors import DeviceError, RecordError, StateError
from dali_lmdb.train import TrainSettings, checkpoint, models, train
from dali_lmdb.train.__main__ import main
from dali_lmdb.train.distributed import LAUNCHER_PID, RankFailedError, find_device, launch, memory_errors
from dali_lmdb.train.evaluation import evaluate
from dali_lmdb.train.metrics import EvaluationSums

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN, NUM_VAL = 48, 11
CLASSES = ("blue", "green", "red")
COLORS = ((40, 40, 220), (40, 220, 40), (220, 40, 40))
TINY = (
    "--arch",
    "resnet18",
    "--size",
    "32",
    "--batch-size",
    "8",
    "--workers",
    "1",
    "--device",
    "cpu",
    "--lr",
    "0.02",
)


class Data(NamedTuple):
    train_images: Path
    val_images: Path
    train: Path
    val: Path


def make_images(folder, *, count, seed, classes=CLASSES):
    """Class folders of coloured noise: the colour is the class."""
    random = np.random.default_rng(seed)
    for index in range(count):
        label = index % len(classes)
        pixels = np.clip(random.normal(COLORS[label], 30, (40, 48, 3)), 0, 255).astype(np.uint8)
        (folder / classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / classes[label] / f"{index:03}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    train_images = make_images(root / "train", count=NUM_TRAIN, seed=1)
    val_images = make_images(root / "val", count=NUM_VAL, seed=2)
    for images in (train_images, val_images):
        convert(images, images.with_suffix(".lmdb"))
    return Data(train_images, val_images, root / "train.lmdb", root / "val.lmdb")


@pytest.fixture(autouse=True)
def one_thread():
    """The ranks share the cores, and sums come out the same every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(data, **overrides):
    """Settings of a run that takes a second."""
    values = {
        "train": str(data.train),
        "val": str(data.val),
        "arch": "resnet18",
        "device": "cpu",
        "size": 32,
        "batch_size": 8,
        "epochs": 1,
        "lr": 0.02,
        "workers": 1,
    }
    return TrainSettings(**{**values, **overrides})


def command(data, *options, module="dali_lmdb.train"):
    return [sys.executable, "-m", module, "--train", str(data.train), "--val", str(data.val), *TINY, *options]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(arguments, *, expect=0):
    """Run a process from the checkout to its end; its output is shown if it ends otherwise than expected."""
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def start(arguments):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def read_until(process, text):
    """Read the process's output up to a line with this text."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}: {process.stderr.read()}")


def log_lines(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "step" in line], [line for line in lines if "val_records" in line]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_validation_record_is_counted_once_at_any_world_size(data, tmp_path, world_size):
    # 11 records in batches of 8: the second of two ranks has 3, the third of three has none.
    log, output = tmp_path / "log", tmp_path / "run"
    options = ("--epochs", "1", "--log-every", "2", "--log-json", str(log), "--output", str(output))
    done = run(command(data, "--world-size", str(world_size), *options))
    steps, validations = log_lines(log)
    num_steps = NUM_TRAIN // (8 * world_size)
    assert [line["step"] for line in steps] == sorted({*range(2, num_steps + 1, 2), num_steps})
    figures = ("loss", "images_per_s", "data_wait_fraction", "lr")
    assert {tuple(line) for line in steps} == {("epoch", "step", *figures, "time")}
    assert [line["val_records"] for line in validations] == [NUM_VAL]
    results = ["val_top1", "val_top5", "val_loss", "val_records"]
    assert list(validations[0]) == ["epoch", *results, "epoch_s", "time"]
    assert done.stderr == ""
    assert {file.name for file in output.iterdir()} - {"curves.png"} == {"best.pt", "last.pt"}

    # What the ranks counted together is what the saved model reaches alone.
    model = models.build_model("resnet18", num_classes=3, size=32)
    model.load_state_dict(checkpoint.load(output / "last.pt")["model"])
    sums = EvaluationSums(num_classes=3, device=torch.device("cpu"))
    transform = EvalTransform(size=32, resize=37)
    with DaliLoader(str(data.val), transform=transform, batch_size=NUM_VAL, device="cpu") as loader:
        evaluate(model, loader, add=sums.add, precision=torch.float32)
    alone = sums.report(num_records=NUM_VAL, all_sum=lambda values: values)
    assert validations[0]["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-4)


def test_torchrun_sets_the_world_size(data, tmp_path):
    log = tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ("--world-size", "3", "--epochs", "1", "--log-json", str(log))
    run(torchrun + command(data, *options)[2:])
    steps, validations = log_lines(log)
    assert steps[-1]["step"] == NUM_TRAIN // (8 * 2)
    assert validations[0]["val_records"] == NUM_VAL


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_small_net_learns_colours_with_either_backend(data, backend):
    results = train(tiny(data, backend=backend, epochs=8))
    assert results[-1]["val_top1"] >= 80


def test_the_torch_backend_trains_the_same_on_the_image_folder_as_on_its_store(data):
    folder = {"train": str(data.train_images), "val": str(data.val_images)}
    from_store = train(tiny(data, backend="torch", workers=0))
    assert train(tiny(data, backend="torch", workers=0, **folder)) == from_store


def test_a_model_with_auxiliary_classifiers_trains(data):
    assert train(tiny(data, arch="googlenet", batch_size=24))[0]["val_records"] == NUM_VAL


def test_the_auxiliary_losses_count_in_their_share():
    labels = torch.tensor([0])
    certain, even = torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2)
    loss = models.training_loss((certain, even, even), labels, arch="googlenet")
    assert loss.item() == pytest.approx(2 * 0.3 * np.log(2))


def test_a_killed_run_goes_on_as_if_it_had_not_been(data, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "run"
    settings = tiny(data, epochs=2, output=str(output), checkpoint_every=1, log_every=1)
    options = ("--epochs", "2", "--checkpoint-every", "1", "--log-every", "1")
    with start(command(data, *options, "--output", str(output))) as process:
        read_until(process, "epoch 0  step 3")
        process.kill()
    stopped = checkpoint.load(output / "last.pt")
    assert (stopped["epoch"], stopped["step"]) < (1, 5), "the run was not killed in the middle"
    train(
        TrainSettings(
            **{**asdict(settings), "output": str(whole)},
        )
    )
    train(TrainSettings(**{**asdict(settings), "resume": True}))
    resumed, uninterrupted = (checkpoint.load(folder / "last.pt") for folder in (output, whole))
    assert resumed["epoch"] == settings.epochs
    for name, value in uninterrupted["model"].items():
        torch.testing.assert_close(resumed["model"][name], value, msg=name)


def test_a_finished_run_has_nothing_to_go_on_with(data, tmp_path):
    settings = tiny(data, output=str(tmp_path))
    assert len(train(settings)) == 1
    assert train(TrainSettings(**{**asdict(settings), "resume": True})) == []


def test_a_checkpoint_of_another_data_set_is_refused(data, tmp_path):
    train(tiny(data, output=str(tmp_path)))
    other = make_images(tmp_path / "other", count=NUM_TRAIN, seed=3)
    convert(other, tmp_path / "other.lmdb")
    with pytest.raises(StateError, match="fingerprint"):
        train(tiny(data, train=str(tmp_path / "other.lmdb"), output=str(tmp_path), resume=True, epochs=2))


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(StateError, match=r"last\.pt: not a readable checkpoint"):
        train(tiny(data, output=str(tmp_path), resume=True))


def test_a_second_run_into_the_same_folder_is_refused(data, tmp_path):
    output = tmp_path / "run"
    options = ("--output", str(output), "--resume", "--checkpoint-every", "1", "--log-every", "1")
    with start(command(data, *options, "--epochs", "1000")) as process:
        read_until(process, "step 2")
        second = run(command(data, *options), expect=1)
        process.kill()
    says = f"Error: {output}: another run is writing there; let it finish or choose another --output\n"
    assert (second.stdout, second.stderr) == ("", says)
    of_the_first = {"best.pt", "last.pt", "last.pt.partial", "in-flight-train-0", "in-flight-val-0"}
    assert {file.name for file in output.iterdir()} <= of_the_first


def test_the_folder_of_a_killed_run_is_free_at_once(data, tmp_path):
    # The worker of DataLoader, which is forked, goes on for some seconds.
    options = ("--backend", "torch", "--output", str(tmp_path), "--epochs", "1000", "--log-every", "1")
    with start(command(data, *options)) as process:
        read_until(process, "step 1")
        with pytest.raises(StateError, match="another run is writing there"), checkpoint.only_writer(tmp_path):
            pass
        process.kill()
        process.wait()
        with checkpoint.only_writer(tmp_path):
            pass


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"epoch": 2, "bad": lambda: None})
    assert checkpoint.load(path)["epoch"] == 1


def test_a_diverged_run_stops_and_says_so(data):
    with pytest.raises(FloatingPointError, match="try a lower --lr"):
        train(tiny(data, lr=1e30, epochs=3, log_every=1))


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_loss_that_is_not_finite_is_one_line_and_the_last_good_checkpoint_stays(data, tmp_path, world_size):
    output = tmp_path / "run"
    options = ("--lr", "1e30", "--checkpoint-every", "1", "--log-every", "100", "--output", str(output))
    done = run(command(data, "--world-size", world_size, "--epochs", "3", *options), expect=1)
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"Error: (rank \d: )?the .* try a lower --lr", line)
    if (output / "last.pt").exists():
        saved = checkpoint.load(output / "last.pt")["model"].values()
        assert all(value.isfinite().all() for value in saved if value.is_floating_point())


def test_a_killed_rank_brings_the_others_down(data):
    with start(command(data, "--world-size", "2", "--epochs", "1000", "--log-every", "1")) as process:
        read_until(process, "step 1")
        ranks = rank_processes(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == "Error: rank 1 was killed by SIGKILL, perhaps for lack of memory\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def rank_processes(launcher):
    """Process ids by rank."""
    ranks = {}
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in children.read_text().split():
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    ranks[int(entry[5:])] = int(pid)
    return ranks


def test_ranks_end_with_the_command_that_is_killed(data, tmp_path):
    options = (
        "--epochs",
        "1000",
        "--log-every",
        "1",
        "--checkpoint-every",
        "1",
        "--output",
        str(tmp_path / "run"),
    )
    with start(command(data, "--world-size", "2", *options)) as process:
        read_until(process, "step 1")
        ranks = rank_processes(process.pid)
        try:
            process.kill()
            assert len(ranks) == 2
            assert all_end(ranks.values(), within_s=20)
        finally:
            for pid in ranks.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def all_end(pids, *, within_s):
    """Wait until none of these processes runs; who has to reap them may be slow."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return True
    return False


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_rank_whose_launcher_has_ended_before_it_began_ends_too(data):
    gone = start([sys.executable, "-c", ""])
    gone.communicate()
    done = subprocess.run(
        [sys.executable, "-m", "dali_lmdb.train.rank", json.dumps(asdict(tiny(data)))],
        cwd=ROOT,
        env={**environment(), "RANK": "0", LAUNCHER_PID: str(gone.pid)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, b"", b"")


RANK_SCRIPT = """
import torch
from dali_lmdb.errors import RecordError
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.distributed import process_group, run_rank

def work():
    ranks = RankEnvironment.from_environment()
    with process_group(ranks, device=torch.device("cpu")):
        torch.distributed.all_reduce(torch.ones(1))
        if ranks.rank == 1:
            raise {error}
        torch.distributed.all_reduce(torch.ones(1))

run_rank(work, show_errors=False)
"""


def test_the_traceback_of_the_rank_that_died_first_is_shown():
    script = RANK_SCRIPT.format(error='ValueError("costs $5")')
    with pytest.raises(RankFailedError, match=r"^rank 1 failed: ValueError: costs \$5$") as caught:
        launch(["-c", script], world_size=3)
    assert "in work" in caught.value.details
    assert "Connection" not in caught.value.details


def test_an_error_in_the_data_stays_what_it_is_across_ranks():
    with pytest.raises(RecordError, match=r"^rank 1: store: record 4 is bad$"):
        launch(["-c", RANK_SCRIPT.format(error='RecordError("store: record 4 is bad")')], world_size=2)


def test_bad_input_is_one_line_and_leaves_nothing_behind(data, tmp_path):
    text = tmp_path / "text.lmdb"
    text.write_text("not a store\n" * 1000)
    shapes = make_images(tmp_path / "shapes", count=6, seed=4, classes=("circle", "green", "square"))
    convert(shapes, tmp_path / "shapes.lmdb")
    cases = [
        # (options, what the one line says)
        (("--train", tmp_path / "none.lmdb"), "none.lmdb"),
        (("--train", text), "text.lmdb"),
        (("--train", data.train_images), "dali-lmdb convert"),
        (("--val", tmp_path / "none.lmdb"), "none.lmdb"),
        (("--val", tmp_path / "shapes.lmdb"), "circle, square"),
        (("--backend", "torch", "--val", tmp_path), "Error: "),
        (("--arch", "resnet19"), "did you mean resnet18"),
        (("--arch", "alexnet"), "alexnet cannot be trained on 8 images of 32x32 pixels"),
        (("--batch-size", "25", "--world-size", "2"), "48 records, one step needs 50"),
        (("--world-size", "49"), "use --world-size 48 or less"),
        (("--log-json", tmp_path / "none" / "log"), "create it first"),
        (("--log-json", tmp_path), "expected a file"),
        (("--output", text), "cannot be created"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for options, says in cases:
        arguments = ("--train", data.train, "--val", data.val, *TINY, "--output", tmp_path / "out", *options)
        result = invoke(*arguments)
        assert result.exit_code == 1, (options, result.output)
        assert says in result.output, options
        assert result.output.startswith("Error: "), options
        assert result.output.count("\n") == 1, options
        assert sorted(tmp_path.rglob("*")) == before, options


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_one_line(data):
    result = invoke("--train", data.train, "--val", data.val, *TINY, "--device", "cuda", "--world-size", "2")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "no GPU found; use --device cpu" in result.output


def test_a_checkpoint_is_not_overwritten_by_mistake(data, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"30 hours of work")
    result = invoke("--train", data.train, "--val", data.val, *TINY, "--output", tmp_path)
    assert result.exit_code == 1
    assert "resume that run with --resume" in result.output
    assert (tmp_path / "last.pt").read_bytes() == b"30 hours of work"


@pytest.mark.parametrize(
    "options",
    [
        ("--batch-size", "0"),
        ("--backend", "tf"),
        ("--epochs", "-1"),
        ("--lr", "0"),
        ("--seed", str(2**63)),
        ("--resume",),
        ("--none",),
    ],
)
def test_wrong_usage_has_exit_code_2(data, options):
    assert invoke("--train", data.train, "--val", data.val, *options).exit_code == 2


def test_settings_refuse_bad_values_when_made(data):
    for name, value in (
        ("batch_size", 0),
        ("lr", 0.0),
        ("device", "tpu"),
        ("workers", 0),
        ("arch", "resnet19"),
    ):
        with pytest.raises(ValueError, match=name):
            tiny(data, **{name: value})


@pytest.mark.parametrize(("arch", "size"), [("vit_b_16", 64), ("regnet_y_400mf", 32), ("inception_v3", 299)])
def test_models_are_built_for_the_size_of_the_images(arch, size):
    models.check_input(arch, num_classes=3, size=size, image_size=size, batch_size=2)


def test_images_of_another_size_than_a_vision_transformer_is_built_for_are_refused_before_training(data, tmp_path):
    for option, size in (("--val-size", "48"), ("--start-size", "16")):
        options = ("--arch", "vit_b_16", option, size, "--log-json", tmp_path / "none" / "log")
        result = invoke("--train", data.train, "--val", data.val, *TINY, *options)
        assert result.exit_code == 1, result.output
        assert f"vit_b_16 cannot be trained on 8 images of {size}x{size} pixels a step" in result.output
        assert result.output.count("\n") == 1


@pytest.mark.gpu
def test_the_net_learns_on_a_gpu_in_mixed_precision(data):
    results = train(tiny(data, device="cuda", epochs=8))
    assert results[-1]["val_top1"] >= 80


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_lack_of_memory_is_one_line_that_names_the_batch_size(device):
    says = r"^--batch-size 256: .* memory \(tried to allocate \d+\S* \w+\); use a smaller one, .*$"
    with pytest.raises(DeviceError, match=says), memory_errors(batch_size=256):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="shape"), memory_errors(batch_size=256):
        torch.ones(2) @ torch.ones(3, 2)


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(DeviceError, match="each needs its own"):
        find_device("cuda", local_rank=0, ranks_per_node=torch.cuda.device_count() + 1)
