"""machine: what must be alike on two machines for one to make the other's layers.

A worker tells it to Dask's scheduler as *resources*, one for each library and class of device, and
a unit asks for the one of its target. So a worker that is another never gets one, whenever it
joins.
"""

from __future__ import annotations

import hmac
import os
import platform
import socket
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from cache.digest import digest_record
from tasks.layouts.libraries import LIBRARIES, packages
from tasks.planning.plan import Plan
from tasks.stages import registry
from tasks.tensors import mx

SIGNING_KEY = "MLX_MAKE_SIGNING_KEY"
KEY, STAGES = "signing key", "stages"  # beside packages, in what is compared
PACKAGES = tuple(dict.fromkeys(["mlx-make", *(p for each in LIBRARIES for p in packages(each))]))
ALWAYS = ("mlx-make", "mlx", STAGES, KEY)  # of facts: what is compared for any target
ANY_CLASS = "any"  # what no device computes: extracted, cast
PREFIX = "mlx-make "


class Kind(NamedTuple):
    """What a target wants of those who make its layers.

    Attributes:
        library: of ``LIBRARIES``, whose classes make its model; "": none.
        device: the class of device that computes it.
    """

    library: str
    device: str

    @classmethod
    def of(cls, plan: Plan) -> Kind:
        """Return what a target wants: what is locked of it names the class of device."""
        library = plan.shared.model.library
        if plan.computer is None:
            return cls(library, ANY_CLASS)
        computer = plan.shared.computer
        return cls(library, f"{computer.device} {computer.machine}")

    @property
    def facts(self) -> dict[str, None]:
        """The names of the facts that must be alike."""
        return dict.fromkeys([*ALWAYS, *(packages(self.library) if self.library else ())])


def secret() -> bytes | None:
    """Return the signing key that is set here."""
    return os.environ.get(SIGNING_KEY, "").encode() or None


def facts() -> dict[str, str]:
    """Return what is compared, by what it is called."""
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


def resource(known: dict[str, str], kind: Kind) -> str:
    """Return the name of the resource of those who make the same bits of a kind of target."""
    same = digest_record([[name, known[name]] for name in kind.facts])
    return f"{PREFIX}{same[:16]} {kind.device}"


def resources(threads: int) -> dict[str, float]:
    """Return what a worker here offers: a unit for each of its threads."""
    known = facts()
    kinds = [Kind(library, each) for library in ("", *LIBRARIES) for each in classes()]
    return {resource(known, kind): threads for kind in kinds}


def name() -> str:
    """Return what people call this machine."""
    return socket.gethostname().split(".")[0]


def differences(ours: dict[str, str], theirs: dict[str, str] | None, wanted: Iterable[Kind]) -> str:
    """Say why a worker gets no layers of some kinds; "": by its class of device, if at all.

    Args:
        ours: the coordinator's facts.
        theirs: the worker's; None: it was not started by mlx-make.
        wanted: what it does not offer.
    """
    if theirs is None:
        return "is not started by mlx-make worker"
    names = dict.fromkeys(name for kind in wanted for name in kind.facts)
    wrong = [name for name in names if theirs.get(name) != ours[name]]
    return ", ".join(dict.fromkeys(_difference(n, ours[n], theirs.get(n)) for n in wrong))


def _difference(name: str, ours: str, theirs: str | None) -> str:
    if name in PACKAGES:
        return f"has {name} {theirs}, and this machine {ours}"
    return f"has another {KEY}" if name == KEY else "has another mlx-make"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
