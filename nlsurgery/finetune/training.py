"""One fine-tuning run, from the original checkpoint to the scores after."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier
from torch import nn

from nlsurgery.errors import DataError, SurgeryError
from nlsurgery.finetune.checkpoints import BEST_FILE, MODEL_FILE, clear_leftovers, read_state
from nlsurgery.finetune.config import FREE_FIELDS, FinetuneConfig
from nlsurgery.finetune.curves import write_curves
from nlsurgery.finetune.distributed import is_first_process, process_group, share_norms
from nlsurgery.finetune.history import History
from nlsurgery.finetune.hooks import Progress
from nlsurgery.finetune.job import Job, make_job
from nlsurgery.finetune.memory import explain_out_of_memory
from nlsurgery.finetune.network import operate
from nlsurgery.finetune.optim import check_precision, freeze
from nlsurgery.finetune.pictures import draw_attention
from nlsurgery.finetune.runner import make_runner
from nlsurgery.finetune.seeding import keep_random_state
from nlsurgery.finetune.sharding import check_sharding, spare_copy
from nlsurgery.finetune.shared_norm import shared_statistics
from nlsurgery.finetune.stopping import Interrupted, StopSignal
from nlsurgery.planning import Plan
from nlsurgery.surgery import plan

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        work_dir: Where everything lies.
        model_file: The operated model, for ``nlsurgery.load``.
        best_file: The same after the epoch with the best score.
        score: Name of the score that counts.
        before: The scores on the validation set before the first step.
        after: The same after the last epoch.
        best_epoch: The first trained epoch with the best score.
        max_difference: Largest difference between the outputs of the original and the operated model.
        stopped_at: The step after which a SIGTERM ended the run, None for a whole run.
        pictures: Attention pictures.
    """

    work_dir: Path
    model_file: Path
    best_file: Path
    score: str
    before: dict[str, float]
    after: dict[str, float]
    best_epoch: int
    max_difference: float
    stopped_at: int | None = None
    pictures: tuple[Path, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Operated:
    """A job whose network has been operated on.

    Attributes:
        job: The job; its network holds the blocks.
        plan: What was inserted.
        max_difference: Of the outputs before and after, on the first batch.
    """

    job: Job
    plan: Plan
    max_difference: float


def run(
    config: FinetuneConfig, *, say: Say = print, progress: Progress | None = None
) -> FinetuneResult:
    """Operate, prove identity, score, train, score again.

    Args:
        config: The run.
        say: Called with every message for the user.
        progress: Called with (step, steps, what to show) after every step.

    Raises:
        SurgeryError: Bad model, checkpoint, recipe or data; nothing has been written then.
    """
    if not is_first_process():
        say, progress = say_nothing, None
    with process_group(config.device) as device, keep_random_state(), StopSignal() as stop:
        return _run(config, device, stop, say, progress)


def _run(
    config: FinetuneConfig,
    device: torch.device,
    stop: StopSignal,
    say: Say,
    progress: Progress | None,
) -> FinetuneResult:
    prepared = prepare(config, device, say)
    fingerprint = _fingerprint(config, prepared.plan)
    state = read_state(Path(config.work_dir), fingerprint) if config.resume else None
    barrier()
    open_folder(config)
    history = History(prepared.job.score)
    if config.resume:
        say(_resume_text(state, config))
    if state is not None:
        history.fill(state["history"])
    spare = spare_copy(config, prepared.job.network)
    runner = make_runner(
        config, prepared.job, device, history, fingerprint=fingerprint, state=state, spare=spare,
        stop=stop, tell=lambda row: say(score_text(row)), progress=progress,
    )  # fmt: skip
    del state
    stopped_at = None
    try:
        with explain_out_of_memory(config, prepared.plan), shared_statistics(device):
            runner.train()
    except Interrupted as end:
        stopped_at = end.step
    except DataError as error:
        raise _without_worker_s_traceback(error) from error
    finally:
        runner.close()
    network = prepared.job.network if spare is None else spare.to(device)
    return _finish(config, prepared, network, history, stopped_at, device, say)


def say_nothing(text: str) -> None:
    """Say nothing: the first process speaks for all."""


def prepare(config: FinetuneConfig, device: torch.device, say: Say) -> Operated:
    """Read and check everything, operate, prove the identity. Writes nothing.

    Args:
        config: The run.
        device: Where it computes.
        say: Called with every message for the user.

    Raises:
        SurgeryError: Something in the run's input is wrong.
    """
    check_precision(config, device)
    check_sharding(config)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise SurgeryError(
            "--tensorboard needs TensorBoard, which is not installed: "
            "pip install 'nlsurgery[tensorboard]'"
        )
    check_folder(Path(config.work_dir))
    job = make_job(config)
    network = share_norms(job.network, device).to(device)
    if config.checkpoint is None and not config.pretrained and not config.resume:
        say(
            f"{config.model} starts from random weights: give --checkpoint or --pretrained for others"
        )
    made = plan(
        network, config.recipe, input_size=job.input_size, allow_imports=config.allow_imports
    )
    say(str(made))
    num_samples = min(len(job.val), config.batch_size)  # type: ignore[arg-type]
    batch = job.collate([job.val[index] for index in range(num_samples)])
    difference = operate(network, config, job.input_size, lambda model: job.outputs(model, batch))
    say(f"identity on the first batch of {num_samples}: max |Δ| = {difference:g}")
    share_norms(network, device)
    if config.freeze_backbone:
        freeze(network, job.head)
    return Operated(job, made, difference)


def check_folder(folder: Path) -> None:
    """Refuse a work dir that cannot be written to, without making it.

    Raises:
        DataError: It is a file, or cannot be written to.
    """
    nearest = folder.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise DataError(f"--work-dir {folder} cannot be made: {nearest} is a file")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise DataError(
            f"--work-dir {folder} cannot be written to: {nearest}: {error.strerror}"
        ) from error


def open_folder(config: FinetuneConfig) -> None:
    """Make the work dir, clear what a killed run left half-written, write the configuration."""
    folder = Path(config.work_dir)
    if is_first_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--work-dir {folder} cannot be made: {error.strerror}") from error
        clear_leftovers(folder)
        config.write(folder)
    barrier()


def _fingerprint(config: FinetuneConfig, made: Plan) -> dict[str, Any]:
    """The settings a continuation must share with its run for the same numbers."""
    settings = config.model_dump(mode="json", exclude=set(FREE_FIELDS))
    recipe = settings.pop("recipe")
    settings["recipe"] = recipe if isinstance(recipe, str) else "a mapping"
    return {**settings, "blocks": [f"{row.fqn} {row.type}" for row in made.insertions]}


def _resume_text(state: dict[str, Any] | None, config: FinetuneConfig) -> str:
    if state is None:
        return f"nothing is saved in {config.work_dir} yet: the run starts anew"
    return f"going on after step {state['iter']}, in epoch {state['epoch'] + 1} of {config.epochs}"


def score_text(row: dict[str, float]) -> str:
    """One line for the scores after an epoch."""
    when = f"after epoch {row['epoch']:.0f}" if row["epoch"] else "before the first step"
    shown = [
        f"{name} {value:.2f}%" if name == "accuracy" else f"{name} {value:.4f}"
        for name, value in row.items()
        if name != "epoch"
    ]
    return f"validation {when}: {', '.join(shown)}"


def _without_worker_s_traceback(error: DataError) -> DataError:
    """The message of an error that a loader process raised, without that process's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return error
    return DataError(text.splitlines()[-1].partition("DataError: ")[2])


def _finish(
    config: FinetuneConfig,
    prepared: Operated,
    network: nn.Module,
    history: History,
    stopped_at: int | None,
    device: torch.device,
    say: Say,
) -> FinetuneResult:
    folder = Path(config.work_dir)
    pictures: tuple[Path, ...] = ()
    if is_first_process():
        history.write(folder)
        write_curves(history, folder)
        if stopped_at is None:
            _take_saved_weights(network, folder)
            pictures = draw_attention(network, prepared.job, config.pictures, folder, device, say)
    barrier()
    if not history.scores:
        raise SurgeryError("the run was asked to end before its first score; nothing was trained")
    return FinetuneResult(
        work_dir=folder,
        model_file=folder / MODEL_FILE,
        best_file=folder / BEST_FILE,
        score=history.score,
        before=history.scores[0],
        after=history.scores[-1],
        best_epoch=history.best_epoch,
        max_difference=prepared.max_difference,
        stopped_at=stopped_at,
        pictures=pictures,
    )


def _take_saved_weights(network: nn.Module, folder: Path) -> None:
    """Put the weights that were saved and scored (the averaged ones, with EMA) into the model."""
    from nlsurgery.checkpoint import load

    load(network, folder / MODEL_FILE)
