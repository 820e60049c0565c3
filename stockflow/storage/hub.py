"""Models on the Hugging Face hub: a revision is resolved once, so that a plan names a commit."""

import os
import re

from stockflow.errors import AccessDeniedError, NotFoundError, RecipeError, StockflowError
from stockflow.storage.faults import Failure, storage_error, user_error
from stockflow.storage.fsspec_faults import failure_of
from stockflow.storage.hub_cache import COMMIT, cached
from stockflow.storage.retry import RetryLoop, RetryPolicy
from stockflow.text.redaction import redact

_MODEL = re.compile(r"hf://(?!datasets/|spaces/|buckets/)([^/@]+/[^/@]+)(?:@(refs/pr/\d+|[^/]+))?(/.*)?")
_POLICY = RetryPolicy(attempts=5)
_TIMEOUT_S = 10.0


def pin_revision(url: str) -> str:
    """Return ``hf://org/name@commit`` for ``hf://org/name[@revision]``; any other URL, and a commit, as it is.

    Where the hub may not be asked (HF_HUB_OFFLINE) it is the snapshot in its cache.

    Raises:
        NotFoundError: there is no such model or revision, or the token may not see it; or none in the cache.
        AccessDeniedError: the model's conditions were not accepted, or the token is wrong.
        RecipeError: the hub cannot be reached, or the name is none.
        StorageError: the hub did not answer.
    """
    from huggingface_hub import constants

    match = _MODEL.fullmatch(url)
    if match is None:
        return url
    repository, revision, rest = match[1], match[2], match[3] or ""
    if constants.HF_HUB_OFFLINE:
        return _snapshot(redact(url), repository, revision or "main") + rest
    if revision and COMMIT.fullmatch(revision):
        return url
    return f"hf://{repository}@{_commit(url, repository, revision)}{rest}"


def _snapshot(where: str, repository: str, revision: str) -> str:
    from huggingface_hub import constants

    if folder := cached(constants.HF_HUB_CACHE, repository, revision):
        return folder
    raise NotFoundError(
        f"cannot read {where}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} has no snapshot of it; unset it, "
        f"fetch it there (`hf download {repository}`), or name a local folder"
    )


def _commit(url: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base of its HTTP errors is httpx's or httpx2's, by version. An offline mode's error is an OSError.
    errors = (OSError, HFValidationError, *HfHubHTTPError.__bases__[:1])

    def attempt() -> str:
        return str(HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).sha)

    def judge(error: Exception, attempts: int, is_last: bool) -> StockflowError | None:
        refusal = _refusal(error, redact(url), repository)
        if refusal is not None:
            return refusal
        failure = failure_of(error)
        if failure.is_transient and not is_last:
            return None
        where = redact(url)
        if failure.status is None:
            return RecipeError(_unreachable(where, repository, failure))
        return user_error(failure, "read", where) or storage_error(failure, "read", where, attempts)

    return RetryLoop(_POLICY).run(attempt, catch=errors, judge=judge)


def _unreachable(where: str, repository: str, failure: Failure) -> str:
    return (
        f"cannot read {where}: the hub did not answer ({failure.code or failure.detail}). {repository} is read as the "
        f"name of a model on the Hugging Face hub, as there is no such folder in {os.getcwd()}; name a folder, or mend "
        "the way there (HF_ENDPOINT, proxies)"
    )


def _refusal(error: Exception, where: str, repository: str) -> StockflowError | None:
    """Return the error for what the hub calls by a name of its own."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return AccessDeniedError(f"cannot read {where}: accept its conditions at {page}, then set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"cannot read {where}: the model has no such branch, tag or commit; see {page}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFoundError(f"cannot read {where}: no such model, or none HF_TOKEN may see; see {page}")
    if isinstance(error, errors.HFValidationError):
        return RecipeError(f"cannot read {where}: {repository!r} is no name of a model; expected org/name")
    return None
