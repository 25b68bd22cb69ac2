"""Where an adapter's files are: a folder, or a repository of the Hugging Face hub by its id."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE = "adapter_config.json", "adapter_model.safetensors", "training.json"


def adapter_folder(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local folder of an adapter.

    A hub id is fetched into huggingface_hub's cache, or found there; `HF_HUB_OFFLINE=1` looks nowhere else.

    Args:
        name_or_path: a folder, or an id such as "name/adapter" where there is no such folder.
        revision: branch, tag or commit on the hub.
    Raises:
        FileNotFoundError: there is no adapter, or the hub cannot be reached and its cache lacks it.
    """
    folder = Path(name_or_path)
    if not folder.exists():
        folder = _from_hub(str(name_or_path), revision)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"the folder {folder} holds no adapter: {CONFIG_FILE} is missing")
    return folder


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = [CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{repository} is neither a folder with an adapter, {CONFIG_FILE}, nor a hub adapter that can be reached: "
            f"{error}"
        ) from error
