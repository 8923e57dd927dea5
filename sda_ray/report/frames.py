r"""Sweeps and runs in Python: as tables, and as an Optuna study. Nothing is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import UserError, default_root
from ..runs import entries, row
from ..sweep import read_study
from .findings import Findings, Trial, read_findings
from .page import write_report

if TYPE_CHECKING:
    import optuna
    import pandas as pd


@dataclass(frozen=True)
class LoadedSweep:
    r"""A sweep on disk, see :func:`load_sweep`. Each attribute shows it as it stands now.

    Arguments:
        name: Its name.
        runs: The directory of all runs.
    """

    name: str
    runs: Path

    @property
    def trials(self) -> pd.DataFrame:
        r"""Its runs, from best to worst, a row each.

        The columns are the number, the name and the directory (None if it is gone) of a run, its
        status, the epochs it has trained and those it would train, the objective and its standard
        error (NaN if unknown), `seconds` of training, `why` it stopped where it did, and its
        values of SPACE. A sweep of several seeds also has `replica_of`, the number of the run whose
        configuration a run trains again, and the mean over seeds and its standard error.
        """

        import pandas as pd

        findings = read_findings(self.runs, self.name)

        return pd.DataFrame([_row(findings, trial) for trial in findings.trials])

    @property
    def best(self) -> pd.Series[Any]:
        r"""Its best complete run, as a row of :attr:`trials`.

        Raises:
            UserError: If no run is complete.
        """

        import pandas as pd

        findings = read_findings(self.runs, self.name)

        if findings.best is None:
            raise UserError(f"no run of sweep '{self.name}' is complete yet.")

        return pd.Series(_row(findings, findings.best))

    @property
    def study(self) -> optuna.Study:
        r"""Its Optuna study, of which nothing can be changed; :mod:`optuna.visualization` takes it.

        A run that was resumed after its record was closed has several trials there.
        """

        return read_study(self.runs, self.name).study

    def curves(self) -> pd.DataFrame:
        r"""Returns the metrics of all epochs: a row for each epoch of each run, by its number."""

        import pandas as pd

        trials = read_findings(self.runs, self.name).trials
        lines = [{"number": t.record.index, **line} for t in trials for line in t.metrics]

        return pd.DataFrame(lines)

    def report(self, file: Path | str | None = None) -> Path:
        r"""Writes its report and returns the file, by default `report.html` in its directory."""

        return write_report(self.runs, [self.name], Path(file).absolute() if file else None)


def load_sweep(name: str, runs: Path | str | None = None) -> LoadedSweep:
    r"""Opens a sweep to look at, while it runs or later.

    Example:
        >>> sweep = load_sweep("width")
        >>> sweep.trials[["run", "loss_valid", "learning_rate"]]
        >>> optuna.visualization.plot_slice(sweep.study)
        >>> sde = load_sde(sweep.best["directory"], length=16)

    Arguments:
        name: Its name.
        runs: The directory of all runs. By default that in `$SDA_RAY_ROOT`, else here.

    Raises:
        UserError: If there is no such sweep, or it has not begun.
    """

    sweep = LoadedSweep(name, _runs(runs))
    read_study(sweep.runs, name)

    return sweep


def load_runs(runs: Path | str | None = None) -> pd.DataFrame:
    r"""Returns all runs of a directory, the newest first, a row each.

    The columns are those of `sda-ray runs --json`, and a column for each setting.

    Arguments:
        runs: The directory, by default that in `$SDA_RAY_ROOT`, else here.
    """

    import pandas as pd

    found = sorted(entries(_runs(runs)), key=lambda entry: entry.age)
    rows = [row(entry) | (entry.config or {}) for entry in found]

    return pd.DataFrame(rows).drop(columns="config", errors="ignore")


def _runs(runs: Path | str | None) -> Path:
    return Path(runs or default_root() / "runs").expanduser().absolute()


def _row(findings: Findings, trial: Trial) -> dict[str, Any]:
    record = trial.record
    seeds = {
        "replica_of": record.replica_of or None,
        f"{findings.objective}_mean": record.value if record.seeds else math.nan,
        f"{findings.objective}_mean_se": record.error_over_seeds,
    }

    return {
        "number": record.index,
        "run": trial.name,
        "directory": trial.directory,
        "status": record.status,
        "epoch": record.last,
        "epochs": record.epochs,
        findings.objective: record.trajectory.get(record.last),
        f"{findings.objective}_se": findings.error(trial),
        "seconds": trial.seconds,
        "why": trial.why,
        **(seeds if findings.seeded else {}),
        **findings.settings(trial),
    }
