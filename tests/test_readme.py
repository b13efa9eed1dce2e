"""The README and the commands' options agree."""

import re
import shlex

import click
from test_packaging import ROOT, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")

# Options that go without saying.
NOT_IN_README = {"--version"}

# Options that README names and that are not ours: SLURM's, click's, torchrun's, docker's, PyTorch-LMDB's and those
# of timm and torchvision's references.
OTHERS_OPTIONS = {
    *("--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--signal", "--requeue"),
    *("--open-mode", "--kill-on-bad-exit"),
    "--help",
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts"),
    "--shm-size",
    *("--dataset", "--lmdb", "--wd", "--multiprocessing-distributed", "--rank", "--dist-url", "--gpu"),
    *("--data-path", "--auto-augment", "--aa", "--train-interpolation", "--no-prefetcher"),
}


def options_of(command):
    return {
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }


OPTIONS = {" ".join(words): options_of(command) for words, command in commands()}


def command_lines():
    """(command, its words) of every call of a command in the README's blocks of shell code."""
    for block in re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words[:-1]):
                if word == "dali-lmdb":
                    yield words[place + 1], words[place + 2 :]
                elif word.startswith("dali_lmdb.") and words[place - 1] == "-m":
                    yield word.removeprefix("dali_lmdb."), words[place + 1 :]
                elif word.startswith("scripts/") and word.endswith(".py"):
                    yield word.removeprefix("scripts/").removesuffix(".py"), words[place + 1 :]


def test_readme_names_every_option():
    every = set().union(*OPTIONS.values())
    assert every - set(OPTION.findall(README)) == NOT_IN_README


def test_every_option_in_readme_exists():
    every = set().union(*OPTIONS.values())
    assert set(OPTION.findall(README)) - every == OTHERS_OPTIONS


def test_every_command_line_in_readme_has_options_of_its_command():
    lines = [(command, words) for command, words in command_lines() if command in OPTIONS]
    assert {"convert", "train", "compare", "verify"} <= {command for command, _ in lines}
    wrong = [
        f"{command} {word}"
        for command, words in lines
        for word in words
        if word.startswith("--") and word not in OPTIONS[command]
    ]
    assert wrong == []
