#!/usr/bin/env python
r"""Ray Tune alone, with OptunaSearch and ASHA, around the plain training loop.

    python benchmarks/plain_tune.py DATA CONFIG.json TRIALS SLOTS

It is what `trials.py --versus-tune` measures a sweep against: a function that trains the network of
`reference.py` and reports after each epoch, as the documentation of both libraries shows it.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any


def train(config: dict[str, Any], data: str) -> None:
    r"""Trains the plain network by the plain loop, and reports each epoch."""

    import torch
    from ray import tune
    from reference import plain_network, plain_step

    from sda_ray.data.dataset import TrajectoryDataset
    from sda_ray.training.loop import TrainState

    torch.set_num_threads(1)
    trainset, validset = (
        TrajectoryDataset(Path(data) / f"{split}.h5", config["window"])
        for split in ("train", "valid")
    )
    state = TrainState(config, trainset.shape[-1])
    plain_network(state)
    step, generator = plain_step(state), torch.Generator().manual_seed(config["seed"])

    def batches(dataset: TrajectoryDataset) -> Any:
        for indices in torch.randperm(len(dataset)).split(config["batch_size"]):
            yield dataset.windows(indices, torch.randint(dataset.starts, indices.shape))

    for epoch in range(1, config["epochs"] + 1):
        state.sde.train()
        losses = [step(x, generator) for x in batches(trainset)]
        state.sde.eval()

        with torch.no_grad():
            valid = [float(state.sde.loss(x, generator=generator)) for x in batches(validset)]

        mean = sum(losses) / len(losses)
        tune.report({"loss": sum(valid) / len(valid), "loss_train": mean, "epoch": epoch})


def main() -> None:
    data, file, trials, slots = sys.argv[1:]
    config = json.loads(Path(file).read_text())

    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    with tempfile.TemporaryDirectory(prefix="tune-", dir="/tmp") as directory:
        ray.init(
            address="local",
            num_cpus=int(slots),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 * 2**20,
            _temp_dir=directory,
        )
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        found = tune.Tuner(
            tune.with_resources(tune.with_parameters(train, data=data), {"cpu": 1}),
            param_space=config | {"learning_rate": tune.loguniform(1e-4, 1e-2)},
            tune_config=tune.TuneConfig(
                num_samples=int(trials),
                search_alg=OptunaSearch(metric="loss", mode="min", seed=0),
                scheduler=ASHAScheduler(
                    metric="loss", mode="min", max_t=config["epochs"], reduction_factor=2
                ),
            ),
            run_config=tune.RunConfig(storage_path=directory, verbose=0),
        ).fit()
        print("epochs", sum(result.metrics["epoch"] for result in found if result.metrics))
        ray.shutdown()


if __name__ == "__main__":
    main()
