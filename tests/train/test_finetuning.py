"""Frozen parts, adapters and the warm-up of heads: what learns, what stays, and that runs with them are like others."""

import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dinov2.hub.adapters import lora_scaling, merge_adapters
from dinov2.hub.backbones import load_backbone
from dinov2.hub.weight_files import without_chunk
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_small
from dinov2.train.evaluation import whole_teacher_backbone
from dinov2.train.finetuning import choose_learned, count_learned, limit_learning
from dinov2.train.optimizer import build_optimizer
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import main
from dinov2.utils.numerics import derive_seed
from dinov2.utils.param_groups import get_params_groups_with_decay

LORA = ["student.lora.rank=4"]
# blocks that add their full share, as in trained networks: at 1e-5, tiny networks hardly learn
SEEING = ["student.layerscale=1.0"]


@pytest.fixture
def configured(configured):
    return lambda *overrides: configured(*SEEING, *overrides)


@pytest.fixture
def run(run):
    return lambda *overrides, **options: run(*SEEING, *overrides, **options)


def whole(folder: Path, n: int) -> dict:
    """The checkpoint after n iterations: model, optimizer and more, as nested dicts."""
    dcp_to_torch_save(folder / "checkpoints" / f"iteration_{n:07d}", folder / "whole.pth")
    return torch.load(folder / "whole.pth", weights_only=True)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [tuple(row[k] for k in ("iteration", "total_loss", "grad_norm_backbone")) for row in rows(folder)]


def teacher(folder: Path, n: int) -> dict[str, torch.Tensor]:
    file = folder / "eval" / f"training_{n}" / "teacher_checkpoint.pth"
    return torch.load(file, weights_only=True)["teacher"]


def of(role: str, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = f"{role}.{part}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- words ----------------------------------------------------------------------------------------------------------


def settings(freeze=(), unfreeze=(), rank=0, targets=("attn.qkv", "attn.proj")) -> SimpleNamespace:
    """Of the section `student`, those that choose."""
    return SimpleNamespace(
        freeze=list(freeze), unfreeze=list(unfreeze), lora=SimpleNamespace(rank=rank, targets=list(targets))
    )


def backbone(depth: int, block_chunks: int = 0) -> DinoVisionTransformer:
    with torch.device("meta"):
        return vit_small(depth=depth, block_chunks=block_chunks)


@pytest.mark.parametrize("chunks", [0, 2])
def test_what_the_words_mean(chunks):
    network = backbone(depth=4, block_chunks=chunks)
    everything = {without_chunk(name) for name, _ in network.named_parameters()}

    def stays(*words: str, but: tuple[str, ...] = ()) -> set[str]:
        chosen = choose_learned(network, settings(words, but)).parameters
        return everything - {without_chunk(name) for name in chosen}

    assert stays() == set()
    assert stays("pos_embed", "patch_embed") == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert stays("1-2") == {n for n in everything if n.startswith(("blocks.1.", "blocks.2."))}
    assert stays("3") == stays("blocks.3") == {n for n in everything if n.startswith("blocks.3.")}
    assert stays("norm") == {"norm.weight", "norm.bias"}  # not norm1
    assert stays("attn.qkv") == {f"blocks.{i}.attn.qkv.{p}" for i in range(4) for p in ("weight", "bias")}
    left = everything - stays("all", but=("3", "norm"))
    assert left == {n for n in everything if n.startswith(("blocks.3.", "norm."))}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (settings(["patch_embd"]), r"student\.freeze: 'patch_embd'.*did you mean patch_embed\?"),
        (settings(["atn.qkv"]), r"did you mean attn\.qkv\?"),
        (settings(["0-2"]), r"student\.freeze: '0-2' names blocks that do not exist; blocks are 0-1"),
        (settings(["1-0"]), "names blocks that do not exist"),
        (settings(["all"]), "leaves nothing of the backbone to learn"),
        (settings(unfreeze=["norm"]), r"student\.freeze, which is empty; set student\.freeze=\[all\]"),
        (settings(["all"], rank=4), r"no layer is left to adapt.*student\.lora\.rank=0"),
        (settings(rank=4, targets=["attn.qvk"]), r"student\.lora\.targets: 'attn\.qvk'.*attn\.qkv"),
        (settings(rank=4, targets=["norm1"]), r"student\.lora\.targets: 'norm1' is no part"),
    ],
)
def test_words_that_mean_nothing(chosen, message):
    with pytest.raises(ValueError, match=message):
        choose_learned(backbone(depth=2), chosen)


def test_settings_that_contradict_end_a_run_at_its_start(run, capfd):
    for settings, message in (
        (["student.freeze=[all]"], "leaves nothing of the backbone to learn"),
        ([*LORA, "student.freeze=[all]"], "no layer is left to adapt"),
        (["optim.freeze_backbone_iterations=4"], "is all of the run, which has 4 iterations"),
        (["student.freeze=all"], "student.freeze must be a list like [patch_embed, pos_embed, 0-7]"),
        (["student.lora.rank=-1"], "student.lora.rank must be at least 0"),
        ([*LORA, "student.lora.alpha=0"], "adapters would have no effect"),
    ):
        assert run(*settings)[0] == 2
        assert message in capfd.readouterr().err


def test_without_peft_the_package_to_install_is_named(configured, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install peft"):
        SSLMetaArch(configured(*LORA))


# --- frozen parts ---------------------------------------------------------------------------------------------------


def test_frozen_parts_stay_and_are_not_in_the_optimizer(run):
    still = ["student.freeze=[patch_embed, pos_embed, 0]", "optim.weight_decay=0.5", "optim.freeze_last_layer_epochs=0"]
    _, folder = run(*still)
    first, last = whole(folder, 2), whole(folder, 4)
    student = changed(*(of("student", "backbone", at["model"]) for at in (first, last)))
    frozen = ("patch_embed.", "pos_embed", "blocks.0.")
    names = set(of("student", "backbone", last["model"]))
    assert {name for name in names if not name.startswith(frozen)} - student <= {"mask_token"}
    assert not any(name.startswith(frozen) for name in student)
    assert not any(name.removeprefix("backbone.").startswith(frozen) for name in last["optimizer"])
    both = [of(role, "backbone", last["model"]) for role in ("student", "teacher")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in names if name.startswith(frozen))


def test_layerwise_decay_holds_for_what_learns(configured):
    cfg = configured("student.freeze=[patch_embed, 0]", "optim.layerwise_decay=0.5", "optim.patch_embed_lr_mult=0.2")
    model = SSLMetaArch(cfg)
    groups = get_params_groups_with_decay(model.student["backbone"], 0.5, 0.2)
    multipliers = {group["name"]: group["lr_multiplier"] for group in groups}
    assert not any(name.startswith(("patch_embed", "blocks.0.")) for name in multipliers)
    assert multipliers["pos_embed"] == 0.5**3
    assert multipliers["blocks.1.attn.qkv.weight"] == 0.5
    assert multipliers["norm.weight"] == 1.0
    optimizer = build_optimizer(cfg.optim, model.get_params_groups())
    Schedules(cfg).at(2).apply_to(optimizer)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    qkv, norm = (model.student["backbone"].get_parameter(name) for name in ("blocks.1.attn.qkv.weight", "norm.weight"))
    assert lr[id(qkv)] == pytest.approx(lr[id(norm)] / 2)


def test_a_run_is_not_resumed_with_other_frozen_parts(run, capfd):
    run("optim.epochs=1", "student.freeze=[0]")
    assert run("student.freeze=[1]")[0] == 2
    assert "student.freeze: ['0'] there, ['1'] now" in capfd.readouterr().err


def test_a_run_from_before_there_were_such_settings_is_resumed(run):
    _, folder = run("optim.epochs=1")
    config = folder / "config.yaml"
    lines = config.read_text().splitlines()
    old = [line for line in lines if not line.startswith(("  freeze: ", "  unfreeze: ", "  freeze_backbone"))]
    assert len(old) == len(lines) - 3
    config.write_text("\n".join(old))
    assert run()[0] == 0


# --- warm-up of the heads -------------------------------------------------------------------------------------------

WARM_UP = ["optim.freeze_backbone_iterations=2", "optim.freeze_last_layer_epochs=0", "optim.weight_decay=0.5"]


def test_heads_warm_up_on_a_frozen_backbone(run, configured):
    _, folder = run(*WARM_UP)
    during, after = whole(folder, 2), whole(folder, 4)
    everything = start(configured(*WARM_UP))
    begin = {name: value for name, value in everything.items() if name.startswith("backbone.")}
    for role in ("student", "teacher"):
        still = {f"backbone.{name}": value for name, value in of(role, "backbone", during["model"]).items()}
        assert changed(begin, still) == set()
    heads = [of("student", "dino_head", at["model"]) for at in (during, after)]
    assert changed({n: everything[f"dino_head.{n}"] for n in heads[0]}, heads[0]) == set(heads[0])
    assert all(
        not state["step"].any() and not state["exp_avg"].any()
        for name, state in during["optimizer"].items()
        if name.startswith("backbone.")
    )
    assert len(changed(*(of("student", "backbone", at["model"]) for at in (during, after)))) > 20
    assert after["optimizer"]["backbone.norm.weight"]["step"] == 2
    assert [row["grad_norm_backbone"] > 0 for row in rows(folder)] == [False, False, True, True]
    assert all(row["grad_norm_dino_head"] > 0 for row in rows(folder))


def start(cfg) -> dict[str, torch.Tensor]:
    """The student that train.py starts from."""
    torch.manual_seed(derive_seed(cfg.train.seed, "weights"))
    return {name: value.detach().clone() for name, value in SSLMetaArch(cfg).student.state_dict().items()}


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(configured):
    """Student and teacher of ViT-S's shape with adapters that have learned something."""
    pytest.importorskip("peft")

    def make(*overrides: str, depth: int = 12):
        settings = configured(*overrides).student
        torch.manual_seed(0)
        shape = {"patch_size": 14, "img_size": 28, "init_values": 1.0, "block_chunks": 0, "depth": depth}
        networks = [vit_small(**shape) for _ in range(2)]
        limit_learning(*networks, settings)
        for network in networks:
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
        return networks[0].eval(), settings

    return make


def test_adapters_are_under_five_percent_and_merge_into_a_plain_network(adapted):
    network, settings = adapted("student.lora.rank=8")
    n_learned, n_plain = count_learned(network)
    assert 0 < n_learned < 0.05 * n_plain
    assert {name.split(".lora_")[0].split(".", 2)[2] for name, p in network.named_parameters() if p.requires_grad} == {
        "attn.qkv",
        "attn.proj",
    }
    plain = vit_small(patch_size=14, img_size=28, init_values=1.0, block_chunks=0).eval()
    untouched = {n.replace(".base_layer", ""): v for n, v in network.state_dict().items() if "lora_" not in n}
    images = torch.randn(4, 3, 28, 28)
    with torch.no_grad():
        plain.load_state_dict(untouched)
        before = plain(images)
        plain.load_state_dict(merge_adapters(network.state_dict(), lora_scaling(settings)))
        torch.testing.assert_close(plain(images), network(images), rtol=0, atol=1e-5)
        assert (plain(images) - before).abs().max() > 0.1


def test_merging_is_that_of_peft(adapted):
    network, settings = adapted(
        "student.lora.rank=2", "student.lora.alpha=3", "student.lora.targets=[mlp, attn.qkv]", depth=2
    )
    ours = merge_adapters(network.state_dict(), lora_scaling(settings))
    for name, module in network.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            torch.testing.assert_close(ours[f"{name}.weight"], module.base_layer.weight, rtol=0, atol=1e-6)
            assert torch.equal(ours[f"{name}.bias"], module.base_layer.bias)


def test_lists_say_what_has_adapters_and_what_learns_in_full(adapted):
    network, _ = adapted(*LORA, "student.freeze=[0]", "student.unfreeze=[norm, 3]", depth=4)
    full = {name for name, p in network.named_parameters() if p.requires_grad and "lora_" not in name}
    assert full == {name for name, _ in network.named_parameters() if name.startswith(("norm.", "blocks.3."))}
    with_adapters = {name.split(".")[1] for name, _ in network.named_parameters() if "lora_" in name}
    assert with_adapters == {"1", "2"}


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_run_with_adapters_writes_a_plain_teacher(run, chunks):
    pytest.importorskip("peft")
    momentum = ["teacher.momentum_teacher=0.5", "teacher.final_momentum_teacher=0.5"]
    code, folder = run(*LORA, *momentum, f"student.block_chunks={chunks}", "optim.base_lr=0.5")
    assert code == 0
    first, last = whole(folder, 2), whole(folder, 4)
    moved = changed(*(of("student", "backbone", at["model"]) for at in (first, last)))
    assert moved == {name for name in of("student", "backbone", last["model"]) if "lora_" in name}
    assert changed(*(of("teacher", "backbone", at["model"]) for at in (first, last))) == moved
    assert changed(*(of("student", "dino_head", at["model"]) for at in (first, last)))
    assert not any("base_layer" in name for name in last["optimizer"])

    written = {name.removeprefix("backbone."): v for name, v in teacher(folder, 4).items() if "backbone." in name}
    assert not any("lora" in name or "base_layer" in name for name in written)
    expected = merge_adapters(of("teacher", "backbone", last["model"]), 4.0)
    assert expected.keys() == written.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    layer = next(name for name in written if name.endswith("attn.qkv.weight"))
    base = of("teacher", "backbone", last["model"])[layer.replace("qkv.", "qkv.base_layer.")]
    assert (written[layer] - base).abs().max() > 1e-4
    resumable = load_backbone(folder / "checkpoints" / "iteration_0000004", img_size=28)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(resumable(images), load_backbone(folder, img_size=28)(images))
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"has adapters.*config\.yaml"):
        load_backbone(folder / "checkpoints" / "iteration_0000004", img_size=28)


def test_the_teacher_that_is_evaluated_has_its_adapters_merged(configured):
    pytest.importorskip("peft")
    model = SSLMetaArch(configured(*LORA))
    for name, parameter in model.teacher["backbone"].named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    evaluated = whole_teacher_backbone(model)
    assert not any("lora" in name for name, _ in evaluated.named_parameters())
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(evaluated(images), model.teacher_backbone(images), rtol=0, atol=1e-5)


def test_activation_checkpointing_changes_nothing_of_a_run_with_adapters(run):
    pytest.importorskip("peft")
    dropout = [*LORA, "student.lora.dropout=0.3", "student.freeze=[0]"]
    _, plain = run(*dropout, name="plain")
    _, again = run(*dropout, "train.activation_checkpointing=true", name="again")
    for ours, theirs in zip(losses(again), losses(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# --- resumed, and on several processes ------------------------------------------------------------------------------

BOTH = [*LORA, "student.freeze=[pos_embed, 0]", "student.unfreeze=[norm]", "optim.freeze_backbone_iterations=3"]


def test_killed_and_resumed_is_bit_for_bit_the_unbroken_run(run, monkeypatch):
    """It is killed twice. Checkpoints are those of iterations 2 and 4, in the warm-up and behind it."""
    pytest.importorskip("peft")
    longer = [*BOTH, "optim.epochs=3", "student.drop_path_rate=0.3"]
    _, unbroken = run(*longer, name="unbroken")
    forward_backward = SSLMetaArch.forward_backward

    def crashing_after(n_steps):
        calls = []

        def crashing(self, *arguments, **settings):
            calls.append(None)
            if len(calls) > n_steps:
                raise RuntimeError("killed")
            return forward_backward(self, *arguments, **settings)

        return crashing

    for n_steps in (2, 3):  # after iterations 2 and 2 + 3
        with monkeypatch.context() as patch:
            patch.setattr(SSLMetaArch, "forward_backward", crashing_after(n_steps))
            assert run(*longer, name="killed")[0] == 1
    code, killed = run(*longer, name="killed")
    assert code == 0
    assert losses(killed) == losses(unbroken)
    assert changed(teacher(killed, 6), teacher(unbroken, 6)) == set()


NETWORKS = [
    f"compute_precision.{r}.{p}" for r in ("student", "teacher") for p in ("backbone", "dino_head", "ibot_head")
]
WAYS = {"NO_SHARD": BOTH, "SHARD_GRAD_OP": [*BOTH, "train.batch_size_per_gpu=2"]}
LARGE_BATCH = ["train.global_batch_size=12", "train.batch_size_per_gpu=12", "student.drop_path_rate=0"]


class CountingHandler(SimpleHTTPRequestHandler):
    """Serves files, and lists in `asked` which."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_) -> None: ...


@pytest.fixture(scope="module")
def on_processes(tmp_path_factory, make_image_list, make_tiny_overrides, run_on_processes):
    """Each of WAYS on two processes, which start from a URL, in folders of that name; the same on one, in `alone`."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs")
    lists = make_image_list(tmp_path_factory.mktemp("images"), n=29)

    def arguments(name: str, *overrides: str) -> list[str]:
        tiny = make_tiny_overrides(lists, *SEEING, *LARGE_BATCH, *overrides)
        return [*tiny, "--name", name, "--output-dir", str(folder)]

    assert main(arguments("before", "optim.epochs=1")) == 0
    file = folder / "before" / "eval" / "training_2" / "teacher_checkpoint.pth"
    from_file = f"student.pretrained_weights={file}"
    assert main(arguments("alone", from_file, *BOTH)) == 0
    CountingHandler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(CountingHandler, directory=file.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"student.pretrained_weights=http://127.0.0.1:{server.server_port}/{file.name}"
        several = [
            arguments(way, url, *settings, *(f"{network}.sharding_strategy={way}" for network in NETWORKS))
            for way, settings in WAYS.items()
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_HOME", str(folder / "torch"))
            assert run_on_processes(2, [{"arguments": each} for each in several], folder) == [0, 0]
        server.shutdown()
    return folder


def test_processes_download_once(on_processes):
    assert CountingHandler.asked == ["/teacher_checkpoint.pth"]


@pytest.mark.parametrize("way", WAYS)
def test_processes_change_nothing(on_processes, way):
    ours, theirs = on_processes / way, on_processes / "alone"
    for mine, other in zip(rows(ours), rows(theirs), strict=True):
        for name in other:
            if name.endswith("_loss"):
                assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
            elif name.startswith("grad_norm"):
                assert mine[name] == pytest.approx(other[name], rel=1e-3), name
    mine, other = whole(ours, 4)["model"], whole(theirs, 4)["model"]
    assert mine.keys() == other.keys()
    for name, value in other.items():
        if not name.endswith("qkv.bias"):  # its key third has no gradient but rounding
            torch.testing.assert_close(mine[name], value, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert teacher(ours, 4).keys() == teacher(theirs, 4).keys()
    assert not any("lora" in name for name in teacher(ours, 4))
