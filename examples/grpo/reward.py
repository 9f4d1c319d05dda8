"""A reward of one's own: any Python function of prompt, answer and the row's true answer."""

from __future__ import annotations

import re


def looks_like_an_intent(prompt: str, answer: str, truth: str) -> float:
    """1 for words in camel case without blanks, as SNIPS' intents are."""
    return float(re.fullmatch(r"([A-Z][a-z]+)+", answer.strip()) is not None)
