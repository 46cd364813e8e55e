"""Adapters in repositories of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, listed
from veneer.files.folder import CONFIG
from veneer.library.place import Report, needed
from veneer.library.source import CARD, PICTURES, SHEET

_SMALL = (".json", ".md", ".txt", ".jinja", ".model")  # what may belong to an adapter beside its tensors
_BASES = ("config.json", "model_index.json")


def download(repository: str, inside: str, report: Report) -> tuple[Path, list[Path], str]:
    """The file or folder of the adapter `inside` a repository ("" is all of it), in the hub's own cache; its files, and
    their revision.

    Nothing but the adapter is fetched, and no pickle. Raises `AdapterError`.
    """
    library = _library(f"pulling {repository}")
    try:
        about = library.HfApi().model_info(repository, timeout=15)
        names = _wanted([file.rfilename for file in about.siblings or []], inside, repository)
        report(f"fetching {listed(names, say=str)} of {repository}")
        places = [Path(library.hf_hub_download(repository, name, revision=about.sha)) for name in names]
    except AdapterError:
        raise
    except Exception as error:  # the hub's, the network's and the disk's errors have no common ancestor
        raise _failed(f"{repository} cannot be pulled", error) from error
    return places[0] if names[0] == inside else places[0].parent, places, about.sha or ""


def upload(repository: str, files: Mapping[str, Path | bytes], message: str, force: bool, report: Report) -> str:
    """Put files into a repository, which is made when it is not there, in one commit; give its address.

    Raises `AdapterError`.
    """
    library = _library(f"pushing to {repository}")
    try:
        api = library.HfApi()
        if not api.repo_exists(repository):
            api.create_repo(repository, private=True)
            report(f"{repository} is new, and private: its page on the hub opens it to others")
        elif not force and (
            there := [name for name in api.list_repo_files(repository) if name.endswith(".safetensors")]
        ):
            raise AdapterError(
                f"{repository} holds {listed(there, say=str)} already; nothing was sent (--force replaces)"
            )
        adds = [
            library.CommitOperationAdd(name, held if isinstance(held, bytes) else str(held))
            for name, held in files.items()
        ]
        return str(api.create_commit(repository, adds, commit_message=message).repo_url)
    except AdapterError:
        raise
    except Exception as error:  # as above
        raise _failed(f"{repository} cannot be pushed to", error) from error


def _wanted(names: list[str], inside: str, repository: str) -> list[str]:
    """The files of the adapter, that which is read first of all first. Raises `AdapterError`."""
    if inside in names:
        return [inside, *({CARD} & {*names})]
    prefix = f"{inside}/" if inside else ""
    here = [name for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    plain = {name.removeprefix(prefix) for name in here}
    tensors = [name for name in here if name.endswith(".safetensors")]
    if CONFIG in plain:
        tensors = [name for name in tensors if name.removeprefix(prefix).startswith("adapter_model.")]
    elif SHEET not in plain and plain & {*_BASES}:
        raise AdapterError(f"{repository}/{inside} is a base model and no adapter: `veneer train` takes it as `base`")
    if len(tensors) != 1:
        what = listed(tensors or here, say=str)
        raise AdapterError(
            f"{repository}/{inside}: expected one adapter, found {what}; {repository}/FILE names one of them"
        )
    return tensors + [name for name in here if name.endswith(_SMALL) or name == f"{prefix}{CARD}" or _is_preview(name)]


def _is_preview(name: str) -> bool:
    return name.rpartition("/")[2] in {f"preview{ending}" for ending in PICTURES}


def _library(what: str) -> Any:
    """The package, if the network may be used."""
    library = needed("huggingface_hub")
    if needed("huggingface_hub.constants").HF_HUB_OFFLINE:
        raise AdapterError(f"{what} needs the network, and HF_HUB_OFFLINE is set; a folder can be used without")
    return library


def _failed(what: str, error: Exception) -> AdapterError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return AdapterError(
        f"{what}: {said}. Is its name right, is the hub in reach, and are you logged in (`hf auth login`)?"
    )
