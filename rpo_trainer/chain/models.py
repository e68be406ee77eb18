"""The models of a chain: initial policies, reference models and outputs of the stages.

A stage without `peft` writes a full model to `final`. With `between_stages: merge`, it writes the merged
model there and the adapter to `adapter`; with `keep`, it writes the adapter to `final`, and the next stage
continues to train it on the same base model. `base` is written if the base model exists nowhere else:
random weights, or weights changed by the initialization of the adapter.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rpo_trainer.chain.outputs import cast_output, commit_output, output_fingerprint
from rpo_trainer.data.resumable_rows import content_key
from rpo_trainer.models import adapter_files, adapters
from rpo_trainer.models.adapter_methods import changes_base
from rpo_trainer.models.dtypes import (
    cast_weights,
    dtype_name,
    kept_in_float32,
    round_weights,
    warn_of_rounding,
)
from rpo_trainer.models.loading import check_vocabulary, load_model, load_weights
from rpo_trainer.models.quantization import dequantized, disable_bnb_cpu_bf16, nf4
from rpo_trainer.models.saved_files import set_ends, write_auto_class_files
from rpo_trainer.models.sharding import loading_unsharded
from rpo_trainer.models.weight_files import local_folder
from rpo_trainer.recipe import Stage
from rpo_trainer.runtime import distributed
from rpo_trainer.stages.output_dtype import (
    needs_exact,
    output_dtype,
    saves_full_model,
    training_folder,
)
from rpo_trainer.stages.scored_rows import source_key
from rpo_trainer.stages.settings import arithmetic, frozen_dtype, lora_config
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.checkpoint import commit
from rpo_trainer.trainers.engine import requests_deepspeed
from rpo_trainer.trainers.manifest import verify_manifest

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from rpo_trainer.stages.prepare import StagePreparer

logger = logging.getLogger(__name__)

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
    dtype: torch.dtype | None  # of the weights below it; None: not of this run


class Models:
    """Loads and writes the models of a chain.

    Args:
        verify: read the content of models that the run has written (`verify_manifest`).
    """

    def __init__(self, preparer: StagePreparer, run_dir: Path, *, verify: bool = False) -> None:
        self.preparer = preparer
        self.verify = verify
        self.recipe = preparer.recipe
        self.run_dir = run_dir
        self.stages = {stage.name: stage for stage in preparer.stages}
        self.vocabulary = len(preparer.tokenizer)
        # The dtype of matrix products with 4-bit weights.
        self.compute: torch.dtype = getattr(torch, arithmetic(self.recipe.model))
        self.trusted = self.recipe.model.trust_remote_code
        # DeepSpeed needs one dtype for all weights: frozen ones are rounded, and held in float32.
        self.one_dtype = any(requests_deepspeed(s.training_args) for s in self.stages.values())

    # --- loading ---

    def output(
        self, source: str, dtype: torch.dtype = torch.float32, *, delivered: bool = False
    ) -> Any:
        """Load the policy of a source: `model`, the output of a finished stage, or a directory.

        Args:
            dtype: of the weights; below the adapter of a stage they have the dtype of its training.
            delivered: a stage's output in `final`, not its exact weights.
        """
        adapter = self._adapter(source)
        if adapter is None:
            final = delivered and source in self.stages
            place = self._final(source) if final else self._place(source).place
            return self._load(place, dtype)
        base = self._load(adapter.base.place, adapter.dtype or dtype, adapter.quantization)
        return adapters.load_adapter(base, adapter.folder, trainable=False)

    def reference(self, stage: Stage) -> Any:
        """Load the reference model of a stage in the dtype of its start; None: the start itself."""
        source = stage.own_reference
        return None if source is None else self.output(source, self._frozen_dtype(stage))

    def _frozen_dtype(self, stage: Stage) -> torch.dtype:
        return frozen_dtype(stage, self.recipe.model)

    def sampling_policy(
        self, stage: Stage, source: str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a policy that a stage samples from: its initial policy (`init`), or another source."""
        with loading_unsharded():
            if source != "init":
                model = self.output(source)
            # A reward stage samples its pairs from the policy that it is initialized from.
            elif stage.trains_reward_model:
                model = self.output(stage.init)
            else:
                model = self.start(stage)
            return model.to(distributed.device()), self.preparer.tokenizer

    def weights_key(self, source: str, *, delivered: bool = False) -> str:
        """Return a content key of the weights of a source; `delivered` as for `output`."""
        if source in self.stages:
            final = self._final(source)
            return output_fingerprint(final if delivered else training_folder(self.run_dir, source))
        if source != "model":
            return source_key(self.preparer.path(source), source)
        name = self.recipe.model.name_or_path
        own = source_key(self.preparer.path(name), name) if name else ""
        return content_key(self.recipe.model.model_dump(mode="json"), self.recipe.seed, own)

    def start(self, stage: Stage) -> Any:
        """Load the model that a stage trains, with its adapter if any: a policy, or a reward model."""
        adapter = self._adapter(stage.init)
        if stage.peft is None:
            return self._whole(stage) if adapter is None else self._merged(adapter)
        if adapter is not None:
            if stage.init not in self.stages:  # for stages, the recipe is checked
                adapter_files.require_same_config(adapter.folder, stage.peft.lora_fields())
            dtype = self._frozen_dtype(stage)
            base = self._load(adapter.base.place, dtype, stage.peft.quantization)
            return adapters.load_adapter(base, adapter.folder, trainable=True)
        if not self._writes_base(stage):
            return self._fresh(stage, self._frozen_dtype(stage))
        own = self.run_dir / stage.name / _BASE
        staged = own.with_name(f".{own.name}")
        if distributed.on_main(lambda: self._write_base(stage, own, staged)):
            commit(staged, own, distributed.ALL_RANKS)
        base = self._load(own, self._frozen_dtype(stage))
        return adapters.load_adapter(base, own / _START, trainable=True)

    def _adapter(self, source: str) -> _Adapter | None:
        """Return the adapter at a source, if any."""
        stage = self.stages.get(source)
        if stage is not None:
            if stage.peft is None or stage.peft.between_stages == "merge":
                return None
            return self._adapter_of(stage, self._final(source))
        if source == "model":
            return None
        folder = self.preparer.path(source)
        if not adapter_files.is_adapter(folder):
            return None
        name = adapter_files.base_of(folder)
        path = Path(name)
        base = self._local(path) if path.is_dir() else _Base(name, name)
        return _Adapter(folder, base, None, None)

    def _adapter_of(self, stage: Stage, folder: Path) -> _Adapter:
        """Return the adapter of a stage, in `folder`."""
        assert stage.peft is not None
        quantization = stage.peft.quantization
        return _Adapter(folder, self._base(stage), quantization, self._frozen_dtype(stage))

    def _base(self, stage: Stage) -> _Base:
        """Return the base model of a stage's adapter."""
        adapter = self._adapter(stage.init)
        if adapter is not None:
            return adapter.base
        if self._writes_base(stage):
            return self._in_run(stage.name, _BASE)
        base = self._place(stage.init)
        if stage.init not in self.stages or base.place == self._final(stage.init):
            return base
        final = self._in_run(stage.init, "final")
        if self.delivered_dtype(self.stages[stage.init]) == self._frozen_dtype(stage):
            return final  # the same weights
        # The exact weights are removed when they are merged; `final` is kept.
        return dataclasses.replace(final, place=base.place) if saves_full_model(stage) else base

    def delivered_dtype(self, stage: Stage) -> torch.dtype:
        """Return the dtype of the full model that a stage outputs."""
        return output_dtype(self.preparer, stage)

    def _writes_base(self, stage: Stage) -> bool:
        """Whether the stage must write the base model of its new adapter, which exists nowhere else."""
        assert stage.peft is not None
        config = lora_config(stage)
        random = stage.init == "model" and self.recipe.model.from_config is not None
        keeps_adapter = stage.peft.between_stages == "keep"
        return (random and keeps_adapter) or (config is not None and changes_base(config))

    def _place(self, source: str) -> _Base:
        if source == "model":
            name = self.recipe.model.name_or_path or ""
            path = self.preparer.path(name)
            if not (name and path.is_dir()):
                return _Base(None, name)
            return dataclasses.replace(self._local(path, Path(name).is_absolute()), place=None)
        if source in self.stages:
            return self._in_run(source, training_folder(self.run_dir, source).name)
        path = self.preparer.path(source)
        return self._local(path, Path(source).is_absolute())

    def _in_run(self, stage: str, folder: str) -> _Base:
        return self._local(self.run_dir / stage / folder)

    def _local(self, path: Path, fixed: bool = False) -> _Base:
        """Return the base in a directory; a `fixed` one does not move with the run."""
        return _Base(path, os.path.abspath(path), None if fixed else self._way_to(path))

    def _way_to(self, folder: Path) -> str:
        """Return the path of a directory relative to an adapter, so that a run can be moved."""
        return os.path.relpath(folder, self.run_dir / "stage" / "final")

    def _final(self, name: str) -> Path:
        return self.run_dir / name / "final"

    def _load(
        self,
        place: Path | str | None,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
        *,
        reward: bool = False,
    ) -> PreTrainedModel:
        quantization_config = None if quantization is None else nf4(self.compute)
        load_dtype = torch.float32 if self.one_dtype else dtype
        if isinstance(place, Path):
            model = load_weights(
                place,
                dtype=load_dtype,
                quantization=quantization_config,
                reward=reward,
                trust_remote_code=self.trusted,
            )
            check_vocabulary(model, self.vocabulary)
        else:
            model = self._load_named(place, load_dtype, quantization_config, reward)
        if load_dtype != dtype and quantization_config is None:
            round_weights(model, dtype)
        disable_bnb_cpu_bf16(model)
        return model

    def _load_named(
        self,
        name: str | None,
        dtype: torch.dtype,
        quantization: BitsAndBytesConfig | None,
        reward: bool,
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
            dtype=dtype,
            quantization=quantization,
            reward=reward,
        )

    # --- adapters ---

    def _whole(self, stage: Stage, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the initial model of a stage, if it is not an adapter."""
        quantization = None if stage.peft is None else stage.peft.quantization
        place = self._place(stage.init).place
        if stage.init in self.stages and place == self._final(stage.init):
            self._warn_of_missing_exact(self.stages[stage.init], stage.name)
        return self._load(place, dtype, quantization, reward=stage.trains_reward_model)

    def _warn_of_missing_exact(self, before: Stage, name: str) -> None:
        if needs_exact(self.preparer, before) and distributed.is_main():
            logger.warning(
                "%s: the exact weights of stage %s were removed: it starts from `final`, saved in %s",
                name, before.name, dtype_name(self.delivered_dtype(before)),
            )  # fmt: skip

    def _fresh(self, stage: Stage, dtype: torch.dtype) -> Any:
        base = self._whole(stage, dtype)
        self._warn_of_rounding(stage, dtype)
        set_seed(self.preparer.seed(stage))  # a resumed run needs the same initialization
        config = lora_config(stage)
        assert config is not None
        return adapters.with_adapter(base, config)

    def _warn_of_rounding(self, stage: Stage, dtype: torch.dtype) -> None:
        place = self._place(stage.init).place or self.recipe.model.name_or_path
        if place is not None and distributed.is_main():
            path = self.preparer.path(str(place))
            folder = path if path.is_dir() else local_folder(place)
            warn_of_rounding(folder, dtype, stage.name, held_in_float32=self.one_dtype)

    def _write_base(self, stage: Stage, own: Path, staged: Path) -> bool:
        """Write `base`, the base model of a new adapter, to `staged`, with the initial adapter in `start`.

        Returns:
            Whether it was written; False: there is a complete one at `own`.
        """
        if verify_manifest(own, content=self.verify) is None:
            return False
        shutil.rmtree(staged, ignore_errors=True)
        with loading_unsharded():
            model = self._fresh(stage, torch.float32)
        model.save_pretrained(staged / _START)
        adapter_files.write_base(
            staged / _START, os.path.abspath(own), relative="..", plain_start=True
        )
        plain = cast_weights(model.unload(), self._frozen_dtype(stage))
        set_ends(plain)
        plain.save_pretrained(staged)
        write_auto_class_files(plain, staged)
        return True

    def _merged(self, adapter: _Adapter) -> PreTrainedModel:
        """Merge base and adapter in float32: the model that was trained, its base rounded as in training."""
        with loading_unsharded():
            dtype = adapter.dtype or torch.float32
            base = dequantized(self._load(adapter.base.place, dtype, adapter.quantization))
            base = cast_weights(base, torch.float32)
            return adapters.merged(adapters.load_adapter(base, adapter.folder, trainable=False))

    def write_output(self, trainer: BaseTrainer, stage: Stage) -> None:
        """Write `final` of a stage with an adapter, atomically, and `adapter` or `merged` next to it."""
        assert stage.peft is not None
        folder = self.run_dir / stage.name
        staged = folder / ".final"
        distributed.on_main(lambda: shutil.rmtree(staged, ignore_errors=True))
        trainer.save_model(str(staged))
        dtype = self.delivered_dtype(stage)
        float32_names = kept_in_float32(trainer.model, dtype)
        distributed.on_main(lambda: self._finish(trainer, stage, staged, dtype, float32_names))
        if stage.peft.between_stages == "keep":
            commit(staged, folder / "final", distributed.ALL_RANKS)
        else:
            keep_exact = needs_exact(self.preparer, stage)
            commit_output(staged, folder, dtype, keep_exact=keep_exact, float32_names=float32_names)

    def _finish(
        self,
        trainer: BaseTrainer,
        stage: Stage,
        staged: Path,
        dtype: torch.dtype,
        float32_names: re.Pattern[str] | None,
    ) -> None:
        """Complete a saved adapter (`keep`), or replace it by the merged model (`merge`)."""
        spec, folder = stage.peft, staged.parent
        assert spec is not None
        adapter = self._adapter_of(stage, staged)
        base = adapter.base
        changed = isinstance(base.place, Path) and base.place.name == _BASE
        adapter_files.write_base(staged, base.name, relative=base.way, plain_start=changed)
        if spec.between_stages == "keep":
            if spec.merge:
                self._write_merged(adapter, trainer, folder / ".merged")
                cast_output(folder / ".merged", dtype, float32_names)
                shutil.rmtree(folder / "merged", ignore_errors=True)
                os.replace(folder / ".merged", folder / "merged")
        else:
            adapter_folder = folder / "adapter"
            shutil.rmtree(adapter_folder, ignore_errors=True)
            adapter_folder.mkdir()
            for name in (adapter_files.CONFIG, adapter_files.WEIGHTS, adapter_files.BASE):
                if (staged / name).is_file():
                    os.replace(staged / name, adapter_folder / name)
            shutil.rmtree(staged)
            self._write_merged(dataclasses.replace(adapter, folder=adapter_folder), trainer, staged)

    def _write_merged(self, adapter: _Adapter, trainer: BaseTrainer, folder: Path) -> None:
        """Merge and save the adapter on disk, independently of sharded weights of the trainer."""
        shutil.rmtree(folder, ignore_errors=True)
        model = self._merged(adapter)
        set_ends(model, trainer.output.written.ends)
        model.save_pretrained(folder)
        trainer.output.written.tokenizer.save_pretrained(folder)
        write_auto_class_files(model, folder)
