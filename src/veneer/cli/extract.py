"""`veneer extract`: the LoRA between a tuned model and its base."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.outcome import Force, Format, Out, Precision, dtype_of, format_of, left, progress
from veneer.core.errors import AdapterError, collapsed

_CLIP = re.compile(r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?=text_model\.)")
_UNET = "model.diffusion_model."


def extract(
    tuned: Annotated[str, typer.Argument(help="A model's folder, or a .safetensors file of all its weights.")],
    base: Annotated[str, typer.Argument(help="What it was tuned from: a folder, a file, or a base's name.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The rank; with one of the shares, the most there may be.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of Σ σ² in each layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep σ / σ₁ of at least this.")] = None,
    conv_rank: Annotated[int | None, typer.Option(help="For kernels of more than a point, if another one.")] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Keep what else differs (norms, biases, tables) whole.")
    ] = False,
    format: Format = None,
    dtype: Precision = None,
    force: Force = False,
) -> None:
    """Write what a tuned model learned as a LoRA: one layer of both models at a time is in memory."""
    import torch

    from veneer.combine import extract as extracted
    from veneer.combine.stored import weights_of

    if rank is None and energy is None and ratio is None:
        raise AdapterError("say how large the LoRA should be: --rank, --energy or --ratio")
    name = format_of(out, format or ("kohya" if out.suffix == ".safetensors" else None), [], force)
    new, old = (weights_of(_place(model)) for model in (tuned, base))
    is_checkpoint = any(key.startswith(_UNET) for key in old)
    if name != "peft" and not is_checkpoint:
        _refuse_other_models(name, out, list(old))
    found = extracted(
        new,
        old,
        rank,
        energy=energy,
        ratio=ratio,
        conv_rank=conv_rank,
        everything=everything,
        dtype=dtype_of(dtype) or torch.float32,
        rename=_of_checkpoint if is_checkpoint else lambda key: key,
        parts=("unet", "text_encoder") if is_checkpoint else (),
        base_name=base,
        progress=progress("parameters"),
    )
    left(found.adapter, found.errors, out, name, force)
    for what, names in (
        ("the same in both", found.same),
        ("differ and are not in the adapter", found.left),
        ("in one of the models alone, or of another size", found.strange),
    ):
        if names:
            print(f"{what}: {collapsed(names, 12)}", file=sys.stderr)


def _refuse_other_models(format: str, out: Path, keys: list[str]) -> None:
    """Raises `AdapterError`, before any work is done, for a format that is a pipeline's alone."""
    from veneer.files.names import part_of
    from veneer.files.parts import PARTS

    paths = {key.rpartition(".")[0] for key in keys}
    known = any(path.partition(".")[0] in PARTS or part_of([path]) for path in paths)
    if format in ("kohya", "diffusers") and not known:
        raise AdapterError(
            f"{format} files are of image models, and this is another model: name a folder, --out {out.with_suffix('')}"
        )


def _place(model: str) -> Path:
    """A file or folder of weights, or the folder of a base that is known by its name."""
    from veneer import zoo

    path = Path(model).expanduser()
    return path if path.exists() else zoo.resolve(model)


def _of_checkpoint(key: str) -> str | None:
    """The diffusers' name of a parameter in a whole checkpoint of Stable Diffusion, as far as it has one."""
    from veneer.files.names import split

    if key.startswith(_UNET):
        path, _, kind = key.removeprefix(_UNET).rpartition(".")
        found = split(f"lora_unet_{path.replace('.', '_')}")
        return f"unet.{found[1]}.{kind}" if found and "." in found[1] else None
    return "text_encoder." + key[match.end() :] if (match := _CLIP.match(key)) else None
