"""Errors of boto3, turned into our own: of data, of a server that does not answer, or of the configuration, with the variable to set. Part of ``infra/s3.py``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.errors import ConfigError, DataError, MissingError, ReportedError, UnreachableError

_REFUSED = ("403", "AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "AllAccessDisabled")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
MISSING = ("404", "NoSuchKey", "NotFound")
_NOT_TRUSTED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "HTTP_REQUEST", "record layer", "doesn't match")
_PASSING = (408, 429)  # HTTP: request timeout, too many requests


def status(error: Any) -> int:
    """The HTTP status of a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: Any) -> str:
    """S3's error code of a ClientError, such as NoSuchKey."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def told(url: str, attempts: int) -> Iterator[None]:
    """Turn what boto3 raises into our own errors.

    Raises:
        ReportedError: DataError, UnreachableError (which is retried) or ConfigError.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as found
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    except found.ClientError as error:
        raise _explain(url, error, attempts) from error
    except (found.NoCredentialsError, found.PartialCredentialsError, found.ProfileNotFound) as error:
        raise ConfigError(f"{url}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.") from error
    except found.ParamValidationError as error:
        raise ConfigError(f"{url}: not a valid name ({error}); expected s3://bucket/prefix.") from error
    except found.FlexibleChecksumError as error:
        raise DataError(f"{url}: failed after {attempts} attempts ({error}); the object is damaged, or the network is.") from error
    except found.ProxyConnectionError as error:
        raise ConfigError(
            f"{url}: the proxy does not answer ({error}); check HTTPS_PROXY and HTTP_PROXY, or name the endpoint's host in NO_PROXY."
        ) from error
    except found.SSLError as error:
        if not any(sign in str(error) for sign in _NOT_TRUSTED):  # the connection broke during the handshake
            raise UnreachableError(f"{url}: failed after {attempts} attempts ({error}); check the network and S3_ENDPOINT_URL.") from error
        raise ConfigError(
            f"{url}: no trusted connection ({error}); set AWS_CA_BUNDLE to the file of the certificates that sign the endpoint's, and check whether "
            "S3_ENDPOINT_URL should begin with http:// or https://."
        ) from error
    except (found.BotoCoreError, Boto3Error, RetriesExceededError) as error:
        raise UnreachableError(f"{url}: failed after {attempts} attempts ({error}); check the network and S3_ENDPOINT_URL.") from error


def _explain(url: str, error: Any, attempts: int) -> ReportedError:
    given, number = code(error), status(error)
    if given == "NoSuchBucket":
        return ConfigError(f"{url}: the bucket does not exist; create it, or name another one.")
    if given == "InvalidBucketName":
        return ConfigError(
            f"{url}: not a valid bucket name; expected s3://bucket/prefix, the bucket in 3 to 63 lower-case letters, digits and dashes."
        )
    if given in _EXPIRED:  # retried, because fresh credentials may exist by the time the scheduler starts the job again
        return UnreachableError(
            f"{url}: the credentials have expired ({given}); use what is renewed: a role, a web identity, or a file named by AWS_SHARED_CREDENTIALS_FILE, "
            "which is read again when it changes."
        )
    if given in _REFUSED:
        return ConfigError(f"{url}: refused ({given}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights of this key on the bucket.")
    if given in MISSING:
        return MissingError(f"{url}: does not exist.")
    kind = UnreachableError if number >= 500 or number in _PASSING else DataError
    return kind(f"{url}: the server answered {given or 'an error'} after at most {attempts} attempts ({error}).")
