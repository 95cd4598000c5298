"""What the hub would be sent of built models, one after another: what it has already is not sent.

Chunked and compared by hf_xet, huggingface_hub's own uploader, in a store that is a folder here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def sent(files: list[Path], store: Path) -> list[int]:
    """Return the bytes that are sent for each file, in this order, to a store that begins empty."""
    import hf_xet

    nbytes = []
    for path in files:
        commit = hf_xet.XetSession().new_upload_commit(endpoint=f"local://{store}")
        commit.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
        nbytes.append(int(commit.wait_to_finish().dedup_metrics.total_bytes_uploaded))
    return nbytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="weight files, in order")
    files = parser.parse_args().files
    with tempfile.TemporaryDirectory() as store:
        uploads = sent(files, Path(store))
    print("| model | MB | sent, MB |\n|---|---|---|")
    for path, upload in zip(files, uploads, strict=True):
        print(f"| {path.parent.name} | {path.stat().st_size / 1e6:.1f} | {upload / 1e6:.1f} |")
    size = sum(path.stat().st_size for path in files)
    print(f"| all | {size / 1e6:.1f} | {sum(uploads) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
