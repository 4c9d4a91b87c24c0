"""Which layer does quantization hurt, and why: plain records that print, plot, and go into one HTML report."""

from pyqkern.analysis.auto import auto
from pyqkern.analysis.auto_report import auto_report
from pyqkern.analysis.compare import compare_samples, error_propagation
from pyqkern.analysis.ranges import range_report
from pyqkern.analysis.records import Records
from pyqkern.analysis.report import report
from pyqkern.analysis.sensitivity import Fallback, fallback, sensitivity
from pyqkern.analysis.tasks import Interrupted

__all__ = [
    "Fallback",
    "Interrupted",
    "Records",
    "auto",
    "auto_report",
    "compare_samples",
    "error_propagation",
    "fallback",
    "range_report",
    "report",
    "sensitivity",
]
