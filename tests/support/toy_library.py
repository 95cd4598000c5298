"""toy_library: what is asked of a library, in one file, and the layout of its models.

`install` writes the library: a package whose model is an embedding and some linear layers, of
which one must not be cast and one not be quantized. It imports a module that takes for ever.
"""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from support import raw_layout
from support.raw_layout import (  # noqa: F401 (the rest of the layout)
    check,
    default_shard_bytes,
    files,
    loaded,
    loading,
    pipeline_tag,
    programs,
    shard_names,
    sources,
    weight_format,
)
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Target
from tasks.layouts import architecture
from tasks.layouts.model import Model

DISTRIBUTION = "toy-lm"
PACKAGE = "toy_lm"
BUILDS_ON = ()
MODULES = ("toy_lm.models",)
STUBS = ("toy_lm.heavy",)
MODELS = ("models",)
KNOWS = ()
EXTRA = ""
TOWERS = ""
PREDICTORS = 'layout = "mlx-vlm-mtp"'
RUNS = True
PARTS = False
MODELS = """
import json
import mlx.core as mx
import mlx.nn as nn
from toy_lm import heavy

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config["vocabulary"], config["width"])
        self.layers = [nn.Linear(config["width"], config["width"]) for _ in range(config["layers"])]
        self.gate = nn.Linear(config["width"], config["width"], bias=False)
        self.experts = nn.Module()
        self.experts.weight = mx.zeros((2, config["width"], config["width"]))

    def keep(self, path):
        return path.startswith("gate")

def load(folder):
    config = json.loads((folder / "config.json").read_text())
    model = Model(config)
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {name: array for name, array in weights.items() if "rotary_emb" not in name}
    weights["experts.weight"] = mx.stack([weights.pop(f"expert.{i}.weight") for i in range(2)])
    model.load_weights(list(weights.items()))
    return model, config
"""


def install(folder: Path) -> None:
    package, about = folder / PACKAGE, folder / "toy_lm-7.5.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("from toy_lm import heavy\n")
    (package / "heavy.py").write_text("raise RuntimeError('takes for ever')\n")
    (package / "models.py").write_text(MODELS)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-lm\nVersion: 7.5\n")


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, config = importlib.import_module("toy_lm.models").load(folder)
    return model, config


def casts(model: Any, name: str) -> bool:
    return not model.keep(name)


def quantizes(model: Any, path: str, module: Any) -> bool | dict[str, Any]:
    return {"bits": 8, "group_size": 32} if model.keep(path) else True


def count_weights(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.size for _, array in tree_flatten(model.parameters()))


def recipes(model: Any, leaves: Iterable[tuple[str, Any]]) -> dict[str, dict[str, int] | str]:
    return {"mixed_3_6": "toy-lm has no recipes"}


def on_text(model: Any) -> Any:
    """Return the model: that is how it runs."""
    return model


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "by": "toy-lm"}


def keeps_vision_config(model: Any) -> bool:
    return False


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    return architecture.model(checkpoint, memos, "toy-lm")


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    return raw_layout.default_dtype(checkpoint, model)


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    return {**model.config, "quantization": quantization}
