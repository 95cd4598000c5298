"""cache: ``doit cache``: looks after the cache of a models.toml."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from doit.cmdparse import CmdOption, CmdParse, CmdParseError
from doit.exceptions import InvalidDodoFile

from cache.errors import CacheError, one_line
from cache.files import trash
from cache.lock import Lock
from cache.maintenance import gc, verify
from cache.maintenance.files import File
from cache.maintenance.survey import CORRUPT, Survey
from cache.remote.remote import Remote
from cache.remote.sharing import Sharing
from tasks.cli import failures
from tasks.cli.command import Command
from tasks.cli.commands import cache_stats, manifests
from tasks.cli.doit_adapter import models_file
from tasks.cli.process import interruptible
from tasks.cli.session import Session
from tasks.cli.state_lock import alone
from tasks.config import reader
from tasks.config.reader import Config
from tasks.core.errors import BuildError, ConfigError
from tasks.core.program import COMMAND
from tasks.core.task_names import is_packing
from tasks.core.text import plural, size, size_bytes
from tasks.core.workspace import Workspace
from tasks.execution import exchange
from tasks.execution.resources import cores
from tasks.planning.refused import messages

FAILED = 1  # exit status, as doit's own when a task fails


@dataclass(frozen=True)
class Subcommand:
    """One thing that can be done.

    Attributes:
        purpose: what it does, for people.
        run: does it and returns the exit status.
        options: as doit's commands have them.
    """

    purpose: str
    run: Callable[[Config, Mapping[str, Any]], int]
    options: tuple[dict[str, Any], ...] = ()


class Cache(Command):
    """``doit cache SUBCOMMAND``."""

    name = "cache"
    doc_purpose = "look after the cache"

    def execute(self, _params: Any, args: list[str]) -> int:
        """Do what ``args`` ask for."""
        if not args:
            print(self.help())
            return 0
        name, *rest = args
        if name not in SUBCOMMANDS:
            raise CmdParseError(f"{COMMAND} cache has no {name!r}; it has {', '.join(SUBCOMMANDS)}")
        chosen = SUBCOMMANDS[name]
        options, more = CmdParse([CmdOption(option) for option in chosen.options]).parse(rest)
        if more:
            raise CmdParseError(f"{COMMAND} cache {name} takes no {more[0]!r}")
        try:
            with interruptible("what is done is kept; run it again to go on"):
                return chosen.run(reader.load(models_file()), options)
        except (BuildError, CacheError) as error:
            raise InvalidDodoFile(failures.message(error)) from error
        except OSError as error:
            if error.filename is None:  # what is printed cannot be, or nobody reads it
                raise
            raise InvalidDodoFile(f"{error.filename}: {error.strerror}") from error

    def help(self) -> str:
        """Return what there is."""
        lines = [f"{COMMAND} [models=PATH] cache SUBCOMMAND: {self.doc_purpose}", ""]
        for name, subcommand in SUBCOMMANDS.items():
            lines.append(f"  {name:<8}{subcommand.purpose}")
            for option in map(CmdOption, subcommand.options):
                lines.append(f"          {option.help_param():<18}{option.help}")
        return "\n".join(lines)


def stats(config: Config, _options: Mapping[str, Any]) -> int:
    """Print what the cache holds."""
    for line in cache_stats.text(config, manifests.survey(config)):
        print(one_line(line))
    return 0


def verify_all(config: Config, options: Mapping[str, Any]) -> int:
    """Read everything, and set aside what is corrupt, so that it is made again when wanted.

    What may have been made of corrupt bytes is forgotten, since nobody knows when they went
    wrong: the next doit makes it again, built models too.
    """
    survey = manifests.survey(config)
    quick = options["quick"]
    suspects = verify.glance(survey) if quick else verify.scan(survey, cores())
    wrong = []
    if suspects:
        with alone(config.path), Lock(config.cache.dir).alone(_waiting):
            # Looked at again: it may be another file by now.
            checked = [(file, verify.check(survey, file)) for file, _ in suspects]
            wrong = [verify.Wrong(file, cause) for file, cause in checked if cause]
            built = [*manifests.read(config)]
            for file, _ in wrong:
                verify.set_aside(config.cache.dir, file)
            forgotten = _forget(config, survey, built, wrong)
        _report(config, built, wrong, forgotten)
    counts = {kind: survey.count(kind) for kind in verify.kinds(survey)}
    if quick:
        del counts["blob"]
    else:  # what references say to lie in containers are blobs, too
        owned = survey.owned
        records = [owned.references.files.sizes[index] for index in owned.every_inside()]
        counts["reference"] = _sum(counts["reference"], -len(records), -sum(records))
        counts["blob"] = _sum(counts["blob"], len(records), owned.size_inside)
    said = (f"{n} {cache_stats.KIND_NAMES[kind]} ({size(s)})" for kind, (n, s) in counts.items())
    sizes = f", and the sizes of {len(survey.own_files)} blobs" if quick else ""
    print(f"{config.cache.dir}: read {', '.join(said)}{sizes}; {len(wrong) or 'none'} corrupt")
    return FAILED if wrong else 0


def _sum(counted: tuple[int, int], count: int, nbytes: int) -> tuple[int, int]:
    return counted[0] + count, counted[1] + nbytes


def _forget(
    config: Config,
    survey: Survey,
    built: Iterable[manifests.Record],
    wrong: Iterable[verify.Wrong],
) -> list[str]:
    """Forget what may have been made of wrong bytes; return the tasks, or the keys of others'."""
    spoilt = {file.key for file, _ in wrong if file.kind in ("blob", "reference")}
    ours = list(built)
    keys = verify.made_of(spoilt, lambda: chain(survey.manifests(), (r.manifest for r in ours)))
    # A packed file that the cache has as a whole is build/'s own.
    packed = [record.manifest for record in ours if is_packing(record.task)]
    keys |= {
        manifest.action.key
        for manifest in packed
        if spoilt & {tensor.digest for tensor in manifest.tensors.values()}
    }
    for key, file in survey.of("action").items():
        if key in keys:
            trash.remove(file.path)
    forgotten = [record for record in ours if record.manifest.action.key in keys]
    workspace = Workspace(config.path.parent)
    for record in forgotten:
        path = record.path(workspace)
        if is_packing(record.task):  # what lies in build/ stays known as ours
            path.replace(workspace.may_be_packed(record.target))
        else:
            trash.remove(path)
    return [record.task for record in forgotten]


def _report(
    config: Config,
    built: Iterable[manifests.Record],
    wrong: Iterable[verify.Wrong],
    forgotten: list[str],
) -> None:
    named = manifests.owners(built)
    by_key = {record.manifest.action.key: record.task for record in built}
    for file, cause in wrong:
        what = by_key.get(file.key) or manifests.described(named.get(file.key, ()))
        if file.kind not in ("blob", "reference", "action"):
            what = "made again when it is wanted"
        print(f"corrupt: {file.path} ({size(file.size)}): {cause}\n    {one_line(what)}")
    aside = sum(file.size for file, _ in wrong)
    print(f"set aside in {config.cache.dir / CORRUPT}: {size(aside)}")
    if forgotten:
        print(f"made of it, perhaps, and forgotten, so that the next {COMMAND} makes it again:")
        for task in forgotten:
            print(f"    {task}")


def collect_garbage(config: Config, options: Mapping[str, Any]) -> int:
    """Remove garbage, and what is least recently used until the cache is as small as asked."""
    cap: int | None = config.cache.max_bytes
    if options["max_size"] is not None:
        cap = size_bytes(options["max_size"])
        if cap is None:
            raise CmdParseError(f"--max-size {options['max_size']} is no size: write it as 20GB")
    if options["all"] and cap is None:
        raise CmdParseError("--all needs a size cap: --max-size 20GB, or [cache] max_size")

    def collect(remove: Callable[[File], object]) -> gc.Collection:
        wanted = gc.Wanted() if options["all"] else manifests.wanted(config, manifests.read(config))
        return gc.collect(manifests.survey(config), wanted, cap, time.time(), remove)

    if options["dry_run"]:
        collection = collect(lambda _: None)
    else:
        with Lock(config.cache.dir).alone(_waiting):
            collection = collect(lambda file: trash.remove(file.path))
    removed = "would remove" if options["dry_run"] else "removed"
    _say(removed, collection, config, cap, everything=options["all"])
    return 0


def _say(
    removed: str, collection: gc.Collection, config: Config, cap: int | None, everything: bool
) -> None:
    for kind, name in cache_stats.KIND_NAMES.items():
        for why in (gc.GARBAGE, gc.EVICTED):
            if chosen := collection.removed.get((why, kind)):
                print(f"{removed} {chosen[0]} {name}, {size(chosen[1])}: {why}")
    if not collection.removed:
        print("nothing to remove")
    left = "would be left" if removed.startswith("would") else "left"
    print(f"{left} in {config.cache.dir}: {size(collection.size)}")
    if cap is None:
        print(
            f"No current target needs {size(collection.spare)} of it, and no size cap is set: "
            "set\n[cache] max_size in models.toml, or pass --max-size 20GB."
        )
    elif collection.size > cap and not everything:
        print(
            f"That is more than {size(cap)}: the targets of models.toml need it. --all removes it, "
            "too."
        )


def _waiting() -> None:
    print("waiting for tasks that use the cache", file=sys.stderr)


def push(config: Config, _options: Mapping[str, Any]) -> int:
    """Upload all that is built of the targets of models.toml."""
    with closing(Session.open(config)) as session:
        sharing = _sharing(config, session)
        remote = sharing.remote
        if config.cache.mode == "read-only":
            raise ConfigError('[cache] mode is "read-only": nothing is written to the remote')
        _warn_of_refused(session)
        exchanged = exchange.push(session.builder, sharing, session.plans.values())
        pushed = remote.finish()
        uploaded = f"{plural(pushed.objects, 'object')} uploaded, {size(pushed.bytes)}"
        if not remote.writable:
            return _given_up(remote, uploaded)
        print(f"{remote.name}: {plural(exchanged.results, 'result')} there now, {uploaded}")
        return _missing(exchanged, "not built here, or not in the cache any more")


def pull(config: Config, _options: Mapping[str, Any]) -> int:
    """Fetch all that the remote has of the targets of models.toml."""
    with closing(Session.open(config)) as session:
        sharing = _sharing(config, session)
        remote = sharing.remote
        _warn_of_refused(session)
        exchanged = exchange.pull(session.builder, sharing, session.plans.values())
        here = plural(exchanged.results, "result")
        fetched = f"{here} here, {size(remote.fetched_bytes)} fetched"
        if not remote.readable:
            return _given_up(remote, fetched)
        print(f"{remote.name}: {fetched}")
        return _missing(exchanged, f"in neither place: {COMMAND} makes them")


def _warn_of_refused(session: Session) -> None:
    for message in messages(session.refused.values()):
        print(f"warning: {message}", file=sys.stderr)


def _sharing(config: Config, session: Session) -> Sharing:
    sharing = session.builder.store.sharing
    if sharing is None:
        raise ConfigError(
            '[cache] mode is "off"'
            if config.cache.remote
            else "there is no remote store: set [cache] remote"
        )
    return sharing


def _given_up(remote: Remote, done: str) -> int:
    """Say what was done before the remote was given up, of which it has warned."""
    print(f"ERROR: {remote.name} was given up: {done}", file=sys.stderr)
    return FAILED


def _missing(exchanged: exchange.Exchanged, why: str) -> int:
    if exchanged.missing:
        print(f"{plural(exchanged.missing, 'result')} {why}")
    return 0


SUBCOMMANDS = {
    "stats": Subcommand("what it holds, by stage and target, and what it saved", stats),
    "verify": Subcommand(
        "reads all of it, and sets aside what is corrupt",
        verify_all,
        (
            {
                "name": "quick",
                "long": "quick",
                "type": bool,
                "default": False,
                "help": "only records, and whether blobs have the sizes that these say",
            },
        ),
    ),
    "gc": Subcommand(
        "removes garbage, and the least recently used above a size",
        collect_garbage,
        (
            {
                "name": "max_size",
                "long": "max-size",
                "type": str,
                "default": None,
                "metavar": "SIZE",
                "help": "what to leave, such as 20GB (default: [cache] max_size)",
            },
            {
                "name": "all",
                "long": "all",
                "type": bool,
                "default": False,
                "help": "also what a target of models.toml needs",
            },
            {
                "name": "dry_run",
                "long": "dry-run",
                "type": bool,
                "default": False,
                "help": "only say what would go",
            },
        ),
    ),
    "push": Subcommand("uploads all that is built of the targets to the remote store", push),
    "pull": Subcommand("fetches all that the remote store has of the targets", pull),
}
