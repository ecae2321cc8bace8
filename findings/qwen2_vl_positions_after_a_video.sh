#!/usr/bin/env bash
# transformers: where text goes on after a video in Qwen2-VL depends on the release, for the same weights and the same input.
#
# Expected: position ids are part of a published model's contract, so that get_rope_index of any release that loads the
#   weights places text after a video alike, and generate() goes on where the prompt ended.
# Seen: 4.57.6 places it one past the largest position of the video's span, time included; 5.17.0 places it behind the
#   larger merged side alone.  They part as soon as a video has more time steps (frames / 2) than merged rows and columns:
#   a grid of (8, 10, 10) patches, 16 small frames, is enough.  The mrope delta, from which cached decoding goes on,
#   still counts the time steps in 5.17.0: the first generated token is placed as if the prompt had been longer than
#   where a pass over prompt and answer together puts it.
# Effect: the hidden state behind a long video differs between releases without an error; weights that were trained
#   under one rule are read under the other.
# Versions: transformers 4.57.6 and 5.17.0, torch 2.13.0 (CPU), Python 3.11.  Exit 0: as described; else it changed.
set -euo pipefail
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/v"
PIP=("$T/v/bin/python" -m pip install -q --disable-pip-version-check)
"${PIP[@]}" torch==2.13.0
cat > "$T/positions.py" <<'PY'
import inspect
import json

import torch
from transformers import Qwen2VLConfig, Qwen2VLModel, __version__

PAD, START, END = 7, 8, 9
text = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
vision = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=1, patch_size=14)
config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=PAD, image_token_id=6,
                       vision_start_token_id=START, vision_end_token_id=END)
model = Qwen2VLModel(config)
found = {}
for grid in ([4, 10, 10], [8, 10, 10], [32, 16, 28]):
    pads = grid[0] * grid[1] * grid[2] // 4
    ids = torch.tensor([[1, 2, START, *[PAD] * pads, END, 3, 4]])
    arguments = {"video_grid_thw": torch.tensor([grid]), "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = 2 * (ids == PAD).int()
    positions, delta = model.get_rope_index(ids, **arguments)
    found["x".join(map(str, grid))] = {
        "text goes on at": int(positions[0, 0, -3]),
        "last token": int(positions[0, 0, -1]),
        "first generated token": int(ids.shape[1] + delta),
    }
print(json.dumps({"transformers": __version__, **found}))
PY
for version in 4.57.6 5.17.0; do
    "${PIP[@]}" "transformers==$version" numpy
    HF_HUB_OFFLINE=1 "$T/v/bin/python" "$T/positions.py" 2>/dev/null | tee "$T/$version.json"
done
"$T/v/bin/python" - "$T/4.57.6.json" "$T/5.17.0.json" <<'PY'
import json
import sys

old, new = (json.load(open(path)) for path in sys.argv[1:])
assert old["4x10x10"]["text goes on at"] == new["4x10x10"]["text goes on at"] == 8
assert (old["8x10x10"]["text goes on at"], new["8x10x10"]["text goes on at"]) == (11, 8)
assert (old["32x16x28"]["text goes on at"], new["32x16x28"]["text goes on at"]) == (35, 17)
assert old["32x16x28"]["first generated token"] == old["32x16x28"]["last token"] + 1
assert new["32x16x28"]["first generated token"] > new["32x16x28"]["last token"] + 1
print("as described")
PY
