"""What the heap keeps, seen from outside: pages that a process gets, in a process of its own."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told anything")

SCRIPT = """
import resource, sys
import torch
from veneer.train.heap import step_heap

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(5 << 20) for _ in range(6)]  # 120 MB, 30,000 pages
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    with step_heap(keeps=sys.argv[1] == "keeps"):
        faults = [faults_of_a_step() for _ in range(3)]
        print(faults[-1], held() - start)
        raise KeyError

start = held()
try:
    run()
except KeyError:
    print(held() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize("mode", ["keeps", "spares"])
def test_a_steps_memory_is_kept_for_the_next_and_given_back_in_the_end(mode):
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    faults, inside, after = map(int, done.stdout.split())
    if mode == "keeps":
        assert faults < 1000
        assert inside > 100e6
    else:
        assert inside < 40e6
    assert after < 40e6
