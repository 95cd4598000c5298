"""Golden keys and digests: what a cache holds stays valid from one version to the next.

`golden/actions.json` has, for each target, stage and layer, the digest of the action and of what
it made, with what depends on the machine taken out (versions of libraries, the processor, and the
numbers that a model comes to as it is run, whose last bits are the processor's). A change here
means that everybody's cache is lost for that stage: raise the stage's version, and write the file
anew with `PYTHONPATH=tests python tests/contract/test_golden.py`.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import pytest

from cache.records.manifests import Action
from support import checkpoints, projects

GOLDEN = Path(__file__).parent / "golden" / "actions.json"
# Parameters that name versions and machines, or files that another version writes otherwise.
COMPUTER = ("mlx", "machine", "sanitize", "versions", "transformers", "tokenizer")
RUNS = ("teacher", "forward", "evaluate")
CPU = {"device": "cpu"}
TARGETS = {
    "meta": {
        "lm-4bit": {"dtype": "float16", "quantize": {"bits": 4}},
        "lm-mixed": {"quantize": {"recipe": "mixed_3_6"}},
        "lm-mxfp4": {"quantize": {"mode": "mxfp4"}, "max_shard_size": "1MB"},
        "examples-4bit": {"layout": "mlx-examples", "quantize": {"bits": 4}},
        "examples-plain": {"layout": "mlx-examples"},
    },
    "huggingface": {
        "lm-8bit": {"dtype": "bfloat16", "quantize": {"bits": 8, "group_size": 32}},
        "lm-plain": {"dtype": "float32"},
        "examples-4bit": {"layout": "mlx-examples", "quantize": {"bits": 4}},
    },
    "qwen3-moe": {"lm-4bit": {"quantize": {"bits": 4}}},
    "deepseek-v3": {"lm-4bit": {"quantize": {"bits": 4}}},
    "llama-tied": {"lm-4bit": {"dtype": "float32", "quantize": {"bits": 4, "group_size": 32}}},
}
EVALUATED = "llama-tied"
TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 20


def _project(folder: Path, kind: str) -> projects.Project:
    if kind in projects.SOURCES:
        project = projects.create(folder, kind)
        if kind == "huggingface":
            checkpoints.make("llama", project.checkpoint, num_hidden_layers=8)
    else:
        checkpoints.make(kind, folder / "checkpoint")
        project = projects.Project(folder, kind)
    project.models.clear()
    if kind == EVALUATED:  # not on Python's own help, which its next version changes
        (folder / "held-out.txt").write_text(TEXT, encoding="utf-8")
        project.quality = {"evaluate_text": "held-out.txt", "samples": 2, "sequence_length": 16}
    for name, keys in TARGETS[kind].items():
        project.configure(name, source="checkpoint", **keys, **CPU)
    return project


def _digest(record: object) -> str:
    data = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _portable(manifest: dict) -> tuple[str, str]:
    """The digests of a manifest's action and of what that made, the same on every machine."""
    action = manifest["action"]
    params = action["params"]
    if isinstance(params, dict):
        action["params"] = {k: "" if k in COMPUTER else v for k, v in params.items()}
    if action["stage"] in RUNS:
        for key, record in action["inputs"].items():
            record[-1] = "" if key.startswith(tuple(f"{stage}:" for stage in RUNS)) else record[-1]
        return _digest(action), _digest([tensor[:-1] for tensor in manifest["tensors"]])
    if "files" in params:  # of pack: index and tokenizer, as the installed libraries write them
        action["params"]["files"] = sorted(params["files"])
        weights = [tensor for tensor in manifest["tensors"] if tensor[0] in params["weights"]]
        return _digest(action), _digest(weights)
    return _digest(action), _digest(manifest["tensors"])


def actions(folder: Path, kind: str) -> dict[str, list[str]]:
    """Build a project, and return the digests of each action and its result."""
    project = _project(folder, kind)
    project.doit()
    measured = [f"measure:{name}" for name, keys in TARGETS[kind].items() if "quantize" in keys]
    project.doit(*measured, *(["evaluate"] if kind == EVALUATED else []))
    found = {}
    for path in sorted((project.state / "manifests").rglob("*.json")):
        name = str(path.relative_to(project.state / "manifests").with_suffix(""))
        found[name] = list(_portable(json.loads(path.read_bytes())))
    return found


def test_the_key_of_an_action_is_that_of_earlier_versions() -> None:
    params = {"dtypes": {"norm.weight": "float16"}}
    inputs = {"norm.weight": ["bfloat16", [8], "0" * 32]}
    assert Action("cast", 1, params, inputs).key == "910c47d273f40b026a8f1e36febd930f"


@pytest.mark.parametrize("kind", TARGETS)
def test_actions_and_results_are_those_of_earlier_versions(kind: str, tmp_path: Path) -> None:
    assert actions(tmp_path, kind) == json.loads(GOLDEN.read_text())[kind]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        told = {kind: actions(Path(name) / kind, kind) for kind in TARGETS}
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = json.dumps(told, indent=1).replace('[\n   "', '["').replace('",\n   "', '", "')
    GOLDEN.write_text(lines.replace('"\n  ]', '"]') + "\n")  # an action a line
    print(f"{sum(map(len, told.values()))} actions", file=sys.stderr)
