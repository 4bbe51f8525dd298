"""Architectures that a library builds by their name: `transformers:CLASS` and `timm:NAME`. No weights are fetched."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscli.errors import FileError, UsageError
from hesscli.files.sniff import Kind
from hesscli.files.torch_files import reading


def transformers_factory(name: str, model: Path | str) -> Callable[..., nn.Module]:
    """Builds a class of `transformers` from the `config.json` next to the weights.

    The factory's arguments are entries of the configuration that are to differ from the file's.

    Raises:
        FileError: there is no configuration.
        UsageError: transformers has no such class.
    """
    folder = Path(model) if os.path.isdir(model) else Path(model).parent
    configuration(folder)
    import transformers

    transformers.logging.set_verbosity_error()
    cls: Any = getattr(transformers, name, None)
    if not hasattr(cls, "from_config") and not hasattr(cls, "_from_config"):
        raise UsageError(
            f"--arch transformers:{name}: transformers has no model of this name", arch_of(folder)
        )

    def build(**arguments: object) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **arguments
        )
        config.use_cache = False
        make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
        module: Any = make(config, dtype=torch.float32)
        module.tie_weights()
        return module

    return build


def as_transformers_names(
    module: nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The weights as the installed `transformers` names and cuts them; None where it does not know them.

    A file keeps the names that its model's classes had when they were first released. What the module lacks stays
    lacking, and what nobody takes keeps its name.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    transformers.logging.disable_progress_bar()
    wide = any(t.dtype is torch.float64 for t in weights.values())
    try:
        model, found = type(module).from_pretrained(
            None,
            config=copy.deepcopy(module.config),
            state_dict=dict(weights),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float64 if wide else torch.float32,
        )
    except Exception:  # a quantised model, say; who loads the weights tells what does not fit
        return None
    of_another_size = {name for name, *_ in found["mismatched_keys"]}
    not_loaded = of_another_size | set(found["missing_keys"])
    named = {name: t for name, t in model.state_dict().items() if name not in not_loaded}
    left = of_another_size | set(found["unexpected_keys"])
    return named | {name: weights[name] for name in left if name in weights}


def configuration(folder: Path) -> Mapping[str, object]:
    """What the folder's `config.json` says; FileError where there is none, or it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileError(
            f"{path}: not there; it says what the weights belong to",
            "model.save_pretrained('folder') writes both",
        )
    with reading(path, Kind.TEXT):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("not a JSON object")
    return content


def arch_of(folder: Path) -> str:
    """The option that names what the folder's configuration says it was saved from."""
    named = configuration(folder).get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else "AutoModelForCLASS"
    return f"--arch transformers:{first}"


def timm_factory(name: str) -> Callable[..., nn.Module]:
    """Builds a model of `timm`, without its weights."""
    import timm

    def build(**arguments: object) -> nn.Module:
        return timm.create_model(name, **{**arguments, "pretrained": False})

    return build
