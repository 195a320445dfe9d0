"""The recipe end to end at toy size: all phases, interruption, the folder it leaves."""

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from envs import embedded
from envs.data.scenes import SceneImage, all_questions, make_scene
from envs.data.scenes.draw import draw_scene
from envs.errors import UserError
from envs.knobs import ExecutionPlan
from envs.model import AdaptiveMolmoE
from envs.processing import MolmoEProcessor
from recipes.embedded_model.evaluate import ensure_importance
from recipes.embedded_model.fresh_weights import initialise
from recipes.embedded_model.loop import LoopSettings, Phase, run_phase, schedule
from recipes.embedded_model.packing import (
    FAMILY_NAMES,
    IGNORE,
    PackedScenes,
    PackingSettings,
    only_tier,
    pack,
    random_plan,
)
from recipes.embedded_model.scenes_phase import scenes_loss
from recipes.embedded_model.shape import build_config, build_processor, build_tokenizer, train_tokenizer
from recipes.embedded_model.train import (
    CONTRAST_PACKING,
    DEPTH_PACKING,
    LATE_PHASES,
    RESERVE_PACKING,
    Recipe,
    check_folder,
    main,
    train,
)
from recipes.embedded_model.warmup import WarmupCrops

TINY = Recipe(
    warmup_steps=2,
    warmup_batch=2,
    scenes_steps=2,
    packing=PackingSettings(images=(2, 1, 1), text_tokens=60, early_tiers=(1, 0, 0), late_tiers=(1, 0, 0)),
    depth_steps=2,
    depth_packing=dataclasses.replace(
        DEPTH_PACKING, images=(2, 1, 1), text_tokens=60, early_tiers=(1, 0, 0), late_tiers=(1, 0, 0)
    ),
    reserve_steps=2,
    reserve_packing=dataclasses.replace(
        RESERVE_PACKING, images=(2, 1, 1), text_tokens=60, early_tiers=(1, 0, 0), late_tiers=(1, 0, 0)
    ),
    contrast_steps=2,
    contrast_packing=dataclasses.replace(
        CONTRAST_PACKING, images=(2, 1, 1), text_tokens=60, early_tiers=(1, 0, 0), late_tiers=(1, 0, 0)
    ),
)


def settings(folder: Path, seconds: float = math.inf) -> LoopSettings:
    return LoopSettings(folder, torch.device("cpu"), deadline=time.monotonic() + seconds, workers=0)


def test_the_recipe_leaves_a_model_that_answers(tmp_path: Path) -> None:
    assert train(TINY, settings(tmp_path))
    model = AdaptiveMolmoE.from_pretrained(tmp_path / "model")
    processor = MolmoEProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    image = SceneImage("test", 0).load()
    answer = model.generate(processor(image, "What shape is red?", "low"), ExecutionPlan(), max_new_tokens=2)
    assert len(answer) == 1
    assert len(answer[0]) <= 2
    phases = {line.split('"')[3] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert phases == {"warmup", "scenes", "depth", "reserve", "contrast"}


@pytest.mark.parametrize("first", list(LATE_PHASES))
def test_later_phases_start_from_a_model(first: str, tmp_path: Path) -> None:
    start = embedded.folder()
    assert train(dataclasses.replace(TINY, start=str(start), first=first), settings(tmp_path))
    before, after = (AdaptiveMolmoE.from_pretrained(f).state_dict() for f in (start, tmp_path / "model"))
    assert before.keys() == after.keys()
    if first == "depth":
        before = {key: value * (TINY.router_scale if "router" in key else 1) for key, value in before.items()}
    assert 0 < max(float((before[key] - after[key]).abs().max()) for key in before) < 0.1
    ran = list(LATE_PHASES)[list(LATE_PHASES).index(first) :]
    assert {path.stem for path in tmp_path.glob("*.pt")} == set(ran)


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    complete, parts = tmp_path / "complete", tmp_path / "parts"
    for folder in (complete, parts):
        folder.mkdir()
    train(TINY, settings(complete))
    runs = 0
    while not train(TINY, settings(parts, seconds=0)):  # out of time after every step
        runs += 1
        if runs > 1:  # from the scenes phase on there is a model, narrow at first, in a folder that describes it
            AdaptiveMolmoE.from_pretrained(parts / "model")
    assert runs == 5
    a, b = (torch.load(f / "contrast.pt", weights_only=True)["modules"] for f in (complete, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    check_folder(tmp_path, dataclasses.asdict(TINY), resume=False)
    with pytest.raises(UserError, match="--resume"):
        check_folder(tmp_path, dataclasses.asdict(TINY), resume=False)
    check_folder(tmp_path, dataclasses.asdict(TINY), resume=True)
    with pytest.raises(UserError, match="another recipe"):
        check_folder(tmp_path, dataclasses.asdict(dataclasses.replace(TINY, seed=9)), resume=True)


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "warmup.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"warmup\.pt"):
        train(TINY, settings(tmp_path))


def test_batches_are_functions_of_seed_and_step() -> None:
    a, b = (WarmupCrops(5, 3, 0)[2] for _ in range(2))
    assert torch.equal(a.crops, b.crops)
    assert not torch.equal(a.crops, WarmupCrops(5, 3, 1)[2].crops)
    packed = [PackedScenes(5, seed, TINY.packing)[3].inputs["images"] for seed in (0, 0, 1)]
    assert torch.equal(packed[0], packed[1])
    assert not torch.equal(packed[0], packed[2])


def test_warmup_labels_stand_where_the_objects_are() -> None:
    batch = WarmupCrops(1, 64, 0)[0]
    on_object = batch.kinds > 0
    assert torch.equal(batch.colors >= 0, on_object)
    assert torch.equal(batch.digits >= 0, batch.kinds == 1)
    # Objects are brighter than the background: so are the tokens that carry labels.
    brightness = batch.crops.mean(-1).view(64, 4, 2, 4, 2).mean((2, 4)).view(64, 16)
    assert brightness[on_object].mean() > brightness[~on_object].mean() + 0.5


def test_a_packed_question_is_answered_as_if_it_stood_alone() -> None:
    """Packing must not change what is computed: logits equal those of the plain prompt."""
    processor = build_processor()
    model = initialise(build_config(len(processor.tokenizer)), 0).eval()
    scene = make_scene("corpus", 11, "landscape")
    questions = all_questions(scene)[-3:]
    batch = pack(processor, [scene], [questions], "low", ExecutionPlan(), 60)
    with torch.no_grad():
        hidden = model.language(
            model.embed(batch.inputs),
            plans=batch.plan,
            position_ids_BT=batch.position_ids,
            attention_mask_BTT=batch.attention_mask,
            experts="dense",
        )
        packed = model.language.logits(hidden)[0]
        starts = [i for i in range(packed.shape[0]) if batch.families[0, i] >= 0]
        for place, question in zip(starts, questions, strict=True):
            alone = model(processor(Image.fromarray(draw_scene(scene)), question.text, "low"), ExecutionPlan())
            assert torch.allclose(packed[place], alone[0, -1], atol=1e-3)
            assert processor.decode([int(batch.labels[0, place])]) == question.answer
    assert int((batch.labels != IGNORE).sum()) == 2 * len(questions)


def test_only_families_that_want_crops_meet_random_plans() -> None:
    batches = PackedScenes(40, 0, TINY.depth_packing)
    reduced = [batch for batch in (batches[step] for step in range(40)) if batch.plan != ExecutionPlan()]
    assert 0 < len(reduced) < 20
    families = {FAMILY_NAMES[index] for batch in reduced for index in batch.families.unique().tolist() if index >= 0}
    assert families == {"digit", "match"}


@pytest.mark.parametrize(
    ("packing", "taught", "first"),
    [(TINY.reserve_packing, {"corners"}, 4), (TINY.contrast_packing, {"corners", "sum"}, 6)],
)
def test_reserve_steps_ask_for_their_families_alone(packing: PackingSettings, taught: set[str], first: int) -> None:
    batches = PackedScenes(20, 0, packing)
    reserve = [batch for batch in (batches[step] for step in range(20)) if batch.reserve is not None]
    assert 4 < len(reserve) < 16
    families = {FAMILY_NAMES[index] for batch in reserve for index in batch.families.unique().tolist() if index >= 0}
    assert families == taught
    assert all(batch.plan == ExecutionPlan() and batch.reserve == first for batch in reserve)


def test_reserve_steps_teach_experts_and_words_alone() -> None:
    packing = dataclasses.replace(TINY.reserve_packing, reserve_share=1.0)
    reserve = [PackedScenes(1, 0, packing)[0]]
    model = AdaptiveMolmoE.from_pretrained(embedded.folder()).requires_grad_(True)
    scenes_loss(model, reserve[0])[0].backward()
    taught = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"gate_up", "down", "wte"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_random_plans_are_legal_and_varied() -> None:
    rng = np.random.default_rng(0)
    plans = {random_plan(rng) for _ in range(50)}
    assert len(plans) > 40
    assert min(len(plan.blocks) for plan in plans) == 12


def test_every_word_of_the_scenes_is_one_token_and_anything_encodes() -> None:
    tokenizer = build_tokenizer()
    for word in (" red", " circle", " 7", " What", " User", " Assistant", " larger"):
        assert len(tokenizer.encode(word).ids) == 1, word
    text = " Où est le bébé? 東京 \U0001f600"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_kept_tokenizer_knows_the_words_the_scenes_use_now() -> None:
    """Scenes may change after the tokenizer was made; their words must not, but for two that cost more tokens."""
    kept, fresh = build_tokenizer(), train_tokenizer()
    words = {word for word in fresh.get_vocab() if word.startswith("\u0120")}
    text = {fresh.decode([fresh.token_to_id(word)]) for word in words}
    used = {w for seed in range(200) for q in all_questions(make_scene("corpus", seed)) for w in q.text.split()}
    kept_words = {word for word in used if f" {word}" in text}
    assert len(kept_words) > 20
    assert {word for word in kept_words if len(kept.encode(f" {word}").ids) > 1} <= {"and", "corners"}


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(i / 100) for i in range(101)]
    assert rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.03, abs=1e-6)


def test_importance_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(embedded.folder(), model)
    ensure_importance(model)
    file = model / "importance.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="measured with other weights"):
        ensure_importance(model)


def test_validation_batches_contain_questions_alone_from_the_first_on() -> None:
    batch = PackedScenes(2, 0, only_tier(TINY.reserve_packing, "low"), "validation")[0]
    assert FAMILY_NAMES.index("caption") not in batch.families.unique().tolist()


def test_a_first_phase_needs_a_model_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "run"), "--first", "reserve"])
    with pytest.raises(UserError, match="--first reserve needs --start"):
        main()
    assert not (tmp_path / "run").exists()


def test_a_batch_may_be_learnt_from_at_a_rate_of_its_own(tmp_path: Path) -> None:
    """With a rate of 0 for every batch nothing changes, however large the phase's own."""

    def trained(rate: float) -> torch.Tensor:
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        folder = tmp_path / str(rate)
        folder.mkdir()
        phase = Phase(
            name="toy",
            modules=torch.nn.ModuleDict({"model": layer}),
            data=[torch.ones(1, 2)] * 3,  # type: ignore[arg-type]
            loss=lambda batch: (layer(batch).sum(), {}),
            steps=3,
            lr=0.1,
            rate=lambda batch: rate,
        )
        assert run_phase(phase, dataclasses.replace(settings(folder), weight_decay=0.0))
        return layer.weight.detach()

    assert torch.equal(trained(0.0), torch.ones(1, 2))
    assert not torch.equal(trained(1.0), torch.ones(1, 2))
