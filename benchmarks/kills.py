"""A training killed again and again, or with a disk that is full: python benchmarks/kills.py [--kills 60] [--full 1]

A tiny Llama learns with DoRA, dropout, accumulation, packing and measurements between. `--kills N`: SIGKILL at random
moments and, every second time, at a call that changes the disk; the run is resumed until it ends, and begun anew until
N have died. `--full K`: from every K-th call on that writes, the disk has no room; the run must end with one sentence
that names a file, and is resumed with room. Prints how many there were, and the sha256 of the final adapters, which
must all be that of a run that nothing disturbed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS / "train"), str(TESTS / "train/language")]
RECIPE = {
    "dtype": "float32",
    "device": "cpu",
    "adapter": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "use_dora": True},
    "train": {"steps": 10, "batch_size": 4, "accumulation": 2, "lr": 1.0e-2},
    "eval": {"every_steps": 3},
    "sample": {"count": 1, "max_new_tokens": 4, "every_steps": 4},
    "checkpoint": {"every_steps": 2},
}


def prepare(folder: Path) -> Path:
    """Write a base, rows and the recipe."""
    import torch
    from bases import PARTS, tokenizer_with
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_with(())
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(**PARTS["llama"], vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"prompt": f"name: Inn {i}\n", "completion": f"The Inn {i} is a pub."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"base": str(folder / "base"), "data": {"path": str(folder / "rows.jsonl"), "eval_share": 0.2}}
    (folder / "small.yaml").write_text(json.dumps({**RECIPE, **own}))  # which is YAML too
    return folder / "small.yaml"


def main() -> None:
    """Kill, fill, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--full", type=int, default=0, metavar="K", help="0: the disk is never full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import filling
    import killing

    for what, number in (("kills", options.kills), ("full", options.full)):
        if not number:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VENEER_CACHE"] = f"{folder}/cache"
            recipe = str(prepare(Path(folder)))
            found = killing.main(recipe, number, options.seed) if what == "kills" else filling.main(recipe, 1, number)
        same = set(found["ends"]) == {found["undisturbed"]}
        many = f"{found['kills']} kills" if what == "kills" else f"{found['tried']} times a full disk"
        print(f"{many}, {sum(found['ends'].values())} runs ended, in {time.perf_counter() - began:.0f} s")
        print(f"sha256 {found['undisturbed']}: {'all of them' if same else found['ends']}")
        for wrong in found.get("wrong", ()):
            print(f"WRONG {wrong}")
        if not same or found.get("wrong"):
            sys.exit(1)


if __name__ == "__main__":
    main()
