"""The order of the rows: a permutation an epoch, that seed and epoch decide, drawn once."""

import torch

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
