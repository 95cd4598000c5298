"""hub_name: what ``hf:ORG/NAME[@REVISION][/SUBFOLDER]`` names, as models.toml spells it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, unquote

from tasks.core.spec import Mistake, Mistakes

PREFIX = "hf:"
_PART = r"[A-Za-z0-9][\w.-]*"
_TEXT = re.compile(
    rf"(?P<repository>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?"
    r"(?:/(?P<subfolder>[^/].*?))?/?",
    re.ASCII,
)
_MEANT = re.compile(  # ORG/NAME, or a page's address
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:hf|huggingface):)?"
    r"(?P<repository>[A-Z0-9][\w.-]*/[\w.-]*\w)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?P<subfolder>/.+?)?)?/?",
    re.ASCII | re.IGNORECASE,
)


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
    first, _, rest = text.strip().strip("/").partition("/")
    if first in NO_MODELS:
        fact = f"is '{PREFIX}{text}', of the hub's {first}: only a model is a checkpoint"
        raise Mistakes(Mistake(fact, "write hf:ORG/NAME of one"))
    meant = rest if first == "models" else f"{first}/{rest}"
    if not match or ".." in subfolder.parts or meant == rest:
        fact = f"is '{PREFIX}{text}', which is no name on the hub"
        mend = "hf:ORG/NAME, hf:ORG/NAME@REVISION or …/SUBFOLDER"
        mend = f"{PREFIX}{meant}" if _TEXT.fullmatch(meant) and ".." not in meant else mend
        raise Mistakes(Mistake(fact, f"write {mend}"))
    revision = match["revision"] and unquote(match["revision"])  # as the hub's pages spell them
    return HubName(match["repository"], revision, "/".join(subfolder.parts))


def hint(named: str) -> str:
    """Return what a name that is no folder may be meant to be: a model on the hub; or nothing."""
    match = _MEANT.fullmatch(named)
    if not match:
        return ""
    revision = f"@{match['revision']}" if match["revision"] else ""
    return f", or the hub's: {PREFIX}{match['repository']}{revision}{match['subfolder'] or ''}"
