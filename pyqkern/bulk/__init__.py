"""Millions of texts to embeddings or labels: files to a Parquet dataset, or a dask.dataframe to another.

`embed` and `classify` are whole jobs. `Embedder` and `Classifier` are what each of their workers runs, for other
schedulers.
"""

from pyqkern.bulk.api import classify, embed
from pyqkern.bulk.model import Classifier, Embedder
from pyqkern.bulk.state import State

__all__ = ["Classifier", "Embedder", "State", "classify", "embed"]
