"""Warn of signs of a collapse during training, with advice, and profile steps.

Dimension key:  N feature vectors, D embedding dim, R rows of targets, K prototypes
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from dinov2.data.augmentations import N_GLOBAL_CROPS
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

# Limits between runs that learned and runs that collapsed (docs/benchmarks/from_scratch.md). No single measure shows
# every collapse: KoLeo keeps features apart while predictions are uniform, which only the CLS loss shows.
UNIFORM_LOSS = 0.99  # share of ln K, the loss of uniform predictions
VANISHING_LOSS = 0.1  # share of ln K: if all images have the same few prototypes, they are predicted without looking
MIN_EFFECTIVE_RANK = 1.5  # four fifths of the variance along one direction; an untrained network has 1.1 to 1.9
MIN_FEATURE_SPREAD = 0.1  # a mean cosine of 0.99 between images; an untrained network has 0.0004 to 0.5
MIN_PROTOTYPE_USE = 0.1  # far below a run that learns, though views and similar images share prototypes
MIN_PATCH_PROTOTYPE_USE = 0.05  # thousands of patches a step repeat (background, cytoplasm)
MIN_PROTOTYPES = 1.5  # a single prototype is too few, whatever share of K it is
MIN_IMAGES = 8  # fewer images span too few directions and prototypes to be checked
# A sign ends when its mean is this much better than the limit, so that noise does not repeat a warning
RECOVERY_FROM_UNIFORM, RECOVERY = 0.01, 0.25  # share of ln K for UNIFORM_LOSS, of the limit for the others
SHARP_TEMPERATURE = 0.02  # of the teacher; with it, small runs leave ln K
# An untrained network looks collapsed: nothing is checked in the lr warm-up, limited to a tenth to a quarter of the run
SHORTEST_STARTUP, LONGEST_STARTUP = 0.1, 0.25
MIN_STARTUP_ITERATIONS, MAX_STARTUP_ITERATIONS = 100, 20_000
# Means are over a fiftieth of the run: a single step's CLS loss is noisier than 1 - UNIFORM_LOSS
WINDOW = 0.02
MIN_WINDOW_ITERATIONS, MAX_WINDOW_ITERATIONS = 20, 500
MIN_VALUES = 5  # a mean of fewer finite values is not checked, but for a measure of thousands of patches
LABELS = {
    "cls_loss": "the CLS loss (global and local crops together)",
    "patch_loss": "the patch loss (per masked crop: the log shows half of its mean over all crops)",
    "effective_rank": "the effective rank of the CLS tokens",  # the teacher's, if a loss uses it, else the student's
    "feature_spread": "the spread of the CLS tokens",
    "prototype_use": "the share of prototypes that are the first choice of an image",
    "patch_prototype_use": "the share of prototypes that are the first choice of a masked patch",
}
PROFILE_WARM_UP = 3  # steps before the first profiled one: they select kernels and compile


@torch.no_grad()
def feature_statistics(cls_tokens: Tensor) -> dict[str, Tensor]:
    """Measure how much features [N, D] differ, as 0-d float32 tensors on their device.

    Returns:
        effective_rank: (sum_i l_i)^2 / sum_i l_i^2 of the eigenvalues l of the features' covariance (the participation
            ratio): n if n directions share the variance equally, at most 1 if all features are equal.
        feature_spread: sqrt(D) times the mean over dimensions of the standard deviation of the features, scaled to
            unit length: 1 if they are uniform on the sphere, 0 if they are equal (SimSiam, Chen & He 2021,
            arXiv 2011.10566).
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        features = cls_tokens.float()
        tiny = torch.finfo(torch.float32).tiny
        centred = features - features.mean(dim=0)
        centred = centred / centred.abs().amax().clamp(min=tiny)  # else fourth powers leave the range of float32
        n, dim = centred.shape
        gram = centred @ centred.T if n < dim else centred.T @ centred  # both have the covariance's eigenvalues
        effective_rank = gram.trace().square() / gram.square().sum().clamp(min=tiny)
        spread = math.sqrt(dim) * F.normalize(features, dim=1).std(dim=0, correction=0).mean()
    return {"effective_rank": effective_rank, "feature_spread": spread}


@torch.no_grad()
def prototype_use(choices: Tensor, n_prototypes: int) -> Tensor:
    """Compute the share of prototypes among the first choices [R], out of min(R, K); NaN if R is 0."""
    if len(choices) == 0:
        return torch.full((), math.nan, device=choices.device)
    is_used = torch.zeros(n_prototypes, device=choices.device)
    is_used.scatter_(0, choices, 1.0)
    return is_used.sum() / min(len(choices), n_prototypes)


class Sign(NamedTuple):
    """A sign of a collapse: the mean of a measure over a window of iterations crosses a limit."""

    measure: str  # a key of LABELS
    limit: float  # a mean above it is the sign if `recovered` is lower, else a mean below it
    recovered: float  # the sign ends when the mean crosses this value
    meaning: str
    advice: str
    min_values: int = MIN_VALUES


class CollapseMonitor:
    """Warns once of each sign of a collapse, and again only after it has recovered.

    Nothing is checked in the start-up phase. Then each measure is checked as its mean over consecutive windows.
    """

    def __init__(self, cfg: Any, n_iterations: int) -> None:
        warmup = cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
        startup = min(max(warmup, SHORTEST_STARTUP * n_iterations), LONGEST_STARTUP * n_iterations)
        self.startup = round(min(max(startup, MIN_STARTUP_ITERATIONS), MAX_STARTUP_ITERATIONS))
        self.window = round(min(max(WINDOW * n_iterations, MIN_WINDOW_ITERATIONS), MAX_WINDOW_ITERATIONS))
        self._has_local_crops = cfg.crops.local_crops_number > 0
        n_crops = N_GLOBAL_CROPS * (cfg.train.global_batch_size or cfg.train.batch_size_per_gpu)
        self._masked_share = int(n_crops * cfg.ibot.mask_sample_probability) / n_crops  # of the global crops
        self._signs = _signs(cfg)
        # "<sign>": 1 if it holds; and of the present window "first", "n_rows", "<measure>/total" and "<measure>/n"
        self._state = defaultdict[str, float](float)

    def check(self, rows: Sequence[Mapping[str, float]]) -> list[str]:
        """Add the newest rows; log and return the warnings that they cause."""
        texts = []
        for row in rows:
            iteration = int(row["iteration"])
            if iteration < self.startup:
                continue
            if not self._state["n_rows"]:
                self._state["first"] = iteration
            self._state["n_rows"] += 1
            for measure, value in self._measures(row).items():
                if math.isfinite(value):
                    self._state[f"{measure}/total"] += value
                    self._state[f"{measure}/n"] += 1
            if self._state["n_rows"] >= self.window:
                texts += self._end_window(iteration)
        for text in texts:
            logger.warning("%s", text)
        return texts

    def _end_window(self, last: int) -> list[str]:
        """Return the warnings of this window, and start a new window."""
        texts, state = [], self._state
        self._state = defaultdict(float, {name: state[name] for name in self.signs_seen()})
        for name, sign in self._signs.items():
            if state[f"{sign.measure}/n"] < sign.min_values:
                continue
            label, mean = LABELS[sign.measure], state[f"{sign.measure}/total"] / state[f"{sign.measure}/n"]
            is_ceiling, held = sign.recovered < sign.limit, bool(self._state[name])
            bound = sign.recovered if held else sign.limit
            holds = mean >= bound if is_ceiling else mean <= bound
            self._state[name] = int(holds)
            if held and not holds:
                logger.info("%s has recovered: %.4g in iterations %d to %d", label, mean, state["first"], last)
            elif holds and not held:
                texts.append(
                    f"collapse? {label} is {mean:.4g}, not {'below' if is_ceiling else 'above'} {sign.limit:.4g}, as "
                    f"the mean of iterations {state['first']:.0f} to {last}: {sign.meaning}. What to try: {sign.advice}"
                )
        return texts

    def _measures(self, row: Mapping[str, float]) -> dict[str, float]:
        """Compute the measures of a row; losses become mean cross-entropies in nats: ln K for uniform predictions."""
        # The log splits one mean over 2 + 2L terms into a global and a local part
        cls_loss = row.get("dino_global_crops_loss", math.nan)
        if self._has_local_crops:
            cls_loss += row.get("dino_local_crops_loss", math.nan)
        # The log has half of a mean over all crops, in which crops without a mask count as 0. A value of exactly 0
        # means that no patch was masked.
        patch_loss = row.get("ibot_loss", math.nan)
        is_loss = self._masked_share > 0 and patch_loss != 0
        return {
            **{name: row.get(name, math.nan) for name in LABELS},
            "cls_loss": cls_loss,
            "patch_loss": 2 * patch_loss / self._masked_share if is_loss else math.nan,
        }

    def signs_seen(self) -> list[str]:
        """Return the names of the signs that hold now."""
        return [name for name in self._signs if self._state[name]]

    def state_dict(self) -> dict[str, float]:
        """Return the state as plain numbers by name."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state`; missing entries start at 0."""
        self._state = defaultdict(float, state)


def _signs(cfg: Any) -> dict[str, Sign]:
    """Return the signs of a collapse in a run of this configuration, by name."""
    k_cls = int(cfg.dino.head_n_prototypes)
    k_patch = int(cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else k_cls)
    ln_k, ln_k_patch = math.log(k_cls), math.log(k_patch)
    n_images = cfg.train.batch_size_per_gpu * (cfg.train.accumulation_steps or 1)
    against_uniform, against_one_for_all, against_alike = _advice(cfg)

    def floor(measure: str, limit: float, meaning: str, advice: str, min_values: int = MIN_VALUES) -> Sign:
        return Sign(measure, limit, limit * (1 + RECOVERY), meaning, advice, min_values)

    uniform = (
        f"uniform predictions give ln {k_cls} = {ln_k:.4g}; the targets hardly differ between images, and the student "
        "does not learn to tell them apart"
    )
    vanishing = (
        "the teacher gives nearly all {} the same few prototypes, whatever they show (uniform predictions give "
        "ln {} = {:.4g})"
    )
    images, patches = vanishing.format("images", k_cls, ln_k), vanishing.format("patches", k_patch, ln_k_patch)
    recovered = (UNIFORM_LOSS - RECOVERY_FROM_UNIFORM) * ln_k
    signs = {
        "uniform_cls": Sign("cls_loss", UNIFORM_LOSS * ln_k, recovered, uniform, against_uniform),
        "vanishing_cls": floor("cls_loss", VANISHING_LOSS * ln_k, images, against_one_for_all),
        "vanishing_patches": floor("patch_loss", VANISHING_LOSS * ln_k_patch, patches, against_one_for_all),
    }
    if n_images < MIN_IMAGES:
        return signs
    one_number, alike = "images differ in little more than one number", "all images have nearly the same features"
    few = "the teacher distinguishes only a few kinds of "
    min_use = max(MIN_PROTOTYPE_USE, MIN_PROTOTYPES / min(N_GLOBAL_CROPS * n_images, k_cls))
    min_patch_use = max(MIN_PATCH_PROTOTYPE_USE, MIN_PROTOTYPES / k_patch)
    return signs | {
        "low_rank": floor("effective_rank", MIN_EFFECTIVE_RANK, one_number, against_alike),
        "low_spread": floor("feature_spread", MIN_FEATURE_SPREAD, alike, against_alike),
        "few_prototypes": floor("prototype_use", min_use, f"{few}images", against_one_for_all),
        "few_patch_prototypes": floor("patch_prototype_use", min_patch_use, f"{few}patches", against_one_for_all, 1),
    }


def _advice(cfg: Any) -> tuple[str, str, str]:
    """Return advice against uniform predictions, one prototype for all, and equal features (docs/troubleshooting.md).

    Each setting is given with its present value.
    """
    teacher, batch_size = cfg.teacher, cfg.train.global_batch_size or cfg.train.batch_size_per_gpu
    base_lr = f"optim.base_lr (now {cfg.optim.base_lr:g})"
    larger_batch = f"a larger batch (now {batch_size} images a step)"
    if cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS:
        start = f"another {base_lr}: too high a one undoes the weights that it started from"
    else:
        start = (
            f"released weights (student.pretrained_weights); student.layerscale=1.0 (now {cfg.student.layerscale}); a "
            f"higher {base_lr} or more steps; the recipe for small runs, configs/train/small_from_scratch.yaml"
        )
    against_uniform = (
        f"{larger_batch}; {start}; sharper targets: teacher.warmup_teacher_temp and teacher.teacher_temp down to "
        f"{SHARP_TEMPERATURE:g} (now {teacher.warmup_teacher_temp:g} and {teacher.teacher_temp:g}); fewer prototypes "
        f"(dino.head_n_prototypes={cfg.dino.head_n_prototypes} for {N_GLOBAL_CROPS * batch_size} crops a step)"
    )
    against_one_for_all = (
        f"train.centering=sinkhorn_knopp (now {cfg.train.centering}); a lower {base_lr}; a teacher that follows more "
        f"slowly (teacher.momentum_teacher={teacher.momentum_teacher:g} now); softer targets "
        f"(teacher.teacher_temp={teacher.teacher_temp:g} now); {larger_batch}"
    )
    spreading = "lejepa.sigreg_weight" if cfg.lejepa.loss_weight > 0 else "dino.koleo_loss_weight"
    against_alike = (
        f"a higher {spreading} (now {OmegaConf.select(cfg, spreading):g}), which pushes images apart; {start}; "
        "a check whether the images really differ"
    )
    return against_uniform, against_one_for_all, against_alike


@contextmanager
def profiled_steps(folder: Path, n_steps: int, device: torch.device) -> Iterator[Callable[[], None]]:
    """Profile steps of a loop on the main process; yield the function to call at the end of each step.

    Profiled steps take longer; their losses stay the same. If the files cannot be written, a warning says so and the
    training continues.
    """
    if not n_steps or not is_main_process():
        yield lambda: None
        return
    logger.info("profile: recording %d steps after %d others", n_steps, PROFILE_WARM_UP)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])],
        schedule=schedule(wait=PROFILE_WARM_UP - 1, warmup=1, active=n_steps, repeat=1),
        on_trace_ready=lambda profiler: _write_profile(profiler, folder, device),
        acc_events=True,
    ) as profiler:
        yield profiler.step
    if (n_done := profiler.step_num) < PROFILE_WARM_UP + n_steps:
        text = "profile: the training ended after %d steps, so %d of %d were recorded"
        logger.warning(text, n_done, max(0, n_done - PROFILE_WARM_UP), n_steps)


def _write_profile(profiler: profile, folder: Path, device: torch.device) -> None:
    n_recorded = profiler.step_num - PROFILE_WARM_UP
    try:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        kind = "device" if device.type == "cuda" else "cpu"
        orders = (f"{kind}_time_total", f"self_{kind}_time_total")  # the stages first, then single operators
        tables = [profiler.key_averages().table(sort_by=order, row_limit=-1) for order in orders]
        title = f"{n_recorded} steps on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        (folder / "table.txt").write_text("\n\n".join([title, *tables]), encoding="utf-8")
    except OSError as error:
        logger.warning("profile: %s could not be written: %s", folder, error)
        return
    logger.info("profile of %d steps: %s", n_recorded, folder)
