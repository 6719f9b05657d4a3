"""Models of transformers: planned without weights, converted from shards to shards, read again.

``uv run --with transformers pytest -m slow -n 0 tests/export/test_shards_transformers.py``
"""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import hodec
from hodec.export.checkpoint import weights_digest

REASON = "transformers is not installed: uv run --with transformers pytest -m slow"

TOKENS = torch.arange(24).reshape(2, 12)

# A net of 6,738,415,616 parameters: no memory for any of them, which in bfloat16 would be 13.5 GB.
SEVEN = """
import resource, torch, transformers, hodec
with torch.device("meta"):
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig())
tokens = {"input_ids": torch.zeros(1, 128, dtype=torch.long)}
plan = hodec.make_plan(net, "ratio", method="svd", example_input=tokens)
print(len(plan), plan.dense_params, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_net_of_seven_thousand_million_parameters_is_planned_without_memory():
    pytest.importorskip("transformers", reason=REASON)
    done = subprocess.run([sys.executable, "-c", SEVEN], capture_output=True, text=True, timeout=300, check=True)
    layers, parameters, peak = map(int, done.stdout.split()[-3:])
    assert (layers, parameters) == (226, 6_738_415_616)
    assert peak * 1024 < 2e9  # ru_maxrss counts KiB


def _llama(t, *, tied: bool):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return t.LlamaConfig(**sizes, vocab_size=96, tie_word_embeddings=tied)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rule", ["ratio", "energy"])
def test_a_folder_of_transformers_becomes_one(tmp_path, rule: str, tied: bool):
    transformers = pytest.importorskip("transformers", reason=REASON)
    torch.manual_seed(0)
    config = _llama(transformers, tied=tied)
    net = transformers.LlamaForCausalLM(config).eval()
    net.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config)
    given = {"method": "svd", "example_input": {"input_ids": TOKENS}}
    plan = hodec.make_plan(skeleton, rule, weights=tmp_path / "dense" if rule == "energy" else None, **given)
    whole = hodec.convert(net, plan)
    hodec.convert_shards(skeleton, plan, tmp_path / "dense", tmp_path / "small", shard_bytes=10_000)
    small = hodec.from_pretrained(tmp_path / "small")
    assert weights_digest(small) == weights_digest(whole)
    assert_close(small(TOKENS).logits, whole(TOKENS).logits, rtol=0, atol=0)
    again = hodec.load(tmp_path / "small", transformers.LlamaForCausalLM(config)).eval()
    assert_close(again(TOKENS).logits, whole(TOKENS).logits, rtol=0, atol=0)
