"""Conditions on the columns of an index, such as `source=wiki` or `meta.language=de`, and the rows that meet them."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcap_rag.errors import InputError
from clipcap_rag.index_store import IndexFiles

FIELDS = ("caption", "caption_id", "image_id", "source")
_META = "meta."

Where = Mapping[str, Collection[str]]  # per field the values that it may have; all fields have to fit


def parse_where(conditions: Sequence[str]) -> dict[str, list[str]]:
    """The accepted values of each field of conditions FIELD=VALUE.

    FIELD is caption, caption_id, image_id, source or meta.KEY. A field that comes twice may have either value,
    different fields have to fit together, and an empty VALUE stands for captions that have none.

    Raises:
        InputError: a condition is not of this form.
    """
    where: dict[str, list[str]] = {}
    for condition in conditions:
        field, equals, value = condition.partition("=")
        if not equals or not _is_field(field):
            raise InputError(
                f"the condition {condition!r} cannot be read; write FIELD=VALUE, "
                f"where FIELD is {', '.join(FIELDS)} or {_META}KEY"
            )
        where.setdefault(field, []).append(value)
    return where


def matching(files: IndexFiles, where: Where) -> np.ndarray:
    """Which rows [N] bool are there, not removed, and meet all conditions.

    Raises:
        InputError: a field is unknown.
    """
    mask = files.live.copy()
    for field, values in where.items():
        for start, column in _columns(files, field):
            mask[start : start + len(column)] &= _fits(column, values)
    return mask


def values_met(files: IndexFiles, field: str, values: Collection[str]) -> set[str]:
    """Those of some values of a field that a caption has which is not removed; errors of `matching`."""
    met: set[str] = set()
    for start, column in _columns(files, field):
        mask = _fits(column, values) & files.live[start : start + len(column)]
        met.update(value or "" for value in pc.unique(column.filter(pa.array(mask))).to_pylist())
    return met


def _columns(files: IndexFiles, field: str) -> Iterator[tuple[int, pa.Array]]:
    """Yields (first row, values) of a field, batch by batch."""
    if not _is_field(field):
        raise InputError(f"captions have no field {field!r}; use {', '.join(FIELDS)} or {_META}KEY")
    name, _, key = field.partition(".")
    for start, column in files.columns(name):
        yield start, pc.map_lookup(column, key, "first") if key else column


def _fits(column: pa.Array, values: Collection[str]) -> np.ndarray:
    """Whether each value [n] bool is one of those given; the empty one stands for none as well."""
    accepted = pa.array([*values, *([None] if "" in values else [])], pa.string())
    return pc.is_in(column, value_set=accepted).to_numpy(zero_copy_only=False)


def _is_field(field: str) -> bool:
    return field in FIELDS or (field.startswith(_META) and field != _META)
