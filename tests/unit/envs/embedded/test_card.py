"""What the model card says of data and weights is what they are."""

import json
import re
from collections import Counter

import numpy as np

from envs.data.scenes import load
from envs.embedded import WEIGHTS
from envs.model import AdaptiveMolmoE
from envs.model.block_importance import read_importance
from recipes.embedded_model.figures import chance

CARD = (WEIGHTS.parent / "MODEL_CARD.md").read_text("utf-8")


def test_shares_of_families_and_what_the_question_alone_gives_away() -> None:
    samples = load("test")
    families = [sample.family or "" for sample in samples]
    shares = {family: 100 * count / len(samples) for family, count in Counter(families).items()}
    blind = chance(families, [sample.question for sample in samples], [sample.answers[0] for sample in samples])
    rows = re.findall(r"^\| (\w+) \| [^|]+\? \| [^|]+ \| (\d+) % \| (\d+) % \|$", CARD, re.MULTILINE)
    stated = {family: (int(share), int(right)) for family, share, right in rows}
    assert stated == {family: (round(shares[family]), round(blind[family])) for family in shares}


def test_the_size_of_the_model() -> None:
    parameters = sum(p.numel() for p in AdaptiveMolmoE.from_pretrained("embedded").parameters())
    assert f"| weights | {parameters / 1e6:.1f} million" in CARD


def test_which_blocks_go_first() -> None:
    first = np.argsort(read_importance(WEIGHTS))[:4].tolist()
    stated = re.search(r"Blocks (\d+), (\d+), (\d+) and (\d+) go\s+first", CARD)
    assert stated is not None
    assert [int(block) for block in stated.groups()] == first
    known = json.loads((WEIGHTS / "importance.json").read_text("utf-8"))
    assert known["fingerprint"] == AdaptiveMolmoE.from_pretrained("embedded").fingerprint
