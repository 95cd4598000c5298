"""kinds: what keys of models.toml may be, how one is declared, and mistakes in them."""

from typing import Any, Literal

from msgspec import Meta

Dtype = Literal["float16", "bfloat16", "float32"]

At = tuple[str | int, ...]  # where in a table: keys, and indices of a list's elements


class Word(str):
    """A word that must be one of a registry's, by its subclass; registries lie in rooms above."""

    __slots__ = ()


class LoaderName(Word):
    """One of ``tasks.checkpoints.loaders``."""

    __slots__ = ()


class LayoutName(Word):
    """One of ``tasks.layouts.registry``."""

    __slots__ = ()


class StageName(Word):
    """A stage whose results the cache keeps if it is told to."""

    __slots__ = ()


class SourceName(str):
    """A source as models.toml names it."""

    __slots__ = ()


class TextFile(str):
    """The path of a file of text."""

    __slots__ = ()


class TextFiles(tuple[str, ...]):
    """The paths of files of text; models.toml may give one without a list."""

    __slots__ = ()


class RepositoryName(str):
    """A repository on a model hub, ORG/NAME; ``{target}`` in it is the target's name."""

    __slots__ = ()

    def of(self, target: str) -> str:
        """Return the repository of a target."""
        return self.replace("{target}", target)


class Size(int):
    """A number of bytes; models.toml may give it a unit."""

    __slots__ = ()


class Mistake(ValueError):
    """One thing that is wrong with a table or a value.

    Attributes:
        fact: what is wrong, to follow the key's name.
        mend: what to do about it, if that can be said.
        at: where, below what was read.
    """

    def __init__(self, fact: str, mend: str = "", at: At = ()) -> None:
        super().__init__(fact)
        self.fact = fact
        self.mend = mend
        self.at = at


class Mistakes(ValueError):
    """All that is wrong with a table or a value.

    Attributes:
        mistakes: one by one.
    """

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("; ".join(mistake.fact for mistake in mistakes))
        self.mistakes = mistakes


def key(meaning: str, *, change: str, example: Any, default: str = "") -> Meta:
    """Describe a key of models.toml, for people.

    Args:
        meaning: one sentence on what it is for.
        change: what is done again when it changes.
        example: a value.
        default: what holds without it, where the field's default does not say it.
    """
    extra = {"change": change, "default": default}
    return Meta(description=meaning, examples=[example], extra=extra)
