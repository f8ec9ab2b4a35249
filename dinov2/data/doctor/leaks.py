"""Everything that is wrong with a set of lists, from arrays of what was seen, and what a clean list leaves out.

Letters: E entries, N pictures, K findings of a kind.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from dinov2.data.doctor.duplicates import same_bytes
from dinov2.data.doctor.inputs import EVALUATION, LABELS, TRAINING, Inputs, first_of_equal
from dinov2.data.doctor.scan import FORMATS, MISSING, MODES, READABLE, TRUNCATED, UNREADABLE, Scan

TINY_PX = 16
ODD_FACTOR = 3.0  # from the data set's median size
LONG_ASPECT = 3.0
FORMAT_OF_SUFFIX = {
    **{".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP"},
    **{".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP", ".gif": "GIF", ".jp2": "JPEG2000"},
}


class Kind(NamedTuple):
    """A kind of finding; a fault makes the command end with 1."""

    title: str
    is_fault: bool
    advice: str


KINDS = {
    "missing": Kind("missing files", True, "correct the paths; relative ones count from the list's own folder"),
    "unreadable": Kind("unreadable pictures", True, "get them again from their origin, or use the cleaned lists"),
    "truncated": Kind("truncated pictures", True, "copy or download them again, or use the cleaned lists"),
    "empty_value": Kind("rows without a path, label or patient", True, "fill them in, or use the cleaned tables"),
    "bad_name": Kind("names that no list can hold", True, "rename the files: UTF-8, no line break"),
    "same_path": Kind("pictures named twice", True, "they count double in training; use the cleaned lists"),
    "same_bytes": Kind("byte-identical pictures", True, "keep one of each; the cleaned lists do"),
    "two_labels": Kind("one picture under two labels", True, "ask who labelled them; the cleaned lists have neither"),
    "leak_path": Kind("evaluation pictures in training", True, "the cleaned training lists leave them out"),
    "leak_bytes": Kind("copies of evaluation pictures in training", True, "the cleaned training lists leave them out"),
    "leak_patient": Kind("evaluation patients in training", True, "the cleaned training lists leave them out"),
    "leak_near": Kind(
        "near-duplicates of evaluation pictures in training",
        True,
        "look at them; --drop-near-duplicates leaves them out",
    ),
    "two_labels_near": Kind(
        "near-duplicates under two labels", True, "look at them; --drop-near-duplicates leaves both out"
    ),
    "near_duplicate": Kind("near-duplicates", False, "look at them; --drop-near-duplicates keeps one of each"),
    "wrong_format": Kind(
        "pictures of another format than their name says", False, "rename them; they are read all the same"
    ),
    "odd_size": Kind("odd sizes", False, f"look at them: under {TINY_PX} px, long and thin, or far from the median"),
    "blank": Kind(
        "even pictures, without anything to see", False, "look at them; no near-duplicates of them are searched"
    ),
    "mode": Kind("pictures that are not plain RGB", False, "nothing needs doing: all are read as RGB"),
    "hidden": Kind("hidden pictures", False, "readers of folders leave them out, and so do the cleaned lists"),
}

DROPS = (
    "",
    "unreadable",
    "hidden",
    "named twice",
    "same bytes",
    "two labels",
    "in an evaluation split",
    "near-duplicate",
)
_UNREADABLE, _HIDDEN, _TWICE, _BYTES, _LABELS, _LEAK, _NEAR = range(1, len(DROPS))


@dataclass(eq=False)
class Findings:
    """All findings of a kind.

    Attributes:
        pictures: int64 [K]; -1 where there is none.
        others: int64 [K], the picture that it has to do with; -1 for none.
        details: K texts.
    """

    pictures: np.ndarray
    others: np.ndarray
    details: Sequence[str]

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(eq=False)
class Diagnosis:
    """What is wrong.

    Attributes:
        findings: by kind, in the order of `KINDS`; every kind is there.
        drops: uint8 [E], why a clean list leaves an entry out, a position in `DROPS`; 0 keeps it.
        dataset: int32 [N], positions in `dataset_names`.
        dataset_names: the column `dataset` where a table tells it, else the name of the first source.
        content: int64 [N], for each picture the first byte-identical one.
    """

    findings: dict[str, Findings]
    drops: np.ndarray
    dataset: np.ndarray
    dataset_names: list[str]
    content: np.ndarray

    @property
    def n_faults(self) -> int:
        return sum(len(found) for kind, found in self.findings.items() if KINDS[kind].is_fault)


def contents(scan: Scan) -> np.ndarray:
    """int64 [N]: for each picture the first byte-identical one; empty files equal nothing."""
    rows = scan.rows
    return same_bytes(rows["size"], rows["digest"], rows["digest"].any(axis=1) & (rows["size"] > 0))


def to_compare(inputs: Inputs, scan: Scan, content: np.ndarray) -> np.ndarray:
    """Pictures among which near-duplicates are searched: readable, not even, not hidden, one of each content."""
    rows = scan.rows
    is_first = content == np.arange(len(content))
    return np.flatnonzero((rows["width"] > 0) & ~rows["is_flat"] & is_first & ~_hidden(inputs))


def diagnose(
    inputs: Inputs, scan: Scan, near: np.ndarray, similarities: np.ndarray, drop_near: bool = False
) -> Diagnosis:
    """Put together what is wrong.

    Args:
        inputs: the entries.
        scan: what was seen of each picture.
        near: int64 [K, 2], pictures of different bytes that show the same.
        similarities: float32 [K], their correlations.
        drop_near: whether clean lists leave out near-duplicates.
    """
    rows, n = scan.rows, inputs.n_pictures
    content = contents(scan)
    hidden = _hidden(inputs)
    is_fine = (rows["status"] == READABLE) & ~hidden
    dataset, dataset_names = _datasets(inputs)
    found: dict[str, Findings] = {}

    for kind, status in (("missing", MISSING), ("unreadable", UNREADABLE), ("truncated", TRUNCATED)):
        pictures = np.flatnonzero(rows["status"] == status)
        note = ["; a hidden file" if h else "" for h in hidden[pictures]]
        found[kind] = _alone(pictures, [scan.reasons.get(int(p), "") + s for p, s in zip(pictures, note, strict=True)])
    empty = inputs.empty_values
    found["empty_value"] = _alone(
        np.full(len(empty), -1),
        [f"{inputs.sources[e.source].file}, line {e.line}: no value for {e.column}" for e in empty],
    )
    names = np.array([_is_bad_name(inputs.path(p)) for p in range(n)], dtype=bool)
    found["bad_name"] = _alone(np.flatnonzero(names), "a line break, or not UTF-8")
    hidden_fine = np.flatnonzero(hidden & (rows["status"] == READABLE))
    found["hidden"] = _alone(hidden_fine, "its name or a folder's begins with a dot")
    found["wrong_format"] = _wrong_formats(inputs, rows, is_fine)
    found["odd_size"] = _odd_sizes(rows, is_fine, dataset, dataset_names)
    found["blank"] = _alone(np.flatnonzero(is_fine & rows["is_flat"]), "hardly any contrast")
    odd_mode = np.flatnonzero(is_fine & (rows["mode"] != MODES.index("RGB")) & (rows["mode"] != 0))
    found["mode"] = _alone(odd_mode, [MODES[m] for m in rows["mode"][odd_mode]])

    # --- the same picture twice
    training, evaluation = inputs.has_role(TRAINING), inputs.has_role(EVALUATION)
    scope = np.where(inputs.has_role(LABELS), inputs.source, np.where(training, -1, -2))
    first = first_of_equal(inputs.picture, scope)
    twice = np.flatnonzero(first != np.arange(len(first)))
    found["same_path"] = Findings(
        inputs.picture[twice],
        np.full(len(twice), -1),
        [f"{_place(inputs, int(first[e]))} and {_place(inputs, int(e))}" for e in twice],
    )
    copies = np.flatnonzero((content != np.arange(n)) & ~hidden & ~hidden[content])
    found["same_bytes"] = Findings(copies, content[copies], [f"{rows['size'][p]} bytes" for p in copies])
    found["near_duplicate"] = Findings(near[:, 0], near[:, 1], [f"correlation {value:.4f}" for value in similarities])

    # --- labels
    conflicting = np.zeros(n, dtype=bool)
    one, other, said = [], [], []
    for x, y in _contradictions(inputs, content[inputs.picture]):
        group = content[inputs.picture[x]]
        if not conflicting[group]:
            one.append(int(inputs.picture[x]))
            other.append(int(inputs.picture[y]))
            said.append(" and ".join(f"{inputs.labels[inputs.label[e]]} in {_place(inputs, e)}" for e in (x, y)))
        conflicting[group] = True
    found["two_labels"] = Findings(np.array(one, dtype=np.int64), np.array(other, dtype=np.int64), said)
    near_conflicts, near_labels = _near_contradictions(inputs, content, near)
    both = np.array(near_conflicts, dtype=np.int64).reshape(-1, 2)
    found["two_labels_near"] = Findings(both[:, 0], both[:, 1], near_labels)

    # --- leaks
    in_training, in_evaluation = (_any_of(inputs.picture[which], n) for which in (training, evaluation))
    leaking = np.flatnonzero(in_training & in_evaluation)
    found["leak_path"] = _alone(leaking, "in both")
    evaluated_content = _any_of(content[in_evaluation], n)
    example = np.full(n, -1)
    example[content[np.flatnonzero(in_evaluation)[::-1]]] = np.flatnonzero(in_evaluation)[::-1]
    by_bytes = np.flatnonzero(in_training & ~in_evaluation & evaluated_content[content])
    found["leak_bytes"] = Findings(by_bytes, example[content[by_bytes]], ["same bytes"] * len(by_bytes))
    trained_content = _any_of(content[in_training], n)
    near_leaks = []
    for (a, b), value in zip(near.tolist(), similarities, strict=True):
        for x, y in ((a, b), (b, a)):
            if trained_content[x] and evaluated_content[y] and not evaluated_content[x]:
                near_leaks.append((x, int(example[y]), f"correlation {value:.4f}"))
    found["leak_near"] = Findings(
        np.array([x for x, _, _ in near_leaks], dtype=np.int64),
        np.array([y for _, y, _ in near_leaks], dtype=np.int64),
        [detail for _, _, detail in near_leaks],
    )
    found["leak_patient"], of_leaking_patient = _patient_leaks(inputs, training, evaluation)

    # --- what a clean list leaves out; the first reason counts
    drops = np.zeros(len(inputs.picture), dtype=np.uint8)

    def drop(which: np.ndarray, reason: int) -> None:
        drops[which & (drops == 0)] = reason

    drop((rows["status"] != READABLE)[inputs.picture] | names[inputs.picture], _UNREADABLE)
    drop(inputs.is_hidden, _HIDDEN)
    drop(conflicting[content[inputs.picture]], _LABELS)
    drop(training & (evaluated_content[content[inputs.picture]] | of_leaking_patient), _LEAK)
    if drop_near:
        drop(_near_drops(near, both, trained_content, evaluated_content)[content[inputs.picture]], _NEAR)
    # of a group, an evaluated picture stays before a labelled one, and that before the first
    labelled = _any_of(inputs.picture[inputs.label >= 0], n)
    rank = np.where(in_evaluation, 0, np.where(in_training & labelled, 1, np.where(in_training, 2, 3)))
    order = np.lexsort((np.arange(n), rank, hidden, content))
    kept = order[first_of_equal(content[order])]  # in the order of `order`: the best of its group
    chosen = np.empty(n, dtype=np.int64)
    chosen[order] = kept
    drop(chosen[inputs.picture] != inputs.picture, _BYTES)
    drop(first != np.arange(len(first)), _TWICE)

    return Diagnosis({kind: found[kind] for kind in KINDS}, drops, dataset, dataset_names, content)


def _alone(pictures: np.ndarray, details: str | Sequence[str]) -> Findings:
    texts = [details] * len(pictures) if isinstance(details, str) else details
    return Findings(pictures, np.full(len(pictures), -1), texts)


def _any_of(positions: np.ndarray, n: int) -> np.ndarray:
    result = np.zeros(n, dtype=bool)
    result[positions] = True
    return result


def _hidden(inputs: Inputs) -> np.ndarray:
    """bool [N]: no source names the picture but a folder in which it is hidden."""
    return ~_any_of(inputs.picture[~inputs.is_hidden], inputs.n_pictures)


def _is_bad_name(path: str) -> bool:
    return "\n" in path or "\r" in path or any("\ud800" <= c <= "\udfff" for c in path)


def _place(inputs: Inputs, entry: int) -> str:
    source = inputs.sources[inputs.source[entry]]
    return f"{source.file.name}" + (f" line {inputs.line[entry]}" if inputs.line[entry] else "")


def _datasets(inputs: Inputs) -> tuple[np.ndarray, list[str]]:
    """int32 [N] and the names it counts in."""
    names = list(inputs.datasets)
    ids = {name: i for i, name in enumerate(names)}
    own = []
    for source in inputs.sources:
        if source.name not in ids:
            ids[source.name] = len(names)
            names.append(source.name)
        own.append(ids[source.name])
    result = np.zeros(inputs.n_pictures, dtype=np.int32)
    result[inputs.picture[::-1]] = np.array(own)[inputs.source[::-1]]  # the first entry's is written last
    told = np.flatnonzero(inputs.dataset >= 0)[::-1]
    result[inputs.picture[told]] = inputs.dataset[told]
    return result, names


def _wrong_formats(inputs: Inputs, rows: np.ndarray, is_fine: np.ndarray) -> Findings:
    pictures, details = [], []
    for picture in np.flatnonzero(is_fine & (rows["format"] > 0)):
        path = inputs.path(int(picture))
        suffix = path[path.rfind(".") :].lower()
        expected, actual = FORMAT_OF_SUFFIX.get(suffix), FORMATS[rows["format"][picture]]
        if expected is not None and expected != actual:
            pictures.append(int(picture))
            details.append(f"{suffix}, but its bytes are {actual}")
    return _alone(np.array(pictures, dtype=np.int64), details)


def _odd_sizes(rows: np.ndarray, is_fine: np.ndarray, dataset: np.ndarray, names: list[str]) -> Findings:
    width, height = rows["width"].astype(np.float64), rows["height"].astype(np.float64)
    seen = is_fine & (rows["width"] > 0)
    side = np.sqrt(width * height)
    median = np.ones(len(names))
    for i in np.unique(dataset[seen]):
        median[i] = np.median(side[seen & (dataset == i)])
    factor = np.where(seen, side, 1) / median[dataset]
    aspect = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
    is_tiny = np.minimum(width, height) < TINY_PX
    is_far = (factor > ODD_FACTOR) | (factor < 1 / ODD_FACTOR)
    odd = np.flatnonzero(seen & (is_tiny | is_far | (aspect > LONG_ASPECT)))
    details = []
    for p in odd:
        why = "tiny" if is_tiny[p] else "long and thin" if aspect[p] > LONG_ASPECT else "far from the median side"
        details.append(f"{rows['width'][p]}x{rows['height'][p]}: {why} (median side {median[dataset[p]]:.0f} px)")
    return _alone(odd, details)


def _comparable(inputs: Inputs) -> list[tuple[int, int]]:
    """Pairs of sources (each with itself too) whose labels may contradict each other.

    These are sources of the same classes, or where one's classes are all among the other's: a test split may lack
    some, while eight coarse and ten fine classes of the same cells do not contradict each other.
    """
    classes = {}
    for source in np.unique(inputs.source[inputs.label >= 0]).tolist():
        classes[source] = set(np.unique(inputs.label[(inputs.source == source) & (inputs.label >= 0)]).tolist())
    return [
        (s, t) for s in classes for t in classes if s <= t and (classes[s] <= classes[t] or classes[t] <= classes[s])
    ]


def _contradictions(inputs: Inputs, group: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of entries of one group (int64 [E]) with different labels in comparable sources."""
    entries = np.flatnonzero(inputs.label >= 0)
    for pair in _comparable(inputs):
        rows = entries[np.isin(inputs.source[entries], pair)]
        first = rows[first_of_equal(group[rows])]
        for k in np.flatnonzero(inputs.label[first] != inputs.label[rows]):
            yield int(first[k]), int(rows[k])


def _near_contradictions(
    inputs: Inputs, content: np.ndarray, near: np.ndarray
) -> tuple[list[tuple[int, int]], list[str]]:
    """Near pairs (of contents) with different labels, and these labels."""
    entries = np.flatnonzero(inputs.label >= 0)
    entries = entries[np.argsort(content[inputs.picture[entries]], kind="stable")]
    keys = content[inputs.picture[entries]]
    starts, ends = (np.searchsorted(keys, near, side) for side in ("left", "right"))  # [K, 2]
    comparable = set(_comparable(inputs))
    pairs, details = [], []
    for (a, b), start, end in zip(near.tolist(), starts, ends, strict=True):
        of_a, of_b = (entries[start[i] : end[i]].tolist() for i in (0, 1))
        for x, y in product(of_a, of_b):
            sources = sorted((int(inputs.source[x]), int(inputs.source[y])))
            if inputs.label[x] != inputs.label[y] and (sources[0], sources[1]) in comparable:
                pairs.append((a, b))
                details.append(f"{inputs.labels[inputs.label[x]]}, {inputs.labels[inputs.label[y]]}")
                break
    return pairs, details


def _patient_leaks(inputs: Inputs, training: np.ndarray, evaluation: np.ndarray) -> tuple[Findings, np.ndarray]:
    """A finding for each patient on both sides, and bool [E]: training entries of such patients.

    A patient's id counts within its data set; where one side names no data set, the id alone decides.
    """
    n = inputs.n_pictures
    patient, dataset = (np.full(n, -1, dtype=np.int64) for _ in range(2))
    told = np.flatnonzero(inputs.patient >= 0)[::-1]
    patient[inputs.picture[told]] = inputs.patient[told]
    told = np.flatnonzero(inputs.dataset >= 0)[::-1]
    dataset[inputs.picture[told]] = inputs.dataset[told]
    trained, tested = (
        np.unique(inputs.picture[side & (patient[inputs.picture] >= 0)]) for side in (training, evaluation)
    )
    step = len(inputs.datasets) + 1
    key = patient * step + dataset + 1
    leaks = np.isin(key[trained], key[tested])
    leaks |= (dataset[trained] < 0) & np.isin(patient[trained], patient[tested])
    leaks |= np.isin(patient[trained], patient[tested[dataset[tested] < 0]])
    leaking = trained[leaks]
    pictures, others, details = [], [], []
    for who in np.unique(patient[leaking]):
        here, there = leaking[patient[leaking] == who], tested[patient[tested] == who]
        pictures.append(int(here[0]))
        others.append(int(there[0]))
        details.append(f"patient {inputs.patients[who]}: {len(here)} pictures in training, {len(there)} in evaluation")
    found = Findings(np.array(pictures, dtype=np.int64), np.array(others, dtype=np.int64), details)
    return found, training & _any_of(leaking, n)[inputs.picture]


def _near_drops(
    near: np.ndarray, conflicts: np.ndarray, is_trained: np.ndarray, is_evaluated: np.ndarray
) -> np.ndarray:
    """bool [N], by content: of each pair the later one, or the one that is not evaluated; both if labels differ."""
    dropped = np.zeros(len(is_trained), dtype=bool)
    dropped[conflicts] = True
    for a, b in near.tolist():
        if not dropped[a] and not dropped[b]:
            dropped[a if is_evaluated[b] and not is_evaluated[a] else b] = True
    return dropped
