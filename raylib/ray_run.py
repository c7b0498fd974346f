"""A training on the workers of a Ray cluster: attempts, one after the other, until one comes to an end.

Each attempt is a run of Ray Train without retries of its own: it would start a user's mistake again as it
does a lost worker, and tell both by tracebacks. Here

- a mistake of the user, a full disk or a bug ends the run at once;
- a lost worker, node or connection is answered by the next attempt, which goes on from the newest checkpoint,
  up to `max_failures` times;
- a node that Ray takes away (spot instances, `ray drain-node`, a pod that Kubernetes ends) is a notice to the
  workers: they save at their next step boundary, and the next attempt goes on elsewhere, up to
  `max_preemptions` times.

Notices travel through `NoticeBoard`, an actor of the driver's: worker 0 waits for its word, so that none is
asked for in vain.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raylib import cache, checkpoint
from raylib.distributed import LOOPBACK, join_workers, serve_store
from raylib.errors import MachineError, UserError, error_line
from raylib.lock import owner_of, require_owned, stop_if_lost, work_for
from raylib.notice import PREEMPTION, Interrupted, NoticeBoard, notices_to, stop_line
from raylib.runtime import RayRuntime, Reporter, set_deterministic

LOOK_SECONDS, DRAIN_SECONDS = 0.25, 1.0  # between looks at what has come: signals; nodes that go away
ANSWER_SECONDS = 10.0  # for an actor to answer
# Errors of what connects workers; PyTorch raises most of them as plain RuntimeErrors
CONNECTION = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket|broken pipe|timed out|cuda error", re.I
)


class _Failure(NamedTuple):
    """The end of an attempt that another may follow."""

    cause: str
    is_preemption: bool


def train_on_ray(
    main: Callable, config: Any, run: Path, worker: dict[str, float], reporter: Reporter | None
) -> dict:
    """Call `main(runtime, config)` on Ray's workers, each with the resources `worker`, until an attempt comes
    to an end; return the result of worker 0.

    Raises:
        UserError: a mistake in the input. MachineError: a full disk; more lost workers, or preemptions, than
        settings allow. Interrupted: a signal came, and there was nothing to save.
    """
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    counts = {"failures": 0, "preemptions": 0}
    while True:
        require_owned(run)
        attempt = _Attempt(main, config, run, worker, reporter)
        try:
            result = attempt.run()
        except TrainingFailedError as e:
            if attempt.notice:  # a worker's evaluation could not be left otherwise
                raise _stopped(attempt.notice, run) from None
            failure = _explain(e)
            failure = failure._replace(is_preemption=failure.is_preemption or attempt.is_preempted)
        except RayError as e:
            if attempt.notice:
                raise _stopped(attempt.notice, run) from None
            failure = _Failure(f"Ray Train's controller was lost ({_first_line(e)})", attempt.is_preempted)
        else:
            if result.get("notice") != PREEMPTION:
                return result
            if attempt.notice:  # it came after the workers had agreed
                raise _stopped(attempt.notice, run)
            failure = _Failure("Ray takes a node of this run away", True)
        kind, limit = (
            ("preemptions", config.max_preemptions)
            if failure.is_preemption
            else ("failures", config.max_failures)
        )
        counts[kind] += 1
        newest = checkpoint.find_newest(run)
        place = f"goes on from {newest.name}" if newest else "starts anew"
        if limit >= 0 and counts[kind] > limit:
            number = f"{counts[kind]} {kind}, more than max_{kind}={limit}"
            raise MachineError(f"{failure.cause}; {number}; the same command {place}")
        if failure.is_preemption:
            number = f"preemption {counts[kind]}" + (f" of {limit}" if limit >= 0 else "")
            print(f"{failure.cause}; {number}: {place} on others", flush=True)
        else:
            print(f"{failure.cause}; attempt {counts[kind] + 1} of {limit + 1} {place}", flush=True)


def _stopped(notice: int, run: Path) -> Interrupted:
    newest = checkpoint.find_newest(run)
    if newest is None:
        return Interrupted(notice)
    meta = checkpoint.read_meta(newest)
    return Interrupted(notice, stop_line(notice, meta["step"], meta["total_steps"]))


class _Attempt:
    """One group of workers, from its start to its end.

    notice: of a signal that asks the run to end; 0: none. is_preempted: Ray takes a node away, and workers
    know.
    """

    def __init__(
        self, main: Callable, config: Any, run: Path, worker: dict[str, float], reporter: Reporter | None
    ):
        import ray
        from ray import train
        from ray.train.torch import TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(num_cpus=0)(NoticeBoard)
        self.board = actor.options(scheduling_strategy=here).remote()
        self.run_folder, self.notice, self.is_preempted, self.last_look = run, 0, False, 0.0
        self.outcome: Any = None
        callbacks: list[Any] = [_controller_callback(self.board)]
        # Ray's type hints are those of Train's first version, its objects those of the second
        self.trainer = TorchTrainer(
            _run_worker,  # type: ignore[arg-type]
            train_loop_config={
                "main": main,
                "config": config,
                "run": str(run),
                "board": self.board,
                "owner": owner_of(run),
                "object_cache": cache.get_cache(),
                "opened_files": cache.opened_files(),
            },
            torch_config=_torch_config(),
            scaling_config=train.ScalingConfig(
                num_workers=config.workers, use_gpu="GPU" in worker, resources_per_worker=worker
            ),
            run_config=train.RunConfig(
                name="ray",  # Train's own files; checkpoints are not among them
                storage_path=str(run),
                callbacks=callbacks + ([reporter.train_callback()] if reporter else []),
                failure_config=train.FailureConfig(max_failures=0),
                logging_config=train.LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            ),
        )

    def run(self) -> dict:
        """Return the result of worker 0.

        Raises:
            ray.train.TrainingFailedError: what workers have met. Interrupted: a signal came outside of the
            training loop, or Ctrl-C a second time.
        """
        # in a thread: in the main one Ray Train takes Ctrl-C for itself, and kills the workers at once
        thread = threading.Thread(target=self._fit, name="ray train", daemon=True)
        thread.start()
        try:
            with notices_to(self._receive):
                passed_on = 0
                while thread.is_alive():
                    thread.join(LOOK_SECONDS)
                    if self.notice > passed_on:
                        passed_on = self.notice
                        if not self._post(passed_on):
                            raise Interrupted(passed_on)
                    stop_if_lost(self.run_folder)
                    self._look_for_preemption()
        except BaseException:
            self._abort()
            raise
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.notice > passed_on and not self.outcome.get("notice"):  # it came when the workers had ended
            raise Interrupted(self.notice)
        return self.outcome

    def _receive(self, notice: int) -> None:
        self.notice = max(self.notice, notice)

    def _fit(self) -> None:
        try:
            self.outcome = self.trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as e:
            self.outcome = e

    def _post(self, notice: int) -> bool:
        import ray

        return ray.get(self.board.post.remote(notice), timeout=ANSWER_SECONDS)

    def _look_for_preemption(self) -> None:
        """Give notice if a node with workers is being drained. Ray Train's own watcher is an actor that says
        so in lines of its own, and that workers can ask together alone, at the price of a step's time."""
        import ray

        if time.monotonic() - self.last_look < DRAIN_SECONDS:
            return
        self.last_look = time.monotonic()
        try:
            draining = ray._private.state.state.get_draining_nodes()
            if draining and draining.keys() & ray.get(
                self.board.nodes_of_workers.remote(), timeout=ANSWER_SECONDS
            ):
                self.is_preempted = True
                self._post(PREEMPTION)
        except (ray.exceptions.RayError, RuntimeError):  # the cluster's head does not answer just now
            return

    def _abort(self) -> None:
        """End the workers at once."""
        import ray

        try:
            controller = ray.get(self.board.get_controller.remote(), timeout=ANSWER_SECONDS)
            if controller is not None:
                ray.get(controller.abort.remote(), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:  # it ends with this call, or has ended
            return


def _controller_callback(board: Any) -> Any:
    """Return what tells `board` of Ray Train's controller, in whose process it is called."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class TellController(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            _be_quiet()
            board.set_controller.remote(ray.get_runtime_context().current_actor)

    return TellController()


def _torch_config() -> Any:
    """Return how Ray Train forms the process group: as by default, but that workers who share a node meet on
    its loopback interface, where Ray's own would let PyTorch listen on every address."""
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            nodes = worker_group.execute(lambda: ray.get_runtime_context().get_node_id())
            if len(set(nodes)) > 1:
                super().on_start(worker_group, backend_config)
                return
            worker_group.execute(_set_torch_distributed_env_vars)
            port = worker_group.execute_single(0, lambda: serve_store().port)
            backend = "nccl" if worker_group.get_resources_per_worker().get("GPU") else "gloo"
            joins = [worker_group.execute_single_async(i, _join, backend, port) for i in range(len(nodes))]
            ray.get(joins)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[_TorchBackend]:
            return Backend

    return Config()


def _join(backend: str, port: int) -> None:
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    join_workers(backend)


def _explain(error: Exception) -> _Failure:
    """Return what has ended an attempt, if another may help.

    Raises:
        UserError, MachineError: it will not; what a worker has raised, or what an error of its comes to.
        Exception: a bug, with its traceback.
    """
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    if not isinstance(error, WorkerGroupError):
        return _Failure(f"Ray could not start the workers ({_first_line(error)})", False)
    deaths: dict[int, Exception] = {}
    lost: dict[int, str] = {}
    for rank, e in sorted(error.worker_failures.items()):
        if isinstance(e, UserError | MachineError):
            raise e from None
        if isinstance(e, WorkerHealthCheckFailedError):
            deaths[rank] = e.health_check_failure
        elif isinstance(e, ConnectionError | TimeoutError) or CONNECTION.search(str(e)):
            lost[rank] = _first_line(e)
        elif line := error_line(e):
            raise line from None
        else:
            raise error from e
    if any(isinstance(e, RayActorError) and e.preempted for e in deaths.values()):
        return _Failure(f"{_workers(deaths)} died with a node that Ray took away", True)
    if deaths:
        return _Failure(f"{_workers(deaths)} died ({_death(next(iter(deaths.values())))})", False)
    return _Failure(f"{_workers(lost)} lost the others ({next(iter(lost.values()))})", False)


def _workers(ranks: Mapping[int, Any]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _death(error: Exception) -> str:
    """Say why Ray thinks that a worker's process has ended."""
    from ray.exceptions import OutOfMemoryError

    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError):
        return "killed by Ray, for its node had no memory left"
    if re.search(r"\bnode\b.*\b(died|dead|terminated|removed|lost)\b", text) and "worker process" not in text:
        return "its node was lost"
    if "worker process has died" in text:
        return "its process was killed, as for want of memory, or crashed"
    return _first_line(error)


def _be_quiet() -> None:
    """Leave errors to the driver, which has them in one line: Ray Train prints the traceback of each too."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)


def _run_worker(loop_config: dict[str, Any]) -> dict:
    """Call `main` on a worker of Ray Train."""
    cache.set_cache(loop_config["object_cache"])
    logging.getLogger().setLevel(logging.WARNING)  # Train prints each report, whole, as INFO
    _be_quiet()
    cache.share_opened(loop_config["opened_files"])
    config = loop_config["config"]
    set_deterministic(config.fit.deterministic)
    with work_for(loop_config["owner"]):
        runtime = RayRuntime(Path(loop_config["run"]), config.fit.keep, loop_config["board"])
        return loop_config["main"](runtime, config)
