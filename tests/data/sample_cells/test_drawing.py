import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from dinov2.data.sample_cells import CELL_CLASSES, Slide, draw_cell
from dinov2.eval.features.named_encoders import colour_histogram

SIZE = 96


def draw_set(n_per_class: int, n_slides: int, key: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Images, their classes and their slides; different keys have different slides."""
    slides = [Slide(np.random.default_rng([key, i])) for i in range(n_slides)]
    order = [(i, j) for j in range(n_per_class) for i in range(len(CELL_CLASSES))]
    images = [
        draw_cell(CELL_CLASSES[i], slides[j % n_slides], np.random.default_rng([key, i, j, 1]), SIZE) for i, j in order
    ]
    return images, np.array([i for i, _ in order]), np.array([j % n_slides for _, j in order])


def gradient_histograms(images: list[np.ndarray]) -> np.ndarray:
    """Where edges of which direction are, from the gray image alone: 8 x 8 places, 9 directions."""
    side, n_places, n_directions = 48, 8, 9
    features = []
    for image in images:
        gray = Image.fromarray(image).convert("L").crop((16, 16, 80, 80)).resize((side, side))
        down, right = np.gradient(np.asarray(gray, dtype=np.float64))
        direction = (np.arctan2(down, right) % np.pi / np.pi * n_directions).astype(int) % n_directions
        place = np.arange(side) * n_places // side
        bins = (place[:, None] * n_places + place) * n_directions + direction
        counts = np.bincount(bins.ravel(), np.hypot(down, right).ravel(), n_places**2 * n_directions)
        features.append(np.sqrt(counts / counts.sum()))
    return np.array(features)


@pytest.fixture(scope="module")
def images_by_split():
    return draw_set(12, n_slides=6, key=1), draw_set(6, n_slides=3, key=2)


@pytest.mark.parametrize("cell_class", CELL_CLASSES)
def test_an_image_depends_on_its_generator_alone(cell_class):
    slide = Slide(np.random.default_rng(1))
    first, again, other = (draw_cell(cell_class, slide, np.random.default_rng(seed), size=50) for seed in (5, 5, 6))
    assert first.shape == (50, 50, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_an_unknown_class_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown class 'neutrophile'; the classes are neutrophil_segmented"):
        draw_cell("neutrophile", Slide(np.random.default_rng(0)), np.random.default_rng(0))


def test_images_show_a_dark_cell_in_the_middle_of_a_bright_field(images_by_split):
    images, labels, _ = images_by_split[0]
    has_nucleus = labels != CELL_CLASSES.index("platelet")
    green = np.stack(images)[..., 1].astype(float)  # [N, S, S]; nuclei absorb green most
    border = np.concatenate([green[:, :8].reshape(len(green), -1), green[:, -8:].reshape(len(green), -1)], axis=1)
    middle = np.percentile(green[:, 28:-28, 28:-28], 5, axis=(1, 2))
    assert (middle < 0.75 * np.percentile(border, 90, axis=1))[has_nucleus].mean() > 0.97
    assert (green > 254).mean() < 0.01  # the light does not saturate the camera
    assert (green.std(axis=(1, 2)) > 8).all()


def test_platelets_have_no_nucleus_and_blasts_a_larger_one_than_erythroblasts(images_by_split):
    images, labels, _ = images_by_split[0]
    green = np.stack(images)[..., 1].astype(float)  # [N, S, S]
    is_dark = green < 0.6 * np.percentile(green, 95, axis=(1, 2), keepdims=True)
    area = is_dark[:, 24:-24, 24:-24].mean(axis=(1, 2))
    median = {name: np.median(area[labels == i]) for i, name in enumerate(CELL_CLASSES)}
    assert 2 * median["platelet"] < median["erythroblast"] < 0.8 * median["myeloblast"]


def test_colour_of_the_nuclei_tells_more_about_the_slide_than_about_the_class(images_by_split):
    images, labels, slides = images_by_split[0]
    pixels = np.stack([image[24:-24, 24:-24].reshape(-1, 3) for image in images]).astype(float)  # [N, P, 3]
    is_darkest = pixels[..., 1] <= np.percentile(pixels[..., 1], 8, axis=1, keepdims=True)
    colours = (pixels * is_darkest[..., None]).sum(axis=1) / is_darkest.sum(axis=1)[:, None]  # [N, 3]
    has_nucleus = labels != CELL_CLASSES.index("platelet")

    def variance_between(groups: np.ndarray) -> float:
        groups, nuclei = groups[has_nucleus], colours[has_nucleus]
        return np.var([nuclei[groups == group].mean(axis=0) for group in np.unique(groups)], axis=0).sum()

    assert variance_between(slides) > 2 * variance_between(labels)


def test_form_tells_the_classes_apart_on_new_slides_and_colour_does_not(images_by_split):
    (train, train_labels, _), (test, test_labels, _) = images_by_split
    train_colours, test_colours = (np.stack([colour_histogram(image) for image in part]) for part in (train, test))
    by_colour = KNeighborsClassifier(5).fit(train_colours, train_labels)
    by_form = LogisticRegression(C=30, max_iter=300).fit(gradient_histograms(train), train_labels)
    assert by_colour.score(test_colours, test_labels) < 0.4
    assert by_form.score(gradient_histograms(test), test_labels) > 0.35  # chance is 0.1; 120 images teach little
