"""`veneer generate`: what an adapted model answers, or the pictures that it makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.weighted import weighted
from veneer.core.errors import AdapterError, listed

_TEXT, _PICTURES = "For language models", "For pictures"


def _option(help: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER[:WEIGHT]…",
        help="A run's folder, an adapter of any format, or a name of the library; for pictures there may be several.",
    ),
]
Prompts = Annotated[list[str] | None, _option("What is asked; may be repeated.", "--prompt", "-p")]
Out = Annotated[Path | None, _option("Where it goes: answers, one JSON a line; a picture.png, or a folder of them.")]
Compare = Annotated[bool, _option("Base and adapted model side by side.", "--compare")]
BaseName = Annotated[str | None, _option("The base, if not the one that the adapter names.")]
Seed = Annotated[str, _option("Decides what is drawn at random; for pictures several, as 1,5 or 1-4.")]
Precision = Annotated[str, _option("Of the base: auto, bfloat16, float16 or float32.")]
Device = Annotated[str, _option("auto, cpu, cuda, …")]
Input = Annotated[
    Path | None,
    _option("Many prompts: rows as the training had them.", "--input", panel=_TEXT, metavar="FILE.jsonl"),
]
Longest = Annotated[int | None, _option("The longest answer, in tokens; 128, if not said.", panel=_TEXT, min=1)]
Temperature = Annotated[
    float | None, _option("0, if not said, takes the likeliest token; higher is freer.", panel=_TEXT, min=0)
]
Beams = Annotated[
    int | None,
    _option("Answers that are followed at once; the likeliest is given when it is whole.", panel=_TEXT, min=1),
]
Strength = Annotated[
    str | None, _option("How much the adapters act, 1 if not said; several as 0,0.5,1.", panel=_PICTURES)
]
Negative = Annotated[str | None, _option("What the picture is led away from.", panel=_PICTURES)]
Steps = Annotated[int | None, _option("Of the sampler.", panel=_PICTURES, min=1)]
Guidance = Annotated[
    float | None, _option("How strongly the prompt leads (classifier-free guidance).", panel=_PICTURES, min=0)
]
Rescale = Annotated[
    float | None, _option("How much of the unguided contrast is brought back.", panel=_PICTURES, min=0, max=1)
]
Pixels = Annotated[int | None, _option("In pixels.", panel=_PICTURES, min=8)]
Folder = Annotated[
    Path | None,
    _option("Where <lora:name> is looked for first.", panel=_PICTURES, exists=True, file_okay=False),
]
Decoder = Annotated[str | None, _option("For Würstchen's prior: the decoder's folder or hub id.", panel=_PICTURES)]
Grid = Annotated[bool, _option("All pictures on one sheet.", "--grid", panel=_PICTURES)]
Merged = Annotated[bool, _option("Put the adapters into the weights meanwhile: faster.", "--merged", panel=_PICTURES)]


def generate(
    adapters: Adapters = None,
    prompt: Prompts = None,
    out: Out = None,
    compare: Compare = False,
    base: BaseName = None,
    seed: Seed = "0",
    dtype: Precision = "auto",
    device: Device = "auto",
    file: Input = None,
    max_new_tokens: Longest = None,
    temperature: Temperature = None,
    beams: Beams = None,
    strength: Strength = None,
    negative: Negative = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_rescale: Rescale = None,
    width: Pixels = None,
    height: Pixels = None,
    grid: Grid = False,
    merged: Merged = False,
    lora_dir: Folder = None,
    decoder: Decoder = None,
) -> None:
    """Answer prompts with an adapted language model, or draw them with an adapted pipeline.

    Prompts for pictures may name adapters as WebUI does: "red apple <lora:style:0.8>".
    """
    text: dict[str, Any] = {"file": file, "max_new_tokens": max_new_tokens, "temperature": temperature, "beams": beams}
    drawn: dict[str, Any] = {"strength": strength, "negative": negative, "steps": steps, "guidance": guidance}
    drawn |= {"guidance_rescale": guidance_rescale, "width": width, "height": height}
    drawn |= {"grid": grid, "merged": merged, "lora_dir": lora_dir, "decoder": decoder}
    every, prompts = [weighted(name) for name in adapters or []], prompt or []
    options: dict[str, Any] = {"compare": compare, "dtype": dtype, "device": device}
    if bool(prompts) == (file is not None):
        raise AdapterError("generate needs --prompt TEXT or --input FILE, one of the two")
    if _is_for_pictures([name for name, _ in every], prompts, base):
        _refuse(text, "language models, and this is for pictures")
        from veneer.cli.pictures import pictures

        pictures(every, prompts, base, seed, out, **options, **drawn)
    else:
        _refuse(drawn, "pictures, and this is for a language model")
        _answer(every, prompts, base, seed, out, **options, **text)


def _answer(
    adapters: list[tuple[str, float]],
    prompts: list[str],
    base: str | None,
    seed: str,
    out: Path | None,
    compare: bool,
    dtype: str,
    device: str,
    **asked: Any,
) -> None:
    from veneer.cli.answers import answers, refuse_taken

    if len(adapters) != 1 or adapters[0][1] != 1:
        raise AdapterError("a language model answers with one adapter, as it is: `veneer combine` makes one of several")
    if not seed.isdecimal():
        raise AdapterError(f"--seed: expected a whole number, found {seed!r}")
    refuse_taken(out)
    from veneer.train.language.speaker import Speaker

    speaker = Speaker.load(adapters[0][0], base, dtype, device)
    given = {key: value for key, value in asked.items() if value is not None and key != "file"}
    answers(speaker, prompts, asked["file"], out, compare, int(seed), **given)


def _refuse(options: Mapping[str, Any], why: str) -> None:
    names = {"file": "input"}
    if given := [names.get(key, key) for key, value in options.items() if value is not None and value is not False]:
        said = listed(given, say=lambda name: f"--{name.replace('_', '-')}")
        raise AdapterError(f"{said} {'is' if len(given) == 1 else 'are'} for {why}")


def _is_for_pictures(adapters: list[str], prompts: list[str], base: str | None) -> bool:
    """Whether a pipeline is meant: as an adapter says or its layers do, or because the base is one."""
    from veneer import files, library, zoo
    from veneer.files.pipeline import is_pipeline

    if base is not None:
        return is_pipeline(zoo.resolve(base))
    if not adapters:
        if any("<lora:" in prompt for prompt in prompts):
            return True
        raise AdapterError("generate needs an ADAPTER, or --base with a pipeline, to draw what it does by itself")
    path = library.find(adapters[0])
    held = files.read(path)
    named = held.config.base_model_name_or_path
    if held.parts or not named:
        return bool(held.parts)
    try:
        return is_pipeline(zoo.resolve(named, download=False))
    except AdapterError:  # which is told when the base is needed
        return False
