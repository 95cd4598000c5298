"""hub_errors: what went wrong with a model hub, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from tasks.checkpoints.hub_requests import (
    NO_ANSWER,
    TRANSIENT,
    CutShort,
    NeverReached,
    endpoint,
    is_closed,
    is_expired,
    page,
    retry_after,
)
from tasks.core.errors import BuildError, CheckpointError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

TOKEN = "HF_TOKEN"  # the variable that brings one; the client knows others, and a stored one


class HubUnreachable(CheckpointError):
    """The hub does not answer, or is not to be asked."""


@contextmanager
def answers_of_a_hub(repository: str, name: str = "") -> Iterator[None]:
    """Say that it is no hub that answers, where its client makes nothing of the answer.

    Raises:
        HubUnreachable: that is so.
    """
    import httpx2
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HFValidationError, httpx2.TransportError):
        raise
    except (httpx2.RequestError, httpx2.InvalidURL, *NO_ANSWER) as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0][:200].rstrip(".")
        raise HubUnreachable(
            f"{endpoint()} gives no answer of a hub for {name or 'what it holds'} of "
            f"{repository}: {cause}. Look whether it is one (HF_ENDPOINT), and what is between: a "
            "network may want a login in a browser first."
        ) from error


@contextmanager
def errors_of_reading(repository: str, revision: str | None, name: str = "") -> Iterator[None]:
    """Say what is wrong, and what to do about it, where the client says how it came about."""
    import httpx2
    from huggingface_hub import errors

    try:
        with answers_of_a_hub(repository, name):
            yield
    except CheckpointError:
        raise
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        httpx2.TransportError,
    ) as error:
        raise _unreachable(error, repository, revision, name) from error
    except errors.HfHubHTTPError as error:
        _raise_of_status(error, repository, revision, name)
    except CutShort as error:
        raise HubUnreachable(
            f"{name} of {repository} cannot be read: {error}, again and again. Try again later: "
            "what was fetched is kept."
        ) from error
    except NeverReached as error:
        raise HubUnreachable(
            f"{error}, where {endpoint()} has {name} of {repository}, cannot be reached: "
            f"{_cause(error.__cause__)}. Check that the network and the proxy let that host "
            "through, too."
        ) from error
    except RuntimeError as error:
        if not is_closed(error):
            raise
        raise _unreachable(error, repository, revision, name) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"hf:{repository}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{name or 'what the hub says'} of {repository} cannot be kept: {error}. Make room "
            "there, or have HF_HOME name another place."
        ) from error


def _raise_of_status(error: Any, repository: str, revision: str | None, name: str) -> NoReturn:
    """Raise what an answer means for who asked.

    Raises:
        CheckpointError: always.
    """
    from huggingface_hub import errors, get_token

    status, address = error.response.status_code, page(repository)
    has_token = get_token() is not None
    grant = (
        f"the token that is used ({TOKEN}, or hf auth login's) must be of that account"
        if has_token
        else f"have {TOKEN} hold a token of that account, or log in: hf auth login"
    )
    if is_expired(error.response):
        raise HubUnreachable(
            f"{_host(error.response)} refuses the addresses that {endpoint()} gives for "
            f"{name or 'what it holds'} of {repository} (status {status}), again and again. Try "
            "again later: what was fetched is kept."
        ) from error
    if isinstance(error, errors.GatedRepoError):
        text = f"{repository} is gated. Ask for access at {address}, and {grant}."
    elif isinstance(error, errors.RevisionNotFoundError):
        text = (
            f"{repository} has no branch, tag or commit {revision or 'main'}, or not any more. "
            f"{address}/commits/main lists what it has; {_how_revisions_are_written(revision)}."
        )
    elif isinstance(error, errors.EntryNotFoundError):
        text = f"{repository} has no file {name} at {revision}. {address} lists what it has."
    elif isinstance(error, errors.DisabledRepoError):
        text = f"{repository} is disabled by the hub, see {address}. Take another source."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no model {repository} at {endpoint()}, or it is private. Check the name; "
            f"of a private one, {grant}."
        )
    elif status in (401, 403):
        mend = f"{grant}, valid, and allowed to read it" if has_token else grant
        text = (
            f"{endpoint()} refuses access to {repository} (status {status}). See {address}; {mend}."
        )
    elif status in TRANSIENT:
        waits = retry_after(error.response)
        when = f" It asks to be left alone for {waits:,.0f} s." if waits else ""
        raise HubUnreachable(
            f"{_host(error.response)} answers with status {status} to a request for "
            f"{name or 'what it holds'} of {repository}, again and again.{when} Try again later: "
            "what was fetched is kept."
        ) from error
    else:
        text = (
            f"{_host(error.response)} answers with status {status} to a request for "
            f"{name or 'what it holds'} of {repository}: {_reason(error).rstrip('.')}. Look "
            "whether it is a hub (HF_ENDPOINT), or a proxy answers in its place."
        )
    raise CheckpointError(text) from error


def _how_revisions_are_written(revision: str | None) -> str:
    if re.fullmatch(r"[0-9a-f]{6,39}", revision or ""):
        return "a commit's name is written in full"
    return "where a name has a slash, write %2F"


def _host(response: httpx2.Response) -> str:
    """Return who answered, without what an address says besides: it may be signed."""
    return f"{response.request.url.scheme}://{response.request.url.netloc.decode()}"


def _unreachable(
    error: Exception, repository: str, revision: str | None, name: str
) -> HubUnreachable:
    import httpx2
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    own = not endpoint().startswith(("http://", "https://"))  # else a hub sent it elsewhere
    if isinstance(cause, httpx2.UnsupportedProtocol) and own:
        return HubUnreachable(
            f"HF_ENDPOINT is {endpoint()}, which is no address: {_cause(cause).rstrip('.')}. Write "
            "one as https://huggingface.co is."
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        at = f" at {revision}" if revision else ""
        return HubUnreachable(
            f"{name or 'what it holds'} of {repository}{at} is not on this machine, and "
            "HF_HUB_OFFLINE says that nothing is to be fetched. Unset it."
        )
    return HubUnreachable(
        f"{_not_reached(cause or error, f'{name} of {repository}' if name else repository)}, and "
        "try again: what was fetched is kept."
    )


def _not_reached(error: BaseException, what: str) -> str:
    hub = host = endpoint()
    with suppress(AttributeError, RuntimeError):  # of an error that knows no request
        url = error.request.url  # type: ignore[attr-defined]
        host = f"{url.scheme}://{url.netloc.decode()}"
    where = host if host == hub else f"{host}, where {hub} has it,"
    return (
        f"{what}: {where} cannot be reached: {_cause(error)}. Check the network, HF_ENDPOINT and "
        "the proxy"
    )


def _cause(error: BaseException | None) -> str:
    return str(error) or type(error).__name__


def _reason(error: HfHubHTTPError) -> str:
    """Return what the hub says of why it refuses."""
    return (error.server_message or "no reason given").partition("\n")[0][:200]


@contextmanager
def errors_of_publishing(repository: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Say what is wrong, and what to do about it, where the hub's client says how it came about.

    Args:
        repository: which is asked about.
        but: an error of the client's that is passed on.

    Raises:
        BuildError: something is wrong.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except but:
        raise
    except errors.OfflineModeIsEnabled as error:
        raise BuildError(
            "HF_HUB_OFFLINE says that the hub is not to be asked. Unset it to publish."
        ) from error
    except (
        errors.HfHubHTTPError,
        httpx2.TransportError,
        RuntimeError,  # of an upload, whose cause is one of those
        ValueError,  # of a name or a card that the hub does not take
    ) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, errors.HfHubHTTPError):
            text = _refusal_to_publish(cause, repository)
        elif isinstance(cause, httpx2.TransportError):
            there = _not_reached(cause, repository)
            text = f"{there}, and publish again: what is there is not sent twice."
        else:
            text = f"{repository} is not published: {error}"
        raise BuildError(text) from error


def _refusal_to_publish(error: HfHubHTTPError, repository: str) -> str:
    """Return what an answer means for who publishes."""
    status, hub, reason = error.response.status_code, endpoint(), _reason(error)
    if status in (401, 403, 404):
        return (
            f"{hub} refuses {repository} (status {status}: {reason}). The token, of {TOKEN} or hf "
            f"auth login, must be valid and may write to {repository.partition('/')[0]}: see "
            f"{hub}/settings/tokens."
        )
    if status in (409, 412):
        return (
            f"{repository} was changed by somebody else while it was compared ({reason}). Nothing "
            "was overwritten: publish again."
        )
    if status in TRANSIENT:
        return f"{hub} answers with status {status} ({reason}). Publish again later."
    return f"{hub} answers with status {status} for {repository}: {reason}"
