"""The policy being trained: DeepSpeed around the model. The only file that imports deepspeed.

The boundary of gradient accumulation is set by hand, because the number of micro-batches changes with every step.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import deepspeed
import numpy as np
import torch
from torch import Tensor

from policy.kernels import equip, refuse_kernels
from policy.logprobs import Packed, TokenLogprobs
from policy.model import DTYPES, add_adapter, load_model
from protocol.dtypes import dtype_advice
from protocol.errors import StorageError
from protocol.messages import Group
from protocol.recipe import Recipe
from trainer.advantage import find
from trainer.batch import Batch, MicroBatch, make_batch
from trainer.optimizer import adamw, engine_settings, learning_rate_factor, schedule
from trainer.ranks import Ranks
from trainer.roll_call import refuse_other_kernels
from trainer.shards import Entry

log = logging.getLogger(__name__)


@runtime_checkable
class Clips(Protocol):
    """DeepSpeed's optimizer of any stage of ZeRO, as seen from here."""

    clip_grad: float


class Policy:
    """Every method but `batch` is called by all ranks together."""

    def __init__(self, recipe: Recipe, directory: Path, ranks: Ranks) -> None:
        self.recipe, self.directory, self._ranks = recipe, directory, ranks
        self._advantages = find(recipe.objective.advantage_name)
        torch.manual_seed(recipe.seed)
        refuse_kernels(recipe.trainer, DTYPES[recipe.model.dtype], ranks.device)
        self.model = load_model(directory, recipe.model.dtype, quantize=recipe.model.quantize)
        if recipe.lora.rank:
            add_adapter(self.model, recipe.lora)
        if recipe.trainer.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.train()
        attention, kernels = equip(self.model, recipe.trainer, ranks.device)
        if ranks.first:
            log.info("%s", kernels)
            if ranks.device.type == "cpu" and (advice := dtype_advice(recipe)):
                log.warning("%s", advice)
        refuse_other_kernels(ranks, f"attention {attention}")
        self._scorer = TokenLogprobs(self.model, recipe.sampling.temperature, recipe.trainer.logits_chunk, attention)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = adamw(trainable, recipe.optimizer, ranks.device)
        # An inference all-reduce that training never calls; building it needs a compiler and 40 s.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=ranks.backend)
        self._engine, *_ = deepspeed.initialize(
            model=self._scorer,
            model_parameters=trainable,  # pyright: ignore[reportArgumentType]  # DeepSpeed's annotation says a module
            optimizer=self._optimizer,
            # DeepSpeed's annotation has torch's old name of the class, which is no base of LambdaLR.
            lr_scheduler=lambda optimizer: schedule(  # pyright: ignore[reportArgumentType]
                optimizer, recipe.optimizer, recipe.trainer.steps
            ),
            config=engine_settings(recipe, ranks.backend, [parameter.numel() for parameter in trainable]),
        )
        self.steps_done = 0
        self.skipped = 0
        """Steps in a row that were not finite."""
        self.grad_norm = 0.0

    def batch(self, groups: list[Group]) -> Batch:
        """This rank's share of one step."""
        place = {"rank": self._ranks.rank, "world": self._ranks.world, "step": self.steps_done}
        return make_batch(groups, self.recipe, self._shared_advantages, **place)

    def accumulate(self, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on this rank's device; gradients are exchanged after the last one's backward.

        Dropout is seeded for every step and rank, so that a resumed or repeated step draws what it would have drawn.
        """
        seeds = np.random.SeedSequence((self.recipe.seed, self.steps_done, self._ranks.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        for number, micro in enumerate(micro_batches, 1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            yield self._with_reference(micro.to(self._ranks.device))

    def logprobs(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [n] of the micro-batch's completion tokens, at the sampling temperature."""
        return self._engine(micro.packed)

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's gradient. DeepSpeed divides by the ranks; the loss's shares already have.

        A loss that is not finite makes the whole gradient so, and with it the step of all ranks is skipped.
        """
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self._engine.backward(loss * sound * self._ranks.world, scale_wrt_gas=False)

    def update(self) -> bool:
        """One optimizer step, clipped; `grad_norm` is the norm before clipping.

        False where a loss or a gradient was not finite on any rank: then no rank has changed anything.
        """
        if self.recipe.trainer.zero_stage:  # DeepSpeed looks at the norm over all ranks before it steps
            self._engine.step()
            done, norm = self._engine.was_step_applied(), self._engine.get_global_grad_norm()
        else:
            norm = float(self._plain_grad_norm())
            done = math.isfinite(norm)
            self._engine.step() if done else self._engine.zero_grad()
        assert norm is not None, "DeepSpeed computes it in every step"
        self.grad_norm = float(norm)
        self.steps_done += done
        self.skipped = 0 if done else self.skipped + 1
        return done

    @property
    def learning_rate(self) -> float:
        return self._engine.get_lr()[0]

    @property
    def device_memory(self) -> tuple[int, int]:
        """Bytes of its GPU that this rank's tensors have had at most, and that torch has taken; 0 without one."""
        if not torch.cuda.is_available():
            return 0, 0
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    @torch.no_grad()
    def score(self, packed: Packed, temperature: float) -> Tensor:
        """Log-probs [n] under the current weights, without a gradient."""
        usual, self._scorer.temperature = self._scorer.temperature, temperature
        self._engine.eval()
        try:
            return self._engine(packed.to(self._ranks.device))[0].cpu()
        finally:
            self._engine.train()
            self._scorer.temperature = usual

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters under their Hugging Face names, one at a time, on rank 0's CPU.

        Other ranks get empty tensors. Under ZeRO 3 each parameter is gathered alone, so no rank holds the model: a
        tensor holds its values until the next one is asked for. Tied weights come once, as in `save_pretrained`.
        """
        for name, parameter in self._published():
            with self._gathered(parameter):
                yield name, parameter.detach().cpu() if self._ranks.first else torch.empty(0)

    def layout(self) -> list[Entry]:
        """What `weights` gives, in its order, before anything is gathered."""
        return [
            Entry(name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self._published()
        ]

    def _published(self) -> list[tuple[str, Tensor]]:
        """With adapters they alone. Wider elements first, as `trainer/shards.py` wants them."""
        trained = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or not self.recipe.lora.rank
        ]
        return sorted(trained, key=lambda pair: -pair[1].dtype.itemsize)

    def save(self, directory: Path, tag: str) -> None:
        """Every rank writes its part below `directory / tag`. Raises StorageError, on the rank that could not."""
        failures: list[Exception] = []
        writer = self._engine.checkpoint_engine
        assert writer is not None, "`deepspeed.initialize` makes one"
        write = writer.save

        def keep_going(state_dict: dict, path: str) -> None:
            """DeepSpeed's barriers come after: a rank that cannot write must still meet the others there."""
            try:
                write(state_dict, path)
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                failures.append(error)

        writer.save = keep_going
        try:
            kept = {"steps_done": self.steps_done}
            # Without frozen weights: the base of adapters is where it was.
            self._engine.save_checkpoint(
                str(directory), tag=tag, save_latest=False, client_state=kept, exclude_frozen_parameters=True
            )
        finally:
            del writer.save  # the class's own again
        if failures:
            raise StorageError(f"cannot write a checkpoint below {directory.parent}: {failures[0]}") from failures[0]
        if self._ranks.first:
            for script in directory.glob("*.py"):  # DeepSpeed's converters: no code lies beside our data
                script.unlink()

    def load(self, directory: Path, tag: str, universal: bool = False) -> None:
        """The caller has verified the files: DeepSpeed unpickles them. universal: `universal.convert` wrote them."""
        own = [{key: group[key] for key in group if key != "params"} for group in self._optimizer.param_groups]
        settings = self._engine._config
        assert settings is not None, "`deepspeed.initialize` was given them"
        settings.load_universal_checkpoint = universal
        path, state = self._engine.load_checkpoint(
            str(directory), tag=tag, load_module_strict=not self.recipe.lora.rank
        )
        if path is None or state is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {directory}")
        self.steps_done = state["steps_done"]
        self._restore_settings(own)
        for kept in self._optimizer.state.values():
            kept["step"] = kept["step"].clone()  # universal, ZeRO 3: one tensor, which every group would count up

    def _restore_settings(self, own: list[dict]) -> None:
        """Learning rate, decay and the like are the recipe's; DeepSpeed loads those of the checkpoint over them, and
        under ZeRO 3 from a universal one the first group's over all."""
        factor = learning_rate_factor(self.steps_done, self.recipe.optimizer, self.recipe.trainer.steps)
        for group, settings in zip(self._optimizer.param_groups, own, strict=True):
            group.update(settings, lr=settings["initial_lr"] * factor)
        rates, zero = self._engine.lr_scheduler, self._engine.optimizer
        assert rates is not None, "`deepspeed.initialize` was given one"
        rates.base_lrs = [settings["initial_lr"] for settings in own]
        if self.recipe.trainer.zero_stage:
            assert isinstance(zero, Clips), "every stage of ZeRO clips"
            zero.clip_grad = self.recipe.optimizer.max_grad_norm

    def _shared_advantages(self, rewards: np.ndarray) -> np.ndarray:
        """The first rank's on all ranks: a function of the user's may draw random numbers."""
        found = self._advantages(rewards) if self._ranks.first else rewards
        return np.frombuffer(self._ranks.broadcast(found.tobytes(), found.nbytes)).reshape(rewards.shape)

    def _gathered(self, parameter: Tensor) -> contextlib.AbstractContextManager:
        if self.recipe.trainer.zero_stage < 3:
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)

    def _with_reference(self, micro: MicroBatch) -> MicroBatch:
        """With adapters the base model is the reference: the same weights with the adapters off, no second copy."""
        if not (self.recipe.lora.rank and self.recipe.objective.kl_beta):
            return micro
        self.model.disable_adapters()
        try:
            with torch.no_grad():
                return micro.with_reference(self._engine(micro.packed)[0])
        finally:
            self.model.enable_adapters()

    def _plain_grad_norm(self) -> Tensor:
        """ZeRO 0 reports none."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
