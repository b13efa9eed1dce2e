"""Training and evaluation on one rank."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_lmdb.errors import DivergedError, StateError
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train import checkpoint
from dali_lmdb.train.averaging import average_of
from dali_lmdb.train.crashes import refuse_crashing
from dali_lmdb.train.data import open_data
from dali_lmdb.train.distributed import TIMEOUT, find_device, memory_errors, process_group
from dali_lmdb.train.evaluation import evaluate, top1_of
from dali_lmdb.train.interruption import Interrupted, Interruption, end
from dali_lmdb.train.metrics import EvaluationSums, JsonLog, StepMeter
from dali_lmdb.train.mixing import mixing_of
from dali_lmdb.train.models import build_model, training_loss
from dali_lmdb.train.optimizer import build_optimizer
from dali_lmdb.train.precision import arrange, autocast, choose_precision
from dali_lmdb.train.profiling import Profiler
from dali_lmdb.train.progress import RunProgress, TerminalLine, describe
from dali_lmdb.train.resuming import differences
from dali_lmdb.train.schedule import learning_rate
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.train.summary import summarise
from dali_lmdb.train.weights import find_weights, load_weights

__all__ = ["fits_beside", "train"]

# GPU memory that DALI may hold for the training and evaluation loaders together.
_LOADERS_BYTES = 1 << 30

_log = logging.getLogger(__name__)


def train(settings: TrainSettings, *, line: TerminalLine | None = None) -> list[dict[str, float]]:
    """Train and evaluate as this process's rank, as given by torchrun's environment; alone without it.

    Progress is logged to ``dali_lmdb.train`` on rank 0.

    Args:
        line: shows on rank 0 how the run goes on.

    Returns:
        The result of each evaluation, as in ``--log-json``.

    Raises:
        StoreError, SourceError, RecordError, DeviceError: data or GPUs are missing or bad.
        StateError: the checkpoint belongs to another data set, model or seed, another run writes to ``output``, or
            the checkpoint or the log cannot be written.
        DivergedError: the loss is no longer finite.
        SystemExit, KeyboardInterrupt: the run was interrupted, see ``interruption``; a checkpoint is saved.
    """
    ranks = RankEnvironment.from_environment() or RankEnvironment()
    device = find_device(settings.device, local_rank=ranks.local_rank, ranks_per_node=ranks.ranks_per_node)
    with ExitStack() as stack:
        if line is not None:
            stack.enter_context(line)
        stack.enter_context(memory_errors(batch_size=settings.batch_size))
        interruption = stack.enter_context(Interruption())
        if settings.output is not None and ranks.rank == 0:
            stack.enter_context(checkpoint.only_writer(Path(settings.output)))
        stack.enter_context(process_group(ranks, device=device))
        run = _Training(settings, ranks=ranks, device=device, stack=stack, interruption=interruption, line=line)
        run.restore()
        if run.epoch >= settings.epochs:
            return []
        run.refuse_crashing()
        if ranks.rank == 0:
            _log.info("settings: %s", run.describe_settings())
            _log.info("training %s", run)
        interruption.begin(world_size=ranks.world_size, timeout=TIMEOUT)
        try:
            results = []
            while run.epoch < settings.epochs:
                run.train_epoch()
                results.append(run.evaluate())
                run.end_epoch(results[-1])
        except Interrupted as interrupted:
            run.save_interrupted(by=str(interrupted))
            number = interrupted.number
        else:
            number = 0
        interruption.finish()  # rank 0 has saved
        if number:
            end(number)
        if ranks.rank == 0:
            run.summarise()
        return results


def fits_beside(train_bytes: int, val_bytes: int, *, budget_bytes: int) -> bool:
    """Whether the evaluation loader may keep its GPU memory while the training loader runs.

    Args:
        train_bytes, val_bytes: GPU memory that DALI holds for each of the two loaders; 0 without a GPU.
        budget_bytes: how much both may hold together.
    """
    return val_bytes == 0 or train_bytes + val_bytes <= budget_bytes


class _Training:
    """The state of one rank's run: model, optimizer, loaders and progress."""

    def __init__(
        self,
        settings: TrainSettings,
        *,
        ranks: RankEnvironment,
        device: torch.device,
        stack: ExitStack,
        interruption: Interruption | None = None,
        line: TerminalLine | None = None,
    ) -> None:
        self.settings, self.ranks, self.device = settings, ranks, device
        self.interruption = interruption or Interruption()
        self.epoch = 0
        self.step = 0
        """Number of steps done in this epoch."""
        self.records_done = 0
        """Number of records trained on in this epoch, over all ranks."""
        self.is_trained = False
        """Whether this epoch's training is over, and its evaluation is not."""
        self.result: dict[str, float] = {}
        """The last evaluation's."""
        self.best: dict[str, float] = {}
        """The evaluation with the highest top-1, see ``top1_of``."""
        self.precision = choose_precision(settings.precision, device=device)
        self.train_loader = stack.enter_context(self._loader(training=True))
        self.val_loader = stack.enter_context(self._loader(training=False))
        self._keeps_val_memory = fits_beside(
            self.train_loader.gpu_memory_bytes,
            self.val_loader.gpu_memory_bytes,
            budget_bytes=_LOADERS_BYTES,
        )
        torch.manual_seed(settings.seed)  # the same weights on all ranks
        num_classes = len(self.train_loader.classes)
        model = build_model(
            settings.arch,
            num_classes=num_classes,
            size=settings.size,
            zero_init_residual=settings.zero_init_residual,
        )
        self._load_weights(model)
        if settings.sync_bn and ranks.world_size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model = model.to(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # worthwhile, since images have one size
            self.model = self.model.to(memory_format=torch.channels_last)
        self.ddp_model: nn.Module = self.model  # wrapped only if there are several ranks
        if settings.compile:
            self.ddp_model = torch.compile(self.model)  # type: ignore[assignment]
        if ranks.world_size > 1:
            self.ddp_model = DistributedDataParallel(
                self.ddp_model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.ema = average_of(self.model, decay=settings.model_ema_decay) if settings.model_ema_decay else None
        self.optimizer = build_optimizer(self.model, settings)
        self.peak_lr = settings.peak_lr(ranks.world_size)
        self.mix = mixing_of(
            mixup_alpha=settings.mixup_alpha, cutmix_alpha=settings.cutmix_alpha, num_classes=num_classes
        )
        # Only float16 gradients underflow.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        own_log = settings.log_json if ranks.rank == 0 else None
        self.log = stack.enter_context(JsonLog(own_log, append=settings.resume))
        self.meter = StepMeter(device=device)
        self.progress = RunProgress(
            settings,
            num_records=self.train_loader.num_records,
            ranks=ranks,
            device=device,
            log=self.log,
            line=line,
        )
        stack.callback(self.progress.close)
        self.profiler = stack.enter_context(
            Profiler(settings.profile, folder=settings.output, rank=ranks.rank, device=device)
        )

    def _load_weights(self, model: nn.Module) -> None:
        """Load ``--weights`` on rank 0, whose model DDP sends to all, unless a checkpoint is resumed from."""
        settings, path = self.settings, self.settings.checkpoint_path
        if settings.weights is None or self.ranks.rank != 0:
            return
        if path is None or not (settings.resume and path.exists()):
            found = find_weights(settings.weights, arch=settings.arch)
            classes = self.train_loader.classes
            done = load_weights(found, model, arch=settings.arch, size=settings.size, classes=classes)
            _log.info("%s", done)

    def _loader(self, *, training: bool) -> Loader:
        return open_data(
            self.settings, training=training, ranks=self.ranks, device=self.device, precision=self.precision
        )

    def __str__(self) -> str:
        num_records, steps = self.train_loader.num_records, -(-len(self.train_loader) // self.settings.accumulate)
        precision = str(self.precision).removeprefix("torch.")
        return (
            f"{self.settings.arch} on {num_records} records of {len(self.train_loader.classes)} classes: "
            f"{steps} steps an epoch, {self.ranks.world_size} rank(s), {self.device.type}, {precision}"
            f"{_gpu_memory_held(self.train_loader, self.val_loader, kept=self._keeps_val_memory)}"
        )

    def describe_settings(self) -> str:
        """The settings that are not the default ones, and the learning rate, on one line."""
        changed = {"arch": self.settings.arch, **self.settings.changed(), "lr": f"{self.peak_lr:.4g}"}
        return ", ".join(f"{name} {value}" for name, value in changed.items() if name not in ("train", "val"))

    def train_epoch(self) -> None:
        """Train on the rest of the epoch."""
        if self.is_trained:
            return
        settings, loader = self.settings, self.train_loader
        if self.step == 0:
            loader.set_epoch(self.epoch)
        self.ddp_model.train()
        self.meter.reset()
        self.progress.begin_epoch(records_done=self.records_done)
        batches = iter(loader)
        while num_batches := min(settings.accumulate, self._batches_left):
            with self.profiler.range("step"):
                self._train_step(batches, num_batches)
            self.profiler.step()
            self.progress.step(epoch=self.epoch, step=self.step, records_done=self.records_done)
            if self.step % settings.log_every == 0:
                self._report_steps()
            # Not after the epoch's last step: `train` saves then anyway.
            due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
            if due and self._batches_left:
                self._report_steps()  # so that the log of a run resumed here counts each step once
                self.save()
            self.interruption.check()
        next(batches, None)  # ends the epoch of the loader
        self._report_steps()
        self.is_trained = True

    @property
    def _global_batch_size(self) -> int:
        return self.settings.batch_size * self.ranks.world_size

    @property
    def _batches_left(self) -> int:
        """Batches of this rank in the rest of the epoch."""
        return int(self.train_loader.num_records - self.records_done) // self._global_batch_size

    def _train_step(self, batches: Iterator[tuple[Tensor, ...]], num_batches: int) -> None:
        """Take one step with the mean gradient of the next batches."""
        lr = self._learning_rate(num_batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(num_batches):
            with self.profiler.range("data"):
                images, labels = self.meter.wait_for(lambda: next(batches))
            is_last = number == num_batches - 1
            with contextlib.nullcontext() if is_last else self._no_sync():
                loss = self._backward(images, labels, share=1 / num_batches)
            self.meter.add(loss=loss, num_images=len(labels))
            self.records_done += self._global_batch_size
            del images, labels  # the pipeline needs their memory for the next batch
        with self.profiler.range("optimizer"):
            self._update_weights()
        self.step += 1

    def _update_weights(self) -> None:
        if self.settings.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def _learning_rate(self, num_batches: int) -> float:
        settings = self.settings
        # The middle of the step, so that neither the first nor the last step has a rate of 0.
        done = (self.records_done + num_batches * self._global_batch_size / 2) / self.train_loader.num_records
        return learning_rate(
            self.epoch + min(done, 1.0),
            epochs=settings.epochs,
            highest=self.peak_lr,
            scheduler=settings.lr_scheduler,
            warmup_epochs=settings.lr_warmup_epochs,
            step_size=settings.lr_step_size,
            gamma=settings.lr_gamma,
        )

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Keep the gradients on this rank for now."""
        if isinstance(self.ddp_model, DistributedDataParallel):
            return self.ddp_model.no_sync()
        return contextlib.nullcontext()

    def _backward(self, images: Tensor, labels: Tensor, *, share: float) -> Tensor:
        """Add a batch's gradient to the parameters', and return its loss."""
        settings = self.settings
        torch.manual_seed(_step_seed(settings.seed, self.epoch, self.records_done, self.ranks.rank))
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        with autocast(self.device, self.precision):
            output = self.ddp_model(arrange(images))
            loss = training_loss(output, labels, arch=settings.arch, label_smoothing=settings.label_smoothing)
        self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        return loss

    def _report_steps(self) -> None:
        """Log the steps since the last report, if any; a collective."""
        if not self.meter.steps:
            return
        report = self.meter.report(all_sum=self._all_sum)
        if not math.isfinite(report["loss"]):
            raise DivergedError(
                f"the loss is {report['loss']} in epoch {self.epoch}, step {self.step}; try a lower --lr"
            )
        report["lr"] = self.optimizer.param_groups[0]["lr"]
        late_bytes = self.train_loader.stats().get("late_bytes", 0)
        self.progress.report(
            report, epoch=self.epoch, step=self.step, records_done=self.records_done, late_bytes=late_bytes
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluate all of the validation data, log the result and return it."""
        if self.ranks.world_size > 1:
            # DDP broadcasts rank 0's buffers (BatchNorm statistics) before each step, not after the last one.
            for buffer in [*self.model.buffers(), *(self.ema.module.buffers() if self.ema else ())]:
                dist.broadcast(buffer, src=0)
        loader = self.val_loader
        report = self._evaluate(self.model)
        if self.ema is not None:
            averaged = self._evaluate(self.ema.module)
            report |= {f"ema_{name}": value for name, value in averaged.items() if name != "val_records"}
        if not self._keeps_val_memory:
            loader.release_memory()  # not before the report, which waits until the GPU has read the last batch
        result = {"epoch": self.epoch, **report}
        if not math.isfinite(result["val_loss"]):
            raise DivergedError(
                f"the validation loss is {result['val_loss']} after epoch {self.epoch}; try a lower --lr"
            )
        self.progress.result(result)
        return result

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        loader = self.val_loader
        sums = EvaluationSums(num_classes=len(loader.classes), device=self.device)
        evaluate(model, self._interruptible(loader), add=sums.add, precision=self.precision)
        return sums.report(num_records=loader.num_records, all_sum=self._all_sum)

    def _interruptible(self, loader: Loader) -> Iterator[Any]:
        """This rank's batches of the evaluation; as many checks for interruptions on each rank."""
        num_steps, step = math.ceil(loader.num_records / self._global_batch_size), 0
        for batch in loader:
            yield batch
            step += 1
            self.progress.evaluating(epoch=self.epoch, step=step, steps=num_steps)
            self.interruption.check()
        for _ in range(num_steps - step):
            self.interruption.check()

    def end_epoch(self, result: dict[str, float]) -> None:
        """Go on to the next epoch, and save; the last checkpoint of a run must succeed."""
        self.result = result
        best = self.best
        is_best = not best or top1_of(result) > top1_of(best)
        if is_best:
            self.best = result
        also = [checkpoint.BEST_NAME] if is_best else []
        if self.settings.keep:
            also.append(checkpoint.epoch_name(self.epoch))
        self.epoch += 1
        self.step = self.records_done = 0
        self.is_trained = False
        if not self.save(also=also, is_last=self.epoch >= self.settings.epochs):
            self.best = best  # which is still what best.pt holds

    def summarise(self) -> None:
        """Log what came of the run, on rank 0."""
        history, images_per_s = self.progress.history, self.progress.images_per_s
        summarise(history, best=self.best, images_per_s=images_per_s, settings=self.settings)

    def save_interrupted(self, *, by: str) -> None:
        """Save where all ranks have agreed to stop, and say so; a collective."""
        self._report_steps()
        self.save(is_last=True)
        if self.ranks.rank == 0:
            path = self.settings.checkpoint_path
            saved = (
                "nothing is saved without --output" if path is None else f"saved in {path}; go on with --resume"
            )
            _log.info("interrupted by %s in epoch %d, after step %d: %s", by, self.epoch, self.step, saved)

    def _all_sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; a collective."""
        if self.ranks.world_size > 1:
            dist.all_reduce(values)
        return values

    def save(self, *, also: Sequence[str] = (), is_last: bool = False) -> bool:
        """Write the checkpoint, on rank 0; its content does not depend on the number of ranks.

        Args:
            also: its further names.
            is_last: raise StateError if it cannot be written; otherwise say so, and go on.

        Returns:
            False if it could not be written.
        """
        path = self.settings.checkpoint_path
        if path is None or self.ranks.rank != 0:
            return True
        content = {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "records_done": self.records_done,
            "is_trained": self.is_trained,
            "result": self.result,
            "best": self.best,
            "history": asdict(self.progress.history),
            "loader": self.train_loader.state_dict(),
            "classes": list(self.train_loader.classes),
            "val_fingerprint": self.val_loader.store.fingerprint,
            "settings": asdict(self.settings),
        }
        if not _all_finite(content["model"].values()):
            raise DivergedError(
                f"the model's weights are not finite in epoch {self.epoch}, step {self.step}; try a lower --lr"
            )
        try:
            checkpoint.save(path, content, also=also)
        except StateError as error:
            if is_last:
                raise
            _log.warning("%s; meanwhile training goes on", error)
            return False
        if self.settings.keep:
            checkpoint.remove_epochs(path.parent, keep=self.settings.keep)
        return True

    def restore(self) -> None:
        """Resume from the checkpoint, if requested and there is one."""
        path = self.settings.checkpoint_path
        if path is None or not self.settings.resume:
            self._begin_log()
            return
        content = self._read_checkpoint(path)
        if content is None:
            if self.ranks.rank == 0:
                _log.info("no checkpoint in %s yet: starting at the beginning", path.parent)
            self._begin_log()
            return
        classes = self.train_loader.classes
        checkpoint.check_fits(content, arch=self.settings.arch, classes=classes, path=path)
        self.train_loader.load_state_dict(content["loader"])
        changes = differences(content["settings"], self.settings, path=path)
        val_fingerprint = self.val_loader.store.fingerprint
        if content.get("val_fingerprint", val_fingerprint) != val_fingerprint:
            changes.append(f"val holds other records than before, by which {checkpoint.BEST_NAME} was chosen")
        for line in changes if self.ranks.rank == 0 else ():
            _log.info("%s", line)
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            if content.get("ema") is None:
                self.ema.module.load_state_dict(content["model"])  # it begins here
            else:
                self.ema.load_state_dict(content["ema"])
        # The settings given now, not those saved in the groups.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**content["optimizer"], "param_groups": groups})
        if content["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.records_done, self.is_trained = content["records_done"], content["is_trained"]
        self.result, self.best = content["result"], content["best"]
        self.progress.restore(content["history"])
        self._begin_log(changes)
        if self.ranks.rank != 0:
            return
        if self.epoch < self.settings.epochs:
            _log.info("resuming from %s: epoch %d, step %d", path, self.epoch, self.step)
        else:
            _log.info("training is complete, in %s; %s", path, describe(self.result))
            _log.info("best: %s, in %s", describe(self.best), path.with_name(checkpoint.BEST_NAME))

    def _begin_log(self, changes: Sequence[str] = ()) -> None:
        """Cut the log back to where the run resumes, or begin it with the settings.

        Args:
            changes: how the settings differ from the checkpoint's.
        """
        self.progress.begin(epoch=self.epoch, records_done=self.records_done)
        if self.settings.resume and self.settings.output is not None:
            place = {"epoch": self.epoch, "step": self.step}
            self.log.cut(output=self.settings.output, **place)
            if not self.log.is_empty and self.epoch < self.settings.epochs:
                self.log.write(resumed={**place, "world_size": self.ranks.world_size, "changes": list(changes)})
        if not self.settings.resume or self.log.is_empty:
            self.log.write(settings=asdict(self.settings))

    def refuse_crashing(self) -> None:
        """Do not decode again what has killed an earlier run in the output folder; a collective."""
        train, val, output = self.train_loader, self.val_loader, self.settings.output
        if output is not None and isinstance(train, DaliLoader) and isinstance(val, DaliLoader):
            refuse_crashing({"train": train, "val": val}, output=output, ranks=self.ranks)

    def _read_checkpoint(self, path: Path) -> dict[str, Any] | None:
        """Read it on rank 0, which wrote it, and send it to all ranks: other machines may not see the file."""
        found = [checkpoint.load(path) if self.ranks.rank == 0 and path.exists() else None]
        if self.ranks.world_size > 1:
            dist.broadcast_object_list(found, src=0)
        return found[0]


def _all_finite(values: Iterable[Tensor]) -> bool:
    """Whether all numbers of these tensors, which are on one device, are finite; waits for the device."""
    finite = [value.isfinite().all() for value in values if value.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())


def _gpu_memory_held(train: Loader, val: Loader, *, kept: bool) -> str:
    """How much GPU memory DALI holds, as the end of a sentence; empty if none."""
    train_gb, val_gb = train.gpu_memory_bytes / 1e9, val.gpu_memory_bytes / 1e9
    if not train_gb + val_gb:
        return ""
    if kept:
        return f"; DALI holds about {train_gb + val_gb:.1f} GB of GPU memory"
    return f"; DALI holds about {train_gb:.1f} GB of GPU memory, {train_gb + val_gb:.1f} GB in evaluation"


def _step_seed(seed: int, epoch: int, records_done: int, rank: int) -> int:
    """Seed for dropout and similar in one rank's step, so that there is no generator state to save."""
    text = f"{seed} {epoch} {records_done} {rank}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
