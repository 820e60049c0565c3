"""Secrets in URLs, in the environment and in what clients say are taken out; everything else stays readable."""

import pytest

from stockflow.errors import RecipeError
from stockflow.storage import StorageConfig, normalize_url, open_store
from stockflow.storage.faults import scrub
from stockflow.text.redaction import has_credentials, keep_secret, redact, redact_urls, without_secrets

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"

WITH_CREDENTIALS = (
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/folder",
    f"s3://:{SECRET}@bucket/folder",
    f"s3a://AKIAEXAMPLE:{SECRET}@bucket/folder",
    f"S3://AKIAEXAMPLE:{SECRET}@bucket/folder",
    f"gs://user:p@{SECRET}@bucket/folder",
    f"az://user:1234/{SECRET}@container/folder",
    f"s3://user:what?{SECRET}@bucket/folder",
    f"https://user:{SECRET}@host/folder",
    f"https://user:12345678@host/{SECRET[:0]}folder",
    f"https://{SECRET.replace('/', '%2F')}@host/folder",
    f"http://user:{SECRET}@host:8080/folder",
)
PLAIN = (
    "s3://bucket/folder",
    "s3://bucket/folder@2024-01-01:x",
    "https://host:8443/a/b@c",
    "hf://org/name@0123456789abcdef0123456789abcdef01234567",
    "abfs://container@account.dfs.core.windows.net/x",
    "memory://folder",
    "/local/folder@x:y",
)


@pytest.mark.parametrize("url", WITH_CREDENTIALS)
def test_credentials_leave_a_url_and_a_text_around_it(url: str) -> None:
    for text in (redact(url), redact_urls(f"at {url}, twice: '{url}'"), without_secrets(f"<{url}>"), scrub(url)):
        assert not any(part in text for part in (SECRET, SECRET[:12], SECRET[-12:], "user", "AKIA", "12345678"))
        assert "folder" in text
    assert has_credentials(url)


@pytest.mark.parametrize("url", PLAIN)
def test_what_holds_no_secret_is_not_touched(url: str) -> None:
    assert redact(url) == redact_urls(url) == without_secrets(url) == url
    assert not has_credentials(url)


@pytest.mark.parametrize("url", WITH_CREDENTIALS)
def test_no_place_takes_a_url_with_credentials(url: str) -> None:
    for open_it in (normalize_url, lambda location: open_store(location, StorageConfig(), writable=True)):
        with pytest.raises(RecipeError, match="carries a user and a password") as caught:
            open_it(url)

        assert SECRET[:12] not in str(caught.value)


def test_no_place_takes_a_url_with_a_query() -> None:
    with pytest.raises(RecipeError, match=r"https://host/x came with a query") as caught:
        normalize_url(f"https://host/x?X-Amz-Signature={SECRET}")

    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        f"GET https://host/x?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}: connection refused",
        f"see (https://host/a),https://u:{SECRET}@host/b",
        f"Authorization: AWS4-HMAC-SHA256 Credential=AKIA/x, Signature={SECRET}",
        f'{{"authorization": "Bearer {SECRET}"}}',
        f"sent Bearer {SECRET} to the host",
        f"x-amz-security-token={SECRET}",
        f"<SecretAccessKey = {SECRET}",
        f"aws_secret_access_key: {SECRET}",
    ],
)
def test_what_looks_like_a_secret_is_not_quoted(said: str) -> None:
    assert SECRET[:12] not in scrub(said)


def test_secrets_of_the_environment_are_not_quoted_in_any_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "AZURE_CLIENT_SECRET", "AWS_ACCESS_KEY_ID", "MY_API_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, SECRET)

            assert scrub(f"a {SECRET} b {SECRET.replace('/', '%2F').replace('+', '%2B')} c") == "a *** b *** c"


def test_a_secret_that_is_part_of_another_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", SECRET[:20])
    monkeypatch.setenv("B_TOKEN", SECRET)

    assert without_secrets(f"{SECRET} {SECRET[:20]}") == "*** ***"


def test_credentials_a_client_was_given_are_not_quoted() -> None:
    keep_secret("credentials-of-a-profile", None)

    assert without_secrets("used credentials-of-a-profile") == "used ***"


def test_names_of_places_and_short_words_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    said = "cannot open /var/run/token: this is a test; the token has expired; expected a signature, found none"

    assert scrub(said) == said


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pattern", ["://", "a://b:", "?", "@", "a", "authorization:", "Bearer ", "key = ", "s3://a:x"])
def test_redaction_takes_time_in_proportion_to_the_text(pattern: str) -> None:
    """What a server says may be a megabyte; a pattern that looks back would take hours."""
    text = pattern * (1_000_000 // len(pattern))

    without_secrets(text)
    redact(text)
    has_credentials(text)
