"""What the heap keeps, seen from outside: pages that a process gets and holds, in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="only glibc's heap is told anything"
)

SCRIPT = """
import resource, sys
import torch
from veneer.train.heap import step_heap

small, keeps = [], sys.argv[1] == "keeps"

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() - start

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = []
    for _ in range(3 if keeps else 6):  # 120 MB in all, 30,000 pages
        large.append(torch.ones((10 if keeps else 5) << 20))  # more than 32 MB are not the heap's by its own rules
        if not keeps:
            small.append(torch.ones(100 << 10))  # 0.4 MB lie between
    del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    with step_heap(keeps):
        faults = [faults_of_a_step() for _ in range(8)]
        print(faults[-1], held())
        raise KeyError

start = 0
start = held()
torch.ones(6 << 20)  # 24 MB freed, and glibc's own rule takes all that is less into the heap
try:
    run()
except KeyError:
    small.clear()
    after = [held()]
    for size in (100, 6):  # 400 MB are mapped again, 24 MB are the heap's
        torch.ones(size << 20)
        after.append(held())
    print(*after)
"""


def seen(mode: str, **more: str) -> list[int]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, env=plain | more
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize("mode", ["keeps", "spares"])
def test_a_steps_memory_is_kept_for_the_next_and_given_back_in_the_end(mode):
    faults, inside, after, mapped, free = seen(mode)
    if mode == "keeps":
        assert faults < 1000
        assert inside > 100e6
    else:
        assert inside < 40e6
    assert after < 40e6
    assert mapped < after + 10e6
    assert free > mapped + 3e6


def test_what_the_users_environment_says_stays():
    faults, inside, *_ = seen("keeps", MALLOC_TRIM_THRESHOLD_="131072")
    assert faults > 1000
    assert inside < 40e6
