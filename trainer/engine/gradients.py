"""The only file that knows where ZeRO keeps gradients and master weights (DeepSpeed ≥ 0.19.8).

After the backward pass of the last micro-batch, and before `engine.step`, this rank's part of the reduced gradient lies

- ZeRO 0: in `parameter.grad`, whole on every rank;
- ZeRO 1, 2: in `optimizer.averaged_gradients[group]`, a list aligned with `params_in_partition[group]`;
- ZeRO 3: in `optimizer.averaged_gradients[sub_group]`, aligned with `fp16_groups[sub_group]`;
- with offload: in the `.grad` of the fp32 master partition, in host memory.

A :class:`Shards` shows all of them alike: a list of fragments, each a run of one parameter's elements that this rank
owns, and for each a 1-D view of its gradient and of its fp32 master weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of one parameter's elements in this rank's part of the training state."""

    parameter: int
    """Index of the parameter in the run's list of names."""
    name: str
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element, in the flattened parameter."""
    num_elements: int
    flat: int
    """Index of the flat master tensor that holds it."""
    offset: int
    """First element in that flat tensor."""
    counted: bool = True
    """False where another rank counts the same elements (ZeRO 0 replicates everything)."""


class Shards(ABC):
    """This rank's part of the gradient and of the master weights, the same view for every ZeRO stage."""

    fragments: tuple[Fragment, ...]

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """1-D gradient of each fragment, averaged over ranks and still multiplied by the loss scale; views where
        possible, valid only between the last backward pass and the step. Writing to them changes the step."""

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply each parameter's reduced gradient by its factor, [parameters], before the step."""
        chosen = [
            (gradient, factors[fragment.parameter])
            for fragment, gradient in zip(self.fragments, self.gradients(), strict=True)
            if factors[fragment.parameter] != 1.0
        ]
        if chosen:
            torch._foreach_mul_([gradient for gradient, _ in chosen], [factor for _, factor in chosen])

    @abstractmethod
    def clear(self) -> None:
        """Forget the gradient as if this batch had not been seen."""

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The fp32 master tensors, flat; in-place writes are the truth after :meth:`publish`."""

    @abstractmethod
    def optimizer_state(self, flat: int) -> dict[str, Any]:
        """The inner optimizer's state of one flat master tensor: created on demand, empty before the first step."""

    @abstractmethod
    def groups(self) -> list[int]:
        """Index in `inner.param_groups` of each flat master tensor."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model's weights equal to the master weights on all ranks (a collective under ZeRO 1, 2 and 3)."""

    def masters(self) -> list[Tensor]:
        """1-D fp32 master weights of each fragment, as views."""
        flats = self.flats()
        return [flats[fragment.flat].narrow(0, fragment.offset, fragment.num_elements) for fragment in self.fragments]

    @property
    @abstractmethod
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that updates the master weights."""

    def master_shape(self, flat: int) -> torch.Size:
        """Shape that the inner optimizer knows the flat master tensor by."""
        return self.flats()[flat].shape

    def scalar_state(self, key: str, value: float, flat: Tensor) -> Any:
        """A scalar of the inner optimizer's state as that optimizer keeps it before it has one of its own."""
        if isinstance(self.inner, torch.optim.AdamW) and key == "step":
            fused = self.inner.defaults.get("fused") or self.inner.defaults.get("capturable")
            return torch.tensor(float(value), dtype=torch.float32, device=flat.device if fused else "cpu")
        # DeepSpeed's CPU Adam counts in whole numbers
        return int(value) if key == "step" else value


class ReplicatedShards(Shards):
    """ZeRO 0. Every rank holds everything; each parameter is counted (and saved) by one of them."""

    def __init__(self, engine: Any, names: Sequence[str], rank: int, world_size: int):
        self._engine = engine
        self._parameters = _trainable(engine)
        self._half = hasattr(engine.optimizer, "fp32_groups")
        masters = self._parameters
        if self._half:
            of_weight = {
                id(weight): master
                for weights, group in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
                for weight, master in zip(weights, group, strict=True)
            }
            masters = [of_weight[id(parameter)] for parameter in self._parameters]
        self._masters = masters
        self.fragments = tuple(
            Fragment(
                parameter=index,
                name=name,
                shape=tuple(parameter.shape),
                start=0,
                num_elements=parameter.numel(),
                flat=index,
                offset=0,
                counted=index % world_size == rank,
            )
            for index, (name, parameter) in enumerate(zip(names, self._parameters, strict=True))
        )

    @property
    def inner(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        result: torch.optim.Optimizer = optimizer.optimizer if self._half else optimizer
        return result

    def gradients(self) -> list[Tensor]:
        views = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            views.append(parameter.grad.view(-1))
        return views

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def flats(self) -> list[Tensor]:
        return [master.detach().view(-1) for master in self._masters]

    def optimizer_state(self, flat: int) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state[self._masters[flat]]
        return state

    def groups(self) -> list[int]:
        group_of = {id(p): index for index, group in enumerate(self.inner.param_groups) for p in group["params"]}
        return [group_of[id(master)] for master in self._masters]

    def master_shape(self, flat: int) -> torch.Size:
        return self._masters[flat].shape

    def publish(self) -> None:
        if self._half:
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.data.copy_(master.data)


class ZeroShards(Shards):
    """What ZeRO 1, 2 and 3 have in common: flat fp32 partitions, with an optimizer of their own."""

    def __init__(self, engine: Any, offloaded: bool):
        self._zero = engine.optimizer
        self._offloaded = offloaded
        self._place: list[tuple[int, int]] = []
        """(group, position in the group) of each fragment's gradient."""
        self._owned: list[torch.nn.Parameter] = []
        """The parameter of each fragment."""

    @property
    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """The flat fp32 partitions that the inner optimizer knows."""

    @abstractmethod
    def _reduced(self) -> Mapping[int, Sequence[Tensor]]:
        """Gradients by group and position; they may be padded at their end."""

    @property
    def inner(self) -> torch.optim.Optimizer:
        result: torch.optim.Optimizer = self._zero.optimizer
        return result

    def gradients(self) -> list[Tensor]:
        if self._offloaded:
            flats = [cast(Tensor, partition.grad) for partition in self._partitions]
            return [
                flats[fragment.flat].narrow(0, fragment.offset, fragment.num_elements) for fragment in self.fragments
            ]
        reduced = self._reduced()
        return [
            reduced[group][position].view(-1).narrow(0, 0, fragment.num_elements)
            for (group, position), fragment in zip(self._place, self.fragments, strict=True)
        ]

    def scale(self, factors: Sequence[float]) -> None:
        super().scale(factors)
        if self._offloaded:
            # DeepSpeed has measured the norms that it clips by while the gradients went to the host
            norms = self._zero.norm_for_param_grads
            for fragment, parameter in zip(self.fragments, self._owned, strict=True):
                identity = self._zero.get_param_id(parameter)
                if identity in norms:
                    norms[identity] = norms[identity] * factors[fragment.parameter]

    def flats(self) -> list[Tensor]:
        return [partition.detach() for partition in self._partitions]

    def optimizer_state(self, flat: int) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state[self._partitions[flat]]
        return state


class PartitionedShards(ZeroShards):
    """ZeRO 1 and 2: one flat fp32 partition a parameter group; a parameter may continue on the next rank."""

    def __init__(self, engine: Any, names: Sequence[str]):
        super().__init__(engine, engine.optimizer.cpu_offload)
        index_of = {id(parameter): index for index, parameter in enumerate(_trainable(engine))}
        fragments: list[Fragment] = []
        for group, parameters in enumerate(self._zero.params_in_partition):
            for position, parameter in enumerate(parameters):
                mapping = parameter._hp_mapping
                index = index_of[id(parameter)]
                fragments.append(
                    Fragment(
                        parameter=index,
                        name=names[index],
                        shape=tuple(parameter.shape),
                        start=mapping.lp_fragment_address.start,
                        num_elements=mapping.lp_fragment_address.numel,
                        flat=group,
                        offset=mapping.hp_fragment_address.start,
                    )
                )
                self._place.append((group, position))
                self._owned.append(parameter)
        self.fragments = tuple(fragments)

    @property
    def _partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self._zero.single_partition_of_fp32_groups
        return partitions

    def _reduced(self) -> Mapping[int, Sequence[Tensor]]:
        return {
            group: [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            for group, gradients in self._zero.averaged_gradients.items()
            if gradients is not None
        }

    def gradients(self) -> list[Tensor]:
        if self._offloaded:
            self._zero._wait_for_offload_copies()
        return super().gradients()

    def clear(self) -> None:
        zero = self._zero
        zero.micro_step_id = -1
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if self._offloaded:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
                zero.all_grad_tensors[group] = None

    def groups(self) -> list[int]:
        return list(range(len(self._partitions)))

    def publish(self) -> None:
        self._zero.update_lp_params()


class WeightShards(ZeroShards):
    """ZeRO 3: every parameter is cut into equal parts, one a rank, the last padded."""

    def __init__(self, engine: Any, names: Sequence[str], rank: int):
        super().__init__(engine, engine.optimizer.offload_optimizer)
        index_of = {id(parameter): index for index, parameter in enumerate(_trainable(engine))}
        fragments: list[Fragment] = []
        for sub_group, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for position, parameter in enumerate(parameters):
                part = parameter.partition_numel()
                start = part * rank
                index = index_of[id(parameter)]
                num_elements = max(0, min(part, parameter.ds_numel - start))
                if num_elements:
                    fragments.append(
                        Fragment(
                            parameter=index,
                            name=names[index],
                            shape=tuple(parameter.ds_shape),
                            start=start,
                            num_elements=num_elements,
                            flat=sub_group,
                            offset=offset,
                        )
                    )
                    self._place.append((sub_group, position))
                    self._owned.append(parameter)
                offset += part
        self.fragments = tuple(fragments)

    @property
    def _partitions(self) -> list[Tensor]:
        partitions: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return partitions

    def _reduced(self) -> Mapping[int, Sequence[Tensor]]:
        reduced: Mapping[int, Sequence[Tensor]] = self._zero.averaged_gradients
        return reduced

    def clear(self) -> None:
        zero = self._zero
        # the next backward pass copies into the partition buffers instead of adding to them
        zero.zero_grad(set_to_none=True)
        zero._offload_boundary_param_ids = set()
        if self._offloaded:
            zero.reset_cpu_buffers()
        else:
            zero.averaged_gradients = {}

    def groups(self) -> list[int]:
        return [self._zero.sub_group_to_group_id[index] for index in range(len(self._partitions))]

    def publish(self) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()


def make_shards(engine: Any, names: Sequence[str], stage: int, rank: int, world_size: int) -> Shards:
    """The view that fits the engine's ZeRO stage."""
    match stage:
        case 0:
            return ReplicatedShards(engine, names, rank, world_size)
        case 1 | 2:
            return PartitionedShards(engine, names)
        case _:
            return WeightShards(engine, names, rank)


def _trainable(engine: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
