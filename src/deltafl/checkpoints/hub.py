"""A folder to the hub."""

from pathlib import Path

import huggingface_hub

from deltafl.errors import DeltaflError


def push(folder: Path, name: str) -> str:
    """Upload to a model repository, made if it is not there; its address.

    An upload that was cut off is resumed, by huggingface_hub. Raises DeltaflError.
    """
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="A merge by deltafl")
    except Exception as error:  # of its http client, which is another by version
        why = " ".join(str(error).split()[:40])
        raise DeltaflError(
            f'--push "{name}": not uploaded ({why}); "{folder}" is whole: '
            f"`hf upload {name} {folder}` goes on"
        ) from None
    return str(address)
