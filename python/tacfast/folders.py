"""Model folders as transformers' `save_pretrained` and timm's `save_for_hf` write them: config.json beside the weights.
May import: architectures, checkpoints, preprocessing, errors; transformers, timm when a folder asks for them.

config.json is as untrusted as the weights are: it names one of the library's own classes or is refused, and nothing is fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tacfast.architectures import build_model, import_extra, unwrapped
from tacfast.checkpoints import Weights, load_weights, read_weights
from tacfast.errors import CheckpointError
from tacfast.files import read_bytes
from tacfast.preprocessing import Preprocessing, of_timm, of_transformers

_CONFIG = "config.json"
_INSTEAD = "get the folder again, or give the checkpoint in it with --arch"
#: Bytes of a configuration: enough for the names of 100,000 classes and of as many tensors.
_LARGEST = 16 * 2**20
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: Kernels that transformers would fetch and run, and weights that it would fetch, because a configuration says so.
_FETCHED = ("attn_implementation", "experts_implementation", "use_pretrained_backbone", "quantization_config", "use_kernels")
#: Weights of a model for each one in the file: more than one, for what a format does not repeat, but no more than memory can bear.
_SLACK = 2
_WORD = re.compile(r"[\w.-]+")


@dataclass(frozen=True, eq=False)
class Folder:
    """A model with its weights, and what its configuration says about it."""

    model: Any
    #: "transformers:CLASS" or "timm:NAME".
    arch: str
    #: What images must look like, None where the folder does not say; asked for only where it is needed, since it may be refused.
    expected: Callable[[], Preprocessing | None]
    #: Class by name, where classes have names.
    classes: Mapping[str, int] | None
    config_sha256: str
    notes: tuple[str, ...]


def is_folder(path: Path) -> bool:
    """Whether this is a folder that holds a model's configuration."""
    return (path / _CONFIG).is_file()


def read_folder_weights(folder: Path) -> Weights:
    """The weights in a folder, also when they lie in several files.

    Raises:
        CheckpointError: there are none, or one of the files is refused.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_weights(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder, f"{name}.index.json")
    raise CheckpointError(f"{folder.name} holds no weights; expected {' or '.join(_WEIGHTS)}, or their .index.json; {_INSTEAD}")


def load_folder(folder: Path, tensors: Mapping[str, Any]) -> Folder:
    """The model that a folder's config.json describes, with these weights, whichever file they come from.

    Raises:
        CheckpointError: the configuration is not one of an image classifier of transformers or timm, or the weights do not fit it.
    """
    content = read_bytes(folder / _CONFIG, most=_LARGEST)
    config = _json_object(content, folder / _CONFIG)
    digest = hashlib.sha256(content).hexdigest()
    if "model_type" in config and config["model_type"] != "timm_wrapper":
        return _load_transformers(folder, config, tensors, digest)
    if isinstance(config.get("architecture"), str):
        return _load_timm(config, tensors, digest)
    raise CheckpointError(f"{folder.name}/{_CONFIG} names neither a model_type of transformers nor an architecture of timm; {_INSTEAD}")


def _json_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent.name}/{path.name} holds no JSON object; get the folder again")
    return value


def _read_shards(folder: Path, index: str) -> Weights:
    files = _json_object(read_bytes(folder / index, most=_LARGEST), folder / index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and _WORD.fullmatch(f) for f in files.values()):
        raise CheckpointError(f"{folder.name}/{index}: weight_map must map tensors to files of this folder; get the folder again")
    shards = {name: read_weights(folder / name) for name in sorted(set(files.values()))}
    tensors = {key: tensor for shard in shards.values() for key, tensor in shard.tensors.items()}
    if len(tensors) != sum(len(shard.tensors) for shard in shards.values()):
        raise CheckpointError(f"{folder.name}: the same tensor lies in two of its files; get the folder again")
    digest = hashlib.sha256("".join(f"{name} {shard.sha256}\n" for name, shard in shards.items()).encode()).hexdigest()
    return Weights(tensors, digest, {}, (f"weights from {len(shards)} files; the SHA-256 is that of the list of theirs",))


def _load_transformers(folder: Path, config: dict[str, Any], tensors: Mapping[str, Any], digest: str) -> Folder:
    import torch

    import_extra("transformers", "hf")
    with _offline():
        kind, settings, notes = _transformers_class(folder, config)
        _check_size(config, tensors, lambda: kind(settings), f"{folder.name}/{_CONFIG}")
        try:
            model, info = kind.from_pretrained(
                None, config=settings, state_dict=dict(tensors), output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
            )
        except Exception as error:  # the configuration is untrusted
            raise CheckpointError(f"{kind.__name__} could not be built: {type(error).__name__}: {_first_line(error)}; {_INSTEAD}") from None
        problems = _misfit(info)
        if problems:
            raise CheckpointError(f"the weights do not fit {folder.name}/{_CONFIG} ({kind.__name__}); {problems}; get both from one place")
    classes = {str(label): int(k) for k, label in settings.id2label.items()}
    return Folder(model.eval(), f"transformers:{kind.__name__}", partial(_transformers_preprocessing, folder), classes, digest, notes)


def _check_size(settings: Any, tensors: Mapping[str, Any], build: Callable[[], Any], name: str) -> None:
    """A configuration that asks for more layers or weights than the file holds is refused before any memory is taken for it."""
    import torch

    held = sum(tensor.numel() for tensor in tensors.values())
    if _deepest(settings) > len(tensors):
        raise CheckpointError(f"{name} asks for more layers than the file has tensors, {len(tensors)}; get both from one place")
    try:
        with torch.device("meta"):
            asked = sum(p.numel() for p in build().parameters())
    except CheckpointError:
        raise
    except Exception as error:  # the configuration is untrusted
        raise CheckpointError(
            f"{name} describes no model that can be built: {type(error).__name__}: {_first_line(error)}; {_INSTEAD}"
        ) from None
    if asked > _SLACK * held:
        raise CheckpointError(f"{name} describes a model of {asked} weights, the file holds {held}; get both from one place")


def _deepest(value: Any, counts: bool = False) -> int:
    """The largest number of layers in a configuration, at any depth of its own."""
    if isinstance(value, dict):
        return max((_deepest(v, any(word in str(k) for word in ("layers", "depth", "blocks"))) for k, v in value.items()), default=0)
    if isinstance(value, list):
        return max((_deepest(v, counts) for v in value), default=0)
    return value if counts and isinstance(value, int) else 0


def _misfit(info: Mapping[str, Any]) -> str:
    """What transformers found wrong with names and shapes, which it would fill with random numbers; empty where nothing is."""
    kinds = (
        ("missing from the file", sorted(info["missing_keys"])),
        ("not in the model", sorted(info["unexpected_keys"])),
        ("of another shape", [f"{name}: file {tuple(file)}, model {tuple(own)}" for name, file, own in sorted(info["mismatched_keys"])]),
    )
    return "; ".join(f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" for what, names in kinds if names)


def _transformers_class(folder: Path, config: dict[str, Any]) -> tuple[Any, Any, tuple[str, ...]]:
    """The library's own class, its settings, and what was left out of them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    name, kind = config.get("architectures") or [None], config["model_type"]
    code = " (its auto_map names code of its own, which is not run)" if "auto_map" in config else ""
    notes = (f"{folder.name}/{_CONFIG} names code of its own (auto_map): not run",) if code else ()
    clean = _without_fetching(config)
    try:
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise CheckpointError(f"{folder.name}/{_CONFIG}: transformers has no model_type {kind!r}{code}; {_INSTEAD}")
        settings = CONFIG_MAPPING[kind].from_dict(clean)
        if type(settings) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            raise CheckpointError(f"{folder.name}/{_CONFIG}: transformers has no image classifier of model_type {kind!r}; {_INSTEAD}")
    except CheckpointError:
        raise
    except Exception as error:  # the configuration is untrusted
        raise CheckpointError(f"{folder.name}/{_CONFIG} is no configuration of {kind!r}: {_first_line(error)}; {_INSTEAD}") from None
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(settings)]
    choices = {c.__name__: c for c in (found if isinstance(found, tuple) else (found,))}
    wanted = name[0] if isinstance(name, list) and name else None
    if wanted is None:
        return next(iter(choices.values())), settings, notes
    if wanted not in choices:
        raise CheckpointError(
            f"{folder.name}/{_CONFIG}: {wanted!r} is no image classifier of transformers; expected {', '.join(choices)}; {_INSTEAD}"
        )
    return choices[wanted], settings, notes


def _without_fetching(value: Any) -> Any:
    """Without the settings that would make the library fetch or run something, at any depth."""
    if isinstance(value, dict):
        return {
            k: _without_fetching(v) for k, v in value.items() if k != "auto_map" and k.strip("_").removesuffix("_internal") not in _FETCHED
        }
    return [_without_fetching(v) for v in value] if isinstance(value, list) else value


def _transformers_preprocessing(folder: Path) -> Preprocessing | None:
    from transformers import AutoImageProcessor

    file = next((f for f in ("preprocessor_config.json", "processor_config.json") if (folder / f).is_file()), None)
    if file is None:
        return None
    _json_object(read_bytes(folder / file, most=_LARGEST), folder / file)
    with _offline():
        try:
            processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the configuration is untrusted
            raise CheckpointError(f"{folder.name}/{file} cannot be read: {_first_line(error)}; give --size, --mean and --std") from None
        return of_transformers(processor, f"{folder.name}/{file}")


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched, whatever a configuration asks for; the libraries say nothing and draw no bars."""
    from huggingface_hub import constants
    from transformers.utils import logging

    before, level, bars = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load_timm(config: dict[str, Any], tensors: Mapping[str, Any], digest: str) -> Folder:
    name, settings, arguments = config["architecture"], config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    if not isinstance(settings, dict) or not isinstance(arguments, dict) or not all(map(_is_harmless, arguments.items())):
        raise CheckpointError(
            f"{_CONFIG}: pretrained_cfg and model_args must be objects, the latter of plain numbers and words; {_INSTEAD}"
        )
    if not _WORD.fullmatch(name):  # nothing that could be taken for a path or an address
        raise CheckpointError(f"{_CONFIG}: {name[:80]!r} is no name of an architecture; {_INSTEAD}")
    classes = config.get("num_classes", settings.get("num_classes"))
    arch = f"timm:{name}"
    arguments = {**arguments, **({} if classes is None else {"num_classes": classes})}
    _check_size(arguments, tensors, lambda: build_model(arch, arguments), _CONFIG)
    model = build_model(arch, arguments)
    notes = load_weights(model, unwrapped(tensors, model.state_dict()))
    labels = config.get("label_names") or settings.get("label_names")
    by_name = {str(label): k for k, label in enumerate(labels)} if isinstance(labels, list) else None
    return Folder(model.eval(), arch, lambda: of_timm(settings, name) if settings else None, by_name, digest, notes)


def _is_harmless(argument: tuple[str, Any]) -> bool:
    """No paths, addresses, or settings that choose weights."""
    name, value = argument
    values = value if isinstance(value, list) else [value]
    fetches = any(word in name for word in ("pretrained", "checkpoint", "cache"))
    return not fetches and all(v is None or isinstance(v, (bool, int, float)) or (isinstance(v, str) and v.isidentifier()) for v in values)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
