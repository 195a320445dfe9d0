"""The controller's decisions are legal, and its export survives nothing but an intact round trip."""

import json
from pathlib import Path

import pytest
import torch

from envs.errors import UserError
from envs.knobs import STAGE1_PAIRS, KnobSpace
from policies.controller import CARD_FILE, WEIGHTS_FILE, Controller
from policies.distribution import KnobDistribution
from policies.fused import FusedController


def observation(stage: int, rows: int = 5, d_model: int = 6, insertion: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(stage)
    mask = KnobSpace.stage2_mask(insertion) if stage else KnobSpace.stage1_mask()
    token = torch.randn(rows, d_model, generator=generator)
    return {
        "stage": torch.full((rows, 1), float(stage)),
        "budget": torch.randn(rows, 1, generator=generator),
        "language_feature": token * (1 - stage),
        "latency_token": token * stage,
        "insertion": torch.full((rows, 1), float(insertion * stage)),
        "action_mask": torch.as_tensor(mask).float().expand(rows, -1),
    }


@pytest.mark.parametrize(("stage", "insertion"), [(0, 1), *((1, p) for p in range(1, 6))])
def test_actions_are_legal(stage: int, insertion: int) -> None:
    torch.manual_seed(0)
    obs = observation(stage, insertion=insertion)
    actions = Controller(6, 256).act(obs).numpy()
    mask = obs["action_mask"][0].numpy()
    assert actions.shape == (5, 4)
    assert mask[actions[:, 0] * 5 + actions[:, 1]].all()
    assert mask[STAGE1_PAIRS + actions[:, 2] * 5 + actions[:, 3]].all()


@pytest.mark.parametrize("seed", range(20))
def test_one_stage_alone_decides_as_both_in_a_batch_do(seed: int) -> None:
    torch.manual_seed(seed)
    controller = Controller(6, 32).eval()
    for parameter in controller.parameters():  # far from uniform, norms included
        torch.nn.init.normal_(parameter, std=0.7)
    first, second = observation(0, 1), observation(1, 1, insertion=3)
    second["budget"] = first["budget"]
    legal = [obs["action_mask"][0].bool().numpy() for obs in (first, second)]
    fused = FusedController(controller)
    terms = fused.budget_terms(float(first["budget"]))
    chosen = fused.decide_stage1(first["language_feature"][0].numpy(), terms[0], legal[0])
    assert chosen == tuple(controller.act(first)[0, :2].tolist())
    chosen = fused.decide_stage2(second["latency_token"][0].numpy(), terms[1], 3, legal[1])
    assert chosen == tuple(controller.act(second)[0, 2:].tolist())


def test_both_stages_may_be_mixed_in_a_batch() -> None:
    controller = Controller(6, 256)
    first, second = observation(0), observation(1)
    mixed = {key: torch.cat((first[key], second[key])) for key in first}
    torch.testing.assert_close(controller(mixed), torch.cat((controller(first), controller(second))))


def test_the_fraction_of_a_float_position_does_not_matter() -> None:
    controller, obs = Controller(6, 256), observation(1, insertion=3)
    torch.testing.assert_close(controller(obs), controller(obs | {"insertion": obs["insertion"] - 1e-6}))


def test_export_round_trip(tmp_path: Path) -> None:
    controller = Controller(6, hidden=32)
    folder = controller.save(tmp_path / "best", {"fingerprint": "abc", "iteration": 7})
    loaded, metadata = Controller.load(folder, d_model=6, fingerprint="abc")
    assert metadata == {"fingerprint": "abc", "iteration": 7}
    for stage in (0, 1):
        assert torch.equal(loaded(observation(stage)), controller(observation(stage)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_an_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = Controller(6, 256).save(tmp_path / "best", {"iteration": 1})
    with pytest.raises(UserError, match="exists already"):
        Controller(6, 256).save(folder, {"iteration": 2})
    assert Controller.load(folder)[1] == {"iteration": 1}
    Controller(6, 256).save(folder, {"iteration": 2}, overwrite=True)
    assert Controller.load(folder)[1] == {"iteration": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"]


def test_an_export_to_an_impossible_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        Controller(6, 256).save(tmp_path / "file" / "best", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CARD_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_damaged_exports_are_refused(tmp_path: Path, file: str, damage: str) -> None:
    path = Controller(6, 256).save(tmp_path / "best", {"fingerprint": "abc"}) / file
    content = path.read_bytes()
    flipped = bytes([*content[:100], content[100] ^ 0x55, *content[101:]])
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": content[:-20], "flipped": flipped}[damage])
    with pytest.raises(UserError) as caught:
        Controller.load(tmp_path / "best")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format_version": None}, "format version None"),
        ({"d_model": "six"}, "d_model"),
        ({"d_model": 7}, "does not contain this controller"),
        ({"hidden": -1}, "hidden"),
        ({"metadata": []}, "metadata"),
        ({"sha256": "0"}, "corrupt"),
    ],
)
def test_cards_that_do_not_fit_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    path = Controller(6, 256).save(tmp_path / "best", {}) / CARD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        Controller.load(tmp_path / "best")


def test_controllers_for_another_model_are_refused(tmp_path: Path) -> None:
    folder = Controller(6, 256).save(tmp_path / "best", {"fingerprint": "abc"})
    with pytest.raises(UserError, match="width 6, not 2048"):
        Controller.load(folder, d_model=2048)
    with pytest.raises(UserError, match="another model"):
        Controller.load(folder, fingerprint="xyz")


def test_full_size_is_small() -> None:
    controller = Controller(2048, 256)
    assert controller(observation(0, d_model=2048)).shape == (5, 40)
    assert sum(parameter.numel() for parameter in controller.parameters()) < 2_000_000


def test_widths_must_be_positive() -> None:
    with pytest.raises(UserError, match="positive"):
        Controller(0, 256)


@pytest.mark.parametrize("stage", [0, 1])
def test_one_stage_alone_decides_as_both_do(stage: int) -> None:
    controller = Controller(6, 16)
    obs = observation(stage)
    alone, both = KnobDistribution(controller(obs, stage)), KnobDistribution(controller(obs))
    for first, second in zip(alone.stage_log_probs, both.stage_log_probs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
