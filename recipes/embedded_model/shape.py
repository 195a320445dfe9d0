"""Shape of the embedded model, its tokenizer and the files that describe both, in the published MolmoE layout."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from envs.data.scenes import all_questions, caption, make_scene
from envs.model.config import AdaptiveMolmoEConfig, VisionConfig
from envs.processing.image_processor import AdaptiveMolmoEImageProcessor, ImageGeometry
from envs.processing.processor import IMAGE_TOKENS, MolmoEProcessor
from envs.processing.prompt import prompt_text

END: Final = "<|endoftext|>"
PADDING: Final = "<|padding|>"
EMBEDDINGS: Final = 512
EXPERT_HIDDEN: Final = 192
_CORPUS_SCENES: Final = 1500
_TOKENIZER: Final = Path(__file__).parent / "tokenizer.json"

GEOMETRY: Final = ImageGeometry(
    crop=56,
    patch=7,
    # One-sided: the overlap costs two patches in eight, and an object cut by one crop is complete in the next.
    margins=(2, 0),
    tokens=(4, 4),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
VISION: Final = VisionConfig(
    crop_size=GEOMETRY.crop,
    patch_size=GEOMETRY.patch,
    width=96,
    layers=5,
    heads=3,
    head_dim=32,
    mlp_dim=192,
    norm_eps=1e-5,
    feature_layers=(-1, -3),
    pooling=(2, 2),
)


def build_config(vocabulary: int, expert_hidden: int = EXPERT_HIDDEN) -> AdaptiveMolmoEConfig:
    """A MolmoE of 16 blocks and top-k 8 whose experts are a visible share of its time on a laptop CPU.

    12 wide experts rather than 16 narrower ones: with 8 of them in use there is more work for the top-k to save. The
    projector is as wide as an expert, as the published layout has it.
    """
    return AdaptiveMolmoEConfig(
        d_model=64,
        n_heads=4,
        moe_num_experts=12,
        mlp_hidden_size=2 * expert_hidden,
        vocab_size=vocabulary,
        embedding_size=EMBEDDINGS,
        additional_vocab_size=0,
        eos_token_id=0,
        overlap_margins=GEOMETRY.margins,
        vit_layers=VISION.feature_layers,
        vision_backbone=VISION.to_published(),
    )


def build_tokenizer() -> Tokenizer:
    """The model's tokenizer, a new object at every call.

    It is kept as a file: were it trained anew from scenes that have changed, ids would change and weights be useless.
    """
    return Tokenizer.from_file(str(_TOKENIZER))


def train_tokenizer() -> Tokenizer:
    """How the kept tokenizer was made: a byte-level BPE over the scenes' language.

    Every word of that language is one token, and any other text still encodes.
    """
    texts = []
    for seed in range(_CORPUS_SCENES):
        scene = make_scene("corpus", seed)
        questions = [*all_questions(scene), caption(scene)]
        texts += [f"{prompt_text(q.text)} {q.answer}" for q in questions]
    return train_bpe(texts)


def train_bpe(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE over `texts`, with the model's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=EMBEDDINGS - len(IMAGE_TOKENS),
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(IMAGE_TOKENS))
    return tokenizer


def build_processor() -> MolmoEProcessor:
    """The processor of the embedded model, from its recipe rather than from files."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(), eos_token=END)
    # It has only seen plain questions.
    return MolmoEProcessor(AdaptiveMolmoEImageProcessor(prompt_styles=False, **GEOMETRY.to_config()), tokenizer)


def write_files(folder: Path) -> None:
    """Writes everything but the weights: config.json, preprocessor_config.json and the tokenizer's files."""
    tokenizer = build_tokenizer()
    write_model_files(folder, tokenizer, build_processor(), build_config(tokenizer.get_vocab_size()))


def write_model_files(
    folder: Path, tokenizer: Tokenizer, processor: MolmoEProcessor, config: AdaptiveMolmoEConfig
) -> None:
    """`write_files` for any tokenizer and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {token: tokenizer.token_to_id(token) for token in (END, PADDING, *IMAGE_TOKENS)}
    files = {
        "config.json": config.to_published(),
        "preprocessor_config.json": processor.image_processor.to_dict(),
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": list(IMAGE_TOKENS),
            "bos_token": END,
            "eos_token": END,
            "pad_token": PADDING,
            "unk_token": END,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "added_tokens.json": added,
        "special_tokens_map.json": {"bos_token": END, "eos_token": END, "pad_token": PADDING},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
