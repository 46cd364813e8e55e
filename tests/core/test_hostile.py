"""Twelve thousand spoilt folders: each is refused with one `AdapterError`, or is sound; and the model stays whole."""

import json
import random
import struct
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROUNDS, EACH = 24, 500
NUMBERS = [-1, 0, 1, 2, 3, 8, 2**20, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**12, 10**400, 0.5, 1e308, -1e39]
STRINGS = [
    "",
    "0",
    "1.0",
    "(",
    "((a*)*)*",
    ".*",
    "all-linear",
    "LORA",
    "lora",
    "\0",
    "\ud800",
    "é",
    "../..",
    "x" * 9999,
]
PLAIN = [None, True, False, float("nan"), float("inf"), *NUMBERS, *STRINGS]
JUNK = [
    *PLAIN,
    [],
    {},
    [[]],
    [None],
    ["0", ""],
    [0, 0],
    [10**12, 6],
    {"0": 2},
    {"0": [1, 1]},
    {"0": {"r": [1, 1], "sizes": [1, 4]}},
    {"0": None},
    {"": 1},
    {"(": 1},
    [[[[[]]]]],
]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "I8", "BOOL", "C64", "X", "", None, 3]
KEYS = [
    *(f.name for f in fields(LoraConfig)),
    "bias",
    "fused",
    "use_dora",
    "modules_to_save",
    "loftq_config",
    "lora_alfa",
    "\ud800",
]
FLOATS = [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45]


def _bytes(text: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes cut out, doubled, or put in."""
    spoilt = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(spoilt) or 1)
        match rng.randrange(5):
            case 0:
                del spoilt[at:]
            case 1:
                del spoilt[at : at + rng.randrange(1, 9)]
            case 2:
                spoilt[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                spoilt[at:at] = spoilt[at : at + 40]
            case _ if spoilt:
                spoilt[at] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def _header(text: bytes, rng: random.Random) -> bytes:
    """What the header says of a tensor is changed, and the data stays."""
    (length,) = struct.unpack("<Q", text[:8])
    header, data = json.loads(text[8 : 8 + length]), text[8 + length :]
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(list(header))
        entry = header[key]
        match rng.randrange(8):
            case 0:
                entry["dtype"] = rng.choice(DTYPES)
            case 1 if isinstance(entry.get("shape"), list):
                entry["shape"][rng.randrange(2)] = rng.choice(JUNK)
            case 2 if isinstance(entry.get("shape"), list):
                entry["shape"] = rng.choice([entry["shape"][::-1], [1] * rng.choice([0, 9, 999]), *JUNK])
            case 3 if "data_offsets" in entry:
                entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
            case 4:
                header[rng.choice([key + "x", key[:-1], "", "__metadata__", "\ud800", key.replace("0", "1")])] = entry
            case 5:
                header[rng.choice([key, "__metadata__"])] = rng.choice([*JUNK, {"a": "b"}])
                break
            case 6:
                header[key.replace("0.", "0.0.")] = header.pop(key)
                break
            case _:
                header.pop(key)
                break
    said = json.dumps(header).encode()
    size = rng.choice([len(said)] * 6 + [rng.choice(NUMBERS[1:12]), len(said) + rng.randrange(-9, 9)])
    return struct.pack("<Q", size) + said + data


def _values(text: bytes, rng: random.Random) -> bytes:
    """A number among the tensors is none, or is large."""
    spoilt = bytearray(text)
    (length,) = struct.unpack("<Q", text[:8])
    at = 8 + length + 4 * rng.randrange((len(text) - 8 - length) // 4)
    spoilt[at : at + 4] = struct.pack("<f", rng.choice(FLOATS))
    return bytes(spoilt)


def _fields(text: bytes, rng: random.Random) -> bytes:
    """Fields of the config have other values, other types, or other names."""
    values = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        key = rng.choice(KEYS)
        match rng.randrange(6):
            case 0:
                values.pop(key, None)
            case 1:
                values[key] = [rng.choice(PLAIN) for _ in range(3)]
            case 2:
                values[key] = {rng.choice(STRINGS): rng.choice(PLAIN)}
            case _:
                values[key] = rng.choice(JUNK)
    return json.dumps(values).encode()


def _alike(text: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    pickle = b"\x80\x04cposix\nsystem\n(S'true'\ntR."
    return rng.choice(
        [b"", b"null", b"[]", b"{}", b"[" * 9999, b'{"a":' * 9999, pickle, text[::-1], text * 2, b"\0" * 99]
    )


SPOILS: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [
    *[(WEIGHTS, spoil) for spoil in (_bytes, _bytes, _header, _header, _header, _values, _alike)],
    *[(CONFIG, spoil) for spoil in (_bytes, _fields, _fields, _fields, _alike)],
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hostile")
    config = LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 3}, init_lora_weights=False)
    get_peft_model(_base(), config).save_pretrained(folder)
    return folder, {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}


def _base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def _is_sound(model: PeftModel, weights: bytes) -> bool:
    """Every tensor of the file is in the model, finite, as the file has it, and the model has no other."""
    names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    placed = {
        f"base_model.model.{path}.{names[name]}": parameter
        for path, layer in adapted_layers(model)
        for name, parameter in layer.adapters["default"].named_parameters()
    }
    held = load(weights)
    return placed.keys() == held.keys() and all(
        torch.equal(p, held[name].float()) and bool(p.isfinite().all()) for name, p in placed.items()
    )


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_spoilt_folder_is_refused_or_sound_and_the_model_stays_whole(good, bits, seed):
    folder, files = good
    rng, model = random.Random(seed), _base()
    before, refused = bits(model), 0
    for _ in range(EACH):
        spoilt = dict(files)
        for name, spoil in rng.sample(SPOILS, rng.choice([1, 1, 1, 2])):
            spoilt[name] = spoil(files[name], rng)
        for name, text in spoilt.items():
            (folder / name).unlink()  # a file that is emptied and filled is flushed to the disk, which is slow
            (folder / name).write_bytes(text)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(action="ignore"):
                PeftModel.from_pretrained(model, folder)
        except AdapterError as error:
            refused += 1
            said = str(error)
            said.encode()  # can be printed
            assert len(said) < 10_000, said
        else:
            assert _is_sound(model, spoilt[WEIGHTS]), spoilt
            model.unload()
        assert time.perf_counter() - start < 1, spoilt
        assert [type(module) for module in model.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
        assert bits(model) == before
    assert EACH // 2 < refused < EACH
