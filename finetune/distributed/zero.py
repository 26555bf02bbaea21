"""DeepSpeed's ZeRO behind the `Strategy` interface."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.distributed.strategy import AdamW, ParamGroup, Shard, StepStats, Strategy, make_adamw
from finetune.distributed.world import World, require_agreement


class ZeRO(Strategy):
    """DeepSpeed's ZeRO stages 1 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054).

    Weights are kept in the working precision, with float32 masters and moments in pieces over the ranks.
    DeepSpeed moves and steps; which part of which parameter a rank holds is read from its mappings, so that
    files and averages need none of its own formats.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        adamw: AdamW,
        max_grad_norm: float,
        precision: str,
        stage: int,
        offload_optimizer: bool,
        offload_parameters: bool,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        self.world, self.module, self.stage = world, module, stage
        on_gpu = world.device.type == "cuda"
        names = {id(p): name for group in groups for name, p in group.parameters.items()}
        zero: dict[str, Any] = {
            "stage": stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
        }
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its extension would be compiled at the first start
            "steps_per_print": 1 << 62,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which of its extensions was built
            self.engine, _, _, _ = deepspeed.initialize(
                model=module, optimizer=make_adamw(groups, adamw), config=config, dist_init_required=False
            )
        require_agreement(
            {
                "torch.distributed": (world.rank, world.size),
                "DeepSpeed": (self.engine.global_rank, self.engine.dp_world_size),
            }
        )
        self.zero = self.engine.optimizer
        self.optimizer = self.zero.optimizer
        keys = self.zero.fp32_partitioned_groups_flat if stage == 3 else self.zero.single_partition_of_fp32_groups
        self._start_adamw(keys)
        parameters = {names[id(p)]: p for p in module.parameters() if id(p) in names}
        self.shards = [
            self._stage3_shard(name, p) if stage == 3 else self._stage12_shard(name, p)
            for name, p in parameters.items()
        ]

    def _stage12_shard(self, name: str, parameter: Any) -> Shard:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank owns nothing of it
            nothing = torch.empty(0, dtype=torch.float32, device=self.world.device)
            return Shard(name, parameter.shape, 0, nothing, self.zero.single_partition_of_fp32_groups[0], 0)
        key = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        where = mapping.hp_fragment_address
        return Shard(
            name,
            parameter.shape,
            mapping.lp_fragment_address.start,
            key.data.narrow(0, where.start, where.numel),
            key,
            where.start,
        )

    def _stage3_shard(self, name: str, parameter: Any) -> Shard:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        key = self.zero.fp32_partitioned_groups_flat[group]
        piece = parameter.partition_numel()
        start = min(self.world.rank * piece, parameter.ds_numel)
        length = min(piece, parameter.ds_numel - start)  # the last pieces may be padding
        return Shard(name, parameter.ds_shape, start, key.data.narrow(0, offset, length), key, offset)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss_B = self.engine(*args)
        total = loss_B.float().sum()
        self.engine.backward(total * (self.world.size / global_batch), scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch
        return total.detach()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepStats(torch.as_tensor(norm, dtype=torch.float32, device=self.world.device))

    @torch.no_grad()
    def refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if self.zero.persistent_parameters:
            # Small parameters stay gathered between steps: drop the old values, or they would be kept.
            self.zero._partition_all_parameters()
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @torch.no_grad()
    def __call__(self, *args: Any) -> Tensor:
        return self.engine(*args)

    def scaler_state(self) -> dict[str, float]:
        scaler = self.zero.loss_scaler
        if not scaler.dynamic:
            return {}
        fields = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in fields}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        for name, value in state.items():
            if hasattr(self.zero.loss_scaler, name):
                setattr(self.zero.loss_scaler, name, value)
