"""What an export leaves that is killed or interrupted twice: the same command deals with it, and nothing else."""

import os
import shutil

import pytest
from click.testing import CliRunner
from conversions import die, in_child

from dali_lmdb.errors import ConversionError
from dali_lmdb.inspect import commands, export


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(params=[False, True], ids=["files", "tar"])
def tar(request):
    return request.param


@pytest.fixture
def whole(store_path, tmp_path, tar):
    """The files of an undisturbed export."""
    folder = tmp_path / "whole" / "out"
    folder.parent.mkdir()
    export(store_path, folder, tar=tar)
    return files_in(folder)


def test_a_killed_export_is_started_over_by_the_same_command(store_path, tmp_path, tar, whole):
    status = in_child(lambda: export(store_path, tmp_path / "out", tar=tar, progress=die))
    assert os.WIFSIGNALED(status)
    assert files_in(tmp_path / "out.partial")
    export(store_path, tmp_path / "out", tar=tar)
    assert files_in(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["rmtree", "unlink", "scandir"])
def test_a_second_interrupt_says_what_is_left_and_the_same_command_starts_over(
    name, store_path, tmp_path, monkeypatch, image_folder
):
    with monkeypatch.context() as twice:
        twice.setattr(shutil if name == "rmtree" else os, name, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"out\.partial is left; the same command removes it"):
            with_interrupt(store_path, tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    export(store_path, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(image_folder)


def with_interrupt(store, folder):
    """Export with a Ctrl-C after some files; one in a class folder keeps it from being empty."""

    def after_a_file(progress):
        (folder.with_name(folder.name + ".partial") / "file").touch()
        raise KeyboardInterrupt

    export(store, folder, progress=after_a_file)


def test_the_command_says_which_of_both_it_was(store_path, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "interrupt_on_sigterm", lambda: None)
    monkeypatch.setattr("dali_lmdb.cli.ProgressBar.show", interrupt)
    arguments = [str(store_path), str(tmp_path / "out")]
    once = CliRunner().invoke(commands.export_command, arguments)
    assert (once.exit_code, list(tmp_path.iterdir())) == (130, [])
    assert once.stderr == "Stopped. Nothing was left behind; run the same command again to start over.\n"
    monkeypatch.setattr(shutil, "rmtree", interrupt)
    twice = CliRunner().invoke(commands.export_command, arguments)
    partial = tmp_path / "out.partial"
    assert (twice.exit_code, list(tmp_path.iterdir())) == (130, [partial])
    assert twice.stderr == f"Stopped. {partial} is left; the same command removes it and starts over.\n"


def test_a_running_export_is_not_disturbed_by_another(store_path, tmp_path, image_folder):
    refused = []

    def meanwhile(progress):
        with pytest.raises(ConversionError, match="remove it if no other export to") as info:
            export(store_path, tmp_path / "out")
        refused.append(str(info.value))

    export(store_path, tmp_path / "out", progress=meanwhile)
    assert refused
    assert files_in(tmp_path / "out") == files_in(image_folder)


def test_a_folder_that_no_export_left_is_left_alone(store_path, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("precious")
    with pytest.raises(ConversionError, match="already exists"):
        export(store_path, tmp_path / "out")
    assert files_in(partial) == {"mine": b"precious"}
    shutil.rmtree(partial)
    partial.symlink_to(tmp_path)
    with pytest.raises(ConversionError, match="already exists"):
        export(store_path, tmp_path / "out")
    assert partial.is_symlink()
