"""The plan of every stage: examples, steps, tokens, memory, disk, and time from a measured step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpo_trainer.models.dtypes import dtype_name
from rpo_trainer.models.loading import load_model
from rpo_trainer.models.reward_model import as_reward_model
from rpo_trainer.plan.disk import stage_disk, together, unread_model
from rpo_trainer.plan.engines import (
    IN_EACH_MICRO_BATCH,
    DeviceMemory,
    Engine,
    check_devices,
    launch_line,
    per_device,
)
from rpo_trainer.plan.memory import step_memory
from rpo_trainer.plan.nf4 import hold_in_nf4
from rpo_trainer.recipe import (
    LoadedRecipe,
    RewardStage,
    Stage,
)
from rpo_trainer.runtime.devices import best_device
from rpo_trainer.stages.error_places import errors_located_in
from rpo_trainer.stages.inputs import sampling_spec
from rpo_trainer.stages.output_dtype import exact_until
from rpo_trainer.stages.prepare import StagePreparer
from rpo_trainer.stages.settings import arithmetic, frozen_dtype
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.step.dealing import idle_share
from rpo_trainer.step.forward import install, token_logprobs
from rpo_trainer.step.packing import forward_tokens, pack
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.config import PreferenceConfig
from rpo_trainer.trainers.config_checks import accumulation_of
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.loaders import TrainSampler, train_sampler

_SIMULATED_STEPS = 100  # for the idle share


@dataclass
class StagePlan:
    """Estimates of one stage.

    Attributes:
        examples: of one pass over the data.
        tokens: processed in forwards and backwards over the entire stage.
        assumed: responses are not sampled yet and were counted at their maximum length.
        memory: bytes on one device by part.
        disk: bytes by kind, and `saving`: temporary bytes while a checkpoint is saved.
        micro_batch_tokens: budget of a micro-batch; None: micro-batches are formed by number of examples.
        idle_share: fraction of the time in which devices wait for the slowest one, from the lengths of the
            examples of the first 100 steps or fewer; None: one device.
        frozen: dtype that weights below an adapter are held in; None: all are trained.
        seconds: of the entire stage on one device of this machine; None: not measured.
        copied: bytes of CPU memory that `async_save` copies a checkpoint to; 0: it is off.
    """

    name: str
    kind: str
    examples: int
    steps: int
    tokens: int
    assumed: bool
    memory: DeviceMemory
    disk: dict[str, int]
    micro_batch_tokens: int | None = None
    idle_share: float | None = None
    frozen: str | None = None
    seconds: float | None = None
    copied: int = 0


@dataclass
class Plan:
    """The stages in order, the engine, and the launch command."""

    stages: list[StagePlan]
    engine: Engine
    devices: int
    parameters: int
    launch: str
    exact_until: dict[str, str] = field(default_factory=dict)  # of `stages.output_dtype`

    @property
    def peak(self) -> int:
        """Peak bytes on one device over all stages."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def disk(self) -> int:
        """Peak bytes of the run directory."""
        return together({stage.name: stage.disk for stage in self.stages}, self.exact_until)


def plan_recipe(
    loaded: LoadedRecipe,
    run_dir: Path,
    *,
    engine: Engine = "single",
    devices: int = 1,
    nodes: int = 1,
    measure: bool = False,
    arguments: Sequence[str] = (),
) -> Plan:
    """Plan every stage of a recipe. Data are read and tokenized; weights are loaded only to measure.

    Args:
        devices: total over all nodes.
        arguments: command-line arguments for the launch command.
        measure: time one forward and backward of an average micro-batch with the real model.

    Raises:
        DataError, ModelError, RecipeError, Problems: with the place in the recipe.
    """
    check_devices(engine, devices, nodes)
    with errors_located_in(loaded.origins):
        planner = _Planner(loaded, run_dir, engine, devices)
    planned = []
    for stage in planner.preparer.stages:
        with errors_located_in(loaded.origins, f"stages.{stage.name}"):
            planned.append(planner.stage(stage))
    plan = Plan(
        stages=planned,
        engine=engine,
        devices=devices,
        parameters=planner.parameters,
        launch=launch_line([str(loaded.path), *arguments], engine, devices, nodes),
        exact_until=exact_until(planner.preparer),
    )
    if measure:
        planner.measure(plan)
    return plan


class _Planner:
    def __init__(self, loaded: LoadedRecipe, run_dir: Path, engine: Engine, devices: int) -> None:
        self.preparer = StagePreparer(loaded, run_dir)
        self.vocabulary = len(self.preparer.tokenizer)
        self.recipe = loaded.recipe
        self.run_dir = run_dir
        self.engine = engine
        self.devices = devices
        self.parameters = 0
        self.half = arithmetic(loaded.recipe.model) != "float32"
        self.typical: dict[str, tuple[Stage, list[dict[str, Any]]]] = {}

    def stage(self, stage: Stage) -> StagePlan:
        """Plan one stage."""
        if not stage.micro_batch_tokens:
            where = f"stages.{stage.name}.global_batch_size"
            accumulation_of(stage.global_batch_size, stage.micro_batch_size, self.devices, where)
        config = self.preparer.settings(stage, self.run_dir)
        examples, assumed = self._examples(stage)
        costs = examples.costs("shared").tolist()
        sampler = self._sampler(examples, config)
        steps_dealt = [sampler.deal(batch) for batch in sampler.global_batches()]
        batches = [micro for dealt in steps_dealt for rank in dealt for micro in rank if micro]
        heaviest = max(batches, key=lambda batch: sum(costs[i] for i in batch))
        steps, tokens = _steps(stage, costs)
        memory = step_memory(
            lambda dtype: self._model(stage, dtype),
            [examples[i] for i in heaviest],
            reference_batch=_reference_batch(config, examples, costs),
            optim=str(getattr(config.optim, "value", config.optim)),
            autocast=config.mixed_precision_dtype(),
            # Engines that shard the weights gather them in half precision.
            half_weights=self.half and self.engine not in ("single", "ddp", "zero2"),
            frozen=self._frozen_dtype(stage),
            accumulation=max(len(dealt[0]) for dealt in steps_dealt),
            checkpointing=stage.gradient_checkpointing,
            logits_chunk_bytes=config.logits_chunk_bytes,
        )
        typical = sorted(batches, key=lambda batch: sum(costs[i] for i in batch))[len(batches) // 2]
        self.typical[stage.name] = (stage, [examples[i] for i in typical])
        saved = memory.gradients if stage.peft is not None else 4 * self.parameters
        return StagePlan(
            name=stage.name,
            kind=stage.kind,
            examples=len(examples),
            steps=steps,
            tokens=tokens,
            assumed=assumed,
            memory=per_device(memory, self.engine, self.devices, half=self.half),
            micro_batch_tokens=getattr(sampler, "budget", None),
            idle_share=self._idle_share(sampler),
            frozen=None if stage.peft is None else dtype_name(self._frozen_dtype(stage)),
            disk=stage_disk(
                self.preparer,
                stage,
                parameters=4 * self.parameters,  # regardless of what holds them in training
                trained=memory.gradients,
                optimizer=memory.optimizer,
                responses=int(examples.response_counts().sum()),
            ),
            copied=saved + memory.optimizer if config.async_save else 0,
        )

    def _sampler(self, examples: Examples, config: BaseConfig) -> TrainSampler:
        """Return the micro-batches of training on the planned devices."""
        by_tokens = bool(config.micro_batch_tokens)
        if config.micro_batch_tokens is None:
            by_tokens = self.devices > 1 and self.engine in IN_EACH_MICRO_BATCH
        return train_sampler(
            examples, "shared", config, config.per_device_train_batch_size,
            by_tokens=by_tokens, ranks=self.devices,
        )  # fmt: skip

    def _idle_share(self, sampler: TrainSampler) -> float | None:
        if self.devices == 1:
            return None
        return idle_share(
            sampler.loads(_SIMULATED_STEPS), each_micro_batch=self.engine in IN_EACH_MICRO_BATCH
        )

    def _frozen_dtype(self, stage: Stage) -> torch.dtype:
        if self.engine.startswith("zero"):  # one dtype for all weights
            return torch.float32
        return frozen_dtype(stage, self.recipe.model)

    def _model(self, stage: Stage, dtype: torch.dtype) -> nn.Module:
        """Create the stage's model, 4-bit layers replaced by stand-ins."""
        model = unread_model(self.preparer, stage, dtype)
        self.parameters = max(self.parameters, sum(p.numel() for p in model.parameters()))
        if stage.peft is not None and stage.peft.quantization is not None:
            hold_in_nf4(model, getattr(torch, arithmetic(self.recipe.model)))
        return model

    def _examples(self, stage: Stage) -> tuple[Examples, bool]:
        """Return training examples, and whether their responses are assumed (not sampled yet)."""
        inputs = self.preparer.prepare(stage)
        if inputs.train is not None:
            return Examples(inputs.train), False
        spec = sampling_spec(stage.data, self.preparer.stages).generate
        assert spec is not None
        pairs = stage.data.pairs is None or stage.data.pairs.select != "all_responses"
        sampled = spec.responses * (len(spec.policies) + len(spec.endpoints))
        count = 2 if pairs else sampled + spec.with_ground_truth
        response = [0] * spec.max_new_tokens
        mask = [1] * spec.max_new_tokens
        return Examples(
            [
                {
                    "prompt_ids": ids,
                    "response_ids": [response] * count,
                    "response_mask": [mask] * count,
                }
                for ids in self.preparer.prompt_ids(inputs.prompts)
            ]
        ), True

    def measure(self, plan: Plan) -> None:
        """Set `seconds` from one forward and backward of a median micro-batch on this device."""
        base_dir = self.preparer.loaded.base_dir
        start: Any = load_model(self.recipe.model, base_dir, seed=0, vocabulary=self.vocabulary)
        device = best_device()
        start.to(device).train()
        for stage in plan.stages:
            spec, examples = self.typical[stage.name]
            model: Any = start
            if isinstance(spec, RewardStage):
                model = as_reward_model(start, attributes=spec.attributes)
            install(model)
            batch = pack(examples, "shared").to(device)
            tokens = sum(forward_tokens(example, "shared") for example in examples)
            dtype = getattr(torch, arithmetic(self.recipe.model))
            taken = _timed(model, batch, device, dtype if self.half else None)
            passes = 1.0
            if spec.needs_reference:
                epochs = stage.steps * spec.global_batch_size / max(1, stage.examples)
                passes += 1 / (3 * max(1e-9, epochs))  # the reference pass: forwards, once
            stage.seconds = taken / tokens * stage.tokens * passes


def _timed(model: Any, batch: PackedBatch, device: torch.device, dtype: Any) -> float:
    """Return the seconds of a forward and backward pass, the faster of two after a warm-up."""
    seconds = []
    for _ in range(3):
        model.zero_grad()
        began = time.perf_counter()
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logps = token_logprobs(model, batch.model_inputs)
        torch.autograd.backward(logps.sum())
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _reference_batch(
    config: BaseConfig, examples: Examples, costs: Sequence[int]
) -> list[dict[str, Any]]:
    """Return as many of the longest examples as fit in one forward pass of the reference log-probs."""
    if not isinstance(config, PreferenceConfig):
        return []
    longest = sorted(range(len(examples)), key=lambda i: -costs[i])
    taken: list[dict[str, Any]] = []
    tokens = 0
    for i in longest:
        tokens += costs[i]
        if taken and tokens > config.reference_batch_tokens:
            break
        taken.append(examples[i])
    return taken


def _steps(stage: Stage, costs: Sequence[int]) -> tuple[int, int]:
    """Return the optimizer steps, and the tokens of all their forwards."""
    per_epoch = -(-len(costs) // stage.global_batch_size)
    steps = stage.max_steps or math.ceil(per_epoch * (stage.num_train_epochs or 1.0))
    return steps, round(sum(costs) * steps / per_epoch)
