"""candidates: what nodes are called that try a way to quantize."""

from __future__ import annotations

import re

from tasks.stages.quantize_scheme import Setting

_CANDIDATE = re.compile(r"[0-9]+bit-[0-9]+(-[a-z0-9]+)?")


def node_name(what: str, setting: Setting) -> str:
    """Return what the node is called that tries a candidate in a layer, or a module."""
    mode = "" if setting.mode == "affine" else f"-{setting.mode}"
    return f"{what}.{setting.bits}bit-{setting.group_size}{mode}"


def split_name(name: str) -> tuple[str, str]:
    """Return the layer or module, and the candidate, of a node that is called so; else no such."""
    layer, _, candidate = name.rpartition(".")
    return (layer, candidate) if _CANDIDATE.fullmatch(candidate) else (name, "")
