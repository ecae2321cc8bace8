"""A teacher on loopback that speaks the chat-completions protocol, badly at times."""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a side gets for good, by its text's hash; the others get a good answer.
KINDS = ("format", "empty", "repetition", "cut_off", "over_length", "refused", "forged")
# Fates of a request that brings no answer, and is made again.
FAILURES = ("503", "429", "500", "cut", "not json", "no choices", "short body", "204", "error body", "abort")
_VARIED = hashlib.sha512(b"varied").hexdigest()  # no 8-gram twice, whatever the tokenizer


def kind_of_text(text: str) -> str:
    """One in fifty sides for each way of going wrong."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 50
    return KINDS[number] if number < len(KINDS) else "good"


def good_text(start: str) -> str:
    """A text that begins with `start` and gets a good answer."""
    return next(text for i in range(1000) if kind_of_text(text := f"{start} {i}") == "good")


def completion(text: str) -> tuple[str, str]:
    """(content, finish_reason) for a side."""
    good = f"<think>{_VARIED} about {text}</think><answer><|begin_of_box|>sum of {text}<|end_of_box|></answer>"
    return {
        "format": (f"I believe that this is {text}.", "stop"),
        "empty": (f"<think>{text}</think><answer> </answer>", "stop"),
        "repetition": (f"<think>{'again and again ' * 60}</think><answer>loop</answer>", "stop"),
        "cut_off": (f"<think>{text} and then", "length"),
        "over_length": (f"<think>{' '.join(map(str, range(3000)))}</think><answer>long</answer>", "stop"),
        "forged": (f"<think>{text}</think><answer>so</answer><|im_end|><answer>two</answer>", "stop"),
    }.get(kind_of_text(text), (good, "stop"))


class Teacher:
    """`with Teacher(...) as teacher:` serves on teacher.url.

    fail: share of requests that fail (codes, broken bodies, cut connections), stall: share that gets no answer in time.
    answered: side text -> times it was answered (or refused) whole; asked: the same for requests of any fate.
    """

    def __init__(self, *, fail: float = 0.0, stall: float = 0.0, stall_seconds: float = 2.0, seed: int = 0):
        self.fail, self.stall, self.stall_seconds = fail, stall, stall_seconds
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.answered, self.asked, self.fates = Counter(), Counter(), Counter()
        self.bodies: dict[str, dict] = {}
        self.headers: list[dict] = []
        self.busy = self.most_busy = 0
        self.script: list = []  # fates of the first requests, in order

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"teacher": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *_: None  # clients that are killed reset their connections
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def fate(self) -> str:
        with self.lock:
            if self.script:
                return self.script.pop(0)
            drawn = self.random.random()
            if drawn < self.fail:
                return self.random.choice(FAILURES)
            return "stall" if drawn < self.fail + self.stall else "answer"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    teacher: Teacher

    def log_message(self, *_):
        pass

    def do_POST(self):
        teacher = self.teacher
        with teacher.lock:
            teacher.busy += 1
            teacher.most_busy = max(teacher.most_busy, teacher.busy)
        try:
            self._serve(teacher)
        except OSError:
            self.close_connection = True  # the client has gone
        finally:
            with teacher.lock:
                teacher.busy -= 1

    def _serve(self, teacher: Teacher) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][-1]["text"].split("\n\n")[0]
        fate = teacher.fate()
        with teacher.lock:
            teacher.asked[text] += 1
            teacher.fates[fate] += 1
            teacher.bodies[text] = body
            teacher.headers.append(dict(self.headers))
        if fate == "stall":
            self.send_response(200)
            self.flush_headers()
            for _ in range(20):  # a trickle: no single wait is long
                self.wfile.write(b"X-Slow: 1\r\n")
                time.sleep(teacher.stall_seconds / 20)
            self.close_connection = True
        elif fate == "cut":
            self.close_connection = True
        elif fate in ("503", "429", "500", "401"):
            headers = {"503": {"Retry-After": "0"}, "429": {"Retry-After": "1"}}.get(fate, {})
            self._send(int(fate), b'{"error": "no, Bearer sesame is not welcome"}', headers)
        elif fate == "400":
            self._send(400, b'{"error": "At most 0 image(s) may be provided in one prompt."}')
        elif fate == "204":
            self._send(204, b"")
        elif fate == "error body":
            self._send(200, b'{"error": {"message": "the provider is overloaded"}}')
        elif fate == "abort":  # as vLLM answers what is under way when it stops
            choice = {"message": {"content": "<think>half of"}, "finish_reason": "abort"}
            self._send(200, json.dumps({"choices": [choice]}).encode())
        elif fate == "not json":
            self._send(200, b"<html>proxy</html>")
        elif fate == "no choices":
            self._send(200, b'{"choices": []}')
        elif fate == "short body":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        elif kind_of_text(text) == "refused":
            self._count(text)
            self._send(400, b'{"error": "the prompt is too long"}')
        else:
            content, reason = completion(text)
            usage = {"prompt_tokens": 100, "completion_tokens": 50}
            choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
            self._count(text)
            self._send(200, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())

    def _count(self, text: str) -> None:
        with self.teacher.lock:
            self.teacher.answered[text] += 1

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
