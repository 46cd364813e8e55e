"""Every format's cases, by name: the tests' parameters and the rows of `benchmarks/formats.py`."""

from peers import diffusers_files, kohya_files, lycoris_files, old_files, peft_files
from peers.cases import Builders

CASES: Builders = {
    **peft_files.CASES,
    **kohya_files.CASES,
    **diffusers_files.CASES,
    **lycoris_files.CASES,
    **old_files.CASES,
}
