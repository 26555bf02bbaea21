"""DeepSpeed's ZeRO behind the `Strategy` interface, with passes of our own."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import UserError, by_all
from finetune.distributed import optimizers
from finetune.distributed.files import in_file
from finetune.distributed.gathering import Gathering
from finetune.distributed.graphs import Graphs
from finetune.distributed.optimizers import OptimizerSettings, ParamGroup, make_optimizer
from finetune.distributed.reduction import BUCKET_ELEMENTS, OwnedReduction, Piece, ScatteredReduction
from finetune.distributed.renewal import Renewal
from finetune.distributed.strategy import Shard, StepStats, Strategy
from finetune.distributed.world import World, require_agreement, require_same_layout
from finetune.models.layout import stored_channels_last

# Blocks whose weights ZeRO-3 gathers as one, beside those that say so (`gathered_whole`): with hooks on each of a
# U-Net's thousand modules the host takes longer for hooks and for starting gathers than the GPU for computing.
GATHERED_WHOLE = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "TimestepEmbedding",
    "Downsample2D",
    "Upsample2D",
    "CLIPEncoderLayer",
    "CLIPTextEmbeddings",  # looks at a weight's shape before the layer that holds it is called
)


class ZeRO(Strategy):
    """DeepSpeed's ZeRO stages 1 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054).

    Weights are kept in the working precision, with float32 masters and moments in pieces over the ranks.
    DeepSpeed cuts these. Passes and updates are ours (`Reduction`, `Gathering`, `Renewal`), unless something is
    offloaded: then all is DeepSpeed's. Which part of which parameter a rank holds is read from its
    mappings, so that files and averages need none of its own formats.

    Gradients are computed and reduced in the working precision. Micro-batches are summed in float32 under stages 2
    and 3, each after its reduction; under stage 1 in the working precision, on each rank, before the only one. In
    bf16 that sum is off by 0.5% of its norm after 16 micro-batches, by 2 to 5% after 256: take stage 2 for those.

    Args:
        stage: 1 splits moments and masters, 2 gradients too, 3 weights too.
        offload: masters and moments (under stage 3 weights as well) stay in host memory, and the update runs there.
        graphs: on a GPU, without offload, let micro-batches that wait for the host run as CUDA graphs (see
            `Graphs`).
        offload_folder: under stage 3, masters and moments lie in files there instead (see `in_file`).

    Raises:
        UserError: there can't be such files; on all ranks.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        optimizer: OptimizerSettings,
        max_grad_norm: float,
        precision: str,
        stage: int,
        offload: bool = False,
        offload_folder: Path | None = None,
        micro_batch: int,
        accumulation: int,
        graphs: bool = False,
    ) -> None:
        import deepspeed

        self.world, self.module, self.stage, self.max_grad_norm = world, module, stage, max_grad_norm
        self.settings = optimizer
        on_gpu = world.device.type == "cuda"
        names = {id(p): name for group in groups for name, p in group.parameters.items()}
        if offload and on_gpu:
            _take_cores()
        exact = {name: p.data for group in groups for name, p in group.parameters.items()}
        require_same_layout(world, exact)
        # It prints what it has built, and warns of every optimizer that is not in its own tests.
        deepspeed.utils.logger.setLevel("ERROR")
        config = _config(stage, offload, precision, micro_batch, accumulation, on_gpu=on_gpu)
        with contextlib.redirect_stdout(io.StringIO()), _gathered_whole(module), _without_kernels():
            self.engine, _, _, _ = deepspeed.initialize(
                model=module, optimizer=make_optimizer(groups, optimizer), config=config, dist_init_required=False
            )
        deepspeed.utils.logger.setLevel("WARNING")
        require_agreement(
            {
                "torch.distributed": (world.rank, world.size),
                "DeepSpeed": (self.engine.global_rank, self.engine.dp_world_size),
            }
        )
        self.zero = self.engine.optimizer
        self._scale = 1.0  # of fp16's losses in this step
        self.zero.loss_scaler.raise_error_at_min_scale = False  # a run ends with a line of its own
        # DeepSpeed's divides by the next step's scale, which halves gradients where that has just doubled.
        self.zero.unscale_and_clip_grads = self._unscale if stage < 3 else self._unscale_group
        self.optimizer = self.zero.optimizer
        self.optimizer.register_step_pre_hook(self._before_update)
        if offload_folder is not None:
            self._to_files(offload_folder, "masters")
        parameters = {names[id(p)]: p for p in module.parameters() if id(p) in names}
        self.shards = [
            self._stage3_shard(name, p) if stage == 3 else self._stage12_shard(name, p)
            for name, p in parameters.items()
        ]
        for shard in self.shards:  # DeepSpeed makes masters of weights that it has rounded already
            whole = world.broadcast_(exact[shard.name].to(world.device).contiguous())
            shard.master.copy_(shard.piece_of(whole))
        self.reduction: OwnedReduction | ScatteredReduction | None = None
        self.gathering: Gathering | None = None  # under stage 3
        self.renewal: Renewal | None = None  # under the others
        if not offload:
            self._take_over(parameters)
        # A graph would keep the loss scale of fp16, which changes.
        if graphs and on_gpu and not offload and precision != "fp16":
            self.graphs = self._make_graphs(list(parameters.values()))
        optimizers.start(self.optimizer, self._keys, optimizer)
        if offload_folder is not None:
            self._to_files(offload_folder, "moments")

    def _to_files(self, folder: Path, what: str) -> None:
        error: UserError | None = None
        try:
            for key in self._keys:
                if what == "masters":
                    key.data = in_file(key.data, folder)
                    continue
                state = self.optimizer.state[key]
                for name, tensor in state.items():
                    if isinstance(tensor, Tensor) and tensor.shape == key.shape:
                        state[name] = in_file(tensor, folder)
        except UserError as caught:
            error = caught
        found = [one for one in self.world.gather(error) if one is not None]
        if found:
            raise by_all(found[0])

    def _take_over(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put our passes in place of DeepSpeed's hooks. It keeps the pieces."""
        for hook in self.zero._grad_acc_hooks:
            hook.remove()
        self.zero._grad_acc_hooks.clear()
        of_names = {id(p): name for name, p in parameters.items()}
        pieces = {shard.name: self._piece(shard, parameters[shard.name]) for shard in self.shards}
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        ordered = [p for group in groups for p in group if id(p) in of_names]
        given = self.world, ordered, [pieces[of_names[id(p)]] for p in ordered], self._keys, BUCKET_ELEMENTS
        if self.stage == 3:
            self.reduction = ScatteredReduction(*given)
            for hook in self.zero._leaf_module_hooks:
                hook.remove()
            self.zero.parameter_offload._remove_module_hooks()
            # Its own sums of gradients, 4 bytes a weight over all ranks, and a bucket.
            self.zero.grad_partitions_flat_buffer = None
            self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
            for bucket in self.zero.ipg_buckets.values():
                bucket.buffer = None
            self.gathering = Gathering(self.world, self.module, is_gathered_whole)
            self.gathering.renew()
        else:
            mappings: list[Any] = [p._hp_mapping for p in parameters.values()]  # type: ignore[attr-defined]
            for mapping in mappings:
                if mapping is not None:
                    # A view with a history: it keeps the node that gathers the parameter's gradient, which was made
                    # on the default stream, where no CUDA graph can follow. DeepSpeed takes its data alone.
                    mapping.lp_fragment = mapping.lp_fragment.detach()
            self.reduction = OwnedReduction(*given)
            self.renewal = Renewal(self.world, self.module, self.reduction, is_gathered_whole)

    def _make_graphs(self, parameters: Sequence[nn.Parameter]) -> Graphs:
        reduction = self.reduction
        assert reduction is not None
        if self.renewal is not None:
            return Graphs(self._passes, parameters, self._reduced_passes, self._captured, reduction.reduce_left)
        # Weights come and go within a pass: the graph holds the collectives as well, and leaves no gradients.
        reduction.keeps_sums = True
        return Graphs(self._reduced_passes, [], world=self.world)

    @contextlib.contextmanager
    def _captured(self) -> Iterator[Any]:
        assert self.reduction is not None and self.renewal is not None
        with self.renewal.captured(), self.reduction.captured() as marks:
            yield marks

    def _piece(self, shard: Shard, parameter: Any) -> Piece:
        each = parameter.partition_numel() if self.stage == 3 else 0
        return Piece(tuple(shard.shape), shard.start, shard.master.numel(), shard.key, shard.offset, each)

    @property
    def _keys(self) -> list[Tensor]:
        """What the optimizer updates on this rank, a tensor for each of DeepSpeed's groups."""
        zero = self.zero
        keys: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return keys

    @torch.no_grad()
    def _norm(self, sums: Sequence[Tensor]) -> Tensor:
        """Of all ranks' reduced gradients, float32 scalar; not finite where one of them is not."""
        # A CPU adds up in one long row, a GPU in a tree.
        dtype = torch.float32 if self.world.device.type == "cuda" else torch.float64
        norms = [torch.linalg.vector_norm(total, dtype=dtype) for total in sums]
        return self.world.sum_(torch.stack(norms).square().sum()).sqrt().float()

    def _unscale(self, gradients: Sequence[Tensor], _: Tensor) -> None:
        """Of stage 2's own step, with offload."""
        if self._scale != 1:
            torch._foreach_div_(list(gradients), self._scale)

    def _unscale_group(self, group: int, norm: Tensor) -> None:
        """Of stage 3's own step, with offload: `norm` is of gradients that are scaled still."""
        self.zero._global_grad_norm = norm / self._scale
        if self._scale != 1:
            self._keys[group].grad.div_(self._scale)  # type: ignore[union-attr]

    def _before_update(self, *_: Any) -> None:
        if not isinstance(self.zero._global_grad_norm, float):
            self._clip_and_skip(self.zero._global_grad_norm.float(), self.max_grad_norm)

    def _stage12_shard(self, name: str, parameter: Any) -> Shard:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank owns nothing of it
            nothing = torch.empty(0, dtype=torch.float32, device=self.world.device)
            key = self.zero.single_partition_of_fp32_groups[0]
            return Shard(
                name, parameter.shape, 0, nothing, key, 0, is_channels_last=stored_channels_last(parameter)
            )
        key = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        where = mapping.hp_fragment_address
        return Shard(
            name,
            parameter.shape,
            mapping.lp_fragment_address.start,
            key.data.narrow(0, where.start, where.numel),
            key,
            where.start,
            is_channels_last=stored_channels_last(parameter),
        )

    def _stage3_shard(self, name: str, parameter: Any) -> Shard:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        key = self.zero.fp32_partitioned_groups_flat[group]
        piece = parameter.partition_numel()
        start = min(self.world.rank * piece, parameter.ds_numel)
        length = min(piece, parameter.ds_numel - start)  # the last pieces may be padding
        master = key.data.narrow(0, offset, length)
        layout = stored_channels_last(parameter)
        return Shard(name, parameter.ds_shape, start, master, key, offset, is_channels_last=layout)

    def backward(self, args: tuple[Any, ...], *, global_batch: int, last: bool) -> Tensor:
        if self.reduction is None:
            self.engine.set_gradient_accumulation_boundary(last)
            loss_B = self.engine(*args)
            total = loss_B.float().sum()
            self.engine.backward(total * (self.world.size / global_batch), scale_wrt_gas=False)
            if not last:
                self.engine.step()  # counts the micro-batch
            return total.detach()
        self.reduction.begin(reduces=self.stage > 1 or last)
        return (self.graphs or self._reduced_passes)(args, global_batch)

    def _reduced_passes(self, args: tuple[Any, ...], global_batch: int) -> Tensor:
        assert self.reduction is not None
        self.settle()
        with self.reduction.of_a_pass(), self._gathered():
            return self._passes(args, global_batch)

    def _passes(self, args: tuple[Any, ...], global_batch: int) -> Tensor:
        total = self.module(*args).float().sum()
        (total * (self.zero.loss_scale / global_batch)).backward()
        return total.detach()

    def _gathered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.gathering is None else self.gathering.of_a_pass()

    def step(self, lr: float) -> StepStats:
        self._set_lr(lr)
        self._scale = self.zero.loss_scale
        if self.reduction is None:
            self.engine.step()
            if self.zero.overflow and self.stage < 3:
                # DeepSpeed would add the next step's gradients to these, which are not finite.
                self.zero.averaged_gradients = dict.fromkeys(self.zero.averaged_gradients)
        else:
            self._step_of_pieces(self.reduction.take())
        norm = self.zero._global_grad_norm
        return StepStats(torch.as_tensor(norm, dtype=torch.float32, device=self.world.device))

    @torch.no_grad()
    def _step_of_pieces(self, sums: Sequence[Tensor]) -> None:
        zero, scale = self.zero, self._scale
        norm = self._norm(sums)
        zero._global_grad_norm = norm / scale
        overflows = zero.dtype == torch.float16 and not bool(torch.isfinite(norm))
        zero._update_scale(overflows)
        if overflows:
            return
        for group, (key, total) in enumerate(zip(self._keys, sums, strict=True)):
            key.grad = total if scale == 1 else total.div_(scale)
            zero._optimizer_step(group)
            key.grad = None
        self._renew()

    def refresh(self) -> None:
        self._renew()
        self.settle()

    def settle(self) -> None:
        if self.renewal is not None:
            self.renewal.wait()

    @torch.no_grad()
    def _renew(self) -> None:
        if self.renewal is not None:
            self.renewal.wait()
            groups = self.zero.parallel_partitioned_bit16_groups
            torch._foreach_copy_([of_ranks[self.world.rank].data for of_ranks in groups], self._keys)
            self.renewal.start()
        elif self.stage < 3:
            self.zero.update_lp_params()
        elif self.gathering is not None:
            torch._foreach_copy_([flat.data for flat in self.zero.fp16_partitioned_groups_flat], self._keys)
            self.gathering.renew()
        else:
            for index in range(len(self.zero.fp32_partitioned_groups_flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
            if self.zero.persistent_parameters:
                # Small parameters stay gathered between steps: drop the old values, or they would be kept.
                self.zero._partition_all_parameters()
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        if self.reduction is None:
            return self.engine(*args)
        self.settle()
        with self._gathered():
            return self.module(*args)

    def scaler_state(self) -> dict[str, float]:
        scaler = self.zero.loss_scaler
        if not scaler.dynamic:
            return {}
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": scaler.cur_scale, "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        scaler = self.zero.loss_scaler
        if state and scaler.dynamic:
            scaler.cur_scale = state["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]), -1
            scaler.cur_hysteresis = int(state.get("hysteresis", scaler.delayed_shift))


def _config(
    stage: int, offload: bool, precision: str, micro_batch: int, accumulation: int, *, on_gpu: bool
) -> dict[str, Any]:
    """What DeepSpeed is told."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "memory_efficient_linear": False,
        # Stage 3 steps that many at a time, with copies of their gradients.
        "sub_group_size": 4 * BUCKET_ELEMENTS,
    }
    in_host_memory = {"device": "cpu", "pin_memory": on_gpu}
    if offload:
        zero["offload_optimizer"] = in_host_memory
    if offload and stage == 3:
        zero["offload_param"] = in_host_memory
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the optimizer's kernel clips
        "zero_optimization": zero,
        # Its own search for overflow takes five kernels a tensor and waits for them; the norm shows it as well.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16},
        # Under stage 1 this would choose another optimizer of DeepSpeed's, which keeps whole float32 gradients.
        "data_types": {"grad_accum_dtype": "fp32"} if stage > 1 else {},
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its extension would be compiled at the first start
        "steps_per_print": 1 << 62,
    }


def _take_cores() -> None:
    """Updates in host memory need this process's share of the cores, of which torchrun leaves it one by default."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if os.environ.get("OMP_NUM_THREADS") == "1" and torch.get_num_threads() == 1 < share:
        torch.set_num_threads(share)


def is_gathered_whole(block: nn.Module) -> bool:
    """Whether ZeRO-3 gathers a block's weights as one."""
    # A layer with DoRA reads its weight beside the layer that holds it.
    return (
        type(block).__name__ in GATHERED_WHOLE
        or getattr(block, "gathered_whole", False)
        or len(getattr(block, "lora_magnitude_vector", ())) > 0
    )


@contextlib.contextmanager
def _gathered_whole(module: nn.Module) -> Iterator[None]:
    """These become units of DeepSpeed's gathers; gradients stay units of their own.

    DeepSpeed, told of such a unit, would reduce its gradients together when those of its inputs are known. An
    adapter's first block has no such inputs: its gradients would be taken for zero.
    """
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils import set_z3_leaf_module

    for block in module.modules():
        if is_gathered_whole(block):
            set_z3_leaf_module(block, True)
    kept = stage3.z3_leaf_parameter
    stage3.z3_leaf_parameter = lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = kept


@contextlib.contextmanager
def _without_kernels() -> Iterator[None]:
    """On a CPU, DeepSpeed would compile a reduction of its own for a minute at the first start.

    Inference alone uses it; and a process that is killed meanwhile leaves a lock that all later ones wait for.
    """
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the package's `torch` is torch itself
    kept = backend.build_shm_op
    backend.build_shm_op = lambda: None
    try:
        yield
    finally:
        backend.build_shm_op = kept
