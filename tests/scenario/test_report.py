"""Quantization errors against figures computed directly, and the pages that tell them."""

import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from cache.files.stamp import Stamp
from support.projects import FOUR_BIT, LAYERS, Project, create, outcomes
from tasks.report import figures
from tasks.report import pages as report_pages

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SETTINGS = (
    {"bits": 4, "group_size": 32},
    {"bits": 8, "group_size": 64},
    {"mode": "mxfp4"},
    {"mode": "nvfp4"},
)
WIDTHS = (1280, 390)
# Frames of these widths, since a headless window is never narrower than 500 pixels; and a script
# that leaves in the DOM what only a browser knows of the pages in them, all details open.
HARNESS = """<!doctype html><html style="color-scheme: light dark"><body><script>
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const view = frame.contentWindow, page = frame.contentDocument;
    page.querySelectorAll('details').forEach(e => { e.open = true; });
    const wide = [...page.querySelectorAll('body *')].filter(e =>
      !e.closest('.scroll, .hidden') && e.getBoundingClientRect().right > view.innerWidth + 1);
    return {
      name: frame.name, inner: view.innerWidth, scroll: page.documentElement.scrollWidth,
      wide: wide.map(e => e.outerHTML.slice(0, 80)), title: page.title,
      background: view.getComputedStyle(page.body).backgroundColor,
      cells: page.querySelectorAll('.heat td[class^=h]').length,
      colors: new Set([...page.querySelectorAll('.scale i')].map(
        e => view.getComputedStyle(e).backgroundColor)).size,
      asked: view.performance.getEntriesByType('resource').map(e => e.name)};
  });
  document.body.dataset.probe = JSON.stringify(found);
});
</script>"""


def test_errors_are_those_that_numpy_finds(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    targets = ["model", *(f"model-{number}" for number in range(1, len(SETTINGS)))]
    for target, quantize in zip(targets, SETTINGS, strict=True):
        project.configure(target, dtype="float16", quantize=quantize)
    project.doit("report")
    originals = _checkpoint(project)
    for target, quantize in zip(targets, SETTINGS, strict=True):
        built = _built(project, target)
        page = _page(project, target)
        for path in (project.folder / "build" / target).iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() in page.text
        found = _measured(project, target)
        assert {f"{name}.weight" for name in page.errors} == found.keys()
        config = json.loads((project.folder / "build" / target / "config.json").read_bytes())
        told = {key: config["quantization"][key] for key in ("group_size", "bits", "mode")}
        for name, (norm, error_norm) in found.items():
            path = name.removesuffix(".weight")
            parts = [built[name], built[f"{path}.scales"], built.get(f"{path}.biases")]
            assert (parts[2] is None) == ("mode" in quantize)
            restored = _float64(mx.dequantize(*parts, **told))
            original = originals[name].astype(np.float16).astype(np.float64)
            assert norm == pytest.approx(np.linalg.norm(original), rel=1e-6)
            assert error_norm == pytest.approx(np.linalg.norm(original - restored), rel=1e-6)
            percent, decibel = page.errors[path]
            relative = error_norm / norm
            assert float(percent.removesuffix(" %")) == pytest.approx(100 * relative, rel=5e-3)
            sqnr = -20 * np.log10(relative)
            assert float(decibel.removesuffix(" dB")) == pytest.approx(sqnr, abs=0.06)


def test_a_shard_size_measures_nothing_anew(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    first = project.doit("report")
    errors = {f"measure:model:{layer}" for layer in LAYERS["huggingface"] if layer != "norm"}
    assert {task for task in first.computed if task.startswith("measure:")} == errors
    again = project.doit("report")
    assert again.entries == []
    project.configure(max_shard_size="100kB")
    third = project.doit("report")
    assert third.computed == {"pack:model", "report:model", "report"}
    # Other bits do measure anew, and a target of the same settings shares what was measured.
    project.configure(quantize={"bits": 8})
    assert errors <= project.doit("report").computed
    project.configure("other", **FOUR_BIT)
    assert {f"measure:other:{task.split(':')[2]}" for task in errors} <= outcomes(
        project.doit("report")
    )["reused"]


def test_pack_measures_nothing(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    assert project.doit().computed == project.tasks()
    assert not (project.folder / "reports").exists()


def test_a_report_builds_no_other_target_and_shows_it_once_it_is_built(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("plain", quantize=False)
    done = project.doit("report:model")
    assert not any("plain" in entry["task"] for entry in done.entries)
    assert "plain" not in _text(project)
    assert "not quantized" not in _text(project)
    project.doit()
    assert project.doit("report:model").computed == {"report:model"}
    assert "plain" in _text(project)
    assert "Nothing is quantized" not in _text(project)
    project.doit("report")
    assert "Nothing is quantized" in _text(project, "plain")
    assert project.doit("report").entries == []


def test_pages_of_many_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what grows with them: no record is looked at for each page, or told of in each."""
    looked: Counter[str] = Counter()
    stamp = figures._stamp

    def count(path: str) -> Stamp | None:
        looked[path] += "evaluate" not in path
        return stamp(path)

    monkeypatch.setattr(figures, "_stamp", count)
    monkeypatch.setattr(report_pages, "COMPARED", 2)
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    for bits in (5, 6, 8):
        project.configure(f"b{bits}", quantize={"bits": bits})
    project.doit("-n", "1")  # one target after another
    project.doit("report")
    assert max(looked.values()) == 1
    page = (project.folder / "reports" / "b6.html").read_text()
    assert all(said in page for said in ("b5.html", ">2 more</a>"))
    assert not any(said in page for said in ("b8.html", "model.html"))
    traces = {t: _trace(project, t) for t in ("model", "b5", "b6", "b8")}
    for target, tasks in traces.items():
        assert {f"quantize:{target}:layers.0", f"pack:{target}"} <= tasks
    assert sum(map(len, traces.values())) < 1.5 * sum(map(len, _of_targets(traces).values()))


def _trace(project: Project, target: str) -> set[str]:
    trace = json.loads((project.folder / "reports" / f"{target}.trace.json").read_bytes())
    return {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}


def _of_targets(traces: dict[str, set[str]]) -> dict[str, set[str]]:
    return {t: {task for task in tasks if f":{t}" in task} for t, tasks in traces.items()}


def test_a_page_that_was_touched_or_is_gone_is_made_again(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit("report")
    pages = project.folder / "reports"
    before = {path.name: path.read_bytes() for path in pages.iterdir()}
    (pages / "model.html").write_bytes(before["model.html"][:-10])
    (pages / "model.trace.json").unlink()
    assert project.doit("report").computed == {"report:model"}
    assert {path.name: path.read_bytes() for path in pages.iterdir()} == before
    project.doit("clean", "report")
    project.doit("clean", "report:model")
    assert not any(pages.iterdir())


def test_what_others_put_among_the_pages_stays(tmp_path: Path) -> None:
    project = create(tmp_path, "meta", **FOUR_BIT)
    mine = project.folder / "reports" / "index.html"
    mine.parent.mkdir()
    mine.write_text("my page")
    done = project.doit("report", expect=1)
    assert "reports/index.html is in the way: it is no report that was written here" in done.stdout
    cleaned = project.doit("clean", "report").stdout
    assert "reports/index.html left there, since not written here" in cleaned
    assert mine.read_text() == "my page"


def test_lost_measurements_are_made_again(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit("report")
    before = _page(project).errors
    for layer in ("layers.0", "lm_head"):
        project.blob("error", layer, "error_norm").unlink()
    shutil.rmtree(project.folder / "reports")
    project.doit("report")
    assert _page(project).errors == before


def test_a_log_that_lost_the_build_makes_a_page_all_the_same(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    log = project.state / "log.jsonl"
    trace = project.folder / "reports" / "model.trace.json"
    (pack,) = (line for line in log.read_bytes().splitlines() if b'"pack:model"' in line)
    log.write_bytes(pack + b"\n")
    project.doit("report")
    events = [e for e in json.loads(trace.read_bytes())["traceEvents"] if e["ph"] == "X"]
    assert [event["name"] for event in events] == ["pack:model"]
    log.unlink()
    assert project.doit("report").computed == {"report:model", "report"}
    assert "The build log has nothing of it" in _text(project)
    assert not trace.exists()


def test_the_trace_is_the_build(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    done = project.doit()
    project.doit("report")
    trace = json.loads((project.folder / "reports" / "model.trace.json").read_bytes())
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert spans.keys() == project.tasks()
    for entry in done.entries:
        span = spans[entry["task"]]
        assert span["args"]["outcome"] == entry["outcome"]
        assert span["dur"] == pytest.approx(1e6 * entry["seconds"], abs=1)
        assert span["ts"] >= 0
    threads = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert {threads[span["tid"]].partition(" ")[2] for span in spans.values()} == {
        entry["thread"] for entry in done.entries
    }
    critical = [name for name, span in spans.items() if span["args"]["critical"]]
    assert "pack:model" in critical
    assert len({name.split(":")[0] for name in critical}) == 5


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = create(tmp_path_factory.mktemp("pages"), "huggingface", **FOUR_BIT)
    project.configure("mixed", quantize={"recipe": "mixed_3_6", "group_size": 32})
    project.configure("a-target-whose-name-goes-on-and-on-and-on", quantize={"mode": "mxfp4"})
    project.configure("plain", quantize=False)
    project.doit("report")
    return project.folder / "reports"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_browser_shows_all_of_it(pages: Path, tmp_path: Path, scheme: str) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages.glob("*.html")}
    frames = [
        f'<iframe name="{name}" width="{width}" height="900" style="border: 0" '
        f'srcdoc="{escape(text)}"></iframe>'
        for name, text in texts.items()
        for width in WIDTHS
    ]
    harness = tmp_path / "harness.html"
    harness.write_text("\n".join([HARNESS, *frames]), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
         "--dump-dom", f"file://{harness}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    probed = json.loads(Page(done.stdout).probe)
    assert [(found["name"], found["inner"]) for found in probed] == [
        (name, width) for name in texts for width in WIDTHS
    ]
    for found in probed:
        name = found["name"]
        assert found["scroll"] <= found["inner"], (name, found["wide"])
        assert found["wide"] == [], name
        assert found["asked"] == [], f"{name} fetches something"
        red = int(re.match(r"rgb\((\d+)", found["background"])[1])
        assert (red < 60) == (scheme == "dark")
        assert found["title"]
        if name not in ("plain.html", "index.html"):
            assert found["cells"] == 4 * 7
            assert found["colors"] == 9


def test_a_page_is_whole_without_a_browser(pages: Path) -> None:
    page = Page((pages / "mixed.html").read_text(encoding="utf-8"))
    assert page.heat_cells == 4 * 7
    text = page.text
    for section in ("Quantization error", "Size", "Variants", "Last build", "Provenance"):
        assert section in text
    for name in ("model", "mixed", "plain", "a-target-whose-name-goes-on-and-on-and-on"):
        assert name in text
    overview = Page((pages / "index.html").read_text(encoding="utf-8"))
    assert len(overview.links) == 4
    for path in pages.glob("*.html"):
        assert path.stat().st_size < 500_000
        linked = Page(path.read_text(encoding="utf-8"))
        assert linked.missing_anchors == set()
        assert all((pages / link).exists() for link in linked.links)


class Page(HTMLParser):
    """What a test asks of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.probe = self.title = self.text = ""
        self.heat_cells = 0
        self.links: set[str] = set()
        self.errors: dict[str, list[str]] = {}
        self._ids: set[str] = set()
        self._anchors: set[str] = set()
        self._classes: list[str] = []
        self._row: list[str] | None = None
        self._tag = ""
        self.feed(text)
        self.close()
        self._keep_row()

    @property
    def missing_anchors(self) -> set[str]:
        return self._anchors - self._ids

    def handle_starttag(self, tag: str, attrs: list) -> None:
        told = dict(attrs)
        if tag == "wbr":
            return
        self._tag = tag
        self.probe = told.get("data-probe") or self.probe
        self._ids.add(told.get("id") or "")
        if tag == "a" and (link := told.get("href")):
            (self._anchors if link[0] == "#" else self.links).add(link.lstrip("#"))
        if tag == "table":
            self._classes.append(told.get("class") or "")
        if tag in ("tr", "table"):
            self._keep_row()
        if tag == "tr" and self._classes[-1] == "errors":
            self._row = []
        if tag in ("td", "th") and self._row is not None:
            self._row.append("")
        self.heat_cells += tag == "td" and re.fullmatch(r"h\d", told.get("class") or "") is not None

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._keep_row()
            self._classes.pop()

    def handle_data(self, data: str) -> None:
        if self._tag == "title":
            self.title += data
        if self._tag not in ("style", "title", "script"):
            self.text += data
        if self._row:
            self._row[-1] += data

    def _keep_row(self) -> None:
        if self._row and len(self._row) == 4:
            name, _, *figures = (cell.strip() for cell in self._row)
            if name != "weight":
                self.errors[name] = figures
        self._row = None


def _page(project: Project, target: str = "model") -> Page:
    return Page((project.folder / "reports" / f"{target}.html").read_text(encoding="utf-8"))


def _text(project: Project, target: str = "model") -> str:
    return _page(project, target).text


def _measured(project: Project, target: str) -> dict[str, tuple[float, float]]:
    """The two norms of each quantized weight, as the store has them."""
    found = {}
    for layer in LAYERS["huggingface"]:
        path = project.manifest("error", layer, target)
        if not path.exists():
            assert layer == "norm"
            continue
        names = sorted(json.loads(path.read_bytes())["action"]["params"]["compared"])
        norms, error_norms = (
            np.fromfile(project.blob("error", layer, part, target), "<f4")
            for part in ("norm", "error_norm")
        )
        found |= dict(zip(names, zip(norms, error_norms, strict=True), strict=True))
    return found


def _checkpoint(project: Project) -> dict[str, np.ndarray]:
    """The checkpoint's tensors; its bfloat16 widened."""
    arrays: dict[str, mx.array] = {}
    for path in sorted(project.checkpoint.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


def _built(project: Project, target: str) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for path in sorted((project.folder / "build" / target).glob("*.safetensors")):
        arrays |= mx.load(str(path))
    return arrays


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
