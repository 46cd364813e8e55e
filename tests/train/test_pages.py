"""What is kept in large pages is kept: the heap has them after the last piece was given back, and takes no memory."""

import platform
import subprocess
import sys

import pytest

SIZES = (2**28, 2**32)
# the sizes of the parts of the heap that ask for large pages, and what the process holds, in kB
LOOK = """
import sys
from veneer.train.pages import use_large_pages

def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

before = held()
use_large_pages(int(sys.argv[1]))
after, size, large = held(), 0, 0
for line in open("/proc/self/smaps"):
    name, *rest = line.split()
    size = int(rest[0]) if name == "Size:" else size
    large += size if name == "VmFlags:" and "hg" in rest else 0
print(large, after - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.system() != "Linux", reason="it is glibc's heap under Linux"
)
@pytest.mark.parametrize("size", SIZES)
def test_the_heap_has_large_pages_and_keeps_them(size):
    run = subprocess.run([sys.executable, "-c", LOOK, str(size)], capture_output=True, text=True, check=True)
    large, taken = map(int, run.stdout.split())
    assert 0.9 * size < 1024 * large < 1.1 * size
    assert taken < 2**15
