"""What real ranks hold: run by umer1.testing.run_distributed."""

from types import SimpleNamespace
from typing import Any

import torch

from umer1.checkpoints.shards import ShardTaker
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig
from umer1.models.qwen2_vl.weights import unwrap
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.optimizer import OptimizerConfig, build_optimizer, step_if_finite


def tiny_shape(*, tied: bool = True, hidden: int = 32, layers: int = 4, vocabulary: int = 131) -> Qwen2VLConfig:
    """Sizes that no alignment divides: an odd vocabulary, padded under tensor parallelism, odd widths of the FFNs."""
    return Qwen2VLConfig(
        vision=VisionConfig(depth=2, embed_dim=24, num_heads=2, mlp_ratio=1.75, hidden_size=hidden, patch_size=7),
        hidden_size=hidden,
        num_layers=layers,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=42,
        vocab_size=vocabulary,
        mrope_section=(hidden // 8 - 2, 1, 1),
        tie_word_embeddings=tied,
        image_token_id=101,
        video_token_id=102,
        vision_start_token_id=103,
        vision_end_token_id=104,
    )


def held(cases: list[tuple[Qwen2VLConfig, dict[str, Any], ModelConfig]]) -> list[dict[str, Any]]:
    """For each case what this rank's model, gradient buffers and optimizer are made of, after one step."""
    return [_held(*case) for case in cases]


def _held(config: Qwen2VLConfig, layout: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    parallel = ParallelConfig(**layout)
    with init_distributed(parallel, seed=1) as state:
        models = build_training_model(model, parallel, SimpleNamespace(config=config), state, weights_follow=True)
        distributed = parallel.use_distributed_optimizer
        optimizer, _ = build_optimizer(OptimizerConfig(train_iters=2), models, use_distributed_optimizer=distributed)
        for each in models:
            each.zero_grad_buffer()
        optimizer.zero_grad()
        step_if_finite(optimizer, 1.0, True)
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        moments = [
            value
            for part in parts
            for values in part.optimizer.state.values()
            for name, value in values.items()
            if name in ("exp_avg", "exp_avg_sq")
        ]
        updated = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        buffers = [buffer for each in models for buffer in each.buffers]
        snapshot = ShardTaker(state).take(models, optimizer, copy=True)
        dtype = model.params_dtype
        return {
            "stage": state.pp_rank,
            "dp": state.dp_size,
            "dp_rank": state.dp_rank,
            "parameters": [
                [(name, tensor.numel(), tensor.requires_grad) for name, tensor in unwrap(each).named_parameters()]
                for each in models
            ],
            "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
            "parameter_bytes": sum(buffer.param_data.nbytes for buffer in buffers if buffer.param_data is not None)
            + sum(
                tensor.nbytes
                for each in models
                for tensor in each.parameters()
                if not (distributed and tensor.requires_grad)
            ),
            "moment_bytes": sum(tensor.nbytes for tensor in moments),
            "snapshot_bytes": sum(each.data.nbytes for tensors in snapshot.tensors.values() for each in tensors),
            "main_bytes": 4 * updated if dtype == torch.bfloat16 else 0,
        }
