"""Model folders that load in milliseconds: a small Qwen2 over a vocabulary of 512 words, and a
small Llama that can be talked to."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


CHAT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LICENSE = Path(__file__).parents[1] / "LICENSE"
"""English that never changes, and with it the tokenizer that is trained on it."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, 1,024 tokens, for any text; ChatML as its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LICENSE.read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=CHAT,
    )


def save_chat_model(folder: Path) -> Path:
    """A random two-layer Llama in fp32 (hidden 128, two heads of 64) that samples all its words.

    Its weights are wide enough that its distributions are not flat, so that training moves them.
    """
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
