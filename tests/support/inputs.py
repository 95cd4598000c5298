"""inputs: files of people and strangers, damaged one at a time, and what is read of them."""

import json
import os
import random
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import torch
from doit.exceptions import InvalidDodoFile

from cache.errors import CacheError
from support import checkpoints
from support.mutations import mutated
from tasks.checkpoints import safetensors_file, torch_file
from tasks.checkpoints.stored import TORCH, Stored
from tasks.cli.options import Options
from tasks.cli.session import Session
from tasks.config import reader
from tasks.core.errors import BuildError
from tasks.layouts.registry import LAYOUTS
from tasks.planning.lockfile import Lock

OUTCOMES = ("read right", "refused")
SECONDS = 20  # of the processor, that reading may take at most
MODELS = """\
# a comment
[defaults]
dtype = "float16"
[cache]
keep = ["cast"]
max_size = "20GB"
[models.model]
source = "checkpoint"
quantize = { bits = 4, rules = [{ match = "*.mlp.*", bits = 8 }, { match = "*.0.*", skip = true }] }
max_shard_size = "1GB"
[models.model.variants.8bit]
quantize = { bits = 8, group_size = 32 }
"""


class Outcome(NamedTuple):
    """What came of a damaged file.

    Attributes:
        outcome: one of `OUTCOMES`; else what is wrong with it.
        detail: all that is needed to look into it.
    """

    outcome: str
    detail: str


class Inputs:
    """Whole files of each kind in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoints.make("llama", folder / "checkpoint", num_hidden_layers=1)
        (folder / "models.toml").write_text(MODELS)
        digests = {"source": "0" * 64, "settings": "1" * 32, "action": "2" * 32}
        built = {**digests, "computer": {"mlx": "1"}, "output": "3" * 32, "blake3": "4" * 64}
        source = {"files": {"config.json": [12, "5" * 32]}, "record": "6" * 64, "nbytes": 99}
        lock = {"version": 1, "sources": {"checkpoint": source}, "targets": {"model": built}}
        (folder / "models.lock").write_text(json.dumps(lock, indent=2))
        values = torch.arange(24, dtype=torch.float16)
        tensors = {"a": values[:12].view(3, 4), "b.weight": values.view(4, 6).T, "c": values[20:]}
        torch.save(tensors, folder / "weights.pth")
        arrays = {"a": mx.arange(12).reshape(3, 4), "b": mx.zeros((2,), mx.bfloat16)}
        mx.save_safetensors(str(folder / "weights.safetensors"), arrays, {"format": "mlx"})
        self.kinds: dict[str, Callable[[Path], str]] = {
            "weights.safetensors": _safetensors,
            "weights.pth": _pth,
            "models.toml": lambda path: reader.load(path) and "",
            "models.lock": lambda path: Lock.load(path, strict=False) and "",
            **{
                f"checkpoint/{path.name}": lambda _: _plan(self.folder)
                for path in sorted(self.checkpoint.glob("*.json"))
            },
        }

    def attempt(self, kind: str, seed: int) -> Outcome:
        """Damage a file of a kind, and see what is read of it."""
        path = self.folder / kind
        whole = path.read_bytes()
        # Of weights, what says where they lie; and seldom the rest.
        end = whole.rfind(b"}") + 1 if path.suffix == ".safetensors" else len(whole)
        data = mutated(whole[:end], random.Random(f"{kind} {seed}")) + whole[end:]
        if path.suffix == ".safetensors" and seed % 2:  # else hardly any header has its length
            data = (len(data) - len(whole) + end - 8).to_bytes(8, "little", signed=True) + data[8:]
        detail = f"{kind}, seed {seed}: {data[:300]!r}"
        path.write_bytes(data)
        begin = _seconds()
        try:
            wrong = self.kinds[kind](path)
        except (BuildError, CacheError, InvalidDodoFile):
            wrong = OUTCOMES[1]
        except Exception as error:
            return Outcome(f"traceback: {type(error).__name__}", f"{detail}\n{error}")
        finally:
            path.write_bytes(whole)
        if (seconds := _seconds() - begin) > SECONDS:
            return Outcome("slow", f"{seconds:.0f} s: {detail}")
        return Outcome(wrong or OUTCOMES[0], detail)


def _seconds() -> float:
    """Return what this process and its children have had of the processor."""
    return sum(os.times()[:4])


def peak_bytes() -> int:
    """Return how much memory this process has had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _bytes(path: Path, stored: Stored) -> bytes:
    with path.open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.nbytes)


def _safetensors(path: Path) -> str:
    found = {stored.name: stored for stored in safetensors_file.read(path)}
    try:
        arrays = mx.load(str(path))
    except (RuntimeError, ValueError):
        return "read, where mx.load refuses it"
    if arrays.keys() != found.keys():
        return "other tensors than mx.load's"
    for name, array in arrays.items():
        if found[name].shape != array.shape or found[name].dtype != str(array.dtype)[9:]:
            return "another shape or dtype than mx.load's"
        whole = array.flatten().view(mx.uint8) if array.size else array
        if array.size and _bytes(path, found[name]) != bytes(whole):
            return "other bytes than mx.load's"
    return ""


def _pth(path: Path) -> str:
    found = {stored.name: stored for stored in torch_file.read(path)}
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # what torch makes of a damaged file has no one type
        return "refused by torch alone"
    if {*theirs} != {*found}:
        return "other tensors than torch's"
    for name, tensor in theirs.items():
        stored = found[name]
        if stored.offset == TORCH:
            continue  # torch reads it
        if tuple(tensor.shape) != stored.shape or str(tensor.dtype)[6:] != stored.dtype:
            return "another shape or dtype than torch's"
        if _bytes(path, stored) != tensor.contiguous().view(torch.uint8).numpy().tobytes():
            return "other bytes than torch's"
    return ""


def _plan(folder: Path) -> str:
    """Plan a target without anything that is remembered, and make its small files."""
    config = reader.load(folder / "models.toml")
    session = Session.open(config, Options(read_only=True))
    if "model" not in session.plans:
        return OUTCOMES[1]
    plan = session.plans["model"]
    layout = LAYOUTS[plan.target.layout]
    layout.files(plan.checkpoint, session.store.memos, [[("a", 1)]], plan.weights)
    return ""
