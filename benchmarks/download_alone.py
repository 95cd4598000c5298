"""download_alone: a repository's weight files through huggingface_hub's own client, to /dev/null.

    python benchmarks/download_alone.py org/model

As many files at once as its ``snapshot_download`` has. The hub is that of HF_ENDPOINT.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import get_hf_file_metadata, http_get
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

FILES_AT_ONCE = 8
SUFFIX = ".safetensors"


def download(repository: str, name: str) -> None:
    """Download a file, and keep nothing of it."""
    found = get_hf_file_metadata(hf_hub_url(repository, name))
    elsewhere = {} if found.location != hf_hub_url(repository, name) else build_hf_headers()
    with open("/dev/null", "wb") as nothing:
        http_get(found.location, nothing, headers=elsewhere, expected_size=found.size)


def main() -> None:
    """The command line."""
    disable_progress_bars()
    repository = sys.argv[1]
    names = [name for name in HfApi().list_repo_files(repository) if name.endswith(SUFFIX)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(partial(download, repository), names))


if __name__ == "__main__":
    main()
