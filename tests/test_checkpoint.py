"""Checkpoint files: damage is always noticed, and what a full disk or a killed run leaves is no obstacle."""

import random
import zipfile
import zlib

import pytest
import torch

from dali_lmdb.errors import StateError
from dali_lmdb.train import checkpoint

CASES = 2000


def trained(epoch=3):
    """What a run saves, of a small model."""
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "classes": ["ant", "bee"],
        "loader": {"order": "full", "seed": 1, "position": 12},
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, trained())
    return path


def damaged(data, number):
    """The bytes of one case, different from ``data``."""
    rng = random.Random(number)
    place, kind = rng.randrange(len(data)), number % 4
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.choice((1, 2, 64, 4096))) + data[place:]
    if kind == 2:
        end = rng.randrange(place, len(data)) + 1
        return data[:place] + data[end:]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_damage_is_told_in_one_line(path):
    data = path.read_bytes()
    for number in range(CASES):
        path.write_bytes(damaged(data, number))
        with pytest.raises(StateError, match=r"^[^\n]*last\.pt: not a readable checkpoint: ") as error:
            checkpoint.load(path)
        assert len(str(error.value).splitlines()) == 1, f"case {number}"
    path.write_bytes(data)
    assert checkpoint.load(path)["epoch"] == 3


def test_every_flipped_bit_of_the_checksum_is_told(path):
    data = path.read_bytes()
    for bit in range(8 * (len(data) - 30), 8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(StateError, match="not a readable checkpoint"):
            checkpoint.load(path)


def test_a_checkpoint_is_a_whole_zip_archive_that_torch_reads(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"dali_lmdb crc32 ")
    for options in ({}, {"mmap": True}):
        content = torch.load(path, weights_only=True, **options)
        assert content["loader"] == trained()["loader"]
        assert content["model"]["weight"].shape == (4, 3)


def test_a_checkpoint_without_a_checksum_is_refused(path):
    torch.save({"format": 1, **trained()}, path)
    with pytest.raises(StateError, match=r"no checksum at its end, as if cut off or of a format before 2;"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_format_is_refused(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 4)
        checkpoint.save(path, trained())
    with pytest.raises(StateError, match=r"last\.pt: format 4, this version reads 3; choose"):
        checkpoint.load(path)


def test_what_torch_cannot_read_is_told_in_one_line(path):
    """A zip archive without members, with a right checksum."""
    data = b"PK\5\6" + bytes(16) + (24).to_bytes(2, "little")
    path.write_bytes(data + b"dali_lmdb crc32 %08x" % zlib.crc32(data))
    with pytest.raises(StateError, match=r"^[^\n]*last\.pt: not a readable checkpoint: [^\n]*$") as error:
        checkpoint.load(path)
    assert "checksum" not in str(error.value)


def test_a_full_disk_keeps_the_old_checkpoint_and_nothing_else(small_disk):
    path = small_disk / "last.pt"
    checkpoint.save(path, trained())
    says = r"last\.pt: cannot be written: No space left on device; make room on its disk, then .*--resume .*kept$"
    with pytest.raises(StateError, match=says):
        checkpoint.save(path, {"epoch": 4, "model": torch.zeros(100_000)})
    assert [file.name for file in small_disk.iterdir()] == ["last.pt"]
    assert checkpoint.load(path)["epoch"] == 3


def test_what_a_killed_run_was_writing_takes_no_room_from_the_next_save(small_disk):
    path = small_disk / "last.pt"
    (small_disk / "last.pt.partial").write_bytes(bytes(200_000))
    checkpoint.save(path, {"epoch": 4, "model": torch.zeros(40_000)})
    assert [file.name for file in small_disk.iterdir()] == ["last.pt"]
    assert checkpoint.load(path)["epoch"] == 4


def test_the_next_run_removes_what_a_killed_one_was_writing(path):
    path.with_name("last.pt.partial").write_bytes(b"half")
    with checkpoint.only_writer(path.parent):
        assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_what_a_running_one_is_writing_is_kept(path):
    partial = path.with_name("last.pt.partial")
    with checkpoint.only_writer(path.parent):
        partial.write_bytes(b"half")
        with pytest.raises(StateError, match="another run"), checkpoint.only_writer(path.parent):
            pass
        assert partial.exists()


def test_a_link_planted_where_a_checkpoint_is_written_is_not_followed(path, tmp_path):
    (tmp_path / "precious").write_text("30 hours of work")
    path.with_name("last.pt.partial").symlink_to(tmp_path / "precious")
    checkpoint.save(path, trained(epoch=4))
    assert (tmp_path / "precious").read_text() == "30 hours of work"
    assert checkpoint.load(path)["epoch"] == 4
    assert not path.is_symlink()


def test_a_missing_last_checkpoint_beside_others_is_not_taken_for_a_beginning(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"x")
    with pytest.raises(StateError, match=r"last\.pt is missing, but best\.pt is there: copy that to last\.pt"):
        checkpoint.check_folder(tmp_path, resume=True)
    (tmp_path / "last.pt").write_bytes(b"x")
    checkpoint.check_folder(tmp_path, resume=True)
