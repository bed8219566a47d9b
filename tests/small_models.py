"""Model folders that load in milliseconds: a small Qwen2 over a vocabulary of 512 words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 512


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Words t0 ... t511; t2 ends an answer."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="t0",
        pad_token="t1",
        eos_token="t2",
        chat_template="{% for m in messages %}{{ m['content'] }} t3 {% endfor %}",
    )


def save_small_model(folder: Path, tied: bool = True, layers: int = 2, key_heads: int = 1) -> Path:
    """A random model in fp32 with biases on q, k and v, its head tied to the embeddings or not.

    Its weights are wide enough that its distributions are not flat.
    """
    torch.manual_seed(4)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2 * key_heads,
            num_key_value_heads=key_heads,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
