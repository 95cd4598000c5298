"""A remote store through the front door: what another machine built is fetched, not made again.

`Machine` is a folder with a cache of its own; machines have `models.toml` and `models.lock` in
common, as version control carries them, and a remote.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doit.exceptions import InvalidDodoFile

from cache.blobs import Part, Place
from cache.digest import digest
from cache.files.stamp import Stamp
from cache.lock import Lock
from cache.records.manifests import Action, Manifest, Tensor
from cache.remote.content import blake3_of
from cache.remote.remote import Remote
from cache.remote.sharing import Sharing
from cache.remote.signing import sign
from cache.remote.transport import PIECE_BYTES
from cache.store import Store
from support import checkpoints, inside, meta, remotes, servers
from support.front_door import Finished
from support.machines import (
    BIG,
    KEEP,
    MODE,
    REMOTE,
    SIGNING,
    SMALL,
    Machine,
    first,
    machine,
    warnings,
)
from support.projects import FOUR_BIT, contents, flip, outcomes
from support.running import DEADLINE_SECONDS, start
from tasks.checkpoints import record as records
from tasks.cli.task_graph import TaskGraph
from tasks.core.errors import CheckpointError
from tasks.execution import exchange
from tasks.stages import registry


def alone(one: Machine) -> dict[str, str]:
    """What the same machine builds without a remote."""
    other = one.beside("alone", checkpoint=True, **{MODE: "off"})
    other.doit("--locked")
    return other.built()


@pytest.fixture
def server() -> Iterator[servers.Faulty]:
    with servers.faulty() as running:
        yield running


def at(server: servers.Faulty) -> dict[str, str]:
    return {REMOTE: f"http://127.0.0.1:{server.port}/store"}


def fetched(server: servers.Faulty) -> dict[str, int]:
    """Bytes that the server was made to send, by object, since it was asked last."""
    sent: dict[str, int] = {}
    for request in server.requests:
        if request.sent:
            sent[request.path] = sent.get(request.path, 0) + request.sent
    server.requests.clear()
    return sent


# A second machine, without the checkpoint.


def test_second_machine(tmp_path: Path, server: servers.Faulty) -> None:
    """No stage computes, the output is equal to the byte, little more than it is fetched."""
    one = first(tmp_path, {**at(server), KEEP: "cast"}, config=BIG, **FOUR_BIT)
    said = one.doit().stdout
    assert re.search(r"objects uploaded, [\d.]+ MB; the last [\d.]+ s were for that alone", said)
    two = one.beside("two")
    fetched(server)
    done = two.doit("--locked")
    assert outcomes(done).keys() == {"reused", "fetched"}
    assert {task.split(":")[0] for task in outcomes(done)["reused"]} == {"extract"}
    assert {task.split(":")[0] for task in outcomes(done)["fetched"]} == {
        "unshard", "cast", "quantize", "pack",
    }  # fmt: skip
    assert two.built() == one.built()
    assert sum(fetched(server).values()) <= 1.02 * size(two.folder / "build" / "model")
    # It lies on the disk once: the weights were written where they belong, and packing links them.
    weights = two.folder / "build/model/model.safetensors"
    assert weights.stat().st_nlink == 2
    held = sum(path.stat().st_size for path in (two.store / "blobs").rglob("*") if path.is_file())
    assert held < 1.05 * weights.stat().st_size
    assert two.doit().entries == []
    assert server.requests == []  # nothing to do fetches nothing

    two.configure(max_shard_size="2MB")
    done = two.doit()
    assert outcomes(done) == {"computed": {"pack:model"}}
    assert not any("/blobs/" in path for path in fetched(server))
    two.configure(max_shard_size=None, quantize={"bits": 8})
    done = two.doit()
    computed = outcomes(done)["computed"]
    assert computed == {f"quantize:model:{layer}" for layer in quantized(two)} | {"pack:model"}
    cast = sum(size_of(two, "cast", layer) for layer in quantized(two))
    blobs = {path: n for path, n in fetched(server).items() if "/blobs/" in path}
    # Whole cast layers' matrices, once, and nothing else: norms were there.
    assert 0.99 * cast < sum(blobs.values()) <= cast
    one.configure(quantize={"bits": 8})
    one.doit()
    assert two.built() == one.built()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def quantized(machine: Machine) -> list[str]:
    """The layers that hold something to quantize."""
    folder = machine.state / "manifests" / "model" / "quantize"
    return [path.stem for path in folder.glob("*.json") if b".scales" in path.read_bytes()]


def size_of(machine: Machine, stage: str, layer: str) -> int:
    tensors = json.loads(machine.manifest(stage, layer).read_bytes())["tensors"]
    assert {dtype for _, dtype, _, _ in tensors} == {"float16"}
    count = 0
    for _, _, shape, _ in tensors:
        elements = 1
        for axis in shape:
            elements *= axis
        count += 2 * elements
    return count


def test_one_model_on_several_machines(tmp_path: Path, server: servers.Faulty) -> None:
    """Each makes some layers, which a pattern names; who packs fetches these and makes the rest."""
    alone = first(tmp_path / "alone", {}, config={**SMALL, "num_hidden_layers": 4}, **FOUR_BIT)
    alone.doit()
    made = set()
    for number, layers in enumerate(("layers.[01]", "layers.[23]")):
        some = alone.beside(f"{tmp_path.name}-{number}", checkpoint=True, **at(server))
        made |= outcomes(some.doit(f"quantize:model:{layers}"))["computed"]
    last = alone.beside(f"{tmp_path.name}-last", checkpoint=True, **at(server))
    done = outcomes(last.doit("pack:model"))
    layers = {f"quantize:model:layers.{number}" for number in range(4)}
    assert layers <= made
    assert layers <= done["fetched"]
    # Extracting is finding tensors in this machine's own checkpoint.
    assert {task for task in done["computed"] & made if not task.startswith("extract:")} == set()
    assert last.built() == alone.built()


def test_fetched_shards_anew(tmp_path: Path, server: servers.Faulty) -> None:
    """Another shard size on a machine that has nothing: pack only, from quantized blobs."""
    one = first(tmp_path, at(server), config=SMALL, **FOUR_BIT)
    one.doit()
    two = one.beside("two")
    two.configure(max_shard_size="20kB")
    fetched(server)
    done = two.doit()
    assert outcomes(done)["computed"] == {"pack:model"}
    one.configure(max_shard_size="20kB")
    one.doit()
    assert two.built() == one.built()


@pytest.mark.parametrize(
    ("arch", "keys", "keep"),
    [
        ("llama", {"quantize": {"bits": 4}}, ["cast"]),  # cast passes on ranges of the checkpoint
        ("llama", {}, []),  # not quantized
        ("llama-tied", FOUR_BIT, []),
        ("mixtral", {"quantize": {"mode": "mxfp4"}}, ["cast"]),  # sanitize stacks the experts
        ("gemma3", {"quantize": {"bits": 4}}, ["unshard", "cast"]),
        ("llama-3-tied", {"quantize": {"bits": 4}}, ["cast"]),
        ("llama-1", {"layout": "mlx-examples", "dtype": "float32"}, []),
    ],
)
def test_any_source(arch: str, keys: dict, keep: list[str], tmp_path: Path) -> None:
    environ = {REMOTE: (tmp_path / "remote").as_uri(), KEEP: ",".join(keep) or ","}
    one = machine(tmp_path / "one", environ)
    if arch in meta.RELEASES:
        meta.make(arch, one.checkpoint)
    else:
        checkpoints.make(arch, one.checkpoint)
    one.configure(**keys)
    one.doit()
    two = one.beside("two")
    done = two.doit("--locked")
    assert outcomes(done).keys() == {"reused", "fetched"}
    assert two.built() == one.built()
    # With another setting: of what cast made, if it was kept.
    more = {"quantize": {"bits": 8}}
    two.configure(**more)
    if not keep and "quantize" in keys:  # else what was cast is what was packed
        said = two.doit(expect=1).stdout
        assert "is not here whole, and" in said
        assert two.built() == one.built()
        return
    assert {task.split(":")[0] for task in outcomes(two.doit())["computed"]} == {"quantize", "pack"}
    one.configure(**more)
    one.doit()
    assert two.built() == one.built()


def test_models_toml_says_it(tmp_path: Path, server: servers.Faulty) -> None:
    """And the environment wins."""
    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    path = one.folder / "models.toml"
    text = path.read_text()
    path.write_text(f'[cache]\nremote = "{at(server)[REMOTE]}"\nmode = "read-only"\n' + text)
    one.doit()
    assert {request.method for request in server.requests} == {"GET"}
    server.requests.clear()
    shutil.rmtree(one.state)
    one.doit(**{MODE: "off"})
    assert server.requests == []
    shutil.rmtree(one.state)
    one.doit(**{MODE: "read-write"})
    assert "PUT" in {request.method for request in server.requests}


def test_read_only(tmp_path: Path) -> None:
    """It fetches all, and writes nothing, not even a folder."""
    remote = tmp_path / "remote"
    one = first(tmp_path, {REMOTE: remote.as_uri()}, config=SMALL, **FOUR_BIT)
    one.doit(**{MODE: "read-only"})
    assert not remote.exists()
    shutil.rmtree(one.state)
    one.doit()
    before = {path: Stamp.of(path) for path in remote.rglob("*")}
    two = one.beside("two", checkpoint=True, **{MODE: "read-only"})
    done = outcomes(two.doit())
    assert {task.split(":")[0] for task in done["computed"]} == {"extract"}
    assert {"unshard", "cast", "quantize", "pack"} == {t.split(":")[0] for t in done["fetched"]}
    assert two.built() == one.built()
    two.configure(quantize={"bits": 8})
    two.doit()
    assert {path: Stamp.of(path) for path in remote.rglob("*")} == before


def test_a_plan_writes_nothing_but_memos(tmp_path: Path) -> None:
    """Not even what it has to fetch. What it asked, it need not ask again."""
    one = first(tmp_path, {REMOTE: (tmp_path / "remote").as_uri()}, config=SMALL, **FOUR_BIT)
    one.doit()
    two = one.beside("two")
    before, remote = contents(two.folder), contents(tmp_path / "remote")
    assert "fetch" in two.doit("plan", expect=1).stdout
    after = contents(two.folder)
    assert after.items() >= before.items()
    assert all(name.startswith(".mlx-make/cache/memos/") for name in after.keys() - before.keys())
    assert "fetch" in two.doit("plan", expect=1).stdout
    assert contents(two.folder) == after
    assert contents(tmp_path / "remote") == remote


def test_a_plan_of_what_is_nowhere(tmp_path: Path) -> None:
    """It begins with the error that the build ends with."""
    remote = tmp_path / "remote"
    one = first(tmp_path, {REMOTE: remote.as_uri()}, config=SMALL, **FOUR_BIT)
    one.doit()
    shutil.rmtree(remote / "records" / "actions")
    shutil.rmtree(remote / "records" / "lists")
    two = one.beside("two")
    told = two.doit("plan", expect=3).stdout
    assert told.startswith("ERROR: model: ")
    assert "is not here whole" in told.splitlines()[0]
    assert "is not here whole" in two.doit(expect=1).stdout


def test_reports(tmp_path: Path) -> None:
    """What one machine measured is shown on another."""
    one = first(tmp_path, {REMOTE: (tmp_path / "remote").as_uri()}, config=SMALL, **FOUR_BIT)
    one.doit("report")
    two = one.beside("two")
    done = outcomes(two.doit("report"))
    assert done["computed"] == {"report:model", "report"}
    assert (two.folder / "reports" / "model.html").exists()


# A remote that does not work.


def test_push_to_a_remote_that_takes_nothing(tmp_path: Path) -> None:
    """Nothing is said to be there that is not."""
    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    one.doit()
    one.environ = {REMOTE: f"http://127.0.0.1:{servers.free_port()}/store"}
    done = one.doit("cache", "push", expect=1)
    assert len(warnings(done)) == 1
    assert "there now" not in done.stdout
    assert "given up" in done.stderr


def test_unreachable(tmp_path: Path) -> None:
    """One warning, and a build as ever; without the checkpoint, an error that says so."""
    environ = {REMOTE: f"http://127.0.0.1:{servers.free_port()}/store"}
    one = first(tmp_path, environ, config=SMALL, **FOUR_BIT)
    done = one.doit()
    (warning,) = warnings(done)
    assert "is not used from now on" in warning
    assert one.built() == alone(one)
    two = one.beside("two")
    begin = time.monotonic()
    done = two.doit(expect=3)
    assert time.monotonic() - begin < 15  # it never answered: far less than a remote's patience
    assert len(warnings(done)) == 1
    assert "is neither in the cache nor whole in a remote" in done.stderr


@pytest.mark.parametrize(("status", "words"), [(507, "Make room there"), (403, "credentials")])
def test_takes_no_more(tmp_path: Path, status: int, words: str) -> None:
    """A quota is reached halfway: one warning, and what is there can be used."""

    def misdeed(request: servers.Request) -> servers.Misdeed:
        return servers.Answer(status) if request.method == "PUT" and request.count > 60 else None

    with servers.faulty(misdeed) as server:
        one = first(tmp_path, at(server), config=SMALL, **FOUR_BIT)
        (warning,) = warnings(one.doit())
        assert "is only read from now on" in warning
        assert words in warning
        assert one.built() == alone(one)
        held = len(server.objects)
        two = one.beside("two", checkpoint=True, **{MODE: "read-only"})
        done = two.doit()
        assert warnings(done) == []
        assert held == len(server.objects)
        assert two.built() == one.built()


def test_through_s3(tmp_path: Path) -> None:
    """And no credential is anywhere."""
    with servers.s3(tmp_path / "s3") as server:
        environ = {REMOTE: server.url, SIGNING: "signing-key-of-tests", **server.environ}
        one = first(tmp_path, environ, config=BIG, **FOUR_BIT)
        said = [one.doit()]
        two = one.beside("two")
        said.append(two.doit("--locked"))
        assert outcomes(said[-1]).keys() == {"reused", "fetched"}
        assert two.built() == one.built()
        secrets = (servers.ACCESS_KEY, servers.SECRET_KEY, "signing-key-of-tests")
        assert_nowhere(secrets, said, one.folder, two.folder, server.folder)


def test_a_password_is_nowhere(tmp_path: Path, server: servers.Faulty) -> None:
    """Whether the server is there or not; and a URL that holds one is refused."""
    secret = "pass-word-of-tests"
    said = []
    for port in (servers.free_port(), server.port):
        environ = {
            REMOTE: f"http://127.0.0.1:{port}/x",
            "MLX_MAKE_REMOTE_USER": "somebody",
            "MLX_MAKE_REMOTE_PASSWORD": secret,
        }
        one = first(tmp_path / str(port), environ, config=SMALL, **FOUR_BIT)
        said.append(one.doit())
        said.append(one.doit("--locked"))
        said.append(one.doit("info", "pack:model"))
    (given,) = {
        v for r in server.requests for k, v in r.headers.items() if k.lower() == "authorization"
    }
    assert given.startswith("Basic ")
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "all").write_bytes(b"".join(server.objects.values()))
    assert_nowhere((secret,), said, tmp_path)

    url = f"http://me:{secret}@127.0.0.1/x"
    said = [one.doit(expect=3, **{REMOTE: url})]
    assert "holds credentials" in said[0].stderr
    assert_nowhere((secret,), said, tmp_path)


def assert_nowhere(secrets: tuple[str, ...], said: list[Finished], *folders: Path) -> None:
    told = "".join(done.stdout + done.stderr for done in said).encode()
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for secret in secrets:
        assert secret.encode() not in told
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


# All at once, of what is built: what `doit cache push` and `pull` do.


def exchanged(machine: Machine, act: Callable, **environ: str) -> exchange.Exchanged:
    with environment(machine.environ | environ):
        made = inside.session(machine.folder)
        sharing = made.builder.store.sharing
        assert sharing is not None
        done = act(made.builder, sharing, made.plans.values())
        sharing.remote.finish()
    return done


@pytest.mark.parametrize("keep", ["cast", ","])
def test_push_and_pull(keep: str, tmp_path: Path) -> None:
    """What was built before there was a remote; and then without it."""
    remote = {REMOTE: (tmp_path / "remote").as_uri()}
    one = first(tmp_path, {KEEP: keep}, config=SMALL, **FOUR_BIT | {"dtype": "float32"})
    one.doit()
    results = 3 * 4 + 1  # of the embedding, the layer, the norm, the head; and pack
    assert exchanged(one, exchange.push, **remote) == exchange.Exchanged(results, 0)
    pushed = contents(tmp_path / "remote")
    assert exchanged(one, exchange.push, **remote, **{KEEP: ","}).missing == 0
    assert contents(tmp_path / "remote") == pushed  # keeping less takes nothing away

    two = one.beside("two")
    assert exchanged(two, exchange.pull, **remote) == exchange.Exchanged(results - 1, 0)
    done = outcomes(two.doit("--locked"))
    assert done["computed"] == {"pack:model"}
    assert done.keys() == {"reused", "computed"}
    assert two.built() == one.built()
    two.configure(quantize={"bits": 8})
    if keep == "cast":
        assert "computed" in outcomes(two.doit())
    else:
        assert "Get the checkpoint" in two.doit(expect=1).stdout


def test_push_again(tmp_path: Path, server: servers.Faulty) -> None:
    """Nothing is put that is there; and what a report was made of goes, too."""
    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    one.doit()
    one.environ = at(server)
    one.doit("cache", "push")
    server.requests.clear()
    assert "0 objects uploaded, 0 B" in one.doit("cache", "push").stdout
    assert {request.method for request in server.requests} <= {"GET", "HEAD"}
    one.doit("report", **{MODE: "off"})
    done = one.doit("cache", "push").stdout
    assert "missing" not in done
    assert "not built here" not in done
    two = one.beside("two")
    two.doit("cache", "pull")
    done = outcomes(two.doit("report", **{MODE: "off"}))
    assert done["computed"] == {"pack:model", "report:model", "report"}


@pytest.mark.parametrize("args", [["cache", "push"], ["pack"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_upload_that_is_interrupted(args: list[str], number: int, tmp_path: Path) -> None:
    """It ends at once, however much there is to be uploaded."""
    stalled = threading.Event()

    def misdeed(request: servers.Request) -> servers.Misdeed:
        if request.method != "PUT" or "actions" not in request.path:
            return None
        stalled.set()
        return servers.Stalled(20)

    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    if args == ["cache", "push"]:
        one.doit()
    with servers.faulty(misdeed) as server:
        process = start(one, *args, env=at(server))
        assert stalled.wait(20)
        time.sleep(0.5)
        process.send_signal(number)
        begin = time.monotonic()
        said = "".join(process.communicate(timeout=DEADLINE_SECONDS))
        assert time.monotonic() - begin < 2
    assert process.returncode == 130, said
    assert "interrupted: " in said
    assert "Traceback" not in said
    one.doit()
    assert one.built() == alone(one)


def test_a_collector_gets_between_two_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for the cache alone waits for a result, not for the transfer of all."""
    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    one.doit()
    begun, pushed, push_now = threading.Event(), [], Sharing.push_now

    def slowly(self: Sharing, *of: Any, **keys: Any) -> bool:
        begun.set()
        time.sleep(0.1)
        pushed.append(of)
        return push_now(self, *of, **keys)

    monkeypatch.setattr(Sharing, "push_now", slowly)
    remote = {REMOTE: (tmp_path / "remote").as_uri()}
    pushing = threading.Thread(target=exchanged, args=(one, exchange.push), kwargs=remote)
    pushing.start()
    assert begun.wait(20)
    with Lock(one.store).alone(lambda: None):
        between = len(pushed)
    pushing.join()
    assert between < len(pushed) / 2


def test_push_what_is_half_there(tmp_path: Path) -> None:
    """Lost blobs are left out, and counted."""
    remote = {REMOTE: (tmp_path / "remote").as_uri()}
    one = first(tmp_path, {}, config=SMALL, **FOUR_BIT)
    one.doit()
    one.stored("quantize", "layers.0", "model.layers.0.mlp.up_proj.scales").lose()
    assert exchanged(one, exchange.push, **remote).missing == 1


@pytest.mark.parametrize("when", ["before it is read", "between digest and upload"])
@pytest.mark.parametrize("size", [1000, PIECE_BYTES + 1000])
def test_a_checkpoint_that_changes_meanwhile(
    when: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it gets into the remote; it is for the build to say so."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(size))
    part = Part(str(path), 0, size, Stamp.of(path))
    tensor = Tensor("uint8", (size,), digest(path.read_bytes()))
    store = Store.at(tmp_path / "cache")
    remote = Remote((tmp_path / "remote").as_uri(), warn=pytest.fail)
    push = remote.push

    def locate(_: str, __: Tensor) -> list[Part]:
        if when == "before it is read":
            flip(path, size // 2)
        return [part]

    def change_and_push(*args: object, **keys: object) -> bool:
        flip(path, size // 2)
        return push(*args, **keys)

    monkeypatch.setattr(remote, "push", change_and_push)
    made = Manifest(Action("cast", 1, {}, {}), {"a": tensor})
    assert not Sharing(store.actions, store.blobs, store.memos, remote).push_now(made, locate)
    assert objects(tmp_path / "remote") == []


X = blake3_of([b"x"])
OF_A_SOURCE = {"schema": 1, "names": "llama", "config": {}, "files": {}, "stored": {}, "wholes": {},
               "notes": [], "digests": {}, "small": {"a": [1, X]}}  # fmt: skip
NO_RECORDS = (
    *({"small": {file: [1, X]}} for file in ("../x", "..", "a/b", "/x")),
    {"small": {"a": [1 << 40, X]}},
    {"small": {"a": [1, "../" * 21 + "x"]}},
    {"stored": {"a": ["a", "float8", [1], "file", 0]}},
    {"wholes": {"a": ["float32", [1] * 65, [], []]}},
    {"digests": {"a": "../x"}},
    {"config": None},
)


@pytest.mark.parametrize("changes", NO_RECORDS, ids=str)
def test_a_record_of_a_source_that_is_none(changes: dict, tmp_path: Path) -> None:
    """By a models.lock that somebody made on purpose: nothing is written."""
    remote = Remote((tmp_path / "remote").as_uri(), warn=pytest.fail)
    record = json.dumps({**OF_A_SOURCE, **changes}).encode()
    for data in (b"x", record):
        assert remote.push(blake3_of([data]), len(data), [data])
    store = Store.at(tmp_path / "cache")
    store = replace(store, sharing=Sharing(store.actions, store.blobs, store.memos, remote))
    with pytest.raises(CheckpointError, match="is no record of a checkpoint"):
        records.recall(store, blake3_of([record]), len(record))
    assert not (tmp_path / "cache" / "sources").exists()


@pytest.mark.parametrize(
    ("data", "names", "times"),
    [
        (b"mine others"[:8], "m", 1),  # a tensor that is larger than its place
        (b"badgbad.", "gm", 1),  # others than its record says
        (b"badgbad,", "gm", 4),  # not what its name says: twice, and again in another run
    ],
)
def test_packs_that_lie(
    data: bytes, names: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written beyond a tensor's place, nor over a blob; it is told, and asked once."""
    said: list[str] = []
    fetched: list[str] = []
    fetch = Remote.fetch
    monkeypatch.setattr(
        Remote, "fetch", lambda it, name, size: fetched.append(name) or fetch(it, name, size)
    )
    remote = Remote((tmp_path / "remote").as_uri(), warn=said.append)
    store = Store.at(tmp_path / "cache")
    (container,) = store.blobs.new_containers(1, 16)
    container.write_bytes(b"good....____next")
    good, mine = (Tensor("uint8", (4,), digest(each)) for each in (b"good", b"mine"))
    places = {good.digest: Place(container, 0, 4), mine.digest: Place(container, 8, 4)}
    store.blobs.refer(good.digest, [places[good.digest].part])
    blake3 = blake3_of([data])
    assert remote.push(blake3, len(data), [data])
    held = {"g": good, "m": replace(mine, shape=(8,)) if names == "m" else mine}
    made = Manifest(Action("cast", 1, {}, {}), {name: held[name] for name in names})
    record = {"manifest": json.loads(made.to_bytes()), "blake3": blake3}
    remote.put_record("actions", made.action.key, record)
    if times > 1:
        flip(tmp_path / "remote" / "blobs" / blake3[:2] / blake3[2:])
    for _ in range(2):
        remote = Remote((tmp_path / "remote").as_uri(), warn=said.append)
        sharing = Sharing(store.actions, store.blobs, store.memos, remote)
        for _ in range(2):
            sharing.fetch_all([(made.action.key, mine)], places)
        sharing.close()
    assert fetched == [blake3] * times
    assert [f"damaged: remote blob {blake3}" in line for line in said] == [True] * 2
    assert not store.blobs.has(mine.digest, 4)
    assert store.blobs.locate(good.digest, 4) == [places[good.digest].part]
    assert container.read_bytes()[:8] == b"good...."
    assert container.read_bytes()[12:] == b"next"


# Two at once.


def test_two_push_at_once(tmp_path: Path) -> None:
    """Both build the same from nothing; a third fetches what they left."""
    with servers.s3(tmp_path / "s3") as server:
        environ = {REMOTE: server.url, **server.environ}
        one = first(tmp_path, environ, config=SMALL, **FOUR_BIT)
        other = machine(tmp_path / "other", environ)
        other.checkpoint.symlink_to(one.checkpoint)
        other.configure(**FOUR_BIT)
        calls = [start(each, env=environ, stdout=None) for each in (one, other)]
        assert [(call.communicate()[1], call.returncode) for call in calls] == [("", 0)] * 2
        assert (one.folder / "models.lock").read_bytes() == (
            other.folder / "models.lock"
        ).read_bytes()
        two = one.beside("two")
        assert outcomes(two.doit("--locked")).keys() == {"reused", "fetched"}
        assert one.built() == other.built() == two.built()


def test_trust(tmp_path: Path) -> None:
    """With a signing key nothing is used that it did not sign: said once, made again, signed."""
    remote = {REMOTE: (tmp_path / "remote").as_uri()}
    one = first(tmp_path, remote, config=SMALL, **FOUR_BIT)
    one.doit()
    for number, key in enumerate(("a key", "another key")):
        bare = one.beside(f"bare{number}", **{SIGNING: key})
        done = bare.doit(expect=1)
        (warning,) = warnings(done)
        assert "is refused: it" in warning
        assert "Get the checkpoint" in done.stdout
        assert key not in warning
        two = one.beside(f"two{number}", checkpoint=True, **{SIGNING: key})
        done = two.doit("--locked")
        assert len(warnings(done)) == 1
        # What only passes on the checkpoint's tensors was made, and signed, without it.
        assert {task.split(":")[0] for task in outcomes(done).get("fetched", ())} <= {"unshard"}
        assert two.built() == one.built()
        three = one.beside(f"three{number}", **{SIGNING: key})
        assert outcomes(three.doit("--locked")).keys() == {"reused", "fetched"}
        assert three.built() == one.built()
    assert outcomes(one.beside("keyless").doit()).keys() == {"reused", "fetched"}


WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a shape": lambda it: {n: replace(t, shape=(*t.shape, 1)) for n, t in it.items()},
    "a dtype": lambda it: {
        n: replace(t, dtype="bfloat16" if t.dtype == "float16" else t.dtype) for n, t in it.items()
    },
    "a name": lambda it: {n.replace("up_proj", "upper_proj"): t for n, t in it.items()},
    "one too few": lambda it: dict(list(it.items())[1:]),
    "one too many": lambda it: it | {"more": next(iter(it.values()))},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_result_that_the_action_cannot_have_made(
    wrong: str, original: "Machine", tmp_path: Path
) -> None:
    """Whole and unsigned: refused, said once, made here, and put right there."""
    remote = tmp_path / "remote"
    shutil.copytree(original.folder.parent / "unsigned", remote)
    altered = {}
    for stage in ("unshard", "cast", "quantize"):
        manifest = Manifest.at(original.manifest(stage, "layers.0"))
        key = manifest.action.key
        record = remotes.record(remote, key)
        tensors = WRONG[wrong](manifest.tensors)
        record["manifest"] = json.loads(replace(manifest, tensors=tensors).to_bytes())
        altered = remotes.put(remote, key, record) | altered
    name = f"{wrong} {tmp_path.name}".replace(" ", "-")
    two = original.beside(f"two-{name}", checkpoint=True, **{REMOTE: remote.as_uri()})
    two.doit("extract")
    steps = json.loads(two.doit("plan", "--json", expect=1).stdout)["tasks"]
    planned = {step["task"] for step in steps if step["state"] == "run"}
    done = two.doit("--locked")
    (warning,) = warnings(done)
    assert "is refused: " in warning
    assert "is not what unshard makes of it" in warning
    made = {f"{stage}:model:layers.0" for stage in ("unshard", "cast", "quantize")}
    assert outcomes(done)["computed"] == made
    assert planned - {"pack:model"} == made  # the record of pack is in the remote still
    assert two.built() == original.built()
    assert {path: path.read_bytes() for path in altered} == altered


def test_put_right(original: "Machine", tmp_path: Path) -> None:
    """Whoever fetches a corrupt blob and can make it puts it there anew."""
    remote = tmp_path / "remote"
    shutil.copytree(original.folder.parent / "unsigned", remote)
    whole = {path: path.read_bytes() for path in (remote / "blobs").rglob("*") if path.is_file()}
    lock = json.loads((original.folder / "models.lock").read_bytes())
    record = lock["sources"]["checkpoint"]["record"]
    small = json.loads((remote / "blobs" / record[:2] / record[2:]).read_bytes())["small"]
    (weights,) = original.checkpoint.glob("*.safetensors")
    here = {record, *(blake3 for _, blake3 in small.values())}  # of the checkpoint: not fetched
    made = {p: d for p, d in whole.items() if p.parent.name + p.name not in here}
    made = {p: d for p, d in made.items() if d not in weights.read_bytes()}
    assert len(made) >= 2  # of the embedding, of the layer
    for path, data in made.items():
        flip(path, len(data) // 2)
    two = original.beside("two-" + tmp_path.name, checkpoint=True, **{REMOTE: remote.as_uri()})
    first, *_, counted = warnings(two.doit())
    assert "damaged: remote blob" in first
    assert "put there anew" in first
    assert f" {len(made)} blobs in all are damaged" in counted
    assert {path: path.read_bytes() for path in whole} == whole
    three = original.beside("three-" + tmp_path.name, **{REMOTE: remote.as_uri()})
    assert outcomes(three.doit("--locked")).keys() == {"reused", "fetched"}
    assert original.built() == two.built() == three.built()


# What is in the remote is wrong. In this process, since there is so much of it to try.


def test_killed_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away in the middle: one warning, and a build as ever."""
    monkeypatch.setitem(Remote.__init__.__kwdefaults__, "patience", 1)
    with servers.s3(tmp_path / "s3") as server:
        one = first(tmp_path, {REMOTE: server.url, **server.environ}, config=BIG, **FOUR_BIT)
        killer = threading.Thread(target=lambda: (_wait_for(server.folder), server.kill()))
        killer.start()
        errors, warned = build(one, capsys)
        killer.join()
    assert errors == []
    (warning,) = warned
    assert "is not used from now on" in warning
    assert one.built() == alone(one)


def _wait_for(folder: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(folder.glob("blobs/*/*")):
        time.sleep(0.01)


@contextmanager
def environment(told: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(told)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _errors(graph: TaskGraph) -> list[str]:
    """Run all tasks as doit would, up to the first error."""
    stages = [task for stage in registry.PIPELINE for task in graph.stage(stage)]
    for task in [*stages, *graph.pack()]:
        for act in task["actions"] or ():
            result = act(changed=[])
            if not isinstance(result, dict):
                return [result.get_msg()]
    return []


def build(machine: Machine, capsys: pytest.CaptureFixture) -> tuple[list[str], set[str]]:
    """Run all tasks as doit would, one after the other; errors, and the warnings."""
    errors: list[str] = []
    with environment(machine.environ):
        try:
            session = inside.session(machine.folder)
        except InvalidDodoFile as error:
            errors.append(str(error))
        else:
            with closing(session):
                errors += _errors(TaskGraph(session, database=None))
                if session.remote:
                    session.remote.finish()
    return errors, {line for line in capsys.readouterr().err.splitlines() if line}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Built into a remote that others copy: once signed, once not."""
    folder = tmp_path_factory.mktemp("original")
    one = first(folder, {}, arch="llama-tied", config=SMALL, **FOUR_BIT)
    one.doit(**{REMOTE: (folder / "unsigned").as_uri()})
    shutil.rmtree(one.state)
    one.doit(**{REMOTE: (folder / "signed").as_uri(), SIGNING: "a key"})
    return one


def objects(remote: Path) -> list[Path]:
    return sorted(path for path in remote.rglob("*") if path.is_file())


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("signed", [False, True])
def test_a_flipped_bit_in_each_object(
    checkpoint: bool, signed: bool, original: Machine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It is never used. With the checkpoint it is made again, and put right in the remote."""
    remote = tmp_path / "remote"
    shutil.copytree(original.folder.parent / ("signed" if signed else "unsigned"), remote)
    environ = {REMOTE: remote.as_uri(), **({SIGNING: "a key"} if signed else {})}
    # A signature is of records alone: blobs are the same with and without it.
    flipped = remote / "records" if signed else remote
    whole = {path: path.read_bytes() for path in objects(flipped)}
    assert len(whole) > (8 if signed else 18)
    expected = original.built()
    right = 0
    for number, (path, data) in enumerate(whole.items()):
        flip(path, int(hashlib.sha256(data).hexdigest(), 16) % len(data))
        if "actions" in str(path):  # which else nobody reads
            shutil.rmtree(remote / remotes.LISTS)
        two = machine(tmp_path / str(number) / "two", environ)
        two.models = original.models
        for file in ("models.toml", "models.lock"):
            shutil.copy(original.folder / file, two.folder)
        shutil.copytree(original.store / "memos/architectures", two.store / "memos/architectures")
        if checkpoint:
            two.checkpoint.symlink_to(original.checkpoint)
        errors, warned = build(two, capsys)
        if not errors:
            right += 1
            assert two.built() == expected, path
        else:
            assert not checkpoint, (path, errors)
            assert "Get the checkpoint" in errors[0] or "get the checkpoint" in errors[0]
            assert not (two.folder / "build" / "model").exists()
        assert len(warned) <= 1
        if checkpoint and signed and "lists" in str(path):
            assert path.read_bytes() == data, path
        for other, data in whole.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(data)
        shutil.rmtree(two.folder)
    # What the checkpoint's record or a cast says is needed; without a checkpoint that is an error.
    assert right == len(whole) if checkpoint else 0 < right < len(whole)


@pytest.mark.parametrize("damage", [lambda _: 5, lambda it: {**it, "manifest": []}, lambda it: []])
def test_a_damaged_list(damage: Callable[[Any], Any], original: Machine, tmp_path: Path) -> None:
    """What it lists is asked for one by one, and the list is put right."""
    remote = tmp_path / "remote"
    shutil.copytree(original.folder.parent / "unsigned", remote)
    (path,) = (remote / remotes.LISTS).rglob("*.json")
    data = path.read_bytes()
    listed = {key: damage(each) for key, each in json.loads(data)["record"].items()}
    path.write_bytes(sign("lists", path.parent.name + path.stem, listed, None))
    two = original.beside(f"damaged-{tmp_path.name}", **{REMOTE: remote.as_uri()})
    done = two.doit("--locked")
    assert warnings(done) == []
    assert outcomes(done).keys() == {"reused", "fetched"}
    assert two.built() == original.built()
    assert path.read_bytes() == data


def test_a_damaged_source_record_is_put_right(original: Machine, tmp_path: Path) -> None:
    """By who has the checkpoint, and pushes: no machine without it could build."""
    remote = tmp_path / "remote"
    shutil.copytree(original.folder.parent / "unsigned", remote)
    lock = json.loads((original.folder / "models.lock").read_bytes())
    name = lock["sources"]["checkpoint"]["record"]
    path = remote / "blobs" / name[:2] / name[2:]
    data = path.read_bytes()
    flip(path, 100)
    environ = {REMOTE: remote.as_uri()}
    two = original.beside(f"has-{tmp_path.name}", checkpoint=True, **environ)
    two.doit()
    two.doit("cache", "push")
    assert path.read_bytes() == data
    assert original.beside(f"none-{tmp_path.name}", **environ).doit("--locked").returncode == 0
