"""What frozen encoders make is kept: the same bits as computed anew, made once, whole or not at all."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from train.diffusion.captioned import Heard, folder, picture, read
from train.diffusion.cutting import KEYS
from veneer.core.errors import AdapterError
from veneer.train.diffusion.cache import chunks, given_latents, kept, made_by, seen_latents, told_texts
from veneer.train.diffusion.captions import Captioned

MADE_BY = made_by("weights", torch.float32, torch.device("cpu"))


class Encoder(nn.Module):
    """A convolution that counts what goes through it, and may fail after some."""

    def __init__(self, dtype: torch.dtype = torch.float32, most: int = 10**6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.calls, self.most = nn.Conv2d(3, 8, 8, stride=8, dtype=dtype), 0, most

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.most:
            raise KeyboardInterrupt
        return self.layer(pixels.to(self.layer.weight.dtype))


def latents(part: Captioned, encoder: Encoder, keep: bool = True, **made_of):
    return seen_latents(part, encoder, {**MADE_BY, **made_of}, keep, Heard())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_kept_has_the_bits_of_what_is_computed_anew(tmp_path, dtype):
    own = folder(tmp_path, {f"{i}.png": "x" for i in range(9)}, (80, 50))
    folder(tmp_path / "high", {"0.png": "x"}, (50, 90))
    part, _ = read(own, flip=True, buckets={"smallest": 8, "largest": 128, "step": 8})
    first = Encoder(dtype)
    stored, anew = latents(part, first), latents(part, Encoder(dtype), keep=False)
    assert first.calls == 2 * 10
    seen = set()
    for row in range(len(part)):
        for step in range(6):
            view = part.view(row, Random(step))
            seen.add(view.flip)
            assert stored(row, view).dtype == dtype
            assert torch.equal(stored(row, view), anew(row, view))
    assert seen == {True, False}
    again = Encoder(dtype)
    assert torch.equal(latents(part, again)(3, part.view(3)), anew(3, part.view(3)))
    assert again.calls == 0


def test_latents_that_are_not_finite_are_never_kept(tmp_path, cache: Path):
    part, _ = read(folder(tmp_path / "own", {"a.png": "x"}))
    for keep in (True, False):
        with pytest.raises(AdapterError, match=r"own, a.png: the picture's latents are not finite numbers"):
            seen_latents(part, lambda pixels: pixels / 0, MADE_BY, keep, Heard())(0, part.view(0))
    assert not list(cache.glob("latents-*"))


def test_all_that_decides_the_latents_makes_others(tmp_path):
    own = folder(tmp_path, {f"{i}.png": "x" for i in range(3)}, (64, 48))
    for encoder, expected, more, made_of in (
        (Encoder(), 3, {}, {}),
        (Encoder(), 0, {}, {}),
        (Encoder(), 0, {"trigger": "sks", "caption_dropout": 0.5}, {}),
        (Encoder(), 3, {}, made_by("other", torch.float32, torch.device("cpu"))),
        (Encoder(), 3, {}, made_by("weights", torch.bfloat16, torch.device("cpu"))),
        (Encoder(), 6, {"flip": True}, {}),
        (Encoder(), 3, {"resolution": 16}, {}),
        (Encoder(), 0, {"crop": "random"}, {}),
    ):
        latents(read(own, **more)[0], encoder, **made_of)
        assert encoder.calls == expected, (more, made_of)
    picture(7, (64, 48)).save(own / "1.png")
    assert torch.equal(latents(read(own)[0], changed := Encoder())(1, read(own)[0].view(1)), _alone(read(own)[0], 1))
    assert changed.calls >= 1


def _alone(part: Captioned, row: int) -> torch.Tensor:
    with torch.no_grad():
        return Encoder()(part.picture(row)[0][None])[0]


def test_random_crops_are_kept_where_there_is_one_of_them(tmp_path):
    wide, square = folder(tmp_path / "wide", {"a.png": "x"}, (64, 48)), folder(tmp_path / "s", {"a.png": "x"}, (48, 48))
    for own, calls in ((wide, 2), (square, 1)):
        heard, encoder = Heard(), Encoder()
        part, _ = read(own, crop="random")
        stored = seen_latents(part, encoder, MADE_BY, True, heard)
        for step in range(2):
            view = part.view(0, Random(step))
            with torch.no_grad():
                assert torch.equal(stored(0, view), Encoder()(part.pixels(0, view)[None])[0])
        assert encoder.calls == calls
        assert any("data.crop=random: pictures are encoded anew" in told for told in heard.told) == (own is wide)


def test_a_cache_that_is_cut_short_goes_on_and_is_whole(tmp_path, cache: Path):
    keys = [f"picture {i}" for i in range(200)]
    made: list[str] = []

    def make(some: Sequence[str], most: int = 10**6):
        for key in some:
            if len(made) == most:
                raise KeyboardInterrupt
            made.append(key)
            yield {"number": torch.tensor([int(key.split()[1])])}

    runs = list(chunks(keys))
    cut = sum(map(len, runs[:3])) + 1
    with pytest.raises(KeyboardInterrupt):
        kept("numbers", MADE_BY, keys, lambda some: make(some, cut), "numbers", Heard())
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 3, "the fourth left nothing"
    made.clear()
    heard = Heard()
    found = kept("numbers", MADE_BY, keys, make, "numbers", heard)
    assert made == keys[cut - 1 :]
    assert heard.done[-1] == ("numbers", 200, 200)
    assert [found[key]["number"].item() for key in keys] == list(range(200))
    assert list(found) == keys
    assert found.fresh == len(runs) - 3
    made.clear()
    kept("numbers", MADE_BY, keys, make, "numbers", heard)
    assert made == []


def test_damage_is_found_and_made_again(tmp_path, cache: Path):
    part, _ = read(folder(tmp_path / "own", {"a.png": "x"}))
    expected = latents(part, Encoder())(0, part.view(0))
    (store,) = cache.glob("latents-*")
    for file in ("pieces", "index.json"):
        content = (store / file).read_bytes()
        (store / file).write_bytes(content[:-1])
        encoder = Encoder()
        assert torch.equal(latents(part, encoder)(0, part.view(0)), expected)
        assert encoder.calls == 1
    content = bytearray((store / "pieces").read_bytes())
    content[-1] ^= 1
    (store / "pieces").write_bytes(content)
    with pytest.raises(AdapterError, match="is damaged"):
        latents(part, Encoder())(0, part.view(0))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 10**6))
def test_one_key_more_changes_one_run(count, place, seed):
    keys = [f"{seed} {number}" for number in range(count)]
    runs, others = list(chunks(keys)), list(chunks([*keys[:place], "more", *keys[place:]]))
    assert [key for run in runs for key in run] == keys
    assert all(runs)
    assert len([run for run in others if run not in runs]) <= 2
    assert len([run for run in runs if run not in others]) <= 1


@pytest.mark.slow
def test_a_killed_process_leaves_what_is_whole_and_two_share_the_work(tmp_path):
    script = [sys.executable, str(Path(__file__).with_name("cutting.py")), str(tmp_path)]
    told = json.loads(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    assert told["killed"] == -signal.SIGKILL
    assert (told["torn"], told["leftovers"]) == ([], [])
    assert told["second"] == KEYS[told["whole"] :], "it goes on after what is whole"
    assert told["numbers"] == list(range(len(KEYS)))
    assert told["codes"] == [0, 0]
    assert sorted(told["together"][0] + told["together"][1]) == sorted(KEYS), "each once"
    assert min(map(len, told["together"])) > len(KEYS) // 5


def test_captions_are_encoded_once_each_and_the_empty_one_too(tmp_path):
    own = folder(tmp_path, {f"{i}.png": f"thing {i % 2}\nother" for i in range(6)})
    part, _ = read(own, caption_dropout=0.1)
    calls: list[list[str]] = []

    def encode(captions: list[str]) -> dict[str, torch.Tensor]:
        calls.append(captions)
        numbers = torch.tensor([[len(text), sum(text.encode())] for text in captions])
        return {"states": numbers.bfloat16()[:, None], "pooled": numbers.float()}

    assert part.spoken() == ["", "thing 0", "other", "thing 1"]
    for keep, expected in ((True, 4), (True, 0), (False, 0)):
        calls.clear()
        told = told_texts(part.spoken(), encode, MADE_BY, keep, Heard())
        assert len(calls) == expected
        for text in part.spoken():
            found = told(text)
            assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
                "states": ((1, 2), torch.bfloat16),
                "pooled": ((2,), torch.float32),
            }
            assert all(torch.equal(found[name], value[0]) for name, value in encode([text]).items())


def test_latents_that_were_computed_elsewhere(tmp_path):
    own = folder(tmp_path / "own", {f"deep/{i}.png": "x" for i in range(3)})
    part, _ = read(own)
    tensors = {"deep/0.png": torch.randn(16, 2, 2), "deep/1": torch.randn(16, 2, 3), "deep/3": torch.zeros(1)}
    save_file(tensors, tmp_path / "latents.safetensors")
    with pytest.raises(AdapterError, match=r"1 of 3 pictures have no tensor of their name: 'deep/2.png'; did you mean"):
        given_latents(str(tmp_path / "latents.safetensors"), part, 16)
    save_file({**tensors, "deep/2": torch.randn(16, 2, 2)}, tmp_path / "latents.safetensors")
    found = given_latents(str(tmp_path / "latents.safetensors"), part, 16)
    assert torch.equal(found(0, part.view(0)), tensors["deep/0.png"])
    assert torch.equal(found(1, part.view(1)), tensors["deep/1"])
    with pytest.raises(AdapterError, match=r"expected \(8, height, width\).*'deep/0.png' \(16, 2, 2\)"):
        given_latents(str(tmp_path / "latents.safetensors"), part, 8)
    (tmp_path / "latents.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        given_latents(str(tmp_path / "latents.safetensors"), part, 16)
