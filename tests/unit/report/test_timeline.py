"""The last run, and its critical path, out of the build log."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tasks.execution.log import Entry
from tasks.report.timeline import critical_path, last_run


def test_the_last_run_is_found_in_a_damaged_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert last_run(log, "model") is None
    packs = [
        Entry(run, "pack:model", outcome, "", 0.0, 1.0, 0, 0, "")
        for run, outcome in (("1", "computed"), ("2", "reused"), ("3", "failed"))
    ]
    lines = [json.dumps(asdict(entry)) for entry in packs]
    log.write_text("\n".join([*lines, '{"task": "pack:model", "run"']))
    assert last_run(log, "model") == "2"
    assert last_run(log, "mode") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.sets(st.integers(0, 30))), min_size=1, max_size=9))
def test_no_chain_is_longer_than_the_critical_path(told: list[tuple[int, set[int]]]) -> None:
    needs = {
        str(i): [str(n) for n in sorted(before) if n < i] for i, (_, before) in enumerate(told)
    }
    entries = {
        str(i): Entry("", str(i), "computed", "", 0.0, float(seconds), 0, 0, "")
        for i, (seconds, _) in enumerate(told)
    }

    def longest(task: str) -> float:
        return entries[task].seconds + max(map(longest, needs[task]), default=0.0)

    last = str(len(told) - 1)
    chain = critical_path(entries, needs, last)
    assert chain[-1].task == last
    assert sum(entry.seconds for entry in chain) == longest(last)
    assert all(a.task in needs[b.task] for a, b in itertools.pairwise(chain))
