"""Weights to begin with: torchvision's, a checkpoint's or a state dict's; for other classes with a new head."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError
from dali_lmdb.store.regular import check_regular
from dali_lmdb.train import checkpoint
from dali_lmdb.train.models import state_shapes

__all__ = ["Weights", "check_name", "check_weights", "find_weights", "load_weights"]

_THEN = "give other --weights"
_WRAPPED_AS = ("state_dict", "model")  # by Lightning and timm; by torchvision's references
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_MOST_NAMED = 3


@dataclass(frozen=True)
class Weights:
    """A model's state, and where it comes from."""

    source: str
    state: Mapping[str, Tensor]
    classes: Sequence[str] | None = None
    """The classes it was trained on, if they are known by the names of a store."""


def check_name(weights: str, *, arch: str) -> None:
    """Raise ValueError, with the known names, if ``weights`` is neither a file nor one of torchvision's names."""
    if _named(weights, arch=arch) is not None or os.sep in weights or os.path.lexists(weights):
        return
    if Path(weights).suffix in _SUFFIXES:  # a file that is missing, which is said when it is read
        return
    if ":" in arch:
        raise ValueError(f"weights: {weights!r} is no file, and torchvision has no weights for {arch}")
    names = ", ".join(torchvision.models.get_model_weights(arch).__members__) or "none"
    raise ValueError(f"weights: {weights!r} is neither a file nor one of torchvision's for {arch}: {names}")


def find_weights(weights: str, *, arch: str) -> Weights:
    """Read weights onto the CPU; torchvision's are downloaded unless they are in torch hub's folder.

    Args:
        weights: ``"DEFAULT"`` or another name of torchvision's weights for ``arch``; or a file: a checkpoint of
            this package, of which the averaged weights are taken if it has any, or a state dict, plain or under
            ``"state_dict"`` or ``"model"``. Nothing in it is executed.

    Raises:
        ValueError: no such file or name.
        StateError: the file cannot be read or holds no state dict, or the download failed.
    """
    found = _named(weights, arch=arch)
    return _of_file(Path(weights)) if found is None else _of_torchvision(found, arch=arch)


def load_weights(weights: Weights, model: nn.Module, *, arch: str, size: int, classes: Sequence[str]) -> str:
    """Load weights into a model; what depends on the number of classes stays as it is if the classes differ.

    Returns:
        What was done, in one line.

    Raises:
        StateError: they are not those of such a model.
    """
    head = _head_to_replace(weights, arch=arch, size=size, classes=classes)
    # On top of the model's own state, which says of which version it is.
    state = model.state_dict()
    state.update((name, value) for name, value in weights.state.items() if name not in head)
    model.load_state_dict(state)
    if not head:
        return f"weights: {weights.source}"
    layers = sorted({name.rpartition(".")[0] or name for name in head})
    before = "other classes" if weights.classes is not None else f"{_num_classes(weights, head)} classes"
    return (
        f"weights: {weights.source}; {', '.join(layers)} starts from random weights, since they are for {before} "
        f"and the store has {len(classes)}"
    )


def check_weights(weights: Weights, *, arch: str, size: int, classes: Sequence[str]) -> None:
    """Raise StateError if weights are not those of a model for these classes or for others."""
    _head_to_replace(weights, arch=arch, size=size, classes=classes)


def _named(weights: str, *, arch: str) -> Any:
    """The member of torchvision's enumeration with this name, None if there is none.

    Raises:
        ValueError: they expect other images than ours.
    """
    if ":" in arch:
        return None
    known = torchvision.models.get_model_weights(arch)
    name = weights.rpartition(".")[2]
    if weights not in (name, f"{known.__name__}.{name}") or name not in known.__members__:
        return None
    if arch in ("googlenet", "inception_v3"):
        raise ValueError(
            f"weights: torchvision's for {arch} were trained on images normalised in another way, which this "
            "trainer cannot do; choose another --arch"
        )
    return known[name]


def _of_torchvision(found: Any, *, arch: str) -> Weights:
    file = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rpartition("/")[2]
    was_there = file.exists()
    try:
        # Nothing in the file is executed; after that, torchvision reads the same one without this precaution.
        found.get_state_dict(progress=False, check_hash=True, weights_only=True)
        # Some of the files have names of earlier versions, which only the model's own function translates.
        return Weights(str(found), torchvision.models.get_model(arch, weights=found, progress=False).state_dict())
    except Exception as error:  # torch raises almost anything on what it cannot read
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if was_there:
            raise StateError(
                f"{file}: not readable weights: {reason}; remove it, it is downloaded again"
            ) from error
        raise StateError(
            f"--weights {found.name}: {found.url} cannot be downloaded: {reason}; download it elsewhere and put "
            f"it into {file.parent}"
        ) from error


def _of_file(path: Path) -> Weights:
    with os_errors(path, "cannot be read", StateError, then=f"or {_THEN}"):
        check_regular(path, error=StateError)
        if checkpoint.is_one(path):
            content = checkpoint.load(path, then=_THEN)
            if content.get("ema") is None:
                return Weights(str(path), content["model"], content["classes"])
            averaged = {
                name.removeprefix("module."): value
                for name, value in content["ema"].items()
                if name.startswith("module.")
            }
            return Weights(f"{path}, averaged", averaged, content["classes"])
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as cause:  # torch raises almost anything on what it cannot read
            reason = " ".join(str(cause).split())[:200]
            if isinstance(cause, pickle.UnpicklingError):
                reason = "it holds more than tensors and plain values, or is damaged"
            raise StateError(f"{path}: not readable weights: {reason}; {_THEN}") from cause
    return Weights(str(path), _state_in(content, path))


def _state_in(content: Any, path: Path) -> dict[str, Tensor]:
    for name in _WRAPPED_AS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_entry, content.items())):
        raise StateError(f"{path}: holds no state dict, whose values are tensors; {_THEN}")
    state = dict(content)
    for prefix in (*_PREFIXES, *_PREFIXES):  # in either order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _head_to_replace(weights: Weights, *, arch: str, size: int, classes: Sequence[str]) -> list[str]:
    """Names of what depends on the number of classes and cannot be taken over.

    Raises:
        StateError: something else is missing, left over, or has another shape.
    """
    shapes = state_shapes(arch, num_classes=len(classes), size=size)
    others = state_shapes(arch, num_classes=len(classes) + 1, size=size)
    head = [name for name, shape in shapes.items() if others.get(name) != shape]
    found = {name: tuple(value.shape) for name, value in weights.state.items()}
    # Written by newer versions of torch only, and not used.
    missing = [name for name in shapes if name not in found and not name.endswith("num_batches_tracked")]
    wrong = [f"{name} is missing" for name in missing if name not in head]
    wrong += [f"{name} is not in the model" for name in found if name not in shapes]
    wrong += [
        f"{name} is {_by(found[name])} instead of {_by(shape)}"
        for name, shape in shapes.items()
        if name in found and name not in head and found[name] != shape
    ]
    if wrong:
        more = f", and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise StateError(
            f"{weights.source}: not the weights of a {arch}: {', '.join(wrong[:_MOST_NAMED])}{more}; {_THEN}"
        )
    fits = all(found.get(name) == shapes[name] for name in head)
    same = weights.classes is None or list(weights.classes) == list(classes)
    return [] if fits and same else head


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _num_classes(weights: Weights, head: Sequence[str]) -> str:
    sizes = {weights.state[name].shape[0] for name in head if name in weights.state and weights.state[name].ndim}
    return " or ".join(map(str, sorted(sizes))) or "no"
