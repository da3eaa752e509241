"""The ranks of the tests in ``test_distributed.py``.

Under torchrun ``rank.py exact FOLDER`` or ``rank.py failing FOLDER kill`` is one rank, which writes what it found to
``FOLDER/RANK.json``. ``rank.py failures FOLDER`` starts, for each way to fail, all ranks itself, with nobody to end the others
when one fails; they write to ``FOLDER/CASE-RANK.json``, and their errors to ``.err``. It forks, so as to import torch once.
"""

import copy
import hashlib
import json
import os
import signal
import socket
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from runtime.eager import eager, grads_of, relative, small, small_without_dropout, unequal

import fxpipe
from fxpipe.errors import FxpipeError
from fxpipe.runtime.local import LocalPipe

REPLICATED = (("gpt", (2, 1, 1)), ("tied", (2, 2)), ("mlp", (1, 3)))
"""Models with the replicas of their stages, on 4 ranks."""
CASES = {"kill": 3, "kill-of-4": 4, "raise": 3, "hang": 3, "absent": 3}
"""The ways to fail, with the number of ranks. It is always rank 1 that fails."""


def rank() -> int:
    return int(os.environ["RANK"])


def ranks() -> int:
    return int(os.environ["WORLD_SIZE"])


def like_local(name: str, n_microbatches: int, format: str | None = None) -> dict[str, Any]:
    """Three steps and their updates, against the same plan run in one process and against eager."""
    model, args, kwargs = small_without_dropout(name)
    options = {"n_ranks": ranks(), "n_microbatches": n_microbatches, "format": format, "timeout_seconds": 60}
    plan = fxpipe.compile(model, (args, kwargs), options)
    twin = copy.deepcopy(model)
    local, pipe = LocalPipe(plan.spec(), twin), plan.pipe()
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in (local, pipe)]
    unlike = []
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = [p.step(*args, **kwargs) for p in (local, pipe)]
        if not torch.equal(*losses):
            unlike.append(f"loss {step}: {losses}")
        mine = {n for n, _ in pipe.named_parameters()}
        unlike += unequal(grads_of(model), {n: g for n, g in grads_of(twin).items() if n in mine})
        if step == 0:
            loss, reference = eager(small_without_dropout(name)[0], args, kwargs, n_microbatches)
            far = relative(
                {"loss": losses[1], **grads_of(model)}, {"loss": loss, **{n: grads_of(reference)[n] for n in mine}}
            )
        for optimizer in optimizers:
            optimizer.step()
    pipe.synchronize_model()
    unlike += unequal(dict(model.state_dict()), dict(twin.state_dict()))
    return {"unlike_local": unlike, "from_eager": far, "parameters": sorted(mine), "messages": _kinds(plan)}


def replicated(name: str, widths: tuple[int, ...], n_microbatches: int = 8) -> dict[str, Any]:
    """Three steps of a plan with replicas, against the same plan in one process; what this rank has in the end, as digests."""
    model, args, kwargs = small_without_dropout(name)
    options = {"n_ranks": ranks(), "replicas": widths, "n_microbatches": n_microbatches, "timeout_seconds": 60}
    plan = fxpipe.compile(model, (args, kwargs), options)
    twin = copy.deepcopy(model)
    if rank() not in plan.schedule.stage_to_rank:  # the first replica's weights count
        for p in model.parameters():
            p.data.mul_(1.5)
    local, pipe = LocalPipe(plan.spec(), twin), plan.pipe()
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in (local, pipe)]
    losses, far = [], []
    for _ in range(3):
        losses.append([p.step(*args, **kwargs).item() for p in (local, pipe)])
        mine = {n for n, _ in pipe.named_parameters()}
        far.append(relative(grads_of(model), {n: g for n, g in grads_of(twin).items() if n in mine}))
        for optimizer in optimizers:
            optimizer.step()  # and no zero_grad: gradients of several steps add up
    digests = {n: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in pipe.named_parameters()}
    pipe.synchronize_model()
    whole = relative(dict(model.named_parameters()), dict(twin.named_parameters()))
    return {
        "losses": losses,
        "gradients": far,
        "digests": digests,
        "whole": whole,
        "ran": _ran(pipe),
        "replica": pipe.replica,
    }


def _ran(pipe: Any) -> list[str]:
    return [str(event.action) for event in pipe.events if event.action.computation_type == "F"]


def _kinds(plan: fxpipe.Plan) -> int:
    return max(len(s.received) for s in plan.stages.stages)


def exact() -> dict[str, Any]:
    """The models that suit the number of ranks."""
    if ranks() == 4:
        return {
            "unet": like_local("unet", 4),
            "cnn": like_local("cnn", 8),
            "tied": like_local("tied", 2),
            "replicated": {f"{name} {widths}": replicated(name, widths) for name, widths in REPLICATED},
        }
    return {
        "tied": like_local("tied", 4),
        "gpt": like_local("gpt", 4, "bfp4b32"),
        "mismatch": _mismatch(),
        "data": _data(),
        "memory": memory(),
    }


def _mismatch() -> str:
    model, args, kwargs = small("mlp")
    return _message(lambda: fxpipe.compile(model, (args, kwargs), {"n_ranks": 3}).pipe())


def _data() -> str:
    model, args, kwargs = small("mlp")
    pipe = fxpipe.compile(model, (args, kwargs), {"n_ranks": 2}).pipe()
    return _message(lambda: pipe.step(args[0] + rank(), args[1]))


def memory() -> dict[str, Any]:
    """The most tensors that came from or went to other ranks and are alive at once, for 8 and for 32 microbatches."""
    found = {}
    for n in (8, 32):
        model, args, kwargs = small("mlp")
        args = tuple(x.repeat(2, *[1] * (x.dim() - 1)) for x in args)
        pipe: Any = fxpipe.compile(model, (args, kwargs), {"n_ranks": ranks(), "n_microbatches": n}).pipe()
        stage, alive, most = pipe._engine._stage, weakref.WeakSet[torch.Tensor](), [0]

        def counted(method: Any, alive: Any = alive, most: Any = most) -> Any:
            def call(tensors: Any, *where: int) -> Any:
                alive.update(tensors)
                most[0] = max(most[0], len(alive))
                return method(tensors, *where)

            return call

        stage._send, stage._receive = counted(stage._send), counted(stage._receive)
        for _ in range(2):
            pipe.step(*args, **kwargs)
        found[str(n)] = most[0]
        found[f"left {n}"] = len(alive)
    return found


def plan_to_fail(n_ranks: int, timeout_seconds: float = 60) -> tuple[fxpipe.Plan, tuple[Any, ...]]:
    model, args, _ = small("mlp")
    return fxpipe.compile(
        model, args, {"n_ranks": n_ranks, "n_microbatches": 4, "timeout_seconds": timeout_seconds}
    ), args


def failing(how: str, plan: fxpipe.Plan, args: tuple[Any, ...]) -> dict[str, Any]:
    """Rank 1 fails in the middle of the second step, or does not come at all."""
    if how == "absent":
        return {"message": "" if rank() == 1 else _message(plan.pipe)}
    pipe = plan.pipe()
    pipe.step(*args)
    if rank() == 1:
        _fail_at(pipe.runners[0], how)
    start = time.monotonic()
    message = _message(lambda: [pipe.step(*args) for _ in range(3)])
    return {"message": message, "seconds": time.monotonic() - start}


def _fail_at(runner: Any, how: str) -> None:
    inner = runner.backward

    def backward(microbatch: int, grads: Any) -> Any:
        if microbatch == 2:
            if how.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ValueError("no more")
        return inner(microbatch, grads)

    runner.backward = backward


def _message(action: Any) -> str:
    try:
        action()
    except (FxpipeError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


def failures(folder: Path) -> None:
    """Every case in turn, each rank a process of its own."""
    plans: dict[tuple[int, float], Any] = {}
    for case, n_ranks in CASES.items():
        timeout = 60 if case in ("kill", "kill-of-4", "raise") else 3
        key = (n_ranks, timeout)
        plans[key] = plans.get(key) or plan_to_fail(*key)
        port = _free_port()
        started = [_fork(case, r, n_ranks, port, folder, *plans[key]) for r in range(n_ranks)]
        for r, process in enumerate(started):
            if r != 1:
                os.waitpid(process, 0)
        os.kill(started[1], signal.SIGKILL)
        os.waitpid(started[1], 0)


def _fork(case: str, r: int, n_ranks: int, port: int, folder: Path, plan: fxpipe.Plan, args: tuple[Any, ...]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(r), WORLD_SIZE=str(n_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(folder / f"{case}-{r}.err", os.O_WRONLY | os.O_CREAT), 2)
    try:
        (folder / f"{case}-{r}.json").write_text(json.dumps(failing(case, plan, args)))
    finally:
        sys.stderr.flush()
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main(case: str, folder: Path, *rest: str) -> None:
    if case == "failures":
        failures(folder)
        return
    result = exact() if case == "exact" else failing(*rest, *plan_to_fail(ranks()))
    (folder / f"{rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
