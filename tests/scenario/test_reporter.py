"""What doit says: live lines on a terminal, as a terminal shows them, and plain ones in a pipe."""

import errno
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from pathlib import Path

import pyte
import pytest

from support.front_door import log
from support.projects import FOUR_BIT, Project, create
from support.running import DEADLINE_SECONDS, start
from tasks.execution import pack

ROWS = 100  # enough for nothing to scroll away
TOOK = r"in \d+\.\d s"
SIZE = r"[\d.]+ [kM]B"


class Terminal:
    """doit on a terminal, and what one sees there."""

    def __init__(
        self, project: Project, *args: str, columns: int, hook: dict, rows: int = ROWS, **env: str
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.written = ""
        self._stream = pyte.ByteStream(self.screen)
        self._end, other = pty.openpty()
        self.resize(columns)
        self.process = start(
            project,
            *args,
            hook=hook,
            env={"TERM": "xterm-256color", **env},
            stdin=other,
            stdout=other,
            stderr=other,
        )
        os.close(other)

    def resize(self, columns: int) -> None:
        rows = self.screen.lines
        self.screen.resize(rows, columns)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, pattern: str) -> str:
        """Wait until the screen shows a line that matches."""
        end = time.monotonic() + DEADLINE_SECONDS
        while True:
            for line in self.lines():
                if re.search(pattern, line):
                    return line
            assert time.monotonic() < end, self.lines()
            assert self._read(), self.lines()

    def finish(self) -> list[str]:
        """Wait for the end, and return the lines that the screen shows then."""
        while self._read():
            pass
        os.close(self._end)
        self.process.wait(DEADLINE_SECONDS)
        assert not self.screen.cursor.hidden
        return self.lines()

    def _read(self) -> bool:
        if not select.select([self._end], [], [], DEADLINE_SECONDS)[0]:
            return False
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # Linux's way to say that nobody writes there any more
            return False
        self.written += data.decode()
        self._stream.feed(data)
        return bool(data)


def two_targets(folder: Path) -> Project:
    project = create(folder, "huggingface", **FOUR_BIT)
    project.configure("other", source="checkpoint", dtype="float16", quantize={"bits": 8})
    return project


def held(folder: Path) -> dict:
    """A hook that holds the run in stage unshard, where extract has computed, until ``release``."""
    return {"hold": [f"{os.sep}unshard{os.sep}", str(folder / "mark"), str(folder / "go")]}


def release(folder: Path) -> None:
    (folder / "go").touch()


def matches(lines: list[str], patterns: list[str]) -> None:
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal(tmp_path: Path, colour: bool) -> None:
    project = two_targets(tmp_path)
    env = {} if colour else {"NO_COLOR": "1"}
    terminal = Terminal(project, columns=80, hook=held(tmp_path), **env)
    terminal.wait_for(r"  target  stage     layers +rate  left  computed")
    terminal.wait_for(r"^  all              +0/14 ")
    terminal.wait_for(r"^. model   (extract|unshard) +\d+/7 ")
    assert terminal.screen.cursor.hidden
    release(tmp_path)
    *table, first, second = terminal.finish()  # the last line does not fit
    matches(
        [*table, first + second],
        [
            r" +size  bits/weight  computed  reused   time",
            rf"build/model +{SIZE} +4\.\d+ +\d+ +\d+  \d+\.\d s",
            rf"build/other +{SIZE} +8\.\d+ +\d+ +\d+  \d+\.\d s",
            rf"2 targets built {TOOK}, peak memory {SIZE}, in {re.escape(str(tmp_path))}",
        ],
    )
    assert terminal.process.returncode == 0
    counts = [line.split()[4:6] for line in terminal.lines()[1:3]]
    for index, outcome in enumerate(["computed", "reused"]):
        logged = sum(entry["outcome"] == outcome for entry in log(tmp_path))
        assert sum(int(count[index]) for count in counts) == logged > 0
    assert bool(re.search(r"\x1b\[[\d;]*3\d", terminal.written)) == colour


def test_a_narrow_terminal_that_becomes_narrower(tmp_path: Path) -> None:
    project = two_targets(tmp_path)
    terminal = Terminal(project, columns=60, hook=held(tmp_path))
    terminal.wait_for(r"  target  stage .* computed$")
    terminal.resize(24)
    terminal.wait_for(r"^  target  layers  left$")
    release(tmp_path)
    said = " ".join(terminal.finish())
    assert "  target" not in said
    assert re.search(r"build/model: .*build/other: |build/other: .*build/model: ", said)


def test_more_targets_than_rows(tmp_path: Path) -> None:
    project = two_targets(tmp_path)
    for bits in (2, 3, 5, 6):
        project.configure(f"bits-{bits}", quantize={"bits": bits})
    terminal = Terminal(project, columns=40, rows=7, hook=held(tmp_path))
    terminal.wait_for("^  and 3 more$")
    assert len(terminal.lines()) == 6
    assert terminal.lines()[-1].startswith("  all ")
    assert re.match(r"^  target +stage +layers", terminal.lines()[0])
    assert re.search(r" extract|unshard|cast ", terminal.lines()[1])  # what is at work comes first
    release(tmp_path)
    assert "6 targets built " in "\n".join(terminal.finish())


def test_errors_come_last_and_warnings_tear_nothing(tmp_path: Path) -> None:
    project = two_targets(tmp_path)
    (tmp_path / ".mlx-make" / "log.jsonl").mkdir()  # of which each task warns, in its thread
    terminal = Terminal(project, "--continue", columns=500, hook=held(tmp_path))
    terminal.wait_for("^  target ")
    (tmp_path / "build" / "other").mkdir(parents=True)
    (tmp_path / "build" / "other" / "config.json").touch()
    release(tmp_path)
    *warnings, built, total, error = terminal.finish()
    assert set(warnings) == {
        f"warning: {tmp_path}/.mlx-make/log.jsonl is not written: Is a directory"
    }
    assert len(warnings) == len(project.tasks()) + len(project.tasks(target="other"))
    assert built.startswith("build/model: ")
    assert total.startswith("1 target built, 1 target failed in ")
    assert error == (
        f"ERROR: pack:other: {tmp_path}/build/other was not built here, as far as is on record: it "
        "holds config.json. Nothing there is replaced. Move it, or rename the target; or remove "
        "it, if it is an older build that is not wanted."
    )
    assert terminal.process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_terminal_as_it_was(tmp_path: Path, number: int) -> None:
    project = two_targets(tmp_path)
    terminal = Terminal(project, columns=80, hook=held(tmp_path))
    terminal.wait_for("^  target ")
    for _ in range(2):  # as people do
        terminal.process.send_signal(number)
    assert terminal.finish() == [
        "0 of 14 layers of 2 targets done",
        "interrupted: layers that are done are kept; run doit again to go on",
    ]
    assert terminal.process.returncode == 130


def test_in_a_pipe(tmp_path: Path) -> None:
    project = two_targets(tmp_path)
    record = tmp_path / "record.json"
    done = project.doit("-n", "1", hook={"record": str(record)})
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    stages = ("extract", "unshard", "cast", "quantize", "pack")
    said = [f"{target}: {stage}" for target in ("model", "other") for stage in stages]
    assert sorted(lines[:-1]) == sorted(set(lines[:-1]))
    assert {line for line in lines if not re.search(r"build|built", line)} == set(said)
    for target, bits in (("model", r"4\.\d+"), ("other", r"8\.\d+")):
        (built,) = [line for line in lines if line.startswith(f"build/{target}: ")]
        counts = {"computed": 0, "reused": 0}
        for entry in done.entries:
            counts[entry["outcome"]] += entry["task"].split(":")[1] == target
        tasks = f"{counts['computed']} tasks computed"
        tasks += f", {counts['reused']} reused" if counts["reused"] else ""
        pattern = rf"build/{target}: {SIZE}, {bits} bits per weight, {tasks} {TOOK}"
        assert re.fullmatch(pattern, built)
        index = project.folder / "build" / target / "model.safetensors.index.json"
        if index.exists():  # as mlx_lm.convert counts
            said = json.loads(index.read_text())["metadata"]
            wanted = 8 * said["total_size"] / said["total_parameters"]
            assert f" {wanted:.3g} bits per weight" in built
        assert lines.index(f"{target}: extract") < lines.index(f"{target}: pack")
        assert lines.index(f"{target}: pack") < lines.index(built)
    assert [line.split(":")[0] for line in lines if "bits per" in line] == [
        "build/model",
        "build/other",
    ]
    where = re.escape(str(tmp_path))
    assert re.fullmatch(rf"2 targets built {TOOK}, peak memory {SIZE}, in {where}", lines[-1])
    modules = json.loads(record.read_text())["modules"]
    assert [name for name in modules if name.split(".")[0] == "rich"] == []
    assert project.doit().stdout == "nothing to do: 2 targets are up to date\n"


def failing_disk(folder: Path) -> None:
    raise OSError(errno.EIO, "Input/output error", str(folder))


def test_a_failure_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = two_targets(tmp_path)
    monkeypatch.setattr(pack, "sync_tree", failing_disk)
    lines = project.doit("--continue", expect=2).stdout.splitlines()
    assert {"model: pack failed", "other: pack failed"} < set(lines)
    total, *errors = lines[-3:]
    assert re.match(rf"\d+ tasks computed, \d+ reused, 2 targets failed {TOOK}, ", total)
    assert {error.partition(": /")[0] for error in errors} == {
        f"ERROR: pack:{target}" for target in ("model", "other")
    }


def test_other_reporters_and_files(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    told = json.loads(project.doit("-r", "json").stdout)
    assert project.tasks() <= {task["name"] for task in told["tasks"]}
    project.configure(max_shard_size="300kB")
    hook = held(tmp_path)
    release(tmp_path)
    terminal = Terminal(project, "-o", str(tmp_path / "said"), columns=80, hook=hook)
    assert terminal.finish() == []
    matches(
        (tmp_path / "said").read_text().splitlines(),
        ["model: pack", "build/model: .* 1 task computed in .*", "1 target built .*"],
    )
