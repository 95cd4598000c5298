"""inputs: files of people and strangers, damaged one at a time, and what is read of them."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import torch
from doit.exceptions import InvalidDodoFile

from cache.errors import CacheError
from support import checkpoints, inside, meta
from support.mutations import mutated
from tasks.checkpoints import safetensors_file, torch_file
from tasks.checkpoints.stored import TORCH, Stored
from tasks.cli.options import Options
from tasks.cli.session import Session
from tasks.config import reader
from tasks.core.errors import BuildError
from tasks.layouts import asking, chats, limited, probe
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.registry import LAYOUTS
from tasks.planning import card_template
from tasks.planning.lockfile import Lock
from tasks.quality import cutting

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
ONE = '[models.model]\nsource = "{}"\nquantize = {{ bits = 4 }}\n'
# Beside what every checkpoint here has.
BESIDE = {
    "added_tokens.json": '{"<a>": 320}',
    "chat_template.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "README.md": "---\nlicense: mit\nlanguage: [en]\ntags:\n- x\nbase_model: a/b\n---\n# A model\n",
}


class Outcome(NamedTuple):
    """What came of a damaged file.

    Attributes:
        outcome: one of `OUTCOMES`; else what is wrong with it.
        detail: all that is needed to look into it.
    """

    outcome: str
    detail: str


class Files:
    """Whole files of each kind in a folder.

    Attributes:
        folder: the folder.
        kinds: what reads a file, and returns what is wrong, by the file's path in it; behind a #
            may follow what of it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, Callable[[Path], str]] = {}

    def attempt(self, seed: int, *kinds: str) -> Outcome:
        """Damage a file of each kind, and see what is read of them; all are of one project."""
        paths = {kind: self.folder / kind.partition("#")[0] for kind in kinds}
        whole = {kind: path.read_bytes() for kind, path in paths.items()}
        damaged = {kind: self.damaged(kind, data, seed) for kind, data in whole.items()}
        detail = "\n".join(f"{kind}, seed {seed}: {data[:300]!r}" for kind, data in damaged.items())
        for kind, data in damaged.items():
            paths[kind].write_bytes(data)
        begin = _seconds()
        try:
            wrong = self.kinds[kinds[0]](paths[kinds[0]])
        except (BuildError, CacheError, InvalidDodoFile):
            wrong = OUTCOMES[1]
        except Exception as error:
            return Outcome(f"traceback: {type(error).__name__}", f"{detail}\n{error}")
        finally:
            for kind, data in whole.items():
                paths[kind].write_bytes(data)
        if (seconds := _seconds() - begin) > SECONDS:
            return Outcome("slow", f"{seconds:.0f} s: {detail}")
        outcome, _, more = (wrong or OUTCOMES[0]).partition("\n")
        return Outcome(outcome, f"{detail}\n{more}")

    def damaged(self, kind: str, whole: bytes, seed: int) -> bytes:
        """Return what a file becomes."""
        return _damaged(kind, whole, seed)


class Inputs(Files):
    """Files of people and strangers that are read before anything is built."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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
        self.kinds = {
            "weights.safetensors": _safetensors,
            "weights.pth": _pth,
            "models.toml": lambda path: reader.load(path) and "",
            "models.lock": lambda path: Lock.load(path, strict=False) and "",
        }
        made = checkpoints.make("llama", folder / "plain" / "checkpoint", num_hidden_layers=1)
        for file, text in BESIDE.items():
            (made / file).parent.mkdir(exist_ok=True)
            (made / file).write_text(text)
        self._add("plain", "*.json", *BESIDE)
        meta.make("llama-2", folder / "meta" / "checkpoint")
        self._add("meta", "*.json", "tokenizer.model")
        shutil.copytree(folder / "plain/build/model", folder / "quantized" / "checkpoint")
        self._add("quantized", "config.json")

    def _add(self, project: str, *patterns: str) -> None:
        """Have files of a project's checkpoint among the kinds; built once, all is remembered."""
        folder = self.folder / project
        (folder / "models.toml").write_text(ONE.format("checkpoint"))
        inside.doit(folder)
        for pattern in patterns:
            for path in sorted((folder / "checkpoint").glob(pattern)):
                self.kinds[str(path.relative_to(self.folder))] = lambda _: _plan(folder)


def _damaged(kind: str, whole: bytes, seed: int) -> bytes:
    # Of weights, what says where they lie; and seldom the rest.
    weights = kind.endswith(".safetensors")
    end = 8 + int.from_bytes(whole[:8], "little") if weights else len(whole)
    data = mutated(whole[:end], random.Random(f"{kind} {seed}")) + whole[end:]
    if weights and seed % 2:  # else hardly any header has its length
        data = (len(data) - len(whole) + end - 8).to_bytes(8, "little", signed=True) + data[8:]
    return data


def _seconds() -> float:
    """Return what this process and its children have had of the processor."""
    return sum(os.times()[:4])


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
    """Plan a target, and make its small files; what is made of damaged ones is not remembered."""
    config = reader.load(folder / "models.toml")
    with mock.patch.object(asking, "_ask_process", ask_here):
        session = Session.open(config, Options(read_only=True))
        if "model" not in session.plans:
            return OUTCOMES[1]
        plan = session.plans["model"]
        layout = LAYOUTS[plan.target.layout]
        layout.files(plan.checkpoint, session.store.memos, [[("a", 1)]], plan.weights)
    return ""


def ask_here(question: dict[str, Any], library: str, *_: object) -> Any:
    """Ask a library as a process of its own would be asked, which takes seconds to start."""
    return json.loads(json.dumps(probe.answer(question, LIBRARIES[library])))


IN_A_PROCESS = limited.call
HERE: dict[str, Callable[..., Any]] = {
    chats.__name__: chats._render,
    cutting.__name__: cutting._cut,
    card_template.__name__: lambda *asked: [*card_template._fill_in(*asked)],
}


def call_here(
    module: str, files: Mapping[str, bytes], limits: limited.Limits, given: Any = None
) -> Any:
    """Call what is called in a process of its own, which takes a second to start."""
    if module not in HERE:
        return IN_A_PROCESS(module, files, limits, given)
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        try:
            return json.loads(json.dumps(HERE[module](Path(name), json.loads(json.dumps(given)))))
        except Exception as error:
            return limited.Refused(f"{type(error).__name__}: {error}")
