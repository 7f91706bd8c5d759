"""Upload a finished folder to the Hub; a failure is one line with the command that uploads it later."""

from collections.abc import Sequence
from pathlib import Path


def upload(
    folder: str | Path,
    repository: str,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    only: Sequence[str] | None = None,
) -> str:
    """Upload a folder, or `only` these files of it, as a repository, created if it does not exist; returns its address.

    `private` applies to a new repository. Any failure is a ConnectionError of one line.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        address = api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
        patterns = None if only is None else list(only)
        api.upload_folder(repo_id=address.repo_id, repo_type=repo_type, folder_path=folder, allow_patterns=patterns)
    except Exception as error:  # of whatever HTTP library the Hub client uses
        words = ["hf upload", repository, str(folder), "."]
        words += [] if repo_type == "model" else [f"--repo-type {repo_type}"]
        words += [f"--include {name}" for name in only or ()]
        raise ConnectionError(
            f"{folder} is complete, but was not uploaded to {repository!r}: {one_line(error)}; when online and logged in "
            f"(hf auth login), upload it with: {' '.join(words)}"
        ) from None
    return str(address)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
