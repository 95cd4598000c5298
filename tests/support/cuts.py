"""cuts: builds that are killed, or to which the system refuses a step, at any file they touch."""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from support.projects import FOUR_BIT, SOURCES, Project, create
from support.running import DEADLINE_SECONDS, start, temporary

CHANGED = {"dtype": "bfloat16", "quantize": {"bits": 8}, "max_shard_size": "300kB"}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}
REFUSALS = (errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS)
HARMS = (*(number.name for number in SIGNALS), *(errno.errorcode[cause] for cause in REFUSALS))
# What may become of a build, each with the next one whole.
OUTCOMES = ("built all the same", "stopped, nothing built", "stopped, as it was", "wrong")


@dataclass
class Cuts:
    """Attempts in a folder; each is of a project of its own, told by its seed.

    Attributes:
        folder: where the projects lie.
        events: files opened, renamed, made or removed in a build, by how it begins.
    """

    folder: Path
    events: dict[tuple[str, bool], int] = field(default_factory=dict)

    def attempt(self, harm: str, seed: int) -> tuple[str, str]:
        """Build with a harm; return one of `OUTCOMES`, and what is wrong."""
        choose = random.Random(f"{harm} {seed}")
        source, again = choose.choice(SOURCES), choose.random() < 0.7
        project = self.project(source, again)
        before = project.built()
        at = choose.randrange(1, self.count(source, again))
        if harm.startswith("SIG"):
            told = {"kill": [at, signal.Signals[harm]]}
        else:
            told = {"fail": [at, getattr(errno, harm)]}
        process = start(project, hook={"under": str(project.folder), **told})
        said = "".join(process.communicate(timeout=DEADLINE_SECONDS))
        built = project.built()
        wrong = [*self.wrong(project, harm, process.returncode, said, before)]
        if wrong:
            detail = f"{harm} at event {at} of {source}, seed {seed}: {'; '.join(wrong)}\n{said}"
            return "wrong", detail
        shutil.rmtree(project.folder)
        if process.returncode == 0:
            return OUTCOMES[0], ""
        return (OUTCOMES[2] if built == before and before else OUTCOMES[1]), ""

    def project(self, source: str, again: bool) -> Project:
        """Make a project of which nothing is built, or something else."""
        folder = self.folder / f"{len([*self.folder.iterdir()])}-{os.urandom(4).hex()}"
        project = create(folder, source, **FOUR_BIT)
        if again:
            project.doit()
            project.configure(**CHANGED)
        return project

    def count(self, source: str, again: bool) -> int:
        """Return how many events a build has that nobody harms."""
        if (source, again) not in self.events:
            project = self.project(source, again)
            record = project.folder / "record.json"
            project.doit(hook={"under": str(project.folder), "record": str(record)})
            self.events[source, again] = json.loads(record.read_bytes())["events"]
            shutil.rmtree(project.folder)
        return self.events[source, again]

    def wrong(self, project: Project, harm: str, status: int, said: str, before: dict):
        """What is wrong with a build that was harmed, and with the next one."""
        if "Traceback" in said:
            yield "a traceback"
        if harm.startswith("SIG") and status not in (0, SIGNALS[signal.Signals[harm]]):
            yield f"exit status {status}"
        if not harm.startswith("SIG") and status and "ERROR" not in said:
            yield f"exit status {status}, and no error was said"
        anew = project.anew()
        if project.built() not in ([anew] if status == 0 else [before, anew]):
            yield "what is built is neither what was there nor what is wanted"
        done = project.doit(expect=None)
        if done.returncode:
            yield f"the next build fails: {done.stdout}{done.stderr}"
        elif project.built() != anew:
            yield "the next build is another"
        if left := temporary(project.folder / "build"):
            yield f"left behind: {left}"
