"""tests of mlx_make/: the wheel, installed with no way to the checkout, in a user's own folder."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from support import checkpoints, front_door, projects
from support.projects import Project

# What a user's repository may well hold; mlx-make must not take it for its own.
TRAP = 'raise AssertionError("a file of the user\'s was imported")\n'
TRAPS = ("dodo.py", "tasks/__init__.py", "cache/__init__.py", "graph.py")
CONFIGURATION = """
[tool.doit]
default_tasks = ["nothing"]
num_process = 0
[tool.doit.plugins.command]
run = "nowhere:Run"
"""


class Environment:
    """A virtual environment with the wheel, and with what this one has except the checkout."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.packages = Path(self.run_python("import sysconfig as s; print(s.get_path('purelib'))"))
        # A .pth file in a folder that a .pth file names is not read: so an editable install of the
        # checkout stays out.
        paths = dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))
        (self.packages / "dependencies.pth").write_text("\n".join(paths), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", wheel], env=outside(), check=True)

    def run_python(self, code: str) -> str:
        call = [self.python, "-c", code]
        return subprocess.check_output(call, env=outside(), text=True, cwd="/").strip()

    def mlx_make(self, folder: Path, *args: str, expect: int = 0) -> str:
        """Run the command in a folder; all that it says."""
        done = subprocess.run(
            [self.python.with_name("mlx-make"), *args],
            cwd=folder,
            env=outside(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == expect, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout


def outside() -> dict[str, str]:
    """This environment, without a way to the checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(build, cwd=front_door.REPOSITORY, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "venv", wheel)


def test_site_packages_get_one_name(wheel: Path, installed: Environment) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"mlx_make", f"mlx_make-{version}.dist-info"}
    assert {name.split("/")[2] for name in names if name.startswith("mlx_make/src/")} == {
        "cache", "docs", "dodo.py", "pyproject.toml", "tasks",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name]
    for module in ("dodo", "tasks", "cache"):
        with pytest.raises(subprocess.CalledProcessError):
            installed.run_python(f"import {module}")


def test_editable_install_copies_nothing(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
    call = [sys.executable, "-c", code, tmp_path]
    subprocess.run(call, cwd=front_door.REPOSITORY, check=True, capture_output=True)
    (built,) = tmp_path.iterdir()
    held = zipfile.ZipFile(built)
    (path,) = (name for name in held.namelist() if ".dist-info/" not in name)
    assert path.endswith(".pth")
    assert held.read(path).decode().split() == [str(front_door.REPOSITORY)]


def test_builds_in_a_folder_of_ones_own(installed: Environment, tmp_path: Path) -> None:
    project = Project(tmp_path / "mine", "huggingface")
    checkpoints.make("llama", project.checkpoint)
    project.configure(**projects.FOUR_BIT)
    for trap in TRAPS:
        path = project.folder / trap
        path.parent.mkdir(exist_ok=True)
        path.write_text(TRAP, encoding="utf-8")
    (project.folder / "pyproject.toml").write_text(CONFIGURATION, encoding="utf-8")
    before = files(installed.packages)

    assert "build/model: " in installed.mlx_make(project.folder)
    assert project.built() == project.anew()
    weights = mx.load(str(project.folder / "build" / "model" / "model.safetensors"))
    assert weights["model.layers.0.mlp.down_proj.scales"].dtype == mx.float16

    project.configure(quantize={"bits": 8})
    installed.mlx_make(project.folder, "pack:model")
    assert front_door.computed(project.folder) == project.quantizing()
    assert project.built() == project.anew()
    assert installed.mlx_make(tmp_path, f"models={project.folder / 'models.toml'}") == (
        "nothing to do: 1 target is up to date\n"
    )
    assert files(installed.packages) == before
    assert [*tmp_path.iterdir()] == [project.folder]

    listed = {line.split()[0] for line in installed.mlx_make(project.folder, "list").splitlines()}
    assert listed == {
        "report",
        "evaluate",
        "activations",
        "sensitivity",
        "lock",
        *(f"{s}:model" for s in [*projects.STAGES, "pack", "measure", "report"]),
    }

    installed.mlx_make(project.folder, "report:model")
    assert (project.folder / "reports" / "model.html").exists()


@pytest.mark.parametrize("args", [(), ("list",), ("clean",), ("pack:model",)])
def test_no_models_toml(installed: Environment, tmp_path: Path, args: tuple[str, ...]) -> None:
    said = installed.mlx_make(tmp_path, *args, expect=3)
    assert said.startswith(f"ERROR: {tmp_path / 'models.toml'} does not exist")
    assert "mlx-make models=PATH" in said
    assert "doit" not in said
    assert not [*tmp_path.iterdir()]


def test_version_and_help(installed: Environment, tmp_path: Path) -> None:
    project = tomllib.loads((front_door.REPOSITORY / "pyproject.toml").read_text("utf-8"))
    first, second = installed.mlx_make(tmp_path, "--version").splitlines()
    assert first == f"mlx-make {project['project']['version']}"
    assert mx.__version__ in second
    told = installed.mlx_make(tmp_path, "help")
    assert installed.mlx_make(tmp_path, "--help") == told
    for command in project["tool"]["doit"]["plugins"]["command"]:
        assert f"\n  mlx-make {command} " in told
    assert "doit" not in told.replace("pydoit", "")
    docs = Path(told.rpartition("documentation: ")[2].strip())
    assert docs.is_relative_to(installed.packages)
    assert {"README.md", "models.schema.json", "security.md"} <= {p.name for p in docs.iterdir()}
    assert "mlx-make run [TASK/TARGET...]" in installed.mlx_make(tmp_path, "help", "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["run", "list", "clean"])
def test_doit_on_a_dodo_file_elsewhere(tmp_path: Path, command: str) -> None:
    dodo = str(front_door.REPOSITORY / "dodo.py")
    call = [sys.executable, "-m", "doit", command, "-f", dodo]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("ERROR: doit is without mlx-make's plugins")
    assert not done.stdout
    assert not [*tmp_path.iterdir()]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
