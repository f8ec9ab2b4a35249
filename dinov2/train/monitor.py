"""What is watched while a run trains: signs of a collapse, with what to try, and profiles of some steps.

Dimension key:  N feature vectors, D embedding dim, R rows of targets, K prototypes
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

# Thresholds, between runs that learned and runs that collapsed (docs/benchmarks/from_scratch.md). No number shows every
# collapse: KoLeo keeps features apart while predictions are uniform, and only the CLS loss tells.
UNIFORM_LOSS = 0.99  # of ln K, or above: the loss of uniform predictions
VANISHING_LOSS = 0.1  # of ln K: a teacher that gives all images the same few prototypes is predicted without looking
MIN_EFFECTIVE_RANK = 1.5  # four fifths of the variance along one direction; an untrained network has 1.1 to 1.9
MIN_FEATURE_SPREAD = 0.1  # a mean cosine of 0.99 between images; an untrained network has 0.0004 to 0.5
MIN_PROTOTYPE_USE = 0.1  # far below a run that learns: views of an image share a prototype, and so do alike images
MIN_PATCH_PROTOTYPE_USE = 0.05  # patches are thousands a step and repeat (background, cytoplasm)
MIN_PROTOTYPES = 1.5  # one for all is too few, whatever share of K that is
MIN_IMAGES = 8  # statistics of fewer mean nothing: they span too few directions and prototypes
# A sign is over when its mean is this much better than the limit, so that noise does not repeat a warning
RECOVERY_FROM_UNIFORM, RECOVERY = 0.01, 0.25  # of ln K for the loss at ln K, of the limit for the others
MUTING_LAYERSCALE = 0.1  # below, an untrained network's features of all images are equal to four digits
SHARP_TEMPERATURE = 0.02  # of the teacher: there a small run leaves ln K
# An untrained network looks collapsed, so nothing is checked in the lr warm-up, but for a tenth to a quarter of the run
SHORTEST_STARTUP, LONGEST_STARTUP = 0.1, 0.25
MIN_STARTUP_ITERATIONS, MAX_STARTUP_ITERATIONS = 100, 20_000
# Means are over a fiftieth of the run: a single step's CLS loss scatters by more than UNIFORM_LOSS leaves room for
WINDOW = 0.02
MIN_WINDOW_ITERATIONS, MAX_WINDOW_ITERATIONS = 20, 500
MIN_VALUES = 5  # a mean of fewer finite values is not checked; the window then grows
LABELS = {
    "cls_loss": "the CLS loss (global and local crops together)",
    "patch_loss": "the patch loss (per masked crop: the log shows half of its mean over all crops)",
    "effective_rank": "the effective rank of the teacher's CLS tokens",
    "feature_spread": "the spread of the teacher's CLS tokens",
    "prototype_use": "the share of prototypes that are the first choice of an image",
    "patch_prototype_use": "the share of prototypes that are the first choice of a masked patch",
}
PROFILE_WARM_UP = 3  # steps before the first profiled one: they choose kernels and compile
STATE = {"total": float, "n_values": int, "n_rows": int, "first": int, "is_warned": int}  # of a sign, as it is saved


@torch.no_grad()
def feature_statistics(cls_tokens: Tensor) -> dict[str, Tensor]:
    """Measure how far features [N, D] are from being all alike, as 0-d float32 tensors on their device.

    Returns:
        effective_rank: (sum_i l_i)^2 / sum_i l_i^2 of the eigenvalues l of the features' covariance (the participation
            ratio): n if n directions share the variance equally, at most 1 if all features are equal.
        feature_spread: sqrt(D) times the mean over dimensions of the standard deviation of the features, each scaled
            to length 1: 1 if they are uniform on the sphere, 0 if all are equal (SimSiam, Chen & He 2021,
            arXiv 2011.10566).
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        features = cls_tokens.float()
        tiny = torch.finfo(torch.float32).tiny
        centred = features - features.mean(dim=0)
        centred = centred / centred.abs().amax().clamp(min=tiny)  # fourth powers would leave the range of float32
        n, dim = centred.shape
        gram = centred @ centred.T if n < dim else centred.T @ centred  # both have the covariance's eigenvalues
        effective_rank = gram.trace().square() / gram.square().sum().clamp(min=tiny)
        spread = math.sqrt(dim) * F.normalize(features, dim=1).std(dim=0, correction=0).mean()
    return {"effective_rank": effective_rank, "feature_spread": spread}


@torch.no_grad()
def prototype_use(choices: Tensor, n_prototypes: int) -> Tensor:
    """Compute the share of K prototypes that are some row's largest, out of min(R, K).

    Args:
        choices: int64 [R], each row's largest.
        n_prototypes: K.

    Returns:
        0-d float32 on the choices' device; NaN if R is 0.
    """
    n_rows = len(choices)
    if n_rows == 0:
        return torch.full((), math.nan, device=choices.device)
    is_used = torch.zeros(n_prototypes, device=choices.device)
    is_used.scatter_(0, choices, 1.0)
    return is_used.sum() / min(n_rows, n_prototypes)


@dataclass
class Sign:
    """One sign of a collapse: a measure whose mean over a window of iterations is beyond a limit."""

    measure: str  # of LABELS
    limit: float
    meaning: str
    advice: str
    recovered: float = 0.0  # beyond it the sign is over; below the limit where that is a ceiling
    # the window so far
    total: float = 0.0
    n_values: int = 0
    n_rows: int = 0
    first: int = 0
    is_warned: int = 0  # 0 or 1

    def add(self, iteration: int, value: float) -> None:
        """Add one iteration to the window; a value that is not finite is passed over."""
        if self.n_rows == 0:
            self.first = iteration
        self.n_rows += 1
        if math.isfinite(value):
            self.total += value
            self.n_values += 1

    def end_window(self, last: int) -> str | None:
        """Start a new window; return a warning if the mean of this one calls for one."""
        label, mean, first = LABELS[self.measure], self.total / self.n_values, self.first
        self.total, self.n_values, self.n_rows = 0.0, 0, 0
        is_ceiling = self.recovered < self.limit
        is_present = mean >= self.limit if is_ceiling else mean <= self.limit
        is_over = mean < self.recovered if is_ceiling else mean > self.recovered
        if self.is_warned and is_over:
            self.is_warned = 0
            logger.info("%s has recovered: %.4g in iterations %d to %d", label, mean, first, last)
        if self.is_warned or not is_present:
            return None
        self.is_warned = 1
        return (
            f"collapse? {label} is {mean:.4g}, not {'below' if is_ceiling else 'above'} {self.limit:.4g}, as the mean "
            f"of iterations {first} to {last}: {self.meaning}. What to try: {self.advice}"
        )


class CollapseMonitor:
    """Follows the numbers of a run and warns of each sign of a collapse once; again only after it had gone.

    Nothing is checked in the start-up phase; then every measure is, as the mean of `window` iterations in turn.

    Args:
        cfg: the run's merged configuration.
        n_iterations: how many the run has in all.
    """

    def __init__(self, cfg: Any, n_iterations: int) -> None:
        warmup = cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
        startup = min(max(warmup, SHORTEST_STARTUP * n_iterations), LONGEST_STARTUP * n_iterations)
        self.startup = round(min(max(startup, MIN_STARTUP_ITERATIONS), MAX_STARTUP_ITERATIONS))
        self.window = round(min(max(WINDOW * n_iterations, MIN_WINDOW_ITERATIONS), MAX_WINDOW_ITERATIONS))
        self._has_local_crops = cfg.crops.local_crops_number > 0
        n_crops = N_GLOBAL_CROPS * _global_batch_size(cfg)
        self._masked_share = int(n_crops * cfg.ibot.mask_sample_probability) / n_crops  # of the global crops
        self._signs = _signs(cfg)

    def check(self, rows: Sequence[Mapping[str, float]]) -> list[str]:
        """Add the newest rows; log and return the warnings that follow from them.

        Args:
            rows: in order, each with its `iteration` and, where present, the losses as `SSLMetaArch.losses` shows them
                and the statistics in `LABELS`.
        """
        texts = []
        for row in rows:
            iteration = int(row["iteration"])
            if iteration < self.startup:
                continue
            values = self._measures(row)
            for sign in self._signs.values():
                sign.add(iteration, values[sign.measure])
                if sign.n_rows >= self.window and sign.n_values >= MIN_VALUES:
                    text = sign.end_window(iteration)
                    texts += [] if text is None else [text]
        for text in texts:
            logger.warning("%s", text)
        return texts

    def _measures(self, row: Mapping[str, float]) -> dict[str, float]:
        """Compute what is checked from a row: both losses as mean cross-entropies in nats, so that ln K is uniform."""
        # The log splits one mean over 2 + 2L terms into its global and its local part
        cls_loss = row.get("dino_global_crops_loss", math.nan)
        if self._has_local_crops:
            cls_loss += row.get("dino_local_crops_loss", math.nan)
        # The log has half of a mean over all crops, to which those without a mask add nothing. Exactly 0 is not a
        # loss: then no patch was masked.
        patch_loss = row.get("ibot_loss", math.nan)
        is_loss = self._masked_share > 0 and patch_loss != 0
        return {
            **{name: row.get(name, math.nan) for name in LABELS},
            "cls_loss": cls_loss,
            "patch_loss": 2 * patch_loss / self._masked_share if is_loss else math.nan,
        }

    def signs_seen(self) -> list[str]:
        """Return the signs that were warned of and have not gone."""
        return [name for name, sign in self._signs.items() if sign.is_warned]

    def state_dict(self) -> dict[str, float]:
        """Return plain numbers by name, from which `load_state_dict` continues."""
        return {f"{name}/{key}": getattr(sign, key) for name, sign in self._signs.items() for key in STATE}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state`; signs that it lacks start anew."""
        for name, sign in self._signs.items():
            for key, kind in STATE.items():
                setattr(sign, key, kind(state.get(f"{name}/{key}", 0)))


def _global_batch_size(cfg: Any) -> int:
    return int(cfg.train.global_batch_size or cfg.train.batch_size_per_gpu)


def _signs(cfg: Any) -> dict[str, Sign]:
    """Return the signs of a collapse in a run of this configuration, by name."""
    k_cls = int(cfg.dino.head_n_prototypes)
    k_patch = int(cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else k_cls)
    ln_k, ln_k_patch = math.log(k_cls), math.log(k_patch)
    n_images = cfg.train.batch_size_per_gpu * (cfg.train.accumulation_steps or 1)
    uniform = (
        f"uniform predictions give ln {k_cls} = {ln_k:.4g}; the targets hardly differ between images, and the student "
        "does not learn to tell them apart"
    )
    same_images, same_patches = (
        f"the teacher gives nearly all {things} the same few prototypes, whatever they show (uniform predictions give "
        f"ln {k} = {math.log(k):.4g})"
        for things, k in (("images", k_cls), ("patches", k_patch))
    )
    against_uniform, against_one_for_all, against_alike = _advice(cfg)
    signs = {
        "uniform_cls": Sign("cls_loss", UNIFORM_LOSS * ln_k, uniform, against_uniform),
        "vanishing_cls": Sign("cls_loss", VANISHING_LOSS * ln_k, same_images, against_one_for_all),
        "vanishing_patches": Sign("patch_loss", VANISHING_LOSS * ln_k_patch, same_patches, against_one_for_all),
    }
    if n_images >= MIN_IMAGES:
        min_use = max(MIN_PROTOTYPE_USE, MIN_PROTOTYPES / min(N_GLOBAL_CROPS * n_images, k_cls))
        min_patch_use = max(MIN_PATCH_PROTOTYPE_USE, MIN_PROTOTYPES / k_patch)
        one_number, alike = "images differ in little more than one number", "all images have nearly the same features"
        few_kinds = "the teacher tells only a few kinds of {} apart"
        signs |= {
            "low_rank": Sign("effective_rank", MIN_EFFECTIVE_RANK, one_number, against_alike),
            "low_spread": Sign("feature_spread", MIN_FEATURE_SPREAD, alike, against_alike),
            "few_prototypes": Sign("prototype_use", min_use, few_kinds.format("images"), against_one_for_all),
            "few_patch_prototypes": Sign(
                "patch_prototype_use", min_patch_use, few_kinds.format("patches"), against_one_for_all
            ),
        }
    for sign in signs.values():
        sign.recovered = sign.limit * (1 + RECOVERY)
    signs["uniform_cls"].recovered = (UNIFORM_LOSS - RECOVERY_FROM_UNIFORM) * ln_k
    return signs


def _advice(cfg: Any) -> tuple[str, str, str]:
    """Say what to try against uniform predictions, one prototype for all, and features alike (docs/troubleshooting.md).

    What the run's settings already have is left out.
    """
    student, teacher, k, batch_size = cfg.student, cfg.teacher, cfg.dino.head_n_prototypes, _global_batch_size(cfg)
    base_lr, n_crops = f"optim.base_lr (now {cfg.optim.base_lr:g})", N_GLOBAL_CROPS * batch_size
    has_weights = bool(student.pretrained_weights or cfg.MODEL.WEIGHTS)
    larger_batch = f"a larger batch (now {batch_size} images a step)"
    from_scratch = []
    if not has_weights:
        from_scratch = ["a start from released weights (student.pretrained_weights)"]
        if student.layerscale is not None and 0 < student.layerscale < MUTING_LAYERSCALE:
            from_scratch += [f"student.layerscale=1.0 (at {student.layerscale:g} features are equal at the start)"]

    against_uniform = [larger_batch, *from_scratch]
    temperatures = (teacher.warmup_teacher_temp, teacher.teacher_temp)
    if max(temperatures) > SHARP_TEMPERATURE:
        against_uniform.append(
            "sharper targets: teacher.warmup_teacher_temp and teacher.teacher_temp down to "
            f"{SHARP_TEMPERATURE:g} (now {temperatures[0]:g} and {temperatures[1]:g})"
        )
    if k > n_crops:
        against_uniform.append(f"fewer prototypes (dino.head_n_prototypes={k} for {n_crops} crops a step)")
    if has_weights:
        against_uniform.append(f"another {base_lr}: too high a one undoes the weights it began with")
    else:
        small_recipe = "the recipe for small runs, configs/train/small_from_scratch.yaml"
        against_uniform += [f"a higher {base_lr} or more steps", small_recipe]

    against_one_for_all = [
        f"a lower {base_lr}",
        f"a teacher that follows more slowly (teacher.momentum_teacher={teacher.momentum_teacher:g} now)",
        f"softer targets (teacher.teacher_temp={teacher.teacher_temp:g} now)",
        larger_batch,
    ]
    if cfg.train.centering != "sinkhorn_knopp":
        against_one_for_all.insert(0, f"train.centering=sinkhorn_knopp (now {cfg.train.centering})")
    koleo = f"a higher dino.koleo_loss_weight (now {cfg.dino.koleo_loss_weight:g}), which pushes images apart"
    against_alike = [koleo, *from_scratch, f"a lower {base_lr}", "a look whether the images really differ"]
    return "; ".join(against_uniform), "; ".join(against_one_for_all), "; ".join(against_alike)


class StepProfile:
    """Profiles steps of a loop on the main process, into trace.json.gz and table.txt; 0 steps: nothing.

    Profiled steps take longer, and their numbers stay the same. Files that cannot be written cause a warning: the
    training continues.

    Args:
        folder: of trace.json.gz (for https://ui.perfetto.dev or chrome://tracing) and table.txt.
        n_steps: how many to profile, from the fourth one on.
        device: where the steps are computed.
    """

    def __init__(self, folder: Path, n_steps: int, device: torch.device) -> None:
        self.folder, self.n_steps, self.device = folder, n_steps, device
        self._profiler: profile | None = None
        if n_steps and is_main_process():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            phases = schedule(wait=PROFILE_WARM_UP - 1, warmup=1, active=n_steps, repeat=1)
            self._profiler = profile(
                activities=activities, schedule=phases, on_trace_ready=self._write, acc_events=True
            )

    def __enter__(self) -> "StepProfile":
        if self._profiler is not None:
            logger.info("profile: records %d steps after %d others", self.n_steps, PROFILE_WARM_UP)
            self._profiler.start()
        return self

    def step(self) -> None:
        """Mark the end of a step of the loop."""
        if self._profiler is not None:
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            n_done = self._profiler.step_num
            if n_done < PROFILE_WARM_UP + self.n_steps:
                text = "profile: the training ended after %d steps, so %d of %d were recorded"
                logger.warning(text, n_done, max(0, n_done - PROFILE_WARM_UP), self.n_steps)

    def _write(self, profiler: profile) -> None:
        n_recorded = profiler.step_num - PROFILE_WARM_UP
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
            kind = "device" if self.device.type == "cuda" else "cpu"
            orders = (f"{kind}_time_total", f"self_{kind}_time_total")  # the stages first, then single operators
            tables = [profiler.key_averages().table(sort_by=order, row_limit=-1) for order in orders]
            title = f"{n_recorded} steps on {self.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            (self.folder / "table.txt").write_text("\n\n".join([title, *tables]), encoding="utf-8")
        except OSError as error:
            logger.warning("profile: %s could not be written: %s", self.folder, error)
            return
        logger.info("profile of %d steps: %s", n_recorded, self.folder)
