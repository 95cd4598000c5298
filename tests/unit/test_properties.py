"""Properties of the pure functions that everything else stands on, for any input."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cache.blobs import Blobs, Part
from cache.digest import canonical, digest, digest_list, digest_record
from cache.files.stamp import Stamp
from cache.maintenance import gc, survey
from cache.records.manifests import SCHEMA, Action, Manifest, ManifestError, Tensor
from tasks.layouts.model import layer_names
from tasks.planning import bundle
from tasks.tensors import rows, steps
from tasks.tensors.arrays import view

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


# pack.shards


class Bytes(int):
    """A number of bytes where `make_shards` takes GiB and shifts them left by 30."""

    def __lshift__(self, _: int) -> int:
        return int(self)


sizes = st.lists(st.integers(0, 40), max_size=30)


@calm
@given(sizes=sizes, limit=st.integers(1, 100))
def test_shards(sizes: list[int], limit: int) -> None:
    """As mlx-lm's own, less the empty first one that some versions make of a large tensor."""
    tensors = [(f"t{i}", Tensor("uint8", (size,), digest(b""))) for i, size in enumerate(sizes)]
    made = bundle.shards(tensors, limit)
    assert [packed for shard in made for packed in shard] == tensors
    assert all(made)
    for shard in made:
        assert len(shard) == 1 or sum(tensor.nbytes for _, tensor in shard) <= limit
    for shard, after in itertools.pairwise(made):  # greedy: the next did not fit
        assert sum(tensor.nbytes for _, tensor in (*shard, after[0])) > limit

    arrays = {name: SimpleNamespace(nbytes=tensor.nbytes) for name, tensor in tensors}
    theirs = [list(shard) for shard in mlx_lm.utils.make_shards(arrays, Bytes(limit)) if shard]
    assert [[name for name, _ in shard] for shard in made] == theirs


# Canonical bytes


records = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def turned(record: Any) -> Any:
    """The same with each table's keys the other way round."""
    if isinstance(record, dict):
        return {key: turned(record[key]) for key in reversed(record)}
    if isinstance(record, list):
        return [turned(value) for value in record]
    return record


@calm
@given(record=records)
def test_canonical_bytes_know_no_order_of_keys(record: Any) -> None:
    data = canonical(record)
    assert canonical(turned(record)) == data
    assert json.loads(data) == record
    assert b"\n" not in data
    assert digest_record(turned(record)) == digest(data)


@calm
@given(items=st.lists(records))
def test_items_have_the_digest_of_their_list(items: list[Any]) -> None:
    assert digest_list(iter(items)) == digest_record(items)


@calm
@given(one=records, other=records)
def test_canonical_bytes_tell_records_apart(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (json.dumps(one) == json.dumps(other)) or (
        one == other  # but for the order of keys, and 0.0 and -0.0
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_has_no_canonical_bytes(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": [number]})


def test_a_golden_digest() -> None:
    """Other digests are another cache: everything is built anew."""
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    record = {"b": [1, None, "ä"], "a": {"c": 0.5}}
    assert canonical(record) == '{"a":{"c":0.5},"b":[1,null,"ä"]}'.encode()


# Manifests


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
digests = st.binary(max_size=3).map(digest)
tensors = st.builds(
    Tensor,
    st.sampled_from(["float16", "bfloat16", "uint32"]),
    st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    digests,
)
manifests = st.builds(
    Manifest,
    st.builds(Action, names, st.integers(0, 99), records, st.dictionaries(names, digests)),
    st.dictionaries(names, tensors, max_size=4),
    st.lists(names, max_size=2).map(tuple),
)


@calm
@given(manifest=manifests)
def test_manifests_come_back(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert list(again.tensors) == list(manifest.tensors)  # in the layer's own order
    assert again.to_bytes() == data
    assert again.result == manifest.result
    assert again.action.key == manifest.action.key


def read(data: bytes) -> Manifest | None:
    """None for what is no manifest; any other exception is a failure."""
    try:
        return Manifest.from_bytes(data)
    except ManifestError:
        return None


@calm
@given(manifest=manifests, data=st.data())
def test_damaged_manifests(manifest: Manifest, data: st.DataObject) -> None:
    """A byte changed, or some cut off or added: it is refused, or says the same of the tensors."""
    whole = manifest.to_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    assert read(whole[:position]) is None
    assert read(whole + b"x") is None
    found = read(whole[:position] + bytes([byte]) + whole[position + 1 :])
    assert found is None or found.tensors == manifest.tensors


@calm
@given(manifest=manifests, data=st.data())
def test_manifests_with_a_value_of_another_kind(manifest: Manifest, data: st.DataObject) -> None:
    """Each key in turn missing, or anything at all; numbers that JSON has not, too."""
    record = json.loads(manifest.to_bytes())
    key = data.draw(st.sampled_from(sorted(record)))
    other = data.draw(records | st.sampled_from([float("nan"), [float("inf")]]))
    less = {name: value for name, value in record.items() if name != key}
    assert read(json.dumps(less).encode()) is None
    found = read(json.dumps({**record, key: other}).encode())
    assert found is None or key in ("action", "notes") or other == record[key]


@calm
@given(data=st.binary(max_size=40) | records.map(lambda record: json.dumps(record).encode()))
def test_what_is_no_manifest(data: bytes) -> None:
    assert read(data) is None


def test_a_manifest_nested_without_end() -> None:
    assert read(b"[" * 100_000) is None


def test_a_manifest_of_numbers_that_json_has_not() -> None:
    tensor = ["a", "float16", [float("nan")], digest(b"")]
    record = json.loads(Manifest(Action("cast", 1, {}, {}), {}).to_bytes())
    assert read(json.dumps({**record, "tensors": [tensor]}).encode()) is None


@pytest.mark.parametrize(
    "tensor",
    [
        ["a", "float16", [1], "../" + "0" * 29],
        ["a", "float16", [1], "../../etc/passwd"],  # a digest becomes part of a path
        ["a", "float16", [1], digest(b"").upper()],
        ["a", "float16", [1], None],
        ["a", "float16", [-1], digest(b"")],
        ["a", "float16", [True], digest(b"")],
        ["a", "float16", 1, digest(b"")],
        ["a", "float17", [1], digest(b"")],
        ["a", ["float16"], [1], digest(b"")],
        ["a", "float16", [1]],
    ],
)
def test_a_manifest_of_what_is_no_tensor(tensor: list[object]) -> None:
    """Whoever can write to a remote can say anything."""
    made = {"a": Tensor("float16", (1,), digest(b""))}
    whole = Manifest(Action("cast", 1, {}, {}), made)
    assert read(whole.to_bytes()) == whole
    record = json.loads(whole.to_bytes()) | {"tensors": [tensor]}
    record["result"] = digest_record([tensor])
    assert read(canonical(record)) is None


def test_a_newer_schema_is_refused() -> None:
    data = Manifest(Action("cast", 1, {}, {}), {}).to_bytes()
    newer = data.replace(b'"schema":%d' % SCHEMA, b'"schema":%d' % (SCHEMA + 1))
    assert newer != data
    with pytest.raises(ManifestError, match=rf"schema {SCHEMA + 1}.* reads {SCHEMA}: update"):
        Manifest.from_bytes(newer)


# gc.plan


ages = st.integers(0, 3)  # some are equal


@calm
@given(
    held=st.lists(st.tuples(ages, st.integers(1, 900)), min_size=1, max_size=5),
    packs=st.integers(0, 3),
    references=st.lists(st.tuples(ages, st.sets(st.integers(0, 4), min_size=1)), max_size=9),
    wanted=st.sets(st.integers(0, 9), max_size=2),
    share=st.floats(0, 1),
)
def test_what_is_evicted_at_any_size(
    held: list[tuple[int, int]],
    packs: int,
    references: list[tuple[int, set[int]]],
    wanted: set[int],
    share: float,
) -> None:
    """Files, the first of them packs, and references that lie in one or more of them."""
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(Path(folder, "blobs"))
        paths = blobs.new_containers(min(packs, len(held)), 0)
        paths += [blobs.path(digest(b"%d" % i)) for i in range(len(paths), len(held))]
        names = [digest(b"reference %d" % i) for i in range(len(references))]
        for path, (_, length) in zip(paths, held, strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x" * length)
        for name, (_, inside) in zip(names, references, strict=True):
            where = [str(paths[i % len(paths)]) for i in sorted(inside)]
            blobs.refer(name, [Part(path, 0, 1, None) for path in where])
        referred = [path.with_name(f"{path.name}.parts") for path in map(blobs.path, names)]
        for path, (age, _) in zip([*paths, *referred], [*held, *references], strict=True):
            os.utime(path, (10**9 - age, 10**9 - age))
        found = survey.inventory(Path(folder))
        _ = found.parts  # read while they are there

    kept = frozenset(name for i, name in enumerate(names) if i in wanted)
    cap = round(found.size * share)
    made = gc.plan(found, gc.Wanted(blobs=kept), cap, 10**9)
    gone = {*made.garbage, *made.evicted}
    left = {file.key for file in found.files if file not in gone}
    assert len(made.garbage) + len(made.evicted) == len(gone)
    assert made.size == found.size - sum(file.size for file in gone)
    assert found.reach(kept) <= left
    assert not {*made.spare} & gone
    assert made.size <= cap or not made.spare
    # No reference is left to what went, and of what lies in packs none went without a file's room.
    lies_in = {name: found.pinned(name) for name in names}
    assert all(lies_in[name] <= left for name in names if name in left)
    packed = {name for name in names if lies_in[name] & found.of("container").keys()}
    assert all(lies_in[name] - left for name in packed - left)
    # The last that went had to.
    for last in made.evicted[-1:]:
        along = {name for name in packed if last.key in lies_in[name]}
        unit = {last, *(file for file in made.evicted if file.key in along)}
        assert made.size + sum(file.size for file in unit) > cap


# Layers


parts = st.sampled_from(
    ["model", "language_model", "transformer", "layers", "norm", "h", "mlp", "0", "1", "12", "a_b"]
)
paths = st.lists(parts, min_size=1, max_size=6).map(".".join)


@calm
@given(paths=st.lists(paths, min_size=1, max_size=12, unique=True), data=st.data())
def test_layers(paths: list[str], data: st.DataObject) -> None:
    found = layer_names(paths)
    assert list(found) == paths
    assert all(layer and not layer.startswith(".") for layer in found.values())
    assert layer_names(data.draw(st.permutations(paths))) == found  # it hangs on no order
    # Each is the end of a run of whole parts at the name's beginning; and two names that share a
    # layer share that run: no two layers have one name.
    begins: dict[str, str] = {}
    for path, layer in found.items():
        end = path.index(layer) + len(layer)
        assert end == len(path) or path[end] == "."
        assert begins.setdefault(layer, path[:end]) == path[:end]


def test_layers_of_a_model() -> None:
    found = layer_names(
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.experts.3.up.weight",
            "model.layers.0.norm.weight",
            "model.layers.10.norm.weight",
            "model.norm.weight",
            "lm_head.weight",
            "scale",
        ]
    )
    layers = ["embed_tokens", "layers.0", "layers.0", "layers.10", "norm", "lm_head", "scale"]
    assert list(found.values()) == layers


def test_layers_of_two_towers() -> None:
    """Where names would meet without it, the prefix stays."""
    found = layer_names(["model.layers.0.a", "language_model.model.layers.0.a", "model.norm.a"])
    assert len(set(found.values())) == 3


# unshard: each step on stored tensors, block by block, as NumPy does it on whole ones


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unshard") / "tensors"


def stored(file: Path, arrays: list[np.ndarray]) -> list[rows.Rows]:
    """Arrays one after another in a file, each begun by a byte that is nobody's."""
    file.write_bytes(b"".join(b"?" + array.tobytes() for array in arrays))
    stamp, found, offset = Stamp.of(file), [], 0
    for array in arrays:
        part = Part(str(file), offset + 1, array.nbytes, stamp)
        found.append(rows.Stored(Blobs(file.parent), [part], array.dtype.name, array.shape))
        offset += 1 + array.nbytes
    return found


def made(sources: list[rows.Rows], told: list, block_bytes: int) -> np.ndarray:
    whole = steps.apply(sources, steps.read(told))
    data = b"".join(bytes(view(block)) for block in rows.blocks(whole, block_bytes))
    return np.frombuffer(data, whole.dtype).reshape(whole.shape)


def interleaved_to_half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head becomes row i, row 2i + 1 becomes row i + d / 2."""
    d = len(weight) // heads
    order = [
        head * d + 2 * i + odd for head in range(heads) for odd in (0, 1) for i in range(d // 2)
    ]
    return weight[order]


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


small = st.integers(1, 5)


@calm
@given(heads=small, pairs=small, width=small, block_bytes=st.integers(1, 300), count=small)
def test_half_split(
    file: Path, heads: int, pairs: int, width: int, block_bytes: int, count: int
) -> None:
    """Of a whole tensor, of copies, and of slices whose borders need not be those of heads."""
    whole = numbered(heads * 2 * pairs, width)
    expected = interleaved_to_half_split(whole, heads)
    assert np.array_equal(np.array(rows.half_split(mx.array(whole), heads=heads)), expected)
    step = ["half_split", heads]
    assert np.array_equal(made(stored(file, [whole]), [step], block_bytes), expected)
    copies = stored(file, [whole] * count)
    assert np.array_equal(made(copies, [["same"], step], block_bytes), expected)
    assume(len(whole) % count == 0)
    slices = stored(file, np.split(whole, count))
    assert np.array_equal(made(slices, [["concatenate", 0], step], block_bytes), expected)
    # A rotation of pairs is one of halves: turning back gives the rows as they were.
    back = expected.reshape(heads, 2, pairs, width).swapaxes(1, 2).reshape(whole.shape)
    assert np.array_equal(back, whole)


@calm
@given(
    shape=st.lists(small, min_size=1, max_size=3),
    count=small,
    axis=st.integers(0, 2),
    step=st.sampled_from(["concatenate", "stack"]),
    block_bytes=st.integers(1, 300),
)
def test_joins(
    file: Path, shape: list[int], count: int, axis: int, step: str, block_bytes: int
) -> None:
    assume(axis < len(shape) + (step == "stack"))
    arrays = [numbered(*shape) + 1000 * i for i in range(count)]
    expected = np.concatenate(arrays, axis) if step == "concatenate" else np.stack(arrays, axis)
    assert np.array_equal(made(stored(file, arrays), [[step, axis]], block_bytes), expected)
