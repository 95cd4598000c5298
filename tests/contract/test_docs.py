"""tests of the documentation: what it links to is there, what it says can be typed runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_lm.convert import configure_parser

from support import projects
from support.front_door import REPOSITORY
from support.pages import DOCS, FENCE, PAGES, blocks
from support.projects import Project
from tasks.cli.commands import manual
from tasks.config.keys import keys_of
from tasks.core.quantization import Quantize
from tasks.core.spec import Settings

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def typed(page: Path) -> list[str]:
    """What a page's console blocks show as typed."""
    return [
        line[2:]
        for _, text in blocks(page, "console")
        for line in text.splitlines()
        if line.startswith("$ ")
    ]


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub makes anchors of them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            yield (page.parent / path if path else page), anchor


@every_page
def test_links(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page}: {path}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {path}#{anchor}"


def test_every_page_is_linked() -> None:
    index = {path.resolve() for path, _ in links(DOCS / "README.md")}
    assert index >= {*DOCS.rglob("*.md")} - {DOCS / "README.md"}
    assert (DOCS / "README.md").resolve() in {
        p.resolve() for p, _ in links(REPOSITORY / "README.md")
    }


def test_commands_and_options() -> None:
    """Are those that the code has: python -m tasks.cli.commands.manual writes them."""
    assert manual.PAGE.read_text(encoding="utf-8") == manual.page()


def test_flags_of_mlx_lm() -> None:
    """Are all told, and no others; and what they are here is."""
    page = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    _, of_mlx_lm, *of_others = re.split("^## ", page, flags=re.MULTILINE)
    flags = re.compile(r"`(--?[\w-]+)`")
    rows = re.findall(r"^\| (`-.*?) \| (.*) \|$", of_mlx_lm, re.MULTILINE)
    told = {flag for first, _ in rows for flag in flags.findall(first)}
    options = {o for action in configure_parser()._actions for o in action.option_strings}
    assert told == options - {"-h", "--help"}
    rows += re.findall(r"^\| (`-.*?) \| (.*) \|$", "".join(of_others), re.MULTILINE)
    known = {*keys_of(Settings), *(f"quantize.{key}" for key in keys_of(Quantize))}
    for _, here in rows:
        named = re.match(r"`([\w.]+)(?: = \{\})?`", here)
        assert named is None or named[1] in known, here
        assert named or here.startswith(("not here", "the target's name")), here


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The checkout's own models.toml, in a folder of its own."""
    project = projects.create(tmp_path_factory.mktemp("docs") / "project", "meta")
    (project.folder / "checkpoints").mkdir()
    project.checkpoint.rename(project.folder / "checkpoints" / "tiny-llama")
    models = (REPOSITORY / "models.toml").read_text(encoding="utf-8")
    (project.folder / "models.toml").write_text(models, encoding="utf-8")
    return project


def test_drawing(project: Project) -> None:
    project.doit("pack:tiny-llama")
    call = next(line for line in typed(DOCS / "concepts.md") if line.startswith("mlx-make graph "))
    ((_, drawing),) = blocks(DOCS / "concepts.md", "mermaid")
    assert project.doit(*call.split()[1:]).stdout == drawing


@every_page
def test_commands_run(project: Project, page: Path) -> None:
    for line in typed(page):
        program, *args = line.split()
        if program in ("doit", "mlx-make"):
            project.doit(*args)


def test_paths_in_contributing() -> None:
    """What CONTRIBUTING.md sends people to is there, and each room of tasks/ is in its picture."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:tasks|cache|tests|benchmarks|docs|\.ci)/[\w./-]+)`", text)
    assert len(paths) > 8
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    (picture,) = (block for language, block in blocks(REPOSITORY / "CONTRIBUTING.md", "mermaid"))
    rooms = {path.parent.name for path in (REPOSITORY / "tasks").glob("*/__init__.py")}
    assert [room for room in rooms if room not in picture] == []
