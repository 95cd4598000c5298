"""records: a small project whose records are damaged, and what doit makes of it."""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cache.files.stamp import Stamp
from support import checkpoints, inside, meta
from support.mutations import mutated

MODELS = """\
[models.model]
source = "checkpoint"
dtype = "float16"
quantize = {{ bits = {bits} }}
"""
# Where records lie, by kind. Of these two may make an error: models.lock, which is the user's file,
# and the record of what was packed, without which build/ is not known to be ours to replace.
KINDS = {
    **{f"memo {kind}": f".mlx-make/cache/memos/{kind}/*/*.json"
       for kind in ("headers", "architectures", "extracts", "cards", "token_ids", "tokenizers")},
    "reference": ".mlx-make/cache/blobs/*/*.parts",
    "action": ".mlx-make/cache/actions/*/*.json",
    "source record": ".mlx-make/cache/sources/*/record.json",
    "source file": ".mlx-make/cache/sources/*/files/*",
    "manifest": ".mlx-make/manifests/model/**/*.json",
    "doit.json": ".mlx-make/doit.json",
    "up-to-date.json": ".mlx-make/up-to-date.json",
    "build log": ".mlx-make/log.jsonl",
    "models.lock": "models.lock",
}  # fmt: skip
# By what alone build/ is known to be ours, where the other was removed.
SAID = {"models.lock": ("models.lock", "was not built here"), "manifest": ("was not built here",)}
LOOKS = (
    ["list", "--all"], ["plan"], ["why", "pack:model"], ["cache", "stats"], ["summary"],
    ["graph"], ["info", "pack:model"], ["cache", "gc", "--dry-run", "--max-size", "1kB"],
    ["cache", "verify"],
)  # fmt: skip
OUTCOMES = ("built right", "said so")


def tasks_in(database: Path) -> dict[str, Any]:
    """What doit's database says of all tasks; each of its lines is sealed."""
    head, *targets = [json.loads(line) for line in database.read_bytes().splitlines()]
    assert all(line.keys() == {"seal", "key", "value"} for line in (head, *targets))
    tasks: dict[str, Any] = head["value"]["tasks"]
    assert len(targets) == len(head["value"]["targets"])
    for line in targets:
        tasks |= line["value"]
    return tasks


class Outcome(NamedTuple):
    """What came of damaged records.

    Attributes:
        outcome: one of `OUTCOMES`; else what is wrong with it.
        detail: all that is needed to look into it.
    """

    outcome: str
    detail: str


def _run(folder: Path, *args: str) -> tuple[int, str]:
    """Run doit; return its exit status, and all that it wrote, to whatever stream."""
    with tempfile.NamedTemporaryFile("w+") as file:
        kept = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in kept:
                os.dup2(file.fileno(), number)
            # Where none is named, doit's own commands write to the stdout of when they were loaded.
            written = [] if args else ["-o", file.name]
            status, out, err = inside.run(folder, *args, *written)
            sys.stdout.flush()
        finally:
            for number, descriptor in kept.items():
                os.dup2(descriptor, number)
                os.close(descriptor)
        file.seek(0)
        return status, file.read() + out + err


class Damaged:
    """A built project in `folder`, which is as it was after each try."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.expected: dict[int, dict[str, bytes]] = {}
        self._files: dict[str, tuple[bytes, Stamp]] = {}

    @classmethod
    def create(cls, folder: Path, kind: str = "llama") -> "Damaged":
        project = cls(folder, kind)
        if kind in meta.RELEASES:
            meta.make(kind, folder / "checkpoint")
        else:
            checkpoints.make(kind, folder / "checkpoint", num_hidden_layers=1)
        (folder / "checkpoint" / "README.md").write_text("---\nlicense: mit\n---\n")
        for bits in (8, 4, 4):  # the last finds nothing to do
            project.configure(bits)
            assert _run(folder)[0] == 0
            project.expected[bits] = project.built()
        project.configure(4)
        assert project.built() == project.expected[4]
        for path in project._walk():
            project._files[path] = (Path(path).read_bytes(), Stamp.of(path))
        return project

    def configure(self, bits: int) -> None:
        (self.folder / "models.toml").write_text(MODELS.format(bits=bits), encoding="utf-8")

    def built(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.folder / "build" / "model").glob("*")}

    def kinds(self) -> list[str]:
        """The kinds of records that there are."""
        return [kind for kind in KINDS if any(self.folder.glob(KINDS[kind]))]

    def attempt(self, seed: int, *kinds: str) -> Outcome:
        """Damage a record of each kind, and see what is built and said."""
        chance = random.Random(f"{' '.join(kinds)} {seed}")
        damaged = []
        for kind in kinds:
            path = chance.choice(sorted(self.folder.glob(KINDS[kind])))
            data = mutated(path.read_bytes(), chance)
            path.unlink()  # it may be the checkpoint's or build/'s own file, too
            path.write_bytes(data)
            damaged.append(f"{path.relative_to(self.folder)}: {data[:300]!r}")
        bits, args = self._provoke(chance)
        detail = "\n".join([f"{', '.join(kinds)}, seed {seed}; {args}", *damaged])
        try:
            return Outcome(*self._tried(kinds, bits, args, detail))
        finally:
            self._restore()

    def _provoke(self, chance: random.Random) -> tuple[int, list[str]]:
        """Have doit read more than it would where all is up to date; return what to ask of it."""
        bits = 4
        way = chance.choice(("nothing", "bits", "manifests", "database", "build", "all", "look"))
        if way == "bits":
            bits = 8
            self.configure(bits)
        if way in ("manifests", "all"):
            shutil.rmtree(self.folder / ".mlx-make" / "manifests")
        if way in ("database", "all"):
            (self.folder / ".mlx-make" / "doit.json").unlink()
        if way in ("build", "all"):
            shutil.rmtree(self.folder / "build")
        return bits, list(chance.choice(LOOKS)) if way == "look" else []

    def _tried(
        self, kinds: Sequence[str], bits: int, args: list[str], detail: str
    ) -> tuple[str, str]:
        said = ""
        if args:
            _, said = _run(self.folder, *args)
        if "Traceback" not in said:
            status, more = _run(self.folder)
            said += more
        if "Traceback" in said:
            return "traceback", f"{detail}\n{said}"
        if status == 0:
            right = self.built() == self.expected[bits]
            return ("built right" if right else "built wrong"), f"{detail}\n{said}"
        expected = [text for kind in kinds for text in SAID.get(kind, ())]
        if not expected:
            return "not mended", f"{detail}\n{said}"
        said_so = any(text in said for text in expected)
        return ("said so" if said_so else "not said"), f"{detail}\n{said}"

    def _walk(self) -> Iterator[str]:
        for root, folders, files in os.walk(self.folder):
            if root == str(self.folder):
                folders.remove("checkpoint")
            yield from (os.path.join(root, name) for name in files)

    def _restore(self) -> None:
        left = dict(self._files)
        for name in [*self._walk()]:
            data, stamp = left.pop(name, (None, None))
            if data is None:
                with suppress(FileNotFoundError):  # of what goes by itself
                    os.unlink(name)
            elif Stamp.of(name) != stamp:
                self._write(name, data, stamp)
        for name, (data, stamp) in left.items():
            self._write(name, data, stamp)

    def _write(self, name: str, data: bytes, stamp: Stamp) -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns))
        self._files[name] = (data, Stamp.of(name))
