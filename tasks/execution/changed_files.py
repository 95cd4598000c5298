"""changed_files: what was read of files that changed, or that are not what they are said to be."""

from __future__ import annotations

from collections.abc import Iterable

from cache.digest import digest_parts
from cache.errors import FileChanged
from cache.files.stamp import Stamp
from tasks.core.errors import CheckpointError
from tasks.core.program import COMMAND
from tasks.execution.builder import Builder
from tasks.planning.plan import Plan


def refuse_wrong_files(builder: Builder, plans: Iterable[Plan], *, waits: bool = True) -> None:
    """Refuse what was read of files that are not what they are said to be, and forget it.

    Args:
        builder: ran what read them.
        plans: the targets of one checkpoint.
        waits: whether to hash files of this machine that are not hashed yet.

    Raises:
        CheckpointError: a file's bytes all passed, and have another sha256.
    """
    plans = list(plans)
    checkpoint = plans[0].checkpoint
    passed = builder.streaming.wrong_files(checkpoint)
    builder.streaming.forget(checkpoint, passed)
    read = [key for plan in plans for node in plan.leaves for key in node.outputs()]
    here = builder.hashed.wrong(checkpoint, read, builder.store.memos, waits=waits)
    wrong = {name: str(file.actual) for name, file in passed.items()} | here
    for plan in plans if wrong else ():
        for node in plan.leaves:
            files = {plan.checkpoint.stored[key].file for key in node.outputs()}
            if not files.isdisjoint(wrong):
                builder.forget_leaf(plan, node)
    for name, found in wrong.items():
        path = checkpoint.source.path(name)
        mend = f"Remove {path}: then it is fetched anew" if path else (
            f"Run {COMMAND} again, which fetches it anew"
        )  # fmt: skip
        raise CheckpointError(
            f"{name} of {plans[0].target.source} has sha256 {found}, and is said to have "
            f"{checkpoint.sha256(name)}: it came damaged, or is another. What was read of it "
            f"is forgotten. {mend}."
        )


def check_unchanged(builder: Builder, plan: Plan) -> None:
    """Make sure that a target is made of one checkpoint, and not of one that was written to.

    Raises:
        FileChanged: it was, since it was planned with, under the same size and time.
    """
    checkpoint = plan.checkpoint
    if checkpoint.changes() == checkpoint.changed_at:
        return
    blobs = builder.store.blobs
    for leaf in plan.leaves:  # a name, a permission or a time may be all that changed
        for key, tensor in builder.manifest(plan, leaf).tensors.items():
            if checkpoint.must_copy(key) or not (part := checkpoint.part(key)):
                continue
            now = part._replace(stamp=Stamp.of(part.path))
            if digest_parts(blobs.chunks([now])) != tensor.digest:
                builder.forget_checkpoint(plan)
                raise FileChanged(part.path)
