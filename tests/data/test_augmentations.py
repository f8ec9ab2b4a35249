"""The recipes against torchvision on the same parameters, the distributions they draw from, and their use."""

import math
import multiprocessing

import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode

from dinov2.data import augmentations, crop_making, fused_crops
from dinov2.data.augmentations import (
    DINO_SETTINGS,
    HEMA_SETTINGS,
    DataAugmentationDINO,
    DataAugmentationHEMA,
    apply_crops,
)
from dinov2.data.crop_making import apply_crops_as_tensors, apply_crops_compiled, apply_crops_with_opencv
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize_images

RECIPES = [DataAugmentationDINO, DataAugmentationHEMA]
GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)
NOTHING = dict.fromkeys(
    [f"{name}_probability" for name in ("hflip", "vflip", "quarter_turn", "rotation", "jitter", "grayscale")], 0.0
) | {"blur_probability": (0, 0, 0), "solarize_probability": (0, 0, 0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n=8, height=60, width=50):
    coarse = torch.rand(n, 3, 9, 9, generator=seeded(1))
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images * 255).round().to(torch.uint8)


def in_levels(normalised):
    """Sizes of differences between normalised pictures, in levels of 0 to 255."""
    return 255 * (normalised * torch.tensor(IMAGENET_STD).view(3, 1, 1)).abs()


JITTER = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


def reference_crop(picture, crops, i, size, settings):
    """Crop `i` with torchvision, in the recipe's order; float tensor or PIL picture (rounded after each step) alike."""
    is_pil = isinstance(picture, Image.Image)
    box = crops.box[i].tolist()
    picture = F.resized_crop(picture, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    picture = picture if is_pil else picture.clamp(0, 1)
    if crops.rotated[i]:
        fill = round(255 * float(crops.fill[i])) if is_pil else float(crops.fill[i])
        picture = F.rotate(picture, float(crops.angle[i]), InterpolationMode.NEAREST, fill=[fill] * 3)
    picture = F.horizontal_flip(picture) if crops.hflip[i] else picture
    picture = F.vertical_flip(picture) if crops.vflip[i] else picture
    picture = F.rotate(picture, 90) if crops.quarter_turn[i] else picture
    if crops.jittered[i]:
        for number in crops.jitter_order[i].tolist():
            picture = JITTER[number](picture, float(crops.jitter_strength[i, number]))
    picture = F.rgb_to_grayscale(picture, 3) if crops.grayscale[i] else picture
    if crops.blurred[i]:
        picture = F.gaussian_blur(picture, [settings.blur_kernel_size] * 2, [float(crops.sigma[i])] * 2)
    if crops.solarized[i]:
        picture = F.solarize(picture, settings.solarize_threshold / (1 if is_pil else 255))
    return picture


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("height", "width"), [(60, 50), (30, 100)])
def test_recipes_equal_torchvision(recipe, height, width):
    """To 0.001 after division by the standard deviation: torchvision's luma weights sum to 0.9999. Pixels at which the
    rotation or the solarisation falls on the other side of a tie may differ."""
    images = random_images(16, height, width)
    augmentation = recipe(GLOBAL, LOCAL, 2, 48, 28)
    operations = set()
    for crops, size in zip(augmentation.draw(16, height, width, seeded()), (48, 28), strict=True):
        ours = apply_crops_as_tensors(images, crops, size, augmentation.settings)
        for i in range(len(crops)):
            reference = reference_crop(images[crops.picture[i]] / 255, crops, i, size, augmentation.settings)
            difference = (ours[i] - F.normalize(reference, list(IMAGENET_MEAN), list(IMAGENET_STD))).abs()
            assert (difference > 1e-3).float().mean() < 0.003, i
            kinds = ("rotated", "hflip", "vflip", "quarter_turn", "jittered", "grayscale", "blurred", "solarized")
            operations |= {kind for kind in kinds if getattr(crops, kind)[i]}
    expected = {"hflip", "vflip", "quarter_turn", "jittered", "grayscale", "blurred"}
    assert operations == expected | ({"rotated"} if recipe is DataAugmentationHEMA else {"solarized"})


@pytest.mark.parametrize(
    ("apply", "mean", "quantile"), [(apply_crops_with_opencv, 1.3, 3), (apply_crops_as_tensors, 1.5, 3)]
)
def test_recipes_equal_pil_to_rounding(apply, mean, quantile):
    """In levels: the average, and what 95 % of values keep. PIL truncates where OpenCV rounds and tensors do neither.
    Hue is left out, of which PIL has 256 steps only."""
    images = random_images(16)
    augmentation = DataAugmentationHEMA(GLOBAL, LOCAL, 0, 48, hue=0.0)
    crops, _ = augmentation.draw(16, 60, 50, seeded())
    ours = apply(images, crops, 48, augmentation.settings)
    of_pil = [
        reference_crop(F.to_pil_image(images[crops.picture[i]]), crops, i, 48, augmentation.settings)
        for i in range(len(crops))
    ]
    levels = in_levels(ours - torch.stack([normalize_images(F.pil_to_tensor(pil)) for pil in of_pil]))
    assert levels.mean() < mean
    assert levels.quantile(0.95) <= quantile


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("height", "width", "sizes"), [(60, 50, (48, 28)), (31, 100, (45, 15)), (28, 28, (28, 28)), (150, 130, (98, 28))]
)
def test_opencv_makes_the_crops_of_the_tensor_operations(recipe, height, width, sizes):
    """Half a level of rounding at each of some six operations: below 0.5 levels on average, 3 for 99.9 % of values.
    The rest are saturated colours, at which a level of the input turns the hue by a lot."""
    images, augmentation = random_images(16, height, width), recipe(GLOBAL, LOCAL, 2, *sizes)
    for crops, size in zip(augmentation.draw(16, height, width, seeded()), sizes, strict=True):
        rounded = apply_crops_with_opencv(images, crops, size, augmentation.settings)
        exact = apply_crops_as_tensors(images, crops, size, augmentation.settings)
        levels = in_levels(rounded - exact)
        assert levels.mean() < 0.5
        assert (levels > 3).float().mean() < 0.001
        assert (rounded - exact).mean().abs() < 0.002  # no drift to dark or bright


@pytest.mark.parametrize("recipe", RECIPES)
def test_opencv_is_what_a_cpu_gets(recipe):
    images, augmentation = random_images(), recipe(GLOBAL, LOCAL, 0, 32)
    crops, _ = augmentation.draw(8, 60, 50, seeded())
    expected = apply_crops_with_opencv(images, crops, 32, augmentation.settings)
    assert torch.equal(apply_crops(images, crops, 32, augmentation.settings), expected)
    assert torch.equal(torch.cat(augmentation(images, seeded())["global_crops"]), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_and_memory_layout_change_nothing(recipe):
    images, augmentation = random_images(), recipe(GLOBAL, LOCAL, 2, 32, 16)
    n_threads = torch.get_num_threads()
    made = []
    try:
        for threads, pictures in (
            (1, images),
            (1, images.to(memory_format=torch.channels_last)),
            (3, images),
            (3, torch.nn.functional.pad(images, (2, 3, 4, 5))[..., 4:-5, 2:-3]),
        ):
            torch.set_num_threads(threads)
            out = augmentation(pictures, seeded())
            made.append(torch.stack(out["global_crops"]).flatten().tolist())
            made[-1] += torch.stack(out["local_crops"]).flatten().tolist()
    finally:
        torch.set_num_threads(n_threads)
    assert made[0] == made[1] == made[2] == made[3]


def _augment_in_child(images, connection):
    torch.set_num_threads(1)  # as torch's loaders do: OpenMP does not survive a fork
    out = DataAugmentationHEMA(GLOBAL, LOCAL, 0, 32)(images, seeded())
    connection.send_bytes(torch.stack(out["global_crops"]).numpy().tobytes())


def test_a_process_forked_after_use_makes_the_same_crops():
    """Threads of the parent do not exist in the child; nothing may wait for them."""
    images = random_images()
    n_threads = torch.get_num_threads()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    try:
        torch.set_num_threads(2)
        here = DataAugmentationHEMA(GLOBAL, LOCAL, 0, 32)(images, seeded())
        child = context.Process(target=_augment_in_child, args=(images, theirs), daemon=True)
        child.start()
        assert ours.poll(30), "the child hangs"
        assert ours.recv_bytes() == torch.stack(here["global_crops"]).numpy().tobytes()
        child.join(30)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("recipe", RECIPES)
def test_operations_come_as_often_as_set(recipe):
    """Shares among 4,000 crops, within 5 standard errors."""
    settings, n = recipe.preset, 4000
    global_crops, local_crops = recipe(GLOBAL, LOCAL, 1).draw(n, 32, 32, seeded())
    kinds = [global_crops.select(slice(n)), global_crops.select(slice(n, None)), local_crops]
    for kind, crops in enumerate(kinds):
        for drawn, probability in (
            (crops.hflip, settings.hflip_probability),
            (crops.vflip, settings.vflip_probability),
            (crops.quarter_turn, settings.quarter_turn_probability),
            (crops.rotated, settings.rotation_probability),
            (crops.jittered, settings.jitter_probability),
            (crops.grayscale, settings.grayscale_probability),
            (crops.blurred, settings.blur_probability[kind]),
            (crops.solarized, settings.solarize_probability[kind]),
            (crops.jitter_order[:, 0] == 3, 1 / 4),
            (crops.jitter_order[:, 1] == 0, 1 / 4),
        ):
            error = 5 * math.sqrt(probability * (1 - probability) / n)
            assert abs(drawn.float().mean().item() - probability) <= error
        assert torch.equal(crops.jitter_order.sort(dim=1).values, torch.arange(4).expand(n, 4))
        for drawn, low, high in (
            (crops.angle, 0, 360),
            (crops.fill, 0, 1),
            (crops.sigma, *settings.blur_sigma),
            (crops.jitter_strength[:, 0], 1 - settings.brightness, 1 + settings.brightness),
            (crops.jitter_strength[:, 1], 1 - settings.contrast, 1 + settings.contrast),
            (crops.jitter_strength[:, 2], 1 - settings.saturation, 1 + settings.saturation),
            (crops.jitter_strength[:, 3], -settings.hue, settings.hue),
        ):
            assert stats.kstest(drawn.numpy(), "uniform", (low, high - low)).pvalue > 1e-3


def test_presets_hold_the_probabilities_that_act_upstream():
    assert DINO_SETTINGS.blur_probability == (0.0, 0.9, 0.5)
    assert HEMA_SETTINGS.blur_probability == (0.9, 0.7, 0.5)


def test_the_draws_of_a_crop_are_independent():
    """A column of uniforms used twice would tie two decisions together."""
    augmentation = DataAugmentationHEMA(GLOBAL, LOCAL, 1)
    global_crops, local_crops = augmentation.draw(3000, 64, 64, seeded())
    columns = []
    for crops in (global_crops.select(slice(3000)), global_crops.select(slice(3000, None)), local_crops):
        columns += [crops.box.T, crops.jitter_strength.T, crops.jitter_order[:, 0]]
        columns += [crops.angle, crops.fill, crops.sigma, crops.hflip, crops.vflip, crops.quarter_turn]
        columns += [crops.rotated, crops.jittered, crops.grayscale, crops.blurred]
    rows = torch.cat([torch.atleast_2d(column.double()) for column in columns])
    correlation = rows.corrcoef().fill_diagonal_(0).abs()
    for crop in range(3):  # height and width of a box, and its place, do belong together
        first = crop * len(rows) // 3
        correlation[first : first + 4, first : first + 4] = 0
    assert correlation.max() < 0.09  # 5 standard errors


def test_output_layout():
    images = random_images(5)
    out = DataAugmentationDINO(GLOBAL, LOCAL, 3, 40, 24)(images)
    assert set(out) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [tuple(crop.shape) for crop in out["global_crops"]] == [(5, 3, 40, 40)] * 2
    assert [tuple(crop.shape) for crop in out["local_crops"]] == [(5, 3, 24, 24)] * 3
    assert all(crop.dtype == torch.float32 for crop in out["global_crops"] + out["local_crops"])
    assert all(crop.is_contiguous() for crop in out["global_crops"] + out["local_crops"])
    assert all(a is b for a, b in zip(out["global_crops"], out["global_crops_teacher"], strict=True))
    assert out["offsets"] == ()


def test_whole_picture_without_operations_is_only_normalised():
    images = random_images(3, 32, 32)
    augmentation = DataAugmentationDINO((1.0, 1.0), LOCAL, 0, 32, **NOTHING)
    crops, _ = augmentation.draw(3, 32, 32)
    crops.box[:] = torch.tensor([0, 0, 32, 32])
    made = apply_crops(images, crops, 32, augmentation.settings)
    torch.testing.assert_close(made, normalize_images(images).repeat(2, 1, 1, 1))


def test_crops_come_from_their_own_picture():
    """Pictures of one colour each stay of that colour, in their place."""
    images = torch.arange(0, 250, 50, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 30, 30)
    out = DataAugmentationDINO(GLOBAL, LOCAL, 2, 16, 16, **NOTHING)(images)
    for crop in out["global_crops"] + out["local_crops"]:
        torch.testing.assert_close(crop, normalize_images(images[:, :, :16, :16]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_generator_decides_everything(recipe):
    images = random_images()
    augmentation = recipe(GLOBAL, LOCAL, 2, 32, 16)

    def made(seed):
        out = augmentation(images, seeded(seed))
        return torch.cat([crop.flatten() for crop in out["global_crops"] + out["local_crops"]])

    torch.manual_seed(0)
    once = made(7)
    assert torch.equal(once, made(7))
    assert not torch.equal(once, made(8))


def test_without_a_generator_torchs_own_is_used():
    images, augmentation = random_images(), DataAugmentationDINO(GLOBAL, LOCAL, 0, 32)
    torch.manual_seed(5)
    first = augmentation(images)["global_crops"][0]
    torch.manual_seed(5)
    again = augmentation(images)["global_crops"][0]
    following = augmentation(images)["global_crops"][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, following)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_of_a_batch_are_the_pictures_of_the_whole(world_size):
    images, augmentation = random_images(), DataAugmentationHEMA(GLOBAL, LOCAL, 1, 32, 16)
    whole = augmentation(images, seeded())
    for rank in range(world_size):
        share = augmentation(images[rank::world_size], seeded(), rank=rank, world_size=world_size)
        for key in ("global_crops", "local_crops"):
            for ours, all_pictures in zip(share[key], whole[key], strict=True):
                assert torch.equal(ours, all_pictures[rank::world_size])


@pytest.mark.parametrize("apply", [apply_crops_as_tensors, apply_crops_compiled])
@pytest.mark.parametrize("n_chunks", [3, 8])
def test_the_chunk_size_of_tensors_changes_nothing(apply, n_chunks, monkeypatch):
    monkeypatch.setattr(fused_crops, "run_compiled", fused_crops.run_program)
    images, augmentation = random_images(), DataAugmentationHEMA(GLOBAL, LOCAL, 1, 32, 16)
    for crops in augmentation.draw(8, 60, 50, seeded()):
        at_once = apply(images, crops, 32, augmentation.settings)
        with monkeypatch.context() as patch:
            patch.setattr(crop_making, "CHUNK_VALUES", 3 * (32 * 32 * len(crops) // 8 + 60 * 50) * 8 // n_chunks)
            in_chunks = apply(images, crops, 32, augmentation.settings)
        torch.testing.assert_close(at_once, in_chunks, atol=1e-5, rtol=0)


@pytest.mark.parametrize("apply", [apply_crops_with_opencv, apply_crops_as_tensors, apply_crops_compiled])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_crops_are_the_long_ones_rounded(apply, dtype, monkeypatch):
    monkeypatch.setattr(fused_crops, "run_compiled", fused_crops.run_program)
    images, augmentation = random_images(), DataAugmentationHEMA(GLOBAL, LOCAL, 0, 32)
    crops, _ = augmentation.draw(8, 60, 50, seeded())
    exact = apply(images, crops, 32, augmentation.settings)
    assert torch.equal(apply(images, crops, 32, augmentation.settings, dtype), exact.to(dtype))


def test_the_augmentation_passes_its_type_on():
    images = random_images()
    out = DataAugmentationDINO(GLOBAL, LOCAL, 1, 32, 16, dtype=torch.bfloat16)(images, seeded())
    exact = DataAugmentationDINO(GLOBAL, LOCAL, 1, 32, 16)(images, seeded())
    for short, long in zip(
        out["global_crops"] + out["local_crops"], exact["global_crops"] + exact["local_crops"], strict=True
    ):
        assert torch.equal(short, long.bfloat16())
    with pytest.raises(ValueError, match="dtype: must be"):
        DataAugmentationDINO(GLOBAL, LOCAL, 1, dtype=torch.uint8)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_key_chooses_what_a_gpu_runs(compiled, monkeypatch):
    """The device `meta` stands for a GPU: it has no values, but is not the CPU."""
    called = []
    for name in ("apply_crops_as_tensors", "apply_crops_compiled"):
        monkeypatch.setattr(crop_making, name, lambda *_, name=name: called.append(name))
    augmentation = DataAugmentationDINO(GLOBAL, LOCAL, 0, 32)
    crops, _ = augmentation.draw(8, 60, 50, seeded())
    apply_crops(random_images().to("meta"), crops, 32, augmentation.settings, compiled=compiled)
    assert called == ["apply_crops_compiled" if compiled else "apply_crops_as_tensors"]


def test_no_local_crops_cost_nothing(monkeypatch):
    sizes = []

    def counting(images, crops, size, *others):
        sizes.append(size)
        return apply_crops(images, crops, size, *others)

    monkeypatch.setattr(augmentations, "apply_crops", counting)
    generator, reference = seeded(), seeded()
    out = DataAugmentationDINO(GLOBAL, LOCAL, 0, 32, 16)(random_images(4), generator)
    assert out["local_crops"] == []
    assert sizes == [32]
    torch.rand(4, 2, augmentations.N_UNIFORMS, generator=reference)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pil_picture_and_single_tensor_equal_a_batch_of_one(mode):
    picture = F.to_pil_image(random_images(1)[0]).convert(mode)
    tensor = F.pil_to_tensor(picture.convert("RGB"))
    augmentation = DataAugmentationDINO(GLOBAL, LOCAL, 1, 32, 16)
    of_pil, of_tensor, of_batch = (augmentation(x, seeded()) for x in (picture, tensor, tensor[None]))
    for key in ("global_crops", "local_crops"):
        for a, b, c in zip(of_pil[key], of_tensor[key], of_batch[key], strict=True):
            assert a.ndim == 3
            assert torch.equal(a, b)
            assert torch.equal(a, c[0])


def test_pictures_and_their_memory_stay_as_they_are():
    images = random_images()
    before = images.clone()
    DataAugmentationHEMA(GLOBAL, LOCAL, 1, 32, 16)(images, seeded())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32), "found torch.float32"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"\[2, 1, 32, 32\]"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"\[2, 32, 32, 3\]"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), r"\[0, 3, 32, 32\]"),
        (torch.zeros(32, 32, dtype=torch.uint8), r"\[32, 32\]"),
    ],
)
def test_wrong_pictures_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        DataAugmentationDINO(GLOBAL, LOCAL, 0)(images)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 1), (0, 0)])
def test_wrong_rank_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="rank: must lie in"):
        DataAugmentationDINO(GLOBAL, LOCAL, 0)(random_images(), rank=rank, world_size=world_size)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hflip_probability", 1.1),
        ("jitter_probability", -0.1),
        ("blur_probability", (0.5, 0.5)),
        ("blur_probability", (0.5, 0.5, 2)),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("blur_sigma", (0.0, 1.0)),
        ("blur_sigma", (2.0, 1.0)),
        ("blur_kernel_size", 8),
        ("solarize_threshold", 256),
        ("global_crops_scale", (0.5, 1.5)),
        ("local_crops_scale", (0.5, 0.2)),
        ("local_crops_number", -1),
        ("global_crops_size", 0),
        ("local_crops_size", 4),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    arguments = {"global_crops_scale": GLOBAL, "local_crops_scale": LOCAL, "local_crops_number": 2}
    with pytest.raises(ValueError, match=f"^{name}"):
        DataAugmentationHEMA(**{**arguments, name: value})


def test_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\['blur_probabilty'\].*blur_probability"):
        DataAugmentationDINO(GLOBAL, LOCAL, 0, blur_probabilty=(0, 0, 0))


def test_lists_as_a_config_file_gives_them():
    augmentation = DataAugmentationDINO([0.3, 1], [0.1, 0.3], 0, 32, blur_probability=[1, 0, 0], blur_sigma=[1, 2])
    crops, _ = augmentation.draw(4, 32, 32)
    assert crops.blurred.tolist() == [True] * 4 + [False] * 4


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_makes_the_crops_of_the_cpu(recipe, compiled, monkeypatch):
    """By the same tensor operations, but for pixels at which rotation or solarisation are near a tie."""
    images, augmentation = random_images(32, 100, 90), recipe(GLOBAL, LOCAL, 2, 64, 32, compiled=compiled)
    on_gpu = augmentation(images.cuda(), seeded())
    monkeypatch.setattr(augmentations, "apply_crops", lambda *given: apply_crops_as_tensors(*given[:5]))
    on_cpu = augmentation(images, seeded())
    for key in ("global_crops", "local_crops"):
        for a, b in zip(on_cpu[key], on_gpu[key], strict=True):
            assert b.is_cuda
            assert ((a - b.cpu()).abs() > 1e-4).float().mean() < 1e-4


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_is_never_waited_for(recipe, compiled):
    images, augmentation = random_images(32).cuda(), recipe(GLOBAL, LOCAL, 2, 64, 32, compiled=compiled)
    augmentation(images, seeded())
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmentation(images, seeded())
    finally:
        torch.cuda.set_sync_debug_mode("default")
