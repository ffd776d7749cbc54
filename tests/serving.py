"""A real HTTP server that answers for a small model as vLLM and SGLang do, and misbehaves when told to.

As a program: `python tests/serving.py MODEL_DIR --port-file FILE` serves the model (and the tokenizer, where there is
one) on a free port of 127.0.0.1, which it writes to FILE, until it is told to end.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

MISBEHAVIOURS = (
    "busy",  # 429 with Retry-After, twice; then fine
    "failing",  # 500, always
    "slow",  # never answers
    "dripping",  # begins an answer and never ends it
    "truncated",  # half the JSON
    "cut",  # closes the connection within the answer, once; then fine
    "fewer",  # one token less at each position than asked
    "moved",  # redirects to another host
    "page",  # 200 and no JSON
    "short",  # one position too few
    "shifted",  # reads another prompt: every token + 1
    "other-tokenizer",  # spells every token as the next one
    "nan",
    "logits",  # no log-probabilities
    "silent",  # no log-probabilities at all
)


class RefusalError(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Serving:
    """`with Serving(model, tokenizer) as server: server.url`"""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        *,
        name: str = "teacher",
        tokens_as_ids: bool = True,
        echoes: bool = True,
        max_logprobs: int = 20,
        max_model_len: int | None = 128,
        key: str | None = None,
        misbehave: str | None = None,
        together: int = 1,
    ):
        """
        Args:
            tokens_as_ids: knows `return_tokens_as_token_ids`, as vLLM does; SGLang does not.
            together: answers no completion before so many are asked for at once.
        """
        assert misbehave is None or misbehave in MISBEHAVIOURS
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.tokens_as_ids, self.echoes = tokens_as_ids, echoes
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.key, self.misbehave = key, misbehave
        self.bodies: list[dict[str, Any]] = []
        self.num_requests = 0
        self.lock = threading.Lock()
        self.asked, self.ended = threading.Event(), threading.Event()
        self.barrier = threading.Barrier(together)
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.httpd.daemon_threads = True
        self.thread = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self.httpd.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Serving:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.barrier.abort()
        self.httpd.shutdown()
        self.thread.join()
        self.httpd.server_close()

    def models(self) -> dict[str, Any]:
        card: dict[str, Any] = {"id": self.name, "object": "model", "owned_by": "tests"}
        if self.max_model_len is not None:
            card["max_model_len"] = self.max_model_len
        return {"object": "list", "data": [card]}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, number = body["prompt"], max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0)
        if body["model"] != self.name:
            raise RefusalError(404, f"The model `{body['model']}` does not exist.")
        if number > self.max_logprobs:
            raise RefusalError(
                400, f"Requested logprobs of {number}, which is greater than max allowed: {self.max_logprobs}"
            )
        if self.max_model_len is not None and len(prompt) + body["max_tokens"] > self.max_model_len:
            raise RefusalError(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        vocabulary = self.model.config.vocab_size
        if max(prompt) >= vocabulary:
            raise RefusalError(400, f"Token id {max(prompt)} is out of vocabulary")
        if self.misbehave == "shifted":
            prompt = [(token + 1) % vocabulary for token in prompt]
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([prompt])).logits[0].double()
        known = logits if self.misbehave == "logits" else logits.log_softmax(-1)
        if self.misbehave == "nan":
            known = known * float("nan")
        if self.misbehave == "fewer":
            number -= 1
        # the least probable token is generated: never among the most probable ones, as may happen when one is drawn
        following = [*prompt[1:], int(known[-1].argmin())]
        said = [self.entries(row, token, number) for row, token in zip(known, following, strict=True)]
        if self.misbehave == "short":
            del said[0]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
        if body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = [
                None,
                *(
                    {
                        str(token): {"logprob": value, "rank": rank, "decoded_token": self.spell(token)}
                        for token, (value, rank) in entries.items()
                    }
                    for entries in said[:-1]
                ),
            ]
        if body.get("logprobs"):
            as_ids = bool(body.get("return_tokens_as_token_ids")) and self.tokens_as_ids
            tokens = [*prompt, following[-1]] if body.get("echo") and self.echoes else following[-1:]
            top: list[Any] = said if body.get("echo") and self.echoes else said[-1:]
            if len(tokens) > 1:
                top = [None, *top]
            choice["logprobs"] = {
                "text_offset": [0] * len(tokens),
                "tokens": [self.named(token, as_ids) for token in tokens],
                "token_logprobs": [None if entries is None else next(iter(entries.values()))[0] for entries in top],
                "top_logprobs": [
                    None
                    if entries is None
                    else {self.named(token, as_ids): value for token, (value, _) in entries.items()}
                    for entries in top
                ],
            }
        if self.misbehave == "silent":
            choice["logprobs"] = None
            choice.pop("prompt_logprobs", None)
        return {"id": "cmpl-1", "object": "text_completion", "model": self.name, "choices": [choice]}

    def entries(self, known: torch.Tensor, token: int, number: int) -> dict[int, tuple[float, int]]:
        """As vLLM: the token itself first, then the most probable ones; number or number + 1."""
        values, ids = known.topk(min(number, len(known)))
        result = {token: (float(known[token]), int((known > known[token]).sum()) + 1)}
        for rank, (id_, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
            result.setdefault(id_, (value, rank))
        return result

    def named(self, token: int, as_ids: bool) -> str:
        return f"token_id:{token}" if as_ids else self.spell(token) or ""

    def spell(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        if self.misbehave == "other-tokenizer":
            token = (token + 1) % self.tokenizer.get_vocab_size()
        return self.tokenizer.decode([token], skip_special_tokens=False)


def _handler(serving: Serving) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # headers and content in one packet, or the answer waits 40 ms for the client's acknowledgement
        wbufsize = -1
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.handle_with(lambda: serving.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with serving.lock:
                serving.bodies.append(body)
            serving.asked.set()
            serving.barrier.wait()
            self.handle_with(lambda: serving.completion(body))

        def handle_with(self, answer: Any) -> None:
            with serving.lock:
                serving.num_requests += 1
                count = serving.num_requests
            given = self.headers.get("Authorization")
            if serving.key is not None and given != f"Bearer {serving.key}":
                # some servers repeat what they were given
                self.answer(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            elif serving.misbehave == "busy" and count <= 2:
                self.answer(429, {"error": {"message": "Too many requests"}}, {"Retry-After": "7"})
            elif serving.misbehave == "failing":
                self.answer(500, {"detail": "CUDA error:\n\x1b[31man illegal memory access"})
            elif serving.misbehave == "moved":
                self.answer(307, {}, {"Location": "http://elsewhere.invalid/v1/completions"})
            elif serving.misbehave == "page":
                self.send(200, b"<html>Welcome</html>")
            elif serving.misbehave == "slow":
                serving.ended.wait()
                self.close_connection = True
            elif serving.misbehave == "dripping":
                self.drip()
            else:
                try:
                    content = json.dumps(answer()).encode()
                except RefusalError as refusal:
                    self.answer(refusal.status, {"error": {"message": str(refusal), "code": refusal.status}})
                    return
                if serving.misbehave == "truncated":
                    content = content[: len(content) // 2]
                if serving.misbehave == "cut" and count == 1:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                self.send(200, content)

        def drip(self) -> None:
            """A byte every now and then: each arrives in time, the answer does not."""
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.close_connection = True
            try:
                while not serving.ended.wait(0.02):
                    self.wfile.write(b" ")
                    self.wfile.flush()
            except OSError:
                pass  # the client has given up

        def answer(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self.send(status, json.dumps(content).encode(), headers)

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--misbehave", choices=MISBEHAVIOURS)
    parser.add_argument("--announce", action="store_true", help="print the port too, once it serves")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tokenizer = arguments.model / "tokenizer.json"
    serving = Serving(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None,
        name=arguments.name,
        max_logprobs=arguments.max_logprobs,
        max_model_len=arguments.max_model_len,
        misbehave=arguments.misbehave,
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with serving:
        part = arguments.port_file.with_suffix(".part")
        part.write_text(str(serving.port))
        part.replace(arguments.port_file)
        if arguments.announce:
            print(json.dumps({"port": serving.port}), flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
