"""The embedded default: a small MolmoE trained on drawn scenes and shipped with the package."""

from pathlib import Path

from envs.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"


def folder() -> Path:
    """The packaged model folder: weights, configs, tokenizer and block importance.

    Raises:
        UserError: this installation carries no weights.
    """
    if not (WEIGHTS / "model.safetensors").is_file():
        raise UserError(
            f"no embedded model in {WEIGHTS}: install the package with its data, "
            "or, in a clone of the repository, train one with `python -m recipes.embedded_model.train --out DIR`"
        )
    return WEIGHTS
