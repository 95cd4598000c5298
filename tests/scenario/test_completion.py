"""`mlx-make completion`: what shells themselves make of its scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import inside, projects
from support.front_door import REPOSITORY

BASH = """
eval "$(mlx-make completion bash)"
COMP_LINE="mlx-make $1"
COMP_POINT=${#COMP_LINE}
_mlx_make
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = """
mlx-make completion fish | source
complete -C "mlx-make $argv[1]"
"""
TYPED = [
    ("pla", ["plan"]),
    ("mod", ["model", "model-2"]),
    ("run oth", ["other"]),
    ("nothing-like-it", []),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a models.toml, and bin/mlx-make."""
    project = projects.create(tmp_path_factory.mktemp("completion") / "p", "meta")
    for target in ("model-2", "other"):
        project.configure(target)
    command = project.folder / "bin" / "mlx-make"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlx_make "$@"\n')
    command.chmod(0o755)
    return project.folder


def shell(folder: Path, *call: str) -> list[str]:
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    done = subprocess.run(
        call,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(("typed", "names"), [*TYPED, ("pack:o", ["other"])])
def test_bash(folder: Path, typed: str, names: list[str]) -> None:
    """It replaces what stands behind the last colon."""
    assert shell(folder, "bash", "-c", BASH, "bash", typed) == names


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(("typed", "names"), [*TYPED, ("pack:o", ["pack:other"])])
def test_fish(folder: Path, typed: str, names: list[str]) -> None:
    assert shell(folder, "fish", "--no-config", "-c", FISH, typed) == names


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_reads_it(folder: Path) -> None:
    script = 'eval "$(mlx-make completion zsh)"; whence -w _mlx_make'
    load = "autoload -U compinit; compinit -u -D; " + script
    assert shell(folder, "zsh", "-f", "-c", load) == ["_mlx_make:", "function"]


def test_without_a_models_toml(tmp_path: Path) -> None:
    """There are commands, at least: the shell is not the place for mistakes."""
    for text in (None, "[models", "[models.one]\n"):
        if text is not None:
            (tmp_path / "models.toml").write_text(text)
        words = inside.doit(tmp_path, "completion", "words").stdout.split()
        assert {"init", "plan"} <= {*words}
        assert not [word for word in words if ":" in word]


def test_no_such_shell(tmp_path: Path) -> None:
    for args in ([], ["csh"], ["bash", "zsh"]):
        refused = inside.doit(tmp_path, "completion", *args, expect=3).stderr
        assert "completion needs one shell's name: bash, zsh, fish." in refused
