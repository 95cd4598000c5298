"""What of a model goes into which weight file, for any sizes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import mlx_lm.utils
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.digest import digest
from cache.records.manifests import Tensor
from tasks.planning import bundle

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


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
    made = bundle.split_into_shards(tensors, limit)
    assert [packed for shard in made for packed in shard] == tensors
    assert all(made)
    for shard in made:
        assert len(shard) == 1 or sum(tensor.nbytes for _, tensor in shard) <= limit
    for shard, after in itertools.pairwise(made):  # greedy: the next did not fit
        assert sum(tensor.nbytes for _, tensor in (*shard, after[0])) > limit

    arrays = {name: SimpleNamespace(nbytes=tensor.nbytes) for name, tensor in tensors}
    theirs = [list(shard) for shard in mlx_lm.utils.make_shards(arrays, Bytes(limit)) if shard]
    assert [[name for name, _ in shard] for shard in made] == theirs
