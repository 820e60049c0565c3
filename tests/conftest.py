"""Fixtures shared by all tests."""

import secrets
from collections.abc import Iterator

import boto3
import pytest

from tests.s3_server import moto_server, s3_credentials


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server, with credentials for it in the environment."""
    with s3_credentials(), moto_server() as url:
        yield url


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """The name of a new, empty bucket."""
    name = f"bucket-{secrets.token_hex(6)}"
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=name)
    return name
