"""Wider experts say what the narrow ones said, and are free to learn."""

import pytest
import torch

from envs.errors import UserError
from envs.model.molmoe import AdaptiveMolmoE
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.packing import PackedScenes, PackingSettings
from recipes.embedded_model.scenes_phase import scenes_loss
from recipes.embedded_model.shape import build_config, build_tokenizer
from recipes.embedded_model.widen import widen

LOW = PackingSettings(images=(2, 1, 1), text_tokens=60, early_tiers=(1, 0, 0), late_tiers=(1, 0, 0), random_plans=0.0)


def narrow() -> AdaptiveMolmoE:
    return initialise(build_config(build_tokenizer().get_vocab_size(), 16), 0)


def test_a_widened_model_says_the_same() -> None:
    model, batch = narrow(), PackedScenes(1, 0, LOW)[0]
    wide = widen(model, 32, 1)
    assert wide.config.expert_hidden == 32
    with torch.no_grad():
        before, after = (m.language(m.embed(batch.inputs), plans=batch.plan) for m in (model, wide))
    torch.testing.assert_close(after, before)


def test_new_units_learn_immediately_and_differ() -> None:
    wide = widen(narrow(), 32, 1)
    scenes_loss(wide, PackedScenes(1, 0, LOW)[0])[0].backward()
    for block in wide.language.blocks:
        gradient = block.get_parameter("down").grad
        assert gradient is not None
        new = gradient[:, 16:].flatten(0, 1)
        assert float(new.abs().max()) > 0
        assert not torch.allclose(new[0], new[1])


def test_widening_by_nothing_is_a_copy_and_narrowing_is_refused() -> None:
    model = narrow()
    same = widen(model, 16, 1).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="16 units cannot be widened to 8"):
        widen(model, 8, 1)
