"""Records in a remote store that is a folder, altered as whoever can write there could."""

import json
from pathlib import Path
from typing import Any

from cache.remote.signing import sign

ACTIONS, LISTS = "records/actions", "records/lists"


def record(remote: Path, key: str) -> Any:
    """What it has of an action."""
    return json.loads((_path(remote, ACTIONS, key)).read_bytes())["record"]


def put(remote: Path, key: str, record: Any) -> dict[Path, bytes]:
    """Put another, unsigned, there and in each list that has one; what was there before."""
    path = _path(remote, ACTIONS, key)
    before = {path: path.read_bytes()}
    path.write_bytes(sign("actions", key, record, None))
    for path in (remote / LISTS).rglob("*.json"):
        records = json.loads(path.read_bytes())["record"]
        if key in records:
            before[path] = path.read_bytes()
            name = path.parent.name + path.stem
            path.write_bytes(sign("lists", name, {**records, key: record}, None))
    return before


def _path(remote: Path, kind: str, key: str) -> Path:
    return remote / kind / key[:2] / f"{key[2:]}.json"
