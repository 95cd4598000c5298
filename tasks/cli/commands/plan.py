"""plan: ``doit plan``: what a run would do, and why."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from cache.errors import one_line
from tasks.cli.commands.estimate import estimate
from tasks.cli.commands.forecasting import UNCERTAIN, ForecastCommand, indented
from tasks.cli.failures import message
from tasks.cli.options import Options
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.task_names import PACK, PUBLISH, group_of, is_packing, target_of, task_name
from tasks.core.text import duration, plural, size
from tasks.execution.disk import DiskNeed
from tasks.execution.resources import threads
from tasks.planning.choice import Choice
from tasks.planning.forecast import Forecast
from tasks.planning.plan import Plan
from tasks.planning.sizes import Traffic
from tasks.planning.steps import SETTLED, UP_TO_DATE, Step
from tasks.stages import registry
from tasks.stages.candidates import split_name

SOMETHING_TO_DO, REFUSED = 1, 3  # exit status of ``doit plan``
OVERVIEW = "overview"  # reports/index.html, of all targets
MAY_BE_REFUSED = (
    "a checkpoint whose tensors are not those of models.lock is an error until "
    f"{COMMAND} lock accepts it"
)
JSON = {
    "name": "as_json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print JSON, for scripts",
}


class PlanCommand(ForecastCommand):
    """``doit plan``."""

    name = "plan"
    doc_purpose = "say what a run would do and why, without doing it"
    doc_usage = "[TASK ...]"
    doc_description = """\
Exit status 0: there is nothing to do, 1: there is, 3: an error, also if models.lock refuses
it or a target cannot be planned."""
    cmd_options = (JSON,)

    def execute(self, params: Any, args: list[str]) -> int:
        """Load the tasks, and say what is asked."""
        # What nothing happened to is told in one line, but as JSON task by task.
        self.options = Options(skip_targets=not args and not params["as_json"])
        gc.disable()  # as in run: thousands of tasks are made, and none goes
        return super().execute(params, args)

    def _execute(self, as_json: bool) -> int:
        forecasted, _, _ = self.forecast()
        publishing = self._publishing(forecasted)
        steps, refused = list(forecasted.steps.values()), list(forecasted.refused.values())
        session = self.session
        devices = {plan.target.device for plan in session.plans.values()}
        seconds = estimate(steps, session.builder.log.entries(), threads(devices))
        need = self._disk_need(steps)
        try:
            if need:
                need.check()
        except BuildError as error:
            refused.append(str(error))
        if as_json:
            choices = self._choices(steps)
            self.outstream.write(_as_json(steps, seconds, refused, need, publishing, choices))
        else:
            self.outstream.writelines(f"ERROR: {message}\n" for message in refused)
            lines = self._lines(steps, seconds, need)
            self.outstream.writelines(f"{one_line(line)}\n" for line in lines)
            for said in publishing.values():
                self.outstream.writelines(f"{one_line(line)}\n" for line in said.lines())
        if refused:
            return REFUSED
        busy = any(step.state not in SETTLED for step in steps)
        busy |= any(said.is_something for said in publishing.values())
        busy |= any(each.settings is None for each in self._choices(steps).values())
        return SOMETHING_TO_DO if busy else 0

    def _publishing(self, forecasted: Forecast) -> dict[str, _Publishing]:
        """Return what the requested tasks that publish would do, by target; the hub is asked."""
        publishing = {}
        tasks, requested = self.requested()
        for name in dict.fromkeys(requested):
            target = target_of(name)
            if group_of(name) != PUBLISH or target not in self.session.plans:
                continue
            meta = tasks[name].meta
            if forecasted.steps[task_name(PACK, target)].state not in SETTLED:
                publishing[target] = _Publishing(True, ["what differs once it is packed"])
                continue
            try:
                difference, said = meta["publisher"].forecast(meta["plan"])
            except BuildError as error:
                forecasted.refused[name] = f"{name}: {message(error)}"
            else:
                uploads = {**difference.uploads}
                removes = [*difference.removes]
                publishing[target] = _Publishing(difference.is_something, said, uploads, removes)
        return publishing

    def _disk_need(self, steps: list[Step]) -> DiskNeed | None:
        """Return what the run needs of the disk, where it fetches layers."""
        session = self.session
        todo = {step.task for step in steps if step.state not in SETTLED}
        if not session.schedule or not any(_fetches(step) for step in steps):
            return None
        tasks, _ = self.requested()
        metas = [tasks[step.task].meta or {} for step in steps if step.task in todo]
        nodes = [(meta["plan"], meta["node"]) for meta in metas if "node" in meta]
        session.builder.streaming.arrange(nodes)
        return session.schedule.need(nodes)

    def _lines(
        self, steps: list[Step], seconds: float | None, need: DiskNeed | None
    ) -> Iterator[str]:
        """Yield the plan's lines: by target and stage, layers of one state and reason together."""
        session = self.session
        todo = [step for step in steps if step.state not in SETTLED]
        busy = dict.fromkeys(step.target for step in steps if step.state != UP_TO_DATE)
        choices = self._choices(steps)  # also where the cache lost what doit has on record
        busy |= dict.fromkeys(target for target in choices if choices[target].settings is None)
        for target in busy:
            of_target = [step for step in steps if step.target == target]
            yield from _of_target(target, of_target, choices.get(target))
        untouched = session.untouched.targets.keys() if session.untouched else ()
        looked_at = {step.target for step in steps} - busy.keys()
        idle = [t for t in (*session.config.targets, "") if t in untouched or t in looked_at]
        if idle:
            yield from indented(f"up to date: {', '.join(t or OVERVIEW for t in idle)}", 0)
        if not todo:
            return
        if not all(step.certain for step in todo):
            yield from indented(UNCERTAIN, 0)
        leaf = any(step.stage in registry.leaves() and not step.certain for step in todo)
        if session.lock.sources and leaf:
            yield from indented(MAY_BE_REFUSED, 0)
        moved, cached, packed = _totals(todo, need)
        for target in dict.fromkeys(step.target for step in todo if step.target in session.plans):
            for note in session.plans[target].packing:
                yield from indented(f"{target}: {note}", 0)
            yield from indented(self._not_kept(session.plans[target]), 0)
        tasks = len(steps) + sum(session.all_plans[target].tasks for target in untouched)
        yield f"{len(todo)} of {plural(tasks, 'task')}"
        fetched = f", fetches {size(moved.fetched)}" if moved.fetched else ""
        yield f"reads {size(moved.read)}, writes {size(moved.written)}{fetched}"
        if downloads := _downloads(todo):
            yield f"downloads {size(downloads)} of that"
        yield from indented(
            f"takes up to {size(cached + packed)} more of the disk while it runs: "
            f"cache {size(cached)}, build {size(packed)}",
            0,
        )
        if need:
            yield from indented(_policy(need), 0)
        yield f"time {_seconds(seconds)}"

    def _choices(self, steps: list[Step]) -> dict[str, Choice]:
        """Return how modules' settings are chosen, of the targets of which steps do something."""
        plans = {**self.session.plans, **self.session.undecided}
        busy = dict.fromkeys(step.target for step in steps if step.state not in SETTLED)
        busy |= dict.fromkeys(self.session.undecided.keys() & {step.target for step in steps})
        return {t: c for t in busy if t in plans and (c := plans[t].choice)}

    def _not_kept(self, plan: Plan) -> str:
        """Say what is made again where it is larger than what it is made of, and at what cost."""
        builder = self.session.builder
        left = [stage for stage in registry.KEPT if stage in plan.growth]
        if builder.keep is not None or builder.passes(plan) or not left:
            return ""
        (stage,) = left
        made, made_of = plan.growth[stage]
        return (
            f"{plan.target.name}: what {stage} makes is not kept, since it is {size(made)} of "
            f"{size(made_of)}; changed bits will read those {size(made_of)} again, unless "
            f'[cache] keep names "{stage}"'
        )


@dataclass(frozen=True)
class _Publishing:
    """What publishing a target would do.

    Attributes:
        is_something: whether it would change the repository, as far as can be told.
        said: that in words.
        uploads: the files that would go up, with their sizes; None, that is not known yet.
        removes: the files that would be removed there.
    """

    is_something: bool
    said: list[str]
    uploads: dict[str, int] | None = None
    removes: list[str] | None = None

    def lines(self) -> Iterator[str]:
        """Yield it as ``doit plan`` shows it."""
        first, *notes = self.said
        yield from indented(f"{PUBLISH}: {first}", 0)
        for note in notes:
            yield from indented(f"note: {note}", 0)


@dataclass(frozen=True)
class _Group:
    """Steps that are told in one line."""

    stage: str
    state: str
    facts: tuple[str, ...]

    @classmethod
    def of(cls, step: Step) -> _Group:
        state = step.state if step.certain else f"{step.state}?"
        # Which tensors of a layer they are about, doit why tells.
        facts = [r.fact if step.layer else str(r) for r in step.why]
        return cls(step.stage, state, tuple(facts))


def _fetches(step: Step) -> bool:
    """Tell whether a step fetches a layer of a checkpoint."""
    return step.stage in registry.leaves() and step.moved.fetched > 0


def _downloads(steps: Iterable[Step]) -> int:
    """Return the bytes that steps fetch of checkpoints."""
    return sum(step.moved.fetched for step in steps if _fetches(step))


def _policy(need: DiskNeed) -> str:
    """Say what becomes of the layers that are fetched, and why."""
    if need.keeps:
        return "layers that are fetched are kept, since [cache] keep names extract"
    room = (
        f"{size(max(0, need.room))} of [build] disk are for" if need.is_set else "there is room for"
    )
    return (
        "layers that are fetched are dropped once they are used, since [cache] keep does not name "
        f"extract; {room} those in use, which take {size(need.largest)} at most"
    )


def _of_target(target: str, steps: list[Step], choice: Choice | None) -> Iterator[str]:
    groups: dict[_Group, list[str]] = {}
    stages = list(dict.fromkeys(step.stage for step in steps))
    for step in sorted(steps, key=lambda step: stages.index(step.stage)):
        groups.setdefault(_Group.of(step), []).append(step.layer)
    yield target or OVERVIEW
    said: tuple[str, ...] = ()
    width = max(9, *(len(group.stage) + 1 for group in groups))
    for group, layers in groups.items():
        head = f"  {group.stage:<{width}}{group.state:<11}"
        yield from indented(head + _folded(layers), 0, len(head))
        for fact in group.facts if group.facts != said else ():
            yield from indented(fact, len(head))
        said = group.facts
    if choice:
        yield from indented(choice.words, 2, 4)


def _folded(layers: list[str]) -> str:
    """Return names of layers, those that follow each other as one range."""

    def place(at: tuple[int, str]) -> tuple[str, int]:
        begin, _, number = at[1].rpartition(".")
        return (begin, int(number) - at[0]) if number.isdigit() else (at[1], 0)

    by_candidate: dict[str, list[str]] = {}  # of sensitivities; of all others it is none
    for name in layers:
        layer, candidate = split_name(name)
        by_candidate.setdefault(candidate, []).append(layer)
    by_layers: dict[str, list[str]] = {}
    for candidate, of in by_candidate.items():
        runs = [[name for _, name in run] for _, run in groupby(enumerate(of), place)]
        parts = [r[0] if len(r) == 1 else f"{r[0]}-{r[-1].rpartition('.')[2]}" for r in runs]
        by_layers.setdefault(", ".join(parts), []).append(candidate)
    return "; ".join(
        f"{names}: {', '.join(candidates)}" if any(candidates) else names
        for names, candidates in by_layers.items()
    )


def _totals(steps: Iterable[Step], need: DiskNeed | None) -> tuple[Traffic, int, int]:
    """Return what steps move, and how much the cache and build/ grow by meanwhile."""
    steps = list(steps)
    moved = sum((step.moved for step in steps), Traffic())
    packed = sum(step.moved.written for step in steps if is_packing(step.task))
    passing = 0
    if need and not need.keeps:
        downloads = _downloads(steps)
        passing = downloads - min(downloads, max(0, need.room))
    return moved, moved.written + moved.fetched - passing - packed, packed


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not known: no earlier run tells"
    return f"{duration(seconds)}, by earlier runs"


def _as_json(
    steps: list[Step],
    seconds: float | None,
    refused: list[str],
    need: DiskNeed | None,
    publishing: dict[str, _Publishing],
    choices: dict[str, Choice],
) -> str:
    moved, cached, packed = _totals(steps, need)
    tasks = []
    for step in steps:
        record = asdict(step)
        moved_by_it = record.pop("moved")
        tasks.append({**record, **_bytes(moved_by_it)})
    summary: dict[str, Any] = {
        "seconds": seconds,
        **_bytes(asdict(moved)),
        "bytes_downloaded": _downloads(steps),
        "disk_bytes": cached + packed,
    }
    if need:
        summary |= {"layers": "kept" if need.keeps else "dropped", "layers_bytes": need.room}
    budgets = {target: choice.json for target, choice in choices.items()}
    publish = {target: asdict(each) for target, each in publishing.items()}
    said = {
        "refused": refused,
        "tasks": tasks,
        **summary,
        **({"budgets": budgets} if budgets else {}),
        **({"publish": publish} if publish else {}),
    }
    return json.dumps(said, indent=1) + "\n"


def _bytes(moved: dict[str, int]) -> dict[str, int]:
    return {f"bytes_{key}": value for key, value in moved.items()}
