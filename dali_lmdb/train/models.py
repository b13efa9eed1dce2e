"""The model: one of torchvision's classification models by name, or what a function of the user's returns."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["build_model", "check_arch", "check_input", "check_zero_init", "state_shapes", "training_loss"]

# Weights of the auxiliary classifiers' losses, from the papers and torchvision
# (Szegedy et al. 2014, section 5; Szegedy et al. 2015, section 4, as in PyTorch's fine-tuning tutorial).
_AUXILIARY_LOSS_WEIGHTS = {"googlenet": 0.3, "inception_v3": 0.4}


def check_arch(arch: str) -> None:
    """Raise ValueError if there is no such model.

    Args:
        arch: name of a classification model of torchvision, or ``"MODULE:FUNCTION"``.
    """
    if ":" in arch:
        _function(arch)
        return
    names = torchvision.models.list_models(module=torchvision.models)
    if arch in names:
        return
    near = difflib.get_close_matches(arch, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "for example resnet18 or resnet50"
    raise ValueError(f"arch: torchvision has no classification model {arch!r}; {hint}")


def check_zero_init(arch: str) -> None:
    """Raise ValueError if torchvision cannot zero the last normalisation of the model's residual blocks."""
    if ":" in arch or torchvision.models.get_model_builder(arch).__module__ != torchvision.models.resnet.__name__:
        raise ValueError(f"zero_init_residual: {arch} is not one of torchvision's ResNets")


def build_model(arch: str, *, num_classes: int, size: int, zero_init_residual: bool = False) -> nn.Module:
    """Make a model, in float32 on the CPU (or on the current default ``torch.device``).

    Args:
        arch: name of a model of torchvision, which gets random weights; or ``"MODULE:FUNCTION"``, which is called
            with ``num_classes`` and returns a module.
        size: height and width of the images, in pixels; vision transformers are built for one size.
        zero_init_residual: start with residual blocks that pass their input through.

    Raises:
        ValueError: the function does not return a module.
    """
    if ":" in arch:
        function = _function(arch)
        try:
            made = function(num_classes=num_classes)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"arch: {arch} raised {found}, when called with num_classes={num_classes}") from error
        if not isinstance(made, nn.Module):
            raise ValueError(f"arch: {arch} returned a {type(made).__name__}, expected a torch.nn.Module")
        return made
    options: dict[str, Any] = {}
    if zero_init_residual:
        options["zero_init_residual"] = True
    if arch.startswith("vit_"):
        options["image_size"] = size
    elif arch.startswith("maxvit_"):
        options["input_size"] = (size, size)
    elif arch in _AUXILIARY_LOSS_WEIGHTS:
        options["init_weights"] = True  # the default, which torchvision warns about
    model: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **options)
    return model


def _function(arch: str) -> Callable[..., Any]:
    """Import a user's function; the current folder comes first, as for ``python -m``."""
    module_name, _, name = arch.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the module does
        raise ValueError(f"arch: {arch} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        inspect.signature(function).bind(num_classes=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"arch: {arch} cannot be called with num_classes=N: {error}") from error
    return function  # type: ignore[no-any-return]


def state_shapes(arch: str, *, num_classes: int, size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each entry of the model's state dict."""
    try:
        with torch.device("meta"):  # needs no memory
            model = build_model(arch, num_classes=num_classes, size=size)
    except (NotImplementedError, RuntimeError, ValueError):  # what computes with tensors while it is made
        model = build_model(arch, num_classes=num_classes, size=size)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_input(arch: str, *, num_classes: int, size: int, image_size: int, batch_size: int) -> None:
    """Raise ValueError if the model cannot be trained or evaluated on images of a size.

    Args:
        size: that the model is built for.
        image_size: of the images.

    Runs a model of torchvision on the meta device, where tensors have shapes but no values, so it needs no memory;
    any other on the CPU, on at most two images.
    """
    if ":" in arch:
        model = build_model(arch, num_classes=num_classes, size=size)
        _check_function_input(arch, model, num_classes=num_classes, size=image_size, batch_size=min(batch_size, 2))
        return
    try:
        with torch.device("meta"):
            model = build_model(arch, num_classes=num_classes, size=size)
            model.train()(torch.empty(batch_size, 3, image_size, image_size))
    except NotImplementedError:
        return  # RegNet computes its layers' widths with tensors, which need values; it accepts any size
    except (RuntimeError, ValueError, AssertionError) as cause:
        raise _unfit(arch, size=image_size, batch_size=batch_size, cause=cause) from cause


def _check_function_input(arch: str, model: nn.Module, *, num_classes: int, size: int, batch_size: int) -> None:
    try:
        output = model.train()(torch.zeros(batch_size, 3, size, size))
    except Exception as cause:
        raise _unfit(arch, size=size, batch_size=batch_size, cause=cause) from cause
    if not isinstance(output, Tensor) or output.shape != (batch_size, num_classes):
        found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"arch: {arch} gives {found}, expected logits of shape {(batch_size, num_classes)}")


def _unfit(arch: str, *, size: int, batch_size: int, cause: Exception) -> ValueError:
    return ValueError(
        f"arch: {arch} cannot be trained on {batch_size} images of {size}x{size} pixels a step: "
        f"{' '.join(str(cause).split())}; choose another --size or --batch-size"
    )


def training_loss(output: Any, labels: Tensor, *, arch: str, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy, plus the weighted cross entropy of the auxiliary classifiers of GoogLeNet and Inception.

    Args:
        output: the model's output in training: logits of shape (batch, classes), or a tuple of them.
        labels: int64 of shape (batch,), or probabilities, float of shape (batch, classes).

    Returns:
        The mean over the batch, a scalar.
    """
    if isinstance(output, Tensor):
        return functional.cross_entropy(output, labels, label_smoothing=label_smoothing)
    logits, *auxiliary = output
    loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for auxiliary_logits in auxiliary:
        if auxiliary_logits is not None:
            auxiliary_loss = functional.cross_entropy(auxiliary_logits, labels, label_smoothing=label_smoothing)
            loss = loss + _AUXILIARY_LOSS_WEIGHTS[arch] * auxiliary_loss
    return loss
