"""project_inputs: files of a project beside its checkpoint, and a hub's answers, damaged and used.

models.toml over today's keys, a template of cards, what models.lock has of a budget's choice, an
importance matrix, a text of several files, and what a hub says of a repository, of its files and of
where they lie.
"""

import json
import random
import shutil
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np

from support import adapted, chats, checkpoints, hub_server, inside
from support.inputs import OUTCOMES, Files, ask_here, call_here
from support.mutations import mutated
from support.servers import Answer
from tasks.checkpoints import hub_requests
from tasks.cli.options import Options
from tasks.cli.session import Session
from tasks.config import reader
from tasks.layouts import asking, limited
from tasks.layouts.registry import LAYOUTS
from tasks.planning import model_card
from tasks.quality import imatrix
from tasks.quality.imatrix import Entry

TINY = {"num_hidden_layers": 1, "head_dim": 16, "hidden_size": 64, "intermediate_size": 64}
TODAY = """\
[cache]
dir = ".mlx-make/cache"
keep = ["cast"]
max_size = "20GB"
remote = "file:///nonexistent/store"
mode = "off"
[build]
memory = "4GiB"
disk = "12GB"
cluster = "tcp://127.0.0.1:9"
cluster_lost = "stop"
[defaults]
publish = "org/{target}"
create = false
private = true
collection = "All of ours"
tags = ["chat", "legal"]
card = "card.md.j2"
files = "extra"
[models.model]
source = "checkpoint"
dtype = "float32"
device = "cpu"
max_shard_size = "1GB"
[models.model.quantize]
method = "gptq"
bits = 4
group_size = 32
rules = [{ match = "*.up_proj", skip = true }, { match = "*.v_proj", bits = 8, mode = "affine" }]
[models.model.matrix]
bits = [2, 3, 8]
[models.budget]
source = "checkpoint"
quantize = { target_bpw = 7.0, min_bits = 3, candidates = [{ bits = 3 }, { bits = 8 }] }
[models.fits]
source = "checkpoint"
layout = "mlx-lm"
loader = "transformers"
quantize = { fit = "2MB", context = 16, group_size = 32 }
[models.exact]
source = "checkpoint"
quantize = { target_bpw = 6.0, exact = true, group_size = 32 }
[models.tuned]
source = "checkpoint"
adapter = "adapter"
[models.tuned.variants.seen]
layout = "mlx-vlm"
publish = "org/seen"
[models.tuned.variants.kept]
quantize = "keep"
[models.tuned.variants.plain]
dequantize = true
quantize = { recipe = "mixed_3_6", mode = "affine", group_size = 64 }
[quality]
text = ["text.jsonl", "list.txt"]
evaluate_text = "held-out.txt"
samples = 3
sequence_length = 8
seed = 7
top_logits = 16
"""
CARD = """\
{{ front_matter }}
# {{ repository or name }}, {{ size }}, {{ bits_per_weight }} bits
{% for line in quantized %}- {{ line | upper }}{% if not loop.last %};{% endif %}
{% endfor %}
{% if base %}Of [{{ base }}](https://huggingface.co/{{ base }}) at {{ commit[:7] }}.{% endif %}
{% if error is not none %}Error: {{ "%.3g" | format(error) }}{% endif %}
{% if quality %}{{ quality.mean | round(3) }} {{ [1, 2] | map("string") | join(", ") }}{% endif %}
{% set made = versions.items() | list %}{{ made | length }} {{ computer | join(" ") }} {{ toml }}
{% macro cell(text, wide=3) %}{{ text.ljust(wide) }}{% endmacro %}{{ cell(digest) }}
"""
CHOSEN = """\
[models.model]
source = "checkpoint"
device = "cpu"
dtype = "float32"
quantize = { target_bpw = 5.0, group_size = 32 }
[quality]
samples = 3
sequence_length = 8
text = ["text.jsonl", "list.txt"]
evaluate_text = "held-out.txt"
"""
RUN = """\
[models.model]
source = "checkpoint"
device = "cpu"
dtype = "float32"
quantize = { bits = 4, group_size = 32, method = "gptq" }
[quality]
samples = 3
sequence_length = 8
text = "text.txt"
evaluate_text = "models.toml"
"""
# What a file is damaged from on, by what stands behind its name.
PARTS = {"quality": b"[quality]", "chosen": b'"chosen"', "quantization": b'"quantization"'}
ON_HUB = '[models.model]\nsource = "hf:org/model"\ndtype = "float16"\n'
LIST = "another text of the list\n" * 8
WEIGHTS = "model*.safetensors"
REPOSITORY = "org/model"
INFO, TREE, BATCH = "hub/info.json", "hub/tree.json", "hub/batch.json"


class ProjectInputs(Files):
    """Projects, each made as the first of its files is damaged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._made: set[str] = set()
        self._expected: dict[str, dict[str, bytes]] = {}
        self._stack = ExitStack()
        self._hub: hub_server.Hub | None = None
        for kind, check in {
            "today/models.toml": self._planned,
            "today/models.toml#quality": self._planned,
            "card/card.md.j2": self._planned,
            "chosen/models.lock": self._built,
            "chosen/models.lock#chosen": self._built,
            "texts/list.txt": self._cut,
            "texts/text.jsonl": self._cut,
            "run/checkpoint/config.json": self._run,
            "run/checkpoint/tokenizer.json": self._run,
            "claimed/model/config.json": self._verified,
            "claimed/model/config.json#quantization": self._verified,
            "claimed/model/README.md": self._verified,
            "imatrix/model.gguf": _importances,
            INFO: self._fetched,
            TREE: self._fetched,
            BATCH: self._fetched,
        }.items():
            self._add(kind, check)

    def _add(self, kind: str, check: Callable[[Path], str]) -> None:
        self.kinds[kind] = lambda _: check(self.folder / kind.partition("#")[0])

    def attempt(self, seed: int, *kinds: str) -> Any:
        for name in {kind.partition("/")[0] for kind in kinds} - self._made:
            (self.folder / name).mkdir()
            getattr(self, f"_make_{name}")(self.folder / name)
            self._made.add(name)
            for kind in self.kinds:
                if kind.startswith(f"{name}/"):
                    said = self.kinds[kind](Path())
                    assert not said, said
        return super().attempt(seed, *kinds)

    def damaged(self, kind: str, whole: bytes, seed: int) -> bytes:
        _, _, part = kind.partition("#")
        if part:
            at, end = whole.index(PARTS[part]), len(whole)
            if part != "quality":  # the value, and nothing behind it
                at += len(PARTS[part]) + 2
                end = at + json.JSONDecoder().raw_decode(whole[at:].decode())[1]
            return (
                whole[:at] + mutated(whole[at:end], random.Random(f"{kind} {seed}")) + whole[end:]
            )
        return super().damaged(kind, whole, seed)

    def _make_today(self, folder: Path) -> None:
        checkpoints.make("qwen3", folder / "checkpoint", **TINY)
        adapted.write("peft-lora", folder / "adapter")
        (folder / "extra").mkdir()
        (folder / "extra" / "notes.md").write_text("notes\n")
        (folder / "card.md.j2").write_text(CARD)
        chats.write(folder)
        (folder / "list.txt").write_text(LIST)
        (folder / "models.toml").write_text(TODAY)

    def _make_card(self, folder: Path) -> None:
        checkpoints.make("qwen3", folder / "checkpoint", **TINY)
        (folder / "card.md.j2").write_text(CARD)
        lines = f'{ON_HUB.replace("hf:org/model", "checkpoint")}card = "card.md.j2"\n'
        (folder / "models.toml").write_text(f"{lines}quantize = {{ bits = 4, group_size = 32 }}\n")

    def _make_chosen(self, folder: Path) -> None:
        checkpoints.make("llama", folder / "checkpoint", **TINY)
        chats.write(folder)
        (folder / "list.txt").write_text(LIST)
        (folder / "models.toml").write_text(CHOSEN)
        assert not _doit(folder, "pack:model")
        self._expected["chosen"] = _weights(folder)

    def _make_texts(self, folder: Path) -> None:
        self._make_chosen(folder)
        del self._expected["chosen"]

    def _make_run(self, folder: Path) -> None:
        checkpoints.make("qwen3", folder / "checkpoint", **TINY)
        (folder / "text.txt").write_text("the player of the other tower\n" * 8)
        (folder / "models.toml").write_text(RUN)

    def _make_claimed(self, folder: Path) -> None:
        checkpoints.make("qwen3", folder / "checkpoint", **TINY)
        (folder / "models.toml").write_text(f"{RUN.partition('quantize')[0]}quantize.bits = 4\n")
        assert not _doit(folder)
        shutil.copytree(folder / "build" / "model", folder / "model")
        for path in (folder / "model").iterdir():
            path.chmod(0o644)

    def _make_imatrix(self, folder: Path) -> None:
        chance = np.random.default_rng(0)
        entries = {
            f"blk.{n}.ffn_up.weight": Entry(
                chance.random((1 + n, 8), np.float32), np.full(1 + n, 30, np.float32)
            )
            for n in range(3)
        }
        imatrix.write(folder / "model.gguf", entries, ["text.txt"], 2, 16)

    def _make_hub(self, folder: Path) -> None:
        made = checkpoints.make("qwen3", folder / "model", files=3, **TINY)
        hub = self._stack.enter_context(hub_server.serve(folder / "uploaded"))
        for name in ("FIRST_WAIT_SECONDS", "MOST_WAIT_SECONDS"):
            self._stack.enter_context(mock.patch.object(hub_requests, name, 0.001))
        repository = hub.repository(REPOSITORY)
        repository.add_folder(made)
        self._hub = hub
        info = _get(f"{hub.url}/api/models/{REPOSITORY}?blobs=true")
        tree = _get(f"{hub.url}/api/models/{REPOSITORY}/tree/{repository.head}?recursive=true")
        large = [f for f in repository.files.values() if f.large]
        objects = [{"oid": f.content.sha256, "size": f.content.size} for f in large]
        asked = {"operation": "download", "transfers": ["basic"], "objects": objects}
        url = f"{hub.url}/{REPOSITORY}.git/info/lfs/objects/batch"
        batch = _get(url, json.dumps(asked).encode())
        for kind, data in {INFO: info, TREE: tree, BATCH: batch}.items():
            (self.folder / kind).write_bytes(data)
        (folder / "models.toml").write_text(ON_HUB)

    def _planned(self, path: Path) -> str:
        """Plan all targets, make their small files and fill in their cards."""
        config = reader.load(path.parent / "models.toml")
        with (
            mock.patch.object(asking, "_ask_process", ask_here),
            mock.patch.object(limited, "call", call_here),
        ):
            session = Session.open(config, Options(read_only=True))
            for plan in session.plans.values():
                LAYOUTS[plan.target.layout].files(
                    plan.checkpoint, session.store.memos, [[("a", 1)]], plan.weights
                )
                model_card.check(plan, session.store.memos)
        return "" if session.plans else OUTCOMES[1]

    def _built(self, path: Path) -> str:
        """Build by a lock: a choice that it has is one, or is not taken."""
        folder = path.parent
        shutil.rmtree(folder / "build", ignore_errors=True)
        if said := _doit(folder, "pack:model"):
            return said
        same = _weights(folder) == self._expected.setdefault("chosen", _weights(folder))
        return "" if same else "another model than was locked"

    def _cut(self, path: Path) -> str:
        return _doit(path.parent, "tokens:model")

    def _run(self, path: Path) -> str:
        """Build what the model is run for, of whatever its configuration and tokenizer say."""
        folder = path.parents[1]
        shutil.rmtree(folder / "build", ignore_errors=True)
        (folder / "models.lock").unlink(missing_ok=True)
        _forget(folder)
        return _doit(folder)

    def _verified(self, path: Path) -> str:
        """Verify a model that may be anybody's: it is one of three things, or that is told."""
        folder = path.parents[1]
        source = ("--source", str(folder / "checkpoint"))
        with mock.patch.object(asking, "_ask_process", ask_here):
            status, out, err = inside.run(folder, "verify", *source, str(path.parent))
        if "Traceback" in out + err:
            return f"traceback\n{out}{err}"
        return "" if status in (0, 1) else f"{OUTCOMES[1]}\n{out}{err}"

    def _fetched(self, path: Path) -> str:
        """Build by a hub that gives an answer from a file; no other is asked for it."""
        assert self._hub
        folder = path.parent
        kind = f"{folder.name}/{path.name}"
        bodies = {name: (self.folder / name).read_bytes() for name in (INFO, TREE, BATCH)}
        sizes = kind != TREE
        self._hub.fault = lambda request: _answer(request, bodies, sizes=sizes)
        for left in (folder / "build", folder / ".mlx-make", folder / "home"):
            if left.name != ".mlx-make":
                shutil.rmtree(left, ignore_errors=True)
            else:
                _forget(folder)
        (folder / "models.lock").unlink(missing_ok=True)
        with (
            self._hub.inside(folder / "home"),
            mock.patch("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 2),
        ):
            said = _doit(folder)
        if said:
            return said
        same = _weights(folder) == self._expected.setdefault("hub", _weights(folder))
        return "" if same else "another model than the hub's"


def _answer(request: hub_server.Request, bodies: dict[str, bytes], *, sizes: bool) -> Any:
    """The answer to a request, if it is one of those in the files; ``sizes``: the first has all."""
    kinds = {f"/api/models/{REPOSITORY}": INFO, f"/{REPOSITORY}.git/info/lfs/objects/batch": BATCH}
    kind = kinds.get(request.path.partition("/revision/")[0])
    if "/tree/" in request.path:
        kind = TREE
    if kind is None:
        return None
    body = bodies[kind]
    if kind == INFO and not sizes:  # so that the other is asked for
        said = json.loads(body)
        said["siblings"] = [{"rfilename": each["rfilename"]} for each in said["siblings"]]
        body = json.dumps(said).encode()
    return Answer(200, body, {"Content-Type": "application/json"})


def _get(url: str, data: bytes | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {hub_server.TOKEN}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        body: bytes = answer.read()
    return body


def _weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "build" / "model").glob(WEIGHTS)}


def _forget(folder: Path) -> None:
    """Remove all that is remembered, but for what libraries say of architectures."""
    cache = folder / ".mlx-make" / "cache"
    for left in (*folder.glob(".mlx-make/*"), *cache.glob("*"), *cache.glob("memos/*")):
        if left.is_dir() and left not in (cache, cache / "memos", cache / "memos/architectures"):
            shutil.rmtree(left)


def _doit(folder: Path, *tasks: str) -> str:
    """Run doit; return what went wrong."""
    with (
        mock.patch.object(asking, "_ask_process", ask_here),
        mock.patch.object(limited, "call", call_here),
    ):
        status, out, err = inside.run(folder, *tasks)
    if "Traceback" in out + err:
        return f"traceback\n{out}{err}"
    return f"{OUTCOMES[1]}\n{out}{err}" if status else ""


def _importances(path: Path) -> str:
    """Read a file, and compare what is read with what llama.cpp's own package reads."""
    found = imatrix.read(path)
    theirs = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    for name, entry in found.items():
        for part, values in ((imatrix.SUMS, entry.sums), (imatrix.COUNTS, entry.counts)):
            if theirs[name + part].tobytes() != values.tobytes():
                return f"other numbers\n{name}{part}"
    named = {name.removesuffix(imatrix.SUMS) for name in theirs if name.endswith(imatrix.SUMS)}
    return "" if named == found.keys() else f"others\n{named ^ found.keys()}"
