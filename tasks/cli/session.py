"""session: ."""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from doit.exceptions import InvalidDodoFile

from cache.errors import CacheError
from cache.store import Store
from tasks.cli import failures, invocation
from tasks.cli.task_graph import Graph, _packs
from tasks.config import reader
from tasks.core.errors import BuildError
from tasks.core.workspace import STATE
from tasks.execution.builder import Builder
from tasks.execution.draft import Drafts
from tasks.execution.log import Log
from tasks.execution.resources import Memory, machine_memory, threads
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Planner


def load(models: Path, make: Mapping[Path, Callable[[Path], None]]) -> Graph:
    """Read models.toml and plan every target.

    Args:
        models: the file.
        make: checkpoints that the project makes itself, if they are asked for.

    Raises:
        InvalidDodoFile: something in it cannot be built; doit prints the message.
    """
    try:
        read = reader.load(models)
        lock = Lock.load(read.path.with_suffix(".lock"), strict=invocation.locked)
        store = _store(read)
        for target in read.targets.values():
            folder = Path(target.source.location)
            if folder in make:
                make[folder](folder)
        planner = Planner(store.memos, lambda target: lock.recall(store, target))
        plans = {name: planner.plan(target) for name, target in read.targets.items()}
        lock.check_plans(plans.values())
    except (BuildError, CacheError, OSError) as error:
        raise InvalidDodoFile(failures.message(error)) from error
    folder = read.path.parent
    state = folder / STATE
    run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
    memory = Memory(read.memory_bytes or machine_memory() // 2)
    log = Log(state / "log.jsonl")
    builder = Builder(store, state, log, run_id, read.keep, memory, Drafts(_packs))
    found = Graph(folder, builder, plans, lock)
    invocation.early = found.early
    return found


def _store(read: reader.Config) -> Store:
    """Open the cache, and the remote if there is one to be used."""
    store = Store.at(read.cache, read_only=invocation.read_only)
    if not read.remote or read.mode == "off":
        return store
    from cache.remote.remote import Remote
    from cache.remote.sharing import Sharing

    remote = Remote(
        read.remote,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        read_only=invocation.read_only or read.mode == "read-only",
        secret=os.environ.get("MLX_MAKE_SIGNING_KEY", "").encode() or None,
    )
    invocation.remotes.append(remote)
    return replace(store, sharing=Sharing(store.actions, store.blobs, remote))


def doit_config(models: Path) -> dict[str, Any]:
    """Return DOIT_CONFIG: threads, and all state beside models.toml."""
    from tasks.cli.doit_database import Checker

    state = models.absolute().parent / STATE
    return {
        "default_tasks": ["pack"],
        "dep_file": str(state / "doit.json"),
        "backend": "mlx-make",
        "check_file_uptodate": Checker,
        "reporter": "mlx-make",
        "num_process": threads(_devices(models)),
        "par_type": "thread",
        "verbosity": 2,
    }


def _devices(models: Path) -> Iterator[str | None]:
    """Yield what targets say of their device; what is wrong with the file ``load`` tells."""
    try:
        yield from (target.device for target in reader.load(models).targets.values())
    except (BuildError, OSError):
        yield None
