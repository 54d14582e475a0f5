"""Errors of Google's and Azure's storage, turned into our own. Part of ``infra/cloud.py``.

They are recognised by class names and HTTP status numbers, because the libraries may not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.errors import ConfigError, DataError, MissingError, ReportedError, UnreachableError

_REFUSED = (401, 403)
_PASSING = (408, 429)
_NO_CREDENTIALS = ("DefaultCredentialsError", "RefreshError", "ClientAuthenticationError", "CredentialUnavailableError")
_LOST = ("ServiceRequestError", "ServiceResponseError", "ServiceRequestTimeoutError", "IncompleteReadError", "FSTimeoutError", "TimeoutError")
_CREDENTIALS = {
    "gs": "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or a managed identity",
}


def missing(url: str) -> MissingError:
    """The error for an object that does not exist."""
    return MissingError(f"{url}: does not exist.")


def is_beyond_end(error: BaseException) -> bool:
    """Whether the requested range begins at the end of the object or behind it."""
    return _status(error) == 416


@contextmanager
def told(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what gcsfs and adlfs raise into our own errors.

    Raises:
        ReportedError: DataError, UnreachableError (which is retried) or ConfigError.
    """
    try:
        yield
    except (ReportedError, FileExistsError, ImportError):
        raise
    except Exception as error:
        raise _explain(url, error, writing) from error


def _explain(url: str, error: Exception, writing: bool) -> ReportedError:
    names = {kind.__name__ for kind in type(error).__mro__}
    scheme, number = url.partition("://")[0], _status(error)
    text = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError) or number == 404 or "ResourceNotFoundError" in names:
        if writing or "container" in text or "bucket does not exist" in text.lower():
            return ConfigError(f"{url}: the bucket does not exist; create it, or name another one.")
        return missing(url)
    if number in _REFUSED or isinstance(error, PermissionError) or names & set(_NO_CREDENTIALS):
        return ConfigError(f"{url}: refused, or no usable credentials ({text or type(error).__name__}); {_CREDENTIALS[scheme]}.")
    if names & set(_LOST) or "ClientError" in names or number >= 500 or number in _PASSING or isinstance(error, ConnectionError):
        return UnreachableError(f"{url}: failed after repeated attempts ({text or type(error).__name__}); check the network and the endpoint.")
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return UnreachableError(f"{url}: an answer came damaged ({text}); check the network.")
    if isinstance(error, ValueError):
        return ConfigError(f"{url}: not a valid name or setting ({text}); {_CREDENTIALS[scheme]}.")
    if isinstance(error, OSError):
        return UnreachableError(f"{url}: failed ({text or type(error).__name__}); check the network and the endpoint.")
    return DataError(f"{url}: the server answered an error ({type(error).__name__}: {text}).")


def _status(error: Any) -> int:
    """The HTTP status of an error; 0 if it has none."""
    for name in ("status_code", "code", "status"):
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return 0
