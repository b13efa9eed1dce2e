import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dali_lmdb"

TOP_LEVEL = {
    "dali_lmdb",
    "scripts",
    "tests",
    "setup.cfg",
    "setup.py",
    "README.md",
    "LICENSE",
    ".ci",
    ".github",
    ".gitignore",
    ".ruff.toml",
}

# Which layers each layer may import from: errors <- images <- store <- plan <- loaders <- train <- evaluate
# <- view; and compare, beside evaluate.
MAY_IMPORT = {
    "errors": set(),
    "disk": {"errors"},
    "torchrun": {"errors"},
    "threads": set(),
    "figures": {"errors", "disk"},
    "isolated": {"errors"},
    "images": set(),
    "decoding": {"errors", "images", "isolated"},
    "store": {"errors", "disk", "images", "threads"},
    "convert": {"errors", "disk", "images", "decoding", "store", "torchrun", "threads"},
    "inspect": {
        *("errors", "disk", "images", "decoding", "isolated", "store", "plan", "threads", "figures"),
    },
    "plan": {"errors", "disk", "store"},
    "loaders": {"errors", "disk", "images", "decoding", "isolated", "store", "plan", "threads"},
    "doctor": {"errors", "images", "decoding", "store", "loaders"},
    "train": {"errors", "disk", "store", "plan", "loaders", "torchrun", "threads"},
    "evaluate": {"errors", "disk", "images", "store", "plan", "loaders", "torchrun", "train"},
    "view": {"errors", "disk", "images", "store", "plan", "loaders", "threads", "train", "evaluate"},
    "compare": {"errors", "disk", "figures", "store", "plan", "loaders", "threads", "train"},
}

# The top of the package: what users see and the commands; these may import from every layer.
TOP_MODULES = {"__init__", "__main__", "cli"}

# The modules of a layer that hold its commands; ``commands.py`` where there are several, so no ``python -m``.
COMMAND_MODULES = ("__main__.py", "commands.py")


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def modules():
    """Every module of the package, as its path relative to the package."""
    return [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


# What ``python -m`` may name.
MAIN_MODULES = [
    ".".join(["dali_lmdb", *Path(path).parent.parts]) for path in modules() if Path(path).name == "__main__.py"
]


def imported_names(path):
    """Full dotted names of all that a module of the package imports, anywhere in it.

    ``from a import b`` counts as ``a.b``, as b may be a module.
    """
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = ("dali_lmdb", *Path(path).parent.parts)
                base = [*package[: len(package) - node.level + 1], *base]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def layer(path):
    return Path(path).parts[0].removesuffix(".py")


def may_use(library, path):
    """Whether a library with one owner may be imported by a module."""
    return {
        "lmdb": path in ("store/writer.py", "store/structure.py"),
        "nvidia": path in ("compare/dali_reader.py", "decoding/dali.py", "doctor/probe.py")
        or path in (f"loaders/{name}.py" for name in ("pipeline", "run", "probe", "versions")),
        "PIL": path.startswith("images/") or path == "loaders/pillow_batches.py",
        "simplejpeg": path == "images/checking.py",
        "matplotlib": path in ("figures.py", "train/curves.py", "compare/plot.py", "inspect/plot.py"),
        "torch.utils.tensorboard": path == "train/scalars.py",
        "click": path == "cli.py" or Path(path).name in COMMAND_MODULES,
    }[library]


@pytest.mark.parametrize("path", modules())
def test_imports_point_one_way(path):
    if layer(path) in TOP_MODULES:
        return
    allowed = MAY_IMPORT[layer(path)] | {layer(path)}
    if Path(path).name in COMMAND_MODULES:
        allowed = allowed | {"cli"}
    imported = {name.split(".")[1] for name in imported_names(path) if name.startswith("dali_lmdb.")}
    assert imported <= allowed
    assert "dali_lmdb" not in imported_names(path), "the package itself is above every layer"


@pytest.mark.parametrize(
    "library", ["lmdb", "nvidia", "PIL", "simplejpeg", "matplotlib", "torch.utils.tensorboard", "click"]
)
def test_each_library_has_one_owner(library):
    users = [
        path for path in modules() if any(f"{name}.".startswith(f"{library}.") for name in imported_names(path))
    ]
    assert [path for path in users if not may_use(library, path)] == []
    assert users, f"nothing imports {library}: does this test still look at the right place?"


def test_no_two_public_classes_have_one_name():
    trees = [ast.parse((PACKAGE / path).read_text(encoding="utf-8")) for path in modules()]
    names = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    public = [name for name in names if not name.startswith("_")]
    assert [name for name in set(public) if public.count(name) > 1] == []


def test_importing_the_package_imports_neither_torch_nor_dali():
    code = "import sys, dali_lmdb; print(*{'torch', 'torchvision', 'nvidia.dali'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", ["dali_lmdb.convert.__main__", "dali_lmdb.inspect.commands"])
def test_commands_that_may_decode_import_neither_torch_nor_dali(module):
    """DALI takes 70 MB and 0.3 s, and decoding happens in other processes."""
    code = f"import sys, {module}; print(*{{'torch', 'nvidia.dali'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_can_be_imported():
    code = "import dali_lmdb; print(*[name for name in dali_lmdb.__all__ if not getattr(dali_lmdb, name)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def commands():
    """(words, command) for the group and everything in it."""
    from dali_lmdb.cli import main

    def walk(words, command):
        yield words, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                yield from walk((*words, name), command.get_command(context, name))

    return list(walk((), main))


def test_group_has_the_commands():
    assert {("convert",), ("train",), ("compare",), ("info",), ("verify",), ("export",)} <= {
        words for words, _ in commands()
    }


def test_every_command_says_what_it_does():
    assert [" ".join(words) for words, command in commands() if not command.help] == []


def test_every_option_says_what_it_does():
    silent = [
        f"{' '.join(words)} {option.opts[0]}"
        for words, command in commands()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []


def test_help_of_every_command_can_be_printed():
    from dali_lmdb.cli import main

    for words, _ in commands():
        result = CliRunner().invoke(main, [*words, "--help"])
        assert result.exit_code == 0, words
        assert result.output.startswith("Usage: "), words


@pytest.mark.parametrize(
    "words",
    [
        *[["-m", name] for name in MAIN_MODULES],
        ["scripts/convert.py"],
        ["scripts/make_demo_images.py"],
        ["scripts/gpu_report.py"],
        ["scripts/benchmarks/cold.py"],
        ["scripts/benchmarks/handover.py"],
        ["scripts/benchmarks/peers.py"],
    ],
    ids=" ".join,
)
def test_command_runs_from_a_checkout(words):
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")


def test_top_level_holds_nothing_unexpected():
    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != ROOT.resolve():
            pytest.skip("not in a git checkout of its own")
        tracked = git("ls-files", "-z").rstrip("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not in a git checkout: {error}")
    if not tracked:
        pytest.skip("nothing is tracked by git yet")
    assert {name.split("/")[0] for name in tracked.split("\0")} == TOP_LEVEL


def test_requirements_have_no_upper_end():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    requirements = "\n".join(lines).split()
    assert "torch>=2.3" in requirements
    assert [line for line in requirements if any(sign in line for sign in ("<", "==", "~="))] == []


def test_scripts_can_be_run_directly():
    scripts = [*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]
    runnable = [path for path in scripts if path.name != "venv.sh"]  # the others source it
    assert len(runnable) == 4
    for path in runnable:
        assert os.access(path, os.X_OK), path
        assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n"), path


def test_the_public_names_are_these_and_each_can_be_imported():
    import dali_lmdb

    assert dali_lmdb.__all__ == [
        "DaliLmdbError",
        "DaliLoader",
        "EvalTransform",
        "ImageFolderLMDB",
        "Normalize",
        "RecordError",
        "SourceError",
        "StateError",
        "Store",
        "StoreError",
        "TorchLoader",
        "TrainTransform",
        "open_store",
    ]
    assert all(hasattr(dali_lmdb, name) for name in dali_lmdb.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Loader'"):
        dali_lmdb.Loader  # noqa: B018


def test_no_module_is_named_as_a_library_that_it_imports():
    for path in modules():
        libraries = {part for name in imported_names(path) for part in name.split(".")[:1]}
        assert Path(path).stem not in libraries, path
