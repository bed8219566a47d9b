"""The optimizer: what decays, what 8 bits change, and a paged one that would not page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import referenced
from small_models import save_small_model
from test_learner import config_for, make_learner, make_pairs, never, same, train, trained
from torch import nn

from rlhf.config_learner import Learner
from rlhf.errors import InputError, Interrupted
from rlhf.optimizer import check_optimizer, make_optimizer

EIGHT_BIT = {"optimizer": "adamw_8bit"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small") / "model")


def test_norms_and_biases_do_not_decay(small_model: Path) -> None:
    config = config_for(small_model, model={"tuning": "full"}, learner={"weight_decay": 0.5})
    learner = make_learner(config)
    optimizer = make_optimizer(learner.policy.trainable(), config.learner, 0.1)
    names = {id(p): n for n, p in learner.policy.trainable()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert decays.keys() == set(names.values())
    still = {name for name, decay in decays.items() if decay == 0}
    assert still == {n for n in decays if n.endswith("bias") or "norm" in n}
    # Without gradients to speak of, decay alone moves a weight: by 1 - rate x decay.
    before = trained(learner)
    for _, parameter in learner.policy.trainable():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in trained(learner).items():
        factor = 1.0 if name in still else 0.95
        torch.testing.assert_close(value, before[name] * factor)


def test_eight_bit_moments_take_nearly_the_steps_of_fp32_ones() -> None:
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    ends = []
    for settings in (Learner(), Learner.model_validate(EIGHT_BIT)):
        weight = nn.Parameter(torch.zeros(128, 64))
        optimizer = make_optimizer([("weight", weight)], settings, 0.05)
        for _ in range(40):
            optimizer.zero_grad()
            ((weight - target) ** 2).sum().backward()
            optimizer.step()
        ends.append(weight.detach())
    state = next(iter(optimizer.state.values()))
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
    assert not torch.equal(*ends)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_eight_bit_training_resumes_at_every_step_without_a_changed_byte(
    small_model: Path, tmp_path: Path, stop: int
) -> None:
    config = config_for(
        small_model,
        model={"tuning": "full"},
        learner={"batch_pairs": 2, "learning_rate": 1e-3, **EIGHT_BIT},
    )
    pairs, calls = make_pairs(8), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted("stopped at a safe point")

    whole = make_learner(config)
    train(whole, pairs, tmp_path / "whole")
    reference = referenced(make_learner(config), pairs, 1)
    with pytest.raises(Interrupted):
        train(make_learner(config), pairs, tmp_path / "cut", check=check, reference=reference)
    again = make_learner(config)
    _, log = train(again, pairs, tmp_path / "cut", check=never, reference=reference)
    assert log.steps == [1, 2, 3, 4][stop:]
    assert same(trained(again), trained(whole))


def test_a_paged_optimizer_is_refused_where_it_would_not_page(small_model: Path) -> None:
    config = config_for(small_model, learner={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(InputError, match=r"paged_adamw_8bit.*runs on cpu; use adamw_8bit"):
        make_learner(config)
    check_optimizer(config.learner, "cuda")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    settings: Any = Learner.model_validate(EIGHT_BIT)
    with pytest.raises(InputError, match=r"adamw_8bit needs bitsandbytes.*pairloop\[qlora\]"):
        check_optimizer(settings, "cpu")
