"""The tokenizer of the pictures' language, and the files that describe the model, in the published MolmoE layout."""

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from envs.processing.image_processor import AdaptiveMolmoEImageProcessor
from envs.processing.processor import MolmoEProcessor
from envs.processing.prompt import prompt_text
from recipes.embedded_model.shape import END, GEOMETRY, train_bpe
from recipes.sums_and_signs.pictures import MAX_SUMMANDS, make_picture
from recipes.sums_and_signs.questions import all_questions, caption

_CORPUS_PICTURES: Final = 1500
_TOKENIZER: Final = Path(__file__).parent / "tokenizer.json"
HIGHEST_WORTH: Final = 9 * MAX_SUMMANDS


def build_tokenizer() -> Tokenizer:
    """The model's tokenizer, a new object at every call.

    It is kept as a file: were it trained anew from pictures that have changed, ids would change and weights be useless.
    """
    return Tokenizer.from_file(str(_TOKENIZER))


def train_tokenizer() -> Tokenizer:
    """How the kept tokenizer was made: a byte-level BPE over the pictures' language.

    Every word of that language is one token, every number up to the highest that a color can be worth too, and any
    other text still encodes.
    """
    texts = [f" {number}" for number in range(HIGHEST_WORTH + 1) for _ in range(1000)]
    for seed in range(_CORPUS_PICTURES):
        picture = make_picture("corpus", seed)
        questions = [*all_questions(picture), caption(picture)]
        texts += [f"{prompt_text(q.text)} {q.answer}" for q in questions]
    return train_bpe(texts)


def build_processor() -> MolmoEProcessor:
    """The processor of the model, from its recipe rather than from files."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), eos_token=END)
    # It has only seen plain questions.
    return MolmoEProcessor(AdaptiveMolmoEImageProcessor(prompt_styles=False, **GEOMETRY.to_config()), tokenizer)
