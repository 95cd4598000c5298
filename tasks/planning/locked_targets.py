"""locked_targets: targets, and what is packed of them, held against models.lock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from cache.digest import digest_record
from cache.records.manifests import Action, Manifest
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.text import some
from tasks.layouts.card import is_document
from tasks.planning import bundle, source_record
from tasks.planning.lock_format import Built
from tasks.planning.lockfile import MAX_NAMES, Lock
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource
from tasks.stages import quantize_scheme
from tasks.stages.stage import PROGRAMS


def check_plans(lock: Lock, plans: Iterable[Plan]) -> None:
    """Refuse adapters that are not as they are locked, and, if ``strict``, any difference.

    Raises:
        BuildError: models.toml, or what it names, is not what was locked.
    """
    now = {plan.target.name: plan for plan in plans}
    _check_adapters(lock, now.values())
    if not lock.strict:
        return
    names = {plan.target.source_name for plan in now.values()}
    differences = [
        f"{file} of source {source_name} is another"
        for source_name, plan in {p.target.source_name: p for p in now.values()}.items()
        if source_name in lock.sources
        for file in source_record.mismatched_files(
            plan.checkpoint.folder, lock.sources[source_name]
        )
    ]
    differences += [f"source {name} is not in it" for name in sorted(names - lock.sources.keys())]
    differences += [f"it has a source {name}" for name in sorted(lock.sources.keys() - names)]
    named = {name for plan in now.values() if (name := _adapter_on_hub(plan))}
    differences += [f"adapter {n} is not in it" for n in sorted(named - lock.adapters.keys())]
    differences += [f"it has an adapter {n}" for n in sorted(lock.adapters.keys() - named)]
    differences += [f"it has a target {name}" for name in sorted(lock.targets.keys() - now.keys())]
    for name, plan in now.items():
        if name not in lock.targets:
            differences.append(f"target {name} is not in it")
        elif not plan.undecided and lock.targets[name].settings != settings(plan):
            adapted = ", or its adapter other weights" if plan.target.adapter else ""
            differences.append(
                f"target {name} has other settings, or its source other tensors{adapted}, or a "
                "stage of this mlx-make makes others"
            )
        elif (source := lock.sources.get(plan.target.source_name)) and (
            source.record != lock.targets[name].source
        ):
            differences.append(f"target {name} is of an older source")
    if differences:
        raise BuildError(
            f"{lock.path.name} is not of this models.toml and its sources: "
            f"{some(differences, MAX_NAMES, '; ')}. If that is wanted, run {COMMAND} "
            "without --locked, and commit the file."
        )


def _check_adapters(lock: Lock, plans: Iterable[Plan]) -> None:
    for plan in plans:
        now = source_record.pinned_adapter(plan.model.adapter)
        locked = lock.adapters.get(str(plan.target.adapter))
        if not now or not locked or now.revision != locked.revision:
            continue  # of another commit, that is to be locked
        if changed := source_record.moved(locked, now):
            raise BuildError(
                f"{plan.target.name}: adapter {plan.target.adapter} at commit "
                f"{locked.revision} is not what {lock.path.name} has: "
                f"{some(changed, MAX_NAMES)}. A commit never changes: the lock was edited, or "
                "a mirror gives other files (HF_ENDPOINT)."
            )


def check_target(
    lock: Lock,
    plan: Plan,
    source: LockedSource,
    action: Action,
    recorded: Callable[[str], Manifest | None],
) -> list[str]:
    """Compare what is about to be packed with what is locked.

    Args:
        lock: models.lock.
        plan: the target.
        source: its source as it is now.
        action: that packs it.
        recorded: returns what the action of a key made, if that is on record.

    Returns:
        Notes for people: what differs although nothing that was asked for does.

    Raises:
        BuildError: it differs, and ``strict``.
    """
    locked = lock.targets.get(plan.target.name)
    if not locked or locked.action == action.key:
        return []
    asked = (source.record, settings(plan))
    if (locked.source, locked.settings) != asked and not lock.strict:
        return []
    then = recorded(locked.action)
    if not lock.strict and then and _is_another_card(then.action, action):
        return []  # for people, and by other versions: it is locked as it is now
    fact = f"differs from {lock.path.name} although nothing it is built from does: "
    fact += _differences(then, action)
    if locked.computer != plan.computer:
        fact += f"; locked was computed by {_in_words(locked.computer)}, this by "
        fact += _in_words(plan.computer)
    if lock.strict:
        raise _another(lock, plan, fact)
    return [fact]


def contradicts(
    lock: Lock,
    plan: Plan,
    source: LockedSource,
    action: Action,
    recorded: Callable[[str], Manifest | None],
) -> bool:
    """Tell whether the same source, settings and computer made other tensors than are locked.

    Args:
        lock: models.lock.
        plan: the target.
        source: its source as it is now.
        action: that packs it.
        recorded: as for ``check_target``.
    """
    locked = lock.targets.get(plan.target.name)
    if not locked or locked.action == action.key:
        return False
    asked = (source.record, settings(plan), plan.computer)
    if (locked.source, locked.settings, locked.computer) != asked:
        return False
    then = recorded(locked.action)
    return then is None or then.action.inputs != action.inputs


def will_contradict(
    lock: Lock, plan: Plan, action: Action, recorded: Callable[[str], Manifest | None]
) -> bool:
    """Tell whether it ``contradicts`` once a source that is not refused is read.

    Args:
        lock: models.lock.
        plan: the target.
        action: that packs it.
        recorded: as for ``check_target``.
    """
    source = lock.sources.get(plan.target.source_name)
    return (
        source is not None
        and contradicts(lock, plan, source, action, recorded)
        and not source_record.mismatched_files(plan.checkpoint.folder, source)
    )


def check_output(
    lock: Lock, plan: Plan, source: LockedSource, packed: Manifest, blake3: str | None
) -> Built:
    """Compare what was packed with what is locked, and return what is to be locked of it.

    Raises:
        BuildError: the same action made something else, or somebody made it to look as if it
            did not; or it differs, and ``strict``.
    """
    locked = lock.targets.get(plan.target.name)
    sha256 = locked.sha256 if locked and locked.output == packed.result else None
    built = Built(
        source.record, settings(plan), plan.computer, packed.action.key, packed.result, blake3,
        sha256, _chosen(plan), plan.choice.record if plan.choice else None,
    ).sealed  # fmt: skip
    if locked and locked.output != built.output:
        fact = f"was built as {built.output}, and is {locked.output} in {lock.path.name}"
        if locked.action == built.action:  # else check_target said what differs
            raise BuildError(
                f"{plan.target.name} {fact}, of the same tensors and files: that was edited, "
                f"or another mlx-make wrote it. Take {lock.path.name} from version control "
                f"again, or remove it: {COMMAND} then writes it anew."
            )
        if lock.strict:
            raise _another(lock, plan, fact)
    # By accident no two outputs have one xxh3.
    if locked and locked.output == built.output and locked.blake3 not in (None, blake3):
        raise BuildError(
            f"{plan.target.name} was built with BLAKE3 {blake3}, and is {locked.blake3} in "
            f"{lock.path.name}, though with the same xxh3: a tensor was made to be taken for "
            "another one, or the file was edited. If it was not, remove the cache's folder, "
            "and find out who wrote to its remote, or to it."
        )
    return built


def _another(lock: Lock, plan: Plan, fact: str) -> BuildError:
    return BuildError(
        f"{plan.target.name} {fact}. If that is wanted, run {COMMAND} without --locked, and "
        "commit the file."
    )


def _adapter_on_hub(plan: Plan) -> str | None:
    """Return what models.toml calls a target's adapter, if it is on a hub."""
    return str(plan.target.adapter) if source_record.pinned_adapter(plan.model.adapter) else None


def _chosen(plan: Plan) -> dict[str, tuple[int, int, str]] | None:
    if plan.choice is None:
        return None
    settings = plan.model.settings.items()
    return {quantize_scheme.module_path(name): tuple(setting) for name, setting in settings}


def settings(plan: Plan) -> str:
    """Return a digest of all that a target depends on, but for what computes it."""
    nodes = [
        [n.stage.name, n.layer, n.stage.version,
         {key: value for key, value in n.params.record.items() if key not in PROGRAMS}]
        for stage in plan.stages.values() for n in stage
    ]  # fmt: skip
    target = plan.target
    laid_over = [bundle.params(plan)["files"]] if target.files else []
    shards = target.max_shard_bytes
    return digest_record(
        [target.layout, shards, plan.names, json.dumps(plan.config), nodes, *laid_over]
    )


def _differences(old: Manifest | None, new: Action) -> str:
    """Return in words how what is packed differs, tensor by tensor."""
    if old is None:
        return "what was packed then is not on record here"
    before, after = old.action.inputs, new.inputs
    changed = [
        name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]
    if not changed:
        return f"the tensors are the same, {some(_changed_files(old.action, new), MAX_NAMES)} not"
    return f"{len(changed)} of {len(after)} tensors: {some(changed, MAX_NAMES)}"


def _changed_files(old: Action, new: Action) -> list[str]:
    """Return the names of small files that are not packed the same."""
    before, after = old.params["files"], new.params["files"]
    return [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]


def _is_another_card(old: Action, new: Action) -> bool:
    """Tell whether two packings differ in what is for people alone."""
    same = {**old.params, "files": None} == {**new.params, "files": None}
    return same and old.inputs == new.inputs and all(map(is_document, _changed_files(old, new)))


def _in_words(computer: dict[str, str] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (computer or {}).items()) or "nothing"
