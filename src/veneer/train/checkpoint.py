"""Checkpoints: all that a run carries from step to step, each in a folder that is there whole or not at all.

    checkpoints/step-00000040/
      state.safetensors   what trains (fp32), with its averages in the optimizer
      state.json          the step, seconds, counters
      manifest.json       size and sha256 of both

A folder is filled under a hidden name, flushed to the disk, and renamed. One that is torn or changed is passed over,
never deleted; leftovers of killed processes lie under hidden names.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.safe.whole import to_disk

_TENSORS, _PLAIN, _MANIFEST = "state.safetensors", "state.json", "manifest.json"


class State(NamedTuple):
    """What is carried: tensors by name, and plain values, `step` among them."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.most = folder, keep

    def write(self, state: State, best: int | None) -> Path:
        """Add a checkpoint, then let go of all but the newest and that of the step `best`.

        Raises `AdapterError` where it cannot be written; those that are there stay.
        """
        place = self.folder / f"step-{state.plain['step']:08}"
        workspace = self.folder / f".{place.name}.{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.part"):
                shutil.rmtree(leftover, ignore_errors=True)
            workspace.mkdir()
            save_file(state.tensors, workspace / _TENSORS)
            (workspace / _PLAIN).write_text(json.dumps(state.plain, indent=2), encoding="utf-8")
            manifest = {name: _seal(workspace / name) for name in (_TENSORS, _PLAIN)}
            (workspace / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for name in (*manifest, _MANIFEST):
                to_disk(workspace / name)
            to_disk(workspace)
            if place.exists():  # of this step, but torn: it would have been resumed
                os.replace(place, place.with_name(f"{place.name}-torn-{uuid.uuid4().hex[:8]}"))
            os.replace(workspace, place)
            to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            there = [path.name for path in self._newest_first()]
            kept = f"{there[0]} is as it was" if there else "there is none yet"
            raise AdapterError(f"cannot write the checkpoint {place}: {error}. The one before: {kept}") from error
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
        self._let_go(best)
        return place

    def newest(self, say: Callable[[str], None]) -> State | None:
        """The newest checkpoint that is whole; of each that is not, it is said why."""
        for place in self._newest_first():
            try:
                return read(place)
            except AdapterError as error:
                say(f"{error}; it is passed over")
        return None

    def at(self, step: int) -> State:
        """The checkpoint of this step. Raises `AdapterError`."""
        return read(self.folder / f"step-{step:08}")

    def _let_go(self, best: int | None) -> None:
        whole = [place for place in self._newest_first() if (place / _MANIFEST).is_file()]
        for place in whole[self.most :]:
            if _step(place) != best:
                hidden = place.with_name(f".{place.name}.{uuid.uuid4().hex}.part")
                with suppress(OSError):  # then it goes the next time
                    os.replace(place, hidden)  # first, so that nobody finds it half there
                    shutil.rmtree(hidden, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((path for path in found if _step(path) is not None), key=lambda path: path.name, reverse=True)


def read(place: Path) -> State:
    """A checkpoint, held to its manifest. Raises `AdapterError` that says what is wrong with it."""
    try:
        manifest = json.loads((place / _MANIFEST).read_bytes())
        wrong = [name for name in (_TENSORS, _PLAIN) if manifest.get(name) != _seal(place / name)]
        if wrong:
            raise AdapterError(f"the checkpoint {place} is damaged: {' and '.join(wrong)} is not what was written")
        return State(load_file(place / _TENSORS), json.loads((place / _PLAIN).read_bytes()))
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"the checkpoint {place} is torn: {error}") from error


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _step(place: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", place.name)
    return int(match[1]) if match else None
