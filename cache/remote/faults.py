"""faults: what can go wrong with a request to a remote, in one vocabulary, with the mend."""

from __future__ import annotations

import errno
import re
from http import HTTPStatus

from cache.remote.credentials import PASSWORD, REMOTE, USER

BODY_CHARS = 1 << 16  # of an error's text

_CREDENTIALS = {
    "s3": "the AWS_* variables or the profile in ~/.aws (it needs s3:GetObject; s3:ListBucket, or "
    "S3 does not say that an object is not there; s3:PutObject to write)",
    "gs": "the GOOGLE_* variables or gcloud's default credentials",
    "az": "the AZURE_* variables",
    "https": f"{USER} and {PASSWORD}, with {REMOTE} as the server's, or ~/.netrc",
    "http": f"{USER} and {PASSWORD}, with {REMOTE} as the server's, or ~/.netrc",
    "file": "the folder's owner and mode",
}
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Absent(Exception):
    """There is no such object."""


class WrongSize(Exception):
    """The object has another size than what is looked for can have."""


class NoRanges(Exception):
    """The server answers with whole objects only."""


class Fault(Exception):
    """A request that failed.

    Attributes:
        cause: what happened, for people; never with a credential in it.
        mend: what to do.
        transient: the same request may succeed soon.
        answered: the server was reached.
        waited: seconds for which nothing came, or too little.
    """

    def __init__(
        self, cause: str, mend: str, *, transient: bool, answered: bool, waited: float = 0
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.mend = mend
        self.transient = transient
        self.answered = answered
        self.waited = waited


def of_error(error: BaseException, scheme: str, limit: float) -> Fault:
    """Return the fault that obstore's ``error`` tells of, in its text alone.

    The text itself is never shown: a URL in it may be signed.

    Args:
        error: what obstore raised.
        scheme: of the remote's URL.
        limit: seconds for which the server could be silent.
    """
    text = str(error)
    if "169.254." in text or "TokenRequest" in text:
        return refused("no credentials were found that it takes", scheme, answered=False)
    status = re.search(r"status code: (\d{3})[^:]*:? ?(.*)", text, re.DOTALL)
    if status:
        return of_status(int(status[1]), status[2][:BODY_CHARS], scheme)
    if "Received redirect without LOCATION" in text:
        return Fault(
            "it answered that the bucket is in another region",
            "Set AWS_REGION to the bucket's.",
            transient=False,
            answered=True,
        )
    system = re.search(r"(?:os error|\bcode:) (\d+)", text)
    if scheme == "file":
        return _of_errno(int(system[1]) if system else 0)
    kind = re.search(r"kind: (Connect|Timeout|Interrupted|Request|Decode|Unknown)", text)
    if kind:
        return of_connection(kind[1], text, limit)
    return Fault(
        f"it cannot be opened or read ({type(error).__name__})",
        f"Check its address, and the credentials: {_CREDENTIALS[scheme]}.",
        transient=False,
        answered=False,
    )


def of_connection(kind: str, text: str, limit: float) -> Fault:
    """Return the fault of a connection that failed.

    Args:
        kind: in which way, as obstore calls it.
        text: what obstore said.
        limit: seconds for which the server could be silent.
    """
    said = re.findall(r'message: "([\w \-]+)"', text)
    name = "its name is not known" if "dns error" in text else ""
    tls = "its certificate is not trusted" if "certificate" in text else ""
    waited = 0.0
    if kind == "Timeout":
        waited = limit
        cause = f"it took more than {limit:g} s to answer, or sent too slowly"
    else:
        cause = name or tls or (said[-1].lower() if said else "the connection broke")
    mend = "Check its address, that the server is up, and the network."
    answered = kind in ("Interrupted", "Decode")
    return Fault(cause, mend, transient=not tls, answered=answered, waited=waited)


def of_status(status: int, body: str, scheme: str) -> Fault:
    """Return the fault that an HTTP answer from a remote of ``scheme`` tells of."""
    code = re.search(r"<Code>(\w{1,64})</Code>", body)
    phrase = code[1] if code else _PHRASES.get(status)
    said = f"it answered {status} ({phrase})" if phrase else f"it answered {status}"
    if code and code[1] == "RequestTimeTooSkewed":
        return _skewed(said, body)
    if status in (401, 403, 407):
        return refused(said, scheme, answered=True)
    if status == 507:
        return _full(said)
    mend = "Try again when the server is well."
    if status in (405, 501):
        mend = "The server takes no uploads. Have it allow PUT, or use it read-only."
    elif status == 413:
        mend = "Raise the size of a body that the server takes (nginx: client_max_body_size)."
    elif status not in TRANSIENT:
        mend = "Check its address."
    return Fault(said, mend, transient=status in TRANSIENT, answered=True)


def refused(cause: str, scheme: str, *, answered: bool) -> Fault:
    """Return the fault of a remote of ``scheme`` that does not let us in."""
    mend = f"Check the credentials: {_CREDENTIALS[scheme]}."
    return Fault(cause, mend, transient=False, answered=answered)


def _of_errno(number: int) -> Fault:
    said = errno.errorcode.get(number, "unknown error")
    if number in _FULL:
        return _full(f"the disk is full ({said})")
    if number in _FORBIDDEN:
        return refused(f"it is not allowed ({said})", "file", answered=True)
    if number == errno.ENOENT:
        return Fault(
            "there is no such folder",
            "Make it, or mount what it is on.",
            transient=False,
            answered=False,
        )
    if number in (errno.EEXIST, errno.ENOTDIR):
        return Fault(
            f"a file is where a folder must be ({said})",
            "Name a folder.",
            transient=False,
            answered=False,
        )
    mend = "Check the file system that it is on."
    return Fault(f"it failed ({said})", mend, transient=True, answered=True)


def _full(cause: str) -> Fault:
    return Fault(cause, "Make room there.", transient=False, answered=True)


def _skewed(cause: str, body: str) -> Fault:
    here, there = (
        match[1]
        if (match := re.search(rf"<{tag}>([\w:.+\- ]{{1,64}})</{tag}>", body))
        else "unknown"
        for tag in ("RequestTime", "ServerTime")
    )
    return Fault(
        f"{cause}: this machine's clock says {here}, the server's {there}",
        "Set this machine's clock: signed requests are taken for some minutes only.",
        transient=False,
        answered=True,
    )
