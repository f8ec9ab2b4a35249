"""How often each set is seen, and that it stays a function of the seed and the position."""

import math
import pickle
from itertools import islice

import numpy as np
import pytest

from dinov2.data.balance import MIN_PASS, Balance, BalancedSampler

NAMES = ["bmc", "apl", "none", "one"]
SIZES = np.array([90_000, 10_000, 0, 1])


def make(sizes=(40, 9, 0, 1), **balance):
    """The sampler over interleaved sets of these sizes, and the set of each index."""
    names = [f"s{i}" for i in range(len(sizes))]
    sets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    quotas = Balance(**balance).quotas(names, np.array(sizes))
    return lambda **settings: BalancedSampler(sets=sets, quotas=quotas, **settings), sets, quotas


def take(sampler, n):
    return list(islice(sampler, n))


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
def test_shares(balance, expected):
    quotas = balance.quotas(NAMES, SIZES)
    assert quotas.sum() == SIZES.sum()
    assert np.abs(quotas - expected).max() <= 1
    assert (quotas > 0).tolist() == [number > 0 for number in expected]


def test_a_small_dataset_has_passes_long_enough_for_exact_shares():
    quotas = Balance({"a": 1, "b": 2}).quotas(["a", "b", "c"], np.array([1, 1, 1]))
    assert quotas.sum() == MIN_PASS
    assert np.abs(quotas / MIN_PASS - [0.25, 0.5, 0.25]).max() < 1 / MIN_PASS


@pytest.mark.parametrize("balance", [{"temperature": math.inf}, {"weights": {"s1": 3, "s3": 0.1}}])
def test_each_set_has_its_share_and_repeats_no_picture_within_a_pass_over_it(balance):
    sampler, sets, quotas = make(**balance)
    stream = np.array(take(sampler(), 2 * MIN_PASS + 1000))
    for i in range(2):
        seen = np.bincount(sets[stream[i * MIN_PASS : (i + 1) * MIN_PASS]], minlength=4)
        assert seen.tolist() == quotas.tolist()
    for number in (0, 1, 3):
        # a set's own stream is spread over the pass: in whole passes over the set, each picture comes equally often
        counts = np.bincount(stream[: 2 * MIN_PASS], minlength=50)[sets == number]
        assert counts.max() - counts.min() <= 1
    shares = np.bincount(sets[stream[:4000]], minlength=4) / 4000
    assert np.abs(shares - quotas / MIN_PASS).max() < 0.05  # not one set after the other


def test_the_stream_is_a_function_of_seed_and_position():
    sampler, _, _ = make(temperature=math.inf)
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
    sampler, sets, quotas = make(sizes, weights={"s1": 5})
    stream = np.array(take(sampler(), 3 * int(quotas.sum())))
    own = stream[sets[stream] == 0]
    first = np.bincount(own[: 2 * quotas[0]], minlength=len(sets))[sets == 0]
    assert quotas[0] == 84_000
    assert first.max() == 2
    assert (first == 0).sum() == 0  # 168,000 positions: all once, 68,000 twice
    assert (first == 2).sum() == 68_000


def test_what_is_no_balance():
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
