"""Where rows come from: the shipped questions, JSON files, or a data set of the hub; and which of
their columns mean what. Knows text only.

`datasets` is imported when it is needed: it takes 1.5 seconds, and files do without.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any

from p2pllm.config.run import DataConfig
from p2pllm.data.template import Example
from p2pllm.errors import (
    AnswerUnknown,
    ColumnNotText,
    ColumnsMissing,
    DatasetEmpty,
    DatasetFileMissing,
    DatasetUnreadable,
    EvalColumnMissing,
)

SHIPPED = "package:stdlib-qa"
FILE_ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
OURS = ("instruction", "context", "response", "category", "text")
# What Alpaca-style data sets call the same things.
ALIASES = {"input": "context", "output": "response", "content": "text"}

Record = dict[str, Any]


def read_source(config: DataConfig) -> list[Record]:
    """All rows of the run's data set, in its own order.

    Raises: DatasetFileMissing, DatasetUnreadable.
    """
    if config.source == SHIPPED:
        with resources.as_file(resources.files("p2pllm.data") / "stdlib_qa.jsonl") as shipped:
            return read_files([shipped])
    if (files := _files_of(config)) is not None:
        return read_files(files)
    return _load(config)


def stream_source(config: DataConfig, skip: int = 0) -> Iterator[Record]:
    """The same rows one by one, without those before row number `skip`.

    Raises, while it is iterated: DatasetFileMissing, DatasetUnreadable.
    """
    if (files := _files_of(config)) is not None:
        lines = chain.from_iterable(_stream_file(file.expanduser()) for file in files)
        return islice(lines, skip, None)
    if config.source == SHIPPED:
        return islice(iter(read_source(config)), skip, None)
    return _stream(config, skip)


def name_of(config: DataConfig) -> str:
    """What letters call the data set."""
    return config.source if isinstance(config.source, str) else ", ".join(config.source)


def read_files(files: Sequence[Path]) -> list[Record]:
    """All rows of JSON or JSONL files, in the order given.

    Not read with `datasets`: it turns a column of dates into other text, refuses files that differ
    in their columns, and leaves a converted copy of private files in its cache.

    Raises: DatasetFileMissing, DatasetUnreadable.
    """
    return [record for file in files for record in _read_file(file.expanduser())]


def columns_of(records: Sequence[Record]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(chain.from_iterable(records)))


def column_names(present: Sequence[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """From our column names to those of the data set: `data.columns` first, then equal names,
    then Alpaca's."""
    names = {ours: theirs for theirs, ours in ALIASES.items() if theirs in present}
    names |= {ours: ours for ours in OURS if ours in present}
    return names | {ours: theirs for theirs, ours in mapping.items() if theirs in present}


def examples_of(records: Sequence[Record], config: DataConfig, where: str) -> list[Example | str]:
    """What each row says, as an example or, from a `text` column, as ready text.

    `where` names the data in letters. Raises: DatasetEmpty, ColumnsMissing, ColumnNotText,
    AnswerUnknown.
    """
    names = _checked_names(records, config, where)

    def cell(record: Record, column: str) -> str:
        value = record.get(names[column]) if column in names else None
        if isinstance(value, list | dict):
            raise ColumnNotText(where=where, column=names[column], kind=type(value).__name__)
        return "" if value is None else str(value).strip()

    if _is_ready_text(names, config):
        return [cell(record, "text") for record in records]
    return [
        Example(cell(record, "instruction"), cell(record, "context"), cell(record, "response"))
        for record in records
    ]


def groups_of(records: Sequence[Record], config: DataConfig, where: str) -> list[str]:
    """The group of each row: its `data.eval_by` column, else its category, else "".

    Raises: EvalColumnMissing.
    """
    present = columns_of(records)
    names = column_names(present, config.columns)
    column = names.get(config.eval_by or "category", config.eval_by)
    if config.eval_by and column not in present:
        raise EvalColumnMissing(where=where, column=config.eval_by, present=", ".join(present))
    return ["" if (v := record.get(column or "")) is None else str(v) for record in records]


def _checked_names(records: Sequence[Record], config: DataConfig, where: str) -> dict[str, str]:
    if not records:
        raise DatasetEmpty(where=where)
    present = columns_of(records)
    names = column_names(present, config.columns)
    if "text" not in names:
        missing = [ours for ours in ("instruction", "response") if ours not in names]
        if missing:
            facts = {"present": ", ".join(present), "missing": " and ".join(missing)}
            raise ColumnsMissing(where=where, first_missing=missing[0], **facts)
    if _is_ready_text(names, config) and config.train_on == "answer":
        raise AnswerUnknown(where=where, column=names["text"])
    return names


def _is_ready_text(names: Mapping[str, str], config: DataConfig) -> bool:
    """Whole texts are taken where there is nothing better, or where the run asks for them."""
    has_parts = "instruction" in names and "response" in names
    return "text" in names and (not has_parts or "text" in config.columns.values())


def _files_of(config: DataConfig) -> list[Path] | None:
    """None for a data set that is not in files."""
    if not isinstance(config.source, str):
        return [Path(name) for name in config.source]
    return [Path(config.source)] if config.source.endswith(FILE_ENDINGS) else None


def _stream_file(path: Path) -> Iterator[Record]:
    if not path.is_file():
        raise DatasetFileMissing(path=path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = _parse(line, number)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is not a JSON object")
                    yield record
    except (OSError, ValueError, EOFError) as failure:
        raise DatasetUnreadable(where=path, why=failure) from failure


def _read_file(path: Path) -> list[Record]:
    if not path.is_file():
        raise DatasetFileMissing(path=path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            # Not splitlines(): JSON strings may hold other line separators of Unicode.
            lines = file.read().split("\n")
        if lines[0].lstrip().startswith("["):
            records = json.loads("\n".join(lines))
        else:
            records = [_parse(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    # ValueError: not JSON, or not UTF-8. EOFError: a gzip file that was cut.
    except (OSError, ValueError, EOFError) as failure:
        raise DatasetUnreadable(where=path, why=failure) from failure
    if not all(isinstance(record, dict) for record in records):
        raise DatasetUnreadable(where=path, why="not every row is a JSON object")
    return list(records)


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as failure:
        raise ValueError(f"line {number} is not JSON") from failure


def _load(config: DataConfig) -> list[Record]:
    with _letters_about(config.source):
        rows: list[Record] = _from_hub(config, streaming=False).to_list()
        return rows


def _stream(config: DataConfig, skip: int) -> Iterator[Record]:
    with _letters_about(config.source):
        yield from _from_hub(config, streaming=True).skip(skip)


def _from_hub(config: DataConfig, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()  # they would run through the screen of this program
    # No trust_remote_code: a manifest must not be able to run code on those who join.
    return datasets.load_dataset(
        config.source,
        config.config_name,
        split=config.split,
        revision=config.revision,
        streaming=streaming,
    )


@contextmanager
def _letters_about(source: object) -> Iterator[None]:
    import datasets

    try:
        yield
    # OSError: no such data set, gated, or no network. ValueError: no such split or configuration.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as failure:
        why = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise DatasetUnreadable(where=source, why=why) from failure
