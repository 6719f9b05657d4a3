"""Models of Hugging Face: converted, written by save_pretrained, and read again with their plan."""

import json
from types import SimpleNamespace

import pytest
import torch
from swaps import conv, planned
from torch import nn

import hodec
from hodec.errors import CheckpointError


class Pretrained(nn.Sequential):
    """What hodec looks at in a model of Hugging Face."""

    def __init__(self) -> None:
        super().__init__(conv(), conv())
        self.config = SimpleNamespace(hidden_size=4)

    def save_pretrained(self) -> None: ...


def test_the_plan_lies_in_the_config_of_the_converted_model_alone():
    model = Pretrained()
    small = hodec.convert(model, planned(model))
    assert vars(model.config) == {"hidden_size": 4}
    entry = json.loads(json.dumps(small.config.quantization_config))
    assert hodec.Plan.from_dict(entry["hodec_plan"]).to_dict() == small.hodec_plan.to_dict()
    assert "quant_method" not in entry  # transformers would go on with a warning where it does not know the method
    assert vars(hodec.merge(small).config) == {"hidden_size": 4}
    assert small.config.quantization_config


class Tied(Pretrained):
    """A model that says which of its parameters are one, as a class and of its parts."""

    _tied_weights_keys = {"1.weight": "0.weight", r"parts.\d+": "parts.0"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self[1].weight = self[0].weight
        self.all_tied_weights_keys = {"1.weight": "0.weight", "1.bias": "0.bias"}


def test_a_model_says_which_factors_are_one():
    model = Tied()
    small = hodec.convert(model, planned(model, method="svd"))
    factors = {"1.kernels.0": "0.kernels.0", "1.kernels.1": "0.kernels.1"}
    assert small.all_tied_weights_keys == {"1.bias": "0.bias", **factors}
    assert small._tied_weights_keys == {r"parts.\d+": "parts.0", **factors}
    for dense in (model, hodec.merge(small)):
        assert dense.all_tied_weights_keys == {"1.weight": "0.weight", "1.bias": "0.bias"}
        assert dense._tied_weights_keys is Tied._tied_weights_keys


def test_a_folder_without_a_plan_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no plan of hodec.*from_pretrained of transformers"):
        hodec.from_pretrained(tmp_path)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = torch.arange(24).reshape(2, 12)


def _vit(t):
    return t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=32, patch_size=8)), torch.randn(2, 3, 32, 32)


def _gpt2(t):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 99}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)), TOKENS


def _bert(t):
    return t.BertForMaskedLM(t.BertConfig(**SIZES, vocab_size=99)), TOKENS


def _t5(t):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    return t.T5EncoderModel(t.T5Config(**sizes)), TOKENS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["tt", "svd"])
@pytest.mark.parametrize("make", [_vit, _gpt2, _bert, _t5])
def test_a_model_of_transformers_converts_fuses_and_comes_back(make, method, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, x = make(transformers)
    model.eval()
    full = hodec.convert(model, planned(model, 10**6, x, method=method, allow_larger=True))
    plan = planned(model, 4, x, method=method, allow_larger=True)
    small = hodec.convert(model, plan)
    fused = hodec.fuse(small, example_input=x, target="macs")
    small.save_pretrained(tmp_path)
    back = hodec.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(full(x)[0], model(x)[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fused(x)[0], small(x)[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(back(x)[0], small(x)[0], rtol=0, atol=0)
    assert type(back) is type(model)
    assert back.hodec_plan.to_dict() == plan.to_dict()
    with pytest.raises(ValueError, match="quant_method"):  # not dense layers with random weights
        type(model).from_pretrained(tmp_path)
    hodec.merge(small).save_pretrained(tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(x)[0], small(x)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["tt", "svd"])
def test_four_layers_with_one_weight_come_back_with_the_same_factors(method, tmp_path):
    """The config's keys are sorted when it is written, also those of the plan's inputs."""
    t = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes, use_cache=False)).eval()
    x = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}
    small = hodec.convert(model, planned(model, 4, x, method=method, allow_larger=True))
    small.save_pretrained(tmp_path)
    back = hodec.from_pretrained(tmp_path)
    back.tie_weights()
    users = [back.lm_head, back.shared, back.encoder.embed_tokens, back.decoder.embed_tokens]
    assert len({p for user in users for p in user.parameters()}) == 2
    assert back.hodec_plan.example_input().kwargs["decoder_input_ids"].shape == (2, 5)
    with torch.no_grad():
        assert torch.equal(back(**x).logits, small(**x).logits)
    dense = hodec.merge(back)
    assert dense.lm_head.weight is dense.shared.weight
    dense.save_pretrained(tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense").eval()
    assert plain.lm_head.weight is plain.shared.weight
    with torch.no_grad():
        torch.testing.assert_close(plain(**x).logits, small(**x).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_altered_folder_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, x = _gpt2(transformers)
    model.eval()
    hodec.convert(model, planned(model, 4, x, method="svd")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["hodec_plan"]["layers"]
    layers.pop(next(iter(layers)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit its plan: .* the first lm_head\.kernels"):
        hodec.from_pretrained(tmp_path)
