"""One rank of a run that may be killed and started again, for ``test_processes.py``.

Run by torchrun, or, as ``elastic_ranks.py JOB NUM_RANKS MAX_RESTARTS``, by the launcher that torchrun is made of,
with ranks that are forked, so that torch and DALI are imported once. ``JOB`` is a JSON file; see ``Job``.

Each rank writes a line of JSON for each step to ``rank-R`` in the job's folder: a killed rank loses nothing of
what it has written, and nothing else says what it trained on.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dali_lmdb import DaliLoader, EvalTransform, TorchLoader, TrainTransform
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.distributed import process_group


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: str
    train: str
    val: str
    backend: str
    batch_size: int
    epochs: int
    checkpoint_every: int
    kill: tuple[str, int, int] | None
    """(where, rank, step): in ``"train"`` or ``"val"`` that rank kills itself, having done that step of the first
    epoch, the first time round."""


def loader_of(job, path, transform, **arguments):
    arguments |= {"transform": transform, "batch_size": job.batch_size, "return_index": True}
    if job.backend == "dali":
        return DaliLoader(path, device="cpu", num_threads=1, **arguments)
    return TorchLoader(path, num_workers=0, **arguments)


class Rank:
    def __init__(self, job):
        self.job, self.rank = job, dist.get_rank()
        self.attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        self.log = os.open(Path(job.folder) / f"rank-{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.train_loader = loader_of(job, job.train, TrainTransform(size=8), seed=3, last_batch="short")
        self.val_loader = loader_of(job, job.val, EvalTransform(size=8, resize=8))

    def write(self, **line):
        os.write(self.log, json.dumps({"attempt": self.attempt, **line}).encode() + b"\n")

    def after_step(self, where, step):
        if self.job.kill == (where, self.rank, step) and self.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self):
        checkpoint = Path(self.job.folder) / "checkpoint.pt"
        if checkpoint.exists():
            self.train_loader.load_state_dict(torch.load(checkpoint, weights_only=True))
        start = self.train_loader.state_dict()
        self.write(where="start", epoch=start["epoch"], position=start["position"])
        while self.train_loader.epoch < self.job.epochs:
            epoch = self.train_loader.epoch
            for step, (_, _, records) in enumerate(self.train_loader):
                self.write(where="train", epoch=epoch, records=records.tolist())
                self.after_step("train", step)
                dist.all_reduce(torch.ones(1))  # where gradients would be averaged
                if self.rank == 0 and step % self.job.checkpoint_every == 0:
                    partial = checkpoint.with_suffix(".partial")
                    torch.save(self.train_loader.state_dict(), partial)
                    os.replace(partial, checkpoint)
            for step, (_, _, records) in enumerate(self.val_loader):
                self.write(where="val", epoch=epoch, records=records.tolist())
                self.after_step("val", step)
            dist.all_reduce(torch.ones(1))  # where results would be added up


def main(path):
    values = json.loads(Path(path).read_text())
    with process_group(RankEnvironment.from_environment(), device=torch.device("cpu")):
        Rank(Job(**values | {"kill": values["kill"] and tuple(values["kill"])})).run()


def launch(path, num_ranks, max_restarts):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        max_restarts=max_restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        start_method="fork",
        monitor_interval=0.05,
    )
    elastic_launch(config, main)(path)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        launch(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
