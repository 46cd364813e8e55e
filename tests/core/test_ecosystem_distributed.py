"""DDP and `fully_shard` over two processes: the gradients of one, and files that one reads."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_train_save_and_refuse_as_one_does(tmp_path):
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, script]
    with (
        subprocess.Popen([*command, "0", tmp_path], stderr=subprocess.PIPE, text=True) as first,
        subprocess.Popen([*command, "1", tmp_path], stderr=subprocess.PIPE, text=True) as second,
    ):
        try:
            for process in (first, second):
                said = process.communicate(timeout=120)[1]
                assert process.returncode == 0, said
        finally:
            first.kill()
            second.kill()
