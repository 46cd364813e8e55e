"""What a picture says of how it was made, as Stable Diffusion WebUI and all that reads its pictures have it."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from veneer import __version__

# samplers as WebUI calls them
_SAMPLERS = {
    "DDIM": "DDIM",
    "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSDE": "DPM++ SDE",
    "EulerAncestralDiscrete": "Euler a",
    "EulerDiscrete": "Euler",
    "HeunDiscrete": "Heun",
    "LMSDiscrete": "LMS",
    "PNDM": "PLMS",
    "UniPCMultistep": "UniPC",
}
PARAMETERS, OWN = "parameters", "veneer"  # the texts inside of a PNG


def infotext(prompt: str, negative: str, facts: dict[str, Any]) -> str:
    """The prompt, a line of what it is led away from, and a line of `key: value`, those that are there."""
    every = {key: value for key, value in facts.items() if value is not None}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in {**every, "Version": f"veneer {__version__}"}.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def sampler_of(pipeline: Any) -> str:
    """What WebUI calls the pipeline's sampler."""
    name = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
    return _SAMPLERS.get(name, name)


def save_png(picture: Image.Image, text: str | None, own: Any, path: Path) -> None:
    """Write the picture with these words inside, and `own` as JSON."""
    about = PngInfo()
    if text:
        about.add_text(PARAMETERS, text)
    about.add_text(OWN, json.dumps(own, ensure_ascii=False))
    picture.save(path, "PNG", pnginfo=about)


def _quoted(value: Any) -> str:
    """The value, as JSON where it would be taken apart."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text
