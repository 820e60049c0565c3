"""How to reach one S3 bucket: endpoint, region, addressing, credentials. Both clients start from here."""

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockflow.errors import AccessDeniedError, RecipeError
from stockflow.storage.base import StoreOptions
from stockflow.text.redaction import keep_secret, redact, without_secrets

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential, S3Store

DEFAULT_REGION = "us-east-1"
"""what stores other than AWS expect to see in a signature"""
CONNECT_TIMEOUT = timedelta(seconds=4)
"""eight attempts at an address that never answers, and the pauses between them, end within a minute"""
_CREDENTIAL_LIFE = timedelta(minutes=10)
"""botocore renews 10 to 15 minutes before the end, obstore asks again 5 minutes before this runs out"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Where one bucket is and how requests to it are made; never holds a secret."""

    name: str
    endpoint: str | None
    """None: AWS"""
    region: str
    path_style: bool
    ca_bundle: str | None
    options: StoreOptions

    @property
    def is_encrypted(self) -> bool:
        """Whether requests travel over TLS."""
        return self.endpoint is None or self.endpoint.startswith("https://")


def endpoint_of(options: StoreOptions) -> str | None:
    """Return the address that requests go to, None for AWS's own."""
    return options.endpoint or os.environ.get(_endpoint_variable()) or None


def _endpoint_variable() -> str:
    specific, general = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
    return specific if os.environ.get(specific) else general


def endpoint_in_words(options: StoreOptions) -> str:
    """Return the address that requests go to and what names it; empty for AWS's own."""
    endpoint = endpoint_of(options)
    named = "`endpoint` under stockflow.storage" if options.endpoint else _endpoint_variable()
    return f"{redact(endpoint)} (from {named})" if endpoint else ""


def is_over_http(options: StoreOptions) -> bool:
    """Return whether requests travel without TLS."""
    return (endpoint_of(options) or "").startswith("http://")


def locate_bucket(name: str, options: StoreOptions) -> Bucket:
    """Return how to reach a bucket; asks AWS for its region unless the options or an endpoint settle it."""
    if name.endswith("--x-s3"):
        raise RecipeError(
            f"{name!r} is a directory bucket (S3 Express), which is not read or written; copy the objects to a general "
            "purpose bucket: `aws s3 sync`"
        )
    endpoint = endpoint_of(options)
    if endpoint and not endpoint.startswith(("http://", "https://")):
        address = redact(f"://{endpoint.rpartition('://')[2]}").removeprefix("://")
        raise RecipeError(f"the endpoint {address!r} is not a URL; expected http://host or https://host")
    ca_bundle = options.ca_bundle or os.environ.get("AWS_CA_BUNDLE")
    if ca_bundle:
        _check_bundle(ca_bundle)
    near = options.region or _default_region()
    # A dot in the name breaks the wildcard certificate of virtual-hosted addresses.
    is_path_style = options.addressing == "path" or (
        options.addressing == "auto" and (endpoint is not None or "." in name)
    )
    return Bucket(
        name=name,
        endpoint=endpoint.rstrip("/") if endpoint else None,
        region=near if endpoint or options.region else bucket_region(name, near),
        path_style=is_path_style,
        ca_bundle=ca_bundle,
        options=options,
    )


@lru_cache(maxsize=256)
def bucket_region(name: str, near: str, endpoint: str | None = None) -> str:
    """Return the region AWS names for a bucket, or ``near`` where it does not say.

    One unsigned HeadBucket, sent to the region ``near`` because only its own is reachable from inside many
    private networks; the header comes with every answer, 403 and 301 included.
    """
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    settings = Config(signature_version=UNSIGNED, connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 2})
    try:
        client = session().create_client("s3", region_name=near, endpoint_url=endpoint, config=settings)
        reply = client.head_bucket(Bucket=name)
    except ClientError as error:
        reply = error.response
    except BotoCoreError:
        return near
    headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("x-amz-bucket-region") or near)


def obstore_bucket(bucket: Bucket, retries: "RetryConfig", timeouts: "ClientConfig") -> "S3Store":
    """Return an obstore client for a bucket."""
    from obstore.store import S3Store

    options = bucket.options
    config: S3Config = {
        "region": bucket.region,
        "virtual_hosted_style_request": not bucket.path_style,
        # Hashing every byte for the signature doubles the CPU of an upload; TLS protects it already.
        "unsigned_payload": bucket.is_encrypted,
        "request_payer": options.requester_pays,
        "skip_signature": options.anonymous,
        # Swift and Google's S3 face refuse the bulk request.
        "disable_bulk_delete": bucket.endpoint is not None,
    }
    if bucket.endpoint:
        address = bucket.endpoint if bucket.path_style else _virtual_host(bucket.endpoint, bucket.name)
        config["endpoint"] = address
        # obstore 0.12 lets AWS_ENDPOINT_URL_S3 win over `endpoint`: name the address here as well.
        config["aws_endpoint_url_s3"] = address
    if options.kms_key:
        config["server_side_encryption"] = "aws:kms"
        config["sse_kms_key_id"] = options.kms_key
    if bucket.endpoint is None:
        # S3 holds every part against it. Other stores may not know the header, and some refuse what they do not know.
        config["checksum_algorithm"] = "crc64nvme"
    connection: ClientConfig = {"allow_http": not bucket.is_encrypted, "connect_timeout": CONNECT_TIMEOUT, **timeouts}
    if bucket.ca_bundle:
        connection["root_certificate"] = Path(bucket.ca_bundle).read_bytes()
    return S3Store(
        bucket.name,
        config=config,
        client_options=connection,
        retry_config=retries,
        credential_provider=None if options.anonymous else CredentialProvider(),
    )


def s3fs_filesystem(bucket: Bucket, *, timeout_s: float) -> Any:
    """Return an s3fs file system for a bucket that makes each request once.

    ``timeout_s`` is for silence, which for a body that is being sent lasts until the answer.
    """
    import s3fs

    filesystem = s3fs.S3FileSystem(
        anon=bucket.options.anonymous,
        endpoint_url=bucket.endpoint,
        requester_pays=bucket.options.requester_pays,
        client_kwargs={"region_name": bucket.region} | trust(bucket),
        config_kwargs=client_settings(bucket, timeout_s),
        s3_additional_kwargs=encryption(bucket.options),
        fixed_upload_size=True,
        use_listings_cache=False,
        session=_async_session(),
        skip_instance_cache=True,  # a cached instance keeps failed credentials (s3fs#938)
    )
    filesystem.retries = 1  # its own attempts would multiply botocore's
    return filesystem


@lru_cache(maxsize=64)
def single_requests(bucket: Bucket, timeout_s: float) -> Any:
    """Return a botocore client that makes each request once."""
    from botocore import UNSIGNED
    from botocore.config import Config

    settings = Config(**client_settings(bucket, timeout_s))
    if bucket.options.anonymous:
        settings = settings.merge(Config(signature_version=UNSIGNED))
    client = session().create_client(
        "s3", region_name=bucket.region, endpoint_url=bucket.endpoint, config=settings, **trust(bucket)
    )
    if bucket.endpoint:
        # botocore asks a redirecting store for the bucket's region, is redirected, asks again ... until the stack ends.
        client.meta.events.register_first("needs-retry.s3", _follow_no_redirection)
    return client


def _follow_no_redirection(request_dict: Mapping[str, Any], **_: object) -> None:
    request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


def client_settings(bucket: Bucket, timeout_s: float) -> dict[str, Any]:
    """Return how botocore makes requests to a bucket: each once."""
    settings: dict[str, Any] = {
        "s3": {"addressing_style": "path" if bucket.path_style else "virtual"},
        "max_pool_connections": 64,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": CONNECT_TIMEOUT.total_seconds(),
        "read_timeout": timeout_s,
    }
    if bucket.endpoint:
        # Checksum trailers, on by default since botocore 1.36, break several compatible stores.
        settings["request_checksum_calculation"] = "when_required"
        settings["response_checksum_validation"] = "when_required"
    return settings


def encryption(options: StoreOptions) -> dict[str, str]:
    """Return what a request that writes says of keys."""
    return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": options.kms_key} if options.kms_key else {}


def trust(bucket: Bucket) -> dict[str, str]:
    """Return which certificates a client trusts beside the system's."""
    return {"verify": bucket.ca_bundle} if bucket.ca_bundle else {}


class CredentialProvider:
    """The process's botocore credentials (profile, SSO, web identity, instance role), for obstore."""

    def __call__(self) -> "S3Credential":
        """Return the credentials valid now; botocore renews them."""
        credentials = _credentials()
        frozen = credentials.get_frozen_credentials()
        keep_secret(*frozen[:3])
        is_refreshable = getattr(credentials, "refresh_needed", None) is not None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE if is_refreshable else None,
        }


def require_credentials() -> None:
    """Refuse early when there are no credentials at all.

    Raises:
        AccessDeniedError: the default chain finds none, or cannot use what it finds.
    """
    with _usable_profile():
        found = _credentials()
        if found is not None:
            keep_secret(*found.get_frozen_credentials()[:3])
    if found is None and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        raise _half_a_pair("AWS_ACCESS_KEY_ID", "env")
    if found is None:
        raise AccessDeniedError(
            "no AWS credentials found in the environment, the profile or the instance; "
            "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or `anonymous: true` for public objects"
        )


def has_md5_etags(bucket: Bucket) -> bool:
    """Return whether ETags may be held against what was sent: those of other stores than AWS, not under KMS."""
    return bucket.endpoint is not None and bucket.options.kms_key is None


def forget_session() -> None:
    """Read credentials, profile and regions again at the next use."""
    for cached in (session, _async_session, _credentials, bucket_region, single_requests):
        cached.cache_clear()


@lru_cache(maxsize=1)
def session() -> Any:
    """Return the process's botocore session."""
    import botocore.session

    return botocore.session.Session()


@lru_cache(maxsize=1)
def _async_session() -> Any:
    """The session s3fs works with: it keeps the parsed service model, a quarter of a second to read."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    return AioSession()


@lru_cache(maxsize=1)
def _credentials() -> Any:
    return session().get_credentials()


def _check_bundle(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise RecipeError(f"cannot use the CA bundle {path!r}: {error}; expected certificates in PEM form") from None


def _default_region() -> str:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        if region := os.environ.get(name):
            return region
    with _usable_profile():
        return str(session().get_config_variable("region") or DEFAULT_REGION)


@contextmanager
def _usable_profile() -> Iterator[None]:
    """Turn what botocore says of a missing profile or an expired sign-in into an error for the user."""
    from botocore.exceptions import BotoCoreError, PartialCredentialsError

    try:
        yield
    except PartialCredentialsError as error:
        raise _half_a_pair(error.kwargs["cred_var"], error.kwargs["provider"]) from None
    except BotoCoreError as error:
        said = without_secrets(str(error))
        raise AccessDeniedError(f"cannot use the AWS profile: {said}; mend the profile or sign in again") from None


def _half_a_pair(missing: str, place: str) -> AccessDeniedError:
    where = "the environment" if place == "env" else place
    return AccessDeniedError(f"half of a pair of AWS credentials: {missing} is missing in {where}; set both or none")


def _virtual_host(endpoint: str, bucket: str) -> str:
    scheme, host = endpoint.split("://", 1)
    return f"{scheme}://{bucket}.{host}"
