"""Names of shards in http(s) and object stores: telling, listing and opening them through fsspec.

Credentials come from where each store's own client looks: ~/.netrc and the proxy variables for http(s), AWS_* for s3://,
GOOGLE_APPLICATION_CREDENTIALS for gs://, AZURE_STORAGE_* for az://, FSSPEC_* for all. No message repeats them: user
names, passwords and queries of URLs are left out.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from vlkd.errors import UserError

Pause = Callable[[float], None]
"""Called with the seconds to wait before a retry; may raise to give up."""
HTTP = ("http", "https")
MAX_MATCHES = 1_000_000

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_RETRIED_4XX = (408, 425, 429)
# The global generators belong to training, whose state is resumed exactly.
_JITTER = random.SystemRandom()
_FILE_SYSTEMS: dict[tuple[int, str, float], Any] = {}


class Fault(Exception):
    """An answer that cannot be used: another may be right."""


class Status(Fault):
    """An answer with an HTTP status of 400 or more."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


def is_remote(ref: str) -> bool:
    """Whether a reference names an object behind a protocol (`https://...`), not a local path or `file://`.

    Raises:
        UserError: for `pipe:` commands, chained references (`a::b`) and protocols that fsspec does not know.
    """
    if re.match(r"pipe:", ref):
        raise UserError("Commands (`pipe:...`) are never run; give the URL itself, for instance https:// or s3://.")
    if re.search(r"^\w[\w+.-]*::|::\w[\w+.-]*://", ref):
        raise UserError(f"{redacted(ref)} chains several places with `::`; give each URL by itself.")
    scheme = scheme_of(ref)
    if scheme in ("", "file"):
        return False
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise UserError(
            f"{redacted(ref)} has the unknown protocol {scheme!r}; expected https, s3, gs or another one of fsspec."
        )
    return True


def scheme_of(ref: str) -> str:
    """The protocol in lower case, "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", ref)
    return match[1].lower() if match else ""


def redacted(url: str) -> str:
    """A URL fit for messages: without user name, password, query and fragment."""
    return re.sub(r"://[^/]*@", "://", re.split(r"[?#]", url, maxsplit=1)[0])


def expand_remote(ref: str, *, timeout: float = 60.0, attempts: int = 8, pause: Pause = time.sleep) -> list[str]:
    """The full URLs that a reference names, sorted, each once.

    Args:
        ref: a URL; braces (`{000..123}`) are written out, then `*`, `?` and `[...]` are matched where the store can
            list (over http(s) `*` and `[...]`, if the server answers with a page of links).
        timeout: seconds for a request, ten times as long for a whole listing.
        attempts: at a listing, before giving up.
        pause: waits before a retry.

    Raises:
        UserError: nothing matches, the braces are unbalanced, the store refuses, or its package is not installed.
    """
    from braceexpand import braceexpand

    # The library writes each range out before it combines them.
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", ref)
    too_many = any(abs(int(last) - int(first)) >= MAX_MATCHES for first, last in ranges)
    try:
        patterns = [] if too_many else list(islice(braceexpand(ref), MAX_MATCHES + 1))
    except ValueError:
        raise UserError(f"{redacted(ref)} has unbalanced braces; close each one.") from None
    if too_many or len(patterns) > MAX_MATCHES:
        raise UserError(f"{redacted(ref)} names more than {MAX_MATCHES} URLs; check its ranges.")
    found: set[str] = set()
    for pattern in patterns:
        found.update(_matches(pattern, timeout, attempts, pause))
    if not found:
        raise UserError(f"Nothing matches {redacted(ref)}; check the pattern, or write the names out with braces.")
    return sorted(found)


def _matches(pattern: str, timeout: float, attempts: int, pause: Pause) -> list[str]:
    magic = r"[*\[]" if scheme_of(pattern) in HTTP else r"[*?\[]"
    if not re.search(magic, re.sub(r"^[^/]*//[^/]*", "", pattern)):
        return [pattern]
    file_system, path = file_system_of(pattern, timeout)
    failures = 0
    while True:
        try:
            names = file_system.glob(path, **call_limits(file_system, 10 * timeout))
            break
        except FileNotFoundError:
            return []
        except Exception as error:
            failures += 1
            raise_if_final(error, pattern, failures >= attempts, f"be listed in {failures} attempts")
            pause(wait_before(failures))
    if not pattern.endswith(path):
        return [file_system.unstrip_protocol(name) for name in names]
    # Where a store's own names lack the host, the pattern has it in front.
    return [pattern[: len(pattern) - len(path)] + name for name in names]


def file_system_of(url: str, timeout: float) -> tuple[Any, str]:
    """The file system of a URL and the object's name there.

    Connections live in a thread, which a fork does not copy: each process has its own, and none is ever dropped, since
    closing a parent's connection in its child would disturb the parent.
    """
    import fsspec

    scheme = scheme_of(url)
    key = (os.getpid(), re.sub(r"(://[^/]*).*", r"\1", url, flags=re.DOTALL), timeout)
    try:
        if key not in _FILE_SYSTEMS and scheme in HTTP:
            import aiohttp

            limit = aiohttp.ClientTimeout(total=timeout)
            client = {"trust_env": True, "auto_decompress": False, "timeout": limit}
            _FILE_SYSTEMS[key] = fsspec.filesystem(scheme, client_kwargs=client, skip_instance_cache=True)
        elif key not in _FILE_SYSTEMS:
            _FILE_SYSTEMS[key], _ = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        return _FILE_SYSTEMS[key], _FILE_SYSTEMS[key]._strip_protocol(url)
    except ImportError as error:
        raise UserError(
            f"{redacted(url)} needs a package that is not installed ({error}); run `pip install {_package(scheme)}`."
        ) from None
    except Exception as error:
        raise UserError(f"{redacted(url)} cannot be opened ({_described(error)}); check the address.") from None


def _package(scheme: str) -> str:
    from fsspec.registry import known_implementations

    package = str(known_implementations[scheme]["class"]).split(".")[0]
    return f"'fsspec[{'http' if scheme in HTTP else scheme}]'" if package == "fsspec" else package


def call_limits(file_system: Any, timeout: float) -> dict[str, float]:
    """The time-out of a call, which fsspec takes for its asynchronous stores; the others have their own."""
    from fsspec.asyn import AsyncFileSystem

    return {"timeout": timeout} if isinstance(file_system, AsyncFileSystem) else {}


def wait_before(failures: int) -> float:
    """Seconds before the next attempt: doubling, times a random factor between 0.5 and 1.5."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** (failures - 1)) * (0.5 + _JITTER.random())


def raise_if_final(error: Exception, url: str, exhausted: bool, failed: str) -> None:
    """Raise `UserError` when another attempt is pointless, or none is left: the URL then "could not `failed`"."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise UserError(f"There is no {redacted(url)}; check the address.") from None
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        raise UserError(
            f"{redacted(url)} is refused ({_described(error)}); check the credentials in your environment."
        ) from None
    wrong = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_4XX
    if wrong or isinstance(error, ValueError):
        raise UserError(f"{redacted(url)} cannot be read ({_described(error)}); check the address.") from None
    if exhausted:
        raise UserError(
            f"{redacted(url)} could not {failed} (last: {_described(error)}); check the network and the server, or "
            "scan the shards again if they changed."
        ) from None


def _described(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(status, int):
        return f"HTTP {status}"
    text = re.sub(r"\w+://[^\s'\"]+", lambda match: redacted(match[0]), str(error))
    words = " ".join(text.split())[:200]
    return words if isinstance(error, Fault) else f"{type(error).__name__}: {words}".removesuffix(": ")
