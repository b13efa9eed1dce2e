"""What the options of the recipe do to a training run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
import torchvision
from click.testing import CliRunner
from test_train import data, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.errors import StateError
from dali_lmdb.train import checkpoint, preflight, train
from dali_lmdb.train.__main__ import main
from dali_lmdb.train.averaging import average_of
from dali_lmdb.train.optimizer import build_optimizer
from dali_lmdb.train.recipes import RECIPES
from dali_lmdb.train.schedule import learning_rate, sizes
from dali_lmdb.train.settings import RANGES, TrainSettings


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "lr": 1e-3, "zero_init_residual": True, "lr_scheduler": "linear"},
        {
            "opt": "sgd",
            "size": 64,
            "start_size": 32,
            "val_size": 48,
            "val_resize": 50,
            "epochs": 4,
            "batch_size": 24,
        }
        | {"lr_scheduler": "step", "lr_step_size": 1.0, "lr_gamma": 0.5, "lr_warmup_epochs": 0.5}
        | {"norm_weight_decay": 1e-4, "precision": "bfloat16"},
        {"interpolation": "cubic", "crop_scale": 0.5, "hflip": 0.0, "color_jitter": 0.4, "hue": 0.1},
        {"grayscale": 0.5, "random_erase": 0.5, "mixup_alpha": 0.2, "backend": "torch", "model_ema_decay": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_run_with_the_options_counts_every_record(data, options):  # noqa: F811
    results = train(tiny(data, **{"batch_size": 16} | options))
    assert [result["val_records"] for result in results] == [11] * options.get("epochs", 1)
    assert ("ema_val_top1" in results[0]) == ("model_ema_decay" in options)


@pytest.fixture
def smallest_net():
    """The name of a model that compiles in seconds, registered with torchvision."""

    def smallest_net(*, num_classes, weights=None):
        assert weights is None
        pooled = [torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)]
        return torch.nn.Sequential(*pooled, torch.nn.Flatten(), torch.nn.Linear(4, num_classes))

    smallest_net.__module__ = f"{torchvision.models.__name__}.smallest"
    torchvision.models._api.register_model()(smallest_net)
    yield "smallest_net"
    del torchvision.models._api.BUILTIN_MODELS["smallest_net"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_model_trains_as_it_does_uncompiled(data, smallest_net, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # starts no processes
    compiled, plain = (train(tiny(data, arch=smallest_net, compile=choice))[0] for choice in (True, False))
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)


def test_compiling_without_a_compiler_is_refused(data, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(
        ValueError, match=r"^--compile: .* there is no no-compiler; install g\+\+, .* leave it out$"
    ):
        preflight.check(tiny(data, compile=True), world_size=1, ranks_per_node=1)


def test_settings_given_now_rule_over_the_checkpoints_and_are_said(data, tmp_path, caplog):  # noqa: F811
    val = tmp_path / "val.lmdb"
    shutil.copy(data.val, val)
    settings = tiny(data, val=str(val), batch_size=24, output=str(tmp_path / "run"))
    train(settings)
    shutil.copy(data.train, val)
    caplog.set_level("INFO", logger="dali_lmdb")
    changed = replace(settings, resume=True, epochs=2, lr=3.0, momentum=0.5, weight_decay=0.25)
    train(changed)
    for line in (
        "lr 0.02 -> 3.0 ",
        "epochs 1 -> 2 ",
        "momentum 0.9 -> 0.5 ",
        "weight_decay 0.0001 -> 0.25 ",
        "val holds ",
    ):
        assert any(message.startswith(line) for message in caplog.messages), line
    groups = checkpoint.load(changed.checkpoint_path)["optimizer"]["param_groups"]
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.25), (0.5, 0.0)]
    for other, says in (
        ({"opt": "adamw"}, "opt"),
        ({"zero_init_residual": True}, "zero-init"),
        ({"seed": 1}, "seed"),
        ({"shuffle": "block"}, "order"),
        ({"train": str(data.val), "batch_size": 5}, "fingerprint"),
        ({"arch": "resnet34"}, "resnet34"),
    ):
        with pytest.raises(StateError, match=says):
            train(replace(changed, epochs=3, **other))
        with pytest.raises(StateError, match=says):  # before the ranks start
            preflight.check(replace(changed, epochs=3, **other), world_size=2, ranks_per_node=2)


def test_auto_scales_the_learning_rate_with_the_records_of_a_step(data):  # noqa: F811
    settings = tiny(data, lr="auto", batch_size=64, accumulate=2)
    assert settings.peak_lr(4) == pytest.approx(0.2)
    assert replace(settings, opt="adamw").peak_lr(2) == pytest.approx(2.5e-4)
    assert replace(settings, lr_base=0.5).peak_lr(2) == pytest.approx(0.5)
    assert replace(settings, lr=0.3).peak_lr(2) == 0.3


def test_norms_and_biases_have_a_decay_of_their_own(data):  # noqa: F811
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    groups = build_optimizer(model, tiny(data, weight_decay=0.5, norm_weight_decay=0.25)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.5), (3, 0.25)]


def test_the_step_schedule_falls_every_step_size():
    rates = [learning_rate(e, epochs=90, highest=1, scheduler="step", warmup_epochs=0) for e in (0, 29, 30, 60)]
    assert rates == pytest.approx([1, 1, 0.1, 0.01])


def test_sizes_grow_as_ffcvs():
    assert sizes(160, 192, epochs=16) == ((0, 160), (12, 192))
    assert sizes(64, 128, epochs=20) == ((0, 64), (15, 96), (16, 128))
    assert sizes(50, 50, epochs=20) == ((0, 50),)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("wrong", ["nan", "inf", "-1"])
def test_numbers_out_of_range_are_wrong_usage(name, wrong):
    option = f"--{name.replace('_', '-')}"
    result = CliRunner().invoke(main, ["--train", "none", "--val", "none", option, wrong])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_valid_settings(data, name):  # noqa: F811
    TrainSettings(train=str(data.train), val=str(data.val), **RECIPES[name].settings)


def test_normalising_over_ranks_on_the_cpu_is_refused_before_they_start(data):  # noqa: F811
    settings = tiny(data, sync_bn=True)
    preflight.check(settings, world_size=1, ranks_per_node=1)
    with pytest.raises(ValueError, match=r"^--sync-bn: .* leave it out$"):
        preflight.check(settings, world_size=2, ranks_per_node=2)


def test_options_rule_over_the_file_and_the_file_over_the_recipe(data, tmp_path):  # noqa: F811
    config, output = tmp_path / "run.toml", tmp_path / "out"
    config.write_text(
        f'recipe = "rn50-16"\ntrain = "{data.train}"\nval = "{data.val}"\narch = "resnet18"\nepochs = 5\n'
        'device = "cpu"\nworkers = 1\n'
        "start-size = 32\nval-size = 32\nval_resize = 32\nsize = 32\nbatch-size = 24\n"
    )
    result = CliRunner().invoke(main, ["--config", str(config), "--epochs", "3", "--output", str(output)])
    assert result.exit_code == 0, result.output
    saved = checkpoint.load(output / "last.pt")["settings"]
    found = {name: saved[name] for name in ("arch", "epochs", "lr_scheduler", "size", "label_smoothing")}
    wanted = {"arch": "resnet18", "epochs": 3, "lr_scheduler": "linear", "size": 32, "label_smoothing": 0.1}
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epohcs = 3", "epohcs"),
        ("x", "TOML"),
        ("epochs = 0", "--epochs"),
        ("epochs = 1.5", "'1.5' is not an integer"),
        ("world-size = 2.5", "--world-size"),
        ("epochs = true", "epochs is True, expected text or a number"),
        ("lr = [1]", "lr is [1], expected text or a number"),
        ("compile = 3", "compile is 3, expected true or false"),
    ],
)
def test_a_wrong_config_file_is_wrong_usage(tmp_path, text, says):
    (tmp_path / "run.toml").write_text(text)
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "run.toml"), "--train", "x", "--val", "x"])
    assert result.exit_code == 2
    assert says in result.stderr


def test_averaging_weights_reads_nothing_back_from_their_device():
    model = torch.nn.Linear(2, 1, device="meta")  # where no value can be read
    average = average_of(model, decay=0.9)
    for _ in range(3):
        average.update_parameters(model)
    assert int(average.n_averaged) == 3


def test_another_validation_size_than_a_recipes_has_its_own_resize(data, tmp_path):  # noqa: F811
    def settings(*options):
        log = tmp_path / f"{len(options)}.log"
        arguments = [
            "--train",
            data.train,
            "--val",
            data.val,
            "--recipe",
            "rn50-16",
            "--arch",
            "resnet18",
            "--size",
            32,
        ]
        arguments += [
            "--start-size",
            32,
            "--device",
            "cpu",
            "--epochs",
            1,
            "--lr-warmup-epochs",
            0,
            "--batch-size",
            8,
        ]
        arguments += ["--workers", 1, "--log-json", log, *options]
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return json.loads(log.read_text().splitlines()[0])["settings"]

    assert settings("--val-size", "48")["val_resize"] is None
    assert settings("--val-size", "48", "--val-resize", "60")["val_resize"] == 60
