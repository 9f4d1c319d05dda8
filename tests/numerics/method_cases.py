"""Configs of every method, for tests that walk the registry."""

from __future__ import annotations

from plutino.job.method import (
    AdaptersConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    ParallelAdaptersConfig,
    PrefixConfig,
    PromptConfig,
    PTuningV2Config,
)

CONFIGS: dict[str, dict[str, MethodConfig]] = {
    "adapters": {
        "pfeiffer": AdaptersConfig(bottleneck=6, activation="gelu"),
        "houlsby": AdaptersConfig(bottleneck=5, placement="houlsby"),
        "blocks": AdaptersConfig(bottleneck=4, activation="silu", blocks=(1, 3)),
    },
    "full": {"all": FullConfig()},
    "lora": {"all_linear": LoraConfig(rank=4)},
    "p_tuning_v2": {"dropout": PTuningV2Config(num_virtual_tokens=4, dropout=0.2)},
    "prefix": {
        "projected": PrefixConfig(num_virtual_tokens=3, projection=True, encoder_hidden_size=7),
        "plain": PrefixConfig(num_virtual_tokens=5),
    },
    "parallel_adapters": {
        "pruned": ParallelAdaptersConfig(reduction=2),
        "random": ParallelAdaptersConfig(reduction=4, init="random"),
        "blocks": ParallelAdaptersConfig(reduction=2, blocks=(1, 3)),
    },
    "prompt": {
        "vocabulary": PromptConfig(num_virtual_tokens=5),
        "text": PromptConfig(num_virtual_tokens=3, init="text", init_text="tag this", init_token_ids=(7, 9)),
    },
}
"""By the registry's key: cases by name. A new method gets its line here."""

STARTS_AS_BASE = frozenset({"adapters", "lora", "parallel_adapters"})
"""Methods that promise to change nothing before the first step."""

KEEPS_BASE = [(method, name) for method, cases in CONFIGS.items() for name in cases if method != "full"]
"""Cases with a base model to switch back to."""

CASES = [(method, name) for method, cases in CONFIGS.items() for name in cases]
