"""The yardstick that needs no language model: logistic regression over the words of a text.

Entry point: :func:`bag_of_words`. It shows how far a task goes without fine-tuning anything; on a task with few fixed
answers it can beat a small language model, and the demo says so.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plutino.data.readers import Row

_NUM_ITERATIONS = 200
_L2_PENALTY = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class BagOfWordsResult:
    """How well words alone predict the answers of held-out rows."""

    accuracy: float
    chance_accuracy: float
    """Share of the held-out rows that have the commonest training answer."""
    seconds: float
    """For reading the words, training and predicting together."""
    num_words: int
    num_classes: int


def bag_of_words(train: Sequence[Row], held_out: Sequence[Row]) -> BagOfWordsResult:
    """Train on the rows and predict the held-out rows' answers, each whole answer being one class.

    Multinomial logistic regression with an L2 penalty on binary word features, fitted by Nesterov's accelerated
    gradient with step 1 / L from zero weights: no randomness.

    Args:
        train: rows to learn from.
        held_out: rows to predict; at least one.
    """
    started_s = time.monotonic()
    words = {word: index for index, word in enumerate(sorted({word for row in train for word in _words(row)}))}
    classes = {answer: index for index, answer in enumerate(sorted({row.answer.strip() for row in train}))}
    labels = np.array([classes[row.answer.strip()] for row in train])
    weights = _fit(_features(train, words), labels, len(classes))
    predicted = np.argmax(_features(held_out, words) @ weights, axis=1)
    truth = np.array([classes.get(row.answer.strip(), -1) for row in held_out])
    commonest = Counter(labels.tolist()).most_common(1)[0][0]
    return BagOfWordsResult(
        accuracy=float(np.mean(predicted == truth)),
        chance_accuracy=float(np.mean(truth == commonest)),
        seconds=time.monotonic() - started_s,
        num_words=len(words),
        num_classes=len(classes),
    )


def _words(row: Row) -> list[str]:
    """Lower-case words of all that comes before the row's answer."""
    text = " ".join(message.content for message in row.messages[: row.last_answer])
    return re.findall(r"\w+", text.lower())


def _features(rows: Sequence[Row], words: dict[str, int]) -> NDArray[np.float32]:
    """[num_rows, num_words + 1]: 1 where the word occurs; the last column is the bias."""
    features = np.zeros((len(rows), len(words) + 1), np.float32)
    features[:, -1] = 1
    for index, row in enumerate(rows):
        features[index, [words[word] for word in _words(row) if word in words]] = 1
    return features


def _fit(features: NDArray[np.float32], labels: NDArray[np.int64], num_classes: int) -> NDArray[np.float32]:
    """[num_words + 1, num_classes]: weights that minimise the penalised mean cross-entropy."""
    num_rows = len(features)
    one_hot = np.eye(num_classes, dtype=np.float32)[labels]
    # The softmax's Hessian is at most half the features' second moment (Boehning 1992), whose largest eigenvalue is
    # at most its trace over rows: the mean squared length of a row.
    curvature = 0.5 * float(np.mean(np.sum(features**2, axis=1))) + _L2_PENALTY
    weights = np.zeros((features.shape[1], num_classes), np.float32)
    ahead, momentum = weights, 1.0
    for _ in range(_NUM_ITERATIONS):
        logits = features @ ahead
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        gradient = features.T @ (odds / odds.sum(axis=1, keepdims=True) - one_hot) / num_rows + _L2_PENALTY * ahead
        stepped = ahead - gradient / curvature
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = stepped + (momentum - 1) / next_momentum * (stepped - weights)
        weights, momentum = stepped, next_momentum
    return weights
