"""``doctor``: each check says ok, or what is wrong and what to do, whatever the machine."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from damage import write_store

from dali_lmdb.convert import convert
from dali_lmdb.doctor import examine, libraries, machine, storage
from dali_lmdb.doctor.cgroup import cpu_limit, memory_limit, task_limit
from dali_lmdb.doctor.probe import PROBES
from dali_lmdb.doctor.processes import Reply, ask
from dali_lmdb.errors import StoreError

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
CARD = {"name": "NVIDIA H100", "memory": 80 * GIB, "capability": [9, 0]}
TORCH = {"version": "2.14.1", "cuda": "13.0", "gpus": [], "cause": "", "architectures": [], "nccl": [2, 30, 7]}
DALI = {"version": "2.4.0", "nvimagecodec": [0, 9, 0], "nvjpeg": [12, 4, 0]}
ENGINES = {"engines": 1, "cores_per_engine": 8}
VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Wed Jun  1 00:00:00 UTC 2026\nGCC version: 12\n"


def planted(root, files):
    """A tree with these files, by path."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def torch_with(**values):
    return Reply({**TORCH, **values})


def one(findings):
    (finding,) = findings
    assert (finding.state == "warning") == bool(finding.remedy)
    return finding


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dali_lmdb", "doctor", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# The command


def test_doctor_prints_the_same_findings_as_lines_and_as_json(store_path):
    lines, as_json = run(store_path), run(store_path, "--json")
    assert (lines.stderr, as_json.stderr) == ("", "")
    found = json.loads(as_json.stdout)
    assert lines.returncode == as_json.returncode == (0 if found["clean"] else 1)
    assert found["clean"] == all(finding["state"] != "warning" for finding in found["findings"])
    names = [finding["name"] for finding in found["findings"]]
    assert {"driver", "DALI", "cores", "memory", "shared memory", "store", "file system", "page cache"} <= set(
        names
    )
    assert [line.split()[0] for line in lines.stdout.splitlines()] == [one["state"] for one in found["findings"]]
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert (states["torch"], states["DALI"], states["store"]) == ("ok", "ok", "ok")


def test_nothing_that_a_machine_lacks_is_a_traceback(tmp_path):
    """Without /proc, /sys, libraries and store, each check says so in its line."""
    found = examine(
        tmp_path / "none.lmdb", root=tmp_path, probe=lambda names: dict.fromkeys(names, Reply(None, "no"))
    )
    states = {finding.name: finding.state for finding in found}
    unknown = ("NCCL", "GPUs", "GPU decoding", "cores", "memory", "shared memory", "file system", "page cache")
    assert {states[name] for name in unknown} == {"unknown"}
    assert {states[name] for name in ("torch", "DALI", "store")} == {"warning"}
    assert all("\n" not in finding.text for finding in found)


# Processes


@pytest.fixture
def probes(monkeypatch, tmp_path):
    """Lets processes have probes of a test's own, by way of their sys.path."""
    (tmp_path / "planted_boot.py").write_text(
        "import os, signal, sys, time\n"
        "def main(name, answer, store):\n"
        "    if name == 'hang': signal.pause()\n"
        "    if name == 'crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if name == 'fail': raise ImportError('libcuda.so.1: no such file')\n"
        "    open(answer, 'w').write('{\"fine\": true}')\n"
    )
    boot = "import sys; sys.path[:] = sys.argv[4:]; from planted_boot import main; main(*sys.argv[1:4])"
    monkeypatch.setattr("dali_lmdb.doctor.processes._BOOT", boot)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_library_that_hangs_crashes_or_fails_is_a_line_and_ends(probes):
    found = ask(["fine", "crash", "fail"])
    assert found["fine"] == Reply({"fine": True})
    assert found["crash"] == Reply(None, "crashed: SIGSEGV")
    assert found["fail"] == Reply(None, "ImportError: libcuda.so.1: no such file")
    assert ask(["hang"], timeout_s=0.2) == {"hang": Reply(None, "did not answer within 0.2 s")}
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any("planted_boot" in Path(f"/proc/{child}/cmdline").read_text() for child in children)


@pytest.mark.gpu
def test_on_a_gpu_dali_decodes_and_nvjpeg_tells_its_engines():
    found = ask(["torch", "dali", "gpu"])
    assert [probe.cause for probe in found.values()] == ["", "", ""]
    assert found["torch"].value["gpus"]
    assert set(found["gpu"].value) == set(ENGINES)


def test_every_probe_that_is_asked_exists():
    asked = []
    examine(probe=lambda names: asked.extend(names) or {name: torch_with(gpus=[CARD], **DALI) for name in names})
    assert set(asked) == set(PROBES)


def test_a_store_on_a_disk_that_does_not_answer_is_a_line(own_store):
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # says that somebody waits for the lease
    try:
        with open(own_store, "r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # others wait when they open the file
            hung = ask(["store", "page cache"], store=own_store, timeout_s=3)
    finally:
        signal.signal(signal.SIGIO, before)
    assert hung["store"] == hung["page cache"] == Reply(None, "did not answer within 3 s")
    answered = ask(list(storage.CHECKS), store=own_store)
    assert {reply.value[0]["state"] for reply in answered.values()} == {"ok"}
    no = dict.fromkeys(PROBES, Reply(None, "no"))
    found = {finding.name: finding for finding in examine(own_store, probe=lambda names: no | answered | hung)}
    assert found["store"].state == "warning"
    assert found["store"].text == f"{own_store}: its check did not answer within 3 s"
    assert (found["page cache"].state, found["file system"].state) == ("unknown", "ok")


# Libraries


@pytest.mark.parametrize(
    ("version", "cuda", "state", "text"),
    [
        ("580.65.06", "13.0", "ok", "580.65.06, new enough for DALI and torch (CUDA 13.0)"),
        ("570.1", "13.0", "warning", "570.1 is too old: torch (CUDA 13.0) needs 580.0"),
        ("525.59", "12.8", "warning", "525.59 is too old: DALI needs 525.60 and torch (CUDA 12.8) needs 525.60"),
        ("535.1", None, "ok", "535.1, new enough for DALI"),
    ],
)
def test_the_driver_is_compared_with_what_torch_and_dali_need(tmp_path, version, cuda, state, text):
    root = planted(tmp_path, {"proc/driver/nvidia/version": VERSION.format(version)})
    found = one(libraries.driver(root, torch_with(cuda=cuda)))
    assert (found.state, found.text) == (state, text)


def test_no_gpu_is_no_warning_and_says_what_it_means(tmp_path):
    assert one(libraries.driver(tmp_path, torch_with())).text.endswith("everything runs on the CPU")
    assert one(libraries.gpus(tmp_path, torch_with())).state == "ok"
    assert one(libraries.gpu_decoding(Reply(DALI), None)).text.startswith("not used here, for lack of a GPU")


def test_a_card_without_driver_is_a_warning(tmp_path):
    card = {
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    }
    root = planted(tmp_path, card)
    assert "docker run --gpus all" in one(libraries.driver(root, torch_with())).remedy
    assert one(libraries.gpus(root, torch_with(cuda=None))).text.startswith("torch is built for the CPU alone")


def test_a_driver_whose_gpus_cannot_be_used_is_a_warning_with_torchs_reason(tmp_path):
    root = planted(tmp_path, {"proc/driver/nvidia/version": VERSION.format("580.1")})
    found = one(libraries.gpus(root, torch_with(cause="CUDA unknown error")))
    assert found.state == "warning"
    assert found.text == "there is a driver, but no GPU can be used: CUDA unknown error"


@pytest.mark.parametrize(
    ("architectures", "state"),
    [
        (["sm_80", "sm_90"], "ok"),
        (["sm_80", "compute_80"], "ok"),
        (["sm_80"], "warning"),
        (["sm_100", "compute_100"], "warning"),
    ],
)
def test_a_torch_without_code_for_the_gpu_is_a_warning(tmp_path, architectures, state):
    assert one(libraries.gpus(tmp_path, torch_with(gpus=[CARD], architectures=architectures))).state == state


def test_what_decodes_on_the_gpu_is_said_with_engines_and_windows():
    texts = {found.name: found.text for found in libraries.gpu_decoding(Reply(DALI), Reply(ENGINES))}
    assert texts["JPEG engines"] == "1 with 8 cores each, for --hw-decoder-load"
    assert "older than 13.2" in texts["nvJPEG"]
    no_engine = list(
        libraries.gpu_decoding(Reply({**DALI, "nvjpeg": [13, 2, 0]}), Reply({**ENGINES, "engines": 0}))
    )
    assert [found.state for found in no_engine] == ["ok"] * 3
    assert no_engine[1].text.endswith("fancy")
    assert no_engine[2].text.startswith("none on this GPU")
    broken = one(libraries.gpu_decoding(Reply(DALI), Reply(None, "crashed: SIGSEGV")))
    assert broken.text == "DALI cannot decode on the GPU: crashed: SIGSEGV"


def test_several_gpus_need_nccl():
    assert one(libraries.nccl(torch_with(gpus=[CARD] * 2, nccl=None))).state == "warning"
    assert one(libraries.nccl(torch_with(gpus=[CARD] * 2))).text == "2.30.7, for 2 GPUs"
    assert one(libraries.nccl(torch_with(nccl=None))).state == "ok"


def distribution(folder, name, version, *requires):
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    planted(
        folder,
        {
            f"{name.replace('-', '_')}-{version}.dist-info/METADATA": "Metadata-Version: 2.1\n"
            + "\n".join(lines)
            + "\n"
        },
    )


def test_versions_that_do_not_fit_together_are_named(monkeypatch, tmp_path):
    distribution(tmp_path, "dali-lmdb", "0.1.0", "torch>=2.3", "isal>=1.6", "pytest>=8; extra == 'test'")
    distribution(tmp_path, "torch", "2.2.0+cu121")
    distribution(tmp_path, "torchvision", "0.18.0", "torch (==2.3.0)")
    for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda110"):
        distribution(tmp_path, name, "2.4.0", "gone ; sys_platform == 'win32'")
    import packaging.requirements  # noqa: F401  which the planted path does not have

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [finding.text for finding in libraries.versions() if finding.state == "warning"]
    assert found == [
        "dali-lmdb needs torch>=2.3, 2.2.0+cu121 is installed",
        "dali-lmdb needs isal>=1.6, none is installed",
        "torchvision needs torch==2.3.0, 2.2.0+cu121 is installed",
        "nvidia-dali-cuda110 and nvidia-dali-cuda120 overwrite each other's files",
    ]


# Machine

V1 = "4:memory:/docker/x\n3:pids:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/\n"


def test_limits_of_version_1_are_those_of_the_group_and_those_above(tmp_path):
    files = {
        "proc/self/cgroup": V1,
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/pids/pids.max": "500\n",  # as seen in a container, whose own group is at the top
        "sys/fs/cgroup/pids/pids.current": "20\n",
    }
    root = planted(tmp_path, files)
    assert (cpu_limit(root), memory_limit(root), task_limit(root)) == (1.5, 3 * GIB, 480)


def test_limits_of_version_2(tmp_path):
    group = "sys/fs/cgroup/user.slice/job"
    files = {
        "proc/self/cgroup": "0::/user.slice/job\n",
        f"{group}/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
        f"{group}/memory.max": "max\n",
        f"{group}/pids.max": "2000\n",
        f"{group}/pids.current": "1500\n",
    }
    root = planted(tmp_path, files)
    assert (cpu_limit(root), memory_limit(root), task_limit(root)) == (2.0, None, 500)


def small_machine(root, **files):
    return planted(
        root,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/meminfo": "MemTotal:       65536000 kB\nMemFree: 1 kB\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/memory.max": "2000000000\n",
            "sys/fs/cgroup/pids.max": "100\n",
        }
        | files,
    )


def test_a_small_container_is_three_warnings(tmp_path):
    root = small_machine(tmp_path)
    assert "limit is the time of 0.5" in one(machine.cores(root)).text
    assert one(machine.memory(root)).text == "2.0 GB of 67.1 GB (control group)"
    assert one(machine.processes(root)).text == "100 more in this control group"
    assert [one(check(root)).state for check in (machine.cores, machine.memory, machine.processes)] == [
        "warning"
    ] * 3


def test_little_shared_memory_is_a_warning(small_disk):
    (small_disk / "dev" / "shm").mkdir(parents=True)
    assert "docker run --shm-size 8g" in one(machine.shared_memory(small_disk)).remedy


def test_limits_of_the_process_are_warnings_with_the_command_that_lifts_them():
    code = (
        "import resource, sys; from dali_lmdb.doctor import machine\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))\n"
        "for found in (*machine.open_files(), *machine.other_limits()):\n"
        "    print(found.state, found.text, found.remedy)\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["warning", "warning"]
    assert "at most 100," in lines[0]
    assert lines[1].endswith("ulimit -v unlimited")


# Storage

Disk = namedtuple("Disk", "kind source rotational", defaults=("",))


def mounted(root, file, disk, *, device=None, name="sda"):
    """Plant what the kernel says of a disk, on which a file is."""
    number = os.stat(file).st_dev
    device = device or f"{os.major(number)}:{os.minor(number)}"
    point = str(file.parent).replace(" ", "\\040")
    lines = [
        "1 0 0:1 / / rw - overlay overlay rw",
        f"22 1 {device} / {point} rw,relatime shared:1 - {disk.kind} {disk.source} rw",
        "23 1 0:9 / /unrelated rw - nfs4 server:/x rw",
    ]
    planted(root, {"proc/self/mountinfo": "\n".join(lines) + "\n"})
    if disk.rotational:
        planted(root, {f"sys/devices/{name}/queue/rotational": disk.rotational + "\n"})
        (root / f"sys/devices/{name}/{name}1").mkdir()
        (root / "sys/dev/block").mkdir(parents=True)
        (root / "sys/dev/block" / device).symlink_to(root / f"sys/devices/{name}/{name}1")
    return root


@pytest.fixture
def own_store(image_folder, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    convert(image_folder, folder / "x.lmdb")
    return folder / "x.lmdb"


@pytest.mark.parametrize(
    ("disk", "name", "state", "text"),
    [
        (Disk("nfs4", "server:/data"), "sda", "warning", "nfs4, a network file system (server:/data)"),
        (Disk("fuse.s3fs", "s3fs"), "sda", "warning", "fuse.s3fs, a network file system (s3fs)"),
        (Disk("ext4", "/dev/sda1", "1"), "sda", "warning", "ext4 on /dev/sda1, a rotating disk"),
        (Disk("xfs", "/dev/nvme0n1p1", "0"), "nvme0n1", "ok", "xfs on /dev/nvme0n1p1, local, not rotating"),
        (Disk("ext4", "/dev/vda1", "1"), "vda", "ok", "ext4 on /dev/vda1, local, kind of disk unknown"),
        (Disk("tmpfs", "tmpfs"), "sda", "ok", "tmpfs on tmpfs, local, in memory"),
    ],
)
def test_the_file_system_of_the_store_is_judged(own_store, tmp_path, disk, name, state, text):
    root = mounted(tmp_path / "root", own_store, disk, name=name)
    found = one(storage.file_system(own_store, root))
    assert (found.state, found.text) == (state, text)


def test_a_file_system_with_another_number_is_found_by_its_path(own_store, tmp_path):
    root = mounted(tmp_path / "root", own_store, Disk("nfs4", "server:/data"), device="0:77")
    assert one(storage.file_system(own_store, root)).state == "warning"


def test_this_machines_own_file_system_is_found(own_store):
    assert one(storage.file_system(own_store, Path("/"))).state != "unknown"


def test_the_page_cache_is_measured_and_compared_with_the_memory(own_store, tmp_path):
    root = small_machine(tmp_path / "root")
    own_store.read_bytes()
    found = one(storage.page_cache(own_store, root))
    assert found.state == "ok"
    assert found.text.startswith("100% of ")
    with open(own_store, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert int(one(storage.page_cache(own_store, root)).text.split("%")[0]) < 100
    small = planted(root, {"sys/fs/cgroup/memory.max": "1000\n"})
    assert "does not fit" in one(storage.page_cache(own_store, small)).text


def test_shards_and_what_is_no_store_have_their_line(image_folder, tmp_path):
    convert(image_folder, tmp_path / "x.lmdb", shards=2)
    assert one(storage.store(tmp_path / "x.lmdb")).text == f"{tmp_path}/x.lmdb: 24 records"
    assert one(storage.page_cache(tmp_path / "x.lmdb", Path("/"))).text.count(" MB") >= 1
    assert one(storage.store(write_store(tmp_path / "empty.lmdb", []))).state == "warning"
    (tmp_path / "text.lmdb").write_text("no store")
    assert one(storage.store(tmp_path / "text.lmdb")).state == "warning"
    os.mkfifo(tmp_path / "pipe.lmdb")  # whose opening waits
    with pytest.raises(StoreError, match="a pipe, expected a file"):
        list(storage.page_cache(tmp_path / "pipe.lmdb", Path("/")))


def test_an_interrupt_ends_the_processes_that_ask(probes):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            ask(["hang"])
    finally:
        signal.signal(signal.SIGALRM, before)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any("planted_boot" in Path(f"/proc/{child}/cmdline").read_text() for child in children)
