"""What umer1 adds to each vLLM worker: weights that arrive in pieces.

vLLM imports this module in every worker before the model is built, on any number of GPUs.
"""

from typing import Any

import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from umer1 import device
from umer1.rl.checksum import checksum
from umer1.rl.engines.vllm_staging import Assembler, StagingView


class WorkerExtension:
    """Methods that vLLM's workers get; called through collective_rpc.  `self` is the worker."""

    def umer1_begin_weights(self, staging: dict[str, Any] | None) -> None:
        """staging: how to map the trainer's buffer (StagingView); None when the bytes come with each call."""
        self.umer1_staging = StagingView(staging, self.device) if staging else None
        self.umer1_assembler = Assembler(self.device)
        self.umer1_arrived: dict[str, float] = {}
        self.umer1_loaded: set[str] = set()
        initialize_layerwise_reload(self.get_model())

    def umer1_put_weights(self, pieces: list[dict[str, Any]], body: bytes | None) -> None:
        """pieces: parts of tensors (see vllm_staging); returns when the staging buffer may be written again."""
        source = self.umer1_staging.bytes if body is None else torch.frombuffer(bytearray(body), dtype=torch.uint8)
        whole = self.umer1_assembler.add(pieces, source)
        for name, tensor in whole:
            self.umer1_arrived[name] = checksum(tensor)
        self.umer1_loaded |= set(self.get_model().load_weights(iter(whole)))
        device.synchronize()

    def umer1_end_weights(self) -> dict[str, float]:
        """Finish the model.  Checksums of every tensor that came, and of the model's own where it keeps them whole."""
        model = self.get_model()
        if self.umer1_assembler.name is not None:
            raise RuntimeError(f"only a part of {self.umer1_assembler.name} arrived")
        finalize_layerwise_reload(model, self.model_config)
        _renew_tied_head(model)
        _check_buffers(model)
        self.model_runner.reset_encoder_cache()
        parameters = dict(model.named_parameters())
        missing = set(parameters) - self.umer1_loaded
        if missing:
            raise RuntimeError(f"the weights do not fill {sorted(missing)[:5]} ({len(missing)} in all)")
        arrived, self.umer1_staging = self.umer1_arrived, None
        return arrived | _read_back(model, parameters, self.umer1_assembler.kinds)

    def umer1_abandon_weights(self) -> None:
        """Leave an update that broke off; what the model holds afterwards is of no use."""
        finalize_layerwise_reload(self.get_model(), self.model_config)
        self.umer1_staging = self.umer1_assembler = None


def _check_buffers(model: Any) -> None:
    """Raises RuntimeError when the model has values besides its weights: dummy loading has filled them at random.

    Attention's scales of a quantised KV cache are set to 1 by every update.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in weights and not (name.endswith("_scale") and bool((value == 1).all())):
            raise RuntimeError(f"this vLLM keeps a value in the model that no weight update sets: {name}")


def _renew_tied_head(model: Any) -> None:
    """A head tied to the embedding table has no weights of its own to load, so that vLLM leaves it as it was.

    On the CPU it multiplies by a repacked copy, which would stay that of the weights before: silently wrong.
    """
    language_model = model.language_model
    head = language_model.lm_head
    if getattr(head, "weight", None) is language_model.model.embed_tokens.weight:
        head.quant_method.process_weights_after_loading(head)


def _read_back(model: Any, parameters: dict[str, torch.Tensor], kinds: dict[str, tuple]) -> dict[str, float]:
    """ "engine:" + Hugging Face name -> checksum of the running model's own tensor of the same dtype and shape.

    Fused (q, k, v), packed (CPU linear layers) and sharded tensors have other names or shapes and are left out; the
    rows that vLLM adds to a vocabulary are not counted.
    """
    found = {}
    for name, (shape, dtype) in kinds.items():
        mapped = model.hf_to_vllm_mapper.apply_list([name])
        parameter = parameters.get(mapped[0]) if mapped else None
        if parameter is None or parameter.dtype != dtype or parameter.dim() != len(shape):
            continue
        if name.endswith("embed_tokens.weight"):
            parameter = parameter[: shape[0]]
        if tuple(parameter.shape) == shape:
            found[f"engine:{name}"] = checksum(parameter)
    return found
