"""The order of images depends on the seed and the position in the global stream alone, with and without a balance."""

import math
import pickle
import time
from itertools import islice
from random import Random

import numpy as np
import pytest

from dinov2.data.samplers import (
    MIN_PASS,
    Balance,
    BalancedSampler,
    EpochSampler,
    InfiniteSampler,
    PositionSampler,
    SamplerType,
    shuffled_indices,
)

NAMES = ["bmc", "apl", "none", "one"]
SIZES = np.array([90_000, 10_000, 0, 1])


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


def test_a_million_images_start_at_once():
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


def balanced(sizes=(40, 9, 0, 1), **balance):
    """The sampler over interleaved sets of these sizes, and the set of each index."""
    names = [f"s{i}" for i in range(len(sizes))]
    sets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    quotas = Balance(**balance).quotas(names, np.array(sizes))
    return lambda **settings: BalancedSampler(sets=sets, quotas=quotas, **settings), sets, quotas


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (Balance(), (90_000, 10_000, 0, 1)),
        (Balance({"apl": 9}), (50_000, 50_000, 0, 1)),
        (Balance({"bmc": 0, "one": 0}), (0, 100_001, 0, 0)),
        (Balance(temperature=math.inf), (33_334, 33_334, 0, 33_333)),
        (Balance({"apl": 2}, math.inf), (25_000, 50_001, 0, 25_000)),
        (Balance(temperature=2), (74_813, 24_938, 0, 249)),  # 300 : 100 : 1
        (Balance({"one": 1e-12}), (90_000, 10_000, 0, 1)),  # what has a weight is seen
        (Balance(temperature=1e-3), (99_999, 1, 0, 1)),
    ],
)
def test_a_balance_gives_the_sets_their_shares(balance, expected):
    quotas = balance.quotas(NAMES, SIZES)
    assert quotas.sum() == SIZES.sum()
    assert np.abs(quotas - expected).max() <= 1
    assert (quotas > 0).tolist() == [number > 0 for number in expected]


def test_a_small_dataset_has_passes_long_enough_for_exact_shares():
    quotas = Balance({"a": 1, "b": 2}).quotas(["a", "b", "c"], np.array([1, 1, 1]))
    assert quotas.sum() == MIN_PASS
    assert np.abs(quotas / MIN_PASS - [0.25, 0.5, 0.25]).max() < 1 / MIN_PASS


@pytest.mark.parametrize("balance", [{"temperature": math.inf}, {"weights": {"s1": 3, "s3": 0.1}}])
def test_each_set_has_its_share_and_repeats_no_image_within_a_pass_over_it(balance):
    sampler, sets, quotas = balanced(**balance)
    stream = np.array(take(sampler(), 2 * MIN_PASS + 1000))
    for i in range(2):
        seen = np.bincount(sets[stream[i * MIN_PASS : (i + 1) * MIN_PASS]], minlength=4)
        assert seen.tolist() == quotas.tolist()
    for number in (0, 1, 3):
        # a set's own stream is spread over the pass: in whole passes over the set, each image comes equally often
        counts = np.bincount(stream[: 2 * MIN_PASS], minlength=50)[sets == number]
        assert counts.max() - counts.min() <= 1
    shares = np.bincount(sets[stream[:4000]], minlength=4) / 4000
    assert np.abs(shares - quotas / MIN_PASS).max() < 0.05  # not one set after the other


@pytest.mark.parametrize("balance", [{"weights": {"s1": 3, "s3": 0}}, {"temperature": math.inf}])
def test_images_drawn_beside_the_stream_are_as_frequent_as_in_it(balance):
    sampler, sets, quotas = balanced(**balance)
    rng, sampler = Random(0), sampler()
    drawn = np.array([sampler.draw_index(rng) for _ in range(4000)])
    shares = np.bincount(sets[drawn], minlength=4) / 4000
    assert np.abs(shares - quotas / quotas.sum()).max() < 0.03
    assert (shares[quotas == 0] == 0).all()
    assert len(set(drawn[sets[drawn] == 0].tolist())) == 40  # each image of a set


def test_a_balanced_stream_is_a_function_of_seed_and_position():
    sampler, _, _ = balanced(temperature=math.inf)
    stream = take(sampler(seed=5), MIN_PASS + 300)
    assert stream[:500] == take(pickle.loads(pickle.dumps(sampler(seed=5))), 500)
    assert stream[:500] != take(sampler(seed=6), 500)
    assert stream[:500] != stream[-500:]
    assert all(type(index) is int for index in stream[:10])
    for advance in (1, 1000, MIN_PASS - 5, MIN_PASS, MIN_PASS + 7):
        assert take(sampler(seed=5, advance=advance), 200) == stream[advance : advance + 200]
    for world_size in (2, 3, 8):
        ranks = [take(sampler(seed=5, start=rank, step=world_size, advance=24), 24) for rank in range(world_size)]
        assert np.array(ranks).T.flatten().tolist() == stream[24 : 24 + 24 * world_size]
    far = 10**12 + MIN_PASS - 3
    assert take(sampler(advance=far), 6)[3:] == take(sampler(advance=far + 3), 3)


def test_passes_over_a_large_set_go_on_where_the_pass_before_ended():
    sizes = (100_000, 5_000)
    sampler, sets, quotas = balanced(sizes, weights={"s1": 5})
    stream = np.array(take(sampler(), 3 * int(quotas.sum())))
    own = stream[sets[stream] == 0]
    first = np.bincount(own[: 2 * quotas[0]], minlength=len(sets))[sets == 0]
    assert quotas[0] == 84_000
    assert first.max() == 2
    assert (first == 0).sum() == 0  # 168,000 positions: all once, 68,000 twice
    assert (first == 2).sum() == 68_000


def test_a_wrong_balance_is_refused():
    for weight in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="train.balance.weights: bmc has"):
            Balance({"bmc": weight})
    for temperature in (0, -1, math.nan):
        with pytest.raises(ValueError, match="train.balance.temperature: .* is not above 0"):
            Balance(temperature=temperature)
    with pytest.raises(ValueError, match="no set is called 'acevedo'; the sets here are bmc, apl, none, one"):
        Balance({"bmc": 1, "acevedo": 2}).quotas(NAMES, SIZES)
    with pytest.raises(ValueError, match="s19 and 5 more"):
        Balance({"x": 1}).quotas([f"s{i}" for i in range(25)], np.ones(25))
    with pytest.raises(ValueError, match="every set that has images has weight 0"):
        Balance({"bmc": 0, "apl": 0, "one": 0}).quotas(NAMES, SIZES)
    assert Balance().is_natural
    assert not Balance({"bmc": 1}).is_natural
    assert not Balance(temperature=2).is_natural
