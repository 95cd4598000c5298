"""Limits of open files: a low one costs threads at most, and nobody's is changed for good."""

import resource
from pathlib import Path

import pytest

from support import checkpoints, inside, running
from support.projects import FOUR_BIT, create

THREADS = {"cores": 32}  # of which each wants to open several files


@pytest.mark.parametrize("hard", [40, None], ids=["hard", "soft"])
def test_few_files_may_be_open(hard: int | None, tmp_path: Path) -> None:
    """Though an architecture is asked of mlx-lm, which asks for 2,048 as it is imported."""
    _, ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    project = create(tmp_path, "huggingface", max_shard_size="100kB", **FOUR_BIT)
    checkpoints.make("qwen3", tmp_path / "other", num_hidden_layers=12)
    project.configure("other", source="other", **FOUR_BIT)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard or ours))

    with running.start(project, hook=THREADS, preexec_fn=limit) as run:
        out, err = run.communicate(timeout=running.DEADLINE_SECONDS)
    assert (run.returncode, err) == (0, ""), out
    assert project.built() == project.anew()


def test_planning_leaves_the_limit_as_it_is(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface")
    checkpoints.make("qwen3", tmp_path / "other")
    project.configure("other", source="other")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    inside.doit(tmp_path, "plan", expect=1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
