"""The order of the rows: a permutation an epoch, that seed and epoch decide, drawn once."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.train import loop
from veneer.train.settings import TrainSettings


def test_every_epoch_is_a_permutation_that_the_seed_decides():
    settings = TrainSettings(batch_size=3, accumulation=2, seed=4)
    size = 20
    rows = [row for step in range(20) for batch in loop.rows_of(step, settings, size) for row in batch]
    assert all(len(batch) == 3 for batch in loop.rows_of(3, settings, size))
    for epoch in range(6):
        generator = torch.Generator().manual_seed(loop._seed(4, "epoch", epoch))
        assert rows[epoch * size : (epoch + 1) * size] == torch.randperm(size, generator=generator).tolist()
    assert rows[:size] != rows[size : 2 * size]
    other = TrainSettings(batch_size=20, seed=5)
    assert loop.rows_of(0, other, size)[0] != rows[:size]


def test_the_order_of_many_rows_is_drawn_once():
    loop._order.cache_clear()
    settings = TrainSettings(batch_size=16, seed=1)
    size = 1_000_000
    for step in range(200):
        loop.rows_of(step, settings, size)
    assert loop._order.cache_info().misses == 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 3), st.integers(0, 9))
def test_batches_are_of_one_group_but_for_what_is_left_over(numbers, batch_size, accumulation, seed):
    groups, size = torch.tensor(numbers), len(numbers)
    settings = TrainSettings(batch_size=batch_size, accumulation=accumulation, seed=seed)
    steps = range(6 * size // (batch_size * accumulation))
    batches = [batch for step in steps for batch in loop.rows_of(step, settings, size, groups)]
    rows = [row for batch in batches for row in batch]
    epochs = len(rows) // size
    assert all(sorted(rows[i * size : (i + 1) * size]) == list(range(size)) for i in range(epochs))
    mixed = [batch for batch in batches if len({numbers[row] for row in batch}) > 1]
    different = len(set(numbers))
    assert len(mixed) <= (epochs + 1) * (different + 1), "of each group less than a batch is left, once an epoch"
    if different == 1:
        assert not mixed
    loop._order.cache_clear()
    assert batches == [batch for step in steps for batch in loop.rows_of(step, settings, size, groups.clone())]


def test_groups_come_in_no_order():
    groups = torch.arange(400) // 100
    settings = TrainSettings(batch_size=4, seed=3)
    firsts = [int(groups[loop.rows_of(step, settings, 400, groups)[0][0]]) for step in range(100)]
    assert sum(a != b for a, b in pairwise(firsts)) > 50
    assert [row for step in range(100) for row in loop.rows_of(step, settings, 400, groups)[0]] != list(range(400))
