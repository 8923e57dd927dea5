r"""Tests for sda_ray.losses: what Ray says of a lost worker is understood."""

import pytest

from sda_ray.losses import alike, cause_of

HEAD = """Failure # 1 (occurred at 2026-11-23_14-42-18)
The actor died unexpectedly before finishing this task.
\tclass_name: with_resources.<locals>.ResourceTrainable
\tactor_id: 13f0c641291a3bf01e91557101000000
\tpid: 32351
\tip: 192.0.2.2
"""

# As Ray 2.60 said them
KILLED = (
    HEAD + "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file. "
    "Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to "
    "SIGSEGV. If the process was killed by the kernel OOM killer, consider enabling resource "
    "isolation to prevent node deaths by resource contention.\n\n"
)
ENDED = HEAD + "The actor is dead because it was killed by `ray.kill`.\n"
NODE = (
    HEAD + "The actor died because its node has died. Node Id: 746f71f2337c9e69d7ddbe02591e2facd\n"
    "\tthe actor's node was terminated expectedly: received SIGTERM\n"
)
CUT = (
    "Failure # 1 (occurred at 2026-11-23_14-43-39)\nThe actor b3848af18c73dbd4cbfb2636 is "
    "unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket closed "
    "rpc_code: 14. The task may or may not have been executed on the actor.\n"
)
MEMORY = (
    "Failure # 1 (occurred at 2026-11-23_14-44-12)\n1 worker(s) were killed due to the node "
    "running low on memory. Memory on the node (IP: 192.0.2.2, ID: d71c0bad) was 3.87GB used / "
    "23.54GB limit (0.164498)\nOOM kill reason: Memory usage 4157935616B exceeded threshold\n"
    "Refer to the documentation on how to address the out of memory issue.\n"
)


@pytest.mark.parametrize(
    ("text", "cause", "words"),
    [
        (KILLED, "worker", "its worker process has died"),
        (ENDED, "worker", "killed by `ray.kill`"),
        (NODE, "node", "its node has died"),
        (CUT, "unclear", "is unavailable: "),
        (MEMORY, "memory", "3.87GB used / 23.54GB limit"),
        ("", "worker", "unknown"),
    ],
)
def test_cause_is_found(text: str, cause: str, words: str) -> None:
    found, line = cause_of(text)

    assert found == cause
    assert words in line and "\n" not in line and len(line) <= 300
    assert "common causes" not in line


def test_errors_are_alike_paths_and_numbers_apart() -> None:
    same = [f"OSError: /runs/run-{i}/x.h5 is gone (step {i})" for i in range(3)]

    assert alike(same)
    assert not alike(same[:2])
    assert not alike([*same, "OSError: something else"])
