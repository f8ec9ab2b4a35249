"""Training, extraction and evaluation on one pretend GPU of each architecture."""

import sysconfig
from pathlib import Path

import pytest

CAPABILITIES = ["7.0", "7.5", "8.6", "9.0", "10.0", "12.0"]
ROLES = [f"{role}.{part}" for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
# DINOv2's crops and its shared head, with moving centers
LOCAL_CROPS = ["crops.local_crops_number=2", "ibot.separate_head=false", "train.centering=centering"]
EVALUATION = ["evaluation.datasets=[{name: cells, data: '{folder}/cells', linear: true}]", "evaluation.knn_k=[1]"]
HALF_TYPES = ("fp16", "bf16")
WARM = 2  # steps before caches are filled and constants are on the device


def in_precision(name: str) -> list[str]:
    return [f"compute_precision.{role}.mixed_precision.param_dtype={name}" for role in ROLES]


def precisions(capability: str) -> list[str]:
    return ["fp32", "fp16", "bf16"] if float(capability) >= 8 else ["fp32", "fp16"]


def extraction(name: str, *arguments: str) -> list[str]:
    folder = "{folder}"
    given = ["--data", f"{folder}/cells", "--checkpoint", f"{folder}/tiny.pth", "--output-dir", f"{folder}/{name}"]
    return ["extract_features", *given, *arguments]


def fine_tuning(name: str, *arguments: str) -> list[str]:
    folder = "{folder}"
    given = ["--data", f"{folder}/cells", "--checkpoint", f"{folder}/tiny.pth", "--output-dir", f"{folder}/{name}"]
    return ["finetune", *given, "--test-fraction", "0.5", "--epochs", "1", "--num-workers", "0", *arguments]


def train_cases(capability: str) -> dict[str, list[str]]:
    cases = {}
    for name in precisions(capability):
        cases[f"{name}, DinoBloom's recipe"] = ["train", *in_precision(name)]
        cases[f"{name}, local crops"] = ["train", *in_precision(name), *LOCAL_CROPS]
    if capability == "9.0":
        cases["bf16, centering"] = ["train", "train.centering=centering"]
        cases["bf16, local crops and Sinkhorn-Knopp"] = ["train", *LOCAL_CROPS, "train.centering=sinkhorn_knopp"]
        cases["bf16, accumulation"] = ["train", "train.accumulation_steps=2"]
        cases["bf16, accumulation and local crops"] = ["train", "train.accumulation_steps=2", *LOCAL_CROPS]
        cases["bf16, checkpointing"] = ["train", "train.activation_checkpointing=1"]
    return cases


def evaluation_cases(capability: str) -> dict[str, list[str]]:
    cases = {
        "evaluation in training": ["train", *EVALUATION],
        "extraction of 2 batches": extraction("two", "--batch-size", "8"),
        "extraction of 8 batches": extraction("eight", "--batch-size", "2"),
        "knn": ["knn", "--features", "{folder}/two/features.h5", "--output-dir", "{folder}/knn", "--k", "1"],
        "linear": ["linear", "--features", "{folder}/two/features.h5", "--output-dir", "{folder}/linear"],
    }
    if "bf16" in precisions(capability):
        cases["extraction in bf16"] = extraction("bf16", "--precision", "bf16")
    if capability in ("7.0", "9.0"):
        cases["fine-tuning of 2 steps"] = fine_tuning("tuned2", "--batch-size", "4", "--mix", "mixup")
        cases["fine-tuning of 8 steps"] = fine_tuning("tuned8", "--batch-size", "1", "--mix", "cutmix")
    if capability == "9.0":
        cases["fine-tuning in bf16"] = fine_tuning("tuned", "--precision", "bf16", "--mode", "lora", "--tta")
    return cases


@pytest.fixture(scope="module", params=CAPABILITIES)
def reports(request, run_commands_on_stub):
    """The reports of all cases on a GPU of one capability, from one process."""
    cases = {**train_cases(request.param), **evaluation_cases(request.param)}
    return run_commands_on_stub(cases, capability=request.param)


@pytest.fixture
def capability(request):
    return request.node.callspec.params["reports"]


@pytest.fixture
def steps(reports):
    """{case: the steps after warming up} of the trainings."""
    counts = {name: report["steps"][WARM:] for name, report in reports.items() if name in train_cases("9.0")}
    assert all(counts.values()), "a training ended early"
    return counts


def test_nothing_raises(reports):
    assert {name: report["errors"] for name, report in reports.items() if report["exit_code"] or report["errors"]} == {}


def test_a_step_does_not_wait_for_the_device(steps):
    for name, counts in steps.items():
        assert [step["waits"] for step in counts] == [{}] * len(counts), name
        for kind in ("stream_sync", "device_sync", "event_sync", "memcpy_sync"):
            assert [step[kind] for step in counts] == [0] * len(counts), (name, kind)


def test_a_step_copies_from_pinned_memory_only(steps):
    for name, counts in steps.items():
        assert [step["h2d_pageable"] for step in counts] == [0] * len(counts), name
        assert all(step["h2d_pinned"] for step in counts), name


def test_products_of_a_step_run_in_its_type(steps):
    for name, counts in steps.items():
        dtype = name.split(",")[0]
        for flops in (step["flops"] for step in counts if dtype in HALF_TYPES):
            assert 0 < flops["fp32"] < 0.02 * flops[dtype], (name, flops)
        for flops in (step["flops"] for step in counts if dtype == "fp32"):
            assert flops["fp32"] > 0, name
            assert flops["fp16"] == flops["bf16"] == 0, (name, flops)


def test_extraction_waits_for_its_results_only(reports):
    few, many = (reports[f"extraction of {n} batches"]["waits"] for n in (2, 8))
    assert few == many
    assert sum(n for place, n in many.items() if place.startswith("dinov2/eval/features/loop.py")) > 0


def test_steps_of_fine_tuning_do_not_wait(reports, capability):
    if capability != "9.0":
        pytest.skip("one GPU is enough for counts")
    few, many = (reports[f"fine-tuning of {n} steps"]["waits"] for n in (2, 8))
    own = {place for place in few | many if "solvers/finetuning" in place}
    assert {place: few.get(place) for place in own} == {place: many.get(place) for place in own}


def test_float32_convolutions_are_exact(steps):
    assert not any(step["cudnn_tf32"] for step in steps["fp32, DinoBloom's recipe"])


def test_peak_memory_excludes_the_probe_of_the_matmul_rate(reports):
    assert reports["fp32, DinoBloom's recipe"]["peak"] < 128 * 2**20  # the probe takes more


@pytest.fixture(scope="module")
def special_reports(run_commands_on_stub):
    cases = {
        "cuda:1": ["train", "train.device=cuda:1"],
        "logged": ["train", "train.log_period=2"],
    }
    return run_commands_on_stub(cases, devices=2)


def test_a_chosen_device_is_the_current_one(special_reports):
    assert special_reports["cuda:1"]["exit_code"] == 0
    assert special_reports["cuda:1"]["device"] == 1


def test_use_of_patch_prototypes_is_counted_in_logged_steps_only(special_reports):
    counts = [step["argmax_kernels"] for step in special_reports["logged"]["steps"]]
    assert min(counts) < max(counts)


@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="Triton needs Python.h to compile; the package python3-dev has it",
)
@pytest.mark.parametrize(
    "capability", ["9.0", pytest.param("7.5", marks=pytest.mark.slow), pytest.param("12.0", marks=pytest.mark.slow)]
)
def test_compiled_blocks_compile_once(run_commands_on_stub, capability):
    compiled = ["train", "train.compile_blocks=true", "crops.local_crops_number=2"]
    report = run_commands_on_stub({"compiled": compiled}, capability=capability)["compiled"]
    assert report["exit_code"] == 0, report["errors"]
    steps = report["steps"][WARM:]
    assert steps[0]["graphs"] > 0
    assert {step["graphs"] for step in steps} == {report["steps"][0]["graphs"]}
    assert all(step["kernels"] > step["launch"] and step["waits"] == {} for step in steps)  # Triton's come on top
