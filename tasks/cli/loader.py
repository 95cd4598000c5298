"""loader: how doit loads the tasks of dodo.py: with a Session, which is handed down to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from doit.cmd_base import DodoTaskLoader, NamespaceTaskLoader
from doit.exceptions import InvalidDodoFile

from tasks.cli.command import Command
from tasks.cli.doit_adapter import (
    command_line_variables,
    models_file,
    read_no_source,
    read_plugins_once,
)
from tasks.cli.options import DEFAULT
from tasks.cli.target_names import task_named
from tasks.core.program import IS_CHECKOUT, ROOT
from tasks.core.task_names import LOCK, PACK, PUBLISH, REPORT, VERIFY, group_of, task_name
from tasks.core.workspace import STATE

if TYPE_CHECKING:
    from tasks.cli.session import Session
    from tasks.config.reader import Config

EXAMPLE = ROOT / "checkpoints" / "tiny-llama"


def _make_example(folder: Path) -> None:
    from tasks.checkpoints import example  # which makes nothing where it is there

    example.make(folder)


class SensitivitiesFirst(Exception):
    """What a run is to build is yet to be chosen: of sensitivities that are not on record.

    Attributes:
        targets: those that it is so of.
    """

    def __init__(self, targets: tuple[str, ...]) -> None:
        super().__init__(", ".join(targets))
        self.targets = targets


class InParts(Exception):
    """A run has more tasks than memory is to hold: see ``parts``.

    Attributes:
        parts: the targets that are to be built first, some at a time.
    """

    def __init__(self, parts: list[list[str]]) -> None:
        super().__init__()
        self.parts = parts


class _SessionLoader(NamespaceTaskLoader):  # type: ignore[misc]
    """Calls the task creators of mlx-make's dodo.py with the task graph of a Session.

    What that takes is imported when a command asks for it: a run starts CUDA first.

    Attributes:
        session: of the command, once its tasks are loaded; None of another dodo.py.
    """

    session: Session | None = None
    namespace: Mapping[str, Any]
    _config: Config

    def __init__(self) -> None:
        super().__init__()
        read_plugins_once()
        read_no_source()

    def load_doit_config(self) -> dict[str, Any]:
        """Return DOIT_CONFIG: threads, and all state beside models.toml.

        Raises:
            InvalidDodoFile: models.toml or the command line is wrong.
        """
        if not self._is_ours:
            return dict(super().load_doit_config())
        if unknown := command_line_variables().keys() - {"models"}:
            raise InvalidDodoFile(f"{min(unknown)}= says nothing. Only models=PATH does.")
        from tasks.cli.doit_database import Checker
        from tasks.cli.failures import as_invalid_dodo_file
        from tasks.config import reader
        from tasks.execution.resources import cluster_threads, threads

        with as_invalid_dodo_file():
            self._config = reader.load(models_file())
        return {
            "default_tasks": [PACK],
            "dep_file": str(self._config.path.parent / STATE / "doit.json"),
            "backend": "mlx-make",
            "check_file_uptodate": Checker,
            "reporter": "mlx-make",
            "num_process": cluster_threads()
            if self._config.build.cluster
            else threads(target.device for target in self._config.targets.values()),
            "par_type": "thread",
            "verbosity": 2,
        }

    def load_tasks(self, cmd: Any, pos_args: list[str]) -> Any:
        """Plan the targets, and make doit's tasks for them."""
        if self._is_ours:
            from tasks.cli import parts
            from tasks.cli.session import Session
            from tasks.cli.task_graph import TaskGraph
            from tasks.stages import registry

            creators = {n: c for n, c in self.namespace.items() if n.startswith("task_")}
            options = DEFAULT
            if isinstance(cmd, Command):
                if cmd.names_tasks:
                    groups = {
                        *registry.groups(),
                        *(name.removeprefix("task_") for name in creators),
                    }
                    # In place: doit reads this very list from then on.
                    targets = self._config.targets
                    pos_args[:] = [task_named(name, targets, groups) for name in pos_args]
                options = cmd.options.requesting(pos_args)
            makers = {EXAMPLE: _make_example} if IS_CHECKOUT else {}
            self.session = Session.open(self._config, options, makers, cmd.dep_manager)
            if cmd.name == "run" and self.session.undecided:
                self.session.close()
                raise SensitivitiesFirst(tuple(self.session.undecided))
            for group in {REPORT, PUBLISH}.intersection(pos_args):  # of what can be planned
                pos_args += [task_name(group, target) for target in self.session.refused]
            running = {stage.group for stage in registry.RUNNING}
            runs_models = any(group_of(name) in running for name in pos_args)
            graph = TaskGraph(self.session, cmd.dep_manager, runs_models)
            if options.in_parts and (found := parts.parts(graph)):
                self.session.close()
                raise InParts(found)
            self.namespace = graph.stage_creators() | {
                name: MethodType(creator, graph) if creator.__code__.co_argcount else creator
                for name, creator in creators.items()
            }
            if options.only_locks:  # of a thousand targets, all tasks would be half a million
                self.namespace = {name: self.namespace[name] for name in [f"task_{LOCK}"]}
            if any(group_of(name) == VERIFY for name in pos_args):
                from tasks.cli import verify_tasks  # which nothing else imports

                session = self.session
                # Not in dodo.py: doit would make a task of this name, which is a command's.
                self.namespace = {
                    **self.namespace,
                    "task_verifying": lambda: verify_tasks.tasks(session),
                }
        return super().load_tasks(cmd, pos_args)

    @property
    def _is_ours(self) -> bool:
        return Path(self.namespace.get("__file__", "")).resolve() == ROOT / "dodo.py"


class Loader(_SessionLoader, DodoTaskLoader):  # type: ignore[misc]
    """The loader of doit in a checkout, where -f takes another dodo.py."""


class InstalledLoader(_SessionLoader):
    """The loader of the command mlx-make, whatever lies in the current folder."""

    def setup(self, opt_values: Any) -> None:
        """Load dodo.py."""
        import dodo

        self.namespace = vars(dodo)
