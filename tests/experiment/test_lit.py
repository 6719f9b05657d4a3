"""LitClassifier against formulas written out by hand."""

import copy
import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from hodec.conversion.swap import convert
from hodec.errors import ConfigError, TrainingError
from hodec.experiment.lit import OPTIMIZERS, SCHEDULES, LitClassifier, evaluate
from hodec.experiment.training import quiet_lightning
from hodec.optim.factor_sgd import FactorSGD
from hodec.ranks import make_plan

CLASSES = 4


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES))


def batch(generator, count=10):
    return torch.randn(count, 6, generator=generator), torch.randint(0, CLASSES, (count,), generator=generator)


def fit(module, data, *, epochs=1, **options):
    with quiet_lightning():
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`.*")
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )
        trainer.fit(module, data)
    return trainer


def test_label_smoothing_is_cross_entropy_with_smoothed_targets(generator):
    x, y = batch(generator)
    module = LitClassifier(net(), label_smoothing=0.2)
    log_p = F.log_softmax(module(x), dim=1)
    targets = torch.full((10, CLASSES), 0.2 / CLASSES)
    targets[torch.arange(10), y] += 0.8
    assert_close(module.loss(module(x), x, y), -(targets * log_p).sum(dim=1).mean())


def test_distillation_is_the_divergence_from_the_teacher(generator):
    x, y = batch(generator)
    teacher, t, share = net(), 3.0, 0.7
    module = LitClassifier(net(), teacher=teacher, distill_weight=share, temperature=t)
    scores = module(x)
    p = torch.softmax(teacher(x) / t, dim=1)
    q = torch.softmax(scores / t, dim=1)
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    hard = -torch.log_softmax(scores, dim=1)[torch.arange(10), y].mean()
    assert_close(module.loss(scores, x, y), (1 - share) * hard + share * t**2 * divergence)


def test_a_net_that_agrees_with_its_teacher_has_no_distillation_loss(generator):
    x, y = batch(generator)
    same = net()
    module = LitClassifier(same, teacher=net(), distill_weight=1.0)
    module._teacher[0].load_state_dict(same.state_dict())
    assert_close(module.loss(module(x), x, y), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_the_teacher_is_neither_saved_nor_trained(generator):
    given = net()
    given.append(nn.Dropout(0.9))
    module = LitClassifier(net(), teacher=given, distill_weight=0.5)
    (teacher,) = module._teacher
    assert module.state_dict().keys() == {"net.1.weight", "net.1.bias"}
    assert len(list(module.parameters())) == 2
    module.train()
    assert not teacher.training
    before = [p.clone() for p in teacher.parameters()]
    fit(module, DataLoader(TensorDataset(*batch(generator)), batch_size=5))
    assert_close(list(teacher.parameters()), before, rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert given.training, "the given net stays as it is"
    assert all(p.requires_grad for p in given.parameters())


def test_without_weight_there_is_no_teacher():
    teacher = net()
    assert LitClassifier(net(), teacher=teacher, distill_weight=0.0)._teacher == ()
    assert all(p.requires_grad for p in teacher.parameters())


def rates(schedule, *, epochs=4, warmup=0.0, batches=5, span=(0.0, 1.0)):
    """The learning rate of every step of a fit."""
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(optimizer.param_groups[0]["lr"])

    g = torch.Generator().manual_seed(0)
    module = LitClassifier(net(), options={"lr": 0.1}, schedule=schedule, warmup_epochs=warmup, span=span)
    data = DataLoader(TensorDataset(*batch(g, 2 * batches)), batch_size=2)
    fit(module, data, epochs=epochs, callbacks=[Watch()])
    return seen


def test_schedules():
    assert rates("constant") == pytest.approx([0.1] * 20)
    assert rates("linear") == pytest.approx([0.1 * (1 - k / 20) for k in range(20)])
    assert rates("cosine") == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 20)) for k in range(20)])
    assert rates("step") == pytest.approx([0.1] * 10 + [0.01] * 5 + [0.001] * 5)


def test_warm_up_rises_from_near_zero_and_then_the_schedule_begins():
    seen = rates("linear", warmup=1)
    assert seen[:5] == pytest.approx([0.1 * (k + 1) / 6 for k in range(5)])
    assert seen[5:] == pytest.approx([0.1 * (1 - k / 15) for k in range(15)])


def test_two_fits_share_a_schedule():
    apart = rates("cosine", epochs=1, span=(0.0, 0.25)) + rates("cosine", epochs=3, span=(0.25, 1.0))
    assert apart == pytest.approx(rates("cosine"))
    # the second goes on where the first was, so it does not warm up
    assert rates("cosine", epochs=3, span=(0.25, 1.0), warmup=1) == pytest.approx(rates("cosine")[5:])


def test_schedules_go_from_one_to_their_end():
    ends = {name: (factor(0.0), factor(1.0)) for name, factor in SCHEDULES.items()}
    assert ends == {
        "constant": (1.0, 1.0),
        "linear": (1.0, 0.0),
        "cosine": (1.0, 0.0),
        "step": (1.0, pytest.approx(0.01)),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_gets_its_options(name):
    module = LitClassifier(net(), optimizer=name, options={"lr": 0.01, "weight_decay": 0.3})
    g = torch.Generator().manual_seed(0)
    trainer = fit(module, DataLoader(TensorDataset(*batch(g)), batch_size=5))
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "muon": FactorSGD, "scaled_gd": FactorSGD}
    assert type(trainer.optimizers[0]) is kinds[name]
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.3


def test_features_of_the_teacher_join_the_loss(generator):
    dense = net()
    plan = make_plan(dense, 1, method="svd", example_input=batch(generator, 2)[0])
    small = convert(dense, plan).train()
    x, y = batch(generator)
    plain = LitClassifier(copy.deepcopy(small), teacher=dense, distill_weight=0.5)
    taught = LitClassifier(copy.deepcopy(small), teacher=dense, distill_weight=0.5, feature_weight=2.0)
    features = taught._features[0]
    with torch.no_grad():
        difference = taught.loss(taught.net(x), x, y) - plain.loss(plain.net(x), x, y)
        taught._teacher[0](x)
        taught.net(x)
        assert float(difference) == pytest.approx(2.0 * float(features.loss()), rel=1e-4)
    assert float(difference) > 0
    assert not LitClassifier(dense, teacher=dense, feature_weight=2.0)._teacher  # a dense net has no such layers


@pytest.mark.parametrize("wrong", [{"optimizer": "adamm"}, {"schedule": "cosin"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"there are sgd, adamw, muon, scaled_gd, and constant, linear, cosine, step"):
        LitClassifier(net(), **wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_fit(generator, value):
    x, y = batch(generator, 12)
    x[7] = value  # of epoch 0, the fourth batch of two
    module = LitClassifier(net())
    with pytest.raises(TrainingError) as error:
        fit(module, DataLoader(TensorDataset(x, y), batch_size=2), epochs=2)
    message = str(error.value)
    assert "the loss is nan at epoch 0, step 3" in message
    assert "Lower optimizer.lr" in message
    assert "trainer.gradient_clip_val" in message


def test_channels_last_is_a_layout_not_another_result(generator):
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    x = torch.randn(4, 3, 8, 8, generator=generator)
    plain = conv(x)
    module = LitClassifier(conv, channels_last=True)
    assert conv[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(module(x.to(memory_format=torch.channels_last)), plain)


def test_evaluate_counts_every_image_once(generator):
    x, y = batch(generator, 11)
    model = net()
    model.append(nn.Dropout(0.9))
    model.train()
    right = (model.eval()(x).argmax(1) == y).double().mean().item()
    model.train()
    assert evaluate(model, DataLoader(TensorDataset(x, y), batch_size=4)) == pytest.approx(right, abs=1e-12)
    assert model.training


def test_evaluate_refuses_what_cannot_be_scored(generator):
    x, y = batch(generator)
    with pytest.raises(TrainingError, match="no batches"):
        evaluate(net(), [])
    model = net()
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="NaN or Inf on the evaluation data"):
        evaluate(model, [(x, y)])


@pytest.fixture
def eager(monkeypatch):
    """torch.compile without code generation: traced, then run as it stands."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))


def test_a_compiled_net_has_the_same_parameters_and_state(eager, generator):
    x, y = batch(generator)
    plain, compiled = LitClassifier(net()), LitClassifier(net(), compiled=True)
    compiled.load_state_dict(plain.state_dict())
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in plain.named_modules()]
    fit(plain, DataLoader(TensorDataset(x, y), batch_size=5), epochs=2)
    fit(compiled, DataLoader(TensorDataset(x, y), batch_size=5), epochs=2)
    for name, value in plain.state_dict().items():
        assert_close(compiled.state_dict()[name], value)
    assert type(compiled.net) is nn.Sequential


def test_training_goes_through_the_compiled_net_and_validation_does_not(monkeypatch, generator):
    x, y = batch(generator)
    calls = []

    def compile_(model):
        return lambda given: calls.append(len(given)) or model(given)

    monkeypatch.setattr(torch, "compile", compile_)
    module = LitClassifier(net(), compiled=True)
    module.log_dict = lambda *_, **__: None
    module.validation_step((x, y), 0)
    assert calls == []
    module.training_step((x[:7], y[:7]), 1)
    assert calls == [7]


def test_a_net_that_cannot_be_compiled_is_one_message(monkeypatch, generator):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nand more")

    torch._dynamo.reset()  # or what other tests compiled counts against its limit
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=broken))
    module = LitClassifier(net(), compiled=True)
    with pytest.raises(
        TrainingError, match=r"trainer\.compile=true: .*no compiler.* give trainer\.compile=false"
    ) as error:
        module.training_step(batch(generator), 0)
    assert "\n" not in str(error.value)
