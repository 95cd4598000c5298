"""Quantized checkpoints that the formats' own libraries wrote, beside what those make of them.

Of each format that is installed two small checkpoints are written by its library, a dense model and
one of experts, and built in each dtype twice: as floats, and as is the default, which is kept where
that is without loss. Values are compared with the library's own, run in float32, to the bit: where
they are kept, as they are; where they are floats, once these are rounded to the dtype. Logits are
compared with transformers'. Nothing is installed: what is missing is named, and left out.

    python benchmarks/formats.py [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from format_cases import CASES, KEPT, Case, Tensors, write

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "intermediate_size": 384},
    "experts": {
        "model_type": "qwen3_moe", "moe_intermediate_size": 128, "intermediate_size": 128,
        "num_experts": 4, "num_experts_per_tok": 2,
    },
    "stacked": {  # all experts of a layer in one tensor
        "model_type": "gemma4_text", "moe_intermediate_size": 128, "intermediate_size": 384,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 64,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "tie_word_embeddings": True,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e6}
            for kind in ("sliding_attention", "full_attention")
        },
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e6,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
MOST = 1e-3  # of the largest logit, by which logits may differ
IDS = [*range(2, 34)]
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.*)")


def _plain(folder: Path, kind: str) -> None:
    """Write a small model of random weights, float32, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**CONFIG, **KINDS[kind]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"t{number}": number for number in range(CONFIG["vocab_size"])}
    Tokenizer(models.WordLevel(words, "t0")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _save(case: Case, plain: Path, folder: Path) -> Tensors:
    """Have a library write a checkpoint; return the floats that it makes of it, by name."""
    if case.save:
        floats = case.save(plain, folder)
    else:
        from safetensors.torch import load_file

        assert case.packer
        pack = case.packer()
        tensors: Tensors = {}
        floats = {}
        for name, weight in load_file(plain / "model.safetensors").items():
            if weight.ndim in (2, 3 if case.stacks else 2) and not any(
                kept in name for kept in KEPT
            ):
                parts, floats[name] = pack(name.removesuffix(".weight"), weight)
                tensors |= parts
            else:
                tensors[name] = weight
        write(folder, plain, tensors, case.settings())
    for path in plain.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    said = json.loads((folder / "config.json").read_text())
    # By their older names too, which transformers 5 does not write and mlx-lm reads.
    (folder / "config.json").write_text(json.dumps({**said, **KINDS[plain.name]}))
    return {name: each.float() for name, each in floats.items()}


def _as_built(floats: Tensors) -> Tensors:
    """Return a library's floats by the names that mlx-lm has, the experts of a layer together."""
    import torch

    named: Tensors = {}
    stacks: dict[str, dict[int, Any]] = {}
    for name, each in floats.items():
        if name.endswith(".gate_up_proj"):
            path = name.removesuffix("gate_up_proj") + "switch_glu"
            gate, up = each.chunk(2, dim=-2)
            named |= {f"{path}.gate_proj.weight": gate, f"{path}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            named[name.replace("down_proj", "switch_glu.down_proj.weight")] = each
        elif match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = each
        else:
            named[name] = each
    for name, stack in stacks.items():
        named[name] = torch.stack([stack[number] for number in range(len(stack))])
    return named


def _reference(plain: Path, source: Path, floats: Tensors) -> Any:
    """Return the logits that transformers makes of a library's floats, in float32."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    tensors = load_file(plain / "model.safetensors")
    stored = load_file(source / "model.safetensors")  # whose other tensors may have been rounded
    tensors = {n: floats[n] if n in floats else stored.get(n, t) for n, t in tensors.items()}
    folder = source.with_name("reference")
    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    held = {name: each.float().contiguous().clone() for name, each in tensors.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits.numpy()


def _off(built: Path, theirs: Any) -> float:
    """Return how far a built model's logits are off, by the largest of transformers'."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(built)
    model.set_dtype(mx.float32)  # in which alone MLX runs experts on a CPU
    ours = np.array(model(mx.array([IDS])))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _values(built: Path, names: Iterable[str]) -> tuple[Tensors, int]:
    """Return a built model's weights of these names in float32, and how many are packed."""
    import mlx.core as mx
    import numpy as np
    import torch

    tensors = mx.load(f"{built}/model.safetensors")
    assert isinstance(tensors, dict)
    table = json.loads((built / "config.json").read_text()).get("quantization", {})
    found: Tensors = {}
    packed = 0
    for name in names:
        path, made = name.removesuffix(".weight"), tensors[name]
        if f"{path}.scales" in tensors:
            said = {"mode": "affine", **table, **table.get(path, {})}
            how = {key: said[key] for key in ("group_size", "bits", "mode")}
            scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
            if biases is not None:
                scales, biases = (each.astype(mx.float32) for each in (scales, biases))
            made = mx.dequantize(made, scales, biases, **how)
            packed += 1
        found[name] = torch.tensor(np.array(made.astype(mx.float32)))
    return found, packed


def _compare(case: Case, plain: Path, folder: Path) -> tuple[str, bool]:
    """Return a line on one format, and whether it is as it is to be."""
    import torch

    source = folder / "source"
    floats = _save(case, plain, source)
    theirs = _reference(plain, source, floats)
    floats = _as_built(floats)
    (folder / "models.toml").write_text(
        "".join(
            f'[models.{kind}-{dtype}]\nsource = "{source}"\ndtype = "{dtype}"\n{line}'
            for dtype in DTYPES
            for kind, line in (("floats", "dequantize = true\n"), ("kept", ""))
        )
    )
    command = [sys.executable, "-P", "-m", "mlx_make"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return f"not built: {done.stdout[-600:]}{done.stderr[-600:]}", False
    equal, of, kept = 0, 0, []
    wide: list[float] = []
    for dtype in DTYPES:
        rounded = {n: t.to(getattr(torch, dtype)).float() for n, t in floats.items()}
        for kind in ("floats", "kept"):
            built = folder / "build" / f"{kind}-{dtype}"
            ours, packed = _values(built, floats)
            off = _off(built, theirs)
            if kind == "kept":
                kept.append(str(packed))
            if not isfinite(off):
                return f"{built.name}: logits are no numbers", False
            if packed and case.by_peer:
                continue
            wide.append(off if dtype == "float32" else 0.0)
            expected = floats if packed else rounded
            of += len(floats)
            equal += sum(torch.equal(ours[name], each) for name, each in expected.items())
    line = f"{equal} of {of} equal; logits off by {max(wide):.1e}; kept {', '.join(kept)}"
    line += " as mlx-lm rounds them" if case.by_peer and any(map(int, kept)) else ""
    return line, equal == of > 0 and max(wide) <= MOST


def _wanted(names: list[str]) -> Iterator[tuple[str, Case, str]]:
    for name, case in CASES.items():
        if names and not any(name.startswith(each) for each in names):
            continue
        if importlib.util.find_spec(case.package.partition(".")[0]) is None:
            print(f"{name:28} left out: {case.package} is not installed", flush=True)
        else:
            yield from ((name, case, kind) for kind in KINDS if kind != "stacked" or case.stacks)


def main() -> int:
    """Compare; return 1 where something is not as it is to be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of formats, or how they begin; default: all")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            _plain(Path(name) / kind, kind)
        for number, (name_of, case, kind) in enumerate(_wanted(asked.names)):
            folder = Path(name) / str(number)
            folder.mkdir()
            try:
                line, good = _compare(case, Path(name) / kind, folder)
            except Exception as error:  # a library that is not as it was: to be told, not to end
                line, good = f"failed: {type(error).__name__}: {error}", False
            failed += not good
            print(f"{name_of:28} {kind:8} {line}", flush=True)
            shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
