r"""What Ray 2.60 does otherwise in a sweep, where it has no option for that.

Each of these lasts for a block, and replaces functions of Ray of which nothing is promised. With a
new version of Ray, begin here.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "as_death",
    "memory_kills_are_deaths",
    "replaced",
    "started_lean",
    "trials_without_tune",
]

UP = 10.0  # seconds in which a node is up
UNUSED = -1  # for Ray, the port of a service that a node has not got
AGENTS = ("dashboard_agent", "runtime_env_agent")
# Waits for the end of the raylet, which on Linux is at the other end of its input
IDLE = ("sh", "-c", "cat; while kill -0 $PPID; do sleep 1; done")


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    r"""Gives a class or a module other attributes, until the end of the block."""

    before = {name: getattr(owner, name) for name in attributes}

    try:
        for name, value in attributes.items():
            setattr(owner, name, value)

        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def started_lean() -> Iterator[None]:
    r"""Lets a Ray that starts within the block do without what serves no sweep on one machine.

    It starts a monitor for an autoscaler, the server of a dashboard, even of one that is not
    wanted, what sends logs to the driver, and two agents on each node, and waits for them. That
    takes 400 MB, and 4 s of a start. Then it looks once a second whether its processes are up:
    here it is known when they are.
    """

    import ray
    from ray._private import services, utils
    from ray._private.node import Node

    start = Node.start_raylet
    command = services._build_python_executable_command_memory_profileable

    def start_raylet(self: Any, *args: Any) -> None:
        _say_unused(self._session_dir, self._node_id)
        start(self, *args)
        gcs, until = ray._raylet.GcsClient(address=self.gcs_address), time.monotonic() + UP

        while not gcs.get_all_node_info() and time.monotonic() < until:
            time.sleep(0.02)

    def command_of(component: str, *args: Any, **options: Any) -> list[str]:
        # A raylet ends with its agents, so that there has to be something
        return list(IDLE) if component in AGENTS else command(component, *args, **options)

    def nothing(self: Any, *args: Any, **options: Any) -> None:
        pass

    with (
        replaced(services, _build_python_executable_command_memory_profileable=command_of),
        replaced(utils, get_dashboard_dependency_error=lambda: None),  # imports all of them
        replaced(Node, start_raylet=start_raylet, start_monitor=nothing),
        replaced(Node, start_api_server=nothing, start_log_monitor=nothing),
    ):
        yield


def _say_unused(session: str, node: str) -> None:
    r"""Tells a node that starts that it has no agents: what they would say without a dashboard."""

    import ray

    inner: Any = ray._raylet

    for name in dir(inner):
        if name.endswith("_PORT_NAME") and not name.startswith("GCS"):
            inner.persist_port(session, node, getattr(inner, name), UNUSED)


@contextmanager
def trials_without_tune(plain: type) -> Iterator[None]:
    r"""Lets a class be trials of Tune that knows nothing of Tune.

    Tune wants a class that is derived from one of its own, and gives it objects of its own: each
    process that trains would have to load it, and with it pandas, Ray Data and Ray Train, for a
    second and 100 MB. It also asks for an environment for trials, even if it is the one that they
    have, and so for other processes than those that Ray has started already.

    Arguments:
        plain: A class with what Tune calls: `train`, `stop`, `reset` and
            `get_auto_filled_metrics`. It is created, and reset, with the trial's config alone.
    """

    import ray
    from ray.air._internal import usage
    from ray.tune.execution import class_cache, tune_controller

    actor, controller = ray.remote(plain), tune_controller.TuneController
    schedule = controller._schedule_trial_task

    def schedule_task(
        self: Any,
        trial: Any,
        method_name: str,
        args: Any = None,
        kwargs: Any = None,
        **options: Any,
    ) -> Any:
        if method_name == "reset":
            args, kwargs = (trial.config,), None

        return schedule(self, trial, method_name, args, kwargs, **options)

    def arguments(trial: Any) -> dict[str, Any]:
        trial.init_local_path()

        return {"config": trial.config}

    with (
        replaced(usage, tag_callbacks=lambda callbacks: None),  # imports all that there might be
        replaced(class_cache._ActorClassCache, get=lambda self, trainable: actor),
        replaced(tune_controller, _get_trainable_kwargs=arguments),
        replaced(controller, _schedule_trial_task=schedule_task),
    ):
        yield


@contextmanager
def memory_kills_are_deaths() -> Iterator[None]:
    r"""Lets Tune take a worker that Ray's memory monitor has killed for one that is lost.

    It knows the death of an actor only, and ends with "Caught unexpected exception".
    """

    from ray.air.execution._internal.actor_manager import RayActorManager as Manager

    before = Manager._actor_task_failed

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        before(self, tracked_actor_task, as_death(exception))

    with replaced(Manager, _actor_task_failed=failed):
        yield


def as_death(exception: Exception) -> Exception:
    r"""Returns an error of Ray as the death of an actor, unless it is one, or a task's own."""

    from ray.exceptions import RayActorError, RayError, RayTaskError

    known = isinstance(exception, RayTaskError | RayActorError)

    if isinstance(exception, RayError) and not known:
        return RayActorError(error_msg=str(exception))

    return exception
