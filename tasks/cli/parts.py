"""parts: a run of more tasks than memory is to hold, in parts: some of its targets after others."""

from __future__ import annotations

from tasks.cli.task_graph import TaskGraph
from tasks.core.task_names import PACK, REPORT, task_name
from tasks.planning.plan import Plan
from tasks.stages import registry

MOST_TASKS = 10_000  # at once: of 10 kB each


def parts(graph: TaskGraph) -> list[list[str]]:
    """Return the targets that are to be built before all that a run asks for, some at a time.

    What is fetched is fetched once for all that read it, so targets of what comes from elsewhere
    stay together.

    Returns:
        Nothing where the run has not so many tasks, or asks for single ones.
    """
    session = graph.session
    asked = {*(session.options.requested_tasks or (PACK,))}
    if not {PACK, REPORT}.issuperset(asked):
        return []
    if any(plan.checkpoint.fetched for plan in session.plans.values()):
        return []

    def count(plan: Plan) -> int:
        target = plan.target.name
        building = 0 if target in graph.skipped else plan.tasks
        measuring = REPORT in asked and target not in graph.measured
        return building + (sum(map(len, plan.measure_specs.values())) if measuring else 0)

    left = {name: n for name, plan in session.plans.items() if (n := count(plan))}
    if sum(left.values()) <= MOST_TASKS:
        return []
    found: list[list[str]] = []
    room = 0
    for target, tasks in left.items():
        if tasks > room:
            found.append([])
            room = MOST_TASKS
        found[-1].append(target)
        room -= tasks
    return found


def tasks_of(targets: list[str], requested: tuple[str, ...]) -> list[str]:
    """Return the tasks of a part, whose targets are all that a run names, or a report of them."""
    groups = [PACK, *(stage.group for stage in registry.MEASURES if REPORT in requested)]
    return [task_name(group, target) for group in groups for target in targets]
