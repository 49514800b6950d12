"""Upload an exported folder to the hub: the only thing here that sends anything anywhere."""

import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mini_symposium.errors import InputError, RunError


def push(folder: Path, repository: str, really: bool, token: str | None, private: bool = True) -> str:
    """Upload an exported folder to the hub; only if told to, only with a token, and never from a notebook.

    Returns
    -------
    str
        The address of what was uploaded.

    Raises
    ------
    InputError
        If it was not told to, there is no token, this is a notebook, or the folder has no card.
    RunError
        If the hub cannot be reached, or refuses.
    """
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder}: no README.md in it; write one with `mini-symposium export card` first")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--repo {repository}: {str(error).splitlines()[0]}") from error
    if "ipykernel" in sys.modules:
        raise InputError("a notebook uploads nothing; use `mini-symposium export hub` in a terminal")
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    what = f"{len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, would go from {folder} to {repository}"
    if not really:
        raise InputError(f"nothing was uploaded: {what}; add --push to do it")
    if not token:
        raise InputError(f"nothing was uploaded: {what}, but there is no token; set HF_TOKEN to one that may write")
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # the hub's client raises its own errors, its HTTP library's and the system's
        raise RunError(f"{repository}: the hub did not take it ({str(error).strip().splitlines()[0]})") from error
