"""Upload of a folder to the Hugging Face Hub, into a new repository."""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import ConfigError, StorageError

TOKEN_NEEDED = "needs a token: set HF_TOKEN, or run `hf auth login`"
MEANINGS = {
    401: "the token is not valid",
    403: "the token may not write there",
    409: "this repository exists already; name another",
}


def check_hub(name: str) -> None:
    """ConfigError where nothing can be uploaded: no token, or the hub is switched off; asks nothing of the network."""
    if huggingface_hub.get_token() is None:
        raise ConfigError(f"to=hub:{safe_text(name)}: {TOKEN_NEEDED}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError(f"to=hub:{safe_text(name)}: HF_HUB_OFFLINE is set; unset it to upload")


def check_account(name: str) -> None:
    """StorageError where the hub does not know the token; nothing is made."""
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:
        raise _failed(name, error) from None


def upload(folder: Path, name: str, private: bool) -> str:
    """Make the repository and upload the folder; returns its address. StorageError where the hub refuses."""
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(name, private=private, exist_ok=False))
    except Exception as error:
        raise _failed(name, error) from None
    try:
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Upload model")
    except Exception as error:
        raise _failed(name, error, "; the repository was made and may hold a part") from None
    return address


def _failed(name: str, error: Exception, what_is_left: str = "") -> StorageError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = MEANINGS.get(status or 0) or safe_text(first_line(error), limit=200)
    shown = f" ({status})" if status else ""
    return StorageError(f"to=hub:{safe_text(name)}: {reason}{shown}{what_is_left}")
