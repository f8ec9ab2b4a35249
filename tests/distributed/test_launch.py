"""Which process of how many this is, by the variables that torchrun and SLURM set."""

import pytest

from dinov2.distributed import first_host, read_launch

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
}


def test_torchruns_variables():
    launch = read_launch(TORCHRUN)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.n_nodes) == (5, 8, 1, 2)
    assert (launch.master_addr, launch.master_port, launch.launcher) == ("gpu1", 29500, "torchrun")


def test_slurms_variables():
    launch = read_launch(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.n_nodes) == (5, 8, 1, 2)
    assert (launch.master_addr, launch.launcher) == ("gpu003", "slurm")
    assert read_launch({**SLURM, "MASTER_ADDR": "ib1", "MASTER_PORT": "1234"}).master_addr == "ib1"


def test_steps_and_restarts_meet_at_ports_of_their_own():
    def port(**changes: str) -> int:
        return read_launch({**SLURM, **changes}).master_port

    ports = {port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="124"), port(SLURM_RESTART_COUNT="1")}
    assert len(ports) == 4
    assert all(1024 < number < 32768 for number in ports)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"},  # a batch script or a shell in an allocation
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_alone(environment):
    assert read_launch(environment) is None


def test_torchrun_wins_inside_a_slurm_step():
    assert read_launch({**SLURM, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({**TORCHRUN, "RANK": "first"}, "RANK must be a number, found 'first'"),
    ],
)
def test_half_set_variables_are_errors(environment, told):
    with pytest.raises(ValueError, match=told):
        read_launch(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("rack1-gpu[7,9]", "rack1-gpu7"),
        ("a[1-2]-ib,b", "a1-ib"),
        ("node-01.cluster.org", "node-01.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("n_gpus", "local_rank", "local_world_size"), [(1, 0, 1), (4, 1, 4), (0, 5, 8)])
def test_kubernetes_names_no_local_rank(monkeypatch, n_gpus, local_rank, local_world_size):
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_gpus)
    environment = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL")}
    launch = read_launch(environment)
    assert (launch.rank, launch.local_rank, launch.local_world_size) == (5, local_rank, local_world_size)


def test_a_rank_beyond_the_world_is_an_error():
    with pytest.raises(ValueError, match="RANK=8 must be less than WORLD_SIZE=8"):
        read_launch({**TORCHRUN, "RANK": "8"})
