"""pack: the built model's folder, from blobs: weight files, config.json, tokenizer."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cache import files
from cache.actions import Hit
from cache.blobs import Part
from cache.digest import digest, digest_parts
from cache.files import Stamp
from cache.manifests import Action, Manifest, Tensor
from tasks.build import Builder, Needed
from tasks.errors import BuildError
from tasks.layouts import LAYOUTS
from tasks.plan import Plan

VERSION = 1
SAFETENSORS_DTYPES = {
    "bool_": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "complex64": "C64",
}  # fmt: skip
# As mx.savez spells them; NumPy has no bfloat16, MLX reads two raw bytes as one.
NPY_DTYPES = {
    "bool_": "|b1", "uint8": "|u1", "int8": "|i1", "uint16": "<u2", "int16": "<i2",
    "uint32": "<u4", "int32": "<i4", "uint64": "<u8", "int64": "<i8", "float16": "<f2",
    "bfloat16": "<V2", "float32": "<f4", "complex64": "<c8",
}  # fmt: skip


class Packed(NamedTuple):
    """One tensor of a weight file."""

    name: str
    tensor: Tensor


def shards(tensors: Sequence[Packed], max_shard_bytes: int) -> list[list[Packed]]:
    """Split tensors into weight files, greedily and in order, as the peers do.

    A tensor over the limit gets a file of its own; no file is empty.

    Args:
        tensors: all of the model's, in order.
        max_shard_bytes: most that a file's tensors have together.
    """
    found: list[list[Packed]] = []
    size = 0
    for packed in tensors:
        if not found or size + packed.tensor.nbytes > max_shard_bytes:
            found.append([])
            size = 0
        found[-1].append(packed)
        size += packed.tensor.nbytes
    return found


def run(builder: Builder, plan: Plan, folder: Path, manifest_path: Path, why: str) -> Manifest:
    """Bring a target's folder up to date.

    The new folder is written beside the old one and exchanged with it, so that a build that is
    cut off leaves the last one whole.

    Args:
        builder: gives the blobs.
        plan: the target.
        folder: build/TARGET.
        manifest_path: where its manifest belongs.
        why: what made it look.

    Raises:
        NoRoom: the disk cannot take the new folder.
    """
    with builder.logged(f"pack:{plan.target.name}", why) as record:
        layout = LAYOUTS[plan.target.layout]
        needed: Needed = {}
        notes = list(plan.notes)
        for node in plan.stages["quantize"]:
            manifest = Manifest.from_bytes(Path(builder.manifest_path(node)).read_bytes())
            needed.update({name: (node, tensor) for name, tensor in manifest.tensors.items()})
            notes += manifest.notes
        if missing := set(plan.names) ^ needed.keys():
            raise BuildError(
                f"{plan.target.name}: the plan and the built layers disagree on "
                f"{', '.join(sorted(missing)[:3])}. Run doit forget, then doit."
            )
        tensors = [Packed(name, needed[name][1]) for name in plan.names]
        split = shards(tensors, plan.target.max_shard_bytes)
        sizes = [[(p.name, p.tensor.nbytes) for p in shard] for shard in split]
        small = layout.files(plan.checkpoint, builder.store.memos, sizes, plan.weights)
        small["config.json"] = json.dumps(plan.config, indent=4).encode()
        weights = dict(zip(layout.shard_names(len(split)), split, strict=True))
        params = {
            "format": layout.FORMAT,
            "weights": {name: [p.name for p in shard] for name, shard in weights.items()},
            "files": {name: digest(data) for name, data in small.items()},
        }
        action = Action("pack", VERSION, params, {p.name: p.tensor.digest for p in tensors})
        found = builder.store.actions.get(action)
        record["outcome"] = "reused" if isinstance(found, Hit) else "computed"
        if isinstance(found, Hit) and _holds(folder, found.manifest.tensors):
            result = found.manifest
        else:
            made = _write(builder, plan, needed, folder, weights, small, layout.FORMAT)
            result = Manifest(action, made, tuple(dict.fromkeys(notes)))
            builder.store.actions.put(result)
        builder.publish(manifest_path, result)
        return result


def stamps(folder: Path, names: Sequence[str]) -> dict[str, list[int]] | None:
    """Return the stamp of each file of a built model, or None if one is missing."""
    try:
        return {name: list(Stamp.of(folder / name)) for name in names}
    except OSError:
        return None


def _holds(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Tell whether a folder has exactly the files of a build, by their digests."""
    if not folder.is_dir() or {p.name for p in folder.iterdir()} != set(tensors):
        return False
    return all(
        (folder / name).stat().st_size == tensor.nbytes and _digest(folder / name) == tensor.digest
        for name, tensor in tensors.items()
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return digest_parts(iter(lambda: file.read(8 << 20), b""))


def _write(
    builder: Builder,
    plan: Plan,
    needed: Needed,
    folder: Path,
    weights: dict[str, list[Packed]],
    small: dict[str, bytes],
    form: str,
) -> dict[str, Tensor]:
    need = sum(p.tensor.nbytes for shard in weights.values() for p in shard)
    need += sum(map(len, small.values()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f"{files.TEMPORARY}{folder.name}")
    shutil.rmtree(new, ignore_errors=True)  # of a build that was cut off
    files.room(folder.parent, need)
    new.mkdir()
    try:
        made = {}
        for name, shard in weights.items():
            located = []
            for packed in shard:
                located.append(builder.locate(plan, needed, packed.name))
            with (new / name).open("wb") as file:
                _WRITERS[form](builder, file, shard, located)
        for name, data in small.items():
            (new / name).write_bytes(data)
            builder.store.blobs.meter.written += len(data)
        for name in (*weights, *small):
            path = new / name
            made[name] = Tensor("uint8", (path.stat().st_size,), _digest(path))
        _exchange(new, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise files.no_room(folder.parent, need) from error
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return made


def _write_safetensors(
    builder: Builder, file: IO[bytes], shard: Sequence[Packed], located: Sequence[Sequence[Part]]
) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, tensor in shard:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors begin on a multiple of 8
    file.write(len(raw).to_bytes(8, "little") + raw)
    file.flush()
    for parts in located:
        for part in parts:
            _copy(builder, part, file)


def _write_npz(
    builder: Builder, file: IO[bytes], shard: Sequence[Packed], located: Sequence[Sequence[Part]]
) -> None:
    """Write an .npz file as mx.savez does: a zip archive of uncompressed .npy files."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for (name, tensor), parts in zip(shard, located, strict=True):
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: equal weights, equal files
            with archive.open(member, "w", force_zip64=tensor.nbytes >= 1 << 31) as out:
                out.write(_npy_header(tensor))
                for chunk in builder.store.blobs.chunks(parts):
                    out.write(chunk)
            builder.store.blobs.meter.written += tensor.nbytes


def _npy_header(tensor: Tensor) -> bytes:
    shape = "".join(f"{size}, " for size in tensor.shape)
    text = (
        f"{{'descr': '{NPY_DTYPES[tensor.dtype]}', 'fortran_order': False, 'shape': ({shape}), }}"
    )
    space = -(10 + len(text) + 1) % 64
    header = io.BytesIO()
    header.write(b"\x93NUMPY\x01\x00")
    header.write((len(text) + space + 1).to_bytes(2, "little"))
    header.write(text.encode() + b" " * space + b"\n")
    return header.getvalue()


def _copy(builder: Builder, part: Part, file: IO[bytes]) -> None:
    """Append a run of bytes, within the kernel where it can."""
    if not hasattr(os, "copy_file_range"):
        for chunk in builder.store.blobs.chunks([part]):
            file.write(chunk)
        file.flush()
    else:
        with open(part.path, "rb", buffering=0) as source:
            done = 0
            while done < part.length:
                count = os.copy_file_range(
                    source.fileno(), file.fileno(), part.length - done, part.offset + done
                )
                if not count:
                    raise OSError(f"{part.path} ends at byte {part.offset + done}")
                done += count
    builder.store.blobs.meter.written += part.length


_WRITERS = {"safetensors": _write_safetensors, "npz": _write_npz}


def _exchange(new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``old`` in one step, where the system has one."""
    if not old.exists():
        new.rename(old)
        return
    if not _exchange_in_one(os.fsencode(new), os.fsencode(old)):
        aside = old.with_name(f"{files.TEMPORARY}{old.name}-old")
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        new.rename(old)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange_in_one(new: bytes, old: bytes) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if platform.system() == "Darwin":
            return bool(libc.renamex_np(new, old, 2) == 0)  # RENAME_SWAP
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at_cwd, new, at_cwd, old, exchange) == 0)
    except AttributeError:  # a libc without it
        return False
