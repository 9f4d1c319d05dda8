"""``plutino data preview``: rows as a job would read them, without a coordinator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.command_parts import AsJson, print_json
from plutino.errors import ConfigError, DataError

if TYPE_CHECKING:
    from plutino.data.formats import RowFormat
    from plutino.data.preview import RowsPreview
    from plutino.job.objective_part import RowUse

data_app = typer.Typer(help="Look at rows before a job learns from them.", no_args_is_help=True)

_JOB_ENDINGS = (".yaml", ".yml", ".json")


@data_app.callback()
def data() -> None:
    """Look at rows before a job learns from them."""


@data_app.command()
def preview(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...|JOB.YAML", help="Files of rows, or one job file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As for submit; with a job file.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Whose tokens; by default the bundled model's. With files.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="As data.max_tokens; with files.")] = 512,
    format: Annotated[str, typer.Option(help="As data.format; with files.")] = "auto",
    rows: Annotated[int, typer.Option(min=0, help="So many rows are shown token by token.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first so many rows of each file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which tokens carry loss, how long rows are, and which of them are cut, dropped, duplicate or unreadable.

    Ends with exit code 2 if a job over these rows would be refused.
    """
    is_job = len(files) == 1 and files[0].suffix.lower() in _JOB_ENDINGS and not _is_list(files[0])
    if overrides and not is_job:
        raise ConfigError("--set changes a job file; give one, or leave it out")
    found = (
        _of_job(files[0], overrides or [], rows, limit)
        if is_job
        else _of_files(files, model, max_tokens, format, rows, limit)
    )
    previews = []
    for name, one in found:
        previews.append(one)
        if not as_json:
            _show(name, one, is_first=len(previews) == 1)
    if as_json:
        print_json(previews)
    if any(one.has_problems for one in previews):
        raise typer.Exit(DataError.exit_code)


def _is_list(path: Path) -> bool:
    """Whether a file begins as a JSON list, which is none of a job's."""
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"[")
    except OSError:
        return False  # whoever reads it says why


def _of_job(
    job_file: Path, overrides: list[str], num_shown: int, limit: int | None
) -> Iterator[tuple[str, RowsPreview]]:
    from dataclasses import replace

    from plutino.data.preview import preview_rows
    from plutino.data.readers import scan_rows
    from plutino.data.tokenisation import Reading
    from plutino.data.tokenizer import load_tokenizer
    from plutino.hub_id import model_folder
    from plutino.job.objective import ClassificationConfig
    from plutino.job.spec import load_spec

    spec = load_spec(job_file, overrides)
    objective = spec.objective
    tokenizer = load_tokenizer(model_folder(spec.model.path))
    reading = Reading(
        max_tokens=spec.data.max_tokens,
        train_on=objective.labelled_tokens,
        use=objective.row_use,
        class_names=objective.labels if isinstance(objective, ClassificationConfig) else (),
    )
    for source in spec.data.sources:
        of_task = f" of {source.name}" if spec.data.tasks else ""
        for use, path, own_limit in (
            ("training", source.train, source.limit),
            ("held-out", source.eval, source.eval_limit),
        ):
            if path is None:
                continue
            read = scan_rows(Path(path), source.format, _smaller(own_limit, limit), columns=source.columns)
            is_classes = isinstance(objective, ClassificationConfig)
            found = preview_rows(read, tokenizer, reading, num_shown=num_shown, has_classes=is_classes)
            if is_classes and not spec.data.tasks:
                reading = replace(reading, class_names=tuple(found.classes))  # held-out rows have the trained classes
            yield use + of_task, found


def _of_files(
    files: list[Path], model: Path | None, max_tokens: int, row_format: str, num_shown: int, limit: int | None
) -> Iterator[tuple[str, RowsPreview]]:
    from typing import cast, get_args

    from plutino.assets import TINY_LLAMA_DIR
    from plutino.data.formats import RowFormat
    from plutino.data.preview import preview_rows
    from plutino.data.readers import scan_rows
    from plutino.data.tokenisation import Reading
    from plutino.data.tokenizer import load_tokenizer

    if row_format != "auto" and row_format not in get_args(RowFormat):
        raise ConfigError(f"there is no format {row_format!r}; there are {', '.join(get_args(RowFormat))}")
    tokenizer = load_tokenizer(model or TINY_LLAMA_DIR)
    for path in files:
        rows = scan_rows(path, cast("RowFormat", row_format), limit)
        reading = Reading(max_tokens=max_tokens, use=_use_of(rows.format))
        has_classes = rows.format == "labelled" and any(isinstance(row.label, str) for row in rows.rows[:100])
        yield "", preview_rows(rows, tokenizer, reading, num_shown=num_shown, has_classes=has_classes)


def _use_of(row_format: RowFormat) -> RowUse:
    """What the objective takes that such rows are usually for."""
    from plutino.data.sequences import FORMATS

    if row_format == "labelled":
        return "label"
    return next(use for use, formats in FORMATS.items() if row_format in formats)


def _smaller(first: int | None, second: int | None) -> int | None:
    given = [number for number in (first, second) if number is not None]
    return min(given, default=None)


def _show(name: str, one: RowsPreview, *, is_first: bool) -> None:
    from coordinator.preview_screen import legend, preview_view
    from coordinator.screens import make_console

    console = make_console()
    has_colours = console.is_terminal and not console.no_color
    if is_first and one.shown:
        console.print(legend(has_colours=has_colours))
    console.print(preview_view(one, name=name, has_colours=has_colours), soft_wrap=True)
