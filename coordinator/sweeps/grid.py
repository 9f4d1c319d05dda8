"""From a job file and settings with several values to the trials of a sweep: pure but for reading the file.

Entry point: :func:`expand`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from plutino.errors import ConfigError
from plutino.job.method import MethodConfig
from plutino.job.spec import JobSpec, load_spec
from plutino.sweep import Trial

_METHODS = {config.model_fields["type"].default: config for config in get_args(get_args(MethodConfig)[0])}
_MOST_TRIALS = 500


def expand(job_file: Path, settings: Iterable[str]) -> tuple[Trial, ...]:
    """One trial for each combination of the settings' values, in their order, the last one changing fastest.

    ``method=lora,prompt`` is short for ``method.type``; what the job file says of another method is left out then, and
    a ``method.`` setting counts for the methods that have it. Combinations that come to the same job are one trial.

    Args:
        job_file: what all trials have in common.
        settings: ``key=value,value``; each value is YAML, one value is the same for all trials.

    Raises:
        ConfigError: a setting is malformed or known to no method of the sweep, a combination is no job, or there are
            fewer than two trials.
    """
    axes = [_axis(setting) for setting in settings]
    trials: dict[str, Trial] = {}
    used: set[str] = set()
    for values in itertools.product(*(values for _, values in axes)):
        chosen = {key: text for (key, _), text in zip(axes, values, strict=True)}
        own = _own(chosen, job_file)
        used |= own.keys()
        spec = load_spec(job_file, [*_clearing(own, job_file), *(f"{key}={text}" for key, text in own.items())])
        _check(spec)
        varied = {key: own[key] for key, texts in axes if len(texts) > 1 and key in own}
        trials.setdefault(spec.model_dump_json(), Trial(settings=varied, spec=spec))
        if len(trials) > _MOST_TRIALS:
            raise ConfigError(f"the sweep has more than {_MOST_TRIALS} trials; give fewer values")
    if unknown := [key for key, _ in axes if key not in used]:
        raise ConfigError(f"{', '.join(unknown)}: no method of this sweep has such a setting")
    if len(trials) < 2:
        raise ConfigError("a sweep compares trials, and this is one; give a setting several values: method.rank=4,8")
    return tuple(trials.values())


def _axis(setting: str) -> tuple[str, list[str]]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{setting!r} is not a setting; write key=value,value: method.rank=4,8,16")
    try:
        # The loader's own nodes know where a comma separates values and where it lies inside of one.
        sequence = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the values of {setting!r} are not YAML: {error}") from error
    assert isinstance(sequence, yaml.SequenceNode)
    source = f"[{text}]"
    values = [source[node.start_mark.index : node.end_mark.index].strip() for node in sequence.value]
    if not values:
        raise ConfigError(f"{setting!r} has no value; write key=value,value: method.rank=4,8,16")
    return ("method.type" if key == "method" else key), list(dict.fromkeys(values))


def _own(chosen: Mapping[str, str], job_file: Path) -> dict[str, str]:
    """The settings that this combination's method has."""
    method = chosen.get("method.type") or load_spec(job_file).method.type
    if method not in _METHODS:
        raise ConfigError(f"there is no method {method!r}; there are {', '.join(sorted(_METHODS))}")
    known = _METHODS[method].model_fields
    return {
        key: text
        for key, text in chosen.items()
        if not key.startswith("method.") or key.removeprefix("method.").partition(".")[0] in known
    }


def _clearing(own: Mapping[str, str], job_file: Path) -> Sequence[str]:
    """Overrides that leave out what the file says of another method than the trial's."""
    wanted = own.get("method.type")
    if wanted is None or wanted == load_spec(job_file).method.type:
        return ()
    return (f"method={{type: {wanted}}}",)


def _check(spec: JobSpec) -> None:
    if not spec.data.has_eval:
        raise ConfigError("a sweep compares trials on held-out rows; set data.eval (and scoring, to compare answers)")


def label(settings: Mapping[str, Any]) -> str:
    """A trial's settings in one line, without the groups that their keys stand in."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
