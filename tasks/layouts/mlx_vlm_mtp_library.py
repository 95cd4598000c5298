"""mlx_vlm_mtp_library: how mlx-vlm is asked for the drafter that it splits off a checkpoint.

A drafter is made of the tensors that predict further tokens, by the splitter that mlx-vlm has for
the architecture (``mlx_vlm.speculative.drafters.mtp_split``), as ``mlx_vlm.convert --mtp`` does.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.core.errors import ArchitectureError
from tasks.core.quantization import RECIPES
from tasks.layouts import mlx_vlm_library
from tasks.layouts.model import Verdict

DISTRIBUTION = "mlx-vlm"
PACKAGE = "mlx_vlm"
BUILDS_ON: tuple[str, ...] = ()
SPLIT = "mlx_vlm.speculative.drafters.mtp_split"
MODULES: tuple[str, ...] = ("mlx_vlm.utils", SPLIT)
STUBS = mlx_vlm_library.STUBS
MODELS: tuple[str, ...] = ()
KNOWS: tuple[str, ...] = ()
EXTRA = "vlm"
TOWERS = ""
PREDICTORS = ""
RUNS = False
PARTS = False
FORMAT_FILE = "format.txt"  # of a question: what safetensors files say that wrote them


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the drafter of a folder's model as modules that hold its tensors; its configuration.

    Raises:
        ArchitectureError: mlx-vlm has no drafter for it, or there are no tensors for one.
    """
    mx: Any = importlib.import_module("mlx.core")
    split = importlib.import_module(SPLIT)
    file = folder / "model.safetensors"
    given = mx.load(str(file))
    config = json.loads((folder / "config.json").read_text())
    splitter = split.get_mtp_splitter(source_config=config)
    if splitter is None:
        raise ArchitectureError(
            f"mlx-vlm has no drafter for model_type = {config.get('model_type')!r}: it splits one "
            f"off {', '.join(sorted(split.MTP_SPLITTERS))}. Build the model itself alone, in "
            "another layout."
        )
    text = splitter.read_text_config(config)
    names = [name for name in given if splitter.select_keys(name, text)]
    if not names:
        raise ArchitectureError(
            "none of its tensors predicts further tokens, by the names that mlx-vlm knows them by "
            f"of model_type = {config.get('model_type')!r}. Get a checkpoint with them, its "
            "author's own perhaps, or build the model itself alone, in another layout."
        )
    said = folder / FORMAT_FILE
    _write_header(file, said.read_text() if said.exists() else "pt")
    splitter.iter_selected = lambda *_: [(file, names)]
    splitter.load_shard = lambda _, keys: {key: given[key] for key in keys}
    config, weights = splitter.prepare(folder, source_config=config)
    return _modules(weights, splitter), config


def _write_header(file: Path, kind: str) -> None:
    """Write a safetensors file of no tensors, which says what wrote it: the splitter looks."""
    header = json.dumps({"__metadata__": {"format": kind}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def _modules(weights: dict[str, Any], splitter: Any) -> Any:
    """Return modules that hold the weights by their names."""
    nn: Any = importlib.import_module("mlx.nn")
    mx: Any = importlib.import_module("mlx.core")

    class Part(nn.Module):  # type: ignore[misc]
        """What holds tensors, or other parts."""

    class Weighted(Part):
        """What holds a weight that the splitter quantizes."""

        def to_quantized(self, **_: Any) -> Any:
            quantized = Part()
            for name, array in self.items():
                quantized[name] = array
                if name == "weight":
                    quantized["scales"] = quantized["biases"] = mx.zeros((1, 1))
            return quantized

    def can(name: str) -> bool:
        array = weights[name]
        packed = name.removesuffix("weight") + "scales" in weights
        floats = mx.issubdtype(array.dtype, mx.floating)
        return array.ndim > 1 and floats and not packed and splitter.should_quantize_key(name)

    root = Part()
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        part = root
        for at, word in enumerate(words := path.split(".") if path else []):
            if word not in part:
                is_weighted = at == len(words) - 1 and f"{path}.weight" in weights
                part[word] = Weighted() if is_weighted and can(f"{path}.weight") else Part()
            part = part[word]
        part[leaf] = array
    dtypes = [a.dtype for a in weights.values() if mx.issubdtype(a.dtype, mx.floating)]
    usual = Counter(map(str, dtypes)).most_common(1)
    root.others = frozenset(
        name for name, a in weights.items() if usual and str(a.dtype) != usual[0][0]
    )
    return root


def casts(model: Any, name: str) -> bool:
    """Tell whether a parameter is of the dtype that most are of: mlx-vlm casts none.

    What is kept in another is so for a reason, as a router's bias in float32.
    """
    return name not in model.others


def quantizes(model: Any, path: str, module: Any) -> Verdict:
    """Return yes: what the splitter would not quantize cannot be."""
    return True


def count_weights(model: Any) -> int:
    """Return how many weights a drafter has."""
    return mlx_vlm_library.count_weights(model)


def recipes(
    model: Any, leaves: Iterable[tuple[str, Any]]
) -> dict[str, dict[str, int | Verdict] | str]:
    """Return why no mixed recipe fits."""
    return dict.fromkeys(RECIPES, "mlx-vlm quantizes all modules of a drafter alike.")


def on_text(model: Any) -> Any:
    """Return the model, which is not run."""
    return model


def prompt_cache(model: Any) -> list[Any]:
    """Return none: a drafter runs beside its model alone."""
    return []


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it."""
    return mlx_vlm_library.encode_config(config)


def keeps_vision_config(model: Any) -> bool:
    """Tell that a drafter's configuration stays as it is."""
    return True
