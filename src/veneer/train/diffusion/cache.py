"""What frozen encoders make of pictures and captions, kept on the disk by content, so that they run once.

A store (`train.store`) holds the tensors of some neighbouring pictures. Where one store ends and the next begins, the
contents themselves decide (content-defined chunking), so a picture that is added, changed or removed makes one store
anew, and a run that is killed while it encodes goes on after the last store that is whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from veneer.core.errors import AdapterError, listed, nearest
from veneer.train.diffusion.buckets import View
from veneer.train.diffusion.captions import Captioned
from veneer.train.processes import joined
from veneer.train.sameness import circumstances
from veneer.train.store import Pieces, Store, digest_of, prepared
from veneer.train.task import Reporter

LAYOUT = 1  # raised when what is kept is made in another way
LEAST, STORES = 16, 64  # keys a store on average, at least; and stores, about
AHEAD = 4  # pictures that are read while another is encoded

T = TypeVar("T")
U = TypeVar("U")
Tensors = dict[str, Tensor]
Encode = Callable[[Tensor], Tensor]  # (n, 3, height, width) in [-1, 1] to (n, …)
EncodeTexts = Callable[[list[str]], Mapping[str, Tensor]]  # n captions to tensors (n, …)
Seen = Callable[[int, View], Tensor]  # what the encoder makes of a row's picture, seen so: (…)


def made_by(weights: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What besides the input decides what an encoder makes, for the name of a cache: its weights' digest, its dtype,
    the machine and the packages.
    """
    here = circumstances(device, 1)
    here.pop("processes")  # each of which encodes alone
    return {"layout": LAYOUT, "weights": weights, "dtype": str(dtype), **here}


class Kept(Mapping[str, Tensors]):
    """Tensors by key, in stores on the disk."""

    def __init__(self, stores: Sequence[tuple[Sequence[str], Store]]) -> None:
        self._stores = [store for _, store in stores]
        self._places = {key: (n, i) for n, (keys, _) in enumerate(stores) for i, key in enumerate(keys)}
        self.fresh = sum(store.fresh for store in self._stores)

    def __getitem__(self, key: str) -> Tensors:
        number, index = self._places[key]
        return load(self._stores[number][index])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        return sum(int(store.sizes().sum()) for store in self._stores)


def kept(
    kind: str,
    made_of: Mapping[str, Any],
    keys: Sequence[str],
    make: Callable[[Sequence[str]], Iterator[Tensors]],
    what: str,
    reporter: Reporter,
) -> Kept:
    """The tensors of every key, from the cache; those that are not there are made, one after another.

    A key and `made_of` decide every bit of its tensors. `make` is given some keys, and gives the tensors of each.
    """
    runs = list(chunks(list(dict.fromkeys(keys))))
    total, done = sum(map(len, runs)), 0
    world = joined()
    first = world.rank * len(runs) // world.size  # each process begins elsewhere, so that they share the work
    stores: list[tuple[Sequence[str], Store]] = []
    for own in runs[first:] + runs[:first]:

        def pieces(own: Sequence[str] = own, before: int = done) -> Pieces:
            for number, tensors in enumerate(make(own), 1):
                reporter.progress(what, before + number, total)
                yield save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}), ()

        stores.append((own, prepared(kind, {**made_of, "keys": digest_of(own)}, [], pieces, reporter.say)))
        done += len(own)
    return Kept(stores)


def chunks(keys: Sequence[str]) -> Iterator[list[str]]:
    """The keys in runs, each of which ends where the hash of its last key says so."""
    size = LEAST
    while size * STORES < len(keys):
        size *= 2
    run: list[str] = []
    for key in keys:
        run.append(key)
        if int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:4]) % size == 0:
            yield run
            run = []
    if run:
        yield run


def seen_latents(part: Captioned, encode: Encode, made_of: Mapping[str, Any], keep: bool, reporter: Reporter) -> Seen:
    """What the encoder makes of a picture as it is seen: from the cache where `keep`, and where each is always seen in
    the same part, as it is or turned; else computed each time. Pictures go through alone, so both give the same bits.
    """

    def made(row: int, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            found = encode(pixels[None])[0].detach()
        if not found.isfinite().all():
            raise AdapterError(
                f"{part.place(row)}: the picture's latents are not finite numbers; the encoder may overflow in "
                "float16 (as SDXL's first one does): say another dtype"
            )
        return found

    def anew(row: int, view: View) -> Tensor:
        return made(row, part.pixels(row, view))

    if not keep:
        return anew
    if not part.frame.still(map(part.original, range(len(part)))):
        reporter.say("data.crop=random: pictures are encoded anew at each step; data.crop=center lets them be kept")
        return anew
    views = [part.view(row) for row in range(len(part))]
    keys = [f"{part.content(row)} {view.resized} {view.target}" for row, view in enumerate(views)]
    rows = {key: row for row, key in enumerate(keys)}

    def read(key: str) -> tuple[int, list[Tensor]]:
        row = rows[key]
        pixels = part.pixels(row, views[row])
        return row, [pixels, pixels.flip(-1)] if part.frame.flip else [pixels]

    def make(some: Sequence[str]) -> Iterator[Tensors]:
        for row, pixels in ahead(read, some):
            yield {name: made(row, own) for name, own in zip(("seen", "turned"), pixels, strict=False)}

    more = {"flip": part.frame.flip}
    stored = kept("latents", {**made_of, **more}, keys, make, f"{part.pictures.source}: encoding pictures", reporter)
    return lambda row, view: stored[keys[row]]["turned" if view.flip else "seen"]


def told_texts(
    captions: Sequence[str], encode: EncodeTexts, made_of: Mapping[str, Any], keep: bool, reporter: Reporter
) -> Callable[[str], Tensors]:
    """What the text encoders make of a caption, a row of each tensor: from the cache where `keep`, else each time."""

    def one(caption: str) -> Tensors:
        with torch.no_grad():
            return {name: value[0].detach() for name, value in encode([caption]).items()}

    if not keep:
        return one
    return kept("texts", made_of, captions, lambda own: map(one, own), "encoding captions", reporter).__getitem__


def given_latents(path: str, part: Captioned, channels: int) -> Seen:
    """Latents that were computed elsewhere, `(channels, height, width)` as the base's encoder makes them: one tensor of
    a safetensors file for each picture, by its name with or without its ending. Raises `AdapterError` that names all
    that lack, or are of another shape.
    """
    try:
        file = safe_open(path, framework="pt")
        there = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"data.latents={path}: cannot be read as safetensors: {error}") from error
    names = [part.name(row) for row in range(len(part))]
    found = [next((own for own in (name, _stem(name)) if own in there), None) for name in names]
    if lacking := [name for name, own in zip(names, found, strict=True) if own is None]:
        told = listed(lacking, say=lambda name: f"{name!r}{nearest(name, sorted(there))}")
        raise AdapterError(
            f"data.latents={path}: {len(lacking):,} of {len(names):,} pictures have no tensor of their name: {told}"
        )
    shapes = {str(own): file.get_slice(own).get_shape() for own in found}
    if strange := [
        f"{own!r} {tuple(shape)}" for own, shape in shapes.items() if len(shape) != 3 or shape[0] != channels
    ]:
        expected = f"expected ({channels}, height, width), as the base's encoder makes of a picture"
        raise AdapterError(f"data.latents={path}: {expected}, found {listed(strange, say=str)}")
    return lambda row, view: file.get_tensor(str(found[row]))


def digest_of_given(path: str) -> str:
    """A name for the content of such a file."""
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def ahead(read: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """What is read of each item, some of them before they are asked for."""
    left = iter(items)
    with ThreadPoolExecutor(2) as threads:
        coming = [threads.submit(read, item) for item in islice(left, AHEAD)]
        while coming:
            yield coming.pop(0).result()
            coming += [threads.submit(read, item) for item in islice(left, 1)]
