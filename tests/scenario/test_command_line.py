"""tests of tasks/cli/command.py: mistyped names, and readers that leave before all is said."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import front_door, inside, projects, running
from support.projects import Project
from tasks.core.program import COMMAND

UNREAD = 141  # as shells report SIGPIPE
MLX_MAKE = "import sys; from mlx_make.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = projects.create(tmp_path_factory.mktemp("line") / "p", "meta", **projects.FOUR_BIT)
    project.configure("other", **projects.FOUR_BIT)
    return project


def unread(project: Project, entry: tuple[str, ...], *args: str, unbuffered: bool) -> None:
    """Call doit with nobody there who reads what it prints."""
    call = [sys.executable, *entry, *args, f"models={project.folder / 'models.toml'}"]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        done = subprocess.run(
            call,
            cwd=front_door.REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (UNREAD, "")


@pytest.mark.parametrize(
    "command",
    ["list --all", "plan", "why pack:model", "graph", "cache stats", "summary", "help run",
     "info pack:model"],
)  # fmt: skip
@pytest.mark.parametrize("unbuffered", [True, False])
def test_nobody_reads(project: Project, command: str, unbuffered: bool) -> None:
    unread(project, ("-m", "doit"), *command.split(), unbuffered=unbuffered)


@pytest.mark.parametrize("command", ["list", "help"])
def test_nobody_reads_mlx_make(project: Project, command: str) -> None:
    unread(project, ("-c", MLX_MAKE), command, unbuffered=False)


def test_interrupted_while_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "doit.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, "-P", "-c", MLX_MAKE],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{front_door.REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_nobody_reads_of_a_build(tmp_path: Path) -> None:
    """It ends, and the next goes on."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    unread(project, ("-m", "doit"), unbuffered=False)
    assert not (project.folder / "build" / "model").exists()
    front_door.doit(
        project.folder,
    )
    assert project.built() == project.anew()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("pack:modle", "there is no command or task 'pack:modle'. Did you mean 'pack:model'? "),
        ("lits", "there is no command or task 'lits'. Did you mean 'list'? "),
        ("lits --all", "there is no command or task 'lits'. Did you mean 'list'? "),
        ("list pakc", "there is no task 'pakc'. Did you mean 'pack'? "),
        ("plan quantise:model", "'quantise:model'. Did you mean 'quantize:model'? "),
        ("why extract:othr", "'extract:othr'. Did you mean 'extract:other'? "),
        ("why cast:model:layer.1", "Did you mean 'cast:model:layers.1' or "),
        ("forget pakc:model", "Did you mean 'pack:model'"),
        ("clean nothing-like-it", "there is no task 'nothing-like-it'. doit list shows them"),
        ("info pakc", "Did you mean 'pack'"),
        ("pak:*", "there is no command or task 'pak:*'. Did you mean "),
        ("plan pak:*", "there is no task 'pak:*'. Did you mean "),
        ("graph nothing-like-it", "no target 'nothing-like-it'. There are model, other."),
        ("graph model --formt dot", "option --formt not recognized. doit help graph shows all."),
        ("graph model --format", "option --format requires argument. doit help graph shows all."),
        ("imatrix model -o", "option -o requires argument. doit help imatrix shows all."),
        ("pack:model --locked", "as in doit run --locked."),
        (
            "list pack:model --all",
            "--all stands behind pack:model: options go before names, as in doit list --all.",
        ),
        ("info pack:model -x", "as in doit info -x."),
        ("plan --jsn", "ERROR: option --jsn not recognized. doit help plan shows all."),
        ("cache gc --al=3", "option --all must not have an argument. doit help cache shows all."),
        ("-a list", "list is a command, which goes before its options: doit list."),
        ("build/modle", "there is no command or task 'build/modle'. Did you mean 'model'?"),
        ("o:her", "there is no command or task 'o:her'. Did you mean 'other'?"),
        ("-P process", "-P process: tasks run in threads"),
        ("modles=other.toml", "modles= says nothing. Only models=PATH does."),
    ],
)
def test_mistyped(project: Project, call: str, told: str) -> None:
    done = inside.doit(project.folder, *call.split(), expect=3)
    assert done.stderr.startswith("ERROR: ")
    assert told in done.stderr
    assert "\n" not in done.stderr.strip()
    assert not done.stdout


def test_how_a_target_is_named(tmp_path: Path) -> None:
    """As in models.toml, by its folder, or by how no other's name begins; a task goes first."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    for target in ("other", "other-2", "castle"):
        project.configure(target, **projects.FOUR_BIT)
    folder = project.folder

    def built(*args: str) -> set[str]:
        inside.doit(folder, *args)
        return {path.name for path in (folder / "build").glob("*")}

    assert built("build/mod/") == {"model"}
    assert built("other") == {"model", "other"}
    assert built("cast") == {"model", "other"}
    assert built("build/cast/") == {"model", "other", "castle"}
    assert built(str(folder / "build" / "other-2")) == {"model", "other", "castle", "other-2"}
    assert inside.doit(folder, "plan", "model").stdout == "up to date: model\n"
    assert inside.doit(folder, "list", "build/model").stdout.startswith("pack:model ")
    inside.doit(folder, "forget", "model")
    assert "doit's database has no record of it" in inside.doit(folder, "why", "model").stdout
    assert inside.doit(folder, "other").entries == []

    refused = inside.doit(folder, "oth", expect=3).stderr
    assert "no command or task 'oth'. Did you mean 'other' or 'other-2'? " in refused


OTHER = """\
def told(word):
    print(f"told {word}")


def task_tell():
    params = [{"name": "word", "long": "word", "default": "nothing"}]
    return {"actions": [told], "params": params, "targets": ["it"], "verbosity": 2}


def task_all():
    return {"actions": None, "task_dep": ["tell", "nothing-like-it*"]}


DOIT_CONFIG = {"dep_file": "db"}
"""


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("-f {}", "nothing"),
        ("-f {} it", "nothing"),
        ("-f {} tell --word=this", "this"),
        ("run -f {} tell --word that", "that"),
    ],
)
def test_another_dodo_is_doits_own(project: Project, call: str, told: str) -> None:
    """Options of its tasks stand behind their names, and its patterns may match nothing."""
    dodo = project.folder / "other" / "dodo.py"
    dodo.parent.mkdir(exist_ok=True)
    dodo.write_text(OTHER)
    assert f"told {told}\n" in front_door.doit(project.folder, *call.format(dodo).split()).stdout


def test_empty_argument(project: Project) -> None:
    call = [sys.executable, "-c", MLX_MAKE, "pack:model", ""]
    done = subprocess.run(call, cwd=project.folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "ERROR: an argument is empty. Is a variable of the shell not set?\n"


def test_nowhere_to_print(tmp_path: Path) -> None:
    """A full disk is an error; streams that are closed are none, and no file takes their place."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    for command in ("", "list", "plan", "graph", "cache stats", "help"):
        call = f"{sys.executable} -m doit {command} models={project.folder / 'models.toml'}"
        closed = shell(f"{call} >&-")
        assert (closed.returncode, closed.stdout, closed.stderr) == (0, "", ""), command
        full = shell(f"{call} > /dev/full")
        assert full.returncode == UNREAD, command
        assert full.stderr.startswith("ERROR: what is to be printed cannot be: ")
        assert full.stderr.count("\n") == 1
    assert shell(f"{call} <&- >&- 2>&-").returncode == 0
    assert project.built() == project.anew()


def test_locale_without_arrows(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    front_door.doit(
        project.folder,
    )
    project.configure(quantize={"bits": 8})
    for command, status in (("plan", 1), ("plan --json", 1), ("graph", 0), ("cache stats", 0)):
        call = f"{sys.executable} -m doit {command} models={project.folder / 'models.toml'}"
        done = shell(f"PYTHONIOENCODING=ascii {call}")
        assert (done.returncode, done.stderr) == (status, ""), command
        told = json.loads(done.stdout) if "--json" in command else done.stdout
        if command == "plan":
            assert "quantize.bits 4 ? 8" in told
        if "--json" in command:
            facts = {why["fact"] for task in told["tasks"] for why in task["why"]}
            assert "quantize.bits 4 → 8" in facts


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, shell=True, cwd=front_door.REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_info(project: Project) -> None:
    told = front_door.doit(project.folder, "info", "quantize:model:layers.0", expect=1).stdout
    assert str(project.manifest("quantize", "layers.0")) in told
    assert len(told) < 2000, "not the whole graph"


def test_state_that_is_a_link(tmp_path: Path) -> None:
    """What it names is another's, and stays as it is."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    other = tmp_path / "other"
    other.write_text("not ours")
    (project.state / "lock").symlink_to(other)
    refused = inside.doit(project.folder, expect=3).stderr
    assert refused.startswith(f"ERROR: {project.state / 'lock'} is a link")
    assert other.read_text() == "not ours"


def test_git_leaves_the_state_alone(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    subprocess.run(["git", "init", "--quiet", project.folder], check=True)
    inside.doit(project.folder, "list")  # which makes a part of it
    inside.doit(project.folder)
    call = ["git", "-C", project.folder, "status", "--porcelain", "--untracked-files=all"]
    changed = subprocess.run(call, check=True, capture_output=True, text=True).stdout
    assert "models.toml" in changed
    assert ".mlx-make" not in changed


def test_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: a build goes on, and says what is not guarded."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    done = inside.doit(project.folder)
    assert "lock cannot be locked (No locks available): do not run two builds" in done.stderr
    assert project.built() == project.anew()


@pytest.mark.parametrize("command", ["clean", "forget", "ignore", "reset-dep"])
def test_not_beside_a_build(project: Project, command: str) -> None:
    """Each writes doit's database, as a build does when it ends."""
    project.state.mkdir(exist_ok=True)
    with (project.state / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = running.start(project, command, "lint")
        assert process.stderr is not None
        assert process.stderr.readline().startswith("waiting for doit, process ")
    _, said = process.communicate(timeout=running.DEADLINE_SECONDS)
    assert (process.returncode, said) == (0, "")


def test_a_worker_without_dask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.cli.commands.worker.find_spec", lambda _: None)
    status, _, said = inside.run(tmp_path, "worker", "tcp://127.0.0.1:8786")
    assert status == 3
    assert said == f"ERROR: {COMMAND} worker needs Dask: pip install 'mlx-make[dask]'\n"


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("distributed") is None, reason="wants the extra dask")
def test_a_worker_without_an_address(tmp_path: Path) -> None:
    status, _, said = inside.run(tmp_path, "worker", "--nthreads", "2")
    assert status == 3
    assert said.startswith(f"ERROR: {COMMAND} worker needs the scheduler's address: ")
