"""lying: what a store can say that is not so, of each kind of object that it serves.

A store serves an action's record, a target's list of records, an action's pack (all that it made,
one after another), and a source's record and small files, which are blobs as packs are.
"""

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from blake3 import blake3

from cache.records.manifests import Action, Manifest, Tensor
from cache.remote.signing import sign

Tensors = list[list[Any]]  # name, dtype, shape, digest
Files = dict[Path, bytes | None]  # what a store has instead, by name; None: it has it not
Record = dict[str, Any]
NO_PACKS: tuple[Any, ...] = (
    None, "", "0" * 64, "../" * 21 + "x", "A" * 64, 7, [], {}, "é" * 64, "0" * 63 + "\n"
)  # fmt: skip
FORGED_LINES = "fine\nERROR: all is lost\x1b[2J\r\u202e"


class Lie(NamedTuple):
    """What a store says.

    Attributes:
        of: a stage's record, ``list`` or ``blob``.
        how: in which way.
        files: those that say it.
    """

    of: str
    how: str
    files: Files


class Store:
    """An honest store in a folder, and what it can be made to say.

    Args:
        folder: the store's.
        secret: the key that it is signed with, if any: lies are signed by nobody, or with another.
    """

    def __init__(self, folder: Path, secret: bytes | None) -> None:
        self._folder = folder
        self._secret = secret
        self._strangers = (None, b"another key") if secret else (None,)
        records, lists = folder / "records/actions", folder / "records/lists"
        self._records = {p: _record(p) for p in sorted(records.rglob("*.json"))}
        self._lists = {p: _record(p) for p in sorted(lists.rglob("*.json"))}
        self._blobs = sorted(p for p in (folder / "blobs").rglob("*") if p.is_file())

    def lies(self) -> Iterator[Lie]:
        """Yield all lies, each alone."""
        for path, record in self._records.items():
            stage = record["manifest"]["action"]["stage"]
            for maker in MAKERS:
                others = [r["manifest"]["tensors"] for p, r in self._records.items() if p != path]
                for tensors in maker(record["manifest"]["tensors"], others):
                    lie = {**record, "manifest": _manifest(record["manifest"], tensors)}
                    yield from self._said(path, lie, stage, maker.__name__)
            for how, lie, files in self._other_records(path, record):
                yield from self._said(path, lie, stage, how, files)
            yield from self._other_files(stage, path, dict.fromkeys(self._lists, b""))
        for path, record in self._lists.items():
            yield from self._other_lists(path, record)
            yield from self._other_files("list", path, {})
        for number, path in enumerate(self._blobs):
            yield from self._other_blobs(path, self._blobs[number - 1])

    def _said(
        self, path: Path, lie: Record, of: str, how: str, files: Files | None = None
    ) -> Iterator[Lie]:
        """Yield a record's lie, wherever the store has that record."""
        for secret in self._strangers:
            yield Lie(of, how, self._everywhere(path, lie, secret) | (files or {}))

    def _everywhere(self, path: Path, lie: Record, secret: bytes | None) -> Files:
        files: Files = {self._name(path): sign("actions", _key(path), lie, secret)}
        for each, record in self._lists.items():
            if _key(path) in record:
                files[self._name(each)] = sign(
                    "lists", _key(each), {**record, _key(path): lie}, secret
                )
        return files

    def _other_records(self, path: Path, record: Record) -> Iterator[tuple[str, Record, Files]]:
        """Yield records of an action with another pack, another action or forged notes."""
        packs = {r["blake3"] for p, r in self._records.items() if p != path and r["blake3"]}
        for name in (*sorted(packs), *NO_PACKS):
            yield "another pack", {**record, "blake3": name}, {}
        manifest = record["manifest"]
        for other in (r["manifest"] for p, r in self._records.items() if p != path):
            yield "another action's", {**record, "manifest": other}, {}
            if len(other["tensors"]) == len(manifest["tensors"]):
                said = _manifest(manifest, other["tensors"], action=other["action"])
                yield "another action", {**record, "manifest": said}, {}
        for change in ({"version": 99}, {"params": None}, {"inputs": {}}, {"stage": "x"}):
            said = _manifest(manifest, manifest["tensors"], action={**manifest["action"], **change})
            yield "another action", {**record, "manifest": said}, {}
        for notes in ([FORGED_LINES], ["x" * 1_000_000], ["x"] * 10_000):
            said = _manifest(manifest, manifest["tensors"], notes=notes)
            yield "notes", {**record, "manifest": said}, {}
        yield "no manifest", {**record, "manifest": {**manifest, "schema": 99}}, {}
        yield "no manifest", {**record, "manifest": [manifest]}, {}
        if record["blake3"]:
            yield from self._forged(record)

    def _forged(self, record: Record) -> Iterator[tuple[str, Record, Files]]:
        """Yield records with a pack that is right by its own name, and wrong inside."""
        manifest = record["manifest"]
        data = self._pack(record["blake3"])
        for at in (0, len(data) // 2, len(data) - 1) if data else ():
            wrong = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            name, files = _blob(wrong)
            yield "a forged pack", {**record, "blake3": name}, files
            sealed = _manifest(manifest, _as_packed(manifest["tensors"], wrong))
            yield "all forged", {"manifest": sealed, "blake3": name}, files
        for wrong in (data[:-1], data + b"x", b"", bytes(len(data)), data[::-1], data + data):
            name, files = _blob(wrong)
            yield "a forged pack", {**record, "blake3": name}, files

    def _pack(self, name: str) -> bytes:
        return (self._folder / "blobs" / name[:2] / name[2:]).read_bytes()

    def _other_lists(self, path: Path, record: Record) -> Iterator[Lie]:
        """Yield lists whose rows are others, twice, foreign, old or none."""
        keys = [*record]
        others = [other for each, other in self._lists.items() if each != path]
        foreign = {key: row for other in others for key, row in other.items()}
        lists: list[tuple[str, Any]] = [("foreign rows", {**record, **foreign})]
        lists += [("foreign rows", other) for other in others]
        turned = {key: record[other] for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}
        lists.append(("rows under others' keys", turned))
        for key in keys:
            for row in (None, [], {}, "x", 5, {"manifest": None, "blake3": None}):
                lists.append(("a row that is none", {**record, key: row}))
        lists += [("no list", each) for each in (None, [], "x", 7, [record], {"x": {"x": {}}})]
        lists.append(("rows without end", record | {f"{n:032x}": {} for n in range(100_000)}))
        for how, said in lists:
            for secret in self._strangers:
                yield Lie("list", how, {self._name(path): sign("lists", _key(path), said, secret)})
        for said in ({}, *({k: record[k] for k in keys[:n]} for n in (1, len(keys) // 2))):
            data = sign("lists", _key(path), said, self._secret)  # as an earlier run left it
            yield Lie("list", "an old one", {self._name(path): data})
        data = sign("actions", _key(path), record, self._secret)
        yield Lie("list", "signed as another kind", {self._name(path): data})
        yield from self._double_rows(path, record)

    def _double_rows(self, path: Path, record: Record) -> Iterator[Lie]:
        """Yield lists that have a key twice: once as it is, and once with another's result."""
        keys = [*record]
        for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
            manifest = record[key]["manifest"]
            said = _manifest(manifest, record[other]["manifest"]["tensors"])
            lie = {**record[key], "manifest": said}
            for first, second in ((record[key], lie), (lie, record[key])):
                rows = [json.dumps({key: each})[1:-1] for each in (first, second)]
                rest = json.dumps({k: row for k, row in record.items() if k != key})[1:-1]
                data = f'{{"record":{{{",".join([*rows, rest])}}}}}'.encode()
                yield Lie("list", "double rows", {self._name(path): data})

    def _other_files(self, of: str, path: Path, besides: dict[Path, bytes]) -> Iterator[Lie]:
        """Yield other bytes in place of a record: none, another's as it is signed, damaged."""
        data = path.read_bytes()
        alike = [*(self._records if path in self._records else self._lists)]
        others = [each for each in alike if each != path]
        without = {self._name(each): said for each, said in besides.items()}  # so that it is read
        for how, said in (
            *_damaged(data),
            *(("replayed", other.read_bytes()) for other in others),
            ("another file", b"[" * 100_000),
            ("another file", b"{}"),
            ("another file", b'{"record":' * 100_000),
        ):
            yield Lie(of, how, {self._name(path): said, **without})

    def _other_blobs(self, path: Path, other: Path) -> Iterator[Lie]:
        for how, said in (*_damaged(path.read_bytes()), ("another's", other.read_bytes())):
            yield Lie("blob", how, {self._name(path): said})

    def _name(self, path: Path) -> Path:
        return path.relative_to(self._folder)


def _damaged(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Yield what becomes of an object's bytes."""
    yield "missing", None
    yield "empty", b""
    yield "truncated", data[:-1]
    yield "truncated", data[: len(data) // 2]
    yield "longer", data + b"x"
    yield "longer", data + data
    yield "wrong bytes", bytes(len(data))
    for part in range(4):
        at = part * len(data) // 4
        yield "flipped", data[:at] + bytes([data[at] ^ 1 << part]) + data[at + 1 :]


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


def _record(path: Path) -> Record:
    record: Record = json.loads(path.read_bytes())["record"]
    return record


def _manifest(
    said: Record,
    tensors: Tensors,
    *,
    action: Record | None = None,
    notes: list[str] | None = None,
) -> Any:
    """Return a manifest with other tensors, whole and sealed as any is."""
    made_by = Action(**(action or said["action"]))
    other = {name: Tensor(dtype, tuple(shape), digest) for name, dtype, shape, digest in tensors}
    told = tuple(said["notes"] if notes is None else notes)
    return json.loads(Manifest(made_by, other, told).to_bytes())


def _as_packed(tensors: Tensors, pack: bytes) -> Tensors:
    """Return a result with the digests of what lies in a pack, in the order of that."""
    by_digest = {t[3]: Tensor(t[1], tuple(t[2]), t[3]) for t in sorted(tensors)}
    made, at = {}, 0
    for digest, tensor in by_digest.items():
        made[digest] = xxhash.xxh3_128_hexdigest(pack[at : at + tensor.nbytes])
        at += tensor.nbytes
    return [[*tensor[:3], made[tensor[3]]] for tensor in tensors]


def _blob(data: bytes) -> tuple[str, Files]:
    """Return the name of bytes in a store, and the file."""
    name = blake3(data).hexdigest()
    return name, {Path("blobs") / name[:2] / name[2:]: data}


def _key(path: Path) -> str:
    return path.parent.name + path.stem
