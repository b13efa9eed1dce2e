"""Which rank a process is, as its environment says, and how ranks wait for each other."""

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from dali_lmdb import cli, torchrun
from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.torchrun import RankEnvironment, join

ROOT = Path(__file__).resolve().parents[1]
RANK_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
RANK_1 = RANK_0 | {"RANK": "1"}


@pytest.fixture
def port():
    """A free one, as text."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def start(*arguments, folder, **variables):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def commands(images, store):
    """The two commands that ranks may share."""
    tiny = "--arch resnet18 --batch-size 2 --size 32 --device cpu --workers 1 --epochs 1"
    return {
        "convert": ["-m", "dali_lmdb.convert", images, "x.lmdb", "--shards", "2"],
        "train": ["-m", "dali_lmdb.train", "--train", store, "--val", store, *tiny.split()],
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rank", [RANK_0, RANK_1], ids=["rank0", "rank1"])
def test_a_conversion_that_waits_for_ranks_says_so_and_can_be_stopped(image_folder, tmp_path, port, rank, number):
    arguments = commands(image_folder, None)["convert"]
    with start(*arguments, folder=tmp_path, **(rank | {"MASTER_PORT": port})) as process:
        assert process.stderr.readline().startswith("waiting for 2 ranks")
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "Stopped.\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_training_that_waits_for_ranks_says_so_and_can_be_stopped(store_path, tmp_path, port):
    with start(
        *commands(None, store_path)["train"], folder=tmp_path, **(RANK_0 | {"MASTER_PORT": port})
    ) as process:
        assert process.stdout.readline().startswith("waiting for 2 ranks (1 joined)")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


SHARED_WORK = """
import sys
from dali_lmdb.cli import Command
from dali_lmdb.convert.ranks import torchrun_ranks
from dali_lmdb.torchrun import RankEnvironment

with torchrun_ranks(RankEnvironment.from_environment(), say=print) as ranks:
    print(ranks.agree(None, ranks.rank), flush=True)
    if ranks.rank == 1:
        sys.stdin.read()
    ranks.agree(None, None)
"""


@pytest.mark.parametrize("told", [0, 1])
def test_a_rank_that_waits_for_another_can_be_stopped_and_notices_when_that_ends(tmp_path, port, told):
    ranks = []
    for rank in (RANK_0, RANK_1):
        ranks.append(start("-c", SHARED_WORK, folder=tmp_path, **(rank | {"MASTER_PORT": port})))
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "[0, 1]\n", rank.stderr.read()
        ranks[told].send_signal(signal.SIGINT)
        _, errors = ranks[told].communicate(timeout=60)
        assert errors.endswith("KeyboardInterrupt\n")
        _, errors = ranks[1 - told].communicate("", timeout=60)
        assert f"RankLostError: rank {1 - told}: another rank has ended; run the same command again" in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


ODD = [
    # (variables besides those of rank 0 of 2, what the one line says)
    ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment, expected a whole number"),
    ({"WORLD_SIZE": "4x"}, "WORLD_SIZE='4x' in the environment, expected a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment, expected ranks from 0 to WORLD_SIZE - 1"),
    ({"RANK": "2"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2 in the environment, expected ranks from 0"),
    ({"RANK": "-1"}, "RANK='-1' in the environment"),
    ({"LOCAL_RANK": ""}, "LOCAL_RANK='' in the environment"),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1, WORLD_SIZE=2, LOCAL_WORLD_SIZE=1"),
    ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
    ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two'"),
]


@pytest.mark.parametrize("name", ["convert", "train"])
@pytest.mark.parametrize(("odd", "says"), ODD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_an_odd_environment_is_one_line(image_folder, store_path, tmp_path, monkeypatch, name, odd, says):
    monkeypatch.chdir(tmp_path)
    arguments = [str(word) for word in commands(image_folder, store_path)[name][2:]]
    result = CliRunner().invoke(cli.main, [name, *arguments], env=RANK_0 | odd)
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert result.output.startswith("Error: ")
    assert says in result.output
    assert result.output.endswith("; start all ranks with torchrun, or unset RANK, LOCAL_RANK, WORLD_SIZE\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR in the environment of rank 0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_an_odd_meeting_point_is_one_line(image_folder, tmp_path, odd, says):
    target = tmp_path / "x.lmdb"
    result = CliRunner().invoke(cli.main, ["convert", str(image_folder), str(target)], env=RANK_0 | odd)
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert says in result.output


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK"])
def test_a_conversion_without_all_three_variables_is_made_alone_and_says_so(image_folder, tmp_path, missing):
    target = tmp_path / "x.lmdb"
    environment = RANK_1 | {"WORLD_SIZE": "4", missing: None}
    result = CliRunner().invoke(cli.main, ["convert", str(image_folder), str(target)], env=environment)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"note: WORLD_SIZE=4 in the environment is ignored without {missing}\n"
    assert target.exists()


def test_the_only_rank_works_alone(image_folder, tmp_path):
    target = tmp_path / "x.lmdb"
    environment = RANK_0 | {"WORLD_SIZE": "1", "MASTER_ADDR": None}
    result = CliRunner().invoke(cli.main, ["convert", str(image_folder), str(target)], env=environment)
    assert (result.exit_code, result.stderr) == (0, "")


def test_waiting_for_ranks_has_an_end(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(torchrun, "JOIN_LIMIT_S", 2)
    for rank, says in ((0, r"gave up waiting for 2 ranks \(1 joined\), after "), (1, "nothing listens at 127")):
        with pytest.raises(DaliLmdbError, match=says):
            join(RankEnvironment(rank=rank, world_size=2), say=print)


def test_a_rank_that_is_started_again_while_others_wait_counts_once(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(torchrun, "JOIN_LIMIT_S", 2)
    for _ in range(2):
        with pytest.raises(DaliLmdbError, match=r"3 ranks \(1 joined\)"):
            join(RankEnvironment(rank=1, world_size=3), say=print)


def test_a_conversion_whose_port_belongs_to_something_silent_can_be_stopped(image_folder, tmp_path):
    arguments = commands(image_folder, None)["convert"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with start(*arguments, folder=tmp_path, **(RANK_1 | {"MASTER_PORT": port})) as process:
            assert process.stderr.readline().startswith("waiting for 2 ranks: no key-value store answers at ")
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60) == ("", "Stopped.\n")
    assert process.returncode == 130


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(DaliLmdbError, match=r"^rank 0: no connection to the other ranks: .*EADDRINUSE.*$"):
            join(RankEnvironment(rank=0, world_size=2), say=print)


def started_by(*, rank, **variables):
    """Run a rank of two in an environment of these variables alone; it prints its rank and its number of ranks."""
    code = (
        "from dali_lmdb.torchrun import RankEnvironment, join\n"
        "ranks = RankEnvironment.from_environment()\n"
        "join(ranks, say=print)\n"
        "print(ranks.rank, ranks.local_rank, ranks.world_size, ranks.ranks_per_node)"
    )
    return start("-c", code, folder=ROOT, **{name: value.format(rank=rank) for name, value in variables.items()})


@pytest.mark.parametrize(
    "variables",
    [
        {
            "SLURM_PROCID": "{rank}",
            "SLURM_LOCALID": "{rank}",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_NODEID": "0",
            "SLURM_TASKS_PER_NODE": "2",
            "SLURM_NODELIST": "localhost",
        },
        {
            "OMPI_COMM_WORLD_RANK": "{rank}",
            "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
    ],
    ids=["srun", "mpirun"],
)
def test_tasks_of_srun_and_mpirun_are_ranks_that_meet(port, variables):
    if "SLURM_PROCID" in variables:
        variables = variables | {"SLURM_JOB_ID": port}
    ranks = [started_by(rank=rank, **variables) for rank in range(2)]
    for rank, process in enumerate(ranks):
        assert process.communicate(timeout=60)[0].splitlines()[-1] == f"{rank} {rank} 2 2"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 in the environment, but SLURM_PROCID and SLURM_LOCALID not set"),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},
            "SLURM_NTASKS=4 in the environment, but this is the batch script, not a step of srun; start the ranks",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_LOCAL_RANK not set"),
        ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE=4 in the environment, but LOCAL_RANK not set"),
    ],
)
def test_training_refuses_a_launcher_that_is_incomplete(store_path, variables, says):
    arguments = [str(word) for word in commands(None, store_path)["train"][2:]]
    result = CliRunner().invoke(cli.main, ["train", *arguments], env=variables)
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert says in result.output


def test_a_single_task_of_srun_is_no_rank(monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert RankEnvironment.from_environment() is None
    assert torchrun.incomplete_launcher() is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[003-010,12],gpu1", "n003"), ("a-b,c", "a-b"), ("r[1-2]n[3,5]", "r1n3"), ("", None)],
)
def test_the_first_host_of_a_node_list_is_found(nodes, host):
    assert torchrun.first_host(nodes) == host
