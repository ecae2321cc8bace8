"""Tensor, sequence, pipeline (even, uneven, interleaved) and data parallelism: every gradient equals transformers'.

All layouts of one world size share one start of processes.  Micro-batches differ in length, number of images and order.
"""

from functools import partial

import umer1.megatron_import  # noqa: F401

import pytest
import qwen2_vl_reference as reference
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.model import build_model
from umer1.testing import assert_close, run_distributed
from umer1.training.build import finalize_gradients

# Micro-batches as positions in reference.sequences; of different and odd lengths, on purpose: one picture (which one of
# two ranks sees), two, a video of three frames, none.
MICRO_BATCHES = [[0, 1], [2], [3, 4, 0, 1], [4]]

LAYOUTS = {
    2: {
        "dp": {},
        "dp_overlap": dict(overlap_grad_reduce=True),
        "tp": dict(tensor_model_parallel_size=2),
        "tp_overlap": dict(tensor_model_parallel_size=2, overlap_grad_reduce=True),
        "tp_vision_cut": dict(tensor_model_parallel_size=2, vision_data_parallel=False),
        "tp_sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
        "tp_sp_vision_cut": dict(
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            vision_data_parallel=False,
            recompute_granularity="full",
        ),
        "tp_sp_recompute": dict(tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity="full"),
        "pp": dict(pipeline_model_parallel_size=2),
        "pp_uneven": dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1),
        "pp_recompute_selective": dict(pipeline_model_parallel_size=2, recompute_granularity="selective"),
        "pp_vpp": dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    },
    4: {
        "tp_pp": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        "tp_sp_pp_vpp": dict(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            sequence_parallel=True,
            num_layers_per_virtual_pipeline_stage=1,
        ),
        "pp4": dict(pipeline_model_parallel_size=4),
        "pp_vpp_dp": dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1),
    },
}


def loss_weights(config, micro_batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed random weights of hidden states [T, H] and of the logits of the last row [1, V]."""
    generator = torch.Generator().manual_seed(100 + micro_batch)
    hidden = torch.randn(tokens, config.hidden_size, generator=generator)
    return hidden, torch.randn(1, config.vocab_size, generator=generator)


def reference_run(name: str) -> dict:
    """transformers' weights, gradients of the summed loss of all micro-batches, and each one's hidden states."""
    theirs, config = reference.reference_model(name), reference.our_config(name)
    items, hidden = reference.sequences(config), []
    for number, rows in enumerate(MICRO_BATCHES):
        states = reference.reference_hidden(theirs, [items[i] for i in rows])
        weight, logit_weight = loss_weights(config, number, states.shape[0])
        ((states * weight).sum() + (theirs.lm_head(states[-1:]) * logit_weight).sum()).backward()
        hidden.append(states.detach())
    weights, gradients = reference.hf_tensors(theirs), reference.hf_tensors(theirs, grad=True)
    return dict(weights=weights, gradients=gradients, hidden=hidden)


def step(iterator, model, *, config, state, found):
    """megatron's forward step: (output, loss function)."""
    number, batch = next(iterator)
    inner = model.module
    output = model(**batch)

    def loss(hidden):
        found[number] = hidden.detach()
        weight, logit_weight = loss_weights(config, number, hidden.shape[0])
        columns = inner.local_vocab * state.tp_rank
        logits = inner.logits(hidden[-1:])[:, : inner.real_local_vocab]
        local = logit_weight[:, columns : columns + inner.real_local_vocab]
        # The first term stands on every tensor-parallel rank, the second is cut over them.
        scalar = (hidden * weight).sum() + (logits * local).sum()
        return scalar, torch.zeros((), dtype=torch.int), {"loss": scalar.detach()}

    return output, loss


def check_layout(name: str, settings: dict, expected: dict) -> None:
    parallel, config = ParallelConfig(**settings), reference.our_config(name)
    with init_distributed(parallel, seed=3) as state:
        models = build_model(config, parallel, state, params_dtype=torch.float32)
        cut = dict(tp_rank=state.tp_rank, tp_size=state.tp_size, whole_vision=parallel.vision_data_parallel)
        reference.copy_weights(models, expected["weights"], config, **cut)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=parallel.overlap_grad_reduce, bucket_size=5000
        )
        wrapped = [DistributedDataParallel(model.config, ddp, model) for model in models]
        models[0].config.finalize_model_grads_func = finalize_gradients
        if parallel.overlap_grad_reduce:
            models[0].config.no_sync_func = wrapped[0].no_sync
        items = reference.sequences(config)
        mine = list(enumerate(MICRO_BATCHES))[state.dp_rank :: state.dp_size]
        batches = [(number, reference.pack([items[i] for i in rows])) for number, rows in mine]
        for _, batch in batches[::2]:  # named or found, the rows of vision features are the same
            pads = (batch["input_ids"] == reference.IMAGE) | (batch["input_ids"] == reference.VIDEO)
            batch["vision_rows"] = pads.nonzero().flatten()
        found: dict[int, torch.Tensor] = {}
        iterators = [iter(batches) for _ in wrapped]
        get_forward_backward_func()(
            forward_step_func=partial(step, config=config, state=state, found=found),
            data_iterator=iterators if len(wrapped) > 1 else iterators[0],
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        assert set(found) == ({number for number, _ in mine} if state.is_last_stage else set())
        for number, hidden in found.items():
            assert_close(f"hidden of micro-batch {number}", hidden, expected["hidden"][number], rtol=2e-5)
        want = reference.to_ours(expected["gradients"], config, **cut)
        for model in models:
            for key, parameter in model.named_parameters():
                full = reference.full_name(model, key)
                assert_close(full, parameter.main_grad, want[full], rtol=3e-5)


def check_layouts(world_size: int, expected: dict[str, dict]) -> None:
    for layout, settings in LAYOUTS[world_size].items():
        for name in expected:
            try:
                check_layout(name, settings, expected[name])
            except Exception as error:
                raise AssertionError(f"layout {layout} of {name}") from error


@pytest.mark.parametrize("world_size", list(LAYOUTS))
def test_gradients_of_every_layout(world_size):
    # Four processes on few cores are slow: one model, the one whose tied embedding needs care, is enough there.
    names = list(reference.CONFIGS) if world_size == 2 else ["tied_gqa"]
    expected = {name: reference_run(name) for name in names}
    run_distributed(check_layouts, world_size, world_size, expected, timeout=400)
