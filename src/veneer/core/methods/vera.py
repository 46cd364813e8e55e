"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.ranges import is_finite
from veneer.core.update import Factors, Option, Update, own_precision, switch


class Projection(nn.Module):
    """The random A `(r, widest in)` and B `(widest out, r)` that all layers of an adapter share and none trains.

    Their entries are uniform in ±√(6 / columns), from PEFT's generator: `projection_prng_key` alone gives them back.
    They are held by every update, once in memory, and stand in no state dict: files have a place for them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, layers: Sequence[tuple[Tensor, LoraConfig]]) -> None:
        super().__init__()
        weight, config = layers[0]
        r = max(own.r for _, own in layers)
        rows, columns = (max(weight.shape[side] for weight, _ in layers) for side in (0, 1))
        self.key = config.options["projection_prng_key"]
        for name, shape in (("A", (r, columns)), ("B", (rows, r))):
            value = torch.empty(shape, dtype=own_precision(weight), device="meta")
            self.register_buffer(name, value, persistent=False)
        self.draw(weight.device)

    def draw(self, device: torch.device) -> None:
        """Give both memory on `device`, and their entries."""
        if device.type != "meta":
            generator = torch.Generator().manual_seed(self.key)
            for name, old in list(self.named_buffers()):
                value, bound = torch.empty(old.shape, dtype=torch.float32, device="cpu"), math.sqrt(6 / old.shape[1])
                self._buffers[name] = value.uniform_(-bound, bound, generator=generator).to(device, old.dtype)


class Vera(Update):
    """ΔW = diag(b) B diag(d) A, with b `(out)` and d `(r)` trained, and A, B cut out of the shared `Projection`.

    b starts at 0 and d at `d_initial`. There is no scale: `lora_alpha` says nothing here.
    """

    file_names: ClassVar = {"b": "vera_lambda_b", "d": "vera_lambda_d", "A": "vera_A", "B": "vera_B"}
    reads_weight: ClassVar = False
    peft_names: ClassVar = {"lora_dropout": "vera_dropout", "init_lora_weights": "init_weights"}
    options: ClassVar = {
        "projection_prng_key": Option(0, lambda key: type(key) is int and 0 <= key < 2**63, "a whole number < 2^63"),
        "save_projection": switch(True),
        "d_initial": Option(0.1, is_finite, "a finite number"),
    }
    share: ClassVar = Projection

    def __init__(self, weight: Tensor, config: LoraConfig, shared: Projection | None = None) -> None:
        super().__init__()
        self.shared = Projection([(weight, config)]) if shared is None else shared
        self.saved = config.options["save_projection"]
        (rows, self.columns), dtype = weight.shape, own_precision(weight)
        self.b = nn.Parameter(weight.new_full((rows,), float(config.init_lora_weights is False), dtype=dtype))
        self.d = nn.Parameter(weight.new_full((config.r,), config.options["d_initial"], dtype=dtype))

    def factors(self) -> Factors:
        A = self.shared.A[: len(self.d), : self.columns].to(self.d.device)
        B = self.shared.B[: len(self.b), : len(self.d)].to(self.b.device)
        return Factors(self.d[:, None] * A, self.b[:, None] * B, 1.0)

    def materialise(self, device: torch.device) -> None:
        super().materialise(device)
        if self.shared.A.is_meta:
            self.shared.draw(device)

    def shared_tensors(self) -> dict[str, Tensor]:
        return dict(self.shared.named_buffers()) if self.saved else {}
