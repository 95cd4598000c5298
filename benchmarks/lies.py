"""lies: a remote store that lies, about each result and each blob; prints a Markdown table.

    python benchmarks/lies.py

One machine builds two small targets into a folder as a remote store, with a signing key or without.
Then one thing of it is made a lie, and a machine with an empty cache builds by it: with that key
or without, with models.lock, the checkpoint or both. Where there is a key or a lock, what it builds
must be equal to the byte, or nothing at all and an error. Where there is neither, the store's word
is all that there is, and only a traceback is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))

from cache.remote.signing import sign
from support.machines import REMOTE, SIGNING, SMALL, Machine, first
from support.projects import FOUR_BIT

KEY = "a key"
WAYS = ((True, True), (True, False), (False, True))  # lock, checkpoint: without both is nothing
OUTCOMES = ("right", "an error, nothing built", "another model")
Tensors = list[list[Any]]  # name, dtype, shape, digest


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
    yield [["../../x", *t[1:]] for t in tensors]
    yield []


MAKERS: tuple[Callable[[Tensors, list[Tensors]], Iterator[Tensors]], ...] = (_of_others, _changed)


def lies(store: Path) -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """Yield what a store can say that is not so: of what, how, and what makes it so in a folder."""
    paths = sorted((store / "records/actions").rglob("*.json"))
    records = {path: json.loads(path.read_bytes())["record"] for path in paths}
    results = {path: record["manifest"]["tensors"] for path, record in records.items()}
    for path, record in records.items():
        others = [t for other, t in results.items() if other != path]
        stage = record["manifest"]["action"]["stage"]
        key = path.parent.name + path.stem
        for maker in MAKERS:
            for tensors in maker(results[path], others):
                lie = {**record, "manifest": {**record["manifest"], "tensors": tensors}}
                for secret in (None, b"another key"):
                    data = sign("actions", key, lie, secret)
                    yield stage, maker.__name__, _writing(path.relative_to(store), data)
        for data in (b"", b"[" * 100_000, b"{}", paths[0].read_bytes(), paths[-1].read_bytes()):
            yield stage, "another file", _writing(path.relative_to(store), data)
    blobs = sorted(p for p in store.rglob("*") if p.is_file() and "records" not in p.parts)
    for number, path in enumerate(blobs):
        data = path.read_bytes()
        other = blobs[number - 1].read_bytes()
        for wrong in (b"", data[:-1], data + b"x", bytes(len(data)), other):
            yield "blob", "another file", _writing(path.relative_to(store), wrong)


def _writing(name: Path, data: bytes) -> Callable[[Path], None]:
    def write(store: Path) -> None:
        (store / name).write_bytes(data)

    return write


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only each so many'th lie")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which it ends")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    counts: dict[tuple[bool, bool, bool], Counter[str]] = defaultdict(Counter)
    begin, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        for signed in (False, True):
            honest = _honest(Path(name) / str(signed), signed=signed)
            told = list(lies(honest.folder.parent / "store"))[:: arguments.every]
            for number, (lie, (locked, has_checkpoint)) in enumerate(itertools.product(told, WAYS)):
                if time.monotonic() > end:
                    break
                outcome, said = _attempt(honest, str(number), lie[2], locked, has_checkpoint)
                counts[signed, locked, has_checkpoint][outcome] += 1
                trusted = not signed and not locked
                if "Traceback" in said or (outcome == OUTCOMES[2] and not trusted):
                    wrong += 1
                    print(f"{outcome}: {lie[:2]}, {signed=} {locked=} {has_checkpoint=}\n{said}")
    print(f"| key | lock | checkpoint | lies | {' | '.join(OUTCOMES)} |")
    print(f"|---|---|---|---|{'---|' * len(OUTCOMES)}")
    for way, of in counts.items():
        row = [*("yes" if each else "no" for each in way), str(of.total())]
        print(f"| {' | '.join([*row, *(str(of[outcome]) for outcome in OUTCOMES)])} |")
    total = sum(map(Counter.total, counts.values()))
    print(f"\n{total} in {time.monotonic() - begin:.0f} s")
    if wrong:
        raise BenchmarkError("not all came out right")


def _honest(folder: Path, *, signed: bool) -> Machine:
    environ = {REMOTE: (folder / "store").as_uri(), **({SIGNING: KEY} if signed else {})}
    one = first(folder, environ, config=SMALL, **FOUR_BIT)
    one.configure("other", **{**one.models["model"], "quantize": {"bits": 4, "group_size": 32}})
    one.configure()
    one.doit("-o", os.devnull)
    return one


def _attempt(
    honest: Machine, name: str, lie: Callable[[Path], None], locked: bool, has_checkpoint: bool
) -> tuple[str, str]:
    """Build on another machine by a store that lies; return what came of it, and what was said."""
    folder = honest.folder.parent / f"store-{name}"
    shutil.copytree(honest.folder.parent / "store", folder)
    lie(folder)
    two = honest.beside(name, checkpoint=has_checkpoint, **{REMOTE: folder.as_uri()})
    if not locked:
        (two.folder / "models.lock").unlink()
    output = two.folder / "output"
    done = two.doit("-o", str(output), "pack:model", "pack:other", expect=None)
    said = done.stdout + done.stderr + (output.read_text() if output.exists() else "")
    built = {target: two.built(target) for target in ("model", "other")}
    right = {target: files == honest.built(target) for target, files in built.items()}
    shutil.rmtree(folder)
    shutil.rmtree(two.folder)
    if all(right.values()):
        return OUTCOMES[0], said
    if any(built[target] and not right[target] for target in built):
        return OUTCOMES[2], said
    return (OUTCOMES[1] if done.returncode else "nothing built, and no error"), said


if __name__ == "__main__":
    main()
