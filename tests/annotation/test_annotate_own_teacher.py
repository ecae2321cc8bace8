"""A teacher that annotate starts itself: it is asked with this run's key, ends with the run, and says why it died."""

import os
import subprocess
import sys
import time

import pytest
from annotation_world import dataset, flags, read_lines, write_world

from umer1.annotation import own_teacher
from umer1.annotation.annotate import main
from umer1.data.mini_mmeb import MINI_BASE
from umer1.errors import ConfigError, UserError
from umer1.rl.engines.vllm_install import has_vllm

# A server with the form of vLLM's: its key from the environment, its port from the command line.
SERVER = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"]:
            self.send_error(401)
            return
        if asked["skip_special_tokens"] is not False:
            self.send_error(400)
            return
        text = "<think>" + asked["model"] + "</think><answer>" + str(os.getpid()) + "</answer>"
        self.reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
port = int(sys.argv[sys.argv.index("--port") + 1])
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def own_flags(root, inputs, *more: str) -> list[str]:
    kept = flags(root, inputs, "unused", *more)
    place = kept.index("--endpoint")
    del kept[place : place + 4]  # and --teacher-model
    return [*kept, "--serve-teacher", "--teacher-model", str(MINI_BASE)]


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    return not os.path.exists(f"/proc/{pid}")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr("umer1.annotation.teacher_config.has_vllm", lambda: True)
    return tmp_path, write_world(tmp_path, mmeb=2, hound=1, pages=1)


def test_it_answers_and_ends_with_the_run(world, monkeypatch, capsys):
    root, inputs = world
    monkeypatch.setattr(own_teacher, "_SERVER", ("-c", SERVER))
    main(own_flags(root, inputs))
    sft, filtered, _ = dataset(root)
    assert len(sft) == 4 and not filtered
    answer = sft[0]["qry"]["conversations"][1]["value"]
    assert str(MINI_BASE) in answer
    assert is_gone(int(answer.partition("<answer>")[2].partition("<gen_emb>")[0]))
    # nothing is left to ask: no teacher is started
    monkeypatch.setattr(own_teacher, "_SERVER", ("-c", "raise SystemExit('not needed')"))
    main(own_flags(root, inputs))
    assert len(read_lines(root / "out" / "journal.jsonl")) == 9


def test_one_that_dies_is_quoted(world, monkeypatch):
    root, inputs = world
    monkeypatch.setattr(own_teacher, "_SERVER", ("-c", "raise SystemExit('out of memory, says the teacher')"))
    with pytest.raises(UserError, match="(?s)ended with status 1.*out of memory, says the teacher"):
        main(own_flags(root, inputs))


def test_one_that_dies_on_the_way_is_quoted(world, monkeypatch):
    root, inputs = world
    dying = SERVER.replace("asked = json", "print('out of memory', flush=True), os._exit(3); asked = json")
    monkeypatch.setattr(own_teacher, "_SERVER", ("-c", dying))
    with pytest.raises(UserError, match="(?s)no answer to 2 sides in a row.*ended with status 3.*out of memory"):
        main(own_flags(root, inputs, "--max-attempts", "1", "--stop-after-failures", "2"))


def test_it_ends_with_a_killed_parent(tmp_path):
    child = "import time; print('there', flush=True); time.sleep(600)"
    start = (
        "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'umer1.annotation.teacher_process', "
        f"str(os.getpid()), '-c', {child!r}], stdout=subprocess.PIPE); p.stdout.readline(); "
        "print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, timeout=60)
    assert parent.returncode == -9 and is_gone(int(parent.stdout))


def test_settings_that_do_not_fit_together(tmp_path):
    inputs = write_world(tmp_path, mmeb=1)[:1]
    with pytest.raises(ConfigError) as caught:
        main(flags(tmp_path, inputs, "http://localhost:1/v1", "--serve-teacher", "--vllm-arguments", "'open"))
    for text in ("leave out --endpoint", "teacher_model=toy is not a directory", "No closing quotation"):
        assert text in str(caught.value)


@pytest.mark.thorough
@pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed")
def test_the_real_vllm(tmp_path):
    """The mini model answers pictures and texts; it knows no format, so that every answer is filtered as that."""
    inputs = write_world(tmp_path, mmeb=3)[:1]
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    more = "--max-model-len 1024 --enforce-eager --dtype float32 --chat-template-content-format openai --chat-template "
    with pytest.raises(UserError, match="no pair is left"):
        main(
            own_flags(tmp_path, inputs, f"--vllm-arguments={more}{tmp_path / 'template.jinja'}")
            + ["--max-answer-tokens", "8", "--request-timeout-seconds", "120"]
        )
    answers = read_lines(tmp_path / "out" / "journal.jsonl")[1:]
    assert len(answers) == 6 and all(answer["output_tokens"] > 0 for answer in answers)
