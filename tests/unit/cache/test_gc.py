"""What is evicted at any size of cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blobs import Blobs, Part
from cache.digest import digest
from cache.maintenance import gc, survey
from cache.maintenance.files import File

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


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
        _ = found.references  # read while they are there

    kept = frozenset(name for i, name in enumerate(names) if i in wanted)
    cap = round(found.size * share)
    removed: list[File] = []
    made = gc.collect(found, gc.Wanted(blobs=kept), cap, 10**9, removed.append)
    gone = {*removed}
    evicted = sum(count for (why, _), (count, _) in made.removed.items() if why == gc.EVICTED)
    left = {file.key for file in found.files if file not in gone}
    assert len(removed) == len(gone)
    assert sum(count for count, _ in made.removed.values()) == len(gone)
    assert made.size == found.size - sum(file.size for file in gone)
    assert found.reach(kept) <= left
    assert made.spare <= made.size
    assert made.size <= cap or not made.spare
    # No reference is left to what went, and of what lies in packs none went without a file's room.
    lies_in = {name: found.pinned(name) for name in names}
    assert all(lies_in[name] <= left for name in names if name in left)
    packed = {name for name in names if lies_in[name] & found.of("container").keys()}
    assert all(lies_in[name] - left for name in packed - left)
    # The last that went had to.
    for last in removed[-1:] if evicted else []:
        along = {name for name in packed if last.key in lies_in[name]}
        unit = {last, *(file for file in removed[-evicted:] if file.key in along)}
        assert made.size + sum(file.size for file in unit) > cap
