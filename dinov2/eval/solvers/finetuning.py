"""Supervised fine-tuning of an image classifier: one training, which a killed command continues.

Training minimises the cross-entropy of augmented images with label smoothing, by AdamW with a linear warm-up and half a
cosine. After each epoch the moving average of the weights classifies the validation images, which come from the
training side; the weights with the highest macro-F1 (then the lowest log loss) are kept. Without validation images, the
last ones are.

Everything random in a step derives from (seed, step): a training that was stopped and continued is the same bit for bit
on a CPU. The processes of a group share each step's images.

Dimension key:  B images of a step, S image side, N training images, C classes
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.augmentations import SupervisedAugmentation
from dinov2.data.datasets.decode import UnreadableImageError, decode_image
from dinov2.data.loaders import receive_batches, share_batch
from dinov2.distributed import any_rank, get_rank, get_world_size, is_enabled, is_main_process
from dinov2.eval.features.changed_images import central_square
from dinov2.eval.features.encoders import DinoEncoder
from dinov2.eval.features.loop import Fp32Matmul, Precision, prefetch
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.solvers.image_classifier import ImageClassifier, Mode, predict_images
from dinov2.hub.backbones import ImageTransform
from dinov2.hub.weight_files import read_weights_file
from dinov2.utils.command import StoppedError, StopSignals, ignore_stop_signals, progress_bar
from dinov2.utils.files import atomic_write
from dinov2.utils.numerics import derive_seed, fast_matmul_within

logger = logging.getLogger("dinov2")

Balance = Literal["none", "sampling", "loss"]
Mix = Literal["none", "mixup", "cutmix"]
SAVE_SECONDS = 300.0  # between two states on disk within an epoch
N_PREFETCHED = 2
MIX_ALPHA = {"mixup": 0.2, "cutmix": 1.0}  # of the beta distributions
MAX_NORM = 1.0  # of the gradient
LEARNING_RATES: dict[Mode, float] = {"full": 3e-4, "last-n": 3e-4, "lora": 1e-3, "head": 1e-2}
HEAD_LR_MULTIPLIER = 10.0  # of the classifier beside a network that learns
LEAST_STEPS = 64  # of an epoch: few images make smaller steps
LEAST_STEP_SIZE = 16  # images


@dataclass(frozen=True)
class TrainingSettings:
    """How a classifier learns; docs/finetuning.md says how the defaults were chosen."""

    mode: Mode = "full"
    last_blocks: int = 2  # for last-n
    lora_rank: int = 8
    epochs: int = 0  # passes over the training images; 0: `default_epochs`
    batch_size: int = 64  # images in one forward
    accumulate: int = 1  # forwards of a step
    lr: float = 0.0  # at the end of the warm-up; 0: that of `LEARNING_RATES`
    weight_decay: float = 0.05
    layer_decay: float = 0.75  # lr of a layer divided by that of the next one
    warmup: float = 0.1  # share of the steps
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    balance: Balance = "sampling"
    mix: Mix = "none"
    ema: float = 0.99  # largest decay of the moving average of the weights; 0: none
    patience: int = 15  # epochs without a better validation score before the training stops; 0: never
    precision: Precision = "fp32"

    @property
    def step_size(self) -> int:
        """Return the largest number of images of a step, B."""
        return self.batch_size * self.accumulate

    @property
    def peak_lr(self) -> float:
        return self.lr or LEARNING_RATES[self.mode]

    def n_epochs(self, n_images: int) -> int:
        return self.epochs or default_epochs(n_images)


class Epoch(NamedTuple):
    """A row of the history of a training."""

    train_loss: float
    val_loss: float | None  # None without validation images
    val_macro_f1: float | None


@dataclass(frozen=True)
class LabelledImages:
    """Paths of n images with labels int64 [n]."""

    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Machine:
    """What a training runs on, which changes numbers by rounding only."""

    device: str = "cpu"
    num_workers: int = 0
    fp32_matmul: Fp32Matmul = "fast"  # on a CPU, see `dinov2.utils.numerics`

    def extraction_options(self, settings: TrainingSettings) -> dict[str, Any]:
        """Return fields of `ExtractOptions` to embed images as they are trained on."""
        options = {"batch_size": settings.batch_size, "precision": settings.precision}
        return {**options, **asdict(self)}


def default_epochs(n_images: int) -> int:
    """Return 60 passes over 200 images, 24 over 2,000 and 10 over 20,000; at least 5 and at most 100."""
    return min(100, max(5, round(60 * (200 / n_images) ** 0.4)))


def lr_factor(step: int, n_steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate: linear up to 1, then half a cosine to 0."""
    n_warmup = math.ceil(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))


def epoch_order(labels: np.ndarray, balance: Balance, seed: int, epoch: int) -> np.ndarray:
    """Draw the N positions of an epoch: each image once, or with `sampling` all classes alike, with repetitions."""
    rng = np.random.default_rng(derive_seed(seed, "order", epoch))
    if balance != "sampling":
        return rng.permutation(len(labels))
    weights = 1 / np.bincount(labels)[labels]
    return rng.choice(len(labels), len(labels), p=weights / weights.sum())


def class_weights(labels: np.ndarray, n_classes: int, balance: Balance) -> Tensor | None:
    """Return weights [C] with mean 1 over the images, inverse to the number of each class; None without them."""
    if balance != "loss":
        return None
    counts = np.bincount(labels, minlength=n_classes)
    n_present = np.count_nonzero(counts)
    return torch.tensor(len(labels) / np.maximum(counts, 1) / n_present, dtype=torch.float32)


def training_loss(
    logits: Tensor, targets: Tensor, n_images: int, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Return the sum of the cross-entropies of logits [b, C] with targets [b, C], divided by the step's images B."""
    total = cross_entropy(logits.float(), targets, weights, reduction="sum", label_smoothing=label_smoothing)
    return total / n_images


def training_identity(
    model: ImageClassifier,
    train: LabelledImages,
    validation: LabelledImages,
    settings: TrainingSettings,
    seed: int,
    others: Sequence[Any],
) -> str:
    """Return a hash of everything that the trained weights depend on, and of `others`, ready for JSON."""
    images = [[[str(path) for path in each.paths], each.labels.tolist()] for each in (train, validation)]
    start = [model.encoder.sha256, model.encoder.transform, model.kind, model.class_names]
    content = json.dumps([asdict(settings), seed, start, images, others], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fine_tune(
    model: ImageClassifier,
    train: LabelledImages,
    validation: LabelledImages,
    settings: TrainingSettings,
    seed: int,
    machine: Machine,
    state_file: Path | None = None,
    title: str = "fine-tuning",
) -> tuple[ImageClassifier, list[Epoch], int]:
    """Train a classifier; return the best one, the history, and the number of the best epoch, from 0.

    `state_file` keeps the state, from which the same call continues. It stays at the end: the caller removes it after
    the results are on disk.

    Raises:
        ValueError: the loss is not finite, or an image can no longer be read.
        StoppedError: a stop signal arrived; the state is on disk.
    """
    with torch.random.fork_rng():
        training = _Training(model, train, validation, settings, seed, machine)
        if state_file is not None and state_file.exists():
            training.load(state_file)
            logger.info("%s continues after step %d of %d", title, training.step, training.n_steps)
        with fast_matmul_within(machine.fp32_matmul == "fast", machine.device):
            training.run(state_file, title)
    return training.best_model(), training.history, training.best_epoch


class _Training:
    """The state of a training, and its loop."""

    def __init__(
        self,
        model: ImageClassifier,
        train: LabelledImages,
        validation: LabelledImages,
        settings: TrainingSettings,
        seed: int,
        machine: Machine,
    ) -> None:
        self.train, self.validation = train, validation
        self.settings, self.seed, self.machine = settings, seed, machine
        self.step_size = min(settings.step_size, len(train), max(LEAST_STEP_SIZE, len(train) // LEAST_STEPS))
        if self.step_size < get_world_size():
            raise ValueError(
                f"{len(train)} training images, {settings.step_size} a step, for {get_world_size()} processes: start "
                f"fewer of them"
            )
        self.steps_per_epoch = len(train) // self.step_size
        self.n_steps = self.steps_per_epoch * settings.n_epochs(len(train))
        torch.manual_seed(derive_seed(seed, "adapters"))
        model.limit_learning(settings.mode, settings.last_blocks, settings.lora_rank)
        model.set_drop_path(settings.drop_path if settings.mode != "head" else 0.0)
        # copied on the host, where it needs no memory of the device beside the network
        self.average = copy.deepcopy(model.cpu()).to(machine.device) if settings.ema else None
        self.model = model.to(machine.device)
        layer_decay = settings.layer_decay if settings.mode in ("full", "last-n") else 1.0
        head_lr_multiplier = 1.0 if settings.mode == "head" else HEAD_LR_MULTIPLIER
        groups = model.parameter_groups(settings.weight_decay, layer_decay, head_lr_multiplier)
        self.optimizer = torch.optim.AdamW(groups, settings.peak_lr)
        weights = class_weights(train.labels, len(model.class_names), settings.balance)
        self.weights = None if weights is None else weights.to(machine.device)
        self.wrapped: nn.Module = DistributedDataParallel(self.model) if is_enabled() else self.model
        self.step = 0
        self.epoch_loss = torch.zeros((), device=machine.device)
        self.history: list[Epoch] = []
        self.best_epoch, self.best_state = -1, dict[str, Tensor]()

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self, state_file: Path | None, title: str) -> None:
        """Train to the last step, or until validation does not improve any more."""
        saved_at = monotonic()
        bar = progress_bar(
            desc=title,
            total=self.n_steps * self.step_size,
            initial=self.step * self.step_size,
            disable=not is_main_process(),
        )
        batches = self._batches()
        with bar, StopSignals() as stop, contextlib.closing(batches):
            while self.step < self.n_steps and not self._is_out_of_patience():
                self._train_step(*next(batches))
                bar.update(self.step_size)
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch()
                    loss, _, score = self.history[-1]
                    bar.set_postfix_str(f"loss {loss:.3f}" + ("" if score is None else f", macro-F1 {score:.3f}"))
                is_stopped = any_rank(stop.received is not None)
                is_due = self.step % self.steps_per_epoch == 0 or monotonic() - saved_at > SAVE_SECONDS
                if state_file is not None and (is_due or is_stopped):
                    self.save(state_file)
                    saved_at = monotonic()
                if is_stopped:
                    raise StoppedError(f"{title}: stopped after step {self.step} of {self.n_steps}", stop.received)

    def _is_out_of_patience(self) -> bool:
        n_waited = len(self.history) - 1 - self.best_epoch
        is_over = 0 < self.settings.patience <= n_waited and len(self.validation) > 0
        if is_over:
            logger.info("validation has not improved for %d epochs: the training ends", n_waited)
        return is_over

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """Make one optimizer step with this process's images [b, 3, S, S] and labels [b] of the step."""
        settings, device = self.settings, torch.device(self.machine.device)
        torch.manual_seed(derive_seed(self.seed, "step", self.step, get_rank()))
        images, labels = (values.to(device, non_blocking=True) for values in (images, labels))
        images, targets = mix_images(images, labels, len(self.model.class_names), settings.mix)
        self.model.train_learned()
        factor = lr_factor(self.step, self.n_steps, settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.peak_lr * factor * group["lr_multiplier"]
        n_parts = -(-len(images) // settings.batch_size)
        parts = list(zip(images.chunk(n_parts), targets.chunk(n_parts), strict=True))
        for i, (part, part_targets) in enumerate(parts):
            waits = isinstance(self.wrapped, DistributedDataParallel) and i < len(parts) - 1
            with self.wrapped.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    logits = self.wrapped(part)
                n_images = self.step_size
                loss = training_loss(logits, part_targets, n_images, settings.label_smoothing, self.weights)
                (loss * get_world_size()).backward()  # DistributedDataParallel divides the sum by the processes
            self.epoch_loss += loss.detach()
        learned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(learned, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged weights; the decay grows to `ema`, so that short trainings forget their start."""
        if self.average is None:
            return
        weight = 1 - min(self.settings.ema, self.step / (9 + self.step))
        for averaged, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            if current.requires_grad:
                averaged.lerp_(current, weight)
        for buffer, newest in zip(self.average.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(newest)

    @torch.no_grad()
    def _end_epoch(self) -> None:
        """Add a row to the history, and keep the weights if they are the best so far."""
        loss = self.epoch_loss.clone()
        if is_enabled():
            torch.distributed.all_reduce(loss)
        self.epoch_loss.zero_()
        train_loss = float(loss) / self.steps_per_epoch
        if not math.isfinite(train_loss):
            raise ValueError(
                f"the loss is {train_loss} after step {self.step}: lower --lr (now {self.settings.peak_lr:g}), or use "
                f"--precision fp32"
            )
        epoch = Epoch(train_loss, None, None)
        if len(self.validation):
            probabilities = predict_images(
                self.averaged(),
                self.validation.paths,
                **self.machine.extraction_options(self.settings),
                progress=False,
            )
            predictions = probabilities.argmax(axis=1)
            names = self.model.class_names
            metrics = classification_metrics(self.validation.labels, predictions, names, probabilities)
            epoch = Epoch(train_loss, metrics["log_loss"], metrics["macro_f1"])
        self.history.append(epoch)
        if self.best_epoch < 0 or _score(epoch) >= _score(self.history[self.best_epoch]):
            self.best_epoch = len(self.history) - 1
            self.best_state = {name: value.clone() for name, value in self.averaged().learned_state().items()}

    def averaged(self) -> ImageClassifier:
        """Return the classifier with the moving average of the weights."""
        return self.model if self.average is None else self.average

    def best_model(self) -> ImageClassifier:
        """Return the classifier with the weights of the best epoch, in eval mode."""
        self.model.load_state_dict(self.best_state, strict=False)
        self.model.fold_whitening()
        return self.model.eval()

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield the augmented images and labels of this process's share of each step, from the current step on."""
        loader: DataLoader[Any] = DataLoader(
            _AugmentedImages(self.train, self.model, self.seed),
            sampler=_StepSampler(self),
            batch_size=None,  # the sampler's items are whole batches
            collate_fn=share_batch,
            num_workers=self.machine.num_workers,
            pin_memory=torch.device(self.machine.device).type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        loaded = receive_batches(loader) if self.machine.num_workers else prefetch(loader, N_PREFETCHED)
        with contextlib.closing(loaded):
            yield from loaded

    def step_positions(self, step: int) -> list[tuple[int, int]]:
        """Return (number in the epoch, position) of this process's images of a step."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.train.labels, self.settings.balance, self.seed, epoch)
        numbers = range(in_epoch * self.step_size, (in_epoch + 1) * self.step_size)
        base = epoch * len(self.train)
        return [(base + i, int(order[i])) for i in numbers[get_rank() :: get_world_size()]]

    # --- its state on disk ------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write everything that the rest of the training depends on."""
        if not is_main_process():
            return
        state = {
            "step": self.step,
            "model": self.model.learned_state(),
            "average": self.averaged().learned_state(),
            "optimizer": self.optimizer.state_dict(),
            "epoch_loss": self.epoch_loss,
            "history": [tuple(epoch) for epoch in self.history],
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
        }
        with atomic_write(file) as stream:
            torch.save(state, stream)

    def load(self, file: Path) -> None:
        """Continue from a state that `save` wrote; ValueError for a damaged file."""
        state = read_weights_file(file)
        try:
            self.step = int(state["step"])
            self.model.load_state_dict(state["model"], strict=False)
            self.averaged().load_state_dict(state["average"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch_loss.copy_(state["epoch_loss"])
            self.history = [Epoch(*row) for row in state["history"]]
            self.best_epoch = int(state["best_epoch"])
            self.best_state = {name: value.to(self.machine.device) for name, value in state["best_state"].items()}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file}: not the state of this training ({error}); remove it to start again") from error


def _score(epoch: Epoch) -> tuple[float, float]:
    """Return what decides which epoch is better; without validation every later one is."""
    if epoch.val_macro_f1 is None or epoch.val_loss is None:
        return (0.0, 0.0)
    return (epoch.val_macro_f1, -epoch.val_loss)


def mix_images(images: Tensor, labels: Tensor, n_classes: int, mix: Mix) -> tuple[Tensor, Tensor]:
    """Return images [B, 3, S, S] and targets [B, C], mixed in pairs by MixUp or CutMix (torchvision's)."""
    if mix == "none" or len(images) < 2:
        return images, one_hot(labels, n_classes).float()
    from torchvision.transforms import v2  # type: ignore[import-untyped]  # takes a second to import

    kinds: dict[str, Any] = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    mixer = kinds[mix](alpha=MIX_ALPHA[mix], num_classes=n_classes)
    mixed, targets = mixer(images.float(), labels)
    return mixed if images.is_floating_point() else mixed.round().to(images.dtype), targets


class _StepSampler(Sampler[list[tuple[int, int]]]):
    def __init__(self, training: _Training) -> None:
        self.training = training

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.training.step, self.training.n_steps):
            yield self.training.step_positions(step)


class _AugmentedImages(Dataset[tuple[Tensor, Tensor]]):
    """The images of a step: decoded, augmented with a seed for each number in the training, prepared."""

    def __init__(self, train: LabelledImages, model: ImageClassifier, seed: int) -> None:
        encoder = model.encoder
        self.train, self.seed, self.preparation = train, seed, encoder.preparation
        self.center_crop = 1.0
        if isinstance(encoder, DinoEncoder):  # the centre is cut before the augmentation, not out of its result
            self.center_crop = encoder.network.center_crop
            self.preparation = ImageTransform(encoder.image_size).resize
        self.augmentation = SupervisedAugmentation(model.encoder.image_size)

    def __getitem__(self, batch: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        images = []
        for number, position in batch:
            try:
                image = decode_image(self.train.paths[position])
            except UnreadableImageError as error:
                raise ValueError(f"{error}: it could be read at the start; put it back and start again") from error
            rng = Random(derive_seed(self.seed, "crop", number))
            centre = image[central_square(image, self.center_crop)]
            images.append(self.preparation(self.augmentation(centre, rng)))
        positions = [position for _, position in batch]
        return torch.stack(images), torch.from_numpy(self.train.labels[positions])
