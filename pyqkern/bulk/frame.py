"""embed and classify on a dask.dataframe: a partition of it is computed where it lies."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyqkern.bulk.model import text_model
from pyqkern.bulk.output import digest
from pyqkern.bulk.read import why_bad
from pyqkern.bulk.settings import Settings, checked

_log = logging.getLogger("pyqkern.bulk")


def run_frame(source: Any, settings: Settings, column: str, keep: tuple[str, ...]) -> Any:
    """The dask.dataframe of the answers, computed when it is asked for. The model is read here too, for its columns."""
    names = list(source.columns)
    if missing := [name for name in (column, *keep) if name not in names]:
        raise ValueError(f"the dask.dataframe has no column {missing[0]!r}; it has {', '.join(map(repr, names))}")
    settings = checked(settings)
    settings = replace(settings, digest=digest(Path(settings.model)))
    meta = _answers(source._meta, settings, column, keep)
    return source.map_partitions(_answers, settings, column, keep, meta=meta)


def _answers(frame: pd.DataFrame, settings: Settings, column: str, keep: tuple[str, ...]) -> pd.DataFrame:
    """Of one partition, with the index that it has."""
    texts = list(frame[column])
    bad = {place: why for place, text in enumerate(texts) if (why := why_bad(column, text))}
    good = [place for place in range(len(texts)) if place not in bad]
    rows = text_model(settings).run([texts[place] for place in good])
    bad |= {good[place]: why for place, why in rows.bad.items()}
    if bad:
        places = ", ".join(f"{frame.index[place]}: {why}" for place, why in list(bad.items())[:5])
        _log.warning("%d of %d rows are kept out, by their index: %s", len(bad), len(texts), places)
    if rows.truncated:
        _log.warning("%d of %d texts are longer than the model reads, and were cut", rows.truncated, len(texts))
    kept = frame.iloc[[place for place in good if place not in bad]]
    made = {name: _column(values, kept.index) for name, values in rows.columns.items()}
    return pd.DataFrame({**{name: kept[name] for name in keep}, **made}, kept.index)


def _column(values: np.ndarray, index: pd.Index) -> pd.Series:
    """Numbers and strings as such; vectors as arrays, one a row: pandas reads back no column of Arrow's vectors."""
    if values.ndim == 1:
        return pd.Series(values, index, dtype="string[pyarrow]" if values.dtype == object else values.dtype)
    column = pd.Series([None] * len(values), index, dtype=object)
    column[:] = list(values)
    return column
