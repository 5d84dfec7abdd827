"""What the hub's refusals and failures mean, each with the command that mends it."""

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any, TypeVar

from awqconv.checkpoint.strict import shown
from awqconv.errors import AwqconvError, VerificationError

T = TypeVar("T")

TRIES = 5
MAX_WAIT = 120.0  # seconds of Retry-After that are waited out

_AGAIN = "Run the same command again; files that are complete are kept."


class CutShortError(VerificationError):
    """A file ended early, by the server's own account of its length."""


class WrongSourceError(VerificationError):
    """Bytes that were handed out are not the hub's: what was made of them must not be kept."""


class StoppedError(Exception):
    """The run is over: a download that is still under way ends."""


class NoRangesError(AwqconvError):
    """The server sends whole files only."""


def http_error() -> type[Exception]:
    """What the client's HTTP library raises (its name changed between hub versions)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def retried(call: Callable[[], T]) -> T:
    """`call`, again up to four times after a lost connection, a stall, 408, 429 or 5xx.

    The client's own retries leave out resets and 5xx in mid-download.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except http_error() as error:
            wait = _wait(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
        time.sleep(wait)
    raise AssertionError


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next try; None where there is no use in one."""
    response: Any = getattr(error, "response", None)
    if response is None:
        return float(1 << attempt) / 2
    status: int = response.status_code
    if status not in (408, 429) and status < 500:
        return None
    wait = max(retry_after(error), float(1 << attempt) / 2)
    return wait if wait <= MAX_WAIT else None


def retry_after(error: Exception) -> float:
    """Seconds that a response asks to be left alone; 0 where it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = re.search(r"r=0;\s*t=(\d+)", headers.get("ratelimit", ""))
    wait = limit[1] if limit else headers.get("retry-after", "")
    return float(wait) if wait.isdigit() else 0.0


@contextmanager
def explained(repo: str, revision: str | None = None, file: str = "") -> Iterator[None]:
    """Turns what the hub client raises into AwqconvError with what, where and fix."""
    try:
        yield
    except AwqconvError:
        raise
    except Exception as error:
        told = explain(error, repo, revision, file)
        if told is None:
            raise
        raise told from error


def explain(
    error: BaseException, repo: str, revision: str | None = None, file: str = ""
) -> AwqconvError | None:
    """The most telling failure among `error` and its causes; None if none is the hub's."""
    from huggingface_hub import constants, errors, get_token

    where = shown(f"{repo}@{revision}" if revision else repo or "the name is empty") + (
        f": {shown(file)}" if file else ""
    )
    hub = constants.ENDPOINT
    login = "hf auth login"
    transport = http_error()
    causes = list(_causes(error))
    for cause in causes:
        match cause:
            case AwqconvError():
                return cause
            case errors.GatedRepoError():
                return AwqconvError(
                    "gated: its authors grant access on request, and you have not been granted it",
                    where,
                    f"Ask for access at {hub}/{repo}, then run: {login}",
                )
            case errors.DisabledRepoError():
                return AwqconvError(
                    "the hub has disabled this repository", where, "Use another repository."
                )
            case errors.RevisionNotFoundError():
                return AwqconvError(
                    "there is no such revision",
                    where,
                    f"See {hub}/{repo}/commits/main, or take the default branch: "
                    f"awqconv pull {repo}",
                )
            case errors.RemoteEntryNotFoundError():
                return AwqconvError(
                    "there is no such file at this revision", where, f"See {hub}/{repo}/tree/main"
                )
            case errors.OfflineModeIsEnabled():
                return AwqconvError(
                    "HF_HUB_OFFLINE is set, and this is not in the cache",
                    where,
                    f"Once, with a connection, run: HF_HUB_OFFLINE=0 awqconv pull {repo}",
                )
            case errors.HFValidationError():
                return AwqconvError(
                    "not a repository name: " + shown(str(cause).partition(":")[0], 200),
                    where,
                    "Write it as organisation/name, for a revision organisation/name@revision.",
                )
            case errors.HfHubHTTPError():
                return _status(cause, repo, where, hub, get_token() is not None)
            case errors.FileMetadataError():
                return AwqconvError(
                    f"{hub} does not answer as a hub does: " + shown(str(cause), 200),
                    where,
                    "Check HF_ENDPOINT and the proxy: echo $HF_ENDPOINT $HTTPS_PROXY",
                )
            case transport():
                name = type(cause).__name__
                if "Timeout" in name:
                    what = f"{hub} stopped answering"
                elif name == "ConnectError":
                    what = f"{hub} cannot be reached ({shown(str(cause))})"
                else:
                    what = f"{hub} broke the connection off ({shown(str(cause))})"
                return AwqconvError(what, where, f"Check the connection: curl -I {hub}\n{_AGAIN}")
    for cause in causes:
        match cause:
            case errors.LocalEntryNotFoundError():
                return AwqconvError(
                    "not in the cache, and the hub was not asked",
                    where,
                    f"Once, with a connection, run: HF_HUB_OFFLINE=0 awqconv pull {repo}",
                )
            case OSError() if cause.errno:
                return AwqconvError(
                    f"cannot be written: {cause.strerror}",
                    shown(str(cause.filename or where)),
                    f"Free some space, or name another folder: awqconv pull {repo} --to DIR",
                )
            case OSError() if "Consistency check failed" in str(cause):
                return CutShortError(
                    "the file the hub sends is shorter or longer than it records",
                    where,
                    "Something between you and the hub changes files: check the proxy.\n" + _AGAIN,
                )
            case JSONDecodeError():
                return AwqconvError(
                    f"{hub} does not answer as a hub does, but with something that is no JSON",
                    where,
                    "Check HF_ENDPOINT and the proxy, and log in to the network if it asks you to: "
                    "echo $HF_ENDPOINT $HTTPS_PROXY",
                )
            case ValueError() if "too large" in str(cause):
                return AwqconvError(
                    "above 50 GB the hub serves a file through its xet storage only",
                    where,
                    "Install its client: pip install hf_xet",
                )
            case RuntimeError() | ValueError():  # hf_xet has no types of its own
                return AwqconvError(
                    f"the hub client failed: {shown(str(cause), 300)}", where, _AGAIN
                )
    return None


def disk_full(error: BaseException) -> bool:
    """Whether a disk without space is among the causes. hf_xet says so in words only."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or (isinstance(cause, RuntimeError) and "No space left" in str(cause))
        for cause in _causes(error)
    )


def _status(error: Exception, repo: str, where: str, hub: str, token: bool) -> AwqconvError:
    """What an HTTP status without a type of its own means."""
    response: Any = getattr(error, "response", None)
    status, said = response.status_code, response.headers.get("X-Error-Message", "")
    if status == 401 and any(word in said for word in ("credentials", "token", "password")):
        what = "the hub does not accept your token: " + shown(said)
        return AwqconvError(what, where, "Replace it: unset HF_TOKEN; hf auth login --force")
    if status in (401, 404):
        return AwqconvError(
            "not found, or private and "
            + ("your token does not open it" if token else "you are not logged in"),
            where,
            f"Check the name at {hub}/{repo}, or log in with an account that can see it: "
            "hf auth login",
        )
    if status == 403:
        return AwqconvError(
            "your token does not allow this" + (f": {shown(said)}" if said else ""),
            where,
            "Log in with a token that does: hf auth login --force",
        )
    if status == 429:
        wait = retry_after(error)
        return AwqconvError(
            "the hub limits how often you may ask" + (f", for {wait:.0f} s more" if wait else ""),
            where,
            (f"sleep {wait:.0f}, then run" if wait else "Wait some minutes, then run")
            + " the same command again; files that are complete are kept."
            + ("" if token else " Logged in the limit is higher: hf auth login"),
        )
    if status >= 500:
        return AwqconvError(
            f"the hub is out of order (HTTP {status})",
            where,
            f"See https://status.huggingface.co, wait, then: {_AGAIN}",
        )
    return AwqconvError(f"the hub answers HTTP {status}: {shown(str(said))}", where, _AGAIN)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
