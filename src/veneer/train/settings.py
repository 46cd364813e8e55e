"""What every recipe says, declared once: the schema, the command line, the docs and the errors come from here."""

from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, nearest


class Settings(BaseModel):
    """A part of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


Average = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Settings):
    """The `train` part of a recipe."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps; where they are said, epochs are not looked at.")
    epochs: float = Field(3, gt=0, description="Passes over the rows.")
    batch_size: int = Field(16, ge=1, description="Rows that go through the model at once.")
    accumulation: int = Field(
        1, ge=1, description="Batches an optimizer step; gradients are normalised over all of them."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep each layer's input only, and run the layer again in the backward: less memory, more time.",
    )
    lr: float = Field(2e-4, gt=0, le=10, description="The highest learning rate.")
    loraplus_ratio: float | None = Field(
        None, ge=1, description="How many times as fast as the rest the B of each LoRA learns (LoRA+); 16 is usual."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the rate falls after warm-up.")
    warmup: float = Field(
        0.05, ge=0, description="Steps in which the rate rises: a share of all (below 1) or a number."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay, on matrices only.")
    betas: tuple[Average, Average] = Field((0.9, 0.999), description="AdamW's two averages.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longer gradients are scaled down to this; 0 leaves them.")
    shard: Literal["auto", "always", "never"] = Field(
        "auto",
        description="With several processes: keep a part of the frozen base in each (FSDP2). auto: where the base does "
        "not fit into each of them.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Decides the order of the rows, the starting values and the dropout."
    )


class EvalSettings(Settings):
    """The `eval` part of a recipe: the keys that every task shares."""

    every_steps: int | None = Field(None, ge=1, description="Measure the held-out loss every so many steps.")
    patience: int | None = Field(
        None,
        ge=1,
        description="End the training when so many measurements in a row were no better than the best; needs "
        "eval.every_steps.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="Which step's adapter is left in the end: the last one's, or that of the best measurement, which "
        "needs eval.every_steps.",
    )

    @model_validator(mode="after")
    def _measures(self) -> "EvalSettings":
        if self.every_steps is None and (self.patience or self.keep == "best"):
            raise AdapterError("eval.patience and eval.keep=best look at measurements: set eval.every_steps")
        return self


class CheckpointSettings(Settings):
    """The `checkpoint` part of a recipe."""

    every_steps: int | None = Field(None, ge=1, description="Keep all that the run carries every so many steps.")
    every_minutes: float | None = Field(10, gt=0, description="And every so many minutes; null for steps alone.")
    keep: int = Field(2, ge=1, description="So many of the newest stay, and that of the best measurement.")


class Recipe(Settings):
    """The keys that every task shares; a task adds its own under data, eval and sample."""

    task: str = Field("causal-lm", description="What is learned.")
    base: str = Field(description="The base model: a name that `veneer models` lists, a folder, or a hub id.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Of the frozen base; the adapter trains in float32. auto: bfloat16 where the device multiplies it "
        "faster than float32, or where the base is large; else float32. float16 scales the loss, so that small "
        "gradients do not vanish.",
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Of the frozen base's linear layers: int8 takes one byte a weight, nf4 half a byte. On a CPU this "
        "takes a little more time, and saves memory for large bases only.",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps, …")
    adapter: LoraConfig = Field(default_factory=LoraConfig, description="LoraConfig's own fields.")
    train: TrainSettings = Field(default_factory=TrainSettings)
    eval: EvalSettings = Field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    resume: Literal["never", "auto"] = Field(
        "never",
        description="auto: go on with the newest run of this recipe that was cut short, if any, as --resume does.",
    )
    log: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Who else is told what is measured; each needs its own package."
    )
    output: str = Field("runs", description="The folder that gets <name>-<number>/.")
    name: str | None = Field(None, pattern=r"^[\w.+-]+$", description="The run's name; the recipe's, if not said.")

    @field_validator("base")
    @classmethod
    def _named_in_full(cls, base: str) -> str:
        """A folder is named in full, so that the recipe and the adapter of a run can be used from anywhere."""
        folder = Path(base).expanduser()
        is_model = any((folder / name).is_file() for name in ("config.json", "model_index.json"))
        return str(folder.resolve()) if is_model else base


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every key said, as `veneer train` reads it again."""
    return recipe.model_dump(mode="json")


def as_yaml(values: dict[str, Any]) -> str:
    """The values as a recipe file says them."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


R = TypeVar("R", bound=Recipe)


def checked(schema: type[R], values: dict[str, Any], where: str) -> R:
    """The values as settings. Raises `AdapterError` that lists all that is wrong, with the nearest known keys."""
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        problems = [_sentence(problem, schema) for problem in error.errors()]
        raise AdapterError(f"{where}: " + "; ".join(problems)) from None


def _sentence(problem: Any, schema: type[Settings]) -> str:
    path = [str(part) for part in problem["loc"]]
    kind, key = problem["type"], ".".join(path)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}{_nearest_key(path, keys(schema))}"
    if kind == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"{key}: {message[0].lower()}{message[1:]}, found {problem['input']!r}"


def _nearest_key(path: list[str], known: list[str]) -> str:
    """A hint: a word of this part that is a letter off, the same in another part, one like it here, or anywhere."""
    last = {name: name.rpartition(".")[2] for name in known}
    same = [name for name, word in last.items() if word == path[-1]]
    here = [word for name, word in last.items() if name.rpartition(".")[0] == ".".join(path[:-1])]
    slips = get_close_matches(path[-1], here, n=1, cutoff=0.85)
    same = slips or same
    return f"; did you mean {same[0]!r}?" if same else nearest(path[-1], here) or nearest(path[-1], known)


def keys(schema: type[Any], prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted."""
    if schema is LoraConfig:
        return [f"{prefix}{field.name}" for field in fields(LoraConfig)]
    found: list[str] = []
    for name, field in schema.model_fields.items():
        inner = _part(field.annotation)
        found += [f"{prefix}{name}", *(keys(inner, f"{prefix}{name}.") if inner else [])]
    return found


def _part(annotation: Any) -> type[Any] | None:
    """The settings that a key holds, also where it may hold none (`Buckets | None`)."""
    kinds = [kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel) or kind is LoraConfig), None)


def described(schema: type[Any]) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default, description) of every key, for `veneer recipes keys` and the docs."""
    for name, field in schema.model_fields.items():
        inner = _part(field.annotation)
        if inner is LoraConfig:
            usual = field.get_default(call_default_factory=True)
            for own in fields(LoraConfig):
                yield f"{name}.{own.name}", repr(getattr(usual, own.name)), MEANINGS[own.name]
            continue
        if inner is None or inner is not field.annotation:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            yield name, default, field.description or ""
        if inner:
            yield from ((f"{name}.{key}", default, text) for key, default, text in described(inner))


# What each field of an adapter's config means, for the list of settings.
MEANINGS = {
    "r": "The rank: how many columns A and B share.",
    "lora_alpha": "The change is scaled by lora_alpha / r (lora_alpha / √r with use_rslora).",
    "target_modules": "Which layers: names or last parts of names, a regular expression for whole names, all-linear; "
    "of a pipeline also attention, kohya, kohya+conv or all.",
    "exclude_modules": "Layers that are left out, named in the same way.",
    "lora_dropout": "The share of the change's inputs that is dropped in training.",
    "use_rslora": "Scale by lora_alpha / √r, which keeps large ranks learning.",
    "rank_pattern": "Other ranks for layers whose names end with a key: {q_proj: 8}.",
    "alpha_pattern": "Other values of lora_alpha, in the same way.",
    "method_pattern": "Other methods for such layers: {conv: {peft_type: LOKR}}.",
    "layers_to_transform": "Only in these layers, counted from 0.",
    "layers_pattern": "What the list of layers is called, where it is not plain.",
    "init_lora_weights": "How A and B start.",
    "peft_type": "The method: LORA, LOHA, LOKR, VERA, IA3 or FULL.",
    "use_dora": "Learn the length of each row of W + ΔW apart from its direction (DoRA), over any method.",
    "options": "What only one method knows.",
    "unknown": "What newer versions of PEFT say in a file, kept as it was read; it says nothing here.",
    "task_type": "What PEFT should load the base as; found by itself.",
    "base_model_name_or_path": "The base that the adapter is for; found by itself.",
    "revision": "The revision of the base on the hub.",
    "inference_mode": "Kept for PEFT; says nothing here.",
    "target_parameters": "Parameters that are adapted by name, stacked experts included.",
    "modules_to_save": "Modules that are trained whole, as copies that the adapter holds: a new head, say.",
    "trainable_token_indices": "Tokens whose rows of the embedding are trained by themselves: new ones, say.",
    "ensure_weight_tying": "What changes a weight that layers share (embedding and head) changes it in all of them.",
    "bias": "Which biases are trained too: none, lora_only (those of adapted layers) or all.",
}
