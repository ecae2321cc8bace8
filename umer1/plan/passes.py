"""What one micro-batch's passes through a pipeline stage allocate and give back."""

from umer1.data.schema import PackedBatch
from umer1.models.qwen2_vl.frames import Frames
from umer1.plan.activations import LayerBytes, decoder_layer, vision_layer
from umer1.plan.buffers import StateBytes
from umer1.plan.head import HeadBytes, head_bytes
from umer1.plan.layout import stage_layers
from umer1.plan.parameters import stage_parameters
from umer1.plan.setup import Setup, gathered_tokens, num_patches
from umer1.plan.timeline import Timeline


class StagePasses:
    """Passes of one stage on a timeline.  kinds: embeddings of a side that have a loss."""

    logprobs = False  # the head gives log-probs and not a cross-entropy

    def __init__(self, setup: Setup, stage: int, line: Timeline, *, kinds: int, cross_entropy: bool):
        self.setup, self.line, self.kinds, self.cross_entropy = setup, line, kinds, cross_entropy
        self.first, self.last = stage == 0, stage == setup.layout.pp - 1
        numbers = stage_layers(setup.parallel, setup.model.num_layers, stage)
        self.layers = [len(part) for part in numbers]
        fp8 = setup.config.fp8
        self.in_fp8 = [[not fp8.keeps_in_bf16(number, setup.model.num_layers) for number in part] for part in numbers]
        self.train_vision = setup.config.model.train_vision
        self.vision_features: set[int] = set()
        self.shares: dict[int, Frames] = {}  # by id(batch)
        self.gather_buffer = 0
        chunks = stage_parameters(setup.model, setup.parallel, stage, self.train_vision)
        self.largest = max(parameter.numel for chunk in chunks for parameter in chunk if parameter.trained)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def decoder(self, batch: PackedBatch) -> LayerBytes:
        """What one decoder layer allocates for the micro-batch."""
        return decoder_layer(
            self.setup.model,
            self.setup.parallel,
            batch.cu_seqlens,
            itemsize=self.setup.itemsize,
            kernel=self.setup.kernel,
            fp8=self.setup.config.fp8,
        )

    def vision(self, batch: PackedBatch) -> LayerBytes:
        """What one ViT layer allocates for the pictures that a rank sees."""
        return vision_layer(
            self.setup.model,
            self.setup.parallel,
            self.frames(batch).grids_of(self.frames(batch).rank),
            itemsize=self.setup.itemsize,
            kernel=self.setup.kernel,
        )

    def head(self, batch: PackedBatch) -> HeadBytes:
        """What the vocabulary head allocates for the supervised rows."""
        return head_bytes(
            self.setup.model,
            len(batch.supervised_rows),
            tp=self.setup.layout.tp,
            itemsize=self.setup.itemsize,
            device=self.setup.device,
            logprobs=self.logprobs,
        )

    def divided(self, batch: PackedBatch) -> Frames:
        """Its pictures between the ranks that see them."""
        return self.setup.frames(batch)

    def frames(self, batch: PackedBatch) -> Frames:
        """`divided`, worked out once for each micro-batch."""
        if id(batch) not in self.shares:
            self.shares[id(batch)] = self.divided(batch)
        return self.shares[id(batch)]

    def patches(self, batch: PackedBatch) -> int:
        """Of the pictures that a rank sees."""
        frames = self.frames(batch)
        return frames.patches[frames.rank]

    def pixels(self, batch: PackedBatch) -> int:
        """A copy of the fp32 pixels in the model's dtype, where it is another."""
        a = self.setup.itemsize
        return 0 if a == 4 else self.patches(batch) * self.setup.model.vision.patch_dim * a

    def features(self, batch: PackedBatch) -> int:
        """The ViT's output before the merger."""
        return self.patches(batch) * self.setup.model.vision.embed_dim * self.setup.itemsize

    def seen_pixels(self, batch: PackedBatch) -> int:
        """fp32 pixels that go when the frozen ViT has seen them."""
        return self.patches(batch) * self.setup.model.vision.patch_dim * 4

    def kept_features(self, batch: PackedBatch) -> int:
        """Of the frozen ViT's output, for the rest of the step."""
        return self.features(batch)

    def merger(self, batch: PackedBatch) -> int:
        """What the merger keeps: its norm's output, fc1's, GELU's, and the rows that it makes."""
        vision, a = self.setup.model.vision, self.setup.itemsize
        tokens = self.patches(batch) // vision.spatial_merge_size**2
        wide, tp = vision.merged_dim, self.setup.parallel.vision_tensor_parallel_size
        return tokens * a * (wide + 2 * wide // tp + self.setup.model.hidden_size)

    def gathered(self, batch: PackedBatch) -> int:
        """What tensor-parallel ranks gather of one another's merged rows, filled up, and the same in order."""
        frames, vision = self.frames(batch), self.setup.model.vision
        rows = (frames.ranks * max(frames.patches) + num_patches(batch)) // vision.spatial_merge_size**2
        return 0 if frames.ranks == 1 else rows * self.setup.model.hidden_size * self.setup.itemsize

    def hidden(self, batch: PackedBatch) -> int:
        """[T, h], complete."""
        return gathered_tokens(batch) * self.setup.model.hidden_size * self.setup.itemsize

    def embeddings(self, batch: PackedBatch) -> int:
        """fp32 [K, S, h]"""
        return self.kinds * len(batch.disc_rows) * self.setup.model.hidden_size * 4

    # -- the frozen or trained ViT -----------------------------------------------------------------------------------

    def see(self, batch: PackedBatch) -> None:
        """The frozen ViT, once a step; its features stay with the micro-batch."""
        if not (self.first and num_patches(batch)) or id(batch) in self.vision_features:
            return
        layer = self.vision(batch)
        self.line.touch("the ViT's forward", vision=max(layer.forward, self.pixels(batch)) + layer.input)
        if not self.train_vision:
            self.vision_features.add(id(batch))
            self.line.hold("vision features", self.kept_features(batch), "the ViT's forward")
            self.line.drop("batch", self.seen_pixels(batch))

    # -- passes ------------------------------------------------------------------------------------------------------

    def embed(self, batch: PackedBatch) -> None:
        """Pass 1, without graph."""
        self.see(batch)
        layer = self.decoder(batch)
        kept = self.features(batch) if self.first and self.train_vision else 0
        self.note_gather(batch)
        self.line.touch("pass 1 (embeddings)", activations=kept + layer.forward + layer.input)
        if self.last:
            self.line.touch("pass 1 (embeddings)", activations=self.hidden(batch) + 3 * self.embeddings(batch))
            self.line.hold("embeddings", self.embeddings(batch), "pass 1 (embeddings)")

    def note_gather(self, batch: PackedBatch) -> None:
        """Megatron keeps one buffer for gathered inputs under sequence parallelism, as large as the largest.

        gloo's reduce-scatter works on copies, which go some time after it: two more on CPU.
        """
        copies = 1 if self.setup.device == "cuda" else 3
        size = copies * self.hidden(batch) if self.setup.parallel.sequence_parallel else 0
        if size > self.gather_buffer:
            self.line.hold("sequence gather buffer", size - self.gather_buffer, "forward")
            self.gather_buffer = size

    def kept(self, batch: PackedBatch, chunk: int) -> dict[str, int]:
        """Name -> bytes that a forward with graph leaves behind."""
        parallel, layer, count = self.setup.parallel, self.decoder(batch), self.layers[chunk]
        full, selective = (parallel.recompute_granularity == name for name in ("full", "selective"))
        saved = layer.saved - (layer.attention_dropped if selective else 0)
        if full and parallel.recompute_method == "block":
            recomputed = min(parallel.recompute_num_layers or 1, count)
            activations = recomputed * layer.input + (count - recomputed) * saved
            activations += sum(self.in_fp8[chunk][recomputed:]) * layer.fp8_change
        elif full:
            activations = -(-count // (parallel.recompute_num_layers or 1)) * layer.input
        else:
            activations = count * saved + sum(self.in_fp8[chunk]) * layer.fp8_change
        found = {"activations": activations}
        if self.first and chunk == 0 and num_patches(batch):
            found["activations"] += self.merger(batch)
            if self.train_vision:
                vision = self.vision(batch)
                depth = self.setup.model.vision.depth
                each = vision.input if full else vision.saved - (vision.attention_dropped if selective else 0)
                found["ViT activations"] = depth * each + self.features(batch) + self.pixels(batch)
        if self.is_end(chunk):
            # The last layer's output for the final norm, the norm's own, whole under sequence parallelism too.
            found["final norm"] = layer.input + self.hidden(batch)
            found["embeddings of a micro-batch"] = 3 * self.embeddings(batch)
            if self.cross_entropy:
                found["head"] = self.head(batch).rows + self.head(batch).kept
        else:
            found["activations"] += layer.input  # what was sent on
        return found

    def is_end(self, chunk: int) -> bool:
        return self.last and chunk == len(self.layers) - 1

    def recomputes_last(self, chunk: int) -> bool:
        """Whether recomputation is for a chunk's last layer too, where the peak is; by blocks it is for the first."""
        parallel = self.setup.parallel
        return parallel.recompute_method != "block" or (parallel.recompute_num_layers or 1) >= self.layers[chunk]

    def forward(self, batch: PackedBatch, chunk: int) -> None:
        """With graph."""
        if chunk == 0:
            self.see(batch)
        self.note_gather(batch)
        kept, layer = self.kept(batch, chunk), self.decoder(batch)
        head = kept.pop("head", 0)
        if self.first and chunk == 0 and num_patches(batch):
            self.line.touch("gathering vision features", working=self.merger(batch) + self.gathered(batch))
        for name, size in kept.items():
            self.line.hold(name, size, "forward")
        working = {"full": layer.forward, "selective": layer.attention_dropped + layer.input}
        granularity = self.setup.parallel.recompute_granularity if self.recomputes_last(chunk) else None
        self.line.touch("forward", working=working.get(granularity, layer.input))
        if head:
            self.line.touch("cross-entropy, forward", head=self.head(batch).rows + self.head(batch).forward)
            self.line.drop("head, before")
            self.line.hold("head", head, "cross-entropy, forward")

    def backward(self, batch: PackedBatch, chunk: int) -> None:
        """Head, then layers from the last to the first, each giving back what it kept; then merger and embedding."""
        kept, layer, count = self.kept(batch, chunk), self.decoder(batch), self.layers[chunk]
        parallel, hidden = self.setup.parallel, self.hidden(batch)
        tied = self.setup.model.tie_word_embeddings
        weight = 0
        if self.is_end(chunk):
            if self.cross_entropy:
                head = self.head(batch)
                self.line.touch("cross-entropy, backward", head=head.backward, gradient=hidden)
                # Of a tied weight on one stage the gradient waits for the embedding's.
                weight = head.weight_gradient if tied and self.first else 0
            self.line.touch("backward of the embeddings", gradient=(1 + self.kinds) * hidden, head=weight)
            self.line.drop("final norm", kept.pop("final norm"))
        self.line.hold("head", weight, "backward")
        full = parallel.recompute_granularity == "full"
        again = 0
        if full and self.recomputes_last(chunk):
            group = 1 if parallel.recompute_method == "block" else parallel.recompute_num_layers or 1
            again = min(group, count) * layer.saved + sum(self.in_fp8[chunk][-group:]) * layer.fp8_change - layer.input
        self.line.touch("backward", working=again + layer.backward, gradient=layer.input)
        vision = kept.pop("ViT activations", 0)
        for name, size in kept.items():
            if name != "head":
                self.line.drop(name, size - (self.merger(batch) if name == "activations" and vision else 0))
        if vision:
            one = self.vision(batch)
            self.line.touch("backward of the ViT", working=(one.saved if full else 0) + one.backward)
            self.line.drop("ViT activations", vision)
            self.line.drop("activations", self.merger(batch))
        if self.first and chunk == 0:
            self.line.touch("backward of the embedding", gradient=hidden, working=self.embedding_gradient())
        # The graph, and with it what the head made in its forward, goes when the next micro-batch's takes its place.
        self.line.drop("head")
        self.line.hold("head, before", kept.get("head", 0), "backward")

    def embedding_gradient(self) -> int:
        """Bytes of the token embeddings' gradient on a tensor-parallel rank."""
        model, tp = self.setup.model, self.setup.layout.tp
        return model.padded_vocab_size(tp) // tp * model.hidden_size * self.setup.itemsize

    def optimizer_step(self, states: StateBytes) -> None:
        """AdamW in place.  On CPU torch's own takes two copies of the largest tensor, gloo one of a gathered buffer."""
        self.line.drop("head, before")
        if self.setup.device == "cpu":
            self.line.touch("optimizer", working=max(2 * 4 * self.largest, states.largest_buffer))
        else:
            self.line.touch("optimizer")
