"""kohya's and the WebUI's files: LoRA under flat names, with an α for each layer, ΔW = α / r · up · down; DoRA's m.

What is written has one α for the whole file, and what another α would have said is folded into `lora_up`. So it is read
right by those too who misread a file of several: diffusers gives the commonest α to attention's projections and to text
encoders' layers whose own differs (it looks for that under a name which its patterns do not match), and to all layers
without an α where others have one. Ranks may differ from layer to layer: with one α all readers take α / r for each.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from veneer.apart.changes import Change, adapter_of, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed
from veneer.files import names as spelling
from veneer.files.factors import scaled
from veneer.files.kohya_layers import LYCORIS_ONLY, alpha_of, change_of, exact, own_of
from veneer.files.parts import PARTS
from veneer.files.stored import save

NAME = "kohya"
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "format")  # of the file that it was read from
_VERSIONS = {  # what programs find in ss_base_model_version, modelspec.architecture, .implementation and .resolution
    "SD1": ("sd_v1", "stable-diffusion-v1", "diffusers", "512x512"),
    "SD2": ("sd_v2", "", "", ""),  # which of its two architectures is not known
    "SDXL": (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
        "1024x1024",
    ),
}
Own = dict[str, Tensor]


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether the layers' names are kohya's, and nothing is of a method that LyCORIS alone has."""
    return any(map(is_flat, names)) and not is_lycoris(names)


def is_flat(name: str) -> bool:
    return "." in name and spelling.FLAT.fullmatch(name.partition(".")[0]) is not None


def is_lycoris(names: Iterable[str]) -> bool:
    parted = (name.partition(".") for name in names)
    return any(layer.startswith("lycoris_") or ending in LYCORIS_ONLY for layer, _, ending in parted)


def read(tensors: Mapping[str, Tensor], about: Mapping[str, str], where: str) -> Adapter:
    """The adapter of a file, of any method that kohya's or LyCORIS's programs have and veneer too.

    Raises `AdapterError` with all that is wrong.
    """
    layers: dict[tuple[str, str], dict[str, Own]] = {}
    strangers = []
    for key, tensor in tensors.items():
        name, _, ending = key.partition(".")
        place = spelling.split(name) if ending else None
        if place is None:
            strangers.append(key)
        else:
            layers.setdefault(place, {}).setdefault(name, {})[ending] = tensor
    faults = [f"names that are no layer's: {collapsed(strangers)}"] if strangers else []
    parts = dict.fromkeys(part for part, _ in layers)
    if len(parts) > 1 and spelling.GENERIC in parts:
        faults.append("names of a pipeline's parts (lora_…) beside names of one model (lycoris_…)")
    found: dict[str, Change] = {}
    wrong: dict[str, list[str]] = {}
    for (part, path), spelt in layers.items():
        whole = f"{part}.{path}" if part else path
        if len(spelt) > 1:
            wrong.setdefault("a layer under two names", []).append(" and ".join(spelt))
        own = next(iter(spelt.values()))
        try:
            found[whole] = change_of(own)
        except AdapterError as error:
            wrong.setdefault(str(error), []).append(whole)
    faults += [f"{what}: {collapsed(paths)}" for what, paths in wrong.items()]
    if faults or not found:
        raise AdapterError("\n".join([f"{where}:", *(faults or ["no layer's tensors"])]))
    metadata = {key: value for key, value in about.items() if key != "format"}
    held = [part for part in PARTS if part in parts]
    return adapter_of(found, metadata=metadata, parts=held, base=metadata.get("base_model"))


def write(adapter: Adapter, path: Path, *, sgm: bool = True) -> None:
    """Write a LoRA, or a DoRA over it, with one α. SDXL's U-Net goes by the original checkpoint's names, which kohya's
    own programs and all others know, or by diffusers' with sgm=False; other bases' by diffusers', as all know them.

    Raises `AdapterError` with all that the format cannot hold.
    """
    every = changes(adapter)
    alpha = _one_alpha([alpha_of(change.config) for change in every.values()])

    def own(change: Change) -> Own:
        if change.config.peft_type != "LORA":
            raise AdapterError(f"{change.config.peft_type}, which is of LyCORIS's format (--to lycoris)")
        tensors = own_of(change)
        factor = alpha_of(change.config) / alpha
        return tensors | {"lora_up.weight": scaled(tensors["lora_up.weight"], factor), "alpha": exact(alpha)}

    ranks = {change.config.r for change in every.values()}
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alpha),
    }
    store(adapter, every, path, own, about, NAME, sgm)


def _one_alpha(alphas: Collection[float]) -> float:
    """The α of the file: of those that differ by powers of two, which round nothing, the smallest, so that what is
    folded makes numbers larger, as fp16 has no room below; of several such kinds the commonest.
    """
    sizes = [abs(alpha) for alpha in alphas if alpha]
    if not sizes:
        return 1.0
    kinds = Counter(math.frexp(size)[0] for size in sizes)
    kind = kinds.most_common(1)[0][0]
    return min(size for size in sizes if math.frexp(size)[0] == kind)


def store(
    adapter: Adapter,
    every: Mapping[str, Change],
    path: Path,
    own: Callable[[Change], Own],
    about: Mapping[str, str],
    format: str,
    sgm: bool = True,
) -> None:
    """Write the layers, each as `own` has it, under flat names, and what the file says of itself.

    Raises `AdapterError` with all that the format cannot hold.
    """
    parts, whole = _placed(adapter, every, format)
    shapes = {path: change.shape for path, change in whole.items()}
    family = spelling.family(shapes, parts) or _claimed(adapter.metadata)
    original = sgm and family == "SDXL"
    reasons: dict[str, list[str]] = {}
    flat: Own = {}
    homes: dict[str, str] = {}
    for place, change in whole.items():
        part, _, inner = place.partition(".") if parts else ("", "", place)
        name = spelling.joined(part, inner, family, sgm=original)
        if name is None:
            reasons.setdefault(f"a part called {part}, which has no name there", []).append(place)
        elif homes.setdefault(name, place) != place:
            reasons.setdefault("two layers of one name", []).append(f"{homes[name]} and {place}")
        else:
            try:
                _judge(change, place)
                flat |= {f"{name}.{ending}": tensor for ending, tensor in own(change).items()}
            except AdapterError as error:
                reasons.setdefault(str(error), []).append(place)
    for told, paths in (
        ("what is trained whole, beside the method", beside(adapter)),
        ("lookup tables", adapter.embeddings & every.keys()),
    ):
        reasons |= {f"{told}, which have no place there": list(paths)} if paths else {}
    if reasons:
        told = "\n".join(f"- {reason}: {collapsed(paths, 8)}" for reason, paths in reasons.items())
        raise AdapterError(f"a {format} file cannot hold all of this adapter; nothing was written:\n{told}")
    save(flat, path, _about(adapter.metadata, about, family))


def _judge(change: Change, path: str) -> None:
    """Raises `AdapterError` where the same numbers are another change to LyCORIS's programs than to veneer's method."""
    options = change.config.options
    scales_rows = change.config.peft_type == "IA3" and not options["feedforward_modules"]
    if scales_rows and options["scales_bias"] and not spelling.is_unbiased(path):
        raise AdapterError("(IA)³ on outputs that scales the layer's bias too, as PEFT's does and LyCORIS's does not")


def _placed(adapter: Adapter, every: Mapping[str, Change], format: str) -> tuple[tuple[str, ...], dict[str, Change]]:
    """The changes with their part first, and the parts; () where the format has a way to be of one model."""
    if adapter.parts:
        return adapter.parts, dict(every)
    part = spelling.part_of(every.keys())
    if part:
        return (part,), {f"{part}.{path}": change for path, change in every.items()}
    if format == NAME:
        raise AdapterError(
            "kohya files say of which part of a pipeline their layers are, which these do not: "
            f"{collapsed(every, 4)}; nothing was written. Say which, where it is of one (`veneer convert --part unet`, "
            "joined({'unet': adapter})); a language model's adapter goes into a folder, as peft"
        )
    return (), dict(every)


def _claimed(metadata: Mapping[str, str]) -> str | None:
    """The family that the adapter says of itself."""
    version = metadata.get("ss_base_model_version", "")
    begin = {"sd_v1": "SD1", "sd_v2": "SD2", "sdxl": "SDXL"}
    return next((family for own, family in begin.items() if version.startswith(own)), None)


def _about(said: Mapping[str, str], facts: Mapping[str, str], family: str | None) -> dict[str, str]:
    """What the file says of itself: what the adapter says, with what is known of this file."""
    stale = [*_STALE, *["ss_network_args"] * (said.get("ss_network_module") != facts["ss_network_module"])]
    about = {key: value for key, value in said.items() if key not in stale}
    if family in _VERSIONS:
        version, architecture, implementation, resolution = _VERSIONS[family]
        known = {"ss_base_model_version": version, "ss_v2": str(family == "SD2")}
        if architecture:
            known |= {
                "modelspec.sai_model_spec": "1.0.0",
                "modelspec.architecture": f"{architecture}/lora",
                "modelspec.implementation": implementation,
                "modelspec.title": said.get("ss_output_name", "LoRA"),
                "modelspec.resolution": resolution,
            }
        about = known | about
    return {**about, **facts}
