r"""What a complete run is judged by, if that is more than its validation loss."""

from collections.abc import Sequence

from ..core.config import load_config
from ..core.errors import UserError
from .metrics import read_history
from .path import RunPath
from .record import read_record

__all__ = ["finals"]


def finals(path: RunPath, objectives: Sequence[str]) -> list[float]:
    r"""Returns the values of objectives of a complete run, from its files.

    They are numbers of the last line of its metrics or of `run.json`; or `parameters`, the number
    of them, and `seconds`, the time that its epochs took.

    Raises:
        UserError: If there is no such number.
    """

    lines = read_history(path.metrics)
    last, record = lines[max(lines)] if lines else {}, read_record(path)
    more = {"seconds": sum(float(line.get("seconds", 0.0)) for line in lines.values())}
    values = []

    for name in objectives:
        found = more.get(name, last.get(name, record.get(name)))

        if found is None and name == "parameters":
            found = _parameters(path)

        if isinstance(found, bool) or not isinstance(found, int | float):
            numbers = [key for key, x in {**last, **more}.items() if isinstance(x, int | float)]
            raise UserError(
                f"{name} is no number that {path.directory.name} has. Objectives may be "
                f"{', '.join(numbers)} and parameters."
            )

        values.append(float(found))

    return values


def _parameters(path: RunPath) -> int:
    import torch

    from ..nn.score import make_score

    with torch.device("meta"):
        return sum(p.numel() for p in make_score(**load_config(path.config)).parameters())
