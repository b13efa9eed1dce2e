"""What is kept where a file system does not offer all that others do."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from dali_lmdb.disk import sync_folder
from dali_lmdb.errors import ConversionError, StoreError

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
    done = shim(errno.EINVAL, "sync", "-c", code, tmp_path / "checkpoint.pt", folders=True)
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
    assert done.stderr.startswith(f"Error: {target}: cannot be published: Input/output error;")
    assert run(*arguments).returncode == 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO], ids=errno.errorcode.get)
def test_a_file_that_cannot_be_synced_is_a_failure(shim, image_folder, tmp_path, code):
    done = shim(code, "sync", "-m", "dali_lmdb", "convert", image_folder, tmp_path / "x.lmdb")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'x.lmdb.partial'}: cannot be written: ")
    assert os.strerror(code) in done.stderr
    assert not (tmp_path / "x.lmdb").exists()
