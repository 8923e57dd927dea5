r"""How a single training is shown while it goes on."""

import time
from datetime import timedelta

__all__ = ["Progress"]


class Progress:
    r"""Creates a progress bar with losses and time left; off a terminal, a line now and then.

    Arguments:
        total: The number of epochs.
        done: The number of those that are done already.
    """

    def __init__(self, total: int, done: int) -> None:
        from rich import progress
        from rich.console import Console

        console = Console()
        self.total, self.done = total, done
        self.start = self.said = time.monotonic()
        self.bar = None

        if console.is_terminal:
            self.bar = progress.Progress(
                "[bold]{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("epoch", total=total, completed=done)

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()

        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, epoch: int, loss_train: float, loss_valid: float) -> None:
        losses = f"loss_train {loss_train:.4f}, loss_valid {loss_valid:.4f}"

        if self.bar is not None:
            self.bar.update(self.task, completed=epoch, description=losses)
        elif time.monotonic() - self.said > 10 or epoch == self.total:
            self.said = time.monotonic()
            left = (self.said - self.start) * (self.total - epoch) / max(1, epoch - self.done)
            time_left = timedelta(seconds=round(left))
            print(f"epoch {epoch}/{self.total}: {losses}, {time_left} left", flush=True)
