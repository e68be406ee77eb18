"""The models of a chain: initial policies, reference models and outputs of the stages.

A stage without `peft` writes a full model to `final`. With `between_stages: merge`, it writes the merged
model there and the adapter to `adapter`; with `keep`, it writes the adapter to `final`, and the next stage
continues to train it on the same base model. `base` is written if the base model exists nowhere else:
random weights, or weights changed by the initialization of the adapter.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rpo_trainer.chain.training import output_fingerprint
from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.models import adapter_files, adapters
from rpo_trainer.models.adapter_methods import changes_base
from rpo_trainer.models.loading import check_vocabulary, load_model, load_weights
from rpo_trainer.models.quantization import dequantized, disable_bnb_cpu_bf16, nf4
from rpo_trainer.models.saved_files import set_ends, write_beside
from rpo_trainer.models.sharding import loading_whole
from rpo_trainer.recipe import Stage
from rpo_trainer.runtime import distributed
from rpo_trainer.stages.scored_rows import source_key
from rpo_trainer.stages.settings import arithmetic, lora_config
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.checkpoint import verify_manifest, write_manifest

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from rpo_trainer.stages.prepare import StagePreparer

_BASE, _START = "base", "start"


@dataclass(frozen=True)
class _Base:
    """The base model of an adapter."""

    place: Path | str | None  # a directory, a hub name, or None: the recipe's model
    name: str  # absolute directory or hub name, as written in the adapter's config
    way: str | None = None  # its path relative to the adapter, so that a run can be moved


@dataclass(frozen=True)
class _Adapter:
    """An adapter on disk, of a stage or from elsewhere."""

    folder: Path
    base: _Base
    quantization: str | None


class Models:
    """Loads and writes the models of a chain."""

    def __init__(self, preparer: StagePreparer, run_dir: Path) -> None:
        self.preparer = preparer
        self.recipe = preparer.recipe
        self.run_dir = run_dir
        self.stages = {stage.name: stage for stage in preparer.stages}
        self.vocabulary = len(preparer.tokenizer)
        # The dtype of matrix products with 4-bit weights.
        self.compute: torch.dtype = getattr(torch, arithmetic(self.recipe.model))
        self.trusted = self.recipe.model.trust_remote_code

    # --- loading ---

    def output(self, source: str) -> Any:
        """Load the policy of a source: `model`, the output of a finished stage, or a directory."""
        left = self._adapter(source)
        if left is None:
            return self._load(self._place(source).place)
        base = self._load(left.base.place, left.quantization)
        return adapters.load_adapter(base, left.folder, trainable=False)

    def sampling_policy(
        self, stage: Stage, source: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a policy that a stage samples from: its initial policy (`init`), or another source."""
        with loading_whole():
            if source != "init":
                model = self.output(source)
            # A reward stage samples its pairs from the policy that it is initialized from.
            elif stage.trains_reward_model:
                model = self.output(stage.init)
            else:
                model = self.start(stage)
            return model.to(distributed.device()), self.preparer.tokenizer

    def weights_key(self, source: str) -> str:
        """Return a content key of the weights of a source."""
        if source in self.stages:
            return output_fingerprint(self._final(source))
        if source != "model":
            return source_key(self.preparer.path(source), source)
        name = self.recipe.model.name_or_path
        own = source_key(self.preparer.path(name), name) if name else ""
        return content_key(self.recipe.model.model_dump(mode="json"), self.recipe.seed, own)

    def start(self, stage: Stage) -> Any:
        """Load the model that a stage trains, with its adapter if any: a policy, or a reward model."""
        left = self._adapter(stage.init)
        if stage.peft is None:
            return self._whole(stage) if left is None else self._merged(left)
        if left is not None:
            if stage.init not in self.stages:  # for stages, the recipe is checked
                adapter_files.require_same_config(left.folder, stage.peft.lora_fields())
            base = self._load(left.base.place, stage.peft.quantization)
            return adapters.load_adapter(base, left.folder, trainable=True)
        if not self._writes_base(stage):
            return self._fresh(stage)
        own = self.run_dir / stage.name / _BASE
        distributed.on_main(lambda: self._write_base(stage, own))
        return adapters.load_adapter(self._load(own), own / _START, trainable=True)

    def _adapter(self, source: str) -> _Adapter | None:
        """Return the adapter at a source, if any."""
        stage = self.stages.get(source)
        if stage is not None:
            if stage.peft is None or stage.peft.between_stages == "merge":
                return None
            return _Adapter(self._final(source), self._base(stage), stage.peft.quantization)
        if source == "model":
            return None
        folder = self.preparer.path(source)
        if not adapter_files.is_adapter(folder):
            return None
        name = adapter_files.base_of(folder)
        here = Path(name)
        base = self._local(here) if here.is_dir() else _Base(name, name)
        return _Adapter(folder, base, None)

    def _base(self, stage: Stage) -> _Base:
        """Return the base model of a stage's adapter."""
        left = self._adapter(stage.init)
        if left is not None:
            return left.base
        if self._writes_base(stage):
            return self._in_run(stage.name, _BASE)
        return self._place(stage.init)

    def _writes_base(self, stage: Stage) -> bool:
        """Whether the stage must write the base model of its new adapter, which exists nowhere else."""
        assert stage.peft is not None
        config = lora_config(stage)
        random = stage.init == "model" and self.recipe.model.from_config is not None
        kept = stage.peft.between_stages == "keep"
        return (random and kept) or (config is not None and changes_base(config))

    def _place(self, source: str) -> _Base:
        if source == "model":
            name = self.recipe.model.name_or_path or ""
            here = self.preparer.path(name)
            if not (name and here.is_dir()):
                return _Base(None, name)
            return dataclasses.replace(self._local(here, Path(name).is_absolute()), place=None)
        if source in self.stages:
            return self._in_run(source, "final")
        here = self.preparer.path(source)
        return self._local(here, Path(source).is_absolute())

    def _in_run(self, stage: str, folder: str) -> _Base:
        return self._local(self.run_dir / stage / folder)

    def _local(self, here: Path, fixed: bool = False) -> _Base:
        """Return the base in a directory; a `fixed` one does not move with the run."""
        return _Base(here, os.path.abspath(here), None if fixed else self._way_to(here))

    def _way_to(self, folder: Path) -> str:
        """Return the path of a directory relative to an adapter, so that a run can be moved."""
        return os.path.relpath(folder, self.run_dir / "stage" / "final")

    def _final(self, name: str) -> Path:
        return self.run_dir / name / "final"

    def _load(
        self, place: Path | str | None, quantization: str | None = None, *, reward: bool = False
    ) -> PreTrainedModel:
        held = None if quantization is None else nf4(self.compute)
        if isinstance(place, Path):
            model = load_weights(
                place, quantization=held, reward=reward, trust_remote_code=self.trusted
            )
            check_vocabulary(model, self.vocabulary)
        else:
            model = self._load_named(place, held, reward)
        disable_bnb_cpu_bf16(model)
        return model

    def _load_named(
        self, name: str | None, quantization: BitsAndBytesConfig | None, reward: bool
    ) -> PreTrainedModel:
        spec = self.recipe.model
        if name is not None:
            spec = spec.model_copy(
                update={"name_or_path": name, "from_config": None, "revision": None}
            )
        return load_model(
            spec,
            self.preparer.loaded.base_dir,
            seed=self.recipe.seed,
            vocabulary=self.vocabulary,
            quantization=quantization,
            reward=reward,
        )

    # --- adapters ---

    def _whole(self, stage: Stage) -> PreTrainedModel:
        """Load the initial model of a stage, if it is not an adapter."""
        quantization = None if stage.peft is None else stage.peft.quantization
        return self._load(
            self._place(stage.init).place, quantization, reward=stage.trains_reward_model
        )

    def _fresh(self, stage: Stage) -> Any:
        base = self._whole(stage)
        set_seed(self.preparer.seed(stage))  # a resumed run needs the same initialization
        config = lora_config(stage)
        assert config is not None
        return adapters.with_adapter(base, config)

    def _write_base(self, stage: Stage, own: Path) -> None:
        """Write `base`, the base model of a new adapter, with the initial adapter in `start`; atomic."""
        if verify_manifest(own) is None:
            return
        staged = own.with_name(f".{own.name}")
        shutil.rmtree(staged, ignore_errors=True)
        with loading_whole():
            model = self._fresh(stage)
        model.save_pretrained(staged / _START)
        adapter_files.write_base(
            staged / _START, os.path.abspath(own), relative="..", plain_start=True
        )
        plain = model.unload()
        set_ends(plain)
        plain.save_pretrained(staged)
        write_beside(plain, staged)
        write_manifest(staged)
        shutil.rmtree(own, ignore_errors=True)
        os.replace(staged, own)

    def _merged(self, left: _Adapter) -> PreTrainedModel:
        """Load the base model and merge the adapter into it."""
        with loading_whole():
            base = dequantized(self._load(left.base.place, left.quantization))
            return adapters.merged(adapters.load_adapter(base, left.folder, trainable=False))

    def write_output(self, trainer: BaseTrainer, stage: Stage) -> None:
        """Write `final` of a stage with an adapter, atomically, and `adapter` or `merged` beside it."""
        assert stage.peft is not None
        folder = self.run_dir / stage.name
        staged = folder / ".final"
        distributed.on_main(lambda: shutil.rmtree(staged, ignore_errors=True))
        trainer.save_model(str(staged))
        distributed.on_main(lambda: self._finish(trainer, stage, folder, staged))

    def _finish(self, trainer: BaseTrainer, stage: Stage, folder: Path, staged: Path) -> None:
        spec = stage.peft
        assert spec is not None
        base = self._base(stage)
        changed = isinstance(base.place, Path) and base.place.name == _BASE
        adapter_files.write_base(staged, base.name, relative=base.way, plain_start=changed)
        left = _Adapter(staged, base, spec.quantization)
        if spec.between_stages == "keep":
            if spec.merge:
                self._write_merged(left, trainer, folder / ".merged")
                _replace(folder / ".merged", folder / "merged")
        else:
            alone = folder / "adapter"
            shutil.rmtree(alone, ignore_errors=True)
            alone.mkdir()
            for name in (adapter_files.CONFIG, adapter_files.WEIGHTS, adapter_files.BASE):
                if (staged / name).is_file():
                    os.replace(staged / name, alone / name)
            shutil.rmtree(staged)
            self._write_merged(dataclasses.replace(left, folder=alone), trainer, staged)
        write_manifest(staged)
        _replace(staged, folder / "final")

    def _write_merged(self, left: _Adapter, trainer: BaseTrainer, folder: Path) -> None:
        """Merge and save the adapter on disk, so that sharded weights of the trainer play no part."""
        shutil.rmtree(folder, ignore_errors=True)
        model = self._merged(left)
        set_ends(model, trainer.output.written.ends)
        model.save_pretrained(folder)
        trainer.output.written.tokenizer.save_pretrained(folder)
        write_beside(model, folder)


def _replace(staged: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staged, final)
