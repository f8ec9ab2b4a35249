"""Early signs of a collapse: statistics of a step on its device, and a monitor that warns with what to try.

Dimension key:  N feature vectors, D embedding dim, R rows of targets, K prototypes
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data.augmentations import N_GLOBAL_CROPS

logger = logging.getLogger("dinov2")

# The limits lie between runs of a six-block ViT on 1,323 blood cells with a batch of 32, for up to 300 iterations from
# random weights. "Learns" is small_from_scratch.yaml (it ends at 0.69 of ln K); "uniform" and "one for all" are
# DinoBloom's recipe at this size in several settings, with Sinkhorn-Knopp and with softmax centering. Once under way:
#
#                              learns          uniform          one for all
#   CLS loss / ln K            0.90 to 0.80    0.997 to 1.01    0.5 to 0.85
#   patch loss / ln K          0.93 to 0.84    0.82 to 0.99     0.4, elsewhere seen to fall to 0.02
#   effective rank             4.7 to 6.5      1.5 to 9         7 to 8
#   feature spread             0.86 to 0.89    0.2 to 0.95      0.9
#   prototype use, CLS         0.91            0.3 to 0.7       0.03 to 0.06
#   prototype use, patches     0.73            0.5 to 0.85      0.06 to 0.1
#
# No number shows every collapse: KoLeo keeps features apart while predictions are uniform, and only the CLS loss tells.
# This near ln K, or above, it is that of uniform predictions; whatever learned was 0.03 below ln K by iteration 100.
UNIFORM_LOSS = 0.99
# Of ln K. What learns ends far above (0.69 CLS and 0.70 patches after 1,200 steps); a teacher that gives everything the
# same few prototypes is predicted without looking, and the loss falls on towards 0.
VANISHING_LOSS = 0.1
# Four fifths of the variance along one direction. An untrained network has 1.1 (layer scale 1e-5) to 1.9 (1.0).
MIN_EFFECTIVE_RANK = 1.5
# A mean cosine of 0.99 between pictures. An untrained network has 0.0004 (layer scale 1e-5) to 0.5 (1.0).
MIN_FEATURE_SPREAD = 0.1
# Of the CLS tokens of a step, each of which could have a prototype of its own. The two views of a picture are meant to
# share one, and so are pictures of a kind: hence far below what the run that learns has.
MIN_PROTOTYPE_USE = 0.1
# Patches are thousands a step and repeat (background, cytoplasm): with 65,536 prototypes they may well share more.
MIN_PATCH_PROTOTYPE_USE = 0.05
# Where the limit above is not even one prototype: one for all is too few, and two can be as many as there should be.
ALWAYS_TOO_FEW_PROTOTYPES = 1.5
# Views of fewer pictures span too few directions and prototypes for these statistics to say anything.
MIN_PICTURES = 8
# A sign is over when its mean is this much better than the limit, so that noise does not repeat a warning: of ln K for
# the loss at ln K, of the limit for the others.
RECOVERY_FROM_UNIFORM, RECOVERY = 0.01, 0.25

# Below this, blocks add so little to an untrained network that its features of all pictures are equal to four digits.
MUTING_LAYERSCALE = 0.1
# The teacher temperature at which a small run leaves ln K (configs/train/small_from_scratch.yaml).
SHARP_TEMPERATURE = 0.02

# An untrained network looks collapsed: features nearly equal, losses at ln K. It is given the lr warm-up, but at least
# a tenth and at most a quarter of the run, ...
SHORTEST_STARTUP, LONGEST_STARTUP = 0.1, 0.25
# ... 100 iterations, by when every run that learned had left ln K, even with a batch of 32, ...
MIN_STARTUP_ITERATIONS = 100
# ... and not more than 20,000: at a second each on eight GPUs, that is two GPU-days.
MAX_STARTUP_ITERATIONS = 20_000

# Means are over a fiftieth of the run, as a single step's CLS loss scatters by more than UNIFORM_LOSS leaves room for;
# of a short run 20 iterations, and never so many that a warning waits for hours.
WINDOW = 0.02
MIN_WINDOW_ITERATIONS, MAX_WINDOW_ITERATIONS = 20, 500
MIN_VALUES = 5  # a statistic that is not there, or not finite, in most rows is waited for beyond the window


@torch.no_grad()
def feature_statistics(cls_tokens: Tensor) -> dict[str, Tensor]:
    """How far features [N, D] are from being all alike; 0-d float32 on their device, for which nothing waits.

    Returns:
        effective_rank: (sum_i l_i)^2 / sum_i l_i^2 of the eigenvalues l of the features' covariance (the participation
            ratio): n if n directions share the variance equally, at most min(N - 1, D); at most 1 if all
            features are equal.
        feature_spread: sqrt(D) times the mean over dimensions of the standard deviation of the features, each scaled
            to length 1: 1 if they are uniform on the sphere, 0 if all are equal (SimSiam, Chen & He 2021,
            arXiv 2011.10566).
    """
    with torch.autocast(cls_tokens.device.type, enabled=False):
        features = cls_tokens.float()
        tiny = torch.finfo(torch.float32).tiny
        centred = features - features.mean(dim=0)
        # the ratio has no scale, but its fourth powers would leave the range of float32
        centred = centred / centred.abs().amax().clamp(min=tiny)
        n, dim = centred.shape
        # both products have the covariance's eigenvalues; their trace is the sum, their squared entries add up to that
        # of the squares
        gram = centred @ centred.T if n < dim else centred.T @ centred
        effective_rank = gram.trace().square() / gram.square().sum().clamp(min=tiny)
        spread = math.sqrt(dim) * F.normalize(features, dim=1).std(dim=0, correction=0).mean()
    return {"effective_rank": effective_rank, "feature_spread": spread}


@torch.no_grad()
def prototype_use(choices: Tensor, n_prototypes: int) -> Tensor:
    """Share of K prototypes in use: those that some row has as its largest, over min(R, K).

    Args:
        choices: int64 [R], each row's largest.
        n_prototypes: K.

    Returns:
        0-d float32 on the choices' device, for which nothing waits; NaN if R is 0.
    """
    n_rows = len(choices)
    if n_rows == 0:
        return torch.full((), math.nan, device=choices.device)
    is_used = torch.zeros(n_prototypes, device=choices.device)
    is_used.scatter_(0, choices, 1.0)
    return is_used.sum() / min(n_rows, n_prototypes)


@dataclass(frozen=True)
class _Sign:
    """One sign of a collapse: a mean beyond a limit."""

    measure: str
    shown_as: str
    limit: float
    is_ceiling: bool  # the sign is a mean at or above the limit; otherwise one at or below
    recovered: float  # and it is over beyond this value, on the good side of the limit
    basis: str  # what the limit is, in words
    meaning: str
    advice: list[str]

    def is_seen(self, mean: float) -> bool:
        return mean >= self.limit if self.is_ceiling else mean <= self.limit

    def is_over(self, mean: float) -> bool:
        return mean < self.recovered if self.is_ceiling else mean > self.recovered

    def text(self, mean: float, first: int, last: int) -> str:
        return (
            f"collapse? {self.shown_as} is {mean:.4g}, {'not below' if self.is_ceiling else 'not above'} "
            f"{self.limit:.4g} ({self.basis}), as the mean of iterations {first} to {last}: {self.meaning}. "
            f"What to try: {'; '.join(self.advice)}"
        )


@dataclass
class _Mean:
    """The mean of one measure's finite values over some rows."""

    total: float = 0.0
    n_values: int = 0
    n_rows: int = 0
    first: int = 0  # iteration of the first row

    def add(self, iteration: int, value: float) -> None:
        if self.n_rows == 0:
            self.first = iteration
        self.n_rows += 1
        if math.isfinite(value):
            self.total += value
            self.n_values += 1


class CollapseMonitor:
    """Follows the numbers of a run, and warns once of each sign of a collapse; again only after it had gone.

    Nothing is judged in the start-up phase; then each number is, as the mean of `window` iterations in turn.
    """

    def __init__(self, cfg: Any, n_iterations: int) -> None:
        """
        Args:
            cfg: the run's merged configuration.
            n_iterations: how many the run has in all.
        """
        self.startup = _startup(cfg, n_iterations)
        self.window = round(min(max(WINDOW * n_iterations, MIN_WINDOW_ITERATIONS), MAX_WINDOW_ITERATIONS))
        self._n_local_crops = int(cfg.crops.local_crops_number)
        self._masked_share = _masked_share(cfg)
        self._signs = _signs(cfg)
        self._means = {sign.measure: _Mean() for sign in self._signs.values()}
        self._is_warned = dict.fromkeys(self._signs, False)

    def check(self, rows: Sequence[Mapping[str, float]]) -> list[str]:
        """Take up the newest rows; returns the warnings that follow from them, which are logged as well.

        Args:
            rows: in order, each with its `iteration` and what there is of the losses, as they are shown
                (`SSLMetaArch.losses`), and of `effective_rank`, `feature_spread`, `prototype_use` and
                `patch_prototype_use`; what is not finite is passed over.
        """
        texts = []
        for row in rows:
            iteration = int(row["iteration"])
            if iteration < self.startup:
                continue
            values = self._measures(row)
            for measure, mean in self._means.items():
                mean.add(iteration, values[measure])
                if mean.n_rows >= self.window and mean.n_values >= MIN_VALUES:
                    texts += self._judge(measure, mean, iteration)
                    self._means[measure] = _Mean()
        for text in texts:
            logger.warning("%s", text)
        return texts

    def _measures(self, row: Mapping[str, float]) -> dict[str, float]:
        """What is judged, from what is shown: both losses as mean cross-entropies in nats, so that ln K is uniform."""
        # The log shares one mean over 2 + 2L terms between the two: L / (1 + L) of it local, 1 / (1 + L) global
        cls_loss = row.get("dino_global_crops_loss", math.nan)
        if self._n_local_crops > 0:
            cls_loss += row.get("dino_local_crops_loss", math.nan)
        # The log shows half of a mean over all crops, to which those without a mask add nothing. Exactly 0 is not a
        # loss: then no patch was masked.
        patch_loss = row.get("ibot_loss", math.nan)
        is_loss = self._masked_share > 0 and patch_loss != 0
        return {
            "cls_loss": cls_loss,
            "patch_loss": 2 * patch_loss / self._masked_share if is_loss else math.nan,
            **{
                name: row.get(name, math.nan)
                for name in ("effective_rank", "feature_spread", "prototype_use", "patch_prototype_use")
            },
        }

    def _judge(self, measure: str, over: _Mean, last: int) -> list[str]:
        mean, texts = over.total / over.n_values, []
        for name, sign in self._signs.items():
            if sign.measure != measure:
                continue
            if sign.is_seen(mean) and not self._is_warned[name]:
                self._is_warned[name] = True
                texts.append(sign.text(mean, over.first, last))
            elif sign.is_over(mean) and self._is_warned[name]:
                self._is_warned[name] = False
                logger.info("%s has recovered: %.4g in iterations %d to %d", sign.shown_as, mean, over.first, last)
        return texts

    def signs_seen(self) -> list[str]:
        """Return the signs that were warned of and have not gone."""
        return [name for name, is_warned in self._is_warned.items() if is_warned]

    def state_dict(self) -> dict[str, float]:
        """Plain numbers by name; a monitor that takes them up warns as this one would have."""
        means = {f"{name}/{key}": value for name, mean in self._means.items() for key, value in asdict(mean).items()}
        return {**means, **{f"{name}/is_warned": int(value) for name, value in self._is_warned.items()}}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`; what it has no numbers of starts anew."""
        for name in self._means:
            self._means[name] = _Mean(
                total=float(state.get(f"{name}/total", 0.0)),
                **{key: int(state.get(f"{name}/{key}", 0)) for key in ("n_values", "n_rows", "first")},
            )
        self._is_warned = {name: bool(state.get(f"{name}/is_warned", False)) for name in self._signs}


def _startup(cfg: Any, n_iterations: int) -> int:
    """The first iteration that is judged."""
    warmup = cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    startup = min(max(warmup, SHORTEST_STARTUP * n_iterations), LONGEST_STARTUP * n_iterations)
    return round(min(max(startup, MIN_STARTUP_ITERATIONS), MAX_STARTUP_ITERATIONS))


def _masked_share(cfg: Any) -> float:
    """Share of the global crops that get a mask: of a whole batch, as `draw_masks` draws them."""
    n_crops, share = N_GLOBAL_CROPS * _global_batch_size(cfg), cfg.ibot.mask_sample_probability
    return int(n_crops * share) / n_crops


def _global_batch_size(cfg: Any) -> int:
    return int(cfg.train.global_batch_size or cfg.train.batch_size_per_gpu)


def _signs(cfg: Any) -> dict[str, _Sign]:
    """The signs of a collapse in a run of this configuration, by name."""
    k_cls = int(cfg.dino.head_n_prototypes)
    k_patch = int(cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else k_cls)
    uniform, uniform_patch = math.log(k_cls), math.log(k_patch)
    same_for_all = "the teacher gives nearly all of them the same few prototypes, which needs no look at the picture"
    signs = {
        "uniform_cls": _Sign(
            measure="cls_loss",
            shown_as="the CLS loss (global and local crops together)",
            limit=UNIFORM_LOSS * uniform,
            is_ceiling=True,
            recovered=(UNIFORM_LOSS - RECOVERY_FROM_UNIFORM) * uniform,
            basis=f"uniform predictions give ln {k_cls} = {uniform:.4g}",
            meaning="the student predicts every prototype alike whatever the picture, as the targets hardly differ "
            "between pictures either, and does not learn to tell them apart",
            advice=_against_uniform(cfg),
        ),
        "vanishing_cls": _floor(
            "cls_loss",
            "the CLS loss (global and local crops together)",
            VANISHING_LOSS * uniform,
            f"uniform predictions give ln {k_cls} = {uniform:.4g}",
            f"pictures have collapsed: {same_for_all}",
            _against_one_for_all(cfg),
        ),
        "vanishing_patches": _floor(
            "patch_loss",
            "the patch loss (per masked crop: the log shows half of its mean over all crops)",
            VANISHING_LOSS * uniform_patch,
            f"uniform predictions give ln {k_patch} = {uniform_patch:.4g}",
            f"patches have collapsed: {same_for_all}",
            _against_one_for_all(cfg),
        ),
    }
    n_pictures = cfg.train.batch_size_per_gpu * (cfg.train.accumulation_steps or 1)
    if n_pictures < MIN_PICTURES:
        return signs
    n_cls_tokens = N_GLOBAL_CROPS * n_pictures
    return {
        **signs,
        "low_rank": _floor(
            "effective_rank",
            "the effective rank of the teacher's CLS tokens",
            MIN_EFFECTIVE_RANK,
            "four fifths of the variance along one direction",
            "pictures differ in little more than one number",
            _against_equal_features(cfg),
        ),
        "low_spread": _floor(
            "feature_spread",
            "the spread of the teacher's CLS tokens",
            MIN_FEATURE_SPREAD,
            "0: all equal, 1: uniform on the sphere",
            "all pictures have nearly the same features",
            _against_equal_features(cfg),
        ),
        "few_prototypes": _floor(
            "prototype_use",
            "the share of prototypes that are the first choice of a picture",
            max(MIN_PROTOTYPE_USE, ALWAYS_TOO_FEW_PROTOTYPES / min(n_cls_tokens, k_cls)),
            f"1: {min(n_cls_tokens, k_cls)} different ones a step",
            "the teacher tells only a few kinds of pictures apart",
            _against_one_for_all(cfg),
        ),
        "few_patch_prototypes": _floor(
            "patch_prototype_use",
            "the share of prototypes that are the first choice of a masked patch",
            max(MIN_PATCH_PROTOTYPE_USE, ALWAYS_TOO_FEW_PROTOTYPES / k_patch),
            f"1: each of {k_patch}, or as many as there are masked patches in a step",
            "the teacher tells only a few kinds of patches apart",
            _against_one_for_all(cfg),
        ),
    }


def _floor(measure: str, shown_as: str, limit: float, basis: str, meaning: str, advice: list[str]) -> _Sign:
    return _Sign(measure, shown_as, limit, False, limit * (1 + RECOVERY), basis, meaning, advice)


def _against_uniform(cfg: Any) -> list[str]:
    """Make differences between pictures larger, or let them grow faster (docs/benchmarks/from_scratch.md)."""
    teacher, batch_size, k = cfg.teacher, _global_batch_size(cfg), cfg.dino.head_n_prototypes
    advice = []
    if _is_muted(cfg):
        advice.append(
            f"student.layerscale=1.0 (at {cfg.student.layerscale:g} an untrained network hardly sees a picture)"
        )
    if max(teacher.warmup_teacher_temp, teacher.teacher_temp) > SHARP_TEMPERATURE:
        advice.append(
            f"sharper targets: teacher.warmup_teacher_temp and teacher.teacher_temp down to {SHARP_TEMPERATURE:g} (now "
            f"{teacher.warmup_teacher_temp:g} and {teacher.teacher_temp:g})"
        )
    advice.append(f"a larger batch (now {batch_size} pictures a step)")
    if k > N_GLOBAL_CROPS * batch_size:
        advice.append(f"fewer prototypes (dino.head_n_prototypes={k} for {N_GLOBAL_CROPS * batch_size} crops a step)")
    if _starts_from_weights(cfg):
        advice.append(
            f"another optim.base_lr (now {cfg.optim.base_lr:g}): too high a one undoes the weights it began with"
        )
    else:
        advice += [
            f"a higher optim.base_lr (now {cfg.optim.base_lr:g}) or more steps",
            "a start from released weights (student.pretrained_weights)",
            "the recipe for small runs, configs/train/small_from_scratch.yaml",
        ]
    return advice


def _against_one_for_all(cfg: Any) -> list[str]:
    """Spread the targets over prototypes again."""
    advice = []
    if cfg.train.centering != "sinkhorn_knopp":
        advice.append(f"train.centering=sinkhorn_knopp (now {cfg.train.centering}), which fills all prototypes alike")
    return [
        *advice,
        f"a lower optim.base_lr (now {cfg.optim.base_lr:g})",
        f"a teacher that follows more slowly (teacher.momentum_teacher={cfg.teacher.momentum_teacher:g} now)",
        f"softer targets (teacher.teacher_temp={cfg.teacher.teacher_temp:g} now)",
        f"a larger batch (now {_global_batch_size(cfg)} pictures a step)",
    ]


def _against_equal_features(cfg: Any) -> list[str]:
    """Push features apart, or start where they differ."""
    advice = [f"a higher dino.koleo_loss_weight (now {cfg.dino.koleo_loss_weight:g}), which pushes pictures apart"]
    if _is_muted(cfg):
        advice.append(
            f"student.layerscale=1.0 (now {cfg.student.layerscale:g}: features of an untrained network are equal)"
        )
    if not _starts_from_weights(cfg):
        advice.append("a start from released weights (student.pretrained_weights)")
    return [*advice, f"a lower optim.base_lr (now {cfg.optim.base_lr:g})", "a look whether the pictures really differ"]


def _starts_from_weights(cfg: Any) -> bool:
    return bool(cfg.student.pretrained_weights or cfg.MODEL.WEIGHTS)


def _is_muted(cfg: Any) -> bool:
    """Whether the run starts from blocks that add next to nothing."""
    layerscale = cfg.student.layerscale
    return not _starts_from_weights(cfg) and layerscale is not None and 0 < layerscale < MUTING_LAYERSCALE
