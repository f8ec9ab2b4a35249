"""The order of pictures depends on the seed and the position in the global stream, and on nothing else."""

import pickle
import time
from itertools import islice

import numpy as np
import pytest

from dinov2.data.samplers import (
    EpochSampler,
    InfiniteSampler,
    PositionSampler,
    SamplerType,
    shuffled_indices,
)


def take(sampler, n):
    return list(islice(sampler, n))


def test_a_pass_has_every_index_once_in_an_order_of_its_own():
    stream = np.array(take(InfiniteSampler(sample_count=50, shuffle=True, seed=3), 150)).reshape(3, 50)
    assert (np.sort(stream, axis=1) == np.arange(50)).all()
    assert len({tuple(one_pass) for one_pass in stream}) == 3
    other = take(InfiniteSampler(sample_count=50, shuffle=True, seed=4), 50)
    assert sorted(other) == list(range(50))
    assert other not in stream.tolist()
    assert all(type(index) is int for index in other)


def test_the_stream_is_a_function_of_seed_and_position():
    sampler = InfiniteSampler(sample_count=17, shuffle=True, seed=5)
    stream = take(sampler, 60)
    assert stream == take(sampler, 60)  # iterating leaves no trace
    assert stream == take(pickle.loads(pickle.dumps(sampler)), 60)
    resumed = InfiniteSampler(sample_count=17, shuffle=True, seed=5, start=1, step=3, advance=20)
    pairs = take(PositionSampler(resumed), 10)
    assert [position for position, _ in pairs] == list(range(21, 51, 3))
    assert [index for _, index in pairs] == stream[21:51:3]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("advance", [1, 17, 23, 100])
def test_resuming_continues(shuffle, advance):
    stream = take(InfiniteSampler(sample_count=17, shuffle=shuffle, seed=5), 160)
    resumed = InfiniteSampler(sample_count=17, shuffle=shuffle, seed=5, advance=advance)
    assert take(resumed, 40) == stream[advance : advance + 40]


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 24])
@pytest.mark.parametrize("sample_count", [5, 17, 48])
def test_every_world_size_sees_the_same_global_batches(world_size, sample_count):
    global_batch, n_batches = 24, 6
    alone = np.array(take(InfiniteSampler(sample_count=sample_count, shuffle=True), global_batch * n_batches))
    for advance in (0, 2 * global_batch):
        ranks = [
            InfiniteSampler(sample_count=sample_count, shuffle=True, start=rank, step=world_size, advance=advance)
            for rank in range(world_size)
        ]
        per_rank = global_batch // world_size
        shares = np.array([take(sampler, per_rank * 4) for sampler in ranks]).reshape(world_size, 4, per_rank)
        for i in range(4):
            expected = alone[advance + i * global_batch :][:global_batch]
            assert sorted(shares[:, i].flatten()) == sorted(expected)


def test_without_shuffling_positions_count_round():
    assert take(InfiniteSampler(sample_count=3), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert take(InfiniteSampler(sample_count=3, start=1, step=2), 4) == [1, 0, 2, 1]


def test_a_million_pictures_start_at_once():
    start = time.perf_counter()
    sampler = InfiniteSampler(sample_count=1_000_000, shuffle=True, advance=10**12 + 999_990)
    indices = take(sampler, 20)
    assert time.perf_counter() - start < 1.0  # about 0.03 s; upstream's walk to that place would take days
    assert len(set(indices[:10])) == 10
    assert shuffled_indices(1_000_000, 0).dtype == np.int32


def test_permutations_of_neighbouring_seeds_and_passes_share_nothing():
    orders = {(seed, number): tuple(shuffled_indices(30, seed, number)) for seed in range(-2, 6) for number in range(6)}
    assert len(set(orders.values())) == len(orders)


def test_epochs():
    sampler = EpochSampler(size=10, sample_count=10, shuffle=True, seed=1, start=0, step=1)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    assert list(EpochSampler(size=4, sample_count=10, start=0, step=1)) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [7, 10, 25])
def test_an_epoch_is_shared_evenly(size):
    whole = list(EpochSampler(size=size, sample_count=10, shuffle=True, seed=0, start=0, step=1))
    counts = np.bincount(whole, minlength=10)
    assert counts.max() - counts.min() <= 1
    assert len(whole) == size
    shares = [EpochSampler(size=size, sample_count=10, shuffle=True, seed=0, start=rank, step=3) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == sorted(whole)
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


def test_senseless_arguments():
    with pytest.raises(ValueError, match="sample_count=0"):
        InfiniteSampler(sample_count=0)
    with pytest.raises(ValueError, match="advance=-1"):
        InfiniteSampler(sample_count=3, advance=-1)
    with pytest.raises(ValueError, match="start=-2"):
        InfiniteSampler(sample_count=3, start=-2, advance=5)
    with pytest.raises(ValueError, match="size=0"):
        EpochSampler(size=0, sample_count=3)


def test_sampler_types_are_upstreams():
    assert {member.name: member.value for member in SamplerType} == {
        "DISTRIBUTED": 0,
        "EPOCH": 1,
        "INFINITE": 2,
        "SHARDED_INFINITE": 3,
        "SHARDED_INFINITE_NEW": 4,
    }
