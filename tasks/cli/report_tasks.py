"""report_tasks: doit's tasks that write reports: one a target, and one for the overview."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from cache.digest import digest_record
from cache.files import atomic
from cache.records.manifests import Manifest
from tasks.cli.refused_tasks import refused_tasks
from tasks.cli.session import Session
from tasks.cli.up_to_date import NOT_LEFT, UpToDateCheck
from tasks.core import text
from tasks.core.errors import BuildError
from tasks.core.spec import Target
from tasks.core.task_names import PACK, REPORT, task_name
from tasks.core.workspace import REPORTS
from tasks.execution.filling import place
from tasks.planning.plan import Plan
from tasks.report import INDEX, page_name, timeline, trace_name
from tasks.report.figures import Reader
from tasks.stages.reasons import Reason

VERSION = 3
HEAD_BYTES = 1000
MARKS = (  # what pages and traces begin with, in any version
    b'<meta name="generator" content="mlx-make">',
    b'{"traceEvents":[{"ph":"M","pid":1,"name":"process_name","args":{"name":"',
)


def report(session: Session, measured: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the tasks.

    Args:
        session: the targets.
        measured: those that have no tasks for their measures, which are up to date.
    """
    reader = Reader(session.builder)
    families: dict[str, list[Plan]] = {}
    for plan in session.all_plans.values():
        families.setdefault(plan.target.source_name, []).append(plan)
    for family in families.values():
        # What the pages of these show is made before any page compares its family's targets with
        # it; what is not asked for is shown as it is.
        first = [
            plan for plan in family if session.options.requests(task_name(REPORT, plan.target.name))
        ]
        compared = [task for other in first for task in _compared(other, measured)]
        for plan in (each for each in family if each.target.name in session.plans):
            task = _target_task(session, reader, plan, family)
            yield {**task, "task_dep": compared, "meta": {**task["meta"], "beside": first}}
    yield from refused_tasks(session, REPORT)
    yield _overview_task(session, reader)


def _asked(target: Target) -> dict[str, Any]:
    """Return what a target is told, but for where it lies and where that is said."""
    quantize = to_builtins(target.quantize or None, enc_hook=int)
    names = {"source": "", "adapter": "", "where": ""}  # what they are called is there, too
    told = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in structs.asdict(target).items()
    }
    return {**told, "quantize": quantize, **names}


def _target_task(
    session: Session, reader: Reader, plan: Plan, family: list[Plan]
) -> dict[str, Any]:
    name = plan.target.name
    task = task_name(REPORT, name)
    folder = session.workspace.reports
    builder = session.builder
    manifest = builder.workspace.packed(name)
    written = [page_name(name), trace_name(name)]
    check = UpToDateCheck(
        digest_record([VERSION, _asked(plan.target)]),
        str(folder / written[0]),
        lambda values: _changed_page(folder, values, seen=_seen(session, reader, plan, family)),
    )

    def build(why: str) -> dict[str, Any]:
        from tasks.report import pages  # only where one is written

        using = builder.store.lock.using()
        with using, builder.logged(task, why) as record:
            seen = _seen(session, reader, plan, family)
            packed = Manifest.from_bytes(manifest.read_bytes())
            sha256 = session.acceptor.sha256(plan, packed)
            texts = pages.target(reader, plan, packed, session.lock, family, sha256)
            _write(folder / written[0], texts.page)
            if texts.trace is not None:
                _write(folder / written[1], texts.trace)
            elif _is_ours(folder / written[1]):
                (folder / written[1]).unlink(missing_ok=True)
            record["outcome"] = "computed"
        kept = written if texts.trace else written[:1]
        return {
            "seen": seen,
            "outputs": place.stamps(str(folder), kept),
            "summary": f"{REPORTS}/{written[0]}: {text.size(len(texts.page.encode()))}",
            "notes": [],
        }

    return {
        "basename": task,
        "actions": [check.action(build)],
        "doc": "Write the target's report.",
        "file_dep": [
            str(manifest),
            *(node.manifest_path(builder.workspace) for node in plan.measuring),
        ],
        "targets": [str(folder / written[0])],
        "uptodate": [check],
        "clean": [(_remove, [[folder / file for file in written]])],
        "io": {"capture": False},
        "meta": {"plan": plan, "check": check},
    }


def _overview_task(session: Session, reader: Reader) -> dict[str, Any]:
    folder = session.workspace.reports
    path = folder / INDEX
    check = UpToDateCheck(
        digest_record([VERSION, list(session.plans)]),
        str(path),
        lambda values: _changed_page(folder, values),
    )

    def build(why: str) -> dict[str, Any]:
        from tasks.report import pages

        using = session.builder.store.lock.using()
        with using, session.builder.logged(REPORT, why) as record:
            _write(path, pages.overview(reader, session.plans.values()))
            record["outcome"] = "computed"
        return {
            "outputs": place.stamps(str(folder), [INDEX]),
            "summary": f"{REPORTS}/{INDEX}: {text.plural(len(session.plans), 'target')}",
            "notes": [],
        }

    return {
        "basename": REPORT,
        "actions": [check.action(build)],
        "file_dep": [str(folder / page_name(name)) for name in session.plans],
        "targets": [str(path)],
        "uptodate": [check],
        "clean": [(_remove, [[path]])],
        "io": {"capture": False},
        "meta": {"plans": list(session.plans.values()), "check": check},
    }


def _changed_page(folder: Path, values: Mapping[str, Any], seen: Any = None) -> list[Reason]:
    """Say how a page is not as it was left, or shows what has changed since."""
    if not place.intact_files(str(folder), values.get("outputs")):
        return [Reason(f"{folder} {NOT_LEFT}")]
    return [Reason("what it shows has changed")] if values.get("seen") != seen else []


def _compared(plan: Plan, measured: Collection[str]) -> list[str]:
    """Return the tasks that make what pages show of a target."""
    measuring = [] if plan.target.name in measured else plan.measuring
    groups = dict.fromkeys([PACK, *(node.stage.group for node in measuring)])
    return [task_name(group, plan.target.name) for group in groups]


def _seen(session: Session, reader: Reader, plan: Plan, family: list[Plan]) -> str:
    """Return a digest of what a page shows besides the manifests that it depends on."""
    others = [reader.seen(other) for other in family if other is not plan]
    evaluation = reader.evaluation(plan)  # which no report waits for
    source = session.lock.sources.get(plan.target.source_name)
    run = timeline.last_run(session.builder.log.path, plan.target.name)
    return digest_record([others, evaluation, source.json if source else None, run])


def _write(path: Path, page: str) -> None:
    """Write a page, or a trace.

    Raises:
        BuildError: something lies there that no report is.
    """
    if not _is_ours(path):
        raise BuildError(
            f"{path} is in the way: it is no report that was written here. Nothing there is "
            "replaced. Move it."
        )
    atomic.write(path, page.encode())


def _is_ours(path: Path) -> bool:
    """Tell whether nothing lies there, or what a report of any version left."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return not path.is_symlink()
    except OSError:  # a folder
        return False
    return not head or any(mark in head for mark in MARKS)


def _remove(paths: list[Path], dryrun: bool) -> None:
    for path in paths:
        if not _is_ours(path):
            print(f"{REPORTS}/{path.name} left there, since not written here")
            continue
        if path.exists():
            print(f"{'would remove' if dryrun else 'removing'} {REPORTS}/{path.name}")
        if not dryrun:
            path.unlink(missing_ok=True)
