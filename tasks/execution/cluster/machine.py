"""machine: what must be alike on two machines for one to make the other's layers.

A worker tells it to Dask's scheduler as *resources*, one for each class of device, and a unit asks
for the one of its target. So a worker that is another never gets one, whenever it joins.
"""

from __future__ import annotations

import hmac
import os
import platform
import socket
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from cache.digest import digest_record
from tasks.planning.plan import Plan
from tasks.stages import registry
from tasks.tensors import mx

SIGNING_KEY = "MLX_MAKE_SIGNING_KEY"
PACKAGES = ("mlx-make", "mlx", "mlx-lm")
KEY, STAGES = "signing key", "stages"  # beside the packages, in what is compared
ANY_CLASS = "any"  # what no device computes: extracted, cast
PREFIX = "mlx-make "


def secret() -> bytes | None:
    """Return the signing key that is set here."""
    return os.environ.get(SIGNING_KEY, "").encode() or None


def facts() -> dict[str, str]:
    """Return what must be alike, by what it is called."""
    stages = [[stage.name, stage.version] for stage in registry.stages()]
    return {
        **{package: _version(package) for package in PACKAGES},
        STAGES: digest_record(stages)[:8],
        KEY: hmac.new(secret() or b"", b"mlx-make cluster 1", "sha256").hexdigest()[:16],
    }


def classes() -> list[str]:
    """Return the classes of device that this machine has."""
    backends = ["cpu", *(["metal"] if mx.metal.is_available() else [])]
    backends += ["cuda"] if mx.cuda.is_available() else []
    return [ANY_CLASS, *(f"{backend} {platform.machine()}" for backend in backends)]


def class_of(plan: Plan) -> str:
    """Return the class of device that a target is computed by: what is locked of it names it."""
    if plan.computer is None:
        return ANY_CLASS
    computer = plan.shared.computer
    return f"{computer.device} {computer.machine}"


def resource(known: dict[str, str], device_class: str) -> str:
    """Return the name of the resource of those who make the same bits."""
    return f"{PREFIX}{digest_record(known)[:16]} {device_class}"


def resources(threads: int) -> dict[str, float]:
    """Return what a worker here offers: a unit for each of its threads."""
    known = facts()
    return {resource(known, each): threads for each in classes()}


def name() -> str:
    """Return what people call this machine."""
    return socket.gethostname().split(".")[0]


def differences(
    ours: dict[str, str], theirs: dict[str, str] | None, needed: Iterable[str], there: Iterable[str]
) -> str:
    """Say why a worker gets no layers; "": it gets some.

    Args:
        ours: the coordinator's facts.
        theirs: the worker's; None: it was not started by mlx-make.
        needed: the classes of device of what is built.
        there: the worker's.
    """
    if theirs is None:
        return "is not started by mlx-make worker"
    if wrong := [name for name in ours if theirs.get(name) != ours[name]]:
        said = [_difference(name, ours[name], theirs.get(name)) for name in wrong]
        return ", ".join(dict.fromkeys(said))
    if needed and not set(needed) & set(there):
        return f"computes on {', '.join(each for each in there if each != ANY_CLASS)}"
    return ""


def _difference(name: str, ours: str, theirs: str | None) -> str:
    if name in PACKAGES:
        return f"has {name} {theirs}, and this machine {ours}"
    return f"has another {KEY}" if name == KEY else "has another mlx-make"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
