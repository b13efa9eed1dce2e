"""Training that begins with given weights, and models that a function of the user's builds."""

import http.server
import json
import os
import re
import threading
from dataclasses import asdict

import pytest
import torch
import torchvision
from click.testing import CliRunner
from test_train import CLASSES, data, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.errors import StateError
from dali_lmdb.train import checkpoint, preflight, train
from dali_lmdb.train.__main__ import main
from dali_lmdb.train.distributed import launch
from dali_lmdb.train.models import build_model
from dali_lmdb.train.recipes import RECIPES
from dali_lmdb.train.weights import Weights, check_weights, find_weights, load_weights

ARCH = "resnet18"


def model_of(num_classes, *, seed=7):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=num_classes)


def saved(path, content):
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def imagenet():
    """A ResNet-18 for 1000 classes."""
    return model_of(1000)


@pytest.fixture
def hub(tmp_path, monkeypatch, imagenet):
    """torch hub's folder, with torchvision's default weights in it, as far as a name can tell."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    torch.save(imagenet.state_dict(), folder / url.rpartition("/")[2])
    return folder


def assert_begins_as(checkpoint_path, state, *, but=("fc.",), moved=0.02):
    """A run of one step of a tiny learning rate ends near the weights that it began with."""
    trained = checkpoint.load(checkpoint_path)["model"]
    for name, value in state.items():
        if value.is_floating_point() and not name.startswith(but) and "running" not in name:
            assert (trained[name] - value).abs().max() < moved, name


def test_torchvisions_weights_are_taken_but_for_the_head(data, tmp_path, hub, imagenet, caplog):  # noqa: F811
    caplog.set_level("INFO", logger="dali_lmdb")
    train(tiny(data, weights="DEFAULT", lr=1e-6, output=str(tmp_path / "run")))
    assert (
        "weights: ResNet18_Weights.IMAGENET1K_V1; fc starts from random weights, since they are for 1000 classes "
        "and the store has 3" in caplog.messages
    )
    assert_begins_as(tmp_path / "run" / "last.pt", imagenet.state_dict(), moved=1e-3)


def test_two_ranks_begin_with_the_weights_that_rank_0_reads(data, tmp_path, imagenet):  # noqa: F811
    file = saved(tmp_path / "plain.pth", imagenet.state_dict())
    settings = tiny(data, weights=file, lr=1e-6, output=str(tmp_path / "run"), model_ema_decay=0.5)
    launch(["-m", "dali_lmdb.train.rank", json.dumps(asdict(settings))], world_size=2)
    assert_begins_as(tmp_path / "run" / "last.pt", imagenet.state_dict(), moved=1e-3)


def test_a_checkpoint_gives_its_averaged_weights_and_its_head_to_the_same_classes(data, tmp_path, caplog):  # noqa: F811
    train(tiny(data, output=str(tmp_path / "first"), model_ema_decay=0.5))
    best = tmp_path / "first" / "best.pt"
    found = find_weights(str(best), arch=ARCH)
    averaged = checkpoint.load(best)["ema"]
    model = build_model(ARCH, num_classes=3, size=32)
    assert load_weights(found, model, arch=ARCH, size=32, classes=CLASSES) == f"weights: {best}, averaged"
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[f"module.{name}"]), name
    # As many classes, but others: the head means something else.
    done = load_weights(found, model, arch=ARCH, size=32, classes=("blue", "green", "white"))
    assert done.endswith("fc starts from random weights, since they are for other classes and the store has 3")
    # A resumed run has its own weights, whether the file is still there or not.
    second = tiny(data, weights=str(best), output=str(tmp_path / "second"))
    preflight.check(second, world_size=1, ranks_per_node=1)
    train(second)
    os.remove(best)
    again = tiny(data, weights=str(best), output=str(tmp_path / "second"), resume=True, epochs=2)
    preflight.check(again, world_size=1, ranks_per_node=1)
    caplog.clear()
    assert len(train(again)) == 1
    assert not [message for message in caplog.messages if "weights" in message]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": "x"},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    ],
    ids=["state_dict", "model", "ddp", "compiled", "compiled_ddp", "old"],
)
def test_state_dicts_are_recognised_as_they_are_usually_saved(tmp_path, wrap):
    state = model_of(3).state_dict()
    found = find_weights(saved(tmp_path / "x.pt", wrap(state)), arch=ARCH)
    model = build_model(ARCH, num_classes=3, size=32)
    load_weights(found, model, arch=ARCH, size=32, classes=CLASSES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("arch", ["googlenet", "mobilenet_v3_small", "vit_b_32", "densenet121", "regnet_y_400mf"])
def test_what_depends_on_the_number_of_classes_is_found_in_any_model(arch):
    torch.manual_seed(1)
    state = build_model(arch, num_classes=7, size=64).state_dict()
    model = build_model(arch, num_classes=3, size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = load_weights(Weights("x", state), model, arch=arch, size=64, classes=CLASSES)
    replaced = {name for name, value in state.items() if value.shape != before[name].shape}
    assert replaced
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in replaced else state[name]), name
    layers = {name.rpartition(".")[0] for name in replaced}
    assert set(re.search("x; (.*) starts", done)[1].split(", ")) == layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "not readable weights"),
        (b"", "not readable weights"),
        ({}, "holds no state dict"),
        ([1], "holds no state dict"),
        ({"model": 3}, "holds no state dict"),
        (torch.nn.Linear(2, 3), "it holds more than tensors and plain values"),
        (
            torch.nn.Linear(2, 3).state_dict(),
            r"not the weights of a resnet18: conv1.weight is missing, .*, and \d+ more",
        ),
        (
            {**model_of(3).state_dict(), "conv1.weight": torch.zeros(2, 3)},
            "conv1.weight is 2 x 3 instead of 64 x 3 x 7 x 7",
        ),
        ({**model_of(3).state_dict(), "extra": torch.zeros(1)}, "extra is not in the model"),
    ],
    ids=range(9),
)
def test_what_is_not_the_models_weights_is_refused_in_one_line(data, tmp_path, content, message):  # noqa: F811
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    arguments = ["--train", data.train, "--val", data.val, "--arch", ARCH, "--weights", path, "--device", "cpu"]
    result = CliRunner().invoke(
        main, [str(argument) for argument in [*arguments, "--batch-size", 4, "--size", 32]]
    )
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("IMAGENET1K_V9", "neither a file nor one of torchvision's for resnet18: IMAGENET1K_V1"),
        ("ResNet50_Weights.DEFAULT", "neither a file nor one of torchvision's for resnet18"),
        ("none/x.pt", "none/x.pt: cannot be read: No such file or directory"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(data, weights, message):  # noqa: F811
    arguments = ["--train", data.train, "--val", data.val, "--arch", ARCH, "--weights", weights, "--device", "cpu"]
    result = CliRunner().invoke(
        main, [str(argument) for argument in [*arguments, "--batch-size", 4, "--size", 32]]
    )
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_network_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(StateError) as error:
            find_weights("ResNet18_Weights.IMAGENET1K_V1", arch=ARCH)
        proxy.shutdown()
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    assert str(error.value).startswith(f"--weights IMAGENET1K_V1: {url} cannot be downloaded: ")
    assert str(error.value).endswith(f"put it into {tmp_path}/hub/checkpoints")


@pytest.mark.parametrize("arch", ["densenet121", "mnasnet0_5"])
def test_files_of_torchvision_with_names_of_earlier_versions_are_read(tmp_path, monkeypatch, arch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    state = build_model(arch, num_classes=1000, size=224).state_dict()
    if arch == "densenet121":  # as published, see torchvision.models.densenet._load_state_dict
        old = {
            re.sub(r"(denselayer\d+\.(?:norm|relu|conv))([12])\.", r"\1.\2.", name): value
            for name, value in state.items()
            if "num_batches" not in name
        }
        assert old.keys() != state.keys()
    else:
        old = state
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    torch.save(old, folder / url.rpartition("/")[2])
    model = build_model(arch, num_classes=3, size=224)
    done = load_weights(find_weights("DEFAULT", arch=arch), model, arch=arch, size=224, classes=CLASSES)
    assert "since they are for 1000 classes and the store has 3" in done
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) or value.shape != state[name].shape, name


class Planted:
    def __reduce__(self):
        return open, (os.environ["PLANTED"], "w")


def test_torchvisions_file_is_read_without_executing_it_and_named_if_it_is_damaged(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "executed"))
    (file,) = hub.iterdir()
    for content in (Planted(), [1], b"", b"<html>404</html>", file.read_bytes()[:1000]):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(StateError, match=re.escape(str(file))) as error:
            check_weights(find_weights("DEFAULT", arch=ARCH), arch=ARCH, size=32, classes=CLASSES)
        assert "remove it" in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_weights_that_expect_images_normalised_in_another_way_are_refused(data):  # noqa: F811
    with pytest.raises(
        ValueError, match="torchvision's for googlenet were trained on images normalised in another way"
    ):
        tiny(data, arch="googlenet", weights="DEFAULT")


def test_a_name_of_torchvision_is_not_taken_for_a_folder(tmp_path, monkeypatch, hub):
    (tmp_path / "DEFAULT").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_weights("DEFAULT", arch=ARCH).source == "ResNet18_Weights.IMAGENET1K_V1"


MODELS = """
import torch
from torch import nn

def tiny(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))

def with_values(num_classes):
    drop = [x.item() for x in torch.linspace(0, 0.1, 3)]  # as timm's
    return nn.Sequential(nn.Dropout(drop[2]), tiny(num_classes))

def raises(num_classes):
    raise KeyError("head")

def no_module(num_classes):
    return 3

def wrong_shape(num_classes):
    return nn.Flatten()

def no_classes():
    return nn.Identity()

constant = 3
"""


@pytest.fixture
def models_module(tmp_path, monkeypatch):
    (tmp_path / "finetune_models.py").write_text(MODELS)
    (tmp_path / "finetune_broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    return "finetune_models"


def test_a_function_of_the_users_builds_the_model_on_every_rank(data, tmp_path, models_module):  # noqa: F811
    settings = tiny(data, arch=f"{models_module}:tiny", output=str(tmp_path / "run"), epochs=2)
    preflight.check(settings, world_size=2, ranks_per_node=2)
    launch(["-m", "dali_lmdb.train.rank", json.dumps(asdict(settings))], world_size=2)
    content = checkpoint.load(tmp_path / "run" / "best.pt")
    assert content["model"]["2.weight"].shape == (3, 12)
    assert content["settings"]["arch"] == f"{models_module}:tiny"
    for name in ("with_values", "tiny"):
        preflight.check(tiny(data, arch=f"{models_module}:{name}"), world_size=1, ranks_per_node=1)
    # And it is fine-tuned like any other.
    found = find_weights(str(tmp_path / "run" / "best.pt"), arch=settings.arch)
    check_weights(found, arch=settings.arch, size=32, classes=(*CLASSES, "white"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--arch", "no_such_module:f"],
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            ["--arch", "finetune_models:none"],
            "cannot be imported: AttributeError: module 'finetune_models' has no attribute 'none'",
        ),
        (["--arch", "finetune_models:"], "cannot be imported"),
        (["--arch", ":tiny"], "cannot be imported"),
        (["--arch", "finetune_models:constant"], "cannot be called with num_classes=N"),
        (["--arch", "finetune_models:no_classes"], "cannot be called with num_classes=N"),
        (["--arch", "..x:f"], "cannot be imported"),
        (["--arch", "finetune_broken:f"], "cannot be imported: SyntaxError"),
        (["--arch", "finetune_models:raises"], "raised KeyError: 'head', when called with num_classes=3"),
        (["--arch", "finetune_models:no_module"], "returned a int, expected a torch.nn.Module"),
        (["--arch", "finetune_models:wrong_shape"], "gives (2, 3072), expected logits of shape (2, 3)"),
        (
            ["--arch", "finetune_models:tiny", "--weights", "DEFAULT"],
            "torchvision has no weights for finetune_models",
        ),
        (["--arch", "finetune_models:tiny", "--zero-init-residual"], "is not one of torchvision's ResNets"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_function_that_does_not_fit_is_refused_in_one_line(data, models_module, options, message):  # noqa: F811
    arguments = ["--train", data.train, "--val", data.val, "--device", "cpu", "--batch-size", 4, "--size", 32]
    result = CliRunner().invoke(main, [str(argument) for argument in [*arguments, *options]])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_recipe_for_fine_tuning_begins_with_torchvisions_weights(data, tmp_path, hub):  # noqa: F811
    log = tmp_path / "log"
    arguments = ["--train", data.train, "--val", data.val, "--recipe", "finetune", "--epochs", 1, "--size", 32]
    arguments += ["--device", "cpu", "--log-json", log, "--batch-size", 8, "--workers", 1]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    settings = json.loads(log.read_text().splitlines()[0])["settings"]
    given = ("epochs", "batch_size")
    assert settings["weights"] == "DEFAULT"
    expected = {name: value for name, value in RECIPES["finetune"].settings.items() if name not in given}
    assert {name: settings[name] for name in expected} == expected


def test_a_recipes_weights_can_be_left_out_for_a_function(data, tmp_path, models_module):  # noqa: F811
    log = tmp_path / "log"
    arguments = [
        "--train",
        data.train,
        "--val",
        data.val,
        "--recipe",
        "finetune",
        "--arch",
        f"{models_module}:tiny",
    ]
    arguments += ["--weights", "none", "--epochs", 1, "--size", 32, "--device", "cpu", "--log-json", log]
    result = CliRunner().invoke(
        main, [str(argument) for argument in [*arguments, "--batch-size", 8, "--workers", 1]]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(log.read_text().splitlines()[0])["settings"]["weights"] is None
