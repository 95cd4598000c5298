"""mlx_vlm_mtp: the layout of a drafter, which mlx_vlm.convert --mtp writes beside the model.

It is made of the tensors that predict further tokens, which the other layouts leave out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints import safetensors_file
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.core.spec import Target
from tasks.core.text import listed
from tasks.layouts import architecture, mlx_lm, mlx_vlm, mlx_vlm_library
from tasks.layouts.libraries import MLX_VLM_MTP
from tasks.layouts.mlx_vlm_mtp_library import FORMAT_FILE
from tasks.layouts.model import Model
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30
loaded = "model*.safetensors"
loading = """\
from mlx_vlm import load, generate
from mlx_vlm.speculative.drafters import load_drafter

model, processor = load("path/to/the/model")
drafter, kind = load_drafter("{model}")
print(generate(model, processor, prompt="hello", draft_model=drafter, draft_kind=kind).text)
"""
pipeline_tag = "text-generation"
takes = mlx_lm.takes
sources = mlx_lm.sources
shard_names = mlx_lm.shard_names
tokenizer_files = mlx_lm.tokenizer_files
programs = mlx_lm.programs
files = mlx_vlm.files


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the drafter by mlx-vlm's names.

    Raises:
        CheckpointError: mlx-vlm has none for such a model, or the checkpoint no tensors for it; or
            its weight files, which say what wrote them, are not here.
    """
    if (kind := written_by(checkpoint, memos)) == "mlx":  # then they are made already
        checkpoint = replace(checkpoint, files={**checkpoint.files, FORMAT_FILE: kind})
    made = mlx_lm.model(checkpoint, memos, MLX_VLM_MTP)
    return structs.replace(made, told=made.told or checkpoint)


def written_by(checkpoint: Checkpoint, memos: Memos) -> str:
    """Return what a file says that wrote it that holds what predicts further tokens.

    Norms are moved by it: where it is not known, nothing is taken for it.

    Raises:
        CheckpointError: the files are not here, and it was not asked of them before.
    """
    if checkpoint.written_by is not None:
        return checkpoint.written_by
    source, predictors = checkpoint.source, architecture.predictors(checkpoint)
    keys = [key for name in predictors for key in checkpoint.tensors[name].inputs]
    files = {checkpoint.stored[key].file for key in keys}
    names = sorted(name for name in files if name.endswith(safetensors_file.SUFFIXES))
    if not names:
        return ""
    # A commit is of all folders of a repository, and files have the same names in each.
    question = [source.identity, source.location, names]
    said = memos.get("formats", question, str) if source.identity else None
    if said is None:
        if not source.available:
            raise CheckpointError(
                f"{source.location}: whether its norms are MLX's or PyTorch's is said by "
                f"{listed(names)} alone, not by models.lock, and the weight files cannot be read. "
                "Get the checkpoint, or have its hub reachable."
            ) from source.unreachable
        found = {safetensors_file.metadata(source, name).get("format", "") for name in names}
        said = "mlx" if "mlx" in found else ""
        if source.identity:
            memos.put("formats", question, said)
    return said


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return none: a drafter stays in the dtypes that its tensors have."""
    return None


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as ``mlx_vlm.convert --mtp`` writes it."""
    config = mlx_vlm_library.decode_config(model.config)
    if quantization is not None:
        config["quantization"] = config["quantization_config"] = quantization
    return dict(sorted(config.items()))
