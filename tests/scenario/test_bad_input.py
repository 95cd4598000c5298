"""Bad input, through the front door: a clear error before any work, and nothing lost.

Each case says what is wrong, the words that the message must have (where it is, what is wrong with
its values, the nearest that is right), and where a setting mends it, that very setting: it works.
"""

import json
import math
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from doit.exceptions import InvalidDodoFile
from safetensors.torch import save_file

from cache.digest import digest
from cache.records.manifests import Action, Manifest, Tensor
from cache.records.memos import Memos
from support import checkpoints, inside
from support.front_door import Finished
from support.inside import doit
from tasks.checkpoints import example, safetensors_file, torch_file
from tasks.checkpoints.headers import headers
from tasks.checkpoints.stored import Stored
from tasks.cli.session import Session
from tasks.core.errors import CheckpointError
from tasks.core.workspace import Workspace
from tasks.layouts import asking

HAS_GPU = mx.metal.is_available() or mx.cuda.is_available()
OLD = b"the last build"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good checkpoints, which no test changes, and of a cache for what they have."""
    folder = tmp_path_factory.mktemp("shared")
    for arch in "llama", "llama-tied", "llama-odd", "qwen3", "starcoder2":
        checkpoints.make(arch, folder / arch)
    checkpoints.make("llama-tied", folder / "bin", form="bin")
    example.make(folder / "meta")
    return folder


@pytest.fixture
def project(shared: Path, tmp_path: Path) -> "Project":
    return Project(tmp_path, shared)


@dataclass
class Project:
    """A folder with `models.toml`, what was built last, and perhaps a checkpoint to be spoiled."""

    folder: Path
    shared: Path

    def __post_init__(self) -> None:
        (self.folder / "build" / "a").mkdir(parents=True)
        (self.folder / "build" / "a" / "model.safetensors").write_bytes(OLD)
        (self.folder / "build" / "a" / "config.json").write_bytes(b"{}")
        # The record of it, so that it is ours to replace.
        files = {"model.safetensors": OLD, "config.json": b"{}"}
        tensors = {n: Tensor("uint8", (len(data),), digest(data)) for n, data in files.items()}
        record = Workspace(self.folder).packed("a")
        record.parent.mkdir(parents=True)
        record.write_bytes(Manifest(Action("pack", 1, {}, {}), tensors).to_bytes())

    def says(self, toml: str) -> None:
        """Write `models.toml`; `@NAME` is the folder of a shared checkpoint.

        Unless it says otherwise, it has the shared cache: mlx-lm is asked once for all tests.
        """
        toml = toml.replace("@", f"{self.shared}/")
        if "[models.a" in toml and "[cache]" not in toml:
            toml += f'\n[cache]\ndir = "{self.shared}/cache"\n'
        (self.folder / "models.toml").write_bytes(toml.encode(errors="surrogateescape"))

    def copies(self, name: str, settings: str = "") -> Path:
        """Have a model made of a copy of a shared checkpoint, and return the copy."""
        self.says(f'[models.a]\nsource = "checkpoint"\n{settings}')
        return shutil.copytree(self.shared / name, self.folder / "checkpoint")

    def refuses(self, *words: str, status: int = 3, asked: Sequence[str] = ()) -> str:
        """Run doit, which must say all of `words` and change no file but its own state."""
        before = self.content()
        said = output(doit(self.folder, *asked, expect=status))
        assert self.content() == before
        assert "Traceback" not in said
        assert "ERROR: " in said
        assert [word for word in words if word not in said] == [], said
        return said

    def loads(self) -> Session:
        """What doit does before any task."""
        return inside.session(self.folder)

    def content(self) -> Mapping[str, bytes]:
        """All files but doit's state, which says nothing of a build."""
        return {
            str(path): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and ".mlx-make" not in path.parts
        }


def output(done: Finished) -> str:
    return done.stdout + done.stderr


# models.toml


@dataclass(frozen=True)
class Case:
    """What `models.toml` says, what doit says of it, and what `models.toml` says once mended."""

    toml: str
    words: tuple[str, ...]
    mended: str = ""


MODEL = '[models.a]\nsource = "@llama"\n'
KEYS = "valid: source, loader, layout, dtype, adapter, dequantize, quantize, device, max_shard_size"


def setting(wrong: str, *words: str, right: str = "") -> Case:
    """A wrong setting in the third line, in the model's table."""
    return Case(MODEL + wrong, ("models.toml:3: models.a.", *words), right and MODEL + right)


def target(toml: str, *words: str, line: int = 1) -> Case:
    return Case(toml, (f"models.toml:{line}: ", *words))


NO_NAME = "no plain folder name. Use letters, digits, '-'"
TOML = {
    # The file
    "empty": Case("", ("models.toml: lists no model. Add [models.NAME]",), MODEL),
    "no model": Case("[models]\n", ("lists no model. Add [models.NAME]",), MODEL),
    "syntax": Case("[models.a\nsource", ("models.toml is not TOML", "(at line 1, column 10)")),
    "text without quotes": Case(
        "[models.a]\nsource = @llama",
        ("models.toml is not TOML: Invalid value (at line 2,", ": text stands in quotes"),
        MODEL,
    ),
    "no UTF-8": Case("# \udcff", ("models.toml cannot be read", "utf-8")),
    "too deep": Case("a = " + "[" * 9999, ("models.toml is not TOML", "recursion")),
    "too long a number": Case("a = " + "9" * 9999, ("models.toml is not TOML", "4300 digits")),
    # Keys that are none
    "unknown at the top": Case(
        MODEL.replace("models", "model"),
        (
            "models.toml:1: model is an unknown key; valid: cache, build, quality, defaults, "
            "models.",
            "'models'?",
        ),
        MODEL,
    ),
    "unknown in cache": Case(
        '[cache]\ndri = ".cache"\n' + MODEL,
        (
            "models.toml:2: cache.dri is an unknown key;",
            "valid: dir, keep, remote, mode, max_size. Did you mean 'dir'?",
        ),
        '[cache]\ndir = ".cache"\n' + MODEL,
    ),
    "unknown in defaults": Case(
        '[defaults]\nlayuot = "mlx-lm"\n' + MODEL,
        ("models.toml:2: defaults.layuot is an unknown key", KEYS, "Did you mean 'layout'?"),
        '[defaults]\nlayout = "mlx-lm"\n' + MODEL,
    ),
    "unknown in a model": setting(
        'Dtyp = "float16"', "Dtyp is an unknown key", KEYS, ", variants. Did you mean 'dtype'?",
        right='dtype = "float16"',
    ),
    "unknown in a variant": Case(
        MODEL + "[models.a.variants.b]\nquantise = { bits = 4 }",
        ("models.toml:4: models.a.variants.b.quantise", KEYS, "Did you mean 'quantize'?"),
        MODEL + "[models.a.variants.b]\nquantize = { bits = 4 }",
    ),
    "unknown in quantize": setting(
        "quantize = { bit = 4 }", "quantize.bit is an unknown key",
        "valid: bits, group_size, mode, recipe, target_bpw, fit, context, candidates, exact, "
        "min_bits, method, rules. Did you mean 'bits'?",
        right="quantize = { bits = 4 }",
    ),
    "unknown in quantize, a table": Case(
        MODEL + "[models.a.quantize]\nbits = 4\ngroupsize = 64",
        ("models.toml:5: models.a.quantize.groupsize", "Did you mean 'group_size'?"),
        MODEL + "[models.a.quantize]\nbits = 4\ngroup_size = 64",
    ),
    "unknown in a rule": setting(
        'quantize = { rules = [{ match = "lm_head", bits = 4 }, { match = "*", skp = true }] }',
        "quantize.rules[1].skp is an unknown key",
        "valid: match, bits, group_size, mode, skip, dtype. Did you mean 'skip'?",
        right='quantize = { rules = [{ match = "lm_head", bits = 4 }, '
        '{ match = "*", skip = true }] }',
    ),
    "unknown in a rule, a table": Case(
        MODEL + '[[models.a.quantize.rules]]\nmatch = "lm_head"\nbits = 8\n'
        '[[models.a.quantize.rules]]\nmatch = "*"\nbitz = 8\n',
        ("models.toml:8: models.a.quantize.rules[1].bitz", "Did you mean 'bits'?"),
        MODEL + '[[models.a.quantize.rules]]\nmatch = "lm_head"\nbits = 8\n'
        '[[models.a.quantize.rules]]\nmatch = "*"\nbits = 8\n',
    ),
    # Values that are none
    "loader": setting(
        'loader = "transfromers"', "loader is 'transfromers'; valid: llama, transformers, mistral.",
        "Did you mean 'transformers'?", right='loader = "transformers"',
    ),
    "layout": setting(
        'layout = "mlx_lm"', "layout is 'mlx_lm'; valid: mlx-lm, mlx-examples, mlx-vlm, ",
        "Did you mean 'mlx-lm'?", right='layout = "mlx-lm"',
    ),
    "dtype": setting(
        'dtype = "bf16"', "dtype is 'bf16'; valid: float16, bfloat16, float32.",
        "Did you mean 'bfloat16'?", right='dtype = "bfloat16"',
    ),
    "dtype in defaults": Case(
        '[defaults]\ndtype = "FLOAT32"\n' + MODEL,
        ("models.toml:2: defaults.dtype is 'FLOAT32'", "Did you mean 'float32'?"),
        '[defaults]\ndtype = "float32"\n' + MODEL,
    ),
    "device": setting(
        'device = "cup"', "device is 'cup'; valid: cpu, gpu. Did you mean 'cpu'?",
        right='device = "cpu"',
    ),
    "a key of quantize": setting(
        "bits = 4", "bits is an unknown key", "It belongs in quantize: quantize = { bits = 4 }",
        right="quantize = { bits = 4 }",
    ),
    "a name with a point": Case(
        '[models.llama-3.1]\nsource = "@llama"',
        (
            "models.toml:1: models.llama-3.1 is a table in 'llama-3' to TOML",
            'Quote the name: [models."llama-3.1"]',
        ),
        '[models."llama-3.1"]\nsource = "@llama"\n' + MODEL,
    ),
    "an inline table of several lines": Case(
        MODEL + "quantize = {\n  bits = 4,\n}",
        ("models.toml is not TOML", "The { in line 3 is not closed", "[models.a.quantize]"),
        MODEL + "[models.a.quantize]\nbits = 4",
    ),
    "mode": setting(
        'quantize = { mode = "mxpf4" }', "mode is 'mxpf4'; valid: affine, mxfp4, mxfp8, nvfp4.",
        "Did you mean 'mxfp4'?", right='quantize = { mode = "mxfp4" }',
    ),
    "recipe": setting(
        'quantize = { recipe = "mixed_36" }',
        "recipe is 'mixed_36'; valid: mixed_2_6, mixed_3_4, mixed_3_5, mixed_3_6, mixed_3_8, ",
        "Did you mean 'mixed_3_6'?", right='quantize = { recipe = "mixed_3_6" }',
    ),
    "bits": setting(
        "quantize = { bits = 16 }", "bits is 16; mode 'affine' takes 1, 2, 3, 4, 5, 6, 8. Use 8",
        right="quantize = { bits = 8 }",
    ),
    "bits of a mode": setting(
        'quantize = { mode = "mxfp8", bits = 4 }', "bits is 4; mode 'mxfp8' takes 8. Use 8",
        right='quantize = { mode = "mxfp8", bits = 8 }',
    ),
    "bits of a rule's mode": setting(
        'quantize = { rules = [{ match = "*", mode = "nvfp4", bits = 3 }] }',
        "quantize.rules[0].bits is 3; mode 'nvfp4' takes 4. Use 4",
        right='quantize = { rules = [{ match = "*", mode = "nvfp4", bits = 4 }] }',
    ),
    "group size": setting(
        "quantize = { group_size = 60 }", "group_size is 60; mode 'affine' takes 32, 64, 128.",
        "Use 64", right="quantize = { group_size = 64 }",
    ),
    "group size of a mode": setting(
        'quantize = { mode = "nvfp4", group_size = 64 }',
        "group_size is 64; mode 'nvfp4' takes 16. Use 16",
        right='quantize = { mode = "nvfp4", group_size = 16 }',
    ),
    "a size's unit": setting(
        'max_shard_size = "512 mib"', "max_shard_size is '512 mib', which is no size",
        "units are kB, MB, GB, KiB, MiB, GiB.", 'Write "512 MiB"',
        right='max_shard_size = "512 MiB"',
    ),
    "a size below zero": setting(
        "max_shard_size = -1", "is -1, which is no size", 'Write "2GiB"',
        right='max_shard_size = "2GiB"',
    ),
    "a size of nothing": setting('max_shard_size = "0.9B"', "is '0.9B': no room for a tensor"),
    # Sources
    "no source": Case(
        "[models.a]\n",
        ('models.toml:1: models.a has no source. Add source = "FOLDER", relative to this file',),
        MODEL,
    ),
    "source of nobody": target(
        '[models.a]\nsource = "~nobody-of-that-name/b"',
        "models.a.source is '~nobody-of-that-name/b', but there is no such user", line=2,
    ),
    "source with NUL": target(
        '[models.a]\nsource = "a\\u0000"', "models.a.source is 'a\\x00', which no", line=2
    ),
    "cache dir a file": target(
        '[cache]\ndir = "models.toml/cache"\n' + MODEL, "cache.dir is ", "models.toml is a file",
        line=2,
    ),
}  # fmt: skip
# What goes the same way as far as doit is concerned: without it, to save time.
MORE_TOML = {
    # Wrong types
    "models no table": target("models = 5", "models is 5, must be a table"),
    "models a list": target("[[models]]", "models is [{}], must be a table"),
    "model no table": target("[models]\na = true", "models.a is true, must be a table", line=2),
    "variants no table": setting("variants = 'b'", "variants is 'b', must be a table"),
    "cache dir no text": target("[cache]\ndir = 5", "cache.dir is 5, must be a string", line=2),
    "source no text": target("[models.a]\nsource = 5", "a.source is 5, must be a string", line=2),
    "quantize true": setting(
        "quantize = true",
        'quantize is true, must be a table such as { bits = 4 }, "keep" or false',
        right="quantize = { bits = 4 }",
    ),
    "bits text": setting(
        'quantize = { bits = "4" }', "quantize.bits is '4', must be a whole number",
        right="quantize = { bits = 4 }",
    ),
    "bits a float": setting("quantize = { bits = 4.0 }", "bits is 4.0, must be a whole number"),
    "rules no list": setting(
        'quantize = { rules = { match = "*" } }', "quantize.rules is {'match': '*'}, must be a list"
    ),
    "a rule no table": setting("quantize = { rules = [8] }", "quantize.rules is [8], must be a"),
    "skip no boolean": setting(
        'quantize = { rules = [{ match = "*", skip = "yes" }] }',
        "quantize.rules[0].skip is 'yes', must be true or false",
        right='quantize = { rules = [{ match = "*", skip = true }] }',
    ),
    "size a float": setting("max_shard_size = 1.5", 'is 1.5, must be bytes or a size such as "2G'),
    # What does not go together
    "recipe and mode": setting(
        'quantize = { recipe = "mixed_3_6", mode = "mxfp4" }',
        "quantize has recipe 'mixed_3_6' with mode 'mxfp4'. Drop one",
        right='quantize = { mode = "mxfp4" }',
    ),
    "rule without match": setting(
        "quantize = { rules = [{ bits = 6 }] }",
        'quantize.rules[0] has no match. Add match = "*.mlp.down_proj"',
        right='quantize = { rules = [{ match = "*.mlp.down_proj", bits = 6 }] }',
    ),
    "rule that says nothing": setting(
        'quantize = { rules = [{ match = "lm_head" }] }',
        "quantize.rules[0] ('lm_head') changes nothing. Add bits, group_size, mode, dtype or skip",
        right='quantize = { rules = [{ match = "lm_head", skip = true }] }',
    ),
    "rule that says both": setting(
        'quantize = { rules = [{ match = "lm_head", skip = true, bits = 6 }] }',
        "quantize.rules[0] ('lm_head') skips and quantizes. Drop skip or the rest",
        right='quantize = { rules = [{ match = "lm_head", bits = 6 }] }',
    ),
    # Names
    "name with /": target('[models."a/b"]', 'models."a/b" makes the target', "'a/b'", NO_NAME),
    "name ..": target('[models.".."]', "target name '..', which is", NO_NAME),
    "name with =": target('[models."a=b"]', "target name 'a=b'", NO_NAME),
    "name with a space": target('[models."a b"]', "target name 'a b'", NO_NAME),
    "name with :": target('[models."a:b"]', "target name 'a:b'", NO_NAME),
    "name of nothing": target('[models.""]', "target name ''", NO_NAME),
    "name of a variant": target(
        MODEL + '[models.a.variants."../b"]', "target name 'a-../b'", NO_NAME, line=3
    ),
    "name too long": target(f"[models.{'a' * 201}]", "201 bytes, more than 200. Use a shorter"),
    "names but for case": target(
        MODEL + '[models.A]\nsource = "b"', "models.A would be a second build/A (the first is 'a')",
        "Rename the model or the variant", line=3,
    ),
    "model and variant": target(
        MODEL + "[models.a.variants.b]\n" + MODEL.replace("models.a", "models.a-b"),
        "models.a-b would be a second build/a-b. Rename", line=4,
    ),
    "variants of two models": target(
        MODEL + "[models.a.variants.b-c]\n" + MODEL.replace("models.a", "models.a-b")
        + "[models.a-b.variants.c]",
        "models.a-b.variants.c would be a second build/a-b-c. Rename", line=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOML.values(), ids=TOML)
def test_models_toml(project: Project, case: Case) -> None:
    project.says(case.toml)
    project.refuses(*case.words)
    if case.mended:
        project.says(case.mended)
        assert project.loads().plans.keys() >= {"a"}


@pytest.mark.parametrize("case", MORE_TOML.values(), ids=MORE_TOML)
def test_models_toml_as_doit_reads_it(project: Project, case: Case) -> None:
    project.says(case.toml)
    with pytest.raises(InvalidDodoFile) as refusal:  # of which doit prints the message
        project.loads()
    assert [word for word in case.words if word not in str(refusal.value)] == []
    if case.mended:
        project.says(case.mended)
        assert project.loads().plans.keys() >= {"a"}


def test_no_models_toml(tmp_path: Path) -> None:
    """Nor is any state left where somebody typed doit in the wrong folder."""
    said = output(doit(tmp_path, expect=3))
    assert f"{tmp_path}/models.toml does not exist" in said
    assert '[models.NAME]\n    source = "FOLDER OF THE CHECKPOINT"' in said
    assert "doit models=PATH" in said
    assert [*tmp_path.iterdir()] == []


def test_models_toml_is_a_folder(project: Project) -> None:
    (project.folder / "models.toml").mkdir()
    project.refuses("models.toml cannot be read", "Is a directory")


@pytest.mark.parametrize("command", ["list", "info pack:a", "clean", "pack:a", "forget"])
def test_every_command_says_it(project: Project, command: str) -> None:
    project.says(MODEL + "bits = 4")
    before = project.content()
    said = output(doit(project.folder, *command.split(), expect=3))
    assert "models.toml:3: models.a.bits is an unknown key" in said
    assert "Traceback" not in said
    assert project.content() == before


# What goes with the checkpoint, or with the machine, and what does not


MODULES = "There are model.embed_tokens, model.layers.0.self_attn.q_proj, "
PLANS = {
    "no such source": Case(
        '[models.b]\nsource = "nowhere"',
        ("b: source ", "/nowhere does not exist. Name the checkpoint's folder."),
    ),
    "a source's name too long": Case(
        f'[models.a]\nsource = "{"a" * 999}"', ("aaa does not exist. Name the checkpoint's",)
    ),
    "source a file": Case(
        '[models.a]\nsource = "models.toml"',
        ("models.toml is a file. Name the folder of a checkpoint",),
    ),
    "source without checkpoint": Case(
        '[models.a]\nsource = "."',
        ("holds no checkpoint (it has ", "build, models.toml): expected consolidated.NN.pth"),
    ),
    "loader of another": Case(
        MODEL + 'loader = "llama"', ("/llama has no consolidated.NN.pth. Name the folder",), MODEL
    ),
    "loader of the other": Case(
        MODEL.replace("llama", "meta") + 'loader = "transformers"',
        ("meta/config.json is missing: it names the architecture",),
        MODEL.replace("llama", "meta"),
    ),
    "rule that matches nothing": Case(
        MODEL + 'quantize = { rules = [{ match = "lm_haed", bits = 6 }] }',
        ("a: rule 'lm_haed' matches no module", MODULES, "'*' matches any run of characters"),
        MODEL + 'quantize = { rules = [{ match = "lm_*", bits = 6 }] }',
    ),
    "rule for what has no bits": Case(
        MODEL + 'quantize = { rules = [{ match = "*.input_layernorm", bits = 6 }] }',
        ("a: rule '*.input_layernorm' matches no module that can be quantized", MODULES),
        MODEL + 'quantize = { rules = [{ match = "*.input_layernorm", dtype = "float32" }] }',
    ),
    "dtype of what matches nothing": Case(
        MODEL + 'quantize = { rules = [{ match = "model.nrom", dtype = "float32" }] }',
        ("a: rule 'model.nrom' matches no module. There are", "near is 'model.norm'"),
    ),
    "rule behind another": Case(
        MODEL
        + 'quantize = { rules = [{ match = "*", bits = 6 }, { match = "lm_head", bits = 8 }] }',
        ("a: rule 'lm_head' is for no module", "all that it matches have '*' before it"),
        MODEL
        + 'quantize = { rules = [{ match = "lm_head", bits = 8 }, { match = "*", bits = 6 }] }',
    ),
    "rule behind one of a dtype": Case(
        MODEL
        + 'quantize.rules = [{ match = "*", dtype = "float32" }, { match = "*head", bits = 8 }]',
        ("a: rule '*head' is for no module", "all that it matches have '*' before it"),
    ),
    "recipe on a model without down_proj": Case(
        MODEL.replace("llama", "starcoder2") + 'quantize = { recipe = "mixed_3_6" }',
        ("a: recipe 'mixed_3_6' does not fit the model", "expected keys", "Use bits instead"),
        MODEL.replace("llama", "starcoder2") + "quantize = { bits = 4 }",
    ),
    "mlx-examples of no Llama": Case(
        MODEL.replace("llama", "qwen3") + 'layout = "mlx-examples"',
        ("qwen3 is a qwen3; layout mlx-examples is for Llama only", 'Use layout = "mlx-lm"'),
        MODEL.replace("llama", "qwen3") + 'layout = "mlx-lm"',
    ),
    "mlx-examples of a scaled Llama": Case(
        MODEL.replace("llama", "llama-tied") + 'layout = "mlx-examples"',
        ("llama-tied scales its rotary embedding", "'rope_type': 'llama3'", 'layout = "mlx-lm"'),
        MODEL.replace("llama", "llama-tied") + 'layout = "mlx-lm"',
    ),
    "mlx-examples without tokenizer.model": Case(
        MODEL + 'layout = "mlx-examples"',
        ("llama/tokenizer.model is missing: mlx-examples' llama.py reads no other", "mlx-lm"),
        MODEL + 'layout = "mlx-lm"',
    ),
    "mlx-examples with rules": Case(
        MODEL.replace("llama", "meta")
        + 'layout = "mlx-examples"\nquantize = { rules = [{ match = "output", bits = 8 }] }',
        ("quantize.rules are not possible in layout mlx-examples", "Drop the rules, or use layout"),
        MODEL.replace("llama", "meta") + 'layout = "mlx-examples"\nquantize = { bits = 8 }',
    ),
    "mlx-examples with a recipe": Case(
        MODEL.replace("llama", "meta")
        + 'layout = "mlx-examples"\nquantize = { recipe = "mixed_3_6" }',
        ("recipe 'mixed_3_6' does not fit the model: mlx-examples'", "Use bits instead"),
        MODEL.replace("llama", "meta") + 'layout = "mlx-examples"\nquantize = { bits = 4 }',
    ),
}


@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_plan(project: Project, case: Case) -> None:
    project.says(case.toml)
    project.refuses(*case.words)
    if case.mended:
        project.says(case.mended)
        assert project.loads().plans.keys() >= {"a"}


def test_what_is_found_out_later_has_its_line_too(project: Project) -> None:
    """Where the file asks for it: of a missing source, at least the model's line."""
    project.says(MODEL + '[models.b]\nsource = "nowhere"')
    project.refuses("models.toml:3: ", "b: source ", asked=["b"])


def test_an_empty_source(project: Project) -> None:
    (project.folder / "checkpoint").mkdir()
    project.says('[models.a]\nsource = "checkpoint"')
    project.refuses("checkpoint is empty: expected consolidated.NN.pth", "*.safetensors")


def test_a_source_of_two_kinds(project: Project) -> None:
    folder = project.copies("meta")
    shutil.copytree(project.shared / "llama", folder, dirs_exist_ok=True)
    project.refuses(
        "holds checkpoints of 2 kinds", 'Say which: loader = "llama" or loader = "transformers"'
    )
    for loader in "llama", "transformers":
        project.says(f'[models.a]\nsource = "checkpoint"\nloader = "{loader}"')
        assert "a" in project.loads().plans


@pytest.mark.parametrize(
    ("settings", "mend"),
    [
        ("group_size = 128", "Set group_size = 64, or use"),
        ("bits = 4, group_size = 128", "Set group_size = 64, or use"),
    ],
)
def test_mlx_examples_of_a_width_no_group_divides(
    project: Project, settings: str, mend: str
) -> None:
    """Llama's down_proj has 192 inputs, which 64 divides, and 80 of llama-odd's nothing does."""
    layout = 'layout = "mlx-examples"\n'
    folder = project.copies("llama", layout + f"quantize = {{ {settings} }}")
    shutil.copy(project.shared / "meta" / "tokenizer.model", folder)
    project.refuses(
        "layers.0.feed_forward.w2: last axis 192 is not a multiple of group_size 128", mend
    )
    mended = settings.replace("128", "64")
    project.says(f'[models.a]\nsource = "checkpoint"\n{layout}quantize = {{ {mended} }}')
    doit(project.folder)


def test_mlx_examples_of_a_width_that_nothing_divides(project: Project) -> None:
    settings = "quantize = { bits = 4 }"
    folder = project.copies("llama-odd", f'layout = "mlx-examples"\n{settings}')
    shutil.copy(project.shared / "meta" / "tokenizer.model", folder)
    said = project.refuses("tok_embeddings: last axis 80 is not a multiple", 'layout = "mlx-lm"')
    assert "Set group_size" not in said
    project.says(f'[models.a]\nsource = "checkpoint"\nlayout = "mlx-lm"\n{settings}')
    doit(project.folder)


def test_mlx_examples_of_a_scaled_meta_llama(project: Project) -> None:
    folder = project.copies("meta", 'layout = "mlx-examples"')
    edited("params.json", use_scaled_rope=True)(folder)
    project.refuses("scales its rotary embedding (use_scaled_rope)", 'Use layout = "mlx-lm"')


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", ...), ("num_hidden_layers", 2.5), ("rope_scaling", "linear")],
)
def test_mlx_examples_of_a_damaged_config_json(project: Project, key: str, value: object) -> None:
    folder = project.copies("llama", 'layout = "mlx-examples"')
    shutil.copy(project.shared / "meta" / "tokenizer.model", folder)
    edited("config.json", **{key: value})(folder)
    project.refuses("a: ", "config.json")


def test_mlx_examples_of_a_wrong_shape(project: Project) -> None:
    """llama.py would fail on it, or speak nonsense."""
    folder = project.copies("llama", 'layout = "mlx-examples"')
    shutil.copy(project.shared / "meta" / "tokenizer.model", folder)
    mlx_edited(lambda tensors: tensors.update({DOWN: tensors[DOWN].T}))(folder)
    project.refuses("a: ", "layers.0.feed_forward.w2.weight", "(192, 128)", "(128, 192)")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize("settings", ["", "quantize = { bits = 4 }\n"])
def test_no_gpu(project: Project, settings: str) -> None:
    project.says(MODEL + settings + 'device = "gpu"')
    project.refuses(
        'a: device = "gpu", but MLX finds no GPU', 'Use device = "cpu", or leave it out'
    )
    for mended in ('device = "cpu"', ""):
        project.says(MODEL + settings + mended)
        assert "a" in project.loads().plans


# Checkpoints: files that are missing, damaged, or of another model


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: float) -> Callable[[Path], None]:
    """Cut a file to a number of bytes, or to a part of what it has."""

    def truncate(folder: Path) -> None:
        whole = (folder / name).stat().st_size
        os.truncate(folder / name, int(size * whole if isinstance(size, float) else size))

    return truncate


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Change a JSON file's keys; one that becomes `...` is removed."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / name).write_text(json.dumps(content))

    return edit


def torch_edited(
    edit: Callable[[dict[str, torch.Tensor]], object], *ranks: int
) -> Callable[[Path], None]:
    """Change some ranks' tensors, of all if none is named."""

    def change(folder: Path) -> None:
        for rank in ranks or (0, 1):
            path = folder / f"consolidated.{rank:02}.pth"
            tensors = torch.load(path, weights_only=True)
            edit(tensors)
            torch.save(tensors, path)

    return change


def mlx_edited(edit: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    """Change the tensors of the first safetensors file."""

    def change(folder: Path) -> None:
        path = next(iter(sorted(folder.glob("*.safetensors"))))
        tensors = dict(mx.load(str(path)))
        mx.eval(tensors)
        edit(tensors)
        path.unlink()
        mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})

    return change


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


@dataclass(frozen=True)
class Damage:
    """What was done to a copy of a checkpoint, and what doit says of it."""

    source: str
    do: Callable[[Path], object]
    words: tuple[str, ...]


ST, BIN = "model-{:05}-of-00003.safetensors".format, "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
PTH = "consolidated.{:02}.pth".format
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 774228\n"
NORM, DOWN, WQ = (
    "norm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "layers.0.attention.wq.weight",
)
ANOTHER = "A shard is missing, or params.json is of another model."

DAMAGES = {
    # Missing
    "no params.json": Damage(
        "meta", without("params.json"), ("params.json is missing: it gives the model's", "Fetch it")
    ),
    "no config.json": Damage(
        "llama", without("config.json"), ("config.json is missing: it names the arch", "Fetch it")
    ),
    "no tokenizer.model": Damage(
        "meta", without("tokenizer.model"), ("tokenizer.model is missing. Meta ships it", "copy it")
    ),
    "no tokenizer": Damage(
        "llama", without("tokenizer.json", "tokenizer_config.json"),
        ("has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, …)", "Fetch it"),
    ),
    "a shard less": Damage(
        "llama", both(without(ST(1), INDEX)),
        (f"{ST(1)} is missing (there are {ST(2)}, {ST(3)}). Fetch",),
    ),
    "a shard of the index less": Damage(
        "llama", without(ST(2)), (f"{ST(2)} is missing (1 of the 3 files that {INDEX} names)",)
    ),
    "a shard that is a link to nowhere": Damage(
        "llama",
        both(without(ST(3), INDEX), lambda folder: (folder / ST(3)).symlink_to("nowhere")),
        (f"{ST(3)} cannot be read: No such file or directory: it is a link to nowhere. Put",),
    ),
    "the first of Meta's shards less": Damage(
        "meta", without(PTH(0)), (f"{PTH(0)} is missing (there are {PTH(1)}). Fetch",)
    ),
    "the last of Meta's shards less": Damage(
        "meta", without(PTH(1)), ("is (512, 128) in each of 1 shards", ANOTHER)
    ),
    "one of two kinds of rows": Damage(
        "llama",
        both(
            without(INDEX),
            lambda f: shutil.copy(f / ST(1), f / "model-00001-of-00004.safetensors"),
        ),
        (
            "model-00002-of-00004.safetensors is missing (there are model-00001-of-00004",
            "a row of 00003, and no index says which of them are the model's. Fetch the index",
        ),
    ),
    # Small files
    "config.json no JSON": Damage(
        "llama", written("config.json", b"{"), ("config.json is no JSON: ", "line 1 column 2")
    ),
    "config.json no object": Damage(
        "llama", written("config.json", b"[]"), ("config.json is no JSON object. Fetch it again.",)
    ),
    "config.json no text": Damage(
        "llama", written("config.json", b"\xff"), ("config.json cannot be read: 'utf-8'",)
    ),
    "no model_type": Damage(
        "llama", edited("config.json", model_type=...), ("config.json has no model_type",)
    ),
    "index no JSON": Damage(
        "llama", both(without(ST(2)), written(INDEX, b"}")), (f"{INDEX} is no JSON: ",)
    ),
    "index of nothing": Damage(
        "llama", both(without(ST(2)), edited(INDEX, weight_map={"a": 1})),
        (f"{INDEX} has no weight_map", "Fetch it"),
    ),
    "params.json no JSON": Damage(
        "meta", written("params.json", b""), ("params.json is no JSON: ", "Fetch it again.")
    ),
    "params.json of other things": Damage(
        "meta", edited("params.json", n_layers=4.5),
        ("params.json: n_layers is 4.5, must be a whole number over 0.",),
    ),
    # Weight files
    ".pth cut": Damage("meta", cut(PTH(1), 0.5), (f"{PTH(1)} is damaged or incomplete: ", "Fetch")),
    ".bin cut": Damage("bin", cut(BIN, 0.9), (f"{BIN} is damaged or incomplete: ", "Fetch it")),
    ".safetensors cut in its header": Damage(
        "llama", cut(ST(1), 700),
        (f"{ST(1)} is damaged or incomplete: its header should have 1,", "the file has 700."),
    ),
    ".safetensors cut in its data": Damage(
        "llama", cut(ST(2), 400_000),
        (f"{ST(2)} is damaged or incomplete: its tensors end at byte 428,235, ", "at 400,000"),
    ),
    ".safetensors of noise": Damage(
        "llama", written(ST(3), random.Random(0).randbytes(999)),
        (f"{ST(3)} is damaged or incomplete: its header should have", "the file has 999. Fetch it"),
    ),
    ".safetensors a pointer": Damage(
        "llama", written(ST(3), LFS), (f"{ST(3)} is a Git LFS pointer, not", "Run git lfs pull")
    ),
    # Of another model
    "params.json of a wider model": Damage(
        "meta", edited("params.json", dim=512),
        ("is (512, 128) in each of 2 shards, which make no (512, 512), the shape that", ANOTHER),
    ),
    "params.json of other heads": Damage(
        "meta", edited("params.json", n_kv_heads=4),
        ("attention.wk.weight is (32, 256) in each of 2 shards, which make no (128, 256)", ANOTHER),
    ),
    "params.json of a deeper model": Damage(
        "meta", edited("params.json", n_layers=32),
        ("params.json says n_layers = 32, the weight files have 4 layers.",),
    ),
    "a tensor less in all shards": Damage(
        "meta", torch_edited(lambda tensors: tensors.pop(WQ)),
        (f"{PTH(0)}: {WQ} is missing (1 such).",),
    ),
    "a tensor less in one": Damage(
        "meta", torch_edited(lambda tensors: tensors.pop(NORM), 1),
        (f"{PTH(1)}: {NORM} is missing (1 such).",),
    ),
    "a tensor more": Damage(
        "meta", torch_edited(lambda tensors: tensors.update(more=torch.ones(3))),
        (f"{PTH(0)}: more is no tensor of such a Llama (1 such).",),
    ),
    "shards of two dtypes": Damage(
        "meta", torch_edited(lambda tensors: tensors.update({NORM: tensors[NORM].float()}), 1),
        (f"shards disagree on {NORM}: {PTH(0)} bfloat16 (256,), {PTH(1)} float32 (256,).",),
    ),
    "shards of two shapes": Damage(
        "meta", torch_edited(lambda tensors: tensors.update({WQ: tensors[WQ][1:].clone()}), 1),
        (f"shards disagree on {WQ}: {PTH(0)} bfloat16 (128, 256), {PTH(1)} bfloat16 (127, 256).",),
    ),
    "a tensor in two files": Damage(
        "llama",
        both(without(INDEX), lambda f: shutil.copy(f / ST(1), f / "model.safetensors")),
        (f"embed_tokens.weight is both in {ST(1)} and in model.safetensors", "Move the file"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_checkpoint(project: Project, damage: Damage) -> None:
    damage.do(project.copies(damage.source))
    project.refuses("a: ", str(project.folder / "checkpoint"), *damage.words)


def test_an_unknown_architecture(project: Project) -> None:
    edited("config.json", model_type="lama")(project.copies("llama"))
    said = project.refuses("a: ", "Model type lama not supported")
    assert "pip install" in said  # a newer mlx-lm may know it


def test_what_another_library_has_a_class_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told with the layout, and with the extra where that is not installed."""
    edited("config.json", model_type="xlm-roberta")(project.copies("llama"))
    monkeypatch.setattr(asking, "find_spec", lambda name: None)
    project.refuses(
        "mlx-lm ", "Model type xlm-roberta not supported",
        "layout = \"mlx-embeddings\" (pip install 'mlx-make[embeddings]') has a class for it.",
    )  # fmt: skip


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.update({"model.layers.0.more.weight": mx.ones(3)}),
        lambda tensors: tensors.pop(DOWN),
        lambda tensors: tensors.update({DOWN: tensors[DOWN].T}),
    ],
    ids=["a tensor more", "a tensor less", "a tensor of another shape"],
)
def test_what_mlx_lm_refuses(project: Project, edit: Callable[[dict], object]) -> None:
    """As mlx_lm.convert does, word for word, on one line."""
    from mlx_lm.convert import convert

    folder = project.copies("llama")
    mlx_edited(edit)(folder)
    with pytest.raises(ValueError, match=r"(?s)parameter.*model\.layers\.0\.m") as refusal:
        convert(str(folder), str(project.folder / "converted"))
    project.refuses("a: ", " ".join(str(refusal.value).split()))


FORGED = "x\x1b[2J\r\x9b1A\u202e\nERROR: forged"


@pytest.mark.parametrize(
    "damage",
    [
        mlx_edited(lambda tensors: tensors.update({f"model.layers.0.{FORGED}": mx.ones(3)})),
        edited("config.json", model_type=FORGED),
        both(
            without("config.json"),
            written(
                "adapter_config.json", json.dumps({"base_model_name_or_path": FORGED}).encode()
            ),
        ),
    ],
    ids=["tensor", "architecture", "adapter"],
)
def test_no_checkpoint_writes_on_the_terminal(
    project: Project, damage: Callable[[Path], object]
) -> None:
    """Nor forges a line of ours: what it says is shown as ASCII spells it."""
    damage(project.copies("llama"))
    for command in "run", "plan":
        said = output(doit(project.folder, command, expect=3))
        assert "x\\x1b[2J" in said
        assert [line for line in said.splitlines() if not line.isprintable()] == []
        assert [line for line in said.splitlines() if line.startswith("ERROR: forged")] == []


def test_what_mlx_lm_leaves_out_is_said(project: Project) -> None:
    """Gemma 3's images: of the checkpoint's tensors, mlx_lm.convert drops them too."""
    checkpoints.make("gemma3", project.folder / "checkpoint")
    (project.folder / "checkpoint" / "preprocessor_config.json").write_text("{}")
    project.says('[models.a]\nsource = "checkpoint"')
    said = output(doit(project.folder))
    note, files = [line for line in said.splitlines() if line.startswith("note: ")]
    assert files.endswith('layout = "mlx-vlm" keeps them (preprocessor_config.json)')
    assert "tensors of what the model sees and hears with left out" in note
    assert "multi_modal_projector." in note
    assert 'as mlx_lm.convert does: layout = "mlx-vlm" keeps' in note


def test_files_that_the_index_does_not_name_are_said(project: Project) -> None:
    folder = project.copies("llama")
    shutil.copy(folder / ST(1), folder / "model-old.safetensors")
    said = output(doit(project.folder))
    assert f"note: a: model-old.safetensors left out: not in {INDEX}\n" in said


def test_shards_that_disagree_on_a_norm(project: Project) -> None:
    """It shows when the norm is read: no model is packed of it, and what is done is kept."""
    folder = project.copies("meta")
    good = (folder / PTH(1)).read_bytes()
    name = "layers.2.ffn_norm.weight"
    torch_edited(lambda tensors: tensors.update({name: tensors[name] * 2}), 1)(folder)
    said = project.refuses("unshard:a:layers.2: ", "shards disagree on ", status=1)
    assert "post_attention_layernorm.weight, which each holds whole" in said
    (folder / PTH(1)).write_bytes(good)
    assert "unshard:a:layers.2" in doit(project.folder).computed


def test_a_build_outlives_its_checkpoint(project: Project) -> None:
    """And nothing is left to do once the checkpoint is back."""
    folder = project.copies("llama", "quantize = { bits = 4 }")
    doit(project.folder)
    for damage in without("config.json"), cut(ST(2), 0.5), edited("config.json", model_type=...):
        copy = shutil.copytree(folder, project.folder / "aside")
        damage(folder)
        project.refuses("a: ", str(folder))
        shutil.rmtree(folder)
        copy.rename(folder)
    assert doit(project.folder).computed == set()


# Files that are damaged anywhere. Not through the front door: there are too many of them.


def small_files(folder: Path) -> list[Path]:
    """A few small tensors in each format."""
    tensors = {
        "a.weight": torch.arange(12.0).reshape(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.arange(64.0).reshape(8, 8)[:, ::2],  # not contiguous
    }
    torch.save(tensors, folder / "zip.pth")
    torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "a.safetensors")
    return [folder / "zip.pth", folder / "legacy.pth", folder / "a.safetensors"]


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual files are read; what needs it says so when the file is looked into."""
    views, legacy, _ = small_files(tmp_path)
    usual = tmp_path / "usual.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, usual)
    with_torch = torch_file.read(usual)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_file.read(usual) == with_torch
    for path in (views, legacy):
        with pytest.raises(CheckpointError, match=re.escape("pip install 'mlx-make[torch]'")):
            torch_file.read(path)


@pytest.mark.parametrize("number", range(3), ids=["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere(tmp_path: Path, number: int) -> None:
    path = small_files(tmp_path)[number]
    data = path.read_bytes()
    # torch takes a millisecond for each, and may read a zip file that lacks its last bytes.
    for size in range(0, len(data), 1 if path.suffix == ".safetensors" else 7):
        path.write_bytes(data[:size])
        # Cut within the name of what it calls, the older format seems to call something else.
        with pytest.raises(CheckpointError, match=r" is (damaged or incomplete|refused): "):
            loaded(path)


@pytest.mark.parametrize("number", range(3), ids=["zip", "legacy", "safetensors"])
def test_a_file_spoiled_anywhere(tmp_path: Path, number: int) -> None:
    """It is read, if only data or names were hit, or refused; nothing else ever happens."""
    path = small_files(tmp_path)[number]
    data, generator = path.read_bytes(), random.Random(number)
    refused = []
    for _ in range(400):
        spoiled = bytearray(data)
        for _ in range(generator.choice([1, 1, 1, 2, 8])):
            spoiled[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(spoiled)
        try:
            for tensor in loaded(path):
                assert tensor.offset + tensor.nbytes <= len(data)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(str(path) in said for said in refused)


def loaded(path: Path) -> list[Stored]:
    found = headers([path], NoMemos(path.parent))
    return found[path.name][1]


class NoMemos(Memos):
    """Remembers nothing: a file written twice in one tick of the clock looks unchanged."""

    def get(self, kind: str, question: object, shape: object = None) -> None:
        return None

    def put(self, kind: str, question: object, answer: object) -> None:
        pass


def test_a_file_of_gaps_or_overlaps(tmp_path: Path) -> None:
    """As the safetensors library: each byte of the data belongs to just one tensor."""

    def file(*offsets: tuple[int, int], size: int = 8) -> Path:
        header = {
            f"t{i}": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            for i, (start, end) in enumerate(offsets)
        }
        raw = json.dumps(header).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
        return path

    assert [t.name for t in safetensors_file.read(file((4, 8), (0, 4)))] == ["t0", "t1"]
    for offsets in [(0, 4), (5, 8)], [(0, 5), (4, 8)], [(1, 8)], [(-4, 4), (4, 8)]:
        with pytest.raises(CheckpointError, match="is damaged or incomplete"):
            safetensors_file.read(file(*offsets))
    with pytest.raises(CheckpointError, match=r"end at byte [\d,]+, the file at"):
        safetensors_file.read(file((0, 8), size=7))
    # What comes after the last tensor is nobody's: mx.load takes such a file.
    assert [t.name for t in safetensors_file.read(file((0, 8), size=9))] == ["t0"]
    assert [*mx.load(str(file((0, 8), size=9)))] == ["t0"]


# Pickles that would run code


class Code:
    """What pickles as a call of `os.system` that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def with_code(kind: str, path: Path, mark: Path) -> None:
    """Spoil a torch.save file; in some kinds the code is deep within."""
    tensors = torch.load(path, weights_only=True)
    code: object = Code(mark)
    if kind == "bare":
        path.write_bytes(pickle.dumps(code, protocol=2))
        return
    if kind != "plain":
        code = {"state": [torch.ones(1), ({"deeper": (code,)},)]}
    torch.save({**tensors, "more": code}, path, _use_new_zipfile_serialization=kind != "legacy")


REFUSED = "is refused: its pickle asks for more than tensors (posix.system), which would run"


@pytest.mark.parametrize(
    ("source", "file", "kind"),
    [("meta", PTH(0), "nested"), ("meta", PTH(1), "legacy"), ("bin", BIN, "plain")],
)
def test_code_is_refused(project: Project, source: str, file: str, kind: str) -> None:
    mark = project.folder / "ran"
    with_code(kind, project.copies(source) / file, mark)
    project.refuses(f"{file} {REFUSED}", "nothing of it was run", "safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["plain", "nested", "legacy", "bare"])
def test_code_is_not_run(tmp_path: Path, kind: str) -> None:
    path = small_files(tmp_path)[0]
    with_code(kind, path, tmp_path / "ran")
    with pytest.raises(CheckpointError, match=re.escape(REFUSED)):
        torch_file.read(path)
    assert not (tmp_path / "ran").exists()
    # That the test would see it run:
    if kind == "bare":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_is_no_dict_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for nothing in (b"", bytes(1000), b"<!DOCTYPE html>"):  # torch advises to trust them
        path.write_bytes(nothing)
        said = "damaged or incomplete: " + ("a web page" if b"<" in nothing else "it ")
        with pytest.raises(CheckpointError, match=said) as error:
            torch_file.read(path)
        assert "weights_only" not in str(error.value)
    for content, words in (
        ({"model": {"a": torch.ones(1)}}, "no plain dict of tensors: 'model' is a dict"),
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        ({"a": torch.ones(1, dtype=torch.float64)}, "a has dtype float64, which MLX does not have"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a has dtype float32 \\(torch.sparse_coo\\)"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words):
            torch_file.read(path)


# Weights that no quantized weight can show


SPECIALS = {
    "model.layers.0.self_attn.o_proj.weight": math.nan,
    "model.layers.0.mlp.down_proj.weight": math.inf,
    "model.layers.1.self_attn.o_proj.weight": -math.nan,
    "model.layers.1.mlp.down_proj.weight": -math.inf,
}


def with_special(folder: Path, values: Mapping[str, float], *, at: int = -1) -> None:
    """Write a value into some tensors of a checkpoint, the last of each if not said otherwise."""
    for path in folder.glob("*.safetensors"):
        tensors = dict(mx.load(str(path)))
        mx.eval(tensors)
        for name in tensors.keys() & values.keys():
            shape, dtype = tensors[name].shape, tensors[name].dtype
            flat = tensors[name].reshape(-1)
            flat[at] = values[name]
            if math.copysign(1, values[name]) < 0 and math.isnan(values[name]):
                flat[at] = -mx.array(math.nan, dtype)
            tensors[name] = flat.reshape(shape)
        mx.eval(tensors)
        path.unlink()
        mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})


def warned(said: str) -> set[str]:
    """The tensors that are said to hold NaN or infinity, each once."""
    names = re.findall(r"^note: \S+: (\S+) holds NaN or infinity", said, re.MULTILINE)
    assert len(names) == len(set(names))
    return set(names)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [("llama-odd", "float32"), ("llama-tied", "float16"), ("llama", "bfloat16")],
)
def test_not_finite(project: Project, source: str, dtype: str) -> None:
    """The build succeeds, and names the tensors; not those of the largest numbers there are."""
    folder = project.copies(source, "quantize = { bits = 4 }")
    with_special(folder, SPECIALS, at=-7)
    with_special(folder, {"model.norm.weight": math.inf})  # not to be quantized
    said = output(doit(project.folder))
    assert warned(said) == SPECIALS.keys()
    assert doit(project.folder).entries == []

    largest = float(mx.finfo(getattr(mx, dtype)).max)
    signs = (1, -1, 1, -1)
    with_special(folder, dict(zip(SPECIALS, (s * largest for s in signs), strict=True)), at=-7)
    with_special(folder, {next(iter(SPECIALS)): -math.nan}, at=0)
    doit(project.folder, "lock")
    assert warned(output(doit(project.folder))) == {next(iter(SPECIALS))}


def test_not_finite_by_a_cast(project: Project) -> None:
    """1e6 is finite in float32 and infinite in float16, whatever the mode."""
    name = "model.layers.1.mlp.down_proj.weight"
    folder = project.copies(
        "llama-odd",
        'quantize = { mode = "mxfp8" }\n[models.a.variants.half]\ndtype = "float16"',
    )
    with_special(folder, {name: -1e6})
    assert warned(output(doit(project.folder, "pack:a"))) == set()
    assert warned(output(doit(project.folder, "pack:a-half"))) == {name}


def test_modules_that_stay_are_said_once(project: Project) -> None:
    project.says(MODEL.replace("llama", "llama-odd") + "quantize = { bits = 4 }")
    said = output(doit(project.folder))
    (note,) = [line for line in said.splitlines() if "unquantized" in line]
    assert note.startswith("note: a: 12 modules left unquantized: a last axis of 80 is no ")
    assert "(model.embed_tokens, model.layers.0.self_attn.q_proj, " in note
    assert "unquantized" not in output(doit(project.folder))


# What lies where doit writes.


@pytest.mark.parametrize("source", ["build/a", "build/other/inner"])
def test_a_source_that_a_build_would_replace(project: Project, source: str) -> None:
    shutil.copytree(project.shared / "llama", project.folder / source, dirs_exist_ok=True)
    project.says(f'[models.a]\nsource = "{source}"')
    project.refuses(source, "lies in build/, which doit writes. Move it elsewhere")


def test_a_cache_that_a_build_would_remove(project: Project) -> None:
    project.says(MODEL + '\n[cache]\ndir = "build/a"')
    project.refuses("cache", "lies in build/, which doit writes. Move it elsewhere")


def test_a_folder_that_was_never_built(project: Project) -> None:
    Workspace(project.folder).packed("a").unlink()
    (project.folder / "build" / "a" / "thesis.txt").write_text("years of work")
    project.says(MODEL)
    project.refuses("build/a was not built here", "thesis.txt", "Move it, or rename the target")
