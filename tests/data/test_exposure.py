from dinov2.data.exposure import PRETRAINED_ON, seen_in_pretraining
from dinov2.data.prepare import all_datasets
from dinov2.hub.sources import PACKAGED, RELEASES


def test_the_table_names_releases_and_sets_that_exist():
    assert {*PACKAGED, *(name.partition("_")[0] for name in RELEASES)} >= set(PRETRAINED_ON)
    for names in PRETRAINED_ON.values():
        assert set(names) <= set(all_datasets())


def test_dinobloom_saw_all_of_its_sets_but_acevedo():
    new = {"bloodmnist", "c_nmc", "ku_optofil", "mll23"}  # not in its paper
    assert seen_in_pretraining("dinobloom_b", all_datasets()) == sorted(set(all_datasets()) - new - {"acevedo"})
    assert seen_in_pretraining("dinov2_vitb14", all_datasets()) == []
    assert seen_in_pretraining("dinobloom_s", ["acevedo", "my own set"]) == []
