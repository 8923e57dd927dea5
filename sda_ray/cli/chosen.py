r"""The sweep that a command names, with what the command changes of it."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.config import Config, format_value, parse_overrides
from ..core.errors import UserError

__all__ = ["adjusted", "chosen_sweep"]


def chosen_sweep(args: argparse.Namespace, sweep: Any, options: Any) -> tuple[Any, Any]:
    r"""Returns the sweep that is meant by the arguments, and the options that it gets."""

    from ..sweep.definition import load_script
    from ..sweep.launch import load_record

    if sweep is None and not args.sweep.endswith(".py"):
        if getattr(args, "fork", False):
            raise UserError("--fork goes with a script, which says what the new sweep is.")

        if args.settings or args.fix or args.name:
            raise UserError(
                f"sweep '{args.sweep}' is carried on as it was started: key=value, --fix and "
                "--name go with a script, for a new sweep."
            )

        sweep, before = load_record(args.runs, args.sweep)
        options = _recorded(args, options, before)
    elif sweep is None:
        sweep = load_script(Path(args.sweep))

    return adjusted(sweep, args), options


def _recorded(args: argparse.Namespace, options: Any, before: dict[str, Any]) -> Any:
    r"""Returns options with those that a sweep was last run with, where none are given now."""

    from ..runs.tracking import Wandb

    options = replace(
        options,
        job_type=before["wandb"]["job_type"],
        keep=before.get("keep"),
        limit=before.get("limit"),
    )

    if not args.data_given:
        options = replace(options, data=args.root / before["data"])

    for name in ("cpus", "gpus"):
        if getattr(args, f"{name}_per_trial") is None:
            options = replace(options, **{name: before[name]})

    if not (args.wandb or args.project or args.entity or args.tags):
        wandb = Wandb(**before["wandb"] | {"tags": tuple(before["wandb"]["tags"])})
        options = replace(options, wandb=wandb)

    return options


def adjusted(sweep: Any, args: argparse.Namespace) -> Any:
    r"""Applies key=value, --fix, --name and --trials to a sweep."""

    settings, fixed = parse_overrides(args.settings), parse_overrides(args.fix)

    if not isinstance(sweep.config, Mapping) or not isinstance(sweep.space, Mapping | Callable):
        return sweep  # its own check says what is wrong

    return replace(
        sweep,
        name=args.name or sweep.name,
        config={**sweep.config, **settings, **fixed},
        space=_without(sweep.name, sweep.space, settings, fixed),
        trials=sweep.trials if args.trials is None else args.trials,
    )


def _without(name: str, space: Any, settings: Config, fixed: Config) -> Any:
    r"""Returns a space without the keys that are fixed."""

    if callable(space):
        if fixed:
            raise UserError("--fix goes with a SPACE that is a dict; this one is a function.")

        return space

    groups = {key.strip(): group for group in space for key in str(group).split(",")}

    for key in settings:
        if key in groups:
            raise UserError(
                f"{key} is in SPACE of sweep '{name}': every trial has its own. To take it out of "
                f"SPACE, give --fix {key}={format_value(settings[key])}"
            )

    for key in fixed:
        if key not in space:
            joined = f" alone: it is joined in '{groups[key]}'" if key in groups else ""
            raise UserError(f"--fix {key}: SPACE has no key {key}{joined}.")

    return {key: domain for key, domain in space.items() if key not in fixed}
