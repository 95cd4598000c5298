"""leftovers: what lies beside a checkpoint's weights and is not taken over, for notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from tasks.checkpoints import loaders, safetensors_file
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.small_files import TEMPLATES_FOLDER, matches
from tasks.core.text import listed, plural

# What makes pictures, videos and sounds ready, by the names that transformers and mlx-vlm read.
PROCESSORS = ("*processor*.json", "system_prompts.json", "viterbi_calibration.json")
WEIGHTS = "model*.safetensors"


def of_convert(
    checkpoint: Checkpoint,
    takes: Callable[[str], bool],
    convert: str,
    suffixes: tuple[str, ...] = (".json",),
    *,
    folders: bool = True,
) -> list[str]:
    """Return the note on files and folders that a library's convert would copy.

    Args:
        checkpoint: with Hugging Face's names.
        takes: tells whether the layout takes over a file of that name.
        convert: the convert.
        suffixes: of files that it copies.
        folders: whether it copies these.
    """
    known = [p for loader in loaders.LOADERS.values() for p in loader.SMALL_FILES]
    names = [
        name
        for name in _names(checkpoint)
        if name.endswith(suffixes) and not takes(name) and not matches(name, known)
    ]
    if folders:
        names += [n for n in _names(checkpoint) if n.endswith("/") and n != f"{TEMPLATES_FOLDER}/"]
    if not names:
        return []
    return [
        f"files and folders left out, which {convert} copies ({listed(names)}): what the model "
        "needs of them, the key files lays over it"
    ]


def of_processors(checkpoint: Checkpoint, convert: str, elsewhere: str) -> list[str]:
    """Return the note on processors' files where a layout is of the text alone.

    Args:
        checkpoint: with Hugging Face's names.
        convert: the library's own convert.
        elsewhere: what keeps them.
    """
    names = [name for name in _names(checkpoint) if matches(name, PROCESSORS)]
    if not names:
        return []
    return [
        f"{plural(len(names), 'file')} of processors left out, which make ready what a model sees "
        f"and hears, as {convert} does: {elsewhere} keeps them ({listed(names)})"
    ]


def weight_files(checkpoint: Checkpoint) -> tuple[set[str], set[str]]:
    """Return the weight files that a checkpoint was read of, and the .safetensors left beside."""
    read = {stored.file for stored in checkpoint.stored.values()} | checkpoint.stamps.keys()
    names = {name for name in _names(checkpoint) if name.endswith(safetensors_file.SUFFIXES)}
    return read, names - read


def of_weights(checkpoint: Checkpoint, convert: str, unread: tuple[str, ...] = ()) -> list[str]:
    """Return the note on .safetensors that were not read, and that a library's convert would.

    Args:
        checkpoint: what was read.
        convert: the convert.
        unread: patterns of what it neither reads nor copies.
    """
    read, names = weight_files(checkpoint)
    names = {name for name in names if not matches(name, unread)}
    if not names:
        return []
    return [
        f"weight files left out, which {convert} reads or copies ({listed(sorted(names))}): the "
        f"model is made of {listed(sorted(read))}. What else it needs, put into the built folder, "
        "where it stays"
    ]


def without_parts(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the tensors that lie in folders of their own, if it has any."""
    files = {key: stored.file for key, stored in checkpoint.stored.items()}
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not any("/" in files[key] for key in tensor.inputs)
    }
    return checkpoint if tensors == checkpoint.tensors else replace(checkpoint, tensors=tensors)


def of_parts(checkpoint: Checkpoint, library: str) -> str:
    """Return the note on weights in folders that a library does not read."""
    read, _ = weight_files(checkpoint)
    parts = sorted(name for name in read if "/" in name)
    return (
        f"weight files left out, of what follows the model ({listed(parts)}): {library} does not "
        'take them, layout = "mlx-embeddings" does'
    )


def weights_in_folders(checkpoint: Checkpoint) -> list[str]:
    """Return the weight files in folders below a checkpoint's own that were not read."""
    here = checkpoint.folder
    # Links to folders are followed once, by the first: to follow all may take for ever.
    paths = {*here.glob(f"*/{WEIGHTS}"), *here.rglob(WEIGHTS)}
    found = {path.relative_to(here).as_posix() for path in paths}
    found |= {name for name in checkpoint.source.hashes if fnmatchcase(Path(name).name, WEIGHTS)}
    read, _ = weight_files(checkpoint)
    return sorted(n for n in found - read if "/" in n and "/." not in f"/{n}")


def _names(checkpoint: Checkpoint) -> list[str]:
    """Return the names in a checkpoint's folder, those of folders with a slash, in order."""
    names = {path.name + "/" * path.is_dir() for path in checkpoint.folder.iterdir()}
    for name in checkpoint.source.hashes:  # of a hub, of whose files not all are fetched
        head, slash, _ = name.partition("/")
        names.add(head + slash)
    return sorted(name for name in names if not name.startswith((".", "__")))
