"""One recipe in one process, in two with the base whole and spread, and killed again and again.

    python disturbing.py RECIPE KILLS

prints a line of JSON: exit codes of what was begun, and how often it was killed.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from killing import attempt, ended, ready
from sharing import together


def main(recipe: str, kills: int) -> dict[str, object]:
    ready(recipe)
    folder, plain = Path(recipe).parent, ("adapter.lora_dropout=0",)
    began = time.perf_counter()
    codes: dict[str, object] = {"undisturbed": ended(attempt(recipe, folder / "undisturbed"))}
    lasts, draw, done = time.perf_counter() - began, random.Random(1), 0
    while True:
        child = attempt(recipe, folder / "killed", at_write=draw.randint(8, 40) if done % 2 and done < kills else None)
        if done % 2 == 0 and done < kills:
            time.sleep(lasts * draw.uniform(0.3, 0.9))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if ended(child):
            break
        done += 1
    codes["alone"] = ended(attempt(recipe, folder / "alone", *plain))
    codes["two"] = together(recipe, folder / "two", *plain)
    codes["spread"] = together(recipe, folder / "spread", *plain, "train.shard=always")
    return {**codes, "kills": done}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
