"""The loaders inside Lightning, Fabric and Accelerate, unchanged; skipped where these are not installed."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_sets import MAX_RECORDS, make_image_folder

from dali_lmdb.convert import convert
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

# What they warn about is their own affair: loggers, their temporary folders, what will change in torch.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_RECORDS = 24
BATCH_SIZE, STEPS = 5, 4  # one record to spare
NUM_EPOCHS = 3
SHORT_RECORDS = 23  # of two ranks with 11 each, the last record goes to one
assert NUM_RECORDS <= MAX_RECORDS


def dali(path, **arguments):
    return DaliLoader(path, **arguments, batch_size=BATCH_SIZE, return_index=True, device="cpu", num_threads=1)


def pillow(path, **arguments):
    return TorchLoader(path, **arguments, batch_size=BATCH_SIZE, return_index=True, num_workers=0)


@pytest.fixture(params=[dali, pillow])
def loaders(request, store_path):
    """Makes a loader for training and one for validation."""

    def make():
        train = request.param(store_path, transform=TrainTransform(size=8), seed=2)
        return train, request.param(store_path, transform=EvalTransform(size=8, resize=8))

    return make


@pytest.fixture
def short_path(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=SHORT_RECORDS, classes=("a", "b", "c"))
    convert(folder, folder.with_suffix(".lmdb"))
    return folder.with_suffix(".lmdb")


@pytest.fixture
def planned(loaders):
    """Records of every training step of a run."""
    with loaders()[0] as loader:
        return [records.tolist() for _ in range(NUM_EPOCHS) for _, _, records in loader]


def lightning_run(loaders, folder, *, checkpoint=None, save_every=None, **options):
    """Fit a Lightning module; the records it was trained on, a list a step, and those of each validation."""
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 8, 3)
            self.trained, self.validated = [], []

        def train_dataloader(self):
            return loaders()[0]

        def val_dataloader(self):
            return loaders()[1]

        def training_step(self, batch, _):
            images, labels, records = batch
            self.trained.append(records.tolist())
            return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

        def on_validation_epoch_start(self):
            self.validated.append([])

        def validation_step(self, batch, _):
            images, labels, records = batch
            self.validated[-1] += records.tolist()
            correct = (self.layer(images.flatten(1)).argmax(1) == labels).float().mean()
            self.log("correct", correct, batch_size=len(labels))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=save_every
    )
    trainer = lightning.Trainer(
        max_epochs=NUM_EPOCHS,
        accelerator="cpu",
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Module()
    trainer.fit(module, ckpt_path=checkpoint)
    return module.trained, module.validated


def test_lightning_trains_on_the_planned_records_and_validates_on_all(loaders, planned, tmp_path):
    trained, validated = lightning_run(loaders, tmp_path)
    assert trained == planned
    first, *others = validated  # Lightning tries two steps before it trains
    assert first == list(range(2 * BATCH_SIZE))
    assert others == [list(range(NUM_RECORDS))] * NUM_EPOCHS


@pytest.mark.parametrize("save_every", [None, 2, 3], ids=["epoch", "two-steps", "three-steps"])
def test_lightning_goes_on_from_any_checkpoint_with_the_records_not_yet_seen(
    loaders, planned, tmp_path, save_every
):
    lightning_run(loaders, tmp_path, save_every=save_every)
    checkpoints = {int(path.stem.removeprefix("step=")): path for path in tmp_path.glob("*.ckpt")}
    assert sorted(checkpoints) == list(range(0, STEPS * NUM_EPOCHS + 1, save_every or STEPS))[1:]
    for step, path in checkpoints.items():
        trained, _ = lightning_run(loaders, tmp_path / "again", checkpoint=path)
        assert trained == planned[step:], step


def test_lightning_overfits_a_few_batches(loaders, planned, tmp_path):
    trained, validated = lightning_run(loaders, tmp_path, overfit_batches=2)
    assert trained == [step for epoch in range(NUM_EPOCHS) for step in planned[STEPS * epoch :][:2]]
    assert set(map(tuple, validated)) == {tuple(range(2 * BATCH_SIZE))}


TWO_RANKS = """
import sys
import lightning
import torch
from dali_lmdb import DaliLoader, EvalTransform, TrainTransform


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 3)

    def loader(self, transform):
        return DaliLoader(sys.argv[1], transform=transform, batch_size=11, device="cpu", num_threads=1)

    def train_dataloader(self):
        return self.loader(TrainTransform(size=8))

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch, _):
        self.log("records", float(len(batch[1])), reduce_fx="sum", sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False
)
module = Module()
val = module.loader(EvalTransform(size=8, resize=8))  # before Lightning makes the process group
trainer.fit(module, val_dataloaders=val)
if trainer.is_global_zero:
    print("validated", int(trainer.callback_metrics["records"]))
"""


@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="Lightning is not installed")
def test_two_lightning_ranks_validate_each_record_once_in_unequal_numbers_of_steps(short_path, tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), str(short_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert f"validated {SHORT_RECORDS}\n" in done.stdout, done.stdout + done.stderr


def test_fabric_refuses_a_loader_and_saves_its_place_without_that(loaders, planned, tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    train, _ = loaders()
    with pytest.raises(TypeError, match="Only PyTorch DataLoader"):  # README says what to do instead
        fabric.setup_dataloaders(train)
    for step, _ in enumerate(train):
        if step == 1:
            fabric.save(tmp_path / "last.ckpt", {"loader": train})
    again, _ = loaders()
    fabric.load(tmp_path / "last.ckpt", {"loader": again})
    assert [records.tolist() for _, _, records in again] == planned[2:STEPS]


def accelerate_run(loaders, folder, *, stop_after=None):
    """A loop as Accelerate's documentation has it, from the saved state if there is one; the records of each step.

    Returns:
        Records trained on, a list a step; number of records evaluated after each epoch.
    """
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(3 * 8 * 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = loaders()
    model, optimizer, train, val = accelerator.prepare(model, optimizer, *given)
    assert (train, val) == given
    accelerator.register_for_checkpointing(train)
    if folder.exists():
        accelerator.load_state(folder)
    trained, evaluated = [], []
    for epoch in range(train.epoch, NUM_EPOCHS):
        train.set_epoch(epoch)
        for images, labels, records in train:
            loss = torch.nn.functional.cross_entropy(model(images.flatten(1)), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            trained.append(records.tolist())
            if len(trained) == stop_after:
                accelerator.save_state(folder)
                return trained, evaluated
        counts = torch.zeros(2, device=accelerator.device)
        for images, labels, _ in val:
            correct = model(images.flatten(1)).argmax(1) == labels
            counts += torch.stack([correct.sum(), torch.tensor(len(labels))])
        evaluated.append(int(accelerator.reduce(counts, "sum")[1]))
    return trained, evaluated


def test_accelerate_trains_on_the_planned_records_and_goes_on_with_the_others(loaders, planned, tmp_path):
    trained, evaluated = accelerate_run(loaders, tmp_path / "none")
    assert trained == planned
    assert evaluated == [NUM_RECORDS] * NUM_EPOCHS
    for steps in (2, STEPS, STEPS + 3):
        folder = tmp_path / str(steps)
        assert accelerate_run(loaders, folder, stop_after=steps)[0] == planned[:steps]
        assert accelerate_run(loaders, folder)[0] == planned[steps:]


def test_accelerate_accumulates_no_gradients_over_the_end_of_an_epoch(loaders):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    train, val = loaders()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    try:
        synced = []
        for _ in range(2):
            for step, _ in enumerate(train):
                with accelerator.accumulate():
                    synced.append(accelerator.sync_gradients)
                if step == 1:  # evaluation inside an epoch, cut short or not, changes nothing
                    list(val)
                    next(iter(val))
        assert synced == [False, False, True, True] * 2
        val.close()
        assert not accelerator.gradient_state.in_dataloader
    finally:
        accelerator.gradient_state._reset_state()


def trainer_run(loader, *, state=None, num_steps=NUM_EPOCHS * STEPS):
    """A loop like that of transformers' Trainer: it takes a fixed number of batches and never asks for the end.

    Returns:
        Records of each step, and the loader's state after the last one.
    """
    done = 0
    if state is not None:
        loader.load_state_dict(state["loader"])
        done = state["done"]
    trained = []
    for epoch in range(done // STEPS, NUM_EPOCHS):
        loader.set_epoch(epoch)
        batches = iter(loader)
        for _, _, records in itertools.islice(batches, STEPS - (done + len(trained)) % STEPS):
            trained.append(records.tolist())
            if len(trained) == num_steps:
                return trained, {"loader": loader.state_dict(), "done": done + len(trained)}
    return trained, None


@pytest.mark.parametrize("num_steps", [2, STEPS, STEPS + 1])
def test_a_loop_that_takes_a_number_of_batches_goes_on_with_the_records_not_yet_seen(loaders, planned, num_steps):
    trained, state = trainer_run(loaders()[0], num_steps=num_steps)
    assert trained == planned[:num_steps]
    assert trainer_run(loaders()[0], state=state)[0] == planned[num_steps:]


@pytest.mark.parametrize("last_batch", ["pad", "short", "drop"])
def test_accelerate_gathers_as_much_for_the_last_batch_as_it_has_records(request, loaders, last_batch):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install accelerate")
    path = request.getfixturevalue("store_path")
    kind = type(loaders()[1])
    make = dali if kind is DaliLoader else pillow
    loader = make(path, transform=EvalTransform(size=8, resize=8), last_batch=last_batch)
    accelerator = accelerate.Accelerator(cpu=True)
    gathered, num_losses = [], 0
    for images, _, records in loader:
        gathered.append(accelerator.gather_for_metrics(records))
        # As in transformers' Trainer: the batch's loss, once for each image of a usual batch.
        num_losses += len(accelerator.gather_for_metrics(images.mean().repeat(BATCH_SIZE)))
    num_records = BATCH_SIZE * STEPS if last_batch == "drop" else NUM_RECORDS
    assert torch.cat(gathered).tolist() == list(range(num_records))
    assert num_losses == num_records


def test_a_rank_without_a_step_of_its_own_at_the_end_gathers_all_of_the_one_before(short_path):
    transform, ends = EvalTransform(size=8, resize=8), []
    for rank in range(2):
        with TorchLoader(
            short_path, transform=transform, batch_size=11, rank=rank, world_size=2, num_workers=0
        ) as loader:
            ends.append([(loader.end_of_dataloader, loader.remainder) for _ in loader])
    assert ends == [[(True, 0)], [(False, 0), (True, SHORT_RECORDS % 22)]]
