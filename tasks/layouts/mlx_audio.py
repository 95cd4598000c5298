"""mlx_audio: the layout that mlx_audio.convert writes, for what speaks, hears and makes music.

The tokenizer's files are the author's own, as in layout mlx-lm; so are the processors'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.transformers import MISTRAL
from tasks.core.errors import CheckpointError, ConfigError
from tasks.core.spec import Target
from tasks.core.text import listed
from tasks.layouts import leftovers, mlx_audio_library, mlx_lm
from tasks.layouts.libraries import MLX_AUDIO
from tasks.layouts.model import Model, Module
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30  # the peer's own limit
loaded = "model*.safetensors"
loading = """\
from mlx_audio.utils import load_model

model = load_model("{model}")
"""
pipeline_tag = ""  # it may speak, or hear
# What makes sounds ready, and what models read beside their tokenizers.
BESIDE = ("*processor*.json", "normalizer.json", "*.yaml", "*.wav")
COPIED = (".json", ".pt", ".txt", ".model", ".tiktoken")  # what the peer copies, whatever it is
CONVERTED_WIDTHS = 64  # multiples of which mlx_audio.convert quantizes alone
OWN_NOTE = (
    "what mlx_audio.convert copies for this model beside its weights, other repositories' perhaps, "
    "is left to its class: what the model needs of it, the key files lays over it"
)
DTYPES = ("float16", "bfloat16", "float32")  # that the peer takes over from config.json


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the model by mlx-audio's names.

    Raises:
        CheckpointError: mlx-audio has no class for it, or would take one of the checkpoint's own,
            or other weight files.
    """
    mistral = _refuse_two_kinds(checkpoint)
    made = mlx_lm.model(checkpoint, memos, MLX_AUDIO, BESIDE)
    notes = leftovers.of_convert(checkpoint, takes, "mlx_audio.convert", COPIED)
    unread = (leftovers.WEIGHTS,) if mistral else ()
    notes += leftovers.of_weights(checkpoint, "mlx_audio.convert", unread)
    notes += [OWN_NOTE] if mlx_audio_library.copies_itself(made.config["model_type"]) else []
    return structs.replace(made, notes=(*made.notes, *notes))


def _refuse_two_kinds(checkpoint: Checkpoint) -> bool:
    """Refuse a checkpoint of which mlx_audio.convert reads other files than were read.

    Where there are files of Mistral's names, it takes these alone.

    Returns:
        Whether there are, and were read.

    Raises:
        CheckpointError: there are, and others were read.
    """
    read, names = leftovers.weight_files(checkpoint)
    mistral = {name for name in (*read, *names) if fnmatchcase(name, MISTRAL)}
    if mistral and mistral != read:
        raise CheckpointError(
            f"{checkpoint.source.location} has {listed(sorted(mistral))}, which mlx_audio.convert "
            f"reads alone, and here {listed(sorted(read))} would be read, which may hold other "
            'tensors. Read as it does: loader = "mistral"'
        )
    return bool(mistral)


shard_names = mlx_lm.shard_names
tokenizer_files = mlx_lm.tokenizer_files
programs = mlx_lm.programs


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return what mlx_audio.convert casts to by default: ``torch_dtype`` in config.json, if any."""
    dtype = model.config.get("torch_dtype")
    return dtype if dtype in DTYPES else None


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as mlx_audio.convert writes it.

    Raises:
        ConfigError: by rules or a budget, modules are quantized as mlx-audio does not load them.
    """
    if quantization and target.quantize and (target.quantize.rules or target.quantize.chooses):
        for module in model.modules:
            if module.quantized_names is not None:
                _check_loads(model, module, quantization)
    return mlx_lm.config(target, model, quantization)


def _check_loads(model: Model, module: Module, quantization: Mapping[str, Any]) -> None:
    """Refuse settings of a module that ``mlx_audio.utils.apply_quantization`` passes over.

    It asks the target's own group size and the model's class first, and the module's own last.

    Raises:
        ConfigError: it does.
    """
    said, verdict, usual = quantization.get(module.path), module.verdict, quantization["group_size"]
    width = model.parameters[f"{module.path}.weight"].shape[-1]
    fits = width % usual == 0
    if isinstance(verdict, dict) and fits:
        skipped = not said and width % _numbers(verdict)[0] == 0
        if skipped or (said and _numbers(said) != _numbers(verdict)):
            raise ConfigError(
                f"{module.path}: mlx-audio loads it as its model's class says alone, {verdict}, "
                "whatever a rule says. Take it out of quantize.rules."
            )
    elif said and not fits:
        raise ConfigError(
            f"{module.path}: its width {width:,} is no multiple of {usual}, the target's group "
            "size, which mlx-audio asks before a module's own: it could not load it quantized. Set "
            f"group_size = {said['group_size']} of quantize itself, or have a rule skip it."
        )
    # Other widths convert leaves whatever the class says, and the loader does not.
    elif said and not verdict and width % CONVERTED_WIDTHS == 0:
        raise ConfigError(
            f"{module.path}: its model's class in mlx-audio does not quantize it, and could not "
            "load it quantized, whatever a rule says. Take it out of quantize.rules."
        )


def _numbers(said: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return settings with what ``to_quantized`` takes where nothing is said."""
    return said.get("group_size") or 64, said.get("bits") or 4, said.get("mode") or "affine"


def takes(name: str) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return mlx_lm.takes(name, BESIDE)


def sources(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint's small files that go into the built model, as they are or changed.

    Raises:
        CheckpointError: it has neither a tokenizer nor another processor, or what must not be
            copied.
    """
    return mlx_lm.sources(checkpoint, BESIDE)


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights."""
    return mlx_lm.files(checkpoint, memos, shards, None, BESIDE)
