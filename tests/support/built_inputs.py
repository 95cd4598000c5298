"""built_inputs: files that a build reads past their headers, damaged, and built: packed weights,
adapters, texts. What is built must be what the formats' own code makes of the very same files.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import torch
from safetensors.torch import load_file

from support import adapted, chats, checkpoints, formats, inside, packed, unpacked
from support.inputs import OUTCOMES, Files, ask_here, call_here
from support.mutations import mutated
from tasks.layouts import asking, limited

TINY = {"num_hidden_layers": 1, "head_dim": 16, "hidden_size": 64, "intermediate_size": 64}
PACKED = (
    "block-fp8", "nvfp4", "modelopt-nvfp4", "mxfp8", "float-quantized", "pack-quantized",
    "pack-quantized-3", "int-quantized", "gptq-4", "awq", "nf4", "fp4-nested", "int8", "hqq-4",
    "quanto", "torchao-Int4", "torchao-Int8",
)  # fmt: skip
UNCOMPARED = ("hqq-4", "quanto", "torchao-Int4", "torchao-Int8")  # built or refused, and no more
WEIGHTS = "model.safetensors"
FLOATS = 'dtype = "float32"\ndequantize = true\n'
SMALL = ("[quality]\nsamples = 3\nsequence_length = 8\n"
         'text = "text.jsonl"\nevaluate_text = "held-out.txt"\n')  # fmt: skip
MODEL = '[models.model]\nsource = "checkpoint"\n'


class BuiltInputs(Files):
    """Projects, each made as the first of its files is damaged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._made: set[str] = set()
        for name in (*PACKED, "mlx"):
            for part in ("", "#layout", "#data"):
                self._add(f"{name}/checkpoint/{WEIGHTS}{part}", self._unpacked)
            said = "quanto_qmap.json" if name == "quanto" else "config.json#quantization"
            self._add(f"{name}/checkpoint/{said}", self._unpacked)
        for name in adapted.KINDS:
            for part in ("", "#layout", "#data"):
                self._add(f"{name}/adapter/{adapted.weights_file(name)}{part}", self._fused)
            self._add(f"{name}/adapter/adapter_config.json", self._fused)
        for file in ("text.jsonl", "checkpoint/chat_template.jinja"):
            self._add(f"texts/{file}", self._cut)

    def _add(self, kind: str, check: Callable[[Path], str]) -> None:
        def read(_: Path) -> str:
            return check(self.folder / kind.partition("/")[0])

        self.kinds[kind] = read

    def attempt(self, seed: int, *kinds: str) -> Any:
        for name in {kind.partition("/")[0] for kind in kinds} - self._made:
            self._make(name, self.folder / name)
            self._made.add(name)
        return super().attempt(seed, *kinds)

    def damaged(self, kind: str, whole: bytes, seed: int) -> bytes:
        chance = random.Random(f"{kind} {seed}")
        match kind.partition("#")[2]:
            case "layout":
                return _other_layout(whole, chance)
            case "data":
                return _other_data(whole, chance)
            case "quantization":
                at = whole.rindex(b'"quantization')
                return whole[:at] + mutated(whole[at:], chance)
        return super().damaged(kind, whole, seed)

    def _make(self, name: str, folder: Path) -> None:
        lines = MODEL
        if name in PACKED:
            plain = checkpoints.make("qwen3", self.folder / f"{name}-plain", **TINY)
            packed.repack(plain, folder / "checkpoint", *formats.FORMATS[name])
            lines += FLOATS
        elif name == "mlx":
            _quantized_by_mlx(folder)
            lines += FLOATS
        elif name in adapted.KINDS:
            checkpoints.make("qwen3", folder / "checkpoint", **TINY)
            adapted.write(name, folder / "adapter")
            lines += 'adapter = "adapter"\ndtype = "float32"\n'
        else:
            checkpoints.make("llama", folder / "checkpoint", **TINY)
            chats.write(folder)
            lines += SMALL
        (folder / "models.toml").write_text(lines)
        said = next(read for kind, read in self.kinds.items() if kind.startswith(f"{name}/"))(
            folder
        )
        assert not said, said

    def _unpacked(self, folder: Path) -> str:
        if folder.name in UNCOMPARED:
            return _doit(folder)

        def expected() -> dict[str, torch.Tensor]:
            return unpacked.floats(folder / "checkpoint")

        return _compared(folder, expected)

    def _fused(self, folder: Path) -> str:
        return _compared(folder, lambda: adapted.fused(folder / "checkpoint", folder / "adapter"))

    def _cut(self, folder: Path) -> str:
        said = _doit(folder, "tokens:model")
        return said or chats.wrong(folder)


def _doit(folder: Path, *tasks: str) -> str:
    """Build from nothing but what libraries say of the architecture; return what went wrong."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    (folder / "models.lock").unlink(missing_ok=True)
    memos = folder / ".mlx-make" / "cache" / "memos"
    for left in (*folder.glob(".mlx-make/*"), *folder.glob(".mlx-make/cache/*")):
        if left.is_dir() and left not in (memos, memos.parent):
            shutil.rmtree(left)
    with (
        mock.patch.object(asking, "_ask_process", ask_here),
        mock.patch.object(limited, "call", call_here),
    ):
        status, out, err = inside.run(folder, *tasks)
    if "Traceback" in out + err:
        return f"traceback\n{out}{err}"
    return f"{OUTCOMES[1]}\n{out}{err}" if status else ""


def _compared(folder: Path, expected: Callable[[], dict[str, torch.Tensor]]) -> str:
    if said := _doit(folder):
        return said
    try:
        wanted = expected()
    except Exception as error:
        return f"built, where it does not fit together\n{type(error).__name__}: {error}"
    found = load_file(folder / "build" / "model" / WEIGHTS)
    if found.keys() != wanted.keys():
        return f"other tensors\n{found.keys() ^ wanted.keys()}"
    for name, tensor in wanted.items():
        made = found[name]
        if made.shape != tensor.shape or made.dtype != torch.float32:
            return f"another shape or dtype\n{name}: {made.shape}, not {tensor.shape}"
        same = made.view(torch.int32) == tensor.contiguous().view(torch.int32)
        if not bool((same | (made.isnan() & tensor.isnan())).all()):
            at = (~same).nonzero()[0].tolist()
            values = f"{made[tuple(at)]}, not {tensor[tuple(at)]}"
            return f"other numbers\n{name} at {at}: {values}"
    return ""


Entry = tuple[str, list[int], bytes]  # dtype, shape, bytes


def _entries(whole: bytes) -> dict[str, Entry]:
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__", None)
    data = whole[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def _file(entries: dict[str, Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(each[2] for each in entries.values())


ALIKE = (("U8", "I8", "BOOL", "F8_E4M3"), ("F16", "BF16", "I16", "U16"), ("F32", "I32", "U32"),
         ("I64", "U64"))  # fmt: skip


def _other_layout(whole: bytes, chance: random.Random) -> bytes:
    """Return a whole file in which one tensor is another: in dtype, shape, name, or not there."""
    entries = _entries(whole)
    names = [name for name in entries if "norm" not in name and "embed" not in name]
    name, other = chance.choice(names), chance.choice(names)
    way = chance.choice(("shape", "shape", "rows", "dtype", "gone", "swapped", "renamed"))
    if way == "gone":
        del entries[name]
    elif way == "swapped":
        entries[name], entries[other] = entries[other], entries[name]
    elif way == "renamed":
        renamed = name.replace("q_proj", "k_proj", 1) + chance.choice(("", "x", ".weight"))
        entries[renamed] = entries.pop(name)
    else:
        entries[name] = {"shape": _reshaped, "rows": _rows, "dtype": _retyped}[way](
            *entries[name], chance
        )
    return _file(entries)


def _retyped(dtype: str, shape: list[int], data: bytes, chance: random.Random) -> Entry:
    alike = next(each for each in ALIKE if dtype in each)
    return chance.choice(alike), shape, data


def _reshaped(dtype: str, shape: list[int], data: bytes, chance: random.Random) -> Entry:
    """Return the same bytes in other axes."""
    shapes = [shape[::-1], [1, *shape], [*shape, 1], [prod(shape)]]
    for factor in (2, 4, 8):
        if len(shape) == 2 and shape[0] % factor == 0:
            shapes.append([shape[0] // factor, shape[1] * factor])
        if shape and shape[-1] % factor == 0:
            shapes.append([*shape[:-1], factor, shape[-1] // factor])
    return dtype, chance.choice(shapes), data


def _rows(dtype: str, shape: list[int], data: bytes, chance: random.Random) -> Entry:
    """Return fewer rows, or more."""
    if not shape or not data:
        return "U8", [len(data)], data
    row = len(data) // shape[0]
    rows = chance.choice((0, 1, shape[0] // 2, shape[0] - 1, shape[0] + 1, 2 * shape[0]))
    return dtype, [rows, *shape[1:]], (data * 2)[: rows * row]


def _other_data(whole: bytes, chance: random.Random) -> bytes:
    """Return a whole file with other numbers in a tensor, small ones as often as large ones."""
    entries = _entries(whole)
    kinds: dict[str, list[str]] = {}
    for name in entries:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    name = chance.choice(kinds[chance.choice([*kinds])])
    dtype, shape, data = entries[name]
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 8))):
        at = chance.randrange(len(changed) or 1) & ~3
        new = chance.choice((b"\0" * 4, b"\xff" * 4, b"\x7f" * 4, chance.randbytes(4)))
        changed[at : at + 4] = new
    del changed[len(data) :]
    if chance.random() < 0.3:
        changed = bytearray((mutated(data, chance) + data)[: len(data)])
    entries[name] = dtype, shape, bytes(changed)
    return _file(entries)


def _quantized_by_mlx(folder: Path) -> None:
    """Write a checkpoint as `mlx_lm.convert -q` does."""
    plain = checkpoints.make("qwen3", folder / "checkpoint", **TINY)
    arrays: dict[str, mx.array] = {}
    for name, array in mx.load(str(plain / WEIGHTS)).items():
        if name.endswith("proj.weight"):
            path = name.removesuffix(".weight")
            parts = mx.quantize(array.astype(mx.float16), group_size=32, bits=4)
            each = zip(("weight", "scales", "biases"), parts, strict=True)
            arrays |= {f"{path}.{part}": made for part, made in each}
        else:
            arrays[name] = array
    mx.save_safetensors(str(plain / WEIGHTS), arrays, {"format": "mlx"})
    config = json.loads((plain / "config.json").read_text())
    settings = {"group_size": 32, "bits": 4}
    (plain / "config.json").write_text(json.dumps({**config, "quantization": settings}))
