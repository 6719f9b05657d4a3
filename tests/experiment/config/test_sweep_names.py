"""A sweep's folders name what is swept, however many constant overrides stand beside it."""

import pytest

from hodec.experiment.config.sweep_names import job_folder

CONSTANT = (
    "bn_batches=0,data.batch_size=1024,dense_epochs=0,exclude=[conv1,linear],model=resnet20,retrain_epochs=1,"
    "trainer.threads=1"
)
GIVEN = ["-m", *CONSTANT.replace("exclude=[conv1,linear],", "").split(","), "exclude=[conv1,linear]"]


def test_names_need_no_quotes():
    assert job_folder(0, "admm.rho=1e-4", []) == "0_admm.rho-1e-4"
    assert job_folder(1, "model.name=torchvision/resnet18,tt_ranks={layer1.*:9}", []).count("/") == 0
    assert job_folder(2, "", []) == "2"
    assert len(job_folder(3, "x=" + "y" * 1000, [])) < 210


@pytest.mark.parametrize(
    ("swept", "overrides", "name"),
    [
        ("tt_ranks=8,16", "tt_ranks=8", "0_tt_ranks-8"),
        ("seed=range(3)", "seed=1", "0_seed-1"),
        ("method=tt,svd", "method=svd", "0_method-svd"),
        ("+tt_ranks=[4,8],[8,16]", "+tt_ranks=[4,8]", "0_tt_ranks-4-8"),
        ("admm.rho=choice(1e-4,1e-3)", "admm.rho=0.001", "0_admm.rho-0.001"),
    ],
)
def test_what_is_swept_is_the_name(swept, overrides, name):
    assert job_folder(0, f"{CONSTANT},{overrides}", [*GIVEN, swept]) == name


def test_two_keys_that_are_swept_are_both_named():
    name = job_folder(4, f"{CONSTANT},seed=2,tt_ranks=16", [*GIVEN, "tt_ranks=8,16", "seed=1,2"])
    assert name == "4_seed-2-tt_ranks-16"


def test_where_the_sweep_is_not_known_the_last_overrides_stay_readable():
    assert job_folder(0, f"{CONSTANT},tt_ranks=8", []).endswith("tt_ranks-8")
    assert job_folder(0, f"{CONSTANT},{'data.root=' + 'long' * 60},tt_ranks=8", ["a=[broken"]).endswith("tt_ranks-8")
