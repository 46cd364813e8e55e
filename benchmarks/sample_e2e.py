"""Make the sample of E2E that veneer ships: python benchmarks/sample_e2e.py E2E.TXT

E2E.TXT has one pair a line, `facts||sentence`, several sentences for one set of facts. Pairs with equal facts go to
one side. The text is tidied (blanks before punctuation go) and nothing else is changed.
"""

import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src/veneer/recipes/data/e2e"
TRAIN_PAIRS, HELD_OUT_FACTS = 1000, 50


def tidy(text: str) -> str:
    """`near Café Sicilia , it 's low - cost .` → `near Café Sicilia, it's low-cost.`"""
    text = re.sub(r"\s+([,.;:!?)])", r"\1", text.strip())
    text = re.sub(r"\s*([-/])\s*", r"\1", text)
    text = re.sub(r"\s+('(?:s|re|ve|ll|d|m|t)\b|n't\b|%)", r"\1", text)
    text = re.sub(r"([(£$])\s+", r"\1", text)
    return re.sub(r"\s+", " ", text)


def main(source: str) -> None:
    """Write train.jsonl and held-out.jsonl."""
    sentences = defaultdict(list)
    for line in Path(source).read_text(encoding="utf-8").splitlines():
        facts, sentence = line.split("||")
        facts = ", ".join(re.sub(r"\s*:\s*", ": ", fact.strip(), count=1) for fact in facts.split(" | "))
        sentences[tidy(facts)].append(tidy(sentence))
    facts = sorted(sentences)
    draw = random.Random(0)
    draw.shuffle(facts)
    held_out, learned = facts[:HELD_OUT_FACTS], facts[HELD_OUT_FACTS:]
    pairs = [
        (fact, sentence) for fact in learned for sentence in draw.sample(sentences[fact], min(3, len(sentences[fact])))
    ]
    draw.shuffle(pairs)
    write(TARGET / "train.jsonl", pairs[:TRAIN_PAIRS])
    write(TARGET / "held-out.jsonl", [(fact, sentence) for fact in held_out for sentence in sentences[fact]])


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    """One JSON object a line."""
    lines = [json.dumps({"facts": facts, "sentence": sentence}, ensure_ascii=False) for facts, sentence in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(pairs)} pairs, {len({facts for facts, _ in pairs})} sets of facts")


if __name__ == "__main__":
    main(sys.argv[1])
