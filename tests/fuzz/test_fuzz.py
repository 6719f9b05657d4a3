"""Thousands of random inputs: each is either right, or refused in one message. Slow; a few of each kind are fast.

    pytest -m slow -n 0 -s tests/fuzz/test_fuzz.py

``HODEC_FUZZ_SEED`` chooses other inputs, ``HODEC_FUZZ_SCALE`` more of them. The outcomes are printed by family.
"""

import sys
import warnings
from dataclasses import dataclass

import fuzz_configs
import fuzz_files
import fuzz_formats
import fuzz_graphs
import fuzz_nets
import fuzz_plans
import pytest
from harness import OUTCOMES, SEED, Check, run, scaled


@dataclass(frozen=True)
class Family:
    """A kind of inputs, with the number of them in the slow test and in the fast one."""

    check: Check
    count: int
    fast: int


FAMILIES = {
    "formats and layers": Family(fuzz_formats.check, 3000, 6),
    "modes": Family(fuzz_formats.check_modes, 1000, 6),
    "plans, values edited": Family(fuzz_plans.check_edits, 2000, 6),
    "plans, bytes altered": Family(fuzz_plans.check_bytes, 700, 3),
    "settings, trees": Family(fuzz_configs.check_trees, 1700, 6),
    "settings, command lines": Family(fuzz_configs.check_overrides_of, 60, 1),
    "nets": Family(fuzz_nets.check, 240, 2),
    "graphs": Family(fuzz_graphs.check_graphs, 240, 2),
    "graphs, broken": Family(fuzz_graphs.check_broken, 500, 3),
    "files of weights": Family(fuzz_files.check_weights, 1300, 6),
    "compressed models": Family(fuzz_files.check_models, 600, 3),
}


def go(name: str, count: int, folder, salt: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about odd layers and tensors
        run(name, FAMILIES[name].check, count, folder, salt)
    found = OUTCOMES[name]
    sys.stdout.write(f"\n{name}, seed {SEED + salt}: {found.total()} inputs: {dict(found.most_common())}\n")
    assert found.total() >= count, "inputs were left out"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_of_each_family(name, tmp_path):
    go(name, FAMILIES[name].fast, tmp_path, salt=0)


def test_ten_thousand_are_tried():
    assert sum(family.count for family in FAMILIES.values()) >= 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_of_a_family(name, tmp_path):
    go(name, scaled(FAMILIES[name].count), tmp_path, salt=1)
    assert len(OUTCOMES[name]) > 1, "nothing was refused, or nothing accepted"
