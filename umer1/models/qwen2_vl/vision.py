"""Qwen2-VL's ViT on megatron layers: patch embedding, 2-D rotary blocks with one attention window per frame, merger."""

import umer1.megatron_import  # noqa: F401

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from umer1 import device as devices
from umer1.distributed.parallel import ParallelState
from umer1.models.attention import PackedSequences, SDPAPlan, packed_sequences
from umer1.models.backend import (
    CoreAttentionName,
    LayerNorm,
    block_submodules,
    for_own_linears,
    uses_te_attention,
)
from umer1.models.qwen2_vl.config import VisionConfig
from umer1.models.qwen2_vl.frames import Frames, VisionFeatures


class PatchEmbed(nn.Module):
    """The Conv3d over whole patches, as the matrix product that it is: [P, patch_dim] -> [P, embed_dim]."""

    def __init__(self, config: TransformerConfig, patch_dim: int):
        super().__init__()
        shape = (config.hidden_size, patch_dim)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=devices.device()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return F.linear(pixel_values.to(self.weight.dtype), self.weight)


class PatchMerger(MegatronModule):
    """Merge windows (2 x 2 neighbouring patches) to the decoder's width: [P, embed_dim] -> [P / 4, hidden]."""

    def __init__(self, config: TransformerConfig, vision: VisionConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        self.width = vision.merged_dim
        self.ln_q = LayerNorm(config, vision.embed_dim, eps=1e-6)
        shared = dict(config=for_own_linears(config), init_method=config.init_method, bias=True, tp_group=groups.tp)
        self.linear_fc1 = ColumnParallelLinear(self.width, self.width, gather_output=False, **shared)
        self.linear_fc2 = RowParallelLinear(
            self.width, vision.hidden_size, input_is_parallel=True, skip_bias_add=False, **shared
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        merged = self.ln_q(features).view(-1, self.width)
        return self.linear_fc2(F.gelu(self.linear_fc1(merged)[0]))[0]


class VisionTower(MegatronModule):
    """Pixels to features [P, embed_dim] (`forward`) and features to decoder rows (`merger`).

    Lives on the first pipeline stage, never sequence-parallel.  By default whole on each tensor-parallel rank, for the
    frames that are its share (frames.py): `sum_gradients` adds their parts up.  Else cut over the ranks, and gradients
    of parameters that are not cut are the same on all of them without a further reduction.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: VisionConfig,
        state: ParallelState,
        core_attention: CoreAttentionName,
    ):
        super().__init__(config)
        self.vision, groups = vision, state.vision_groups
        # The ranks that divide frames between them; None: each sees all.
        self.divided_over = state.groups.tp if state.vision_data_parallel else None
        self.te_attention = uses_te_attention(core_attention, config.params_dtype)
        self.patch_embed = PatchEmbed(config, vision.patch_dim)
        submodules = block_submodules(
            config, vision.depth, causal=False, final_norm=False, core_attention=core_attention
        )
        # The tower is one pipeline stage of its own: megatron must not offset its layers by the decoder's stage.
        self.decoder = TransformerBlock(config, submodules, post_layer_norm=False, pg_collection=groups)
        self.merger = PatchMerger(config, vision, groups)
        if self.divided_over is not None:
            for parameter in self.parameters():  # megatron's layers mark theirs as cut, be it into one part
                parameter.tensor_model_parallel = False

    @property
    def num_ranks(self) -> int:
        """That divide frames between them."""
        return 1 if self.divided_over is None else self.divided_over.size()

    def frames(self, grid_thw: torch.Tensor) -> Frames:
        """The frames of pictures [V, 3] and who sees which."""
        rank = 0 if self.divided_over is None else self.divided_over.rank()
        return Frames.of(grid_thw, self.vision, rank, self.num_ranks)

    def merge(self, features: VisionFeatures) -> torch.Tensor:
        """Decoder rows [V, hidden] of all frames; collective over the ranks that divide them."""
        own = features.rows
        own = self.merger(own) if len(own) else own.new_zeros(0, self.vision.hidden_size)
        return features.frames.gather(own, self.vision.spatial_merge_size**2, self.divided_over)

    def sum_gradients(self) -> None:
        """Add up `main_grad` of trained parameters over the ranks that divide frames; after megatron's reductions."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.divided_over is not None:
            for work in [dist.all_reduce(each.main_grad, group=self.divided_over, async_op=True) for each in trained]:
                work.wait()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron's; where each rank has the whole, one of them saves it: layers of one part know of no others."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.divided_over is not None:
            for entry in nested_values(found):
                pipeline, _, data = entry.replica_id
                entry.replica_id = (pipeline, self.divided_over.rank(), data)
        return found

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Patches [P, patch_dim] of grids [V, 3] -> features before the merger [P, embed_dim]; P may be 0."""
        hidden = self.patch_embed(pixel_values)
        if not len(hidden):
            return hidden
        hidden = self.decoder(hidden.unsqueeze(1), None, packed_seq_params=self._packed(grid_thw.cpu(), hidden.device))
        return hidden.squeeze(1)

    def _packed(self, grid_thw: torch.Tensor, device: torch.device) -> PackedSequences:
        sizes = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        bounds = F.pad(sizes.cumsum(0), (1, 0)).int().to(device)
        plan = None if self.te_attention else SDPAPlan(bounds, causal=False)
        angles = rotary_angles(grid_thw, self.vision).to(device)
        return packed_sequences(bounds, int(sizes.max()), angles, plan=plan)


def rotary_angles(grid_thw: torch.Tensor, vision: VisionConfig) -> torch.Tensor:
    """fp32 [P, head_dim / 2]: the first half turns with the patch's row, the second with its column.

    Patches stand in the order of the merge windows: all patches of one window side by side.
    """
    quarter = vision.head_dim // 4
    frequencies = 1.0 / vision.rope_theta ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    merge = vision.spatial_merge_size
    parts: dict[tuple[int, int, int], torch.Tensor] = {}
    order = [tuple(grid) for grid in grid_thw.tolist()]
    for t, h, w in set(order):
        rows = torch.arange(h)[:, None].expand(h, w)
        columns = torch.arange(w).expand(h, w)
        grid = torch.stack([rows, columns], dim=-1)
        windows = grid.reshape(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(h * w, 2, 1)
        parts[t, h, w] = (windows.float() * frequencies).flatten(1).repeat(t, 1)
    return torch.cat([parts[grid] for grid in order])
