"""Make the shipped sample of film reviews: python benchmarks/sample_reviews.py

Sentences of our own, put together from parts: no review that anybody wrote. Writes train.jsonl and held-out.jsonl into
the shipped recipes' data. The two share words, but no sentence and no opinion: parts of held-out opinions are apart.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "src/veneer/recipes/data/reviews"
COUNTS = {"train": 400, "held-out": 100}
SUBJECTS = (
    *("the film", "this comedy", "the sequel", "the script", "the cast", "this thriller", "the documentary"),
    *("her second feature", "the camera work", "the last act", "this fable", "the dialogue", "the whole production"),
)
FRAMES = (
    "{subject} is {opinion}",
    "{subject} turns out to be {opinion}",
    "from the first minute , {subject} is {opinion}",
    "{subject} is {opinion} , and so is {other}",
    "i expected little , and {subject} is {opinion}",
    "nobody will deny that {subject} is {opinion}",
    "in the end {subject} is {opinion}",
    "{subject} , {opinion} throughout , runs for two hours",
)
OPINIONS = {
    "train": {
        "positive": "a joy to watch|warm and very funny|gripping|a small wonder|clever and full of life|deeply moving|"
        "a delight from start to finish|beautifully made|honest and tender|sharp , quick and wise|never dull|"
        "far better than its poster|worth every minute|not at all the bore one feared",
        "negative": "a chore to sit through|dull and far too long|lifeless|a waste of good actors|clumsy and loud|"
        "a mess from start to finish|badly made|false and sentimental|tired , slow and stale|never funny|"
        "far worse than its poster|not worth the ticket|hollow|not at all the delight one hoped for",
    },
    "held-out": {
        "positive": "charming|a quiet triumph|thrilling and smart|a pleasure|lovely to look at|hard to forget",
        "negative": "boring|a quiet disaster|silly and flat|a pain|ugly to look at|easy to forget",
    },
}


def sentences(name: str, draw: random.Random) -> list[dict[str, str]]:
    """Different sentences, as many of each label."""
    found: dict[str, str] = {}
    for label, opinions in OPINIONS[name].items():
        wanted = len(found) + COUNTS[name] // 2
        while len(found) < wanted:
            subject, other = draw.sample(SUBJECTS, 2)
            frame = draw.choice(FRAMES)
            found[frame.format(subject=subject, other=other, opinion=draw.choice(opinions.split("|")))] = label
    rows = [{"text": f"{text} .", "label": label} for text, label in found.items()]
    return draw.sample(rows, len(rows))


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name in COUNTS:
        lines = [json.dumps(row) + "\n" for row in sentences(name, draw)]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
