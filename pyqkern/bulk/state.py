"""How far a job is. Apart from job.py, so that `import pyqkern.bulk` needs no pyarrow."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class State:
    """How far a job is. rows: written, by earlier runs too; new_rows: by this one, in `seconds`. bad: rows kept out.
    truncated: texts of which the model has not read all. share: of the input that is done, 0 to 1; started at
    `from_share`.
    """

    rows: int = 0
    new_rows: int = 0
    bad: int = 0
    truncated: int = 0
    partitions: int = 0
    share: float = 0.0
    from_share: float = 0.0
    seconds: float = 0.0
    differs: str | None = None

    @property
    def texts_per_second(self) -> float:
        return self.new_rows / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None before the first partition."""
        gained = self.share - self.from_share
        return self.seconds * (1 - self.share) / gained if gained > 0 else None

    @property
    def new_rows_at_end(self) -> int:
        """How many rows this run will have written, as it looks."""
        gained = self.share - self.from_share
        return round(self.new_rows * (1 - self.from_share) / gained) if gained > 0 else self.new_rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        own = asdict(self) | {"texts_per_second": self.texts_per_second}
        del own["share"], own["from_share"]
        return own
