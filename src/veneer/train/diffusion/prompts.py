"""Prompts as Stable Diffusion WebUI has them: `red apple <lora:style:0.8>`."""

import math
import re
from dataclasses import dataclass

from veneer.core.errors import AdapterError, listed, shown

_TAG = re.compile(r"<(\w+):([^<>]+)>")
_KINDS = ("lora", "lyco")
_NAMED = ("te", "unet")


@dataclass(frozen=True)
class Tag:
    """`<lora:name:text:denoiser>`: how much an adapter acts on the text encoders, and on the denoiser."""

    name: str
    text: float = 1.0
    denoiser: float = 1.0


def parsed_prompt(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags.

    As in WebUI, `<lora:name>` weighs 1, a first number is for both, a second one for the denoiser alone; `te=` and
    `unet=` say so by name. Raises `AdapterError` for tags of another kind and for weights that are no finite numbers.
    """
    tags, faults = [], []
    for kind, inside in _TAG.findall(prompt):
        try:
            tags.append(_tag(kind, inside))
        except AdapterError as error:
            faults.append(f"<{kind}:{inside}>: {error}")
    if faults:
        raise AdapterError("\n".join(faults))
    if twice := {tag.name for tag in tags if sum(tag.name == other.name for other in tags) > 1}:
        raise AdapterError(f"an adapter may be in a prompt once, found twice: {listed(sorted(twice))}")
    return re.sub(r"\s+", " ", _TAG.sub(" ", prompt)).strip() if tags else prompt, tags


def written(text: str, tags: list[Tag]) -> str:
    """The prompt with its tags again."""
    said = [
        f"<lora:{tag.name}:{tag.text:g}>"
        if tag.text == tag.denoiser
        else f"<lora:{tag.name}:{tag.text:g}:{tag.denoiser:g}>"
        for tag in tags
    ]
    return " ".join([text, *said]).strip()


def _tag(kind: str, inside: str) -> Tag:
    if kind not in _KINDS:
        raise AdapterError("only <lora:name:weight> is known")
    name, *rest = inside.split(":")
    plain = [word for word in rest if "=" not in word]
    named = dict(word.split("=", 1) for word in rest if "=" in word)
    if not name.strip() or len(plain) > 2 or not named.keys() <= set(_NAMED):
        raise AdapterError("expected a name and one weight or two (text encoders, denoiser), or te=… and unet=…")
    numbers = [_number(word) for word in plain]
    text = _number(named["te"]) if "te" in named else numbers[0] if numbers else 1.0
    second = numbers[1] if len(numbers) > 1 else text
    return Tag(name.strip(), text, _number(named["unet"]) if "unet" in named else second)


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(f"a weight is a finite number, found {shown(word)}")
    return number
