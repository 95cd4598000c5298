"""clusters: the cluster that models.toml names, as the crew of a build."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

from tasks.config.reader import Config
from tasks.core.errors import ConfigError
from tasks.execution.cluster.coordinator import Cluster
from tasks.execution.cluster.unit import Remote, Request, Settings
from tasks.planning.lockfile import Lock

EXTRA = "mlx-make[dask]"


def check_installed(address: str) -> None:
    """Refuse a cluster that nothing here can speak to.

    Raises:
        ConfigError: Dask is not installed.
    """
    if find_spec("distributed") is None:
        raise ConfigError(
            f"[build] cluster is {address}, and Dask is not installed here. "
            f"pip install '{EXTRA}', or leave cluster out."
        )


def crew(config: Config, lock: Lock) -> Cluster:
    """Return the crew of a build. Nothing is connected yet.

    Raises:
        ConfigError: Dask is not installed.
    """
    address = config.build.cluster
    assert address is not None
    check_installed(address)
    cache = config.cache
    remote = None
    if cache.remote and cache.mode != "off":
        remote = Remote(cache.remote, cache.mode == "read-only")
    settings = Settings(config.quality, cache.keep, remote)
    request = partial(Request.of, lock=lock, settings=settings)
    return Cluster(address, request, stops=config.build.cluster_lost == "stop")
