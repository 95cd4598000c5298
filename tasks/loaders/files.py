"""files: what both loaders ask of a checkpoint's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.errors import CheckpointError


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file that the checkpoint must have.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: {what}. Fetch it from where the checkpoint came from."
        ) from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch it again.")
    return value


def numbered(paths: Iterable[Path], pattern: str) -> list[Path]:
    """Return shard files in numeric order.

    Args:
        paths: the files.
        pattern: a regular expression over the name; group 1 is the shard's number and group 2,
            if there is one, how many shards there are.

    Raises:
        CheckpointError: the row has a gap.
    """
    rows: dict[int, Path] = {}
    counts = set()
    for path in paths:
        match = re.fullmatch(pattern, path.name)
        if not match:
            continue
        rows[int(match[1])] = path
        if match.re.groups > 1:
            counts.add(int(match[2]))
    if len(counts) > 1:
        raise CheckpointError(
            f"{next(iter(rows.values())).parent} mixes shards of {len(counts)} checkpoints "
            f"(of {' and of '.join(map(str, sorted(counts)))}). Remove those of the other."
        )
    first = min(rows, default=0) if counts else 0
    last = first + counts.pop() if counts else max(rows, default=-1) + 1
    missing = [number for number in range(first, last) if number not in rows]
    if missing:
        have = ", ".join(path.name for _, path in sorted(rows.items()))
        raise CheckpointError(
            f"{next(iter(rows.values())).parent}: shard {missing[0]} is missing (there are "
            f"{have}). Fetch the missing files."
        )
    return [path for _, path in sorted(rows.items())]
