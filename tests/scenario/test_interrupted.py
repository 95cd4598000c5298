"""Builds that are cut off, that meet another build, or that find no room on the disk.

Whatever happens to a build: the last complete `build/TARGET/` stays whole, what is done stays done,
and the next build goes on and ends as if nothing had happened.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.errors import NoRoom
from cache.files import atomic
from support import checkpoints
from support.front_door import REPOSITORY, doit, log
from support.projects import FOUR_BIT, SOURCES, Project, contents, create, outcomes
from support.running import DEADLINE_SECONDS, start, temporary, wait_for

# Everything from cast on is another's than FOUR_BIT's, and so is the layout of build/model.
CHANGED = {"dtype": "bfloat16", "quantize": {"bits": 8}, "max_shard_size": "300kB"}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}


def computed(entries: list[dict]) -> set[str]:
    return {entry["task"] for entry in entries if entry["outcome"] == "computed"}


def finish(project: Project, before: set[str]) -> None:
    """Build to the end after a run that was cut off: nothing that was done is done again."""
    done = project.doit()
    assert not computed(done.entries) & before
    assert project.built() == project.anew()
    assert temporary(project.folder / "build") == []


# Killed.


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many times a file is opened, renamed, made, removed in the builds killed below."""
    found = {}
    for source in SOURCES:
        project = create(tmp_path_factory.mktemp(source), source, **FOUR_BIT)
        project.doit()
        project.configure(**CHANGED)
        record = project.folder / "record.json"
        project.doit(hook={"under": str(project.folder), "record": str(record)})
        found[source] = json.loads(record.read_bytes())["events"]
    return found


@pytest.mark.parametrize(
    ("source", "name", "part"),
    [
        ("meta", "SIGKILL", 0.02),
        ("huggingface", "SIGINT", 0.1),
        ("huggingface", "SIGKILL", 0.25),
        ("meta", "SIGTERM", 0.4),
        ("meta", "SIGKILL", 0.55),
        ("huggingface", "SIGTERM", 0.7),
        ("meta", "SIGINT", 0.8),
        # From about here on, pack writes.
        ("huggingface", "SIGKILL", 0.87),
        ("meta", "SIGKILL", 0.94),
        ("huggingface", "SIGINT", 0.97),
        ("meta", "SIGKILL", 0.985),
    ],
)
def test_a_rebuild_killed_at_a_file(
    source: str, name: str, part: float, events: dict[str, int], tmp_path: Path
) -> None:
    number = signal.Signals[name]
    project = create(tmp_path, source, **FOUR_BIT)
    project.doit()
    before, entries = project.built(), len(log(project.folder))
    project.configure(**CHANGED)

    at = int(part * events[source])
    process = start(project, hook={"under": str(project.folder), "kill": [at, number]})
    output = "".join(process.communicate(timeout=DEADLINE_SECONDS))
    assert process.returncode == STATUS[number], output
    assert "Traceback" not in output
    assert ("interrupted: " in output) == (number != signal.SIGKILL)
    done = computed(log(project.folder)[entries:])
    if "pack:model" in done:
        assert project.built() == project.anew()
    else:
        assert project.built() in (before, project.anew())
    finish(project, done)


@pytest.mark.parametrize(("name", "lines"), [("SIGINT", 2), ("SIGKILL", 8)])
def test_a_rebuild_killed_after_lines_of_the_log(name: str, lines: int, tmp_path: Path) -> None:
    """From outside, as a person or a machine that shuts down does it."""
    number = signal.Signals[name]
    project = create(tmp_path, "meta", **FOUR_BIT)
    project.doit()
    before, entries = project.built(), len(log(project.folder))
    project.configure(**CHANGED)
    process = start(project)
    wait_for(lambda: len(log(project.folder)) >= entries + lines, process)
    process.send_signal(number)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode in (STATUS[number], 0)  # 0: it was too late
    assert project.built() in (before, project.anew())
    finish(project, computed(log(project.folder)[entries:]))


@pytest.mark.parametrize("source", SOURCES)
def test_a_first_build_killed_again_and_again(source: str, tmp_path: Path) -> None:
    project = create(tmp_path, source, **FOUR_BIT)
    signals = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
    for kills in range(20):
        number = signals[kills % len(signals)]
        hook = {"under": str(project.folder), "kill": [90 + 90 * kills, number]}
        process = start(project, hook=hook)
        output = "".join(process.communicate(timeout=DEADLINE_SECONDS))
        if process.returncode == 0:
            break
        assert process.returncode == STATUS[number], output
        if (project.folder / "build" / "model").exists():
            assert project.built() == project.anew()
    assert kills >= 3
    finish(project, computed(log(project.folder)))
    assert project.doit().entries == []


def test_a_torn_line_of_the_log_does_no_harm(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    path = project.state / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    lines = len(log(project.folder))
    project.configure(quantize={"bits": 8})
    process = start(project)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    whole = [line for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    assert len(whole) == lines + len(project.quantizing())


def test_what_a_kill_leaves_behind_is_cleared(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    left = project.folder / "build" / ".tmp-model"
    left.mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"of a build that was cut off")
    project.doit()
    assert temporary(project.folder / "build") == []
    assert project.built() == project.anew()


# Two at once.


@dataclass
class Two:
    """Two builds of one project: the first is held, the second waits for it."""

    project: Project
    first: subprocess.Popen
    second: subprocess.Popen

    @classmethod
    def of(cls, project: Project) -> "Two":
        mark, go = project.folder / "mark", project.folder / "go"
        hook = {"hold": [f"{os.sep}actions{os.sep}", str(mark), str(go)]}
        first = start(project, hook=hook)
        wait_for(mark.exists, first)
        second = start(project)
        said = second.stderr.readline()
        assert "waiting" in said
        assert str(first.pid) in said
        return cls(project, first, second)

    def let_go(self) -> None:
        (self.project.folder / "go").touch()


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two.of(create(tmp_path, "huggingface", **FOUR_BIT))


def test_a_second_doit_waits_for_the_first(two: Two) -> None:
    project, first, second = two.project, two.first, two.second
    time.sleep(0.2)
    assert second.poll() is None
    two.let_go()
    assert first.communicate(timeout=DEADLINE_SECONDS)[1] == ""
    output, _ = second.communicate(timeout=DEADLINE_SECONDS)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "nothing to do" in output
    assert project.built() == project.anew()
    assert project.doit().entries == []


def test_one_that_waits_can_be_stopped(two: Two) -> None:
    project, first, second = two.project, two.first, two.second
    second.send_signal(signal.SIGINT)
    assert "Traceback" not in second.communicate(timeout=DEADLINE_SECONDS)[1]
    assert second.returncode == 130
    two.let_go()
    first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == 0
    assert project.built() == project.anew()


def test_a_background_job(tmp_path: Path) -> None:
    """It was started with SIGINT ignored, and so goes on; SIGTERM ends it, in whatever it is."""
    project = create(tmp_path, "meta", **FOUR_BIT)
    go, mark = tmp_path / "go", tmp_path / "mark"
    held = {"hold": [f"{os.sep}actions{os.sep}", str(mark), str(go)]}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(project, hook=held)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(mark.exists, process)
    process.send_signal(signal.SIGINT)
    second = start(project)
    assert second.stderr.readline().startswith("waiting for doit")
    assert process.poll() is None
    process.terminate()
    output = "".join(process.communicate(timeout=DEADLINE_SECONDS))
    assert process.returncode == STATUS[signal.SIGTERM], output
    assert "interrupted: " in output
    second.communicate(timeout=DEADLINE_SECONDS)
    assert second.returncode == 0
    assert project.built() == project.anew()


def test_one_that_is_killed_holds_nobody_up(two: Two) -> None:
    project, first, second = two.project, two.first, two.second
    first.kill()
    first.communicate(timeout=DEADLINE_SECONDS)
    second.communicate(timeout=DEADLINE_SECONDS)
    assert second.returncode == 0
    assert project.built() == project.anew()


def test_two_states_share_one_cache_at_once(tmp_path: Path) -> None:
    projects = [
        create(tmp_path / name, "meta", cache=tmp_path / "cache", **FOUR_BIT)
        for name in ("one", "two")
    ]
    processes = [start(project) for project in projects]
    for process in processes:
        output = "".join(process.communicate(timeout=DEADLINE_SECONDS))
        assert process.returncode == 0, output
    for project in projects:
        assert project.built() == project.anew()
    assert temporary(tmp_path) == []


# No room.


def test_no_room_for_a_build(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(**CHANGED)
    done = project.doit(expect=1, hook={"free": 123_456})  # enough for each blob
    messages = [line for line in done.stdout.splitlines() if "ERROR" in line]
    ((need, free),) = {tuple(told(message)) for message in messages}
    assert free == 123_456
    assert outcomes(done)["failed"] <= project.quantizing()  # before any is computed
    assert not outcomes(done)["computed"] & project.quantizing()
    assert "Traceback" not in done.stdout + done.stderr
    assert project.built() == before
    assert temporary(project.folder / "build") == []
    finish(project, computed(done.entries))
    # It was near the truth: within what the headers of files take.
    size = sum(path.stat().st_size for path in (project.folder / "build" / "model").iterdir())
    assert abs(need - size) < 0.1 * size


def told(message: str) -> list[int]:
    """What a message says is needed and is free, in bytes."""
    found = re.search(r"([\d,]+) bytes are needed, ([\d,]+) are free", message)
    assert found, message
    return [int(number.replace(",", "")) for number in found.groups()]


@pytest.mark.parametrize(("event", "part"), [("open", 0.3), ("os.rename", 0.6), ("os.mkdir", 0.9)])
def test_a_disk_that_fills_up(
    event: str, part: float, events: dict[str, int], tmp_path: Path
) -> None:
    """The system refuses: from some point on, each new file, rename or folder."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before, entries = project.built(), len(log(project.folder))
    project.configure(**CHANGED)
    at = int(part * events["huggingface"])
    done = start(project, hook={"under": str(project.folder), "full": [at, event]})
    output = "".join(done.communicate(timeout=DEADLINE_SECONDS))
    assert done.returncode, output
    assert "ERROR" in output
    assert "No space left on device" in output or "disk is full" in output
    assert "Traceback" not in output, output
    assert project.built() in (before, project.anew())
    finish(project, computed(log(project.folder)[entries:]))


def test_a_disk_that_says_so_when_a_file_is_closed(tmp_path: Path) -> None:
    """As network file systems do."""

    def close() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with atomic.temporary(tmp_path) as new:
            new.file.close()
            new.file = SimpleNamespace(close=close)

    with pytest.raises(NoRoom, match="the disk is full"):
        write()
    assert [*tmp_path.iterdir()] == []


def can_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this system lets nobody mount a small tmpfs")
@pytest.mark.parametrize("spare_kib", [80, 1250])
def test_a_small_disk(spare_kib: int, tmp_path: Path) -> None:
    """A real one: built at 4 bits there is little left on it; 8 bits do not fit."""
    # The same path for all: a folder into which the small disk is mounted, for one process.
    place = tmp_path / "place"
    place.mkdir()
    project = create(tmp_path / "project", "huggingface", **FOUR_BIT)
    checkpoints.make("llama", project.checkpoint, num_hidden_layers=8)
    project.doit()
    before = project.built()
    project.configure(**CHANGED)
    paths = [path for path in project.folder.rglob("*") if path.is_file()]
    stats = {stat.st_ino: stat for stat in map(Path.stat, paths)}  # a file once
    used = sum(-(-stat.st_size // 4096) * 4 for stat in stats.values())
    script = (
        "set -eu; mount -t tmpfs -o size=$2k none $1; cp -a $3/. $1; shift 3; "
        'status=0; "$@" || status=$?; cp -a $0/. $OUT; exit $status'
    )
    command = [
        *("unshare", "--mount", "--map-root-user", "sh", "-c", script, str(place)),
        *(str(place), str(used + spare_kib), str(project.folder)),
        *(sys.executable, "-m", "doit", f"models={place / 'models.toml'}"),
    ]
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert "Traceback" not in output, output
    messages = [line for line in done.stdout.splitlines() if "ERROR" in line]
    assert messages
    for message in messages:
        need, free = told(message)
        assert need > free
    assert contents(out / "build" / "model") == before
    assert temporary(out) == []
    # Room was made.
    shutil.copytree(out, place, dirs_exist_ok=True)
    assert doit(place).returncode == 0
    assert contents(place / "build" / "model") == project.anew()
    assert outcomes(doit(place)) == {}


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("lines", [1, 4])
def test_a_setting_taken_back_after_a_killed_build(
    tmp_path: Path, kill: signal.Signals, lines: int
) -> None:
    """The killed build's manifests are newer than doit's database, which knows the first's."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(**{**FOUR_BIT, "quantize": {"bits": 8}})
    had = len(log(project.folder))
    process = start(project)
    wait_for(lambda: len(log(project.folder)) >= had + lines, process)
    process.send_signal(kill)
    process.communicate()
    project.configure(**FOUR_BIT)
    project.doit()
    assert project.built() == before == project.anew()
