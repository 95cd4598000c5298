"""publish_tasks: doit's tasks that publish what is built: one a target, one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec import to_builtins

from cache.files import atomic
from cache.records.manifests import Manifest, Tensor
from cache.records.sealed import Damaged, seal, unseal
from tasks.cli.failures import values_or_failure
from tasks.cli.refused_tasks import refused_tasks
from tasks.cli.session import Session
from tasks.core.errors import BuildError, ConfigError
from tasks.core.task_names import PACK, PUBLISH, REPORT, task_name
from tasks.core.text import plural, size, some
from tasks.core.workspace import BUILD
from tasks.execution import publish
from tasks.execution.filling import place
from tasks.execution.filling.place import Contents, Stamps
from tasks.execution.publish import MAX_NAMES, Difference, Publication, Published, Repository
from tasks.layouts.card import CARD
from tasks.layouts.registry import LAYOUTS
from tasks.planning import model_card
from tasks.planning.plan import Plan
from tasks.report.figures import Reader
from tasks.stages import registry


def tasks(session: Session, database: Any) -> Iterator[dict[str, Any]]:
    """Yield the tasks.

    Raises:
        ConfigError: a run that publishes has no token.
    """
    publisher = Publisher(session, database)
    names = [task_name(PUBLISH, name) for name, t in session.config.targets.items() if t.repository]
    if not session.options.read_only and any(map(session.options.requests, names)):
        publish.check_token()
    named = session.options.requested_tasks or ()
    for plan in session.plans.values():
        # Of others only a call that names them is told what is missing.
        if plan.target.repository or task_name(PUBLISH, plan.target.name) in named:
            yield _task(publisher, plan)
    yield from refused_tasks(session, PUBLISH)
    known = session.plans.keys() | session.refused.keys()  # who names tasks has those alone
    wanted = [n for n, target in session.config.targets.items() if target.repository and n in known]
    if wanted or PUBLISH in named:
        yield _group(session, wanted)


def _task(publisher: Publisher, plan: Plan) -> dict[str, Any]:
    name, options = plan.target.name, publisher.session.options
    task = task_name(PUBLISH, name)
    # What its card tells of, where the same call asks for it.
    stages = (*registry.MEASURES, *registry.RUNNING)
    asked = {stage.name: task_name(stage.group, name) for stage in stages}
    asked = {stage: task for stage, task in asked.items() if options.requests(task)}
    card_tasks = [task for stage, task in asked.items() if plan.nodes(stage)]
    report = task_name(REPORT, name)
    card_tasks += [report] if options.requests(report) else []
    return {
        "basename": task,
        "doc": "Publish the target.",
        "actions": [lambda: values_or_failure(lambda: publisher.publish(plan))],
        # Not at once: the hub finds shared chunks only in what it already has.
        "task_dep": [task_name(PACK, name), *card_tasks],
        "io": {"capture": False},
        "meta": {"publisher": publisher, "plan": plan},
    }


def _group(session: Session, wanted: list[str]) -> dict[str, Any]:
    """Return the task of all targets that are ``wanted``: that say where they are published."""

    def nothing() -> dict[str, Any]:
        raise ConfigError(
            f"{session.config.path.name} publishes nothing: say where to, in [defaults] or a "
            'model: publish = "ORG/{target}"'
        )

    return {
        "basename": PUBLISH,
        "actions": None if wanted else [lambda: values_or_failure(nothing)],
        "task_dep": [task_name(PUBLISH, name) for name in wanted],
    }


@dataclass(frozen=True)
class Publisher:
    """Publishes the targets of a session, one after another.

    Attributes:
        session: the targets.
        database: doit's dependency manager, which has what was published before.
    """

    session: Session
    database: Any
    _one: threading.Lock = field(default_factory=threading.Lock)

    def publish(self, plan: Plan) -> dict[str, Any]:
        """Publish a target; return the values that doit keeps of the task.

        Raises:
            BuildError: it cannot be.
        """
        name = plan.target.name
        publication = self._publication(plan)
        builder = self.session.builder
        with self._one, builder.logged(task_name(PUBLISH, name), "it was asked for") as record:
            difference = self.compare(plan)
            self._lock_sha256(plan)
            there = publication.upload(difference)
            self._note(name, publication, difference, there)
            publication.collect()
            record["outcome"] = "computed" if difference.is_something else "reused"
        return {
            "summary": in_words(publication, difference, done=True),
            "notes": notes(publication, difference),
        }

    def compare(self, plan: Plan) -> Difference:
        """Compare a target that is packed with its repository.

        Raises:
            BuildError: it is not packed, or cannot be published.
        """
        name = plan.target.name
        packed, stamps = self._packed(name)
        folder = place.folder_of(self.session.workspace, name)
        there = Contents.of(folder, [packed.tensors], stamps)
        if there.changed or set(there.kept) != set(packed.tensors):
            raise BuildError(f"{BUILD}/{name} is not as it was built")
        return self._publication(plan).compare(there.kept, there.added, self._last(name))

    def _packed(self, target: str) -> tuple[Manifest, Stamps]:
        """Return a target's manifest, and the stamps of its files when they were built.

        Raises:
            BuildError: it is not packed.
        """
        packed = Manifest.at(self.session.workspace.packed(target))
        if packed is None:
            raise BuildError(f"{BUILD}/{target} is not built")
        return packed, self.database.get_values(task_name(PACK, target)).get("outputs") or {}

    def _lock_sha256(self, plan: Plan) -> None:
        """Have models.lock say what those who download a target should find.

        Raises:
            BuildError: it says something else.
        """
        packed, stamps = self._packed(plan.target.name)
        self.session.acceptor.sha256(plan, packed, stamps)

    def _last(self, target: str) -> Published:
        """Return what was last published of a target; doit forgets of tasks that fail."""
        try:
            return unseal(target, self.session.workspace.published(target).read_bytes(), Published)
        except (FileNotFoundError, Damaged):
            return Published()

    def _note(
        self, target: str, publication: Publication, difference: Difference, there: Repository
    ) -> None:
        ours = {name: there.files[name] for name in difference.files}
        published = Published(publication.repository, ours)
        path = self.session.workspace.published(target)
        atomic.write(path, seal(target, to_builtins(published)))

    def _publication(self, plan: Plan) -> Publication:
        """Return where a target goes.

        Raises:
            ConfigError: models.toml does not say it.
        """
        target = plan.target
        if target.repository is None:
            raise ConfigError(
                f'{target.where} does not say where it is published: publish = "ORG/{{target}}"'
            )
        return Publication(
            target.name,
            target.repository,
            target.private,
            target.create,
            target.collection,
            self.session.workspace.built(target.name),
            self._card(plan),
            LAYOUTS[target.layout].loaded,
            self.session.store.memos,
        )

    def _card(self, plan: Plan) -> dict[str, bytes]:
        """Return the card with what is known of how good the target is, if anything is.

        Of what lies in build/; there the card is without, lest a build depend on what was measured.
        """
        target, memos = plan.target, self.session.store.memos
        figures = Reader(self.session.builder).read(plan)
        own = target.files and (target.files / CARD).exists()
        if own or figures is None or not (figures.settings or figures.quality):
            return {}
        packed, _ = self._packed(target.name)
        tensors = {
            name: Tensor(dtype, tuple(shape), digest)
            for name, (dtype, shape, digest) in packed.action.inputs.items()
        }
        error = figures.relative if figures.settings else None
        return model_card.render(plan, tensors, memos, error=error, quality=figures.quality)

    def forecast(self, plan: Plan) -> tuple[Difference, list[str]]:
        """Return what publishing a target that is packed would do now, and that in words."""
        publication, difference = self._publication(plan), self.compare(plan)
        said = [in_words(publication, difference, done=False)]
        return difference, [*said, *notes(publication, difference)]


def in_words(publication: Publication, difference: Difference, *, done: bool) -> str:
    """Return what differs, or differed before it was published."""
    repository = publication.repository
    if not difference.is_something:
        return f"{repository} has all of {BUILD}/{publication.target}: no commit"
    parts = []
    if uploads := difference.uploads:
        verb = "uploaded" if done else "to upload"
        files = some(sorted(uploads, key=lambda name: (-uploads[name], name)), MAX_NAMES)
        parts.append(f"{plural(len(uploads), 'file')} {verb}, {size(difference.nbytes)}: {files}")
    if removes := difference.removes:
        parts.append(f"{'removed' if done else 'to remove'}: {some(removes, MAX_NAMES)}")
    created = (
        ""
        if difference.there.commit
        else " (new, " + ("private)" if publication.private else "for all to see)")
    )
    return f"{repository}{created}: {'; '.join(parts)}"


def notes(publication: Publication, difference: Difference) -> list[str]:
    """Return what people should know of files that are left where they are."""
    lines = []
    if difference.added:
        lines.append(
            f"{some(difference.added, MAX_NAMES)} in {BUILD}/{publication.target} was not built, "
            "and is not published: files = … lays files over a model"
        )
    if difference.others:
        lines.append(
            f"{some(difference.others, MAX_NAMES)} in {publication.repository} is not of the "
            "build, and stays"
        )
    return lines
