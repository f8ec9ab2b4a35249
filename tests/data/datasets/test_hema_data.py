"""Path lists as people write them, and what happens when images cannot be read."""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.datasets.hema_data import MAX_REPLACEMENTS, HemaStandardDataset, Sample


def save_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 32), (value, value, value)).save(path)
    return path


def make_set(folder, n, bad=()):
    """n images, the i-th of grey level i; those in `bad` are not images."""
    for i in range(n):
        save_image(folder / f"{i:03d}.png", i)
    for i in bad:
        (folder / f"{i:03d}.png").write_bytes(b"junk")
    (folder / "list.txt").write_text("".join(f"{i:03d}.png\n" for i in range(n)))
    return folder


def value_of(sample):
    return sample.image.unique().item()


def test_samples_in_list_order(image_list):
    dataset = HemaStandardDataset(root=image_list(n=5), image_size=56)
    assert len(dataset) == 5
    samples = list(dataset)
    assert [sample.index for sample in samples] == [0, 1, 2, 3, 4]
    for sample in samples:
        assert isinstance(sample, Sample)
        assert sample.image.shape == (3, 56, 56)
        assert sample.image.dtype == torch.uint8
        assert sample.failures == ()
    assert dataset.path(3).endswith("003.png")
    for index in (5, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_lists_as_people_write_them(tmp_path, monkeypatch):
    root = tmp_path / "my lists: 2024=ü"
    elsewhere = save_image(tmp_path / "else where" / "größe: 1,5 #2.png", 9)
    for i, name in enumerate(["a.png", "sub/b c.png", "zelle 細胞.png"]):
        save_image(root / name, i)
    (root / "10.txt").write_bytes(b"\xef\xbb\xbf# images of 2024\r\n\r\n  a.png\t\r\nsub/b c.png  \r\n   # end\r\n")
    (root / "2.TXT").write_text(f"zelle 細胞.png\n\n{elsewhere}", encoding="utf-8")  # no newline at the end
    (root / ".3.txt").write_text("hidden.png\n")
    (root / "notes.md").write_text("no list\n")
    monkeypatch.chdir(root.parent)
    dataset = HemaStandardDataset(root=root.name, image_size=28)
    monkeypatch.chdir("/")
    expected = [root / "a.png", root / "sub/b c.png", root / "zelle 細胞.png", elsewhere]
    assert [dataset.path(i) for i in range(len(dataset))] == [str(path) for path in expected]
    assert [value_of(sample) for sample in dataset] == [0, 1, 2, 9]


def test_one_list_and_an_empty_one_among_others(tmp_path):
    make_set(tmp_path, 3)
    (tmp_path / "a_empty.txt").write_text("# nothing yet\n")
    (tmp_path / "z.txt").write_text("001.png\n")
    assert len(HemaStandardDataset(root=tmp_path / "list.txt")) == 3
    dataset = HemaStandardDataset(root=tmp_path)
    assert [dataset.path(i)[-7:] for i in range(4)] == ["000.png", "001.png", "002.png", "001.png"]


def test_shuffle_permutes_by_seed(tmp_path):
    make_set(tmp_path, 20)
    plain = [sample.image[0, 0, 0].item() for sample in HemaStandardDataset(root=tmp_path, image_size=8)]
    orders = {}
    for seed in (0, 1):
        datasets = [HemaStandardDataset(root=tmp_path, image_size=8, shuffle=True, seed=seed) for _ in range(2)]
        first, second = ([value_of(sample) for sample in dataset] for dataset in datasets)
        assert first == second
        assert sorted(first) == plain == list(range(20))
        orders[seed] = first
    assert orders[0] != orders[1] != plain
    assert orders[0] != plain


def test_an_unreadable_image_is_replaced_the_same_way_each_time(tmp_path):
    make_set(tmp_path, 40, bad=(3, 7))
    dataset = HemaStandardDataset(root=tmp_path, image_size=8)
    sample = dataset[3]
    assert sample.index == 3
    assert sample.failures[0] == (str(tmp_path / "003.png"), "not a known image format")
    assert value_of(sample) not in (3, 7)
    again = pickle.loads(pickle.dumps(dataset))[3]  # as a spawned worker has it
    assert again.failures == sample.failures
    assert value_of(again) == value_of(sample)
    stand_ins = {value_of(HemaStandardDataset(root=tmp_path, image_size=8, seed=seed)[3]) for seed in range(8)}
    assert len(stand_ins) > 4  # not a neighbour, which would be seen twice as often
    assert value_of(dataset[7]) not in (3, 7)


def test_an_image_has_its_own_value_also_in_the_place_of_another(tmp_path):
    make_set(tmp_path, 40, bad=(3, 7))
    names = [f"{i:03d}.png,{'' if i == 5 else f'slide {i:02d}'}" for i in range(40)]
    (tmp_path / "slides.csv").write_text("\n".join(["path,slide", *names]))
    dataset = HemaStandardDataset(root=tmp_path / "slides.csv", image_size=8, metadata="slide", shuffle=True)
    dataset = pickle.loads(pickle.dumps(dataset))  # as a spawned worker has it
    samples = list(dataset)
    assert sum(bool(sample.failures) for sample in samples) == 2
    for sample in samples:
        is_known = value_of(sample) != 5
        name = dataset.source.metadata.names[sample.metadata] if is_known else None
        assert (name == f"slide {value_of(sample):02d}") if is_known else sample.metadata == -1
    assert dataset[0].metadata is not None
    assert HemaStandardDataset(root=tmp_path, image_size=8)[0].metadata is None


def test_a_small_set_is_searched_to_its_end(tmp_path):
    make_set(tmp_path, 12, bad=range(11))
    sample = HemaStandardDataset(root=tmp_path, image_size=8)[0]
    assert value_of(sample) == 11
    assert len({path for path, _ in sample.failures}) == len(sample.failures)


@pytest.mark.parametrize(("n", "n_tried"), [(1, 0), (5, 4), (60, MAX_REPLACEMENTS)])
def test_nothing_readable_is_an_error_that_tells_why(tmp_path, n, n_tried):
    make_set(tmp_path, n, bad=range(n))
    dataset = HemaStandardDataset(root=tmp_path)
    with pytest.raises(OSError, match=f"all {n_tried} tried in its place.*000.png: not a known image format"):
        dataset[0]


def test_some_missing_files_are_replaced_but_not_all(tmp_path):
    make_set(tmp_path, 4)
    (tmp_path / "002.png").unlink()
    sample = HemaStandardDataset(root=tmp_path, image_size=8)[2]
    assert sample.failures[0] == (str(tmp_path / "002.png"), "No such file or directory")

    (tmp_path / "list.txt").write_text("".join(f"gone/{i}.png\n" for i in range(1000)))
    with pytest.raises(FileNotFoundError, match=r"none of the 16 .*among the 1000.*gone/0\.png.*relative paths count"):
        HemaStandardDataset(root=tmp_path)


def test_roots_without_a_usable_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.dataset_path.*gone.*does not exist"):
        HemaStandardDataset(root=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"train.dataset_path: no \*.txt list.*make_patch_lists"):
        HemaStandardDataset(root=tmp_path)
    image = save_image(tmp_path / "other" / "a.png")
    with pytest.raises(ValueError, match="a file of another kind; it must be a folder with"):
        HemaStandardDataset(root=image)
    (tmp_path / "list.txt").write_text("\n# only a comment\n \r\n")
    with pytest.raises(ValueError, match=r"1 \.txt list in .* name no image"):
        HemaStandardDataset(root=tmp_path)
    (tmp_path / "list.txt").write_bytes("a.png\nZelle_ä.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt', line 2, is not UTF-8"):
        HemaStandardDataset(root=tmp_path)
    (tmp_path / "list.txt").write_bytes("a.png\n".encode("utf-16"))
    with pytest.raises(ValueError, match="line 1, is not UTF-8"):
        HemaStandardDataset(root=tmp_path)


def test_wrong_settings_are_seen_at_once(tmp_path):
    make_set(tmp_path, 2)
    with pytest.raises(ValueError, match="fit: 'stretch'"):
        HemaStandardDataset(root=tmp_path, fit="stretch")
    with pytest.raises(ValueError, match="seed: -1 is negative"):
        HemaStandardDataset(root=tmp_path, seed=-1)


def test_with_a_transform_items_are_pairs_as_upstream(image_list):
    root = image_list(n=2, size=30)
    dataset = HemaStandardDataset(root=root, transform=lambda image: (image.mode, image.size))
    assert dataset[1] == (("RGB", (30, 30)), ())
    dataset = HemaStandardDataset(root=root, transform=np.asarray, target_transform=lambda target: (target, 1))
    image, target = dataset[0]
    assert image.shape == (30, 30, 3)
    assert target == (None, 1)


def test_sets_follow_the_order(tmp_path):
    make_set(tmp_path, 20)
    (tmp_path / "more.txt").write_text("000.png\n001.png\n")
    dataset = HemaStandardDataset(root=tmp_path, shuffle=True)
    of_more = [index for index in range(22) if dataset.path(index).endswith(("000.png", "001.png"))]
    assert dataset.source.set_names == ["list", "more"]
    assert np.bincount(dataset.sets()).tolist() == [20, 2]
    assert set(np.flatnonzero(dataset.sets() == 1)) < set(of_more)
    assert HemaStandardDataset(root=tmp_path).sets().tolist() == [0] * 20 + [1] * 2


@pytest.fixture
def cached(tmp_path):
    """12 images, the fourth of which is none, and the same from a packed cache."""
    make_set(tmp_path, 12, bad=(3,))
    settings = {"root": tmp_path, "image_size": 8, "shuffle": True}
    packed = HemaStandardDataset(**settings, cache=tmp_path / "cache")
    packed.cache.build(n_workers=1)
    return HemaStandardDataset(**settings), packed


def test_a_cache_changes_nothing(cached):
    plain, packed = cached
    for index in range(12):
        ours, theirs = packed[index], plain[index]
        assert torch.equal(ours.image, theirs.image)
        assert ours[1:] == theirs[1:]
    packed[0].image.fill_(0)  # is not the cache's own memory
    assert torch.equal(packed[0].image, plain[0].image)
    again = pickle.loads(pickle.dumps(packed))  # as a spawned worker has it
    assert torch.equal(again[5].image, plain[5].image)
    ForkingPickler.dumps(packed)  # moves its tensors to shared memory
    assert torch.equal(packed[5].image, plain[5].image)


def test_images_that_are_not_packed(tmp_path):
    make_set(tmp_path, 2)
    dataset = HemaStandardDataset(root=tmp_path, image_size=8, cache=tmp_path / "cache")
    with pytest.raises(KeyError, match="run scripts/pack_dataset.py"):
        dataset[0]
    with pytest.raises(ValueError, match="a transform is given whole images"):
        HemaStandardDataset(root=tmp_path, cache=tmp_path / "cache", transform=np.asarray)


def test_fit_reaches_the_image(tmp_path):
    wide = np.zeros((10, 20, 3), dtype=np.uint8)
    wide[:, :5] = wide[:, 15:] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "list.txt").write_text("wide.png\n")
    assert HemaStandardDataset(root=tmp_path, image_size=10, fit="crop")[0].image.sum() == 0
    assert HemaStandardDataset(root=tmp_path, image_size=20, fit="pad")[0].image.float().mean() == 127.5


def test_many_paths_stay_small(tmp_path):
    names = [f"images/slide_{i // 1000:04d}/cell_{i:07d}.png" for i in range(200_000)]
    save_image(tmp_path / names[0])
    (tmp_path / "list.txt").write_text("\n".join(names))
    dataset = HemaStandardDataset(root=tmp_path)
    assert dataset.path(123_456) == str(tmp_path / names[123_456])
    assert len(pickle.dumps(dataset)) < 200_000 * (len(names[0]) + 17)  # what a spawned worker gets


def test_real_images(shared_data, tmp_path):
    folder = shared_data / "acevedo_pbc" / "PBC_dataset_normal_DIB" / "platelet"
    images = sorted(folder.glob("*.jpg"))[:4]
    (tmp_path / "list.txt").write_text("\n".join(map(str, images)))
    for sample in HemaStandardDataset(root=tmp_path):
        assert sample.image.shape == (3, 224, 224)
        assert sample.failures == ()
