"""why: ``doit why``: why a task would run, and why it last ran."""

from __future__ import annotations

import time
from collections.abc import Iterator

from doit.exceptions import InvalidCommand

from cache.errors import one_line
from tasks.cli.commands.forecasting import UNCERTAIN, ForecastCommand, indented
from tasks.core.program import COMMAND
from tasks.execution.log import Entry
from tasks.planning.steps import Step
from tasks.stages.reasons import Reason


class WhyCommand(ForecastCommand):
    """``doit why``."""

    name = "why"
    doc_purpose = "say why a task would run, and why it last ran"
    doc_usage = "TASK ..."
    doc_description = "TASK is a task's name, of a layer too: quantize:llama-7b:layers.0"
    cmd_options = ()

    def _execute(self) -> int:
        if self.sel_default_tasks:
            raise InvalidCommand(f"why what? Name a task; {COMMAND} list --all shows them.")
        last = {entry.task: entry for entry in self.session.builder.log.entries()}
        forecasted, requested, undecided = self.forecast()
        self.outstream.writelines(f"{one_line(line)}\n" for line in undecided)
        self.outstream.writelines(f"ERROR: {message}\n" for message in forecasted.refused.values())
        for step in requested:
            self.outstream.writelines(
                f"{one_line(line)}\n" for line in _lines(step, last.get(step.task))
            )
        return 0


def _lines(step: Step, entry: Entry | None) -> Iterator[str]:
    yield step.task
    yield f"  now: {step.state}{'' if step.certain else '?'}"
    for reason in step.why:
        yield from indented(_in_full(reason), 4)
    if not step.certain:
        yield from indented(UNCERTAIN, 4)
    if entry is None:
        yield "  last run: none on record"
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.start))
    head = f"last run: {when}, {entry.outcome} in {entry.seconds:.2f} s; the reason then:"
    yield from indented(head, 2)
    yield from indented(entry.why, 4)


def _in_full(reason: Reason) -> str:
    return f"{reason.fact}: {', '.join(reason.names)}" if reason.names else reason.fact
