"""Untrained models by name. May import: preact, errors; torchvision, timm when asked for.

Architecture files named by the user are the user's own code, and are run. No weights are ever fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tacfast.errors import CheckpointError

#: Libraries whose models take `num_classes`.
COUNTED = ("torchvision", "timm", "tacfast")
_FORMS = "torchvision:NAME, timm:NAME, tacfast:preactresnet18, path/to/file.py:factory or a folder with a config.json"


def build_model(arch: str, arguments: Mapping[str, Any]) -> Any:
    """An untrained model from "torchvision:NAME", "timm:NAME", "tacfast:preactresnet18" or "path/to/file.py:factory" (the user's own code,
    which is run). Values of `arguments` that are text are read as JSON where they can be.

    Raises:
        CheckpointError: there is no such architecture, or it does not take these arguments.
    """
    source, _, name = arch.rpartition(":")
    if not source or not name:
        meant = f"; did you mean torchvision:{arch}?" if arch.isidentifier() else ""
        raise CheckpointError(f"arch must be {_FORMS}, got {arch!r}{meant}")
    keywords = {k: _literal(v) if isinstance(v, str) else v for k, v in arguments.items()}
    factory = _library(source, name) if source in COUNTED else _factory(Path(source), name)
    try:
        model = factory(**keywords)
    except Exception as error:
        raise CheckpointError(
            f"{arch} could not be built with {keywords}: {type(error).__name__}: {error}; --arch-arg sets them"
        ) from error
    if not hasattr(model, "state_dict"):
        raise CheckpointError(f"{arch} must give a torch.nn.Module, it gave {type(model).__name__}")
    return model


def build_for(arch: str, arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any], dict[str, Any]]:
    """An untrained model that these tensors may fit.

    Where a library's model takes a number of classes and none was given, it is read off the last layer; where all names carry a wrapper's
    prefix, it is taken off.

    Returns:
        model, tensors under the model's names, arguments that it was built with.

    Raises:
        CheckpointError: see `build_model`.
    """
    arguments = dict(arguments)
    if arch.startswith("tacfast:"):
        arguments.setdefault("final_norm", any(f".{name}".endswith(".bn.weight") for name in tensors))
    model = build_model(arch, arguments)
    own = model.state_dict()
    tensors = unwrapped(tensors, own)
    if "num_classes" not in arguments and arch.startswith(tuple(f"{name}:" for name in COUNTED)):
        classes = _other_class_count(tensors, own)
        if classes is not None:
            arguments["num_classes"] = classes
            model = build_model(arch, arguments)
    return model, tensors, arguments


def unwrapped(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the prefix that a wrapper (Lightning, torch.compile, a Sequential) put before every name, where none is the model's own."""
    while tensors and not any(name in own for name in tensors):
        first = {name.partition(".")[0] for name in tensors}
        if len(first) > 1 or not all("." in name for name in tensors):
            break
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _other_class_count(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> int | None:
    """How many classes the file has, when all that differs in shape is the first side of some tensors, and always in the same way."""
    counts = set()
    for name in tensors.keys() & own.keys():
        file, model = tuple(tensors[name].shape), tuple(own[name].shape)
        if file != model:
            if not file or not model or file[1:] != model[1:]:
                return None
            counts.add((file[0], model[0]))
    return counts.pop()[0] if len(counts) == 1 else None


def _literal(text: str) -> Any:
    """Numbers, booleans and null as such; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def import_extra(name: str, extra: str) -> Any:
    """A library that comes with one of our extras.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(f"{name} is not installed ({error}); it comes with the extra [{extra}]") from None


def _library(source: str, name: str) -> Callable[..., Any]:
    if source == "tacfast":
        from tacfast.preact import PreActResNet18

        if name != "preactresnet18":
            raise CheckpointError(f"tacfast has no architecture {name!r} of its own, only preactresnet18")
        return PreActResNet18
    if source == "torchvision":
        models = import_extra("torchvision.models", "vision")
        if name not in models.list_models(module=models):  # detectors and the like would fetch the weights of their backbones
            raise CheckpointError(f"torchvision has no classifier {name!r}; torchvision.models.list_models() lists them")
        return lambda **keywords: models.get_model(name, weights=None, **keywords)
    timm = import_extra("timm", "vision")
    if not timm.is_model(name.partition(".")[0]):
        raise CheckpointError(f"timm has no architecture {name!r}; timm.list_models() lists them")
    return lambda **keywords: timm.create_model(name, **{**keywords, "pretrained": False})


def _factory(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise CheckpointError(f"no such architecture file: {path}; --arch must be {_FORMS}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{path} is not a Python file; --arch must be {_FORMS}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CheckpointError(f"{path} could not be run: {type(error).__name__}: {error}; it must run as a script by itself") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise CheckpointError(f"{path} defines no function {name!r}; --arch must be {_FORMS}")
    result: Callable[..., Any] = factory
    return result
