"""safetensors files whose bytes depend on their content alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_ordered(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write the file with what it says of itself in the order of the alphabet; safetensors' own is drawn anew by each
    process. Tensors that share memory are written one by one.
    """
    own, homes = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        home = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if home in homes else tensor  # a file has no two of one memory
        homes.add(home)
    save_file(own, path, metadata=dict(about))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
