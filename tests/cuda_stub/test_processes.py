"""Training in two processes with a pretend GPU each: sharding, DDP, and their collectives."""

import pytest

NETWORKS = [f"{role}.{part}" for role in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
STRATEGIES = ["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"]


def sharded(strategy: str) -> list[str]:
    arguments = [f"compute_precision.{network}.sharding_strategy={strategy}" for network in NETWORKS]
    return ["train", *arguments, *(["local_world_size=1"] if strategy == "HYBRID_SHARD" else [])]


@pytest.fixture(scope="module")
def reports(run_commands_on_stub):
    """Both ranks' reports of a run with each strategy; HYBRID_SHARD as two nodes of one GPU."""
    cases = {strategy: sharded(strategy) for strategy in STRATEGIES}
    cases["accumulation"] = ["train", "train.accumulation_steps=2", "crops.local_crops_number=2"]
    return run_commands_on_stub(cases, ranks=2)


@pytest.fixture
def steps(reports):
    """[(case and rank, step)] after warming up."""
    cases = [(f"{name}, rank {rank}", case) for rank, report in enumerate(reports) for name, case in cases_of(report)]
    assert all(len(case["steps"]) > 2 for _, case in cases), "a training ended early"
    return [(name, step) for name, case in cases for step in case["steps"][2:]]


def cases_of(report):
    return [(name, case) for name, case in report.items() if name != "nccl_log"]


def test_nothing_raises(reports):
    for report in reports:
        assert {name: case["errors"] for name, case in cases_of(report) if case["exit_code"] or case["errors"]} == {}


def test_a_step_neither_waits_nor_copies_from_pageable_memory(steps):
    for name, step in steps:
        assert step["waits"] == {}, name
        assert (step["stream_sync"], step["device_sync"], step["h2d_pageable"]) == (0, 0, 0), name


def test_ranks_issue_the_same_collectives(reports):
    assert len(reports[0]["nccl_log"]) > 100
    assert reports[0]["nccl_log"] == reports[1]["nccl_log"]


def test_collectives_take_tensors_on_the_device(reports):
    assert [line for line in reports[0]["nccl_log"] if "NOT DEVICE MEMORY" in line] == []


def test_a_step_exchanges_no_objects(steps):
    assert [(name, step["object_collectives"]) for name, step in steps if step["object_collectives"]] == []


def test_each_strategy_has_its_collectives(reports):
    kinds = {name: case["steps"][-1] for name, case in cases_of(reports[0])}
    assert kinds["NO_SHARD"]["reduce_scatter"] == 0 < kinds["NO_SHARD"]["all_reduce"]
    assert 0 < kinds["SHARD_GRAD_OP"]["all_gather"] < kinds["FULL_SHARD"]["all_gather"]
    assert kinds["SHARD_GRAD_OP"]["reduce_scatter"] == kinds["FULL_SHARD"]["reduce_scatter"] > 0


def test_hybrid_sharding_makes_one_mesh(run_commands_on_stub):
    hybrid = [*sharded("HYBRID_SHARD"), "local_world_size=2"]
    report = run_commands_on_stub({"hybrid": hybrid}, ranks=4)[0]
    assert report["hybrid"]["exit_code"] == 0, report["hybrid"]["errors"]
    communicators = {line.split("comm ")[1].split()[0] for line in report["nccl_log"]}
    assert len(communicators) == 3  # of the world, of the copies and of the shards


def test_a_dry_run_ends_on_all_ranks_if_one_is_out_of_memory(run_commands_on_stub):
    cases = {"dry run": ["train", "--dry-run", "train.batch_size_per_gpu=512", "memory_of_rank_1=0.3"]}
    for report in run_commands_on_stub(cases, ranks=2):
        assert report["dry run"]["exit_code"] == 1
        assert ["does not fit" in message for message in report["dry run"]["errors"]] == [True]
