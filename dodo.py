"""mlx-make: builds the models that models.toml lists. ``doit list`` shows the tasks."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from doit import get_var

from tasks import example, graph

MODELS = Path(get_var("models", "models.toml"))
EXAMPLE = Path(__file__).parent / "checkpoints" / "tiny-llama"
DOIT_CONFIG = graph.doit_config(MODELS)

Tasks = Iterator[dict[str, Any]]


@cache
def loaded() -> graph.Graph:
    """Read models.toml, once."""
    return graph.load(MODELS, make={EXAMPLE: example.make})


def task_extract() -> Tasks:
    """Find and digest each layer's tensors in the checkpoint."""
    yield from loaded().stage("extract")


def task_unshard() -> Tasks:
    """Join shards into whole tensors, by the layout's names."""
    yield from loaded().stage("unshard")


def task_cast() -> Tasks:
    """Cast each layer to the target's dtype."""
    yield from loaded().stage("cast")


def task_quantize() -> Tasks:
    """Quantize each layer."""
    yield from loaded().stage("quantize")


def task_pack() -> Tasks:
    """Write build/TARGET: weight files, config.json, tokenizer."""
    yield from loaded().pack()
