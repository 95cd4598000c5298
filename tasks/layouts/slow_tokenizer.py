"""slow_tokenizer: tokenizer.json, made of a tokenizer's older files as ``mlx_lm.convert`` makes it.

Clients in Swift and Rust read tokenizer.json alone, mlx-lm streams better with it, and saving with
transformers writes it. So does this, in a process of its own (``python -m
tasks.layouts.slow_tokenizer FOLDER``): transformers takes seconds to import, and what authors ship
may be made to take the machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

VERSION = 1  # raised when what is made of the same files changes
FAST = "tokenizer.json"
LIMIT_SECONDS, LIMIT_BYTES = 120, 8 << 30


def make(files: Mapping[str, bytes]) -> tuple[str, str]:
    """Return tokenizer.json, or nothing and why transformers cannot make it.

    Args:
        files: of the tokenizer, and config.json, by name.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        try:
            done = subprocess.run(
                # -P: the current folder may have a tasks/ of its own.
                [sys.executable, "-P", "-m", "tasks.layouts.slow_tokenizer", name],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
                timeout=LIMIT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return "", f"it took over {LIMIT_SECONDS} s"
    try:
        tokenizer_json, cause = json.loads(done.stdout)
    except ValueError:
        return "", f"exit status {done.returncode}"
    return tokenizer_json, cause


def main() -> None:
    """Make tokenizer.json of the files in a folder, and print it and why there is none, in JSON."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    # Where torch is installed, transformers imports it: 3 s, and no tokenizer needs it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
        with tempfile.TemporaryDirectory() as name:
            tokenizer.save_pretrained(name)
            tokenizer_json = (Path(name) / FAST).read_text(encoding="utf-8")
        answer = [tokenizer_json, ""]
    except FileNotFoundError:
        answer = ["", f"{type(tokenizer).__name__} has none"]
    except Exception as error:  # whatever it raises is its verdict on the files
        answer = ["", f"{type(error).__name__}: {error}"]
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
