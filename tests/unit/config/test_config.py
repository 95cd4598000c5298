"""tests of tasks/config/reader.py: what models.toml may say, and that nothing else gets through."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import documents, front_door
from tasks.config import reader
from tasks.config.reader import Config
from tasks.config.tables import Build, Cache
from tasks.core.errors import ConfigError
from tasks.core.quantization import Quantize, Rule
from tasks.core.spec import Quality, SourceSpec, Target
from tasks.tensors import modes

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples: each overwrites its `models.toml`."""
    return tmp_path_factory.mktemp("config")


def read(folder: Path, text: str | bytes) -> Config:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "models.toml").write_bytes(data)
    return reader.load(folder / "models.toml")


def refused(folder: Path, text: str | bytes) -> str | None:
    """The message, which names the file; None if nothing is wrong."""
    try:
        read(folder, text)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(str(folder / "models.toml"))
        return message
    return None


# Accepted forms


def target(folder: Path, lines: str, name: str = "a") -> Target:
    return read(folder, f'[models.a]\nsource = "b"\n{lines}').targets[name]


def test_what_is_not_said(folder: Path) -> None:
    found = read(folder, '[models.a]\nsource = "b"')
    model = Target(
        name="a",
        source=SourceSpec("", str(folder / "b")),
        source_name="b",
        loader=None,
        layout="mlx-lm",
        dtype=None,
        quantize=False,
        device=None,
        max_shard_bytes=5 << 30,
        where=found.targets["a"].where,
    )
    cache = Cache(
        dir=folder / ".mlx-make/cache",
        keep=None,
        remote=None,
        mode="read-write",
        max_bytes=None,
    )
    assert found == Config(
        path=folder / "models.toml",
        targets={"a": model},
        cache=cache,
        build=Build(memory_bytes=None),
        quality=Quality(
            text=None, evaluate_text=None, samples=32, sequence_length=512, seed=0, top_logits=1024
        ),
    )
    assert target(folder, 'layout = "mlx-examples"').max_shard_bytes == 15 << 30


def test_all_that_can_be_said(folder: Path) -> None:
    found = target(
        folder,
        'loader = "transformers"\nlayout = "mlx-lm"\ndtype = "bfloat16"\ndevice = "cpu"\n'
        'max_shard_size = "2GiB"\n[models.a.quantize]\nbits = 3\ngroup_size = 32\nmode = "affine"\n'
        '[[models.a.quantize.rules]]\nmatch = "lm_head"\nskip = true\n'
        '[[models.a.quantize.rules]]\nmatch = "*.mlp.*"\nmode = "mxfp4"\n'
        '[[models.a.quantize.rules]]\nmatch = "*"\nbits = 6\ngroup_size = 128\n',
    )
    rules = (
        Rule("lm_head", skip=True),
        Rule("*.mlp.*", mode="mxfp4"),
        Rule("*", bits=6, group_size=128),
    )
    quantize = Quantize(3, 32, "affine", rules=rules)
    assert found == Target(
        name="a",
        source=SourceSpec("", str(folder / "b")),
        source_name="b (transformers)",
        loader="transformers",
        layout="mlx-lm",
        dtype="bfloat16",
        quantize=quantize,
        device="cpu",
        max_shard_bytes=2 << 30,
        where=found.where,
    )


def test_an_empty_quantize_asks_for_mlx_s_default(folder: Path) -> None:
    assert target(folder, "quantize = {}").quantize == Quantize()


def test_variants_lie_over_their_model(folder: Path) -> None:
    """Key by key; a table is one key's value, and false takes it back."""
    found = read(
        folder,
        '[models.a]\nsource = "b"\ndtype = "float16"\nquantize = { bits = 4, group_size = 32 }\n'
        "[models.a.variants.8bit]\nquantize = { bits = 8 }\n"
        "[models.a.variants.plain]\nquantize = false\n"
        '[models.a.variants.same]\n[models.a.variants.other]\nsource = "c"\ndtype = "float32"\n',
    ).targets
    assert list(found) == ["a", "a-8bit", "a-plain", "a-same", "a-other"]
    assert {name: one.quantize for name, one in found.items()} == {
        "a": Quantize(4, 32),
        "a-8bit": Quantize(8),
        "a-plain": False,
        "a-same": Quantize(4, 32),
        "a-other": Quantize(4, 32),
    }
    assert [one.dtype for one in found.values()] == ["float16"] * 4 + ["float32"]
    assert {Path(one.source.location).name for one in found.values()} == {"b", "c"}
    assert found["a-other"].source == SourceSpec("", str(folder / "c"))


def test_defaults_lie_under_all_models(folder: Path) -> None:
    found = read(
        folder,
        '[defaults]\nsource = "b"\nlayout = "mlx-examples"\nquantize = { bits = 4 }\n'
        'max_shard_size = "1GiB"\n[models.a]\n[models.c]\nsource = "d"\nquantize = false\n'
        '[models.c.variants.lm]\nlayout = "mlx-lm"\n',
    ).targets
    assert [Path(one.source.location).name for one in found.values()] == ["b", "d", "d"]
    assert [one.layout for one in found.values()] == ["mlx-examples", "mlx-examples", "mlx-lm"]
    assert [one.quantize for one in found.values()] == [Quantize(4), False, False]
    assert {one.max_shard_bytes for one in found.values()} == {1 << 30}


def test_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, path in {
        "b": folder / "b",
        "b/c d": folder / "b/c d",
        "./b": folder / "b",
        "../b": folder / "../b",
        "~/b": Path("/home/somebody/b"),
        "/b/c": Path("/b/c"),
        "β": folder / "β",
    }.items():
        text = json.dumps(text, ensure_ascii=False)
        found = read(folder, f"[models.a]\nsource = {text}\n[cache]\ndir = {text}\n")
        assert (found.targets["a"].source.location, found.cache.dir) == (str(path), path)


def test_paths_are_of_the_file_s_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the one that doit is run in; and absolute, since doit may go elsewhere."""
    (tmp_path / "models.toml").write_text('[models.a]\nsource = "b"')
    monkeypatch.chdir(tmp_path.parent)
    found = reader.load(Path(tmp_path.name) / "models.toml")
    assert found.targets["a"].source.location == str(tmp_path / "b")
    assert found.cache.dir == tmp_path / ".mlx-make/cache"


@pytest.mark.parametrize("name", ["a", "A_b-1.5+x", "_a", "3", "llama-3.1-8b", "größe", "a" * 200])
def test_names(folder: Path, name: str) -> None:
    assert list(read(folder, f'[models."{name}"]\nsource = "b"').targets) == [name]


def test_where_a_target_is_asked_for(folder: Path) -> None:
    found = read(
        folder,
        '# A comment\n[ models . "a" ]  # another\nsource = "b"\n\n[models.a.variants.c]\n',
    ).targets
    assert str(found["a"].where) == f"{folder}/models.toml:2"
    assert str(found["a-c"].where) == f"{folder}/models.toml:5"


# The cache and the build


def settings_of(folder: Path, lines: str) -> Config:
    return read(folder, f'[models.a]\nsource = "b"\n{lines}')


def test_cache_and_build(folder: Path) -> None:
    found = settings_of(
        folder,
        '[cache]\ndir = "c"\nkeep = ["unshard", "cast"]\nremote = "s3://bucket/a/b"\n'
        'mode = "read-only"\nmax_size = "20GB"\n[build]\nmemory = "4GiB"\n',
    )
    assert found.cache.dir == folder / "c"
    assert set(found.cache.keep) == {"unshard", "cast"}
    assert (found.cache.remote, found.cache.mode) == ("s3://bucket/a/b", "read-only")
    assert (found.cache.max_bytes, found.build.memory_bytes) == (20 * 10**9, 4 << 30)
    assert settings_of(folder, "[cache]\nkeep = []").cache.keep == ()


@pytest.mark.parametrize(
    "url",
    ["s3://b", "s3://my-bucket.eu/", "gs://my_bucket/a/b", "az://container/größe", "https://host",
     "https://host:8443/a%20b/", "http://127.0.0.1:9000/a", "http://[::1]:80/a@b", "file:///",
     "file:///a/b%23c"],
)  # fmt: skip
def test_remotes(folder: Path, url: str) -> None:
    assert settings_of(folder, f'[cache]\nremote = "{url}"').cache.remote == url


def test_hints_that_help_or_none(folder: Path) -> None:
    model = '[models.a]\nsource = "b"\n'
    rules = 'quantize = { bits = 4, rules = [{ modules = "*.down_proj", skip = true }] }'
    assert "modules is an unknown key" in (message := refused(folder, model + rules))
    assert "Did you mean 'match'?" in message
    assert (message := refused(folder, model + 'device = "cuda0"'))
    assert message.endswith("is 'cuda0'; valid: cpu, gpu")


@pytest.mark.parametrize(
    ("url", "fact", "mend"),
    [
        ("bucket/a", "is no URL; valid: s3://BUCKET/PREFIX, gs://", "file:///ABSOLUTE/PATH"),
        ("", "is no URL; valid: ", ""),
        ("s3:/b", "is no URL; valid: ", ""),
        ("user:secret@host/a", "is no URL; valid: ", ""),
        ("ftp://host/a", "has the scheme 'ftp'; valid: s3://BUCKET", "Did you mean 'http'?"),
        ("S3://b", "has the scheme 'S3'; valid: ", "Did you mean 's3'?"),
        ("s3:///a", "has no bucket after s3://", 'Write "s3://BUCKET/PREFIX"'),
        ("gs://", "has no bucket after gs://", 'Write "gs://BUCKET/PREFIX"'),
        ("az:///a", "has no container after az://", 'Write "az://CONTAINER/PREFIX"'),
        ("https://", "has no host after https://", 'Write "https://HOST/PATH"'),
        ("http://:80/", "has no host after http://", 'Write "http://HOST/PATH"'),
        ("http://host:port/", "has no host after http://", ""),
        ("file://a/b", "has no absolute path after file://", 'Write "file:///ABSOLUTE/PATH"'),
        ("https://user:secret@host/a", "holds credentials", "come from the environment"),
        ("s3://secret@b/a", "holds credentials", "come from the environment"),
        ("ftp://user:secret@host/a", "holds credentials", "come from the environment"),
        ("s3://user:sec/ret@host/a", "has no bucket after s3://", ""),
        ("az://c/a?sig=secret", "has a query or a fragment", "come from the environment"),
        ("https://host/a#b", "has a query or a fragment", "'#' %23"),
        ("s3://b/a c", "has a space or a control character", "Write a space as %20"),
        ("s3://b/\\u0000", "has a space or a control character", ""),
    ],
)
def test_what_is_no_remote(folder: Path, url: str, fact: str, mend: str) -> None:
    message = refused(folder, f'[models.a]\nsource = "b"\n[cache]\nremote = "{url}"')
    assert message is not None
    assert f"/models.toml:4: cache.remote {fact}" in message
    assert mend in message
    assert "sec" not in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('keep = "cast"', 'keep is \'cast\', must be a list such as ["unshard", "cast"]'),
        ("keep = [1]", "keep[0] is 1; valid: extract, unshard, cast, fuse"),
        (
            'keep = ["cast", "Unshard"]',
            "keep[1] is 'Unshard'; valid: extract, unshard, cast, fuse. Did",
        ),
        (
            'keep = ["castt", 5]',
            "keep[0] is 'castt'; valid: extract, unshard, cast, fuse. Did you mean",
        ),
        ('keep = ["castt", 5]', "keep[1] is 5; valid: extract, unshard, cast, fuse"),
        ('keep = ["quantize"]', "keep[0] is 'quantize'; valid: extract, unshard, cast, fuse"),
        ('remote = ["https://u:secret@h"]', 'remote is no string. Write "s3://BUCKET/PREFIX"'),
        ('mode = "readonly"', "mode is 'readonly'; valid: read-write, read-only, off. Did you"),
        ("max_size = 0", "max_size is 0: no room for a tensor"),
        ('max_size = "5 gb"', "max_size is '5 gb', which is no size; units are"),
    ],
)
def test_what_is_no_setting_of_the_cache(folder: Path, line: str, words: str) -> None:
    message = refused(folder, f'[models.a]\nsource = "b"\n[cache]\n{line}')
    assert message is not None
    assert f"/models.toml:4: cache.{words}" in message
    assert "secret" not in message


ENVIRONMENT = {
    "MLX_MAKE_CACHE_DIR": "other",
    "MLX_MAKE_CACHE_KEEP": "unshard, cast",
    "MLX_MAKE_CACHE_REMOTE": "file:///a",
    "MLX_MAKE_CACHE_MODE": "off",
    "MLX_MAKE_CACHE_MAX_SIZE": "1000",
    "MLX_MAKE_BUILD_MEMORY": "1GiB",
}
SAID = """\
[cache]
dir = "c"
keep = []
remote = "s3://b"
mode = "read-only"
max_size = "1MB"
[build]
memory = "2GiB"
"""


@pytest.mark.parametrize("lines", ["", SAID])
def test_the_environment_wins(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    found = settings_of(folder, lines)
    assert found.cache.dir == folder / "other"
    assert set(found.cache.keep) == {"unshard", "cast"}
    assert (found.cache.remote, found.cache.mode) == ("file:///a", "off")
    assert (found.cache.max_bytes, found.build.memory_bytes) == (1000, 1 << 30)
    monkeypatch.setenv("MLX_MAKE_CACHE_KEEP", ",")
    assert settings_of(folder, lines).cache.keep == ()


def test_an_empty_variable_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_of(folder, SAID)
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
    assert settings_of(folder, SAID) == before


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("MLX_MAKE_CACHE_DIR", "models.toml", "cache.dir is "),
        ("MLX_MAKE_CACHE_DIR", "build/c", "cache.dir "),
        (
            "MLX_MAKE_CACHE_KEEP",
            "cast,caste",
            "cache.keep[1] is 'caste'; valid: extract, unshard, cast, fuse. ",
        ),
        ("MLX_MAKE_CACHE_REMOTE", "s3://u:secret@b", "cache.remote holds credentials. Take"),
        ("MLX_MAKE_CACHE_MODE", "of", "cache.mode is 'of'; valid: read-write, read-only, off. Did"),
        ("MLX_MAKE_CACHE_MAX_SIZE", "lots", "cache.max_size is 'lots', which is no size"),
        ("MLX_MAKE_BUILD_MEMORY", "0", "build.memory is '0': no room"),
    ],
)
def test_a_message_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as refusal:
        settings_of(folder, SAID)
    assert str(refusal.value).startswith(f"{variable}: {words}")
    assert "secret" not in str(refusal.value)


def test_a_message_names_the_variable_as_doit_says_it(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[models.a]\nsource = "b"')
    done = front_door.doit(tmp_path, "list", expect=3, env={"MLX_MAKE_CACHE_MODE": "readonly"})
    assert "MLX_MAKE_CACHE_MODE: cache.mode is 'readonly'; valid: read-write" in done.stderr
    assert "Traceback" not in done.stderr


# All mistakes at once


MISTAKES = """\
[cache]
keep = ["cast", "x"]
size = 5
[defaults]
dtype = "bf16"
[models.a]
sorce = "b"
max_shard_size = "5gib"
[models.a.quantize]
bits = 16
group_size = 60
rules = [{ match = "*", bits = "6" }, { mach = "lm_head", skip = true }]
[models."b/c"]
source = 5
[models.b.variants.d]
device = "cup"
[models.b]
source = "build/b"
"""


def test_all_mistakes_are_told_each_with_its_line(folder: Path) -> None:
    """In the file's order, each once: a wrong default is not told again for each model."""
    message = refused(folder, MISTAKES)
    assert message is not None
    told = [line.removeprefix(f"{folder}/models.toml:") for line in message.splitlines()]
    starts = [
        "2: cache.keep[1] is 'x'; valid: extract, unshard, cast, fuse",
        "3: cache.size is an unknown key; valid: dir,",
        "5: defaults.dtype is 'bf16'; valid: ",
        "6: models.a has no source. Add source = ",
        "7: models.a.sorce is an unknown key; valid: source, ",
        "8: models.a.max_shard_size is '5gib', which is no size",
        "10: models.a.quantize.bits is 16; mode 'affine' takes",
        "11: models.a.quantize.group_size is 60; mode 'affine' takes",
        "12: models.a.quantize.rules[0].bits is '6', must be a whole number",
        "12: models.a.quantize.rules[1].mach is an unknown key",
        "12: models.a.quantize.rules[1] has no match. Add match = ",
        "13: models.\"b/c\" makes the target name 'b/c', which is no plain folder name",
        '14: models."b/c".source is 5, must be a string',
        "16: models.b.variants.d.device is 'cup'; valid: cpu, gpu. Did you mean 'cpu'?",
    ]
    assert [line[: len(start)] for line, start in zip(told, starts, strict=True)] == starts


def test_folders_that_a_build_would_remove_are_told_at_once(folder: Path) -> None:
    message = refused(
        folder,
        '[cache]\ndir = "build/c"\n[models.a]\nsource = "build/a"\n[models.b]\nsource = "build/b"',
    )
    assert message is not None
    lines = [line.split(": ")[0].rpartition(":")[2] for line in message.splitlines()]
    assert lines == ["2", "4", "6"]


def test_a_file_of_another_kind_is_not_told_key_by_key(folder: Path) -> None:
    message = refused(folder, "[models.a]\n" + "".join(f"k{i} = 1\n" for i in range(100)))
    assert message is not None
    assert len(message.splitlines()) == 21
    assert message.endswith("models.toml: and 81 more mistakes")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[models.a]\nsource = 'b'\nbits = 4", "a.bits is an unknown key; valid: source, "),
        ("[models.a]\nsource = 'b'\nbits = 4", "It belongs in quantize: quantize = { bits = 4 }"),
        ("[models.a]\nsource = 'b'\nmode = 'mxfp4'", 'in quantize: quantize = { mode = "mxfp4" }'),
        ("[models.a]\nsource = 'b'\nq_bits = 4", "Did you mean 'bits', which belongs in quantize?"),
        ("[models.a]\nsource = 'b'\nq_group_size = 4", "Did you mean 'group_size', which belongs"),
        ("[models.a]\nsource = 'b'\nskip = true", "It belongs in a rule of quantize.rules"),
        ("[models.a]\nsource = 'b'\nkeep = []", "It belongs in [cache]"),
        ("[cache]\nmemory = 5\n[models.a]\nsource = 'b'", "memory is an unknown key; valid: dir, "),
        ("[cache]\nmemory = 5\n[models.a]\nsource = 'b'", "It belongs in [build]"),
        ("[defaults]\nquantize = { layout = 1 }\n[models.a]\nsource = 'b'", "in [models.NAME]"),
        ("[a]\nsource = 'b'\n[models.c]\nsource = 'b'", "A model is a table in models: [models.a]"),
        ("[models.a.8bit]\n[models.a]\nsource = 'b'", "A variant is [models.a.variants.8bit]"),
        ("[models.a]\nsource = 'b'\nmax_shard_size = '5G'", 'Write "5GB" or "5GiB"'),
        ("[models.a]\nsource = 'b'\nmax_shard_size = '5k'", 'Write "5kB" or "5KiB"'),
        ("[models.a]\nsource = 'b'\nmax_shard_size = '5 gib'", 'Write "5 GiB"'),
        ("[models.a]\nsource = 'b'\nquantize = { bits = 3.5 }", "a whole number. For a mixture of"),
        ("[models.a]\nsource = 'b'\nquantize = { bits = 3.5 }", 'such as recipe = "mixed_3_6"'),
        ("[models.a]\nsource = 'b'\nquantize = { bits = 4.0 }", "must be a whole number. Write 4"),
        ("[models.a]\nsource = 'b'\ntags = 'x'", "tags is 'x', must be a list of strings, such as"),
        ("[models.a]\nsource = 'b'\ntags = 'x'", 'Write ["x"]'),
        ("[models.a]\nsource = 'b'\ntags = ['a', 3]", "3: models.a.tags[1] is 3, must be a string"),
        ("[models.awq]\nsource = 'b'", "1: models.awq makes the target name 'awq', which is"),
        ("[models.pack]\nsource = 'b'", "1: models.pack makes the target name 'pack', which is"),
        (
            "[build]\ncluster = '127.0.0.1:8786'\n[models.a]\nsource = 'b'",
            "2: build.cluster is '127.0.0.1:8786', and there is no such file. "
            'Did you mean "tcp://127.0.0.1:8786"?',
        ),
    ],
)
def test_what_a_mistake_should_have_been(folder: Path, toml: str, words: str) -> None:
    message = refused(folder, toml)
    assert message is not None
    assert words in message
    assert len(message.splitlines()) == 1


def test_a_name_with_a_point(folder: Path) -> None:
    """TOML makes tables of its parts, of which nothing else is told."""
    message = refused(folder, "[models.a-3.1]\nsource = 'b'\n[models.b-3.2.variants.c]\n")
    assert message is not None
    assert message.splitlines() == [
        f"{folder}/models.toml:1: models.a-3.1 is a table in 'a-3' to TOML, which parts names at a "
        'point. Quote the name: [models."a-3.1"]',
        f"{folder}/models.toml:3: models.b-3.2 is a table in 'b-3' to TOML, which parts names at a "
        'point. Quote the name: [models."b-3.2"]',
    ]


def test_an_inline_table_of_several_lines(folder: Path) -> None:
    """TOML allows none, but for lists in it; where it begins is told, and what to write."""
    message = refused(folder, '[models.a]\nsource = "b"\nquantize = { # so\n  bits = 4,\n}\n')
    assert message is not None
    assert "The { in line 3 is not closed there" in message
    assert "Write a table: [models.a.quantize], and each key" in message
    rules = 'quantize = { rules = [\n{ match = "lm_head", bits = 8 },\n], bits = 4 }'
    assert target(folder, rules).quantize == Quantize(4, rules=(Rule("lm_head", bits=8),))


def test_bits_that_only_the_installed_mlx_knows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for what is not known to be right."""
    monkeypatch.setattr(modes, "numbers", lambda mode: ((32, 64, 7), (1, 9)))
    quantize = "quantize = { bits = 9, group_size = 7 }"
    assert target(folder, quantize).quantize == Quantize(9, 7)
    message = refused(folder, '[models.a]\nsource = "b"\nquantize = { bits = 7 }')
    assert message is not None
    assert message.endswith("quantize.bits is 7; mode 'affine' takes 1, 9. Use 9")


# Variants by bits


def test_a_matrix_makes_variants(folder: Path) -> None:
    """Beside the model itself and its own variants; what else quantize says holds for each."""
    found = read(
        folder,
        '[models.a]\nsource = "b"\nmatrix = { bits = [3, 8] }\ndtype = "float16"\n'
        "quantize = { bits = 4, group_size = 32 }\n"
        '[models.a.variants.c]\ndtype = "float32"\n[models.d]\nsource = "e"\n'
        "[models.d.matrix]\nbits = [4]\n",
    ).targets
    assert {name: one.quantize for name, one in found.items()} == {
        "a": Quantize(4, 32),
        "a-c": Quantize(4, 32),
        "a-3bit": Quantize(3, 32),
        "a-8bit": Quantize(8, 32),
        "d": False,
        "d-4bit": Quantize(4),
    }
    assert [one.dtype for one in found.values()] == [
        *["float16", "float32"],
        *["float16"] * 2,
        None,
        None,
    ]
    assert str(found["a-8bit"].where) == f"{folder}/models.toml:3"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("matrix = { bits = [4, 7] }", "3: models.a.matrix.bits[1] is 7; mode 'affine' takes 1, 2"),
        ("matrix = { bits = 4 }", "3: models.a.matrix.bits is 4, must be a list such as [3, 4, 6"),
        ("matrix = { bits = ['4'] }", "3: models.a.matrix.bits is ['4'], must be a list such as"),
        ("matrix = [4]", "3: models.a.matrix is [4], must be a table such as { bits = [3, 4, 6, 8"),
        ("matrix = {}", "3: models.a.matrix has no bits. Add bits = [3, 4, 6, 8]"),
        ("matrix = { mode = 4 }", "3: models.a.matrix.mode is an unknown key; valid: bits."),
        ("matrix = { bits = [4, 4] }", "matrix.bits[1] would be a second build/a-4bit"),
        (
            "matrix = { bits = [4] }\n[models.a.variants.4bit]",
            "3: models.a.matrix.bits[0] would be a second build/a-4bit",
        ),
        (
            "matrix = { bits = [8] }\nquantize = { mode = 'mxfp4' }",
            "3: models.a.matrix.bits[0] is 8; mode 'mxfp4' takes 4. Use 4",
        ),
        (
            "matrix = { bits = [8] }\nquantize = { recipe = 'mixed_3_6' }",
            "3: models.a.matrix.bits is for recipe 'mixed_3_6', which sets bits itself. Drop",
        ),
        (
            "matrix = { bits = [4, 8] }\nquantize = { target_bpw = 4, exact = true }",
            "3: models.a.matrix.bits is for target_bpw, which chooses bits itself. Drop target_bpw",
        ),
        (
            "matrix = { bits = [4] }\nquantize = { fit = '8GB', context = 4096 }",
            "3: models.a.matrix.bits is for fit, which chooses bits itself. Drop fit, or the",
        ),
    ],
)
def test_what_is_no_matrix(folder: Path, lines: str, words: str) -> None:
    message = refused(folder, f'[models.a]\nsource = "b"\n{lines}')
    assert message is not None
    assert words in message
    assert message.startswith(f"{folder}/models.toml:3: models.a.matrix")


def test_a_default_has_no_matrix(folder: Path) -> None:
    """It would make variants of every model, whatever it is."""
    message = refused(folder, '[defaults]\nmatrix = { bits = [4] }\n[models.a]\nsource = "b"')
    assert message is not None
    assert "/models.toml:2: defaults.matrix is an unknown key; valid: source, " in message


# Sizes


UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
counts = st.integers(1, 10**18 - 1)


def size(folder: Path, value: str) -> int:
    return target(folder, f"max_shard_size = {value}").max_shard_bytes


@given(count=counts, unit=st.sampled_from(list(UNITS)), space=st.sampled_from(["", " ", "  "]))
@calm
def test_sizes(folder: Path, count: int, unit: str, space: str) -> None:
    assert size(folder, str(count)) == count
    assert size(folder, f'"{count}"') == count
    assert size(folder, f'"{count}{space}{unit}"') == count * UNITS[unit]


@given(
    whole=st.integers(0, 10**6),
    part=st.from_regex(r"[0-9]{1,18}", fullmatch=True),
    unit=st.sampled_from(list(UNITS)),
)
@calm
def test_sizes_with_a_point(folder: Path, whole: int, part: str, unit: str) -> None:
    """Rounded down to whole bytes, not to what a float can hold."""
    text = f"{whole}.{part}{unit}"
    exact = math.floor(Fraction(f"{whole}.{part}") * UNITS[unit])
    if exact:
        assert size(folder, f'"{text}"') == exact
    else:
        message = refused(folder, f'[models.a]\nsource = "b"\nmax_shard_size = "{text}"')
        assert message is not None
        assert f"a.max_shard_size is '{text}': no room for a tensor" in message


@pytest.mark.parametrize(
    "value",
    ["0", "-1", "true", "1e9", "[]", "''", "' '", "'GiB'", "'-1GiB'", "'1,5GiB'", "'.5GiB'",
     "'1.GiB'", "'1 G'", "'1gib'", "'1TiB'", "'1GiB 1MiB'", "'1e3MB'", "'٣GiB'", "'nan'",
     f"'{10**18}GiB'", "0x" + "f" * 5000],
)  # fmt: skip
def test_what_is_no_size(folder: Path, value: str) -> None:
    message = refused(folder, f'[models.a]\nsource = "b"\nmax_shard_size = {value}')
    assert message is not None
    assert "/models.toml:3: models.a.max_shard_size is " in message


# What reading costs


def test_a_file_without_a_mistake_is_read_with_few_imports(tmp_path: Path) -> None:
    """A run that has nothing to do is as fast as it is for that."""
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "b"\nmatrix = { bits = [3, 8] }\nmax_shard_size = "2GiB"\n'
        'quantize = { group_size = 32, rules = [{ match = "lm_head", skip = true }] }\n'
        '[cache]\nkeep = ["cast"]\nremote = "s3://b"\n'
    )
    code = (
        "import sys; from pathlib import Path; from tasks.config import reader; "
        "reader.load(Path(sys.argv[1])); "
        "print({'difflib', 'mlx.core', 'numpy', 'torch', 'typing_extensions'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "models.toml")],
        cwd=front_door.REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n"


# Anything at all


@given(document=documents.anything())
@settings(calm, max_examples=300)
def test_any_table(folder: Path, document: dict[str, Any]) -> None:
    """It is read, or refused with a message that names the file; nothing else ever happens."""
    text = documents.toml(document)
    if refused(folder, text) is None:
        assert read(folder, text).targets


@given(data=st.binary(max_size=200) | st.text().map(lambda text: text.encode(errors="replace")))
@calm
def test_any_file(folder: Path, data: bytes) -> None:
    assert refused(folder, data) is not None


@given(
    start=st.integers(0, len(documents.EXAMPLE)),
    length=st.integers(0, 20),
    other=st.text(max_size=3),
)
@settings(calm, max_examples=200)
def test_a_file_with_a_slip(folder: Path, start: int, length: int, other: str) -> None:
    text = documents.EXAMPLE
    assert refused(folder, text) is None
    refused(folder, (text[:start] + other + text[start + length :]).encode(errors="replace"))


def test_a_message_names_the_line(folder: Path) -> None:
    """Whatever is wrong there."""
    lines = documents.EXAMPLE.splitlines()
    for i, line in enumerate(lines):
        key, equals, _ = line.partition(" = ")
        for wrong in (f"{key}x = 1", f"{key} = 1.5") if equals else ():
            message = refused(folder, "\n".join([*lines[:i], wrong, *lines[i + 1 :]]))
            assert message is not None
            assert f"/models.toml:{i + 1}: " in message
