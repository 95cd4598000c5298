"""runner: does with action.yml and a workflow's job what GitHub's runner does, as far as they ask.

Shell steps are run by bash as they stand, with the environment that GitHub sets. Of the actions
that they use, actions/cache is played by a folder; the others have nothing to do here.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support import front_door

ACTION = front_door.REPOSITORY / "action.yml"
WORKFLOWS = sorted((front_door.REPOSITORY / ".github" / "workflows").glob("*.yml"))


@dataclass
class Job:
    """A job that begins on a runner with nothing but a workspace.

    Attributes:
        workspace: what is checked out.
        temporary: the runner's own folder.
        caches: what actions/cache has saved, a folder a key; outlives the job.
        github: the context of that name; `run` numbers the workflow's runs.
        env: what bash gets besides, GitHub's own variables apart.
        path: folders that steps have put on the path, the last one first; of a job that begins
            with some, mlx-make is installed in them.
        said: what the steps printed.
        failed: whether a step has failed.
    """

    workspace: Path
    temporary: Path
    caches: Path
    github: dict[str, Any] = field(default_factory=lambda: {"repository": "us/models"})
    env: dict[str, str] = field(default_factory=dict)
    run: int = 1
    path: list[str] = field(default_factory=list)
    said: str = ""
    failed: bool = False

    @property
    def summary(self) -> str:
        return (self.temporary / "summary.md").read_text(encoding="utf-8")

    def action(self, **inputs: str) -> None:
        """Run action.yml."""
        action = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
        defaults = {name: given.get("default") for name, given in action["inputs"].items()}
        assert not inputs.keys() - defaults.keys()
        self.steps(action["runs"]["steps"], {**defaults, **inputs})

    def steps(self, steps: list[dict[str, Any]], inputs: dict[str, Any] | None = None) -> None:
        """Run steps in order, those whose `if` says so."""
        outputs: dict[str, Any] = {}
        context = {"inputs": inputs or {}, "steps": outputs, "github": self.github}
        installed = bool(self.path)
        for step in steps:
            if installed and step.get("name") == "Install mlx-make":  # seconds, each time the same
                continue
            condition = step.get("if", "success()")
            if "always()" not in condition:
                condition = f"success() and ({condition})"
            if not evaluate(condition, context, failed=self.failed):
                continue
            outputs_of_step = outputs.setdefault(step.get("id"), {"outputs": {}})["outputs"]
            if "run" in step:
                env = {key: fill(value, context) for key, value in step.get("env", {}).items()}
                self.failed |= not self.bash(step["run"], env, outputs_of_step)
            elif "actions/cache/" in step["uses"]:
                arguments = {key: fill(value, context) for key, value in step["with"].items()}
                (self.save if "/save@" in step["uses"] else self.restore)(**as_arguments(arguments))

    def bash(self, script: str, env: dict[str, str], outputs: dict[str, str]) -> bool:
        """Run a step's script as it stands; tell whether it went well."""
        assert "${{" not in script, "an input in a script is a script of whoever gives it"
        self.temporary.mkdir(exist_ok=True)
        files = {name: self.temporary / name for name in ("summary.md", "path", "output")}
        for file in files.values():
            file.touch()
        files["output"].write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script],
            cwd=self.workspace,
            env={**self.variables(files), **self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said += done.stdout
        outputs |= dict(line.split("=", 1) for line in files["output"].read_text().splitlines())
        self.path = [*reversed(files["path"].read_text().splitlines())] or self.path
        return done.returncode == 0

    def variables(self, files: dict[str, Path]) -> dict[str, str]:
        # What the action installs finds its dependencies among this environment's, offline.
        dependencies = dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))
        return {
            "HOME": os.environ["HOME"],
            "PATH": os.pathsep.join([*self.path, str(Path(sys.executable).parent), os.defpath]),
            "PYTHONPATH": os.pathsep.join(dependencies),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # which switches it off
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "GITHUB_ACTION_PATH": str(ACTION.parent),
            "GITHUB_OUTPUT": str(files["output"]),
            "GITHUB_PATH": str(files["path"]),
            "GITHUB_STEP_SUMMARY": str(files["summary.md"]),
            "GITHUB_RUN_ID": str(self.run),
            "GITHUB_RUN_ATTEMPT": "1",
            "RUNNER_TEMP": str(self.temporary),
            "RUNNER_OS": "Linux",
            "RUNNER_ARCH": "X64",
        }

    def save(self, path: str, key: str) -> None:
        cache = self.caches / key
        assert not cache.exists(), f"{key} is saved already, and never changes"
        for place in map(Path, path.split()):
            copy = shutil.copytree if (self.workspace / place).is_dir() else shutil.copy2
            (cache / place).parent.mkdir(parents=True, exist_ok=True)
            copy(self.workspace / place, cache / place)

    def restore(self, path: str, key: str, restore_keys: str) -> None:
        saved = sorted(self.caches.glob("*"), key=lambda cache: cache.stat().st_mtime_ns)
        for wanted in (key, *restore_keys.split()):
            if fitting := [cache for cache in saved if cache.name.startswith(wanted)]:
                shutil.copytree(fitting[-1], self.workspace, dirs_exist_ok=True)
                return


def as_arguments(inputs: dict[str, str]) -> dict[str, str]:
    return {key.replace("-", "_"): value for key, value in inputs.items()}


def fill(text: str, context: dict[str, Any]) -> str:
    """Replace the expressions in a text."""

    def value(match: re.Match[str]) -> str:
        result = evaluate(match[1], context)
        return (
            str(result).lower()
            if isinstance(result, bool)
            else str("" if result is None else result)
        )

    return re.sub(r"\$\{\{(.*?)\}\}", value, text)


def evaluate(expression: str, context: dict[str, Any], *, failed: bool = False) -> Any:
    """Evaluate an expression of those that action.yml has."""

    def look_up(match: re.Match[str]) -> str:
        value: Any = context
        for name in match[0].split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return repr(value)

    python = re.sub(r"\b(?:inputs|steps|github)(?:\.[\w-]+)+", look_up, expression)
    for word, meaning in {
        "success()": repr(not failed), "always()": "True", "null": "None", "&&": "and", "||": "or",
    }.items():  # fmt: skip
        python = python.replace(word, meaning)
    return eval(python.strip())
