"""hub_name: what ``hf:ORG/NAME[@REVISION][/SUBFOLDER]`` names, as models.toml spells it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from tasks.core.kinds import Mistake, Mistakes

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][\w.-]*"
_TEXT = re.compile(
    rf"(?P<repository>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?"
    r"(?:/(?P<subfolder>[^/].*?))?/?",
    re.ASCII,
)
_MEANT = re.compile(  # ORG/NAME, a page's address, or how other programs and git write it
    r"(?P<prefix>https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:hf|huggingface):/{0,2})?"
    r"(?:models/)?(?P<repository>[A-Z0-9][\w.-]*/[\w.-]*?\w)(?:\.git)?"
    r"(?:[@:#](?P<named>[\w.-]+)|/(?P<kind>tree|blob|resolve)/(?P<revision>[^/]+))?"
    r"(?P<subfolder>/.+?)?/?",
    re.ASCII | re.IGNORECASE,
)


_NO_ORGANIZATION = "models/"  # of the hub's own addresses
_OF_A_PAGE = ("tree/", "blob/", "resolve/")
NO_MODELS = ("datasets", "spaces")  # names that no organization has


class HubName(NamedTuple):
    """Where a checkpoint lies on a hub.

    Attributes:
        repository: ``ORG/NAME``.
        revision: a branch, a tag or a commit; None, the default branch.
        subfolder: the folder in the repository; "", none.
    """

    repository: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = ""
        if self.revision:
            revision = "@" + quote(self.revision, "/" if self.revision[:5] == "refs/" else "")
        return f"{PREFIX}{self.repository}{revision}/{self.subfolder}".rstrip("/")


def parse(text: str) -> HubName:
    """Return what a name, without ``hf:``, means.

    Raises:
        Mistakes: it means nothing.
    """
    match = _TEXT.fullmatch(text)
    subfolder = PurePosixPath(match["subfolder"] or "") if match else PurePosixPath()
    first, _, _ = text.strip().strip("/").partition("/")
    if first in NO_MODELS:
        fact = f"is '{PREFIX}{text}', of the hub's {first}: only a model is a checkpoint"
        raise Mistakes(Mistake(fact, "write hf:ORG/NAME of one"))
    meant = _meant(text.strip())
    if not match or ".." in subfolder.parts or (meant and text.startswith(_NO_ORGANIZATION)) or (
        match["repository"].endswith(".git") or str(subfolder).startswith(_OF_A_PAGE)
    ):  # fmt: skip
        fact = f"is '{PREFIX}{text}', which is no name on the hub"
        mend = meant or "hf:ORG/NAME, hf:ORG/NAME@REVISION or …/SUBFOLDER"
        raise Mistakes(Mistake(fact, f"write {mend}"))
    revision = match["revision"] and unquote(match["revision"])  # as the hub's pages spell them
    return HubName(match["repository"], revision, "/".join(subfolder.parts))


def hint(named: str) -> str:
    """Return what a name that is no folder may be meant to be: a model on the hub; or nothing."""
    meant = _meant(named)
    return f", or the hub's: {meant}" if meant and meant != named else ""


def _meant(text: str) -> str:
    """Return what would be a name on the hub, of text that may be meant to be one; or nothing."""
    match = _MEANT.fullmatch(text.strip("/"))
    if not match:
        return ""
    if match["subfolder"] and not (match["prefix"] or match["named"] or match["kind"]):
        return ""  # a path as any other
    revision, subfolder = match["named"] or match["revision"], match["subfolder"] or ""
    if match["kind"] in ("blob", "resolve"):  # of a file
        subfolder = subfolder.rpartition("/")[0]
    meant = f"{match['repository']}{f'@{revision}' if revision else ''}{subfolder}"
    return f"{PREFIX}{meant}" if _TEXT.fullmatch(meant) and ".." not in meant else ""
