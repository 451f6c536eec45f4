"""What a run can be told: precision, freezing, averaging, stopping, measuring, advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nlsurgery
from nlsurgery.errors import SurgeryError, VerifyError
from nlsurgery.finetune import FinetuneConfig, estimate
from nlsurgery.finetune.classify import classification_job
from nlsurgery.finetune.memory import OutOfMemoryError, is_out_of_memory
from nlsurgery.finetune.model import Classifier
from nlsurgery.finetune.network import largest_difference, operate
from nlsurgery.finetune.optim import make_optimizer, make_schedule
from tests.finetune.conftest import finetune, saved


def test_frozen_backbone_computes_as_the_original(values: dict[str, Any]) -> None:
    """Parameters and statistics stay: with the blocks disabled, the features are the original's."""
    original = classification_job(FinetuneConfig.make(**values)).network
    result, _ = finetune(values, freeze_backbone=True, epochs=1)
    trained = nlsurgery.load(
        classification_job(FinetuneConfig.make(**values)).network, result.model_file
    )
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad(), nlsurgery.disabled(trained):
        assert torch.equal(trained.forward_features(x), original.forward_features(x))
    assert not torch.equal(trained.fc.weight, original.fc.weight)
    assert any(block.gate.abs().max() > 0 for block in nlsurgery.inserted_blocks(trained).values())


def test_averaged_weights_are_saved_and_scored(values: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = finetune(values)
    averaged, _ = finetune(values, ema=0.9, work_dir=str(tmp_path / "ema"))
    assert saved(averaged)["steps"] == saved(plain)["steps"]
    assert saved(averaged)["weights"] != saved(plain)["weights"]
    assert averaged.after["loss"] != plain.after["loss"]


def test_accumulated_steps_equal_one_large_step() -> None:
    torch.manual_seed(0)
    weights = []
    for accumulate, size in ((1, 8), (4, 2)):
        torch.manual_seed(1)
        from tests.models import TinyResNet

        network = nlsurgery.apply(
            TinyResNet().eval(),
            {"version": 1, "inserts": [{"stage": "res3", "block": {"type": "self_attention"}}]},
            input_size=(3, 32, 32),
        )
        config = FinetuneConfig.make(
            model="x", recipe="x", data="x", accumulate=accumulate, lr=0.1, clip_grad=0.5
        )
        model = Classifier(network)
        optimizer = make_optimizer(config, network, torch.device("cpu"))
        optimizer.initialize_count_status(nn.Identity(), 0, accumulate)
        x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
        model.eval()
        for part in range(0, 8, size):
            model.train_step([x[part : part + size], labels[part : part + size]], optimizer)
        weights.append(network.fc.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_early_stop_ends_a_run_and_its_continuation(values: dict[str, Any]) -> None:
    """A learning rate of nothing never betters the first epoch."""
    changes = {"lr": 1e-12, "early_stop": 2, "epochs": 9}
    result, _ = finetune(values, **changes)
    assert result.after["epoch"] == 3
    assert result.best_epoch == 1
    again, _ = finetune(values, resume=True, **changes)
    assert again.after["epoch"] == 3


def test_tensorboard_files_hold_losses_scores_and_gates(values: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    result, _ = finetune(values, tensorboard=True)
    files = list((result.work_dir / "tensorboard").rglob("events.out.*"))
    assert len(files) == 1
    events = event_accumulator.EventAccumulator(str(files[0].parent))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"accuracy", "loss", "gate/layer3.0.nlsurgery.0"} <= names
    assert len(events.Scalars("gate/layer3.0.nlsurgery.0")) == 6


def test_dry_run_tells_plan_memory_and_time_and_writes_nothing(values: dict[str, Any]) -> None:
    said: list[str] = []
    result = estimate(FinetuneConfig.make(**values), say=said.append)
    assert (result.num_steps, result.num_train, result.num_val) == (6, 48, 12)
    assert result.total_seconds > 6 * result.step_seconds > 0
    assert result.peak_bytes > 50e6
    assert "non_local" in said[0] or "non_local" in said[1]
    assert "6 steps" in str(result)
    assert not Path(values["work_dir"]).exists()


def test_out_of_memory_says_what_to_change(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(self: Classifier, *args: Any, **kwargs: Any) -> None:
        torch.empty(2**50)

    monkeypatch.setattr(Classifier, "forward", greedy)
    with pytest.raises(OutOfMemoryError) as caught:
        finetune(values)
    text = str(caught.value)
    for word in ("--batch-size 8 --accumulate 2", "--amp bf16", "--freeze-backbone", "sub_sample"):
        assert word in text
    assert isinstance(caught.value, SurgeryError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried"), True, id="cuda"),
        pytest.param(MemoryError(), True, id="python"),
        pytest.param(RuntimeError("shape '[2]' is invalid"), False, id="other"),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"schedule": "constant", "warmup": 0.0}, [1, 1, 1, 1, 1, 1], id="constant"),
        pytest.param(
            {"schedule": "step", "lr_steps": (1, 2), "warmup": 0.0}, [1, 1, 0.1, 0.1, 0.01, 0.01],
            id="step",
        ),
        pytest.param({"warmup": 0.0}, [1, 0.933, 0.75, 0.5, 0.25, 0.067], id="cosine"),
        pytest.param({"warmup": 0.67, "schedule": "constant"}, [0.01, 0.34, 0.67, 1, 1, 1], id="warm-up"),
    ],
)  # fmt: skip
def test_learning_rate_over_three_epochs_of_two_steps(
    changes: dict[str, Any], expected: list[float]
) -> None:
    from mmengine.registry import PARAM_SCHEDULERS

    config = FinetuneConfig.make(model="x", recipe="x", data="x", epochs=3, lr=1.0, **changes)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    made = [
        PARAM_SCHEDULERS.build({**part, "optimizer": optimizer})
        for part in make_schedule(config, 2)
    ]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in made:
            scheduler.step()
    assert rates == pytest.approx(expected, abs=2e-3)


def test_block_that_is_no_identity_is_caught(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = classification_job(FinetuneConfig.make(**values))
    from nlsurgery.finetune import network as module

    def careless(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        nlsurgery.apply(model, *args, **kwargs)
        for block in nlsurgery.inserted_blocks(model).values():
            nn.init.ones_(block.gate)
        return model

    monkeypatch.setattr(module, "apply", careless)
    batch = job.collate([job.val[0], job.val[1]])
    with pytest.raises(VerifyError, match="differs from the original"):
        operate(
            job.network,
            FinetuneConfig.make(**values),
            job.input_size,
            lambda m: job.outputs(m, batch),
        )


def test_difference_sees_nan_and_shapes() -> None:
    one = [torch.ones(2)]
    assert largest_difference(one, [torch.ones(2)]) == 0
    assert largest_difference(one, [torch.tensor([1.0, 1.5])]) == 0.5
    assert largest_difference(one, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert largest_difference(one, [torch.ones(3)]) == float("inf")
