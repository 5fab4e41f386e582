"""Comma-separated trace files: a heading that names the columns, then a request a line."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence

from plait.errors import BadSetup
from plait.workload.fields import MAX_LINE_CHARACTERS


def csv_records(
    lines: Iterable[str], *, needed: Sequence[str], where: str
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Each request's place (for messages) and its columns by name; blank lines are ignored.

    Raises:
        BadSetup: the heading lacks a column, a line has more or fewer columns, or is too long.
    """
    reader = csv.reader(_bounded(lines, where), strict=True)
    names: list[str] = []
    try:
        for row in reader:
            place = f"{where}, line {reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [cell.strip().lstrip("\ufeff") for cell in row]
                missing = [name for name in needed if name not in names]
                if missing:
                    raise BadSetup(
                        f"{place}: column {missing[0]!r} is missing; the columns are {', '.join(names)}"
                    )
                continue
            if len(row) != len(names):
                raise BadSetup(f"{place} has {len(row)} columns and the heading {len(names)}")
            yield place, {name: cell.strip() for name, cell in zip(names, row, strict=True)}
    except csv.Error as error:
        raise BadSetup(f"{where}, line {reader.line_num} is no comma-separated line ({error})") from error
    if not names:
        raise BadSetup(f"{where} is empty; its first line names the columns {', '.join(needed)}")


def _bounded(lines: Iterable[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_CHARACTERS:
            raise BadSetup(f"{where}, line {number} is longer than any request: {len(line)} characters")
        yield line
