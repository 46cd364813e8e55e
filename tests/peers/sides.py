"""The same file through a peer and through veneer: what each changes in the weights."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import nn

from peers.cases import Case
from peers.pipelines import Deltas, deltas, fresh, parts, values


def _changed(case: Case, load: Callable[[object, dict[str, nn.Module]], object]) -> Deltas:
    """What `load(pipeline, models)` changes."""
    pipeline = fresh(case.family)
    models = parts(pipeline)
    before = values(models)
    load(pipeline, models)
    return deltas(values(parts(pipeline)), before)


def through_diffusers(case: Case, path: Path) -> Deltas:
    def load(pipeline: object, models: object) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following alpha_pattern keys did not match", RuntimeWarning)
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        pipeline.fuse_lora()

    return _changed(case, load)


PEERS = {"diffusers": through_diffusers}
