"""vlm: layout mlx-vlm beside `mlx_vlm.convert`, of all architectures that mlx-vlm has.

    python benchmarks/vlm.py --folder F               # all, in five settings; Markdown
    python benchmarks/vlm.py --folder F qwen2_vl llava  # these
    python benchmarks/vlm.py --folder F --rounds 3      # time and memory, of Qwen2-VL 2B's shape
    python benchmarks/vlm.py --folder F --library mlx-embeddings  # of another library
    python benchmarks/vlm.py --folder F --mtp           # drafters beside `mlx_vlm.split_mtp`

A small random checkpoint is made of each architecture, of the fields of the library's own classes
(tests/support/*_checkpoints.py), converted by the peer in this process, and built by one call of
doit. Names, dtypes, shapes and bytes of all tensors, config.json and the index are compared. What
the peer refuses is told with its words, and so is what no checkpoint could be made of. All of
mlx-vlm takes 6 GB, and half an hour on a busy machine; what a folder has already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import mlx.core as mx
from measure import ROOT, BenchmarkError, Usage, measure

sys.path.insert(0, str(ROOT / "tests"))

from support import (
    audio_checkpoints,
    audio_peer,
    embeddings_checkpoints,
    embeddings_peer,
    mtp_checkpoints,
    vlm_checkpoints,
    vlm_names,
    vlm_peer,
)
from support.differences import json_differences, weight_differences

WORDS = 160  # of what the peer says
PEER = """
from pathlib import Path
from support import vlm_peer
source, output, bits = sys.argv[1:]
vlm_peer.convert(Path(source), Path(output), quantize=True, q_bits=int(bits))
"""
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("", {}),
    "4bit": ("quantize = { bits = 4 }", {"q_bits": 4, "q_group_size": 64}),
    "8bit": ("quantize = { bits = 8, group_size = 32 }", {"q_bits": 8, "q_group_size": 32}),
    "mxfp4": ('quantize = { mode = "mxfp4" }', {"q_mode": "mxfp4"}),
}
# Qwen2-VL 2B's widths, fewer layers of each part.
TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 4, "vocab_size": 151936,
    "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {"embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "depth": 4, "mlp_ratio": 4.0}
SHAPE = {**TEXT, "text_config": TEXT, "vision_config": VISION}


class Compared(NamedTuple):
    """A library that is compared.

    Attributes:
        layout: its layout's name.
        checkpoints: the module that makes checkpoints of its architectures.
        peer: the module that converts them with it.
        hub: the architectures whose checkpoints have the hub's names.
    """

    layout: str
    checkpoints: Any
    peer: Any
    hub: frozenset[str] = frozenset()


LIBRARIES = {
    each.layout: each
    for each in (
        Compared("mlx-vlm", vlm_checkpoints, vlm_peer, frozenset(vlm_names.HUB)),
        Compared("mlx-embeddings", embeddings_checkpoints, embeddings_peer),
        Compared("mlx-audio", audio_checkpoints, audio_peer),
    )
}


def main() -> None:
    """Compare, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for it")
    parser.add_argument("--library", choices=LIBRARIES, default="mlx-vlm")
    parser.add_argument("--rounds", type=int, help="measure so often instead")
    parser.add_argument("--mtp", action="store_true", help="compare drafters instead")
    parser.add_argument("--most-weights", type=int, help="of a checkpoint, else it is left out")
    arguments = parser.parse_args()
    if arguments.most_weights:
        vlm_checkpoints.MOST_WEIGHTS = arguments.most_weights
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.rounds:
        print(_timed(folder, arguments.rounds))
        return
    if arguments.mtp:
        print(_drafters(folder, arguments.architectures or [*mtp_checkpoints.MTP]))
        return
    left_out: dict[str, str] = {}
    refused: dict[str, dict[str, str]] = {}
    library = LIBRARIES[arguments.library]
    for arch in arguments.architectures or library.checkpoints.architectures():
        if cause := _make(library, arch, folder / "checkpoints" / arch):
            left_out[arch] = cause
        else:
            refused[arch] = dict(_convert(library, arch, folder))
    _build(library, folder, refused)
    print(_report(library, folder, refused, left_out))


def _make(library: Compared, arch: str, checkpoint: Path) -> str:
    """Make a checkpoint; return why that cannot be, if so."""
    if checkpoint.exists():
        return ""
    try:
        library.checkpoints.make(arch, checkpoint)
    except Exception as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return _words(error)
    return ""


def _convert(library: Compared, arch: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Have the peer convert a checkpoint; yield the settings that it refuses, and its words."""
    for name, (_, settings) in library.peer.SETTINGS.items():
        reference, said = folder / "references" / f"{arch}-{name}", folder / f"{arch}-{name}.txt"
        if reference.exists():
            continue
        if not said.exists():
            try:
                library.peer.convert(folder / "checkpoints" / arch, reference, **settings)
                continue
            except Exception as error:
                shutil.rmtree(reference, ignore_errors=True)
                said.write_text(_words(error))
        yield name, said.read_text()


def _build(library: Compared, folder: Path, refused: dict[str, dict[str, str]]) -> None:
    """Build all that the peer converted, each as far as it goes."""
    lines = ["[defaults]", f'layout = "{library.layout}"']
    for arch, settings in refused.items():
        for name, (toml, _) in library.peer.SETTINGS.items():
            if name not in settings:
                lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    _run(folder, lines)


def _run(folder: Path, lines: list[str]) -> None:
    (folder / "models.toml").write_text("\n".join(lines) + "\n")
    models = f"models={folder / 'models.toml'}"
    command = [sys.executable, "-m", "doit", "--continue", models]
    with (folder / "build.txt").open("w") as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=output)


def _drafters(folder: Path, architectures: list[str]) -> str:
    """Return how many drafters are equal to what the peer splits off, and what of each other."""
    from mlx_vlm.split_mtp import split_mtp

    lines = ["[defaults]", 'layout = "mlx-vlm-mtp"']
    refused: dict[str, str] = {}
    for arch in architectures:
        source = folder / "checkpoints" / arch
        if not source.exists():
            mtp_checkpoints.make(arch, source)
        for name, (toml, settings) in DRAFTS.items():
            reference = folder / "references" / f"{arch}-{name}"
            shutil.rmtree(reference, ignore_errors=True)
            try:
                split_mtp(str(source), str(reference), **settings)
            except Exception as error:
                refused[f"{arch}-{name}"] = _words(error)
            lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    _run(folder, lines)
    names = [f"{arch}-{name}" for arch in architectures for name in DRAFTS]
    found = {name: _draft_differences(folder, name) for name in names if name not in refused}
    equal = [name for name, differences in found.items() if not differences]
    told = {name: each[0] for name, each in found.items() if each} | refused
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}: {len(equal)} of {len(found)} drafters are equal, of "
            f"{len({name.rpartition('-')[0] for name in found})} architectures:",
            "",
            "| drafter | |",
            "|---|---|",
            *(f"| {name} | {said} |" for name, said in told.items()),
        ]
    )


def _draft_differences(folder: Path, name: str) -> list[str]:
    """Return how a drafter differs from the peer's, which may be in other files."""
    build, reference = folder / "build" / name, folder / "references" / name
    if not (build / "config.json").exists():
        return ["it was not built"]
    whole = []
    for each in (build, reference):
        tensors: dict[str, Any] = {}
        for path in each.glob("*.safetensors"):
            tensors |= cast("dict[str, mx.array]", mx.load(str(path)))
        (folder / f"{each.parent.name}-whole").mkdir(exist_ok=True)
        whole.append(folder / f"{each.parent.name}-whole")
        file = str(whole[-1] / "model.safetensors")
        mx.save_safetensors(file, tensors, metadata={"format": "mlx"})
    ours, theirs = (json.loads((each / "config.json").read_text()) for each in (build, reference))
    return [*weight_differences(*whole), *json_differences("config.json: ", ours, theirs)]


def _report(
    library: Compared,
    folder: Path,
    refused: dict[str, dict[str, str]],
    left_out: dict[str, str],
) -> str:
    """Return how many are equal, and what of each other."""
    started = time.strftime("%Y-%m-%d")
    equal: Counter[str] = Counter()
    lines = []
    whole = 0
    for arch, settings in refused.items():
        names = [name for name in library.peer.SETTINGS if name not in settings]
        found = {name: _differences(folder, f"{arch}-{name}") for name in names}
        equal += Counter(name for name in names if not found[name])
        whole += bool(names) and not any(found.values())
        lines += [f"| {arch} | {name} | {found[name][0]} |" for name in names if found[name]]
        lines += [f"| {arch} | {name} | refused: {said} |" for name, said in settings.items()]
    count = len(library.peer.SETTINGS)
    converted = {arch for arch, settings in refused.items() if len(settings) < count}
    total = sum(count - len(settings) for settings in refused.values())
    hub = len(converted & library.hub)
    convert = f"{library.layout.replace('-', '_')}.convert"
    return "\n".join(
        [
            f"{started}: of {len(refused) + len(left_out)} architectures, {len(converted)} are "
            f"converted by {convert} in some setting, {hub} of them from the hub's names; "
            f"{whole} of {len(converted)} are equal in all, {equal.total()} of {total} builds:",
            "",
            *(f"- {name}: {equal[name]}" for name in library.peer.SETTINGS),
            "",
            "| architecture | setting | |",
            "|---|---|---|",
            *lines,
            *(f"| {arch} | | no checkpoint: {cause} |" for arch, cause in left_out.items()),
        ]
    )


def _timed(folder: Path, rounds: int) -> str:
    """Return what both take, in turn: 4 bits from nothing, and then 8 bits."""
    source, project = folder / "checkpoint", folder / "project"
    if not source.exists():
        vlm_checkpoints.make("qwen2_vl", source, SHAPE)
    project.mkdir(exist_ok=True)
    peer = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\n{PEER}"
    taken: dict[str, list[Usage]] = {}
    for _ in range(rounds):
        for name in ("build", ".mlx-make"):
            shutil.rmtree(project / name, ignore_errors=True)
        for bits, words in ((4, "cold, 4 bits"), (8, "then 8 bits")):
            output = folder / f"peer-{bits}"
            shutil.rmtree(output, ignore_errors=True)
            command = [sys.executable, "-c", peer, str(source), str(output), str(bits)]
            taken.setdefault(f"mlx_vlm.convert, {words}", []).append(measure(command))
            (project / "models.toml").write_text(
                f'[models.a]\nsource = "{source}"\nlayout = "mlx-vlm"\n'
                f"quantize = {{ bits = {bits} }}\n"
            )
            command = [sys.executable, "-m", "doit", f"models={project / 'models.toml'}"]
            taken.setdefault(f"mlx-make, {words}", []).append(measure(command))
            if found := [*weight_differences(project / "build" / "a", output)]:
                raise BenchmarkError(f"{words}: {found[0]}")
    lines = ["| | wall, s | processor, s | peak RSS, MB |", "|---|---|---|---|"]
    for name, each in taken.items():
        other = taken[name.replace("mlx-make", "mlx_vlm.convert")]
        cells = []
        for of in ("seconds", "processor", "peak_rss"):
            mine, theirs = (median(getattr(u, of) for u in us) for us in (each, other))
            unit = 1e6 if of == "peak_rss" else 1
            cells.append(f"{mine / unit:.1f} ({mine / theirs:.2f}×)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([f"Medians of {rounds}, equal to the bit:", "", *lines])


def _differences(folder: Path, target: str) -> list[str]:
    """Return what a build has otherwise than the peer's."""
    build, reference = folder / "build" / target, folder / "references" / target
    if not build.is_dir():
        return ["not built: see build.txt"]
    found = [*weight_differences(build, reference)]
    for name in ("config.json", "model.safetensors.index.json"):
        ours, theirs = (json.loads((each / name).read_text()) for each in (build, reference))
        found += json_differences(f"{name}: ", ours, theirs)
    return found


def _words(error: Exception) -> str:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return said.replace("|", "/")[:WORDS]


if __name__ == "__main__":
    main()
