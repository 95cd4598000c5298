"""lies: a remote store that lies, about each result and each blob; prints a Markdown table.

    TMPDIR=/dev/shm python benchmarks/lies.py
    TMPDIR=/dev/shm python benchmarks/lies.py --first 500 --count 100    # of each way

One machine builds two small targets into a folder as a remote store, with a signing key or without.
Then one thing of it is made a lie, alike wherever the store says it, and a machine with an empty
cache builds by it: with that key or without, with models.lock, the checkpoint or both. Where there
is a key or a lock, what it builds must be equal to the byte, or nothing at all and an error. Where
there is neither, the store's word is all that there is, and only a traceback is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from cache.records.manifests import Action, Manifest, Tensor
from cache.remote.signing import sign
from support.machines import REMOTE, SIGNING, SMALL, Machine, first
from support.projects import FOUR_BIT

KEY = "a key"
OUTCOMES = ("right", "an error, nothing built", "the store's word")
Tensors = list[list[Any]]  # name, dtype, shape, digest
Files = dict[Path, bytes]  # what a store has instead, by name


class Way(NamedTuple):
    """What a machine has.

    Attributes:
        key: whether it and the store have a signing key.
        lock: models.lock.
        checkpoint: the checkpoint itself.
    """

    key: bool
    lock: bool
    checkpoint: bool

    def __str__(self) -> str:
        has = [name for name, held in self._asdict().items() if held]
        return ", ".join(has) or "nothing"


# Without lock and checkpoint nothing is known of what to build.
WAYS = {
    str(way): way
    for each in product((False, True), repeat=3)
    if (way := Way(*each))[1:] != (False, False)
}


def _of_others(tensors: Tensors, others: list[Tensors]) -> Iterator[Tensors]:
    """Yield the results of other actions, whole and each digest in the place of one here."""
    for other in others:
        yield other
        if len(other) == len(tensors):
            yield [[*mine[:3], theirs[3]] for mine, theirs in zip(tensors, other, strict=True)]


def _changed(tensors: Tensors, others: list[Tensors]) -> Iterator[Tensors]:
    """Yield what can be said otherwise of one result."""
    digests = [tensor[3] for tensor in tensors]
    yield [[*t[:3], d] for t, d in zip(tensors, digests[1:] + digests[:1], strict=True)]
    yield tensors[:-1]
    yield [*tensors, ["extra", *tensors[-1][1:]]]
    yield [[name, "float32", shape, d] for name, _, shape, d in tensors]
    yield [[name, dtype, [*shape, 1], d] for name, dtype, shape, d in tensors]
    yield [[name, dtype, shape, "0" * 32] for name, dtype, shape, _ in tensors]
    yield [[f"../../{name}", *t] for name, *t in tensors]
    yield []


def _swapped(tensors: Tensors, others: list[Tensors]) -> Iterator[Tensors]:
    """Yield one result with two tensors, of one dtype and shape, in each other's place."""
    for one, other in combinations(range(len(tensors)), 2):
        if tensors[one][1:3] == tensors[other][1:3] and tensors[one][3] != tensors[other][3]:
            changed = [*tensors]
            changed[one] = [*tensors[one][:3], tensors[other][3]]
            changed[other] = [*tensors[other][:3], tensors[one][3]]
            yield changed


MAKERS: tuple[Callable[[Tensors, list[Tensors]], Iterator[Tensors]], ...] = (
    _of_others,
    _changed,
    _swapped,
)


def lies(store: Path, *, signed: bool) -> Iterator[tuple[str, str, Files]]:
    """Yield what a store can say that is not so: of what, how, and the files that say it.

    Args:
        store: an honest one.
        signed: whether there is a signing key: lies are signed by nobody, or with another key.
    """
    paths = sorted((store / "records/actions").rglob("*.json"))
    records = {path: json.loads(path.read_bytes())["record"] for path in paths}
    results = {path: record["manifest"]["tensors"] for path, record in records.items()}
    lists = sorted((store / "records/lists").rglob("*.json"))
    for path, record in records.items():
        others = [t for other, t in results.items() if other != path]
        stage = record["manifest"]["action"]["stage"]
        for maker in MAKERS:
            for tensors in maker(results[path], others):
                lie = {**record, "manifest": _manifest(record["manifest"], tensors)}
                for secret in (None, b"another key") if signed else (None,):
                    yield (
                        stage,
                        maker.__name__,
                        {
                            path.relative_to(store): sign("actions", _key(path), lie, secret),
                            **dict(_lists(store, lists, _key(path), lie, secret)),
                        },
                    )
        for data in (b"", b"[" * 100_000, b"{}", paths[0].read_bytes(), paths[-1].read_bytes()):
            without = {each.relative_to(store): b"" for each in lists}  # so that it is read
            yield stage, "another file", {path.relative_to(store): data, **without}
    for path in lists:
        for data in (b"", b"[" * 100_000, b"{}", lists[0].read_bytes(), lists[-1].read_bytes()):
            yield "list", "another file", {path.relative_to(store): data}
    blobs = sorted(p for p in store.rglob("*") if p.is_file() and "records" not in p.parts)
    for number, path in enumerate(blobs):
        data = path.read_bytes()
        other = blobs[number - 1].read_bytes()
        for wrong in (b"", data[:-1], data + b"x", bytes(len(data)), other):
            yield "blob", "another file", {path.relative_to(store): wrong}


def _manifest(said: dict[str, Any], tensors: Tensors) -> Any:
    """Return a manifest with other tensors, whole and sealed as any is."""
    action = Action(**said["action"])
    other = {name: Tensor(dtype, tuple(shape), digest) for name, dtype, shape, digest in tensors}
    return json.loads(Manifest(action, other, tuple(said["notes"])).to_bytes())


def _key(path: Path) -> str:
    return path.parent.name + path.stem


def _lists(
    store: Path, lists: list[Path], key: str, lie: dict[str, Any], secret: bytes | None
) -> Iterator[tuple[Path, bytes]]:
    """Yield the lists that have an action's record, with a lie in its place."""
    for path in lists:
        record = json.loads(path.read_bytes())["record"]
        if key in record:
            data = sign("lists", _key(path), {**record, key: lie}, secret)
            yield path.relative_to(store), data


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = tally.parser(__doc__, count=1_000_000, what="way")
    parser.add_argument("--every", type=int, default=1, help="only each so many'th lie")
    arguments = parser.parse_args()

    def counts(folder: Path) -> list[str]:
        return [str(len(Lying(folder).told(key=key))) for key in (False, True)]

    count = [*map(int, tally.asked(counts))]
    first, most, every = arguments.first, arguments.count, arguments.every
    rounds = (
        (number, (name,))
        for name, way in WAYS.items()
        for number in range(first, min(count[way.key], first + most), every)
    )
    tally.run(
        rounds,
        lambda folder: Lying(folder).attempt,
        OUTCOMES,
        heading="what the machine has | lies",
        arguments=arguments,
    )


class Lying:
    """Honest stores in a folder, and builds by copies of them that lie."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._honest: dict[bool, tuple[Machine, list[tuple[str, str, Files]]]] = {}

    def told(self, *, key: bool) -> list[tuple[str, str, Files]]:
        """Return all lies of a store, with a signing key or without."""
        return self._made(key)[1]

    def _made(self, key: bool) -> tuple[Machine, list[tuple[str, str, Files]]]:
        if key not in self._honest:
            machine = _honest(self._folder / f"key-{key}", signed=key)
            self._honest[key] = machine, [*lies(machine.folder.parent / "store", signed=key)]
        return self._honest[key]

    def attempt(self, number: int, name: str) -> tuple[str, str]:
        """Build on another machine by a store that lies; return what came of it."""
        way = WAYS[name]
        honest, told = self._made(way.key)
        of, how, files = told[number]
        store = honest.folder.parent / f"store-{number}"
        shutil.copytree(honest.folder.parent / "store", store)
        for file, data in files.items():
            (store / file).write_bytes(data)
        two = honest.beside(str(number), checkpoint=way.checkpoint, **{REMOTE: store.as_uri()})
        if not way.lock:
            (two.folder / "models.lock").unlink()
        try:
            outcome, said = _outcome(honest, two, trusted=way.key or way.lock)
        finally:
            shutil.rmtree(store)
            shutil.rmtree(two.folder)
        return outcome, f"lie {number} of {of}, {how}, where a machine has {name}:\n{said}"


def _outcome(honest: Machine, two: Machine, *, trusted: bool) -> tuple[str, str]:
    """Build; return what came of it, and what was said."""
    output = two.folder / "output"
    done = two.doit("-o", str(output), "pack:model", "pack:other", expect=None)
    said = done.stdout + done.stderr + (output.read_text() if output.exists() else "")
    built = {target: two.built(target) for target in ("model", "other")}
    right = {target: files == honest.built(target) for target, files in built.items()}
    if "Traceback" in said:
        return "traceback", said
    if all(right.values()):
        return OUTCOMES[0], said
    if any(built[target] and not right[target] for target in built):
        return ("another model" if trusted else OUTCOMES[2]), said
    return (OUTCOMES[1] if done.returncode else "nothing built, and no error"), said


def _honest(folder: Path, *, signed: bool) -> Machine:
    environ = {REMOTE: (folder / "store").as_uri(), **({SIGNING: KEY} if signed else {})}
    one = first(folder, environ, config=SMALL, **FOUR_BIT)
    one.configure("other", **{**one.models["model"], "quantize": {"bits": 4, "group_size": 32}})
    one.configure()
    one.doit("-o", os.devnull)
    return one


if __name__ == "__main__":
    main()
