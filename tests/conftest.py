"""Fixtures shared by all tests."""

import secrets
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import boto3
import pytest
from hypothesis import HealthCheck, settings

from tests.s3_server import moto_server, s3_credentials

# Neither an example's time nor that of making it is a promise: a busy machine would fail tests at random.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


class _NeedsTorch(pytest.Module):
    """A module of tests that is skipped where torch, an extra, is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            if "No module named 'torch'" in str(error):
                pytest.skip("torch is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect tests without torch as far as they go: `make test-pythons`."""
    if find_spec("torch"):
        return None
    return _NeedsTorch.from_parent(parent, path=module_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make chaos` be replayed and sized."""
    parser.addoption("--seed", type=int, help="of the random kills; one at random if not given")
    parser.addoption("--sites", default="disk,s3,ray,ray s3", help="where they are killed")
    parser.addoption("--kills", type=int, default=104, help="how many processes are killed at random moments")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of everything random in a test of chaos; printed with its results."""
    given: int | None = request.config.getoption("--seed")
    return secrets.randbelow(10**6) if given is None else given


@pytest.fixture
def sites(request: pytest.FixtureRequest) -> list[str]:
    """Where a test of chaos kills."""
    return str(request.config.getoption("--sites")).split(",")


@pytest.fixture
def num_kills(request: pytest.FixtureRequest) -> int:
    """How many kills a test of chaos makes."""
    return int(request.config.getoption("--kills"))


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
