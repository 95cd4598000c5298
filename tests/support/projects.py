"""projects: a checkpoint, its `models.toml` and what is built of it, to be changed and built again.

A project has one checkpoint, `checkpoint/`, a Llama as Meta ships it or as Hugging Face does, and
unless a test says otherwise one target, `model`. What only costs seconds of imports, mlx-lm's
answer on the architecture and the tokenizer made of Meta's, is asked once and put into each new
project's cache; no stage's result is.
"""

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from support import checkpoints, front_door, inside
from tasks.checkpoints import example, safetensors_file, torch_file

HOOK = Path(__file__).parent / "hook"
SOURCES = ("meta", "huggingface")
STAGES = ("extract", "unshard", "cast", "quantize")
# The layers of each kind of checkpoint, and of the models built of it.
STORED = {
    "meta": ("tok_embeddings", *(f"layers.{i}" for i in range(4)), "norm", "output"),
    "huggingface": ("embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "lm_head"),
}
LAYERS = {
    "meta": ("embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "lm_head"),
    "huggingface": STORED["huggingface"],
}
FOUR_BIT = {"dtype": "float16", "quantize": {"bits": 4}}


@dataclass
class Project:
    """A folder with `models.toml`, and what it says.

    Attributes:
        folder: the project's.
        kind: of its checkpoint, one of `SOURCES`.
        models: what `models.toml` says of each model, by name.
        cache: `[cache] dir`, if given.
        keep: `[cache] keep`, if given.
        memory: `[build] memory`, if given.
        quality: `[quality]`, if given.
        disk: `[build] disk`, if given.
    """

    folder: Path
    kind: str
    models: dict[str, dict] = field(default_factory=dict)
    cache: Path | None = None
    keep: list[str] | None = None
    memory: str | None = None
    quality: dict | None = None
    disk: str | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def state(self) -> Path:
        return self.folder / ".mlx-make"

    @property
    def store(self) -> Path:
        return self.cache or self.state / "cache"

    def configure(self, target: str = "model", /, **keys) -> None:
        """Write `models.toml` with these keys of a model changed; None: without the key."""
        table = self.models.setdefault(target, {"source": "checkpoint"})
        table.update(keys)
        self.models[target] = {key: value for key, value in table.items() if value is not None}
        cache = {"dir": None if self.cache is None else str(self.cache), "keep": self.keep}
        lines = []
        build = {"memory": self.memory, "disk": self.disk}
        tables = {"cache": cache, "build": build, "quality": self.quality or {}}
        for name, said in tables.items():
            settings = [f"{k} = {_toml(v)}" for k, v in said.items() if v is not None]
            lines += [f"[{name}]", *settings] if settings else []
        for name, model in self.models.items():
            lines += [f"[models.{name}]", *(f"{k} = {_toml(v)}" for k, v in model.items())]
        (self.folder / "models.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def doit(
        self, *args: str, expect: int | None = 0, hook: Mapping | None = None
    ) -> front_door.Finished:
        """Run doit on the project, with a hook in a process of its own: see `hook/doit_hook.py`."""
        if hook is None:
            return inside.doit(self.folder, *args, expect=expect)
        return front_door.doit(self.folder, *args, expect=expect, env=hooked(hook))

    def accept(self) -> None:
        """Accept the checkpoint as it is now into `models.lock`."""
        assert self.doit("lock").computed == set()

    def built(self, target: str = "model") -> dict[str, str]:
        """The digest of each file of a built model."""
        return contents(self.folder / "build" / target)

    def anew(self, target: str = "model") -> dict[str, str]:
        """The digest of each file that a build from nothing makes of the same."""
        return _anew(json.dumps(self.models[target]), self.kind, _Checkpoint.at(self.checkpoint))

    @property
    def packs(self) -> Path:
        """Where the cache has weight files."""
        return self.store / "blobs" / "packs"

    def manifest(self, stage: str, layer: str, target: str = "model") -> Path:
        return self.state / "manifests" / target / stage / f"{layer}.json"

    def blob(self, stage: str, layer: str, name: str, target: str = "model") -> Path:
        """Where the store would have the bytes of a tensor that a stage made."""
        manifest = json.loads(self.manifest(stage, layer, target).read_bytes())
        (digest,) = (tensor[-1] for tensor in manifest["tensors"] if tensor[0] == name)
        return self._blob(digest)

    def _blob(self, digest: str) -> Path:
        return self.store / "blobs" / digest[:2] / digest[2:]

    def stored(self, stage: str, layer: str, name: str, target: str = "model") -> "Stored":
        """Where the store has the bytes of a tensor that a stage made."""
        return Stored(self.blob(stage, layer, name, target))

    def lose_packed(self, target: str = "model") -> None:
        """Have the store no longer know the built weight files as such."""
        manifest = json.loads((self.state / "manifests" / target / "pack.json").read_bytes())
        for _, _, _, digest in manifest["tensors"]:
            Stored(self._blob(digest)).lose()

    def actions(self, stage: str, layer: str, target: str = "model") -> list[Path]:
        """The action cache's entries of what a stage made of a layer."""
        wanted = self.manifest(stage, layer, target).read_bytes()
        entries = (self.store / "actions").rglob("*.json")
        return [entry for entry in entries if entry.read_bytes() == wanted]

    def actions_of(self, stage: str) -> list[Path]:
        """The action cache's entries of a stage."""
        entries = (self.store / "actions").rglob("*.json")
        return [e for e in entries if json.loads(e.read_bytes())["action"]["stage"] == stage]

    def tasks(
        self, stages: Iterable[str] = STAGES, *, target: str = "model", pack: bool = True
    ) -> set[str]:
        """The names of a target's tasks, those of the mlx-lm layout."""
        kinds = {stage: STORED if stage == "extract" else LAYERS for stage in stages}
        names = {
            f"{stage}:{target}:{layer}"
            for stage, layers in kinds.items()
            for layer in layers[self.kind]
        }
        return names | ({f"pack:{target}"} if pack else set())

    def quantizing(self, target: str = "model") -> set[str]:
        """The tasks of a target that changed bits concern: all that quantizes, and pack."""
        return self.tasks(["quantize"], target=target) - {f"quantize:{target}:norm"}


@dataclass(frozen=True)
class Stored:
    """A blob: a file of its own, or what a reference says."""

    blob: Path

    @property
    def reference(self) -> Path:
        return self.blob.with_name(f"{self.blob.name}.parts")

    @property
    def part(self) -> tuple[Path, int, int]:
        """The file that has all of it, its first byte there, and its length."""
        if self.blob.exists():
            return self.blob, 0, self.blob.stat().st_size
        ((path, offset, length, *_),) = json.loads(self.reference.read_bytes())["value"]
        return self.blob.parent.parent / path, offset, length

    @property
    def length(self) -> int:
        return self.part[2]

    def lose(self) -> None:
        self.blob.unlink(missing_ok=True)
        self.reference.unlink(missing_ok=True)

    def cut(self, left: int) -> None:
        """Leave so many bytes of it; what comes after it in its file is gone as well."""
        path, offset, _ = self.part
        path.chmod(0o644)
        os.truncate(path, offset + left)

    def flip(self, at: int = 0) -> None:
        path, offset, _ = self.part
        flip(path, offset + at)


def create(folder: Path, kind: str, *, cache: Path | None = None, **keys) -> Project:
    """Make a project whose one target is `model`, with these keys."""
    folder.mkdir(parents=True, exist_ok=True)
    original = _original(kind)
    shutil.copytree(original.checkpoint, folder / "checkpoint")
    project = Project(folder, kind, cache=cache)
    project.configure(**keys)
    _seed(project)
    return project


def outcomes(done: front_door.Finished) -> dict[str, set[str]]:
    """The tasks that a call looked into, by outcome; none of them twice."""
    by_outcome: dict[str, set[str]] = {}
    for entry in done.entries:
        tasks = by_outcome.setdefault(entry["outcome"], set())
        assert entry["task"] not in tasks, f"{entry['task']} {entry['outcome']} twice"
        tasks.add(entry["task"])
    return by_outcome


def contents(folder: Path) -> dict[str, str]:
    """The digest of each file in a folder, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hooked(orders: Mapping | None) -> dict[str, str]:
    """The environment in which `hook/doit_hook.py` does what it is told."""
    if orders is None:
        return {}
    path = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "MLX_MAKE_TEST_HOOK": json.dumps(dict(orders))}


def touch(*paths: Path) -> None:
    """Make files newer, and nothing else of them other."""
    for path in paths:
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def flip(path: Path, offset: int = 0) -> None:
    """Change one bit of a file in place, and its time; a built one is read-only."""
    toggle(path, offset)
    touch(path)


def toggle(path: Path, offset: int) -> None:
    """Change one bit of a file, and make it writable."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def alter(checkpoint: Path, name: str) -> tuple[Path, bytes]:
    """Change a tensor in the first file that has it, in place; the file, and what it held."""
    for path in weight_files(checkpoint):
        read = (safetensors_file if path.suffix == ".safetensors" else torch_file).read
        for stored in read(path):
            if stored.name == name:
                before = path.read_bytes()
                start, half = stored.offset, stored.nbytes // 2
                first, second = before[start : start + half], before[start + half :][:half]
                _overwrite(path, start, second + first)
                return path, before
    raise KeyError(name)


def restore(path: Path, data: bytes) -> None:
    """Write what `alter` found back, in place."""
    _overwrite(path, 0, data)


def weight_files(checkpoint: Path) -> list[Path]:
    return sorted([*checkpoint.glob("*.pth"), *checkpoint.glob("*.safetensors")])


def stored_layers(checkpoint: Path, file: str) -> set[str]:
    """The layers of a Hugging Face checkpoint of which one of its files holds a tensor."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_bytes())
    held = [name for name, where in index["weight_map"].items() if where == file]
    parts = [name.removeprefix("model.").split(".") for name in held if "inv_freq" not in name]
    return {".".join(part[:2]) if part[0] == "layers" else part[0] for part in parts}


def _overwrite(path: Path, start: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)
    touch(path)


def _toml(value) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


@functools.cache
def _workshop() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="mlx-make-projects-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def _original(kind: str) -> Project:
    """The project that others take their checkpoint from, and what is asked only once."""
    project = Project(_workshop() / kind, kind)
    if kind == "meta":
        example.make(project.checkpoint)
    else:
        checkpoints.make("llama", project.checkpoint)
        # Llama 2 has it too, and the mlx-examples layout asks for it.
        shutil.copy(_original("meta").checkpoint / "tokenizer.model", project.checkpoint)
    project.configure()
    project.doit()
    return project


def _seed(project: Project) -> None:
    for kind in ("architectures", "tokenizers"):
        memos = _original(project.kind).store / "memos" / kind
        if memos.exists():
            shutil.copytree(memos, project.store / "memos" / kind, dirs_exist_ok=True)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that equals any other with the same files."""

    folder: Path = field(compare=False)
    files: str

    @classmethod
    def at(cls, folder: Path) -> "_Checkpoint":
        return cls(folder, json.dumps(contents(folder)))


@functools.cache
def _anew(model: str, kind: str, checkpoint: _Checkpoint) -> dict[str, str]:
    project = Project(Path(tempfile.mkdtemp(dir=_workshop())), kind)
    project.configure(**json.loads(model) | {"source": str(checkpoint.folder)})
    _seed(project)
    project.doit()
    return project.built()
