"""inputs: damages a checkpoint's files, models.toml and models.lock; prints a table of outcomes.

    python benchmarks/inputs.py                # 1,000 of each kind
    python benchmarks/inputs.py --count 10000 --kinds weights.pth plain/checkpoint/config.json
    python benchmarks/inputs.py --together --kinds plain/checkpoint/{tokenizer.json,README.md}
    TMPDIR=/dev/shm python benchmarks/inputs.py --built --kinds gptq peft-lora texts
    TMPDIR=/dev/shm python benchmarks/inputs.py --project --kinds chosen hub

Each is read: weights must have the tensors and bytes that mx.load or torch.load finds, or be
refused; all others be read or refused with a message. Packed weights, adapters and texts
(``--built``) are built, and what is built must be what PyTorch makes of the very same files. So are
a project's own files and a hub's answers (``--project``): weights must be those of the whole files.
An exception of any other type would be a traceback. Nothing may take 20 s, nor all of it 1 GiB.
Interrupted, it prints what it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support import built_inputs, inputs, project_inputs

# torch refuses more than it must of an archive of which all that is read is whole.
HARMLESS = (*inputs.OUTCOMES, "refused by torch alone")
MANY = 500  # attempts of a process, where most of them build nothing


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = tally.parser(__doc__, count=1000, what="kind")
    parser.add_argument("--kinds", nargs="*", default=[], help="files, or folders of them")
    parser.add_argument("--together", action="store_true", help="all of them at once")
    parser.add_argument("--built", action="store_true", help="packed weights, adapters, texts")
    parser.add_argument("--project", action="store_true", help="a project's own, a hub's answers")
    arguments = parser.parse_args()
    files: type[inputs.Files] = inputs.Inputs
    if arguments.built:
        files = built_inputs.BuiltInputs
    elif arguments.project:
        files = project_inputs.ProjectInputs

    def known(folder: Path) -> list[str]:
        return [*files(folder).kinds]

    kinds = [
        kind
        for kind in tally.asked(known)
        if not arguments.kinds or any(each in (kind, *_folders(kind)) for each in arguments.kinds)
    ]
    groups = [kinds] if arguments.together else [[kind] for kind in kinds]
    tally.run(
        tally.rounds(groups, arguments),
        lambda folder: files(folder).attempt,
        HARMLESS,
        heading="file | damaged",
        arguments=arguments,
        most_bytes=1 << 30,
        batch=tally.BATCH if arguments.built else MANY,
    )


def _folders(kind: str) -> list[str]:
    return [str(folder) for folder in Path(kind).parents]


if __name__ == "__main__":
    main()
