"""What a file says of itself that a person wants to read: trigger words, training, title, licence."""

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime

MOST_TAGS = 10
_LONGEST = 500  # characters of one value

# label → where trainers write it; the first that is there counts
_FACTS = {
    "title": ("modelspec.title", "ss_output_name", "title", "name"),
    "author": ("modelspec.author", "author"),
    "licence": ("modelspec.license", "license", "licence"),
    "date": ("modelspec.date", "ss_training_finished_at", "ss_training_started_at"),
    "description": ("modelspec.description", "description"),
    "comment": ("ss_training_comment",),
    "tags": ("modelspec.tags", "tags"),
    "use": ("modelspec.usage_hint", "usage_hint"),
    "trained on": ("ss_sd_model_name", "ss_new_sd_model_name"),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "images": ("ss_num_train_images",),
    "batch size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "learning rate": ("ss_learning_rate",),
    "learning rate of the UNet": ("ss_unet_lr",),
    "learning rate of the text encoder": ("ss_text_encoder_lr",),
    "optimizer": ("ss_optimizer",),
    "schedule": ("ss_lr_scheduler",),
    "prediction": ("modelspec.prediction_type",),
    "clip skip": ("ss_clip_skip",),
    "network": ("ss_network_module",),
    "trained by": ("software", "ss_sd_scripts_commit_hash"),
}
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "ss_trigger_words", "instance_prompt")


def facts_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Label → value, of what is there and says something."""
    found = {}
    for label, keys in _FACTS.items():
        values = [str(metadata[key]).strip() for key in keys if key in metadata]
        said = next((value for value in values if value not in ("", "None", "null", "[]", "{}")), None)
        if said is not None:
            found[label] = (_date(said) if label == "date" else said)[:_LONGEST]
    return found


def trigger_words_of(metadata: Mapping[str, str]) -> dict[str, int | None]:
    """What calls the adapter up: the phrases that the file gives, then the most frequent tags with their counts."""
    words: dict[str, int | None] = {}
    for key in _TRIGGERS:
        if said := str(metadata.get(key, "")).strip():
            for word in _listed(said):
                words.setdefault(word[:_LONGEST], None)
    for tag, count in tags_of(metadata).most_common(MOST_TAGS):
        words.setdefault(tag[:_LONGEST], count)
    return words


def tags_of(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each tag stood in the captions, over all folders of pictures: kohya's `ss_tag_frequency`."""
    folders = _object(metadata.get("ss_tag_frequency"))
    counts: Counter[str] = Counter()
    for tags in folders.values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if tag.strip() and isinstance(count, int) and not isinstance(count, bool):
                counts[tag.strip()] += count
    return counts


def _listed(said: str) -> list[str]:
    """A JSON list of words, or the text itself."""
    try:
        value = json.loads(said)
    except (ValueError, RecursionError):
        value = said
    words = value if isinstance(value, list) else [said]
    return [word.strip() for word in words if isinstance(word, str) and word.strip()]


def _object(text: object) -> dict[str, object]:
    try:
        value = json.loads(str(text)) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _date(said: str) -> str:
    """Seconds since 1970 as a date; what is a date already stays."""
    try:
        return datetime.fromtimestamp(float(said), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return said
