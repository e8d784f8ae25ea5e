"""A directory, or a model's name on a hub -> a directory; a complete directory -> a hub.

A name is ORG/NAME or ORG/NAME@REVISION (a branch, a tag or a commit). What is a directory here is
not looked for on a hub. huggingface_hub transfers, and keeps what it fetched in its cache;
HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold as it documents them.
"""

from pathlib import Path
from typing import Any

from cast_serve.checkpoint.shard import CheckpointError
from cast_serve.errors import PushError

PAPERS = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", *PAPERS)
# Folders hold the model in other formats; consolidated files are Mistral's second copy.
UNWANTED = ("*/*", "consolidated*.safetensors")
LOG_IN = "set HF_TOKEN, or run `hf auth login`"


def fetch(model: str | Path) -> Path:
    """The directory of a model; of one on a hub that of huggingface_hub's cache.

    Raises:
        CheckpointError: if it is neither, or cannot be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    name, _, revision = str(folder).partition("@")
    if not is_name(name):
        raise CheckpointError(
            f"{model} is neither a directory nor a model's name on a hub (ORG/NAME or "
            "ORG/NAME@REVISION); check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its client

    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except (OSError, ValueError, HTTPError) as error:
        why = _why_not_fetched(name, revision, error)
        raise CheckpointError(f"{model} is not a directory here, and {why}") from error
    if not any(Path(found).glob("*.safetensors")):
        raise CheckpointError(
            f"{model} has no *.safetensors on the hub; download it, save the model with "
            "safetensors (save_pretrained of transformers), and give its directory"
        )
    return Path(found)


def name_of(model: Path) -> str:
    """A directory's own name; ORG/NAME of one in huggingface_hub's cache."""
    folder = model.resolve()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return folder.name


def check_push(repo: str, is_private: bool) -> None:
    """Refuses a push that will fail, before any work is done for it.

    Args:
        repo: ORG/NAME.
        is_private: whether nobody else may see it.

    Raises:
        CheckpointError: if the hub cannot be reached, does not know the token, or would not let it
            write there; or if the repository is there already and public against `is_private`.
    """
    if not is_name(repo):
        raise CheckpointError(
            f"--push-to-hub {repo!r} is not a model's name on a hub; write ORG/NAME"
        )
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    api = HfApi()
    try:
        _check_may_write(repo, api.whoami())
        is_public = not api.model_info(repo).private
    except RepositoryNotFoundError:
        return  # it will be made
    except LocalTokenNotFoundError:
        raise CheckpointError(f"--push-to-hub {repo} needs a token; {LOG_IN}") from None
    except (OSError, HTTPError) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out"
        elif _status(error) == 401:
            why = f"{api.endpoint} does not accept the token; {LOG_IN}"
        else:
            why = f"{api.endpoint} cannot be reached ({_short(error)}); leave --push-to-hub out"
        raise CheckpointError(
            f"--push-to-hub {repo} is not possible: {why} and push later (`hf upload`)"
        ) from error
    if is_private and is_public:
        raise CheckpointError(
            f"{api.endpoint}/{repo} exists already and is public; leave --private out, make it "
            "private there, or choose another name"
        )


def push(folder: Path, repo: str, is_private: bool) -> str:
    """Uploads a directory into a repository, which is made if it is not there.

    Returns:
        the repository's address.

    Raises:
        PushError: saying how to push later.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=is_private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add a sparse model")
    except Exception as error:  # whatever it is, the directory is complete
        private = " --private" if is_private else ""
        raise PushError(
            f"{folder} is complete, but it was not pushed to {repo} ({_short(error)}); push it "
            f"later: hf upload {repo} {folder}{private}"
        ) from error
    return str(made)


def is_name(text: str) -> bool:
    """Whether it has the form ORG/NAME."""
    if text.count("/") != 1:
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _check_may_write(repo: str, user: dict[str, Any]) -> None:
    owner = repo.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"] and roles.get(owner, "read") == "read":
        raise CheckpointError(
            f"--push-to-hub {repo}: {user['name']}, whose token this is, may not write to "
            f"{owner}; choose {user['name']}/{repo.partition('/')[2]}, or another token"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise CheckpointError(
            f"--push-to-hub {repo}: the token of {user['name']} is read-only; make one with write "
            f"access, and {LOG_IN}"
        )


def _why_not_fetched(name: str, revision: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms first, at {hub}/{name}; then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} has no public model of that name; check the name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub} has no revision {revision!r} of {name}; correct it, or leave it out"
    if _status(error) == 401:
        return f"{hub} does not accept the token; {LOG_IN}"
    if constants.HF_HUB_OFFLINE:
        return (
            f"it is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it,"
            " or give a downloaded model's directory"
        )
    return (
        f"it cannot be fetched from {hub} ({_short(error.__cause__ or error)}); try again, or give "
        "a downloaded model's directory"
    )


def _status(error: BaseException) -> int | None:
    """Of an HTTP answer, if it is one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _short(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
