"""Which layer does quantization hurt, and why: plain records that print, plot, and go into one HTML report."""

from pyqkern.analysis.compare import compare_samples, error_propagation
from pyqkern.analysis.ranges import range_report
from pyqkern.analysis.records import Records
from pyqkern.analysis.report import report
from pyqkern.analysis.sensitivity import Fallback, Interrupted, fallback, sensitivity

__all__ = [
    "Fallback",
    "Interrupted",
    "Records",
    "compare_samples",
    "error_propagation",
    "fallback",
    "range_report",
    "report",
    "sensitivity",
]
