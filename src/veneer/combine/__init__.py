"""Adapters into adapters: pure functions, exact where exactness is possible, with their error stated where it is not.

combined.py  combine, measured: the weighted sum, and the other ways        ways.py    what they do in one layer
matrix.py    thin matrices: sums, inner products, singular values           sparse.py  TIES, DARE, pruning
shares.py    weights by layer                                               blocks.py  the WebUI's block weights
resized.py   lora_of, resize, negate, subtract                              beside.py  what is trained whole
extract.py   the LoRA between two models                                    stored.py, base.py  models' weights
live.py      add_weighted_adapter                                           layers.py, together.py
"""

from veneer.combine.blocks import Blocks, blocks
from veneer.combine.combined import combine, measured
from veneer.combine.extract import Extracted, extract
from veneer.combine.layers import Errors
from veneer.combine.matrix import Keep
from veneer.combine.resized import lora_of, negate, resize, subtract

__all__ = [
    "Blocks",
    "Errors",
    "Extracted",
    "Keep",
    "blocks",
    "combine",
    "extract",
    "lora_of",
    "measured",
    "negate",
    "resize",
    "subtract",
]
