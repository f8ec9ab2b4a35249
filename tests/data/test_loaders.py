"""Dataset strings, and batches that depend neither on the workers nor on where a run resumed."""

import os
import pickle
import signal
import time
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinov2.data import loaders
from dinov2.data.datasets.hema_data import HemaStandardDataset
from dinov2.data.loaders import make_data_loader, make_dataset, receive_batches, share_batch
from dinov2.data.samplers import Balance, SamplerType
from dinov2.utils.command import error_text, find_cause


@pytest.fixture
def dataset(image_list):
    """10 images of 28 px; the fifth cannot be decoded."""
    folder = image_list(n=10)
    (folder / "images" / "004.png").write_bytes(b"junk")
    return HemaStandardDataset(root=folder, image_size=14)


def batches(dataset, n, num_workers=0, **settings):
    settings = {"batch_size": 4, "collate_fn": list, "seed": 1, **settings}
    return list(islice(make_data_loader(dataset=dataset, num_workers=num_workers, **settings), n))


def indices_of(found):
    return [sample.index for batch in found for sample in batch]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert indices_of(ours) == indices_of(theirs)
    for one, other in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert torch.equal(one.image, other.image)
        assert one.failures == other.failures


def test_batches(dataset):
    found = batches(dataset, 5)
    for sample in sum(found, []):
        assert sample.image.shape == (3, 14, 14)
        assert sample.image.dtype == torch.uint8
    assert [len(batch) for batch in found] == [4] * 5
    indices = indices_of(found)
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    failures = [failure for batch in found for sample in batch for failure in sample.failures]
    assert {path for path, _ in failures} == {dataset.path(4)}
    assert len(failures) == 2  # once a pass


def mean_and_draw(image, rng, draw_image):
    return float(image.float().mean()), rng.random(), float(draw_image(rng).float().mean())


def test_an_augmentation_is_seeded_by_the_position(dataset):
    plain = batches(dataset, 6)
    whole = batches(dataset, 6, augmentation=mean_and_draw)
    assert [sample.position for batch in whole for sample in batch] == list(range(24))
    for sample, augmented in zip(sum(plain, []), sum(whole, []), strict=True):
        assert augmented.crops[0] == float(sample.image.float().mean())
        assert augmented.failures == sample.failures
    assert len({augmented.crops[1] for augmented in sum(whole, [])}) == 24
    others, own = {s.crops[2] for s in sum(whole, [])}, {float(s.image.float().mean()) for s in sum(plain, [])}
    assert len(others) > 5
    assert others <= own
    assert batches(dataset, 3, num_workers=2, sampler_advance=12, augmentation=mean_and_draw) == whole[3:]
    assert sum(batches(dataset, 3, batch_size=8, augmentation=mean_and_draw), []) == sum(whole, [])
    other_seed = batches(dataset, 6, seed=2, augmentation=mean_and_draw)
    assert not {s.crops[1] for s in sum(whole, [])} & {s.crops[1] for s in sum(other_seed, [])}
    with pytest.raises(ValueError, match="augmentation: only infinite samplers"):
        batches(dataset, 1, sampler_type=SamplerType.EPOCH, augmentation=mean_and_draw)


def test_workers_change_nothing(dataset):
    assert_same(batches(dataset, 6, num_workers=2), batches(dataset, 6))


def test_a_resumed_loader_continues(dataset):
    whole = batches(dataset, 6)
    assert_same(batches(dataset, 3, num_workers=2, sampler_advance=3 * 4), whole[3:])


def test_the_sharded_types_are_the_infinite_one(dataset):
    expected = batches(dataset, 4)
    for kind in (SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW):
        assert_same(batches(dataset, 4, sampler_type=kind), expected)


def test_finite_samplers(dataset):
    for kind in (SamplerType.EPOCH, SamplerType.DISTRIBUTED):
        found = batches(dataset, 99, sampler_type=kind, drop_last=False)
        assert sorted(indices_of(found)) == list(range(10))
    assert len(batches(dataset, 99, sampler_type=SamplerType.EPOCH)) == 2  # the last one is not full
    assert len(batches(dataset, 99, sampler_type=SamplerType.EPOCH, sampler_size=24)) == 6
    plain = batches(dataset, 99, sampler_type=None, drop_last=False)
    assert indices_of(plain) == list(range(10))


def test_a_size_or_advance_that_would_be_ignored_is_an_error(dataset):
    with pytest.raises(ValueError, match="sampler_size=5"):
        batches(dataset, 1, sampler_size=5)
    for kind in (SamplerType.EPOCH, SamplerType.DISTRIBUTED, None):
        with pytest.raises(ValueError, match="sampler_advance=4"):
            batches(dataset, 1, sampler_type=kind, sampler_advance=4)


def test_a_balance_reaches_the_order(dataset, image_list):
    root = dataset.root
    (root / "few.txt").write_text("images/000.png\nimages/001.png\n")
    two = HemaStandardDataset(root=root, image_size=14, shuffle=True)
    sets = torch.from_numpy(two.sets())
    for balance, share in ((Balance({"few": 1000}), 0.9), (Balance({"few": 0}), 0.0)):
        found = batches(two, 40, balance=balance)
        seen = sets[indices_of(found)].float().mean()
        assert (seen > share) if share else seen == 0
        assert_same(batches(two, 3, num_workers=2, balance=balance, sampler_advance=37 * 4), found[37:])
    assert_same(batches(two, 8, balance=Balance()), batches(two, 8))  # as before there were balances
    for wrong in ({"sampler_type": SamplerType.EPOCH}, {"sampler_type": None}, {"shuffle": False}):
        with pytest.raises(ValueError, match="balance=.*only infinite samplers that shuffle"):
            batches(two, 1, balance=Balance({"few": 2}), **wrong)
    with pytest.raises(ValueError, match="no set is called 'many'"):
        batches(two, 1, balance=Balance({"many": 2}))


def test_images_that_are_never_seen_are_not_drawn_for_others_either(image_list):
    root = image_list(n=10)
    Image.new("RGB", (28, 28), "white").save(root / "images" / "white.png")
    (root / "held_out.txt").write_text("images/white.png\n" * 10)
    two = HemaStandardDataset(root=root, image_size=14, shuffle=True)
    drawn = {}
    for weight in (0, 1):
        found = batches(two, 20, balance=Balance({"held_out": weight}, temperature=2), augmentation=mean_and_draw)
        drawn[weight] = [sample.crops[2] for batch in found for sample in batch]
    assert max(drawn[0]) < 255
    assert 0.3 < np.mean([mean == 255 for mean in drawn[1]]) < 0.7


def threads_of_opencv(image, rng, draw_image):
    return cv2.getNumThreads()


def test_workers_start_although_opencvs_threads_ran_in_this_process(dataset):
    """They do not exist in a forked worker, which must not wait for them."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), dtype=np.uint8), (9, 9), 2.0)
        (batch,) = batches(dataset, 1, num_workers=1, augmentation=threads_of_opencv)
        assert [sample.crops for sample in batch] == [1] * 4
    finally:
        cv2.setNumThreads(before)


def test_no_workers_need_no_worker_settings(dataset):
    assert len(batches(dataset, 1, num_workers=0, persistent_workers=True)) == 1


def test_loading_leaves_torchs_generator_alone(dataset):
    before = torch.get_rng_state()
    batches(dataset, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_can_be_pickled(dataset):
    again = pickle.loads(pickle.dumps([dataset[4], dataset[5]]))
    assert again[0].failures[0][1] == "not a known image format"
    assert [sample.index for sample in again] == [4, 5]


def test_dataset_strings(image_list):
    root = image_list(n=6)
    plain = make_dataset(f"HemaStandardDataset:root={root}")
    assert len(plain) == 6
    assert plain.image_size == 224
    stated = make_dataset(dataset_str=f"HemaStandardDataset:root={root}:shuffle=1:image_size=28:fit=pad:seed=3")
    assert [stated.path(i) for i in range(6)] != [plain.path(i) for i in range(6)]
    assert (stated.image_size, stated.fit, stated.seed) == (28, "pad", 3)
    for text in ("0", "false", "False"):
        kept = make_dataset(f"HemaStandardDataset:shuffle={text}:root={root}/all.txt")
        assert [kept.path(i) for i in range(6)] == [plain.path(i) for i in range(6)]


def test_tables_and_caches_in_dataset_strings(image_list, tmp_path):
    root = image_list(n=3)
    (root / "t.csv").write_text("file,path\nimages/001.png,images/002.png\n")
    assert make_dataset(f"HemaStandardDataset:root={root}/t.csv").path(0).endswith("002.png")
    dataset = make_dataset(
        f"HemaStandardDataset:root={root}/t.csv:column=file:cache={tmp_path}/at 12:30", image_size=14
    )
    assert dataset.path(0).endswith("001.png")
    dataset.cache.build(n_workers=1)
    assert (tmp_path / "at 12:30").is_dir()
    assert_same(
        batches(dataset, 1, batch_size=1),
        batches(make_dataset(f"HemaStandardDataset:root={root}/t.csv:column=file", image_size=14), 1, batch_size=1),
    )


def test_the_string_wins_over_settings(image_list):
    dataset = make_dataset(f"HemaStandardDataset:root={image_list()}:seed=3", seed=9, image_size=28, transform=len)
    assert (dataset.seed, dataset.image_size, dataset.transform) == (3, 28, len)


def test_colons_and_equal_signs_in_paths(image_list, tmp_path):
    for name in ("at 12:30", "k=v", "seed=3"):
        root = image_list(n=2, folder=tmp_path / name)
        assert len(make_dataset(f"HemaStandardDataset:root={root}:shuffle=1")) == 2
    with pytest.raises(FileNotFoundError, match=r"C:\\+cells"):
        make_dataset(r"HemaStandardDataset:root=C:\cells:shuffle=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/data/lists", "unknown dataset '/data/lists'.*known: HemaStandardDataset"),
        ("ImageNet:root=/a", "unknown dataset 'ImageNet'"),
        ("HemaStandardDataset", "must read HemaStandardDataset:root="),
        ("HemaStandardDataset:", "must read HemaStandardDataset:root="),
        ("HemaStandardDataset:/data/lists", "must read HemaStandardDataset:root="),
        ("HemaStandardDataset:root=", "must read HemaStandardDataset:root="),
        ("HemaStandardDataset:shuffle=1", "must read HemaStandardDataset:root="),
        ("HemaStandardDataset:root=/a:shufle=1", "unknown key 'shufle'.*root, shuffle, image_size, fit, seed"),
        ("HemaStandardDataset:split=TRAIN:root=/a", "unknown key 'split'"),
        ("HemaStandardDataset:root=/a:shuffle=maybe", "shuffle='maybe'.*expected 1 or 0"),
        ("HemaStandardDataset:root=/a:image_size=big", "image_size='big'.*expected an integer"),
        ("HemaStandardDataset:root=/a:root=/b", "'root' stands twice"),
    ],
)
def test_wrong_dataset_strings(text, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(text)


# --- workers ----------------------------------------------------------------------------------------------------------


class Counted(Dataset):
    """Batches {"images": filled with their number, "names"}; reading number `deadly` kills the worker."""

    def __init__(self, deadly: int = -1) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict:
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"images": torch.full((2, 3), number), "names": [str(number)]}


def batches_of_a_worker(dataset: Dataset) -> list[dict]:
    return list(receive_batches(DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=share_batch)))


def test_batches_go_through_pipes_where_shared_memory_is_full(monkeypatch, caplog):
    shared = batches_of_a_worker(Counted())
    assert all(batch["images"].is_shared() for batch in shared)
    assert not caplog.records

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the worker is forked and has it too
    piped = batches_of_a_worker(Counted())
    for batch, expected in zip(piped, shared, strict=True):
        assert torch.equal(batch["images"], expected["images"])
        assert batch["names"] == expected["names"]
    (record,) = caplog.records
    assert "--shm-size=1g or --ipc=host" in record.getMessage()


def test_a_killed_worker_ends_the_wait_at_once():
    started = time.monotonic()
    with pytest.raises((RuntimeError, ChildProcessError)) as raised:  # torch's, or ours if the connection broke first
        batches_of_a_worker(Counted(deadly=2))
    assert time.monotonic() - started < 60
    assert "use fewer workers" in error_text(find_cause(raised.value))


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_killed_while_it_sends_a_batch_is_named(broken, monkeypatch):
    monkeypatch.setattr(loaders, "SIGNAL_SECONDS", 0.01)

    def loader():
        yield {"images": torch.zeros(1)}
        raise broken

    batches = receive_batches(loader())
    assert "images" in next(batches)
    with pytest.raises(ChildProcessError, match="use fewer workers"):
        next(batches)


def test_a_connection_that_the_dataset_lost_keeps_its_error():
    def loader():
        yield from ()
        raise ConnectionError("Caught ConnectionError in DataLoader worker process 0.\nthe share is gone")

    with pytest.raises(ConnectionError, match="the share is gone"):
        next(receive_batches(loader()))


def test_the_share_of_the_centre_is_a_number(image_list):
    folder = image_list(2)
    assert make_dataset(f"HemaStandardDataset:root={folder}:center_crop=0.5").center_crop == 0.5
    with pytest.raises(ValueError, match=r"center_crop='half' .* expected a number"):
        make_dataset(f"HemaStandardDataset:root={folder}:center_crop=half")
    with pytest.raises(ValueError, match=r"train\.center_crop=0\.5 .* train\.image_fit=pad"):
        make_dataset(f"HemaStandardDataset:root={folder}:center_crop=0.5:fit=pad")
