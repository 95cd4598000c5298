"""lies: a remote store that lies, about each result and each blob; prints a Markdown table.

    TMPDIR=/dev/shm python benchmarks/lies.py
    TMPDIR=/dev/shm python benchmarks/lies.py --first 500 --count 100    # of each way
    TMPDIR=/dev/shm python benchmarks/lies.py --models calibrated --every 7
    TMPDIR=/dev/shm python benchmarks/lies.py --pairs 1000               # two lies at once

One machine builds small targets into a folder as a remote store, with a signing key or without.
Then one thing of it is made a lie, alike wherever the store says it, and a machine with an empty
cache builds by it: with that key or without, with models.lock, the checkpoint or both. Where there
is a key or a lock, what it builds must be equal to the byte, or nothing at all and an error. Where
there is neither, the store's word is all that there is, and only a traceback is wrong.

Where there are a key and the checkpoint, each fourth lie is followed by other bits: what is then
made of what was fetched must be right, too.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support import chats
from support.lying import Files, Lie, Store
from support.machines import REMOTE, SIGNING, SMALL, Machine, first
from support.projects import FOUR_BIT

KEY = "a key"
OUTCOMES = ("right", "an error, nothing built", "the store's word")
QUALITY = {
    "samples": 3,
    "sequence_length": 8,
    "text": "checkpoint/text.jsonl",
    "evaluate_text": "checkpoint/held-out.txt",
}
CALIBRATED: dict[str, dict[str, Any]] = {
    "model": {"quantize": {"bits": 4, "group_size": 32, "method": "gptq"}, "device": "cpu"},
    "other": {"quantize": {"target_bpw": 7.0, "group_size": 32}, "device": "cpu"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "model": FOUR_BIT,
    "other": {**FOUR_BIT, "quantize": {"bits": 4, "group_size": 32}},
}
LATER_EVERY = 4
LATER = {"bits": 8, "group_size": 64}


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


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = tally.parser(__doc__, count=1_000_000, what="way")
    parser.add_argument("--every", type=int, default=1, help="only each so many'th lie")
    parser.add_argument("--models", choices=MODELS, default="plain", help="what is built")
    parser.add_argument("--ways", nargs="*", default=[*WAYS], help="what machines have")
    parser.add_argument("--pairs", type=int, default=0, help="so many pairs of lies at random")
    arguments = parser.parse_args()

    def prepare(folder: Path) -> Lying:
        return Lying(folder, arguments.models, pairs=arguments.pairs > 0)

    def counts(folder: Path) -> list[str]:
        return [str(len(prepare(folder).told(key=key))) for key in (False, True)]

    count = [arguments.pairs] * 2 if arguments.pairs else [*map(int, tally.asked(counts))]
    first, most, every = arguments.first, arguments.count, arguments.every
    rounds = (
        (number, (name,))
        for name in arguments.ways
        for number in range(first, min(count[WAYS[name].key], first + most), every)
    )
    tally.run(
        rounds,
        lambda folder: prepare(folder).attempt,
        OUTCOMES,
        heading="what the machine has | lies",
        arguments=arguments,
    )


class Lying:
    """Honest stores in a folder, and builds by copies of them that lie.

    Args:
        folder: the folder.
        models: what is built, one of ``MODELS``.
        pairs: whether two lies are told at once, chosen at random by the attempt's number.
    """

    def __init__(self, folder: Path, models: str, *, pairs: bool) -> None:
        self._folder, self._models, self._pairs = folder, models, pairs
        self._honest: dict[bool, tuple[Machine, list[Lie], dict[str, str]]] = {}

    def told(self, *, key: bool) -> list[Lie]:
        """Return all lies of a store, with a signing key or without."""
        return self._made(key)[1]

    def _made(self, key: bool) -> tuple[Machine, list[Lie], dict[str, str]]:
        if key not in self._honest:
            machine = _honest(self._folder / f"key-{key}", self._models, signed=key)
            store = Store(machine.folder.parent / "store", KEY.encode() if key else None)
            told, later = [*store.lies()], _later(machine)
            self._honest[key] = machine, told, later
        return self._honest[key]

    def attempt(self, number: int, name: str) -> tuple[str, str]:
        """Build on another machine by a store that lies; return what came of it."""
        way = WAYS[name]
        honest, told, later = self._made(way.key)
        lies = [told[number]] if not self._pairs else random.Random(number).sample(told, 2)
        store = honest.folder.parent / f"store-{number}"
        shutil.copytree(honest.folder.parent / "store", store)
        for lie in lies:
            _tell(store, lie.files)
        two = honest.beside(str(number), checkpoint=way.checkpoint, **{REMOTE: store.as_uri()})
        two.quality = honest.quality
        if not way.lock:
            (two.folder / "models.lock").unlink()
        try:
            outcome, said = _outcome(honest, two, trusted=way.key or way.lock)
            if way.key and way.checkpoint and outcome == OUTCOMES[0] and not number % LATER_EVERY:
                outcome, said = _outcome_later(two, later)
        finally:
            shutil.rmtree(store)
            shutil.rmtree(two.folder)
        which = "; ".join(f"of {lie.of}, {lie.how}" for lie in lies)
        return outcome, f"lie {number} {which}, where a machine has {name}:\n{said}"


def _tell(store: Path, files: Files) -> None:
    for name, data in files.items():
        if data is None:
            (store / name).unlink(missing_ok=True)
        else:
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).write_bytes(data)


def _build(two: Machine, *targets: str) -> tuple[int, str]:
    output = two.folder / "output"
    done = two.doit("-o", str(output), *(f"pack:{target}" for target in targets), expect=None)
    return done.returncode, done.stdout + done.stderr + (
        output.read_text() if output.exists() else ""
    )


def _outcome(honest: Machine, two: Machine, *, trusted: bool) -> tuple[str, str]:
    """Build; return what came of it, and what was said."""
    status, said = _build(two, *PLAIN)
    built = {target: two.built(target) for target in PLAIN}
    right = {target: files == honest.built(target) for target, files in built.items()}
    if "Traceback" in said:
        return "traceback", said
    if "\x1b" in said or "\nERROR: all is lost" in said:
        return "a forged line", said
    if all(right.values()):
        lock = (two.folder / "models.lock").read_bytes()
        same = lock == (honest.folder / "models.lock").read_bytes()
        return (OUTCOMES[0] if same or not trusted else "another lock"), said
    if any(built[target] and not right[target] for target in built):
        return ("another model" if trusted else OUTCOMES[2]), said
    return (OUTCOMES[1] if status else "nothing built, and no error"), said


def _later(honest: Machine) -> dict[str, str]:
    """Return the files of a model of other bits."""
    two = honest.beside("later", checkpoint=True)
    two.quality = honest.quality
    two.environ = {}
    two.configure("model", quantize=LATER)
    _build(two, "model")
    built: dict[str, str] = two.built("model")
    shutil.rmtree(two.folder)
    return built


def _outcome_later(two: Machine, later: dict[str, str]) -> tuple[str, str]:
    """Build the model to other bits, of what the store gave."""
    two.configure("model", quantize=LATER)
    status, said = _build(two, "model")
    if "Traceback" in said:
        return "traceback", said
    if two.built("model") == later:
        return OUTCOMES[0], said
    return (OUTCOMES[1] if status else "another model later"), said


def _honest(folder: Path, models: str, *, signed: bool) -> Machine:
    environ = {REMOTE: (folder / "store").as_uri(), **({SIGNING: KEY} if signed else {})}
    tables = MODELS[models]
    one = first(folder, environ, config=SMALL, **tables["model"])
    if models == "kept":
        one.keep = ["cast"]
    if models == "calibrated":
        chats.write(one.folder)
        for name in ("text.jsonl", "held-out.txt"):
            (one.folder / name).rename(one.checkpoint / name)
        one.quality = QUALITY
    one.configure("other", **tables["other"])
    one.doit("-o", os.devnull)
    return one


MODELS = {"plain": PLAIN, "kept": PLAIN, "calibrated": CALIBRATED}


if __name__ == "__main__":
    main()
