"""Keep libraries' chatter out of a run's log; warnings that matter to a user are our own.

Whoever sets one of these variables keeps what they set.
"""

from __future__ import annotations

import logging
import os

_DEFAULTS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def hush() -> None:
    """Call before torch, Transformers or vLLM is imported."""
    import warnings

    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(vllm|torch)\..*")
    # In a notebook, bars that we don't show ask for widgets.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # bitsandbytes offers an optional kernel; DeepSpeed says on import that it found no GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def hush_transformers() -> None:
    """Call once Transformers is imported anyway."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
