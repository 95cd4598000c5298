"""verify_tasks: doit's tasks that verify what was built: ``doit verify:TARGET``.

There is no group of all: ``doit verify`` is a command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from cache.errors import one_line
from tasks.checkpoints import sources
from tasks.cli.failures import values_or_failure
from tasks.cli.refused_tasks import refused_tasks
from tasks.cli.session import Session
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.task_names import PACK, VERIFY, task_name
from tasks.core.text import plural
from tasks.core.workspace import BUILD
from tasks.execution import verify
from tasks.execution.claim import Claim, Making
from tasks.execution.verify import DIFFERENT, EQUAL, Verdict, Verification
from tasks.planning.plan import Plan

WORDS = {"equal": "equal", "rounding": "equal but for rounding", "different": "different"}


def tasks(session: Session) -> Iterator[dict[str, Any]]:
    """Yield the tasks."""
    for name, plan in session.plans.items():

        def act(plan: Plan = plan) -> Any:
            return values_or_failure(lambda: _verify(session, plan))

        yield {
            "basename": task_name(VERIFY, name),
            "doc": "Verify the target.",
            "actions": [act],
            "task_dep": [task_name(PACK, name)],
            "io": {"capture": False},
            "meta": {"plan": plan},
        }
    yield from refused_tasks(session, VERIFY)


def _verify(session: Session, plan: Plan) -> dict[str, Any]:
    """Verify a target that is built; return the values that doit keeps of the task.

    Raises:
        BuildError: it is not what its source makes.
    """
    target = plan.target
    shown = f"{BUILD}/{target.name}"
    with (
        tempfile.TemporaryDirectory(prefix="mlx-make-") as name,
        session.builder.logged(task_name(VERIFY, target.name), "it was asked for") as record,
    ):
        folder = Path(name)
        built = sources.spec(str(session.workspace.built(target.name)), folder)
        claim = Claim.open(built, shown, folder)
        making = Making.of(target, session.config.quality, session.lock)
        verification = Verification.of(claim, making, folder, whole=False)
        verdicts = list(verification.verdicts())
        record["outcome"] = "computed"
    said = summary(shown, verification, target.source_name, verdicts)
    if verify.worst(verdicts) == DIFFERENT:
        mismatches = [line for line in lines(verdicts) if line.startswith("  ")]
        raise BuildError(said, *mismatches)
    more = f" ({COMMAND} verify --all {target.name} makes all)"
    return {"summary": said + more * (len(verification.layers) < verification.all_layers)}


def summary(model: str, verification: Verification, source: str, verdicts: list[Verdict]) -> str:
    """Return what a model is found to be, and by how much of it."""
    of = f"{len(verification.layers)} of {plural(verification.all_layers, 'layer')}"
    target = verification.plan.target
    method = target.quantize.method if target.quantize else None
    more = f" and {target.adapter_name}" if target.adapter_name else ""
    more += f", rounded by {method}" if method else ""
    if method and verify.worst(verdicts) == DIFFERENT:
        more += ". Another kind of processor, or another version of NumPy, rounds otherwise"
    return f"{model}: {WORDS[verify.worst(verdicts)]}, by {of} made anew from {source}{more}"


def lines(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield what is said of tensors, layer by layer."""
    for layer, group in groupby(verdicts, lambda verdict: verdict.layer):
        of_layer = list(group)
        mismatches = [each for each in of_layer if each.verdict != EQUAL]
        if layer:
            equal = len(of_layer) - len(mismatches)
            yield f"{layer}: {equal} of {plural(len(of_layer), 'tensor')} equal"
        yield from (one_line(f"  {v.tensor}: {WORDS[v.verdict]}: {v.detail}") for v in mismatches)
