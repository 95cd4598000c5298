"""What tasks/cli/doit_adapter.py takes for granted of doit, which documents none of it.

A test that fails here tells which name of doit's a new release changed, and what for we need it.
"""

import functools
import inspect
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from doit import cmd_run, doit_cmd, loader, plugin
from doit.cmd_base import Command, NamespaceTaskLoader
from doit.cmd_clean import Clean
from doit.cmd_forget import Forget
from doit.cmd_info import Info
from doit.cmd_list import List
from doit.cmdparse import CmdParseError
from doit.control import TaskControl, TaskDispatcher
from doit.dependency import Dependency
from doit.doit_cmd import DoitMain
from doit.exceptions import InvalidCommand, TaskFailed
from doit.runner import MThreadRunner, Runner
from doit.task import Task, dict_to_task

from tasks.cli import doit_adapter
from tasks.cli.doit_database import Checker, Database


class Loader(NamespaceTaskLoader):
    """Tasks of a namespace that stands here."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        super().__init__()
        self.namespace = namespace


def doit(tmp_path: Path, *args: str, commands: tuple[type, ...] = (), **creators: Any) -> int:
    config = {"dep_file": str(tmp_path / "db"), "backend": "json", "verbosity": 0}
    namespace = {"DOIT_CONFIG": config, **creators}
    main = DoitMain(Loader(namespace), config_filenames=())
    main.DOIT_CMDS = (*DoitMain.DOIT_CMDS, *commands)
    return int(main.run([*args]) or 0)


def parameters(function: Any) -> list[str]:
    return [*inspect.signature(function).parameters]


def test_command_line_variables() -> None:
    main = DoitMain(Loader({}), config_filenames=())
    assert main.process_args(["models=a.toml", "list"]) == ["list"]
    assert doit_cmd._CMDLINE_VARS == {"models": "a.toml"}
    assert doit_adapter.command_line_variables() == {"models": "a.toml"}
    assert doit_adapter.models_file() == Path("a.toml")
    doit_cmd.reset_vars()
    assert doit_adapter.command_line_variables() == {}
    assert doit_adapter.models_file() == Path("models.toml")


def test_message_of_an_option_that_does_not_exist() -> None:
    class Any_(Command):
        cmd_options = ({"name": "one", "long": "one", "default": "", "help": "its help"},)

    with pytest.raises(CmdParseError) as error:
        Any_().parse_execute(["--two"])
    assert doit_adapter.parse_error_message(error.value) == "option --two not recognized"
    assert doit_adapter.parse_error_message(ValueError("another error")) is None


def test_message_of_an_option_that_takes_a_number() -> None:
    class Any_(Command):
        cmd_options = ({"name": "count", "short": "n", "type": int, "default": 1},)

    with pytest.raises(CmdParseError) as error:
        Any_().parse_execute(["-n", "two"])
    said = doit_adapter.parse_error_message(error.value, Any_.cmd_options)
    assert said == "-n takes a whole number, and 'two' is none"


def test_whether_an_option_is_given() -> None:
    class Optional(Command):
        cmd_options = ({"name": "one", "long": "one", "default": "", "help": "its help"},)

    for args, given in ([], False), (["--one=2"], True):
        params, _ = Optional().cmdparser.parse(args)
        assert doit_adapter.is_given(params, "one") == given


def test_name_of_a_task_that_does_not_exist() -> None:
    control = TaskControl([])
    with pytest.raises(InvalidCommand) as error:
        control.process(["nothing"])
    assert doit_adapter.name_not_found(error.value) == "nothing"
    with pytest.raises(InvalidCommand) as error:
        doit_cmd.List._list_filtered({}, ["nothing"], False)
    assert doit_adapter.name_not_found(error.value) == "nothing"
    assert doit_adapter.name_not_found(InvalidCommand("another error")) is None


def chain() -> list[Task]:
    """Two chains of two tasks, of which b needs a; and one that needs both."""
    layers = [
        dict_to_task({"name": f"{stage}:{layer}", "actions": None,
                      "task_dep": [f"a:{layer}"] if stage == "b" else []})
        for stage in "ab" for layer in "01"
    ]  # fmt: skip
    return [*layers, dict_to_task({"name": "c", "actions": None, "task_dep": ["b:0", "b:1"]})]


def order(control: TaskControl) -> list[str]:
    """Run tasks as doit's runner does: the next when it is asked for, ended one by one."""
    control.process(["c"])
    dispatched = control.task_dispatcher().generator
    names = []
    node = next(dispatched, None)
    while node is not None:
        if isinstance(node, str):  # wait, say doit's dispatchers
            node = next(dispatched, None)
            continue
        names.append(node.task.name)
        node.run_status = "successful"
        try:
            node = dispatched.send(node)
        except StopIteration:
            break
    return names


def test_control_finishes_a_layer_first() -> None:
    assert parameters(TaskDispatcher._get_next_node) == ["self", "ready", "tasks_to_run"]
    assert parameters(TaskDispatcher.__init__) == ["self", "tasks", "targets", "selected_tasks"]
    assert order(doit_adapter.Control(chain())) == ["a:1", "b:1", "a:0", "b:0", "c"]


def test_a_pattern_that_matches_nothing() -> None:
    tasks = chain()
    assert TaskControl(tasks)._get_wild_tasks("a:*") == ["a:0", "a:1"]
    with pytest.raises(InvalidCommand) as error:
        doit_adapter.Control(tasks).process(["d:*"])
    assert doit_adapter.name_not_found(error.value) == "d:*"


def test_run_looks_its_control_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    class Spy(doit_adapter.Control):
        def process(self, task_selection: list[str] | None) -> None:
            used.append("ours")
            super().process(task_selection)

    monkeypatch.setattr(doit_adapter, "Control", Spy)

    def task_nothing() -> dict[str, Any]:
        return {"actions": None}

    with doit_adapter.our_control():
        assert doit(tmp_path, "run", task_nothing=task_nothing) == 0
    assert used
    assert cmd_run.TaskControl is TaskControl
    assert cmd_run.Runner is Runner
    assert cmd_run.MThreadRunner is MThreadRunner


@pytest.mark.parametrize("threads", ["0", "1", "4"])
@pytest.mark.parametrize("meta", [{"refused": "why"}, {}, None])
def test_what_is_refused_stops_nothing(
    tmp_path: Path, threads: str, meta: dict[str, str] | None
) -> None:
    """Nor does a group that needs it; what fails at work does."""
    assert parameters(Runner._handle_task_error) == ["self", "node", "base_fail"]
    ran: list[str] = []

    def act(name: str) -> Any:
        ran.append(name)
        return TaskFailed("it cannot") if name == "bad" else True

    def task_group() -> Iterator[dict[str, Any]]:
        yield {"name": "bad", "actions": [(act, ["bad"])], "meta": meta}

    def task_after() -> dict[str, Any]:
        return {"actions": [(act, ["after"])]}

    creators = {"task_group": task_group, "task_after": task_after}
    with doit_adapter.our_control():
        run = ["run", "-n", threads, "-P", "thread"]
        assert doit(tmp_path, *run, "group", "after", **creators) == 1
        assert ("after" in ran) == bool(meta) or threads == "4"
        assert doit(tmp_path, *run, "--continue", "group", "after", **creators) == 2


def test_is_up_to_date_as_doit_finds(tmp_path: Path) -> None:
    """Of a task as doit makes it, and of its name and files alone, whatever changes."""
    source = tmp_path / "source"
    source.write_text("1")
    database = Dependency(Database, str(tmp_path / "db"), checker_cls=Checker)
    answer = [True]

    def uptodate(task: Any, values: dict[str, Any]) -> bool:
        return answer[0] and bool(values)

    def made() -> Task:
        return dict_to_task(
            {"name": "it", "actions": None, "file_dep": [str(source)], "uptodate": [uptodate]}
        )

    def alike() -> bool:
        found = doit_adapter.is_up_to_date(database, "it", {str(source)}, uptodate)
        assert found == (database.get_status(made(), {}).status == "up-to-date")
        return bool(found)

    assert not alike()
    task = made()
    task.values = {"some": "value"}
    database.save_success(task)
    assert alike()
    answer[0] = False
    assert not alike()
    answer[0] = True
    source.write_text("22")
    assert not alike()
    database.save_success(task)
    assert alike()
    database.ignore(task)
    assert not doit_adapter.is_up_to_date(database, "it", {str(source)}, uptodate)


def test_uptodate_is_kept_as_a_triple() -> None:
    assert tuple(dict_to_task({"name": "it", "actions": None, "uptodate": [True]}).uptodate) == (
        doit_adapter.ALWAYS_UP_TO_DATE
    )


def test_what_commands_override() -> None:
    """By the parameters' names: doit looks at those of `_execute`."""
    assert parameters(List._list_all) == ["self", "include_subtasks"]
    assert parameters(List._print_task) == [
        "self", "template", "task", "status", "list_deps", "tasks",
    ]  # fmt: skip
    assert parameters(Clean._expand) == ["self", "clean_list"]
    assert parameters(Forget._execute) == [
        "self", "forget_sub", "forget_disable_default", "forget_all",
    ]  # fmt: skip
    assert parameters(Info._execute) == ["self", "pos_args", "hide_status"]


def layers() -> Any:
    """Make tasks of a stage, a target and two layers."""
    yield {"basename": "cast", "actions": None, "task_dep": ["cast:model"]}
    for layer in "01":
        yield {"basename": "cast:model", "name": layer, "actions": [], "meta": {"big": "plan"}}


def test_list_lists_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Ours(doit_adapter.ListCommand):
        name = "ours"

        def tasks_to_list(self, *, include_subtasks: bool) -> list[Any]:
            return [task for task in self.task_list if include_subtasks or not task.subtask_of]

        def status_of(self, name: str) -> tuple[str, str] | None:
            return ("U", "up to date") if name == "cast:model" else None

    def task_cast() -> Any:
        yield from layers()

    def listed(*args: str) -> list[list[str]]:
        assert doit(tmp_path, "ours", *args, commands=(Ours,), task_cast=task_cast) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    assert listed() == [["cast"], ["cast:model", "up", "to", "date"]]
    assert ["U", "cast:model", "up", "to", "date"] in listed("--status")
    assert ["cast:model:0"] in listed("--all")


def test_clean_forget_and_info(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class OurClean(doit_adapter.CleanCommand):
        name = "ourclean"

    class OurForget(doit_adapter.ForgetCommand):
        name = "ourforget"

    class OurInfo(doit_adapter.InfoCommand):
        name = "ourinfo"

    cleaned: list[str] = []

    def clean(name: str, dryrun: bool) -> None:
        cleaned.append(f"{name}?" if dryrun else name)

    def task_cast() -> Any:
        for task in layers():
            name = task.get("name")
            yield {**task, "clean": [(clean, [name])]} if name else task

    def run(*args: str) -> str:
        commands = (OurClean, OurForget, OurInfo)
        assert doit(tmp_path, *args, commands=commands, task_cast=task_cast) in (0, 1)
        return capsys.readouterr().out

    run("ourclean", "-n", "cast")
    run("ourclean", "cast")
    assert sorted(cleaned) == ["0", "0?", "1", "1?"]
    assert {*run("ourforget", "cast").splitlines()} == {
        f"forgetting {name}" for name in ("cast", "cast:model", "cast:model:0", "cast:model:1")
    }
    said = run("ourinfo", "cast:model:0")
    assert "cast:model:0" in said
    assert "big" not in said


def test_creators_stand_in_the_order_of_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decorated one and one of an object, too, as by what doit would read of their code."""
    monkeypatch.setattr(loader, "inspect", inspect)

    class Graph:
        def first(self) -> dict[str, Any]:
            return {"actions": None}

    def second() -> dict[str, Any]:
        return {"actions": None}

    @functools.wraps(second)
    def wrapped() -> dict[str, Any]:
        return second()

    def third() -> dict[str, Any]:
        return {"actions": None}

    creators = {"task_3": third, "task_2": wrapped, "task_1": Graph().first}

    def order() -> list[str]:
        return [task.name for task in loader.load_tasks(creators)]

    as_doit_does = order()
    monkeypatch.setattr(inspect, "getsourcelines", None)
    doit_adapter.read_no_source()
    assert order() == as_doit_does == ["1", "2", "3"]


def test_plugins_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """doit takes what is installed from this one name, a group at a time."""
    monkeypatch.setattr(plugin, "entry_points", plugin.entry_points)
    asked: list[str] = []

    def point(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("toy", "module:Attribute", group)]

    doit_adapter.read_plugins_once()
    assert plugin.entry_points_impl() is doit_adapter.plugins_of
    monkeypatch.setattr(plugin, "entry_points", point)
    found = plugin.PluginDict()
    found.add_plugins({}, "COMMAND")
    assert asked == ["doit.COMMAND"]
    assert found["toy"].location == "module:Attribute"
    assert list(doit_adapter.plugins_of(group="console_scripts")) == list(
        entry_points(group="console_scripts")
    )
