"""cache_size: what the cache of a model takes, told by running it without its weights."""

from __future__ import annotations

from typing import Any, cast

from cache.digest import digest_record
from cache.records.memos import Memos
from tasks.core.errors import BuildError
from tasks.layouts import asking
from tasks.layouts.libraries import LIBRARIES
from tasks.quality.segments import Skeleton
from tasks.tensors import mx

SCHEMA = 1  # of what is remembered
LENGTHS = 256, 512  # of the texts that tell how it grows: caches grow by 256 tokens at a time


def cache_bytes(memos: Memos, skeleton: Skeleton, tokens: int) -> int:
    """Return the bytes that a model's cache of so many tokens takes.

    Each layer's part grows by the token, up to its window if it has one, or not at all: two short
    texts tell. Nothing is evaluated.

    Raises:
        BuildError: the model cannot be run with one.
    """
    question = [
        SCHEMA, asking.versions(skeleton.library), digest_record(skeleton.config), tokens,
    ]  # fmt: skip
    answer = memos.get("cache size", question, int)
    if answer is None:
        try:
            with mx.stream(mx.cpu):
                short, long = (_parts(skeleton, length) for length in LENGTHS)
        except Exception as error:  # whatever a model raises
            raise BuildError(
                f"what the model's cache of {tokens} tokens takes cannot be told: {error}. Give "
                "target_bpw in place of fit."
            ) from error
        answer = 0
        for (few, _), (more, window) in zip(short, long, strict=True):
            growth = (more - few) / (LENGTHS[1] - LENGTHS[0])
            held = min(tokens, window or tokens)
            answer += round(few + growth * max(held - LENGTHS[0], 0))
        memos.put("cache size", question, answer)
    return answer


def _parts(skeleton: Skeleton, length: int) -> list[tuple[int, int | None]]:
    """Return the bytes of each layer's cache after ``length`` tokens, and its window."""
    from mlx.utils import tree_flatten

    model = skeleton.load()
    cache = LIBRARIES[skeleton.library].prompt_cache(model)
    model(mx.zeros((1, length), mx.int32), cache=cache)
    parts = []
    for each in cache:
        leaves = [array for _, array in cast("list[tuple[str, Any]]", tree_flatten(each.state))]
        nbytes = sum(array.nbytes for array in leaves if isinstance(array, mx.array))
        parts.append((nbytes, getattr(each, "max_size", None)))
    return parts
