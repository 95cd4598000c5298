"""small_files: reads the files beside the weights, and tells what is wrong with any file."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tasks.checkpoints.stored import WeightFile
from tasks.core.errors import CheckpointError

MAX_SMALL_BYTES = 512 << 20  # of a file read whole: the largest tokenizers have a tenth of it
MOST_VALUES = 10_000_000  # in a file of JSON: the largest tokenizers have a quarter; they take 1 GB
MAX_LINE_BYTES = 1000
TEMPLATES_FOLDER = "additional_chat_templates"  # the one folder whose files are small files, too
SHARED_BLOBS = (
    ".huggingface-shared-blobs"  # in the folder of blobs that a hub's cache has in common
)
LFS = b"version https://git-lfs"
LFS_BYTES = 1024  # a pointer has fewer
PAGES = (b"<!doctype", b"<html", b"<?xml")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a path is of one of the shell patterns; no star stands for a folder."""
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file that the checkpoint must have.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: {what}. Fetch it from where the checkpoint came from."
        )
    try:
        value = parse_json(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch it again.")
    return value


def check_values(data: str | bytes, most: int = MOST_VALUES) -> None:
    """Refuse JSON of so many values that reading them takes far more memory than its bytes.

    Raises:
        ValueError: it is such.
    """
    marks: tuple[Any, ...] = ("[", "{", ":", ",") if isinstance(data, str) else (
        b"[", b"{", b":", b","
    )  # fmt: skip
    if len(data) > most and (count := sum(map(data.count, marks))) > most:
        raise ValueError(f"it has {count:,} values, names and commas, over {most:,}")


def parse_json(data: str | bytes) -> Any:
    """Return what JSON says, of a file or an answer that may be anybody's.

    Raises:
        ValueError: it is none, or has more values than any such file.
        RecursionError: it is nested too deep.
    """
    check_values(data)
    return json.loads(data)


def read_bytes(path: Path) -> bytes:
    """Return the content of one of a checkpoint's small files.

    Raises:
        CheckpointError: it cannot be read, is no regular file of its folder, or is larger than
            any such is.
    """
    check_own(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SMALL_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from error
    if len(data) > MAX_SMALL_BYTES:
        raise CheckpointError(
            f"{path} has over {MAX_SMALL_BYTES:,} bytes, more than any configuration or tokenizer. "
            "Fetch it again."
        )
    return data


def check_regular(path: Path) -> None:
    """Refuse a pipe, a socket, a device or a folder in place of a file: reading it may not end.

    Raises:
        CheckpointError: it is one, or is not there.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is no file but a {_kind(mode)}. Put the checkpoint's own file there."
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error of a file that the system does not read, with where a link leads."""
    leads = ""
    if path.is_symlink() and not path.exists():
        leads = f": it is a link to {os.readlink(path)}. Put the file there, or in the link's place"
    return CheckpointError(f"{path} cannot be read: {error.strerror}{leads}.")


def check_own(path: Path, folder: Path | None = None) -> None:
    """Refuse a small file that is a link out of its folder: it would be copied into builds.

    Links within the folder are fine, and those to the blobs of a hub's cache: a snapshot's own, or
    those that a download into a folder of one's choice is made of.

    Args:
        path: the file.
        folder: the checkpoint's, if not the one that the file lies in.

    Raises:
        CheckpointError: it is such a link, or no regular file.
    """
    check_regular(path)
    if folder is None and not path.is_symlink():
        return
    folder, real = (folder or path.parent).resolve(), path.resolve()
    blobs = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--"):
        blobs.append(real.parent)
    if (real.parent.parent / SHARED_BLOBS).is_file():
        blobs.append(real.parent.parent)
    if not any(real.is_relative_to(place.resolve()) for place in (folder, *blobs)):
        raise CheckpointError(
            f"{path} is a link to {real}, outside of {folder}, and would be copied into what is "
            "built. If it belongs there, put the file itself there."
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "folder",
        stat.S_ISFIFO: "pipe",
        stat.S_ISSOCK: "socket",
    }
    return next((kind for is_one, kind in kinds.items() if is_one(mode)), "device")


def read_text(path: Path) -> str:
    """Return the text of one of a checkpoint's small files.

    Raises:
        CheckpointError: it cannot be read, or is no text.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch it again.") from error


def first_line(path: Path) -> str:
    """Return the first line of a file that need not be there, nor be one of ours; "" if it is none.

    For what other tools note beside a checkpoint: no pipe is waited for, and nothing read whole.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            return file.readline(MAX_LINE_BYTES).decode(errors="replace").strip()
    except (CheckpointError, OSError):
        return ""


def numbered(location: str, names: Iterable[str], pattern: str) -> list[str]:
    """Return shard files in numeric order.

    Args:
        location: where they are, for messages.
        names: the files' names.
        pattern: a regular expression over the name; group 1 is the shard's number and group 2,
            if there is one, how many shards there are.

    Raises:
        CheckpointError: the row has a gap.
    """
    rows: dict[int, re.Match[str]] = {}
    counts: set[int] = set()
    for name in sorted(names):
        match = re.fullmatch(pattern, name)
        if not match:
            continue
        if other := rows.get(int(match[1])):
            raise CheckpointError(
                f"{location}: {other[0]} and {match[0]} are one shard. Move the one that is of "
                "another checkpoint to a folder of its own."
            )
        rows[int(match[1])] = match
        if match.re.groups > 1:
            counts.add(int(match[2]))
    if not rows:
        return []
    if len(counts) > 1:
        raise CheckpointError(
            f"{location} mixes shards of {len(counts)} checkpoints "
            f"(of {' and of '.join(map(str, sorted(counts)))}). Move those of the other "
            "to a folder of their own."
        )
    first = 1 if counts and 0 not in rows else 0  # numbered from 1 where names have the count
    last = first + counts.pop() if counts else max(rows) + 1
    have = [row[0] for _, row in sorted(rows.items())]
    for number in range(first, last):
        if number not in rows:
            match = next(iter(rows.values()))
            name = match[0][: match.start(1)] + str(number).zfill(len(match[1]))
            raise CheckpointError(
                f"{location}: {name}{match[0][match.end(1) :]} is missing (there are "
                f"{', '.join(have)}). Fetch the missing files."
            )
    return have


def is_pointer(path: WeightFile) -> bool:
    """Tell whether a file is a Git LFS pointer, which stands for one that was not fetched.

    Weights are not opened for it: a pointer is smaller (git-lfs, docs/spec.md).
    """
    if path.stat().st_size >= LFS_BYTES or not (
        not isinstance(path, Path) or stat.S_ISREG(path.stat().st_mode)
    ):
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_LINE_BYTES).lower()


def damaged(path: WeightFile, fact: str) -> CheckpointError:
    """Return the error of a weight file that is not what it should be, and why that may be."""
    if is_pointer(path):
        mend = "Run git lfs pull in its folder" if isinstance(path, Path) else (
            "It was put there without Git LFS: take another revision, and tell its authors"
        )  # fmt: skip
        return CheckpointError(f"{path} is a Git LFS pointer, not the file itself. {mend}.")
    if isinstance(path, Path) and path.is_file() and _head(path).lstrip().startswith(PAGES):
        fact = "a web page was saved in its place, as a link that wants a login gives"
    return CheckpointError(f"{path} is damaged or incomplete: {fact}. Fetch it again.")
