"""A run small enough for tests: a two-block ViT on 28-px images."""

import pytest

TINY = [
    *("student.arch=vit_small", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=14", "crops.global_crops_size=28", "crops.local_crops_size=14"),
    *("dino.head_n_prototypes=32", "dino.head_hidden_dim=16", "dino.head_bottleneck_dim=8"),
    *("ibot.head_n_prototypes=16", "ibot.head_hidden_dim=16", "ibot.head_bottleneck_dim=8"),
    *("train.batch_size_per_gpu=4", "train.num_workers=0", "train.log_period=1", "train.tensorboard=false"),
    *("train.device=cpu", "student.pretrained_weights=null"),  # custom.yaml would download some
    *("train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2", "optim.warmup_epochs=1", "train.saveckp_freq=1"),
    "teacher.warmup_teacher_temp_epochs=1",
]


@pytest.fixture(scope="session")
def make_tiny_overrides():
    """Arguments that shrink any recipe to a run of four iterations on the lists in `folder`."""

    def make(folder, *more: str) -> list[str]:
        return [f"train.dataset_path=HemaStandardDataset:root={folder}:shuffle=1", *TINY, *more]

    return make


@pytest.fixture
def tiny_overrides(make_tiny_overrides):
    return make_tiny_overrides
