"""What plain vLLM makes of a shared directory, as its users call it: python vllm_generates.py DIR PROMPTS.json TOKENS

PROMPTS.json is a list of {"prompt", "image": path or null}; prints one JSON line with the token ids of each response.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main(directory: str, prompts: str, num_tokens: str) -> None:
    asked = []
    for entry in json.loads(Path(prompts).read_text()):
        asked.append({"prompt": entry["prompt"]})
        if entry["image"]:
            asked[-1]["multi_modal_data"] = {"image": Image.open(entry["image"]).convert("RGB")}
    llm = LLM(directory, dtype="float32", max_model_len=512, max_num_seqs=4, enforce_eager=True)
    found = llm.generate(asked, SamplingParams(temperature=0, max_tokens=int(num_tokens)), use_tqdm=False)
    print(json.dumps([list(request.outputs[0].token_ids) for request in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
