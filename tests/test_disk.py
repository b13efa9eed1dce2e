"""What is said, and kept, where the operating system refuses something about a file."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from image_sets import make_image_folder
from liblmdb import plain_reading

from dali_lmdb.convert import convert
from dali_lmdb.disk import describe_lack, describe_os_error, sync_folder
from dali_lmdb.errors import ConversionError, StoreError
from dali_lmdb.store import open_store
from dali_lmdb.store.readahead import Readahead
from dali_lmdb.store.structure import check_structure

NOBODY = 65534

# Answers some calls on files of some kind with an error, as file systems do that cannot be mounted here.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int refused(const char *call, int fd) {
    char link[64], path[4096];
    struct stat status;
    const char *wanted = getenv("SHIM_CALL");
    if (!wanted || strcmp(wanted, call) || fstat(fd, &status)) return 0;
    if (getenv("SHIM_FOLDERS")) {
        errno = atoi(getenv("SHIM_ERRNO"));
        return S_ISDIR(status.st_mode);
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    errno = atoi(getenv("SHIM_ERRNO"));
    return strstr(path, ".lmdb") != NULL;
}
#define SYNC(name) int name(int fd) { \\
    int (*real)(int) = dlsym(RTLD_NEXT, #name); return refused("sync", fd) ? -1 : real(fd); }
SYNC(fsync)
SYNC(fdatasync)
#define MAP(name) void *name(void *a, size_t n, int p, int f, int fd, off_t o) { \\
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, #name); \\
    return fd >= 0 && refused("mmap", fd) ? MAP_FAILED : real(a, n, p, f, fd, o); }
MAP(mmap)
MAP(mmap64)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Run a command whose system calls fail: call(code, "sync" or "mmap", *arguments, folders=False)."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to answer system calls with errors")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True, capture_output=True)

    def call(code, which, *arguments, folders=False):
        environment = {"LD_PRELOAD": str(folder / "shim.so"), "SHIM_CALL": which, "SHIM_ERRNO": str(code)}
        return run(*arguments, **environment, **({"SHIM_FOLDERS": "1"} if folders else {}))

    return call


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def command(*arguments, limits="", **environment):
    """Run ``dali-lmdb`` in a shell that first sets limits."""
    line = f'{limits} exec "$0" -m dali_lmdb "$@"'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def in_child(work):
    """The message of the error of this package that ``work`` raises in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(writer, b"no error")
        except (ConversionError, StoreError) as error:
            os.write(writer, str(error).encode())
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


@pytest.fixture
def shared_folder():
    """A folder as /tmp is one: who may write there may not remove what is others'."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


# --- folders that cannot be synced

NOT_OFFERED = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF]


@pytest.mark.parametrize("code", NOT_OFFERED, ids=errno.errorcode.get)
def test_where_folders_cannot_be_synced_a_store_is_published_and_exported(shim, image_folder, tmp_path, code):
    target = tmp_path / "x.lmdb"
    done = shim(code, "sync", "-m", "dali_lmdb", "convert", image_folder, target, folders=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["x.lmdb"]
    done = shim(code, "sync", "-m", "dali_lmdb", "export", target, tmp_path / "out", folders=True)
    assert done.returncode == 0, done.stderr


def test_where_folders_cannot_be_synced_a_checkpoint_is_saved(shim, tmp_path):
    code = "import sys, pathlib; from dali_lmdb.train.checkpoint import save; save(pathlib.Path(sys.argv[1]), {})"
    done = shim(errno.EINVAL, "sync", "-c", code, tmp_path / "last.pt", folders=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_may_be_written_but_not_listed_is_no_failure(shared_folder):
    shared_folder.chmod(0o1333)

    def work():
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
        with pytest.raises(PermissionError):
            os.listdir(shared_folder)
        sync_folder(shared_folder)

    assert in_child(work) == "no error"


def test_a_disk_that_fails_to_sync_a_folder_is_told_and_the_conversion_can_end(shim, image_folder, tmp_path):
    target = tmp_path / "x.lmdb"
    arguments = ("-m", "dali_lmdb", "convert", image_folder, target)
    done = shim(errno.EIO, "sync", *arguments, folders=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {target}: cannot be published: Input/output error; the device failed;")
    assert run(*arguments).returncode == 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO], ids=errno.errorcode.get)
def test_a_file_that_cannot_be_synced_is_a_failure(shim, image_folder, tmp_path, code):
    done = shim(code, "sync", "-m", "dali_lmdb", "convert", image_folder, tmp_path / "x.lmdb")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'x.lmdb.partial'}: cannot be written: ")
    assert os.strerror(code) in done.stderr
    assert not (tmp_path / "x.lmdb").exists()


# --- maps


def test_a_file_system_without_maps_is_told_as_that(shim, store_path, image_folder, tmp_path):
    done = shim(errno.ENODEV, "mmap", "-m", "dali_lmdb", "info", store_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: {store_path}: cannot be read: No such device; "
        "its file system cannot map files into memory; copy it to a local disk\n"
    )
    done = shim(errno.ENODEV, "mmap", "-m", "dali_lmdb", "convert", image_folder, tmp_path / "x.lmdb")
    assert done.returncode == 1
    assert "cannot map files into memory" in done.stderr
    assert "make room" not in done.stderr


def test_too_little_address_space_is_told_as_that(store_path, tmp_path):
    giant = tmp_path / "giant.lmdb"
    shutil.copy(store_path, giant)
    os.truncate(giant, 1 << 42)  # sparse
    done = command("info", giant, limits="ulimit -v 67108864;")
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"Error: {giant}: cannot be read: Cannot allocate memory; this process may have "
    )
    assert "68,719,476,736 bytes of address space" in done.stderr
    assert done.stderr.endswith("raise the limit with: ulimit -v\n")


def test_a_lack_of_memory_or_threads_names_the_limit_that_is_set():
    def lack(limit, value, work):
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
        try:
            work()
        except Exception as error:
            raise ConversionError(str(describe_lack(error))) from error

    def start_thread():
        os.setuid(NOBODY)  # root may have any number
        Thread(target=print).start()

    message = in_child(lambda: lack(resource.RLIMIT_AS, 20 << 30, lambda: bytes(30 << 30)))
    assert message.startswith("no memory is left: this process may have 21,474,836,480 bytes of address space")
    assert message.endswith("ulimit -v")
    assert describe_lack(ImportError("x.so: failed to map segment from shared object")).startswith("no memory")
    assert describe_lack(RuntimeError("another")) is None
    if os.geteuid() == 0:
        message = in_child(lambda: lack(resource.RLIMIT_NPROC, 0, start_thread))
        assert message.startswith("no thread or process can be started: this process may have 0 processes")
        assert message.endswith("ulimit -u")


# --- the size of files


@pytest.mark.parametrize("name", ["convert", "export"])
def test_a_limit_on_the_size_of_files_is_told_and_not_the_disk(name, image_folder, store_path, tmp_path):
    source, kilobytes = (image_folder, 20) if name == "convert" else (store_path, 0)
    done = command(name, source, tmp_path / "x", limits=f"trap '' XFSZ; ulimit -f {kilobytes};")
    assert done.returncode == 1
    assert f"File too large; this process may have files of at most {kilobytes * 1024:,} bytes" in done.stderr
    assert "raise the limit with: ulimit -f" in done.stderr
    assert "free there" not in done.stderr


# --- open files


def test_too_few_open_files_for_all_shards_are_told_with_both_numbers(image_folder, tmp_path):
    done = command("convert", image_folder, tmp_path / "x.lmdb", "--shards", 12, limits="ulimit -n 20;")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'x.lmdb'}: converting to 12 files needs ")
    needed = int(done.stderr.split(" needs ")[1].split()[0])
    assert f"needs {needed} open files, the limit is 20; raise it with: ulimit -n " in done.stderr
    assert "--shards" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = command("convert", image_folder, tmp_path / "x.lmdb", "--shards", 12, limits=f"ulimit -n {needed};")
    assert done.returncode == 0, done.stderr


def test_open_files_of_the_processes_that_decode_are_counted(image_folder, tmp_path):
    options = (image_folder, tmp_path / "x.lmdb", "--check", "decode")
    done = command("convert", *options, "--threads", 12, limits="ulimit -n 60;")
    assert done.returncode == 1
    assert "open files, the limit is 60; raise it with: ulimit -n " in done.stderr
    assert done.stderr.endswith("or use fewer --shards or --threads\n")
    done = command("convert", *options, "--threads", 2, limits="ulimit -n 60;")
    assert done.returncode == 0, done.stderr


def test_too_few_open_files_to_decode_are_told_with_the_limit(store_path):
    done = command("verify", store_path, "--decode", limits="ulimit -n 8;")
    assert done.returncode == 1
    assert done.stderr == (
        "Error: no more files can be opened: this process may have 8 open files (hard limit 8); raise the limit "
        "with: ulimit -n\n"
    )


def test_a_soft_limit_of_open_files_is_raised_to_write_and_to_read_a_set(image_folder, tmp_path):
    target = tmp_path / "x.lmdb"
    done = command("convert", image_folder, target, "--shards", 24, limits="ulimit -Sn 20;")
    assert done.returncode == 0, done.stderr
    done = command("info", target, limits="ulimit -Sn 20;")
    assert done.returncode == 0, done.stderr
    done = command("info", target, limits="ulimit -n 20;")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {target}: a set of 24 shards needs ")
    assert " open files, the limit is 20; raise it with: ulimit -n " in done.stderr


@pytest.mark.parametrize("use", [open_store, check_structure])
def test_too_many_open_files_are_no_damage(store_path, use):
    pytest.importorskip("lmdb.verify")  # and imported before no more files can be opened

    def work():
        os.open(store_path, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        use(store_path)

    message = in_child(work)
    assert message.startswith(f"{store_path}: cannot be read: Too many open files; this process may have 3 open")
    assert message.endswith("raise the limit with: ulimit -n")


def test_liblmdbs_own_errors_of_the_system_are_told_with_their_advice(store_path):
    def work():
        store = open_store(store_path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with plain_reading(store):
            pass

    assert "Too many open files; this process may have 3 open files" in in_child(work)


# --- what belongs to others


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("ending", [".partial", ".partial-journal"])
@pytest.mark.parametrize("restart", [False, True], ids=["goes on", "restarts"])
def test_an_interrupted_conversion_of_another_user_is_told_with_their_name(shared_folder, ending, restart):
    images, target = make_image_folder(shared_folder / "images"), shared_folder / "x.lmdb"
    beside = Path(f"{target}{ending}")
    beside.write_bytes(b"")
    beside.chmod(0o600)

    def work():
        os.seteuid(NOBODY)
        convert(images, target, restart=restart)

    message = in_child(work)
    assert message.startswith(f"{beside}: ")
    assert "it belongs to root, with mode -rw-------, and you are nobody; ask root for access" in message
    assert "\n" not in message
    assert {path.name for path in shared_folder.iterdir()} == {"images", beside.name}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_journal_that_may_not_be_written_is_told_with_its_mode(image_folder, tmp_path):
    journal = tmp_path / "x.lmdb.partial-journal"
    journal.touch(0o444)
    with pytest.raises(ConversionError, match=r"it is yours, with mode -r--r--r--; change that with chmod"):
        convert(image_folder, tmp_path / "x.lmdb")


def test_a_folder_in_place_of_a_partial_file_is_told_in_one_line(image_folder, tmp_path):
    (tmp_path / "x.lmdb.partial").mkdir()
    with pytest.raises(ConversionError, match=r"x\.lmdb\.partial: a folder, expected none or a file that"):
        convert(image_folder, tmp_path / "x.lmdb")


def test_a_read_only_file_system_is_not_called_a_matter_of_permissions(image_folder, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(
            ConversionError, match="not writable: Read-only file system; its file system is read-only"
        ):
            convert(image_folder, folder / "x.lmdb")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- reading


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda folder: folder / ("x" * 300), "File name too long; choose a shorter name"),
        (lambda folder: link(folder / "a", to=folder / "a"), "symbolic links form a loop"),
        (lambda folder: folder / "file" / "x.lmdb", "Not a directory; a part of its path is not a folder"),
    ],
    ids=["too long", "circle", "in a file"],
)
def test_paths_that_cannot_be_followed_are_told_as_that(tmp_path, make, advice):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError) as info:
        open_store(make(tmp_path))
    assert advice in str(info.value)
    assert "permission" not in str(info.value)


def link(path, *, to):
    path.symlink_to(to)
    return path


def test_a_descriptor_that_fails_while_it_is_read_ahead_is_an_error_of_the_store(store_path):
    readahead = Readahead(open_store(store_path))
    records = np.arange(4)
    readahead.wait(records)
    [descriptor] = readahead._files.values()
    unreadable = os.open(os.devnull, os.O_WRONLY)
    os.dup2(unreadable, descriptor)
    os.close(unreadable)
    with pytest.raises(StoreError, match="cannot be read ahead: Bad file descriptor"):
        readahead.wait(records)
    readahead.close()


# --- the words


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EROFS, "its file system is read-only"),
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "check the disk"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "ulimit -v"),
        (errno.ENODEV, "copy it to a local disk"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ELOOP, "loop"),
        (errno.ESTALE, "mount"),
        (errno.EXDEV, "check the path"),
    ],
)
def test_each_cause_has_its_own_advice_and_only_permissions_are_called_so(tmp_path, code, advice):
    error = OSError(code, os.strerror(code))
    message = describe_os_error(tmp_path, "cannot be read", error, then="then try again")
    assert message.startswith(f"{tmp_path}: cannot be read: {os.strerror(code)}; ")
    assert advice in message
    assert message.endswith(", then try again")
    assert "permission" not in message
    assert "chmod" not in message
    assert "\n" not in message


def test_a_file_that_is_not_there_yet_is_refused_with_the_owner_of_its_folder(tmp_path):
    message = describe_os_error(tmp_path / "x", "cannot be made", OSError(errno.EACCES, "Permission denied"))
    assert f"its folder {tmp_path} is yours, with mode drwx------" in message
